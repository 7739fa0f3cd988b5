"""The mesh of all devices, with axes ("data", "fsdp"), and how batches and parameters are sharded over it and gathered."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def make_mesh(fsdp: int = 1, devices: list | None = None) -> Mesh:
    """Returns all devices of all processes as a mesh in which the devices of a process are neighbours.

    So row r of a global batch is row r of the processes' rows, concatenated in the order of the processes. On TPUs
    `jax.make_mesh` would not ensure this: it follows the rings of the torus, in and out of hosts.

    Args:
      fsdp: Number of devices along the axis that parameters are sharded over.
      devices: Devices to use instead of all.

    Raises:
      ValueError: The number of devices is not a multiple of `fsdp`.
    """
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    if len(devices) % fsdp:
        raise ValueError(f"config.fsdp = {fsdp} does not divide the {len(devices)} devices: choose a divisor")
    # Auto, since with the default, Explicit, both Dropout and z @ z.T over a sharded batch raise errors.
    return Mesh(np.array(devices).reshape(-1, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def check_batch_size(mesh: Mesh, batch_size: int, field: str) -> None:
    """Checks that a global batch can be divided evenly among the devices.

    Args:
      mesh: Mesh of all devices.
      batch_size: Rows of the global batch.
      field: Field of the config that sets it, for the error message.

    Raises:
      ValueError: `batch_size` is not a multiple of the number of devices.
    """
    if batch_size % mesh.size:
        raise ValueError(
            f"config.{field} = {batch_size} is not divisible by the {mesh.size} devices: choose a multiple"
        )


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns the global batch on the devices, its rows sharded over both mesh axes, made of this process's rows."""
    rows = NamedSharding(mesh, PartitionSpec(AXES))
    return {name: jax.make_array_from_process_local_data(rows, value) for name, value in batch.items()}


def abstract_batch(mesh: Mesh, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a global batch with the shardings that `put_batch` gives it."""
    rows = NamedSharding(mesh, PartitionSpec(AXES))
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows) for name, leaf in shapes.items()}


def leaf_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Returns how an array of the state is sharded: its largest dimension that is divisible by `fsdp`, over axis "fsdp".

    An array without such a dimension is replicated.
    """
    divisible = [d for d, size in enumerate(shape) if size % fsdp == 0 and size > 0]
    spec = [None] * len(shape)
    if fsdp > 1 and divisible:
        spec[max(divisible, key=lambda d: shape[d])] = "fsdp"
    return PartitionSpec(*spec)


def abstract_state(mesh: Mesh, shapes):
    """Returns `shapes` with a sharding for every leaf, by `leaf_spec`."""

    def place(leaf):
        sharding = NamedSharding(mesh, leaf_spec(leaf.shape, mesh.shape["fsdp"]))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes)


def shards_params() -> bool:
    """Returns whether the mesh of `jax.set_mesh` shards parameters: whether its axis "fsdp" has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["fsdp"] > 1


def gather(params):
    """Returns parameters that are sharded over axis "fsdp" whole on every device; their gradients are sharded as they were.

    Left to itself, XLA leaves the parameters sharded and moves the activations of every layer between the devices. The
    gradient of a plain constraint would be whole on every device as well: an all-reduce, which sends twice what a
    reduce-scatter does. To be called under `jax.jit`, within the mesh; without one it returns the parameters as they are.
    """
    return jax.tree.map(_gather_leaf, params) if shards_params() else params


@jax.custom_vjp
def _gather_leaf(x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def _scatter_gradient(_, gradient: jax.Array) -> tuple[jax.Array]:
    fsdp = jax.sharding.get_abstract_mesh().shape["fsdp"]
    return (jax.lax.with_sharding_constraint(gradient, leaf_spec(gradient.shape, fsdp)),)


_gather_leaf.defvjp(lambda x: (_gather_leaf(x), None), _scatter_gradient)


def replace_leaves(tree, new):
    """Returns `tree` with some arrays replaced by those of `new`, with the shardings of the arrays they replace.

    Args:
      tree: Nested dictionaries of arrays on the devices.
      new: Nested dictionaries of host arrays, with some of the names of `tree`; the same on every process.
    """
    if not isinstance(tree, dict):
        return jax.make_array_from_callback(tree.shape, tree.sharding, lambda index: new[index])
    return {name: replace_leaves(leaf, new[name]) if name in new else leaf for name, leaf in tree.items()}
