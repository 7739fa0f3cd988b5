"""Devices as one mesh ("data", "fsdp"), and how batches and parameters lie on it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def make_mesh(fsdp: int = 1, devices: list | None = None) -> Mesh:
    """Returns all devices of all processes as a mesh, those of a process next to each other.

    So row r of a global batch is row r of what the processes read one after the other, also on TPUs, where
    `jax.make_mesh` would go along the rings of the torus, in and out of hosts.

    Args:
      fsdp: Devices along the axis that parameters are spread over.
      devices: These instead.

    Raises:
      ValueError: The number of devices is not a multiple of `fsdp`.
    """
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    if len(devices) % fsdp:
        raise ValueError(f"config.fsdp = {fsdp} does not divide the {len(devices)} devices: choose a divisor")
    # Auto: under the default, Explicit, Dropout and z @ z.T over a sharded batch raise.
    return Mesh(np.array(devices).reshape(-1, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def check_batch_size(mesh: Mesh, batch_size: int, field: str) -> None:
    """Checks that a global batch spreads evenly.

    Raises:
      ValueError: It is not a multiple of the number of devices.
    """
    if batch_size % mesh.size:
        raise ValueError(
            f"config.{field} = {batch_size} is not divisible by the {mesh.size} devices: choose a multiple"
        )


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns a batch on the devices, rows over both axes, from this process's rows."""
    sharding = NamedSharding(mesh, PartitionSpec(AXES))
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def abstract_state(mesh: Mesh, shapes):
    """Returns `shapes` with a sharding at every leaf: its largest divisible dimension over "fsdp", or copied everywhere."""
    fsdp = mesh.shape["fsdp"]

    def place(leaf):
        divisible = [d for d, size in enumerate(leaf.shape) if size % fsdp == 0 and size > 0]
        spec = [None] * leaf.ndim
        if fsdp > 1 and divisible:
            spec[max(divisible, key=lambda d: leaf.shape[d])] = "fsdp"
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes)


def replace_leaves(tree, new):
    """Returns `tree` with the arrays of `new`, which holds some of its names, laid out as those they replace.

    Args:
      tree: Nested dictionaries of arrays on the devices.
      new: Nested dictionaries of host arrays, the same on every process.
    """
    if not isinstance(tree, dict):
        return jax.make_array_from_callback(tree.shape, tree.sharding, lambda index: new[index])
    return {name: replace_leaves(leaf, new[name]) if name in new else leaf for name, leaf in tree.items()}
