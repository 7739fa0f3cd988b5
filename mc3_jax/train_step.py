"""The train step: from a batch of decoded clips to new parameters, as pure functions of arrays.

Everything is written in the global view: the batch is the whole batch, whatever mesh it is spread over, so the loss
and its gradient are those of a single device. Every device gathers all embeddings, once per modality, and computes the whole
loss. So the backward pass of the loss needs no communication; only the parameters' gradients are summed over devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from mc3_jax import config as config_lib, mesh as mesh_lib, model as model_lib, objective, phases as phases_lib
from mc3_jax.losses import active, contrastive
from mc3_jax.model import Batch
from mc3_jax.models import frontend
from mc3_jax.models.mc3 import MC3

SMALL_LEAF = 2**14  # values; the norm of a larger leaf takes a GPU longer than starting its kernel
# XLA options. By default XLA merges a matrix product of the class tokens and one of the patches if both have the same
# weights, and copies all patches for it. It also tries each product as a Triton kernel, for which it splits off what cuBLAS
# adds at no cost, such as biases.
GPU_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0, "xla_gpu_enable_triton_gemm": False}


class TrainState(flax.struct.PyTreeNode):
    """The state of training, which a checkpoint holds.

    Attributes:
      step: Number of steps done, int32 scalar.
      params: Parameters, float32: {"audio": ..., "video": ..., "text": ...}; with classes "classifier" as well; and, if a
        phase of the run learns its scale, "loss": {"log_scale"}.
      opt_state: Optimizer state of the phase that the next step belongs to.
      memory: What that phase's loss keeps from step to step, such as CM-ACC's pools; () if it keeps nothing.

    The leaves are arrays, or `jax.ShapeDtypeStruct`s (with shardings, if a mesh is known) where a state is only planned.
    """

    step: Any
    params: Any
    opt_state: Any
    memory: Any = ()


def to_tree(state: TrainState) -> dict[str, Any]:
    """Returns the parts of a state that are saved, by name; an empty memory is left out."""
    tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state, "memory": state.memory}
    return {name: value for name, value in tree.items() if not (name == "memory" and value == ())}


class Health(flax.struct.PyTreeNode):
    """Whether a step was applied, and diagnostics for a step that was not.

    Attributes:
      taken: Whether the state was updated, bool scalar.
      grad_norms: L2 norm of each leaf's gradient, float32 [leaves], in the order of `jax.tree.leaves(params)`.
      finite_rows: Whether each clip's embedding is finite, bool [3, b]; the rows are audio, video and text.
    """

    taken: Any
    grad_norms: Any
    finite_rows: Any


def init_state(model: MC3, config: config_lib.Config, phase: phases_lib.Phase) -> TrainState:
    """Returns the state at step 0: fresh parameters, and the optimizer state and memory that a phase begins with."""
    params = model_lib.init_params(model, config.model, config.seed) | objective.init_params(config)
    tx = phases_lib.make_optimizer(phase.config, params)
    return TrainState(
        jnp.zeros((), jnp.int32), params, tx.init(params), objective.init_memory(config, phase.config, params)
    )


def draw_state(init: Callable[[], TrainState], abstract: TrainState) -> TrainState:
    """Returns `init()`, computed on the devices, with the shardings of `abstract`."""
    with model_lib.fast_draws():
        return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()


def enter_phase(
    config: config_lib.Config, phase: phases_lib.Phase, state: TrainState, abstract: TrainState
) -> TrainState:
    """Returns the state a phase begins with: the same parameters, the optimizer state kept or reset, and a new memory.

    Args:
      config: Config of the run.
      phase: The phase that begins.
      state: State at the end of the phase before.
      abstract: Shapes and shardings of the new phase's state.

    Raises:
      ValueError: The optimizer state is to be kept, but the new phase trains other parameters.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    tx = phases_lib.make_optimizer(phase.config, state.params)
    if phase.config.reset_optimizer:
        opt_state = jax.jit(tx.init, out_shardings=places.opt_state)(state.params)
    else:
        opt_state = phases_lib.carry_moments(phase.config, tx, state.params, state.opt_state)
    return state.replace(opt_state=opt_state, memory=begin_memory(config, phase, state.params, abstract))


def begin_memory(config: config_lib.Config, phase: phases_lib.Phase, params, abstract: TrainState):
    """Returns the memory that a phase begins with, laid out as in `abstract`; its momentum encoders are copies of `params`.

    Args:
      config: Config of the run.
      phase: The phase that begins.
      params: Parameters at the start of the phase.
      abstract: Shapes and shardings of the phase's state.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract.memory)
    return jax.jit(lambda params: objective.init_memory(config, phase.config, params), out_shardings=places)(params)


def batch_shapes(
    config: config_lib.Config, num_samples: int, canvas_px: tuple[int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of what train steps take of a global batch that `mc3_jax.data.loader` makes.

    Args:
      config: Config of the run.
      num_samples: Audio samples per clip.
      canvas_px: (height, width) of the canvas that holds the video frames.
    """
    rows = config.data.batch_size
    video, text = config.model.video, config.model.text
    shapes = {
        "audio": jax.ShapeDtypeStruct((rows, num_samples), jnp.int16),
        "text_ids": jax.ShapeDtypeStruct((rows, text.num_tokens), jnp.int32),
        "text_mask": jax.ShapeDtypeStruct((rows, text.num_tokens), jnp.int32),
        "row": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    if "video" in phases_lib.all_modalities(config.phases):
        shapes["video"] = jax.ShapeDtypeStruct((rows, video.num_frames, *canvas_px, 3), jnp.uint8)
        shapes["video_size"] = jax.ShapeDtypeStruct((rows, 2), jnp.int32)
    if any(phase.classification_weight > 0 for phase in config.phases):
        shapes["class_id"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return shapes


def check_shapes(
    model: MC3, config: config_lib.Config, phases: list[phases_lib.Phase], batch: Mapping[str, jax.ShapeDtypeStruct]
):
    """Returns the parameters' shapes, after tracing every phase's loss on a batch of the data's shapes; computes nothing.

    Args:
      model: Model of the config.
      config: Config of the run.
      phases: Phases of the run.
      batch: Shapes of a batch, of `batch_shapes`.

    Raises:
      ValueError: Data and model don't fit, or a phase can't keep the optimizer state of the phase before.
    """
    shapes = jax.eval_shape(lambda: model_lib.init_params(model, config.model, 0) | objective.init_params(config))
    step, opt_state = jax.ShapeDtypeStruct((), jnp.int32), None
    for phase in phases:
        memory = jax.eval_shape(lambda params: objective.init_memory(config, phase.config, params), shapes)  # noqa: B023
        jax.eval_shape(make_loss_fn(model, config, phase.config), shapes, step, batch, memory)
        tx = phases_lib.make_optimizer(phase.config, shapes)
        if opt_state is not None and not phase.config.reset_optimizer:
            phases_lib.carry_moments(phase.config, tx, shapes, opt_state)
        opt_state = jax.eval_shape(tx.init, shapes)
    return shapes


def _constrain(tree, spec: PartitionSpec):
    """Returns the arrays of a tree laid out by `spec` on the current mesh, or unchanged if no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), tree)


def make_train_embed_fn(model: MC3, config: config_lib.Config, phase: config_lib.PhaseConfig) -> Callable:
    """Returns `embed(params, step, batch) -> {"audio", "video", "text"}`, each L2-normalised [b, d], with augmentation.

    Only the phase's modalities are embedded; if the model has classes, the result holds "logits" [b, c] as well. The result
    for a row depends only on its clip, the parameters, the seed, the step and `batch["row"]`, not on the other rows.
    """
    names = phases_lib.modalities(phase)
    used = (*names, *([config_lib.CLASSIFIER] if config.model.num_classes else []))

    def embed(params, step, batch: Batch):
        towers = {
            name: params[name] if name in phase.trainable else jax.lax.stop_gradient(params[name]) for name in used
        }
        towers = mesh_lib.gather(towers)
        augment_key, dropout_key = jax.random.split(_step_key(config, step))
        inputs = _of_modalities(names, model_lib.prepare(batch, config.model, augment_key))
        return model.apply({"params": towers}, **inputs, row=batch["row"], train=True, rngs={"dropout": dropout_key})

    return embed


def _of_modalities(names: tuple[str, ...], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the model's inputs whose keys begin with one of the names, such as "text_ids" for "text"."""
    return {key: value for key, value in inputs.items() if key.startswith(names)}


def _step_key(config: config_lib.Config, step) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.key(config.seed), step)


def _make_head(config: config_lib.Config, phase: config_lib.PhaseConfig) -> Callable:
    """Returns `head(embeddings, loss_params, targets, groups, step, keys, memory) -> (loss, (terms, memory))`."""

    def head(embeddings, loss_params, targets, groups, step, keys, memory):
        rng = jax.random.fold_in(_step_key(config, step), 2)
        loss, (terms, rings) = objective.phase_loss(
            embeddings, phase, loss_params=loss_params, targets=targets, groups=groups, keys=keys, memory=memory, rng=rng,
            block_rows=config.loss_block_rows,
        )  # fmt: skip
        return loss, (terms | {"finite_rows": _finite_rows(embeddings)}, rings)

    return head


def _ask_memory(model: MC3, config: config_lib.Config, phase: config_lib.PhaseConfig, params, memory):
    """Returns the memory with its momentum encoders updated, and a function of (step, batch) that computes keys by them.

    Without a memory in this phase, the function returns None.
    """
    if not phase.memory.pool_size:
        return memory, lambda step, batch: None
    embed = make_train_embed_fn(model, config, dataclasses.replace(phase, consensus_weight=0.0))  # the pairs' towers alone
    current = {name: params[name] for name in memory["momentum"]}
    momentum = active.momentum_update(memory["momentum"], current, phase.memory.momentum)
    momentum = jax.lax.stop_gradient(momentum)
    return memory | {"momentum": momentum}, functools.partial(embed, momentum)


def _make_targets(config: config_lib.Config, phase: config_lib.PhaseConfig, step, batch: Batch) -> tuple[Batch, Any]:
    """Returns (batch, targets [b, c]): one-hot classes, zeros if the class is unknown; None if the phase doesn't classify.

    With mixup, sounds and targets are mixed.
    """
    if phase.classification_weight == 0:
        return batch, None
    targets = _constrain(jax.nn.one_hot(batch["class_id"], config.model.num_classes), PartitionSpec())
    if phase.mixup == 0:
        return batch, targets
    keys = frontend.row_keys(jax.random.fold_in(_step_key(config, step), 3), batch["row"])
    audio, targets = frontend.mix(batch["audio"], targets, keys, phase.mixup)
    return batch | {"audio": audio}, targets


def _make_groups(phase: config_lib.PhaseConfig, batch: Batch) -> Array | None:
    """Returns an id of each row's narration, equal for equal narrations, [b]; None if the phase doesn't mask same text."""
    if not phase.mask_same_text:
        return None
    return contrastive.same_rows(_constrain(batch["text_ids"], PartitionSpec()))


def make_loss_fn(model: MC3, config: config_lib.Config, phase: config_lib.PhaseConfig) -> Callable:
    """Returns `loss_fn(params, step, batch, memory=()) -> (loss, (terms, memory))`.

    All randomness is a function of (seed, step, row). The terms are float32 scalars, and `finite_rows`, bool [3, b], as in
    `Health`.
    """
    embed, head = make_train_embed_fn(model, config, phase), _make_head(config, phase)

    def loss_fn(params, step, batch: Batch, memory=()):
        memory, make_keys = _ask_memory(model, config, phase, params, memory)
        batch, targets = _make_targets(config, phase, step, batch)
        keys = _constrain(make_keys(step, batch), PartitionSpec())
        embeddings = _constrain(embed(params, step, batch), PartitionSpec())
        return head(embeddings, params.get("loss"), targets, _make_groups(phase, batch), step, keys, memory)

    return loss_fn


def make_validation_fn(model: MC3, config: config_lib.Config, phase: config_lib.PhaseConfig) -> Callable:
    """Returns `validate(params, batch) -> terms`: a phase's loss without augmentation, dropout, mixup and memory.

    The terms are float32 scalars: the loss and its parts, named as in `objective.phase_loss`, without the temperature. If
    `data.chunk_size` is set, that many rows are embedded at a time.
    """
    phase = dataclasses.replace(phase, memory=config_lib.MemoryConfig(), mixup=0.0)
    names = phases_lib.modalities(phase)
    used = (*names, *([config_lib.CLASSIFIER] if config.model.num_classes else []))
    chunk_size = config.data.chunk_size

    def embed(params, batch: Batch):
        inputs = _of_modalities(names, model_lib.prepare(batch, config.model, None))
        return model.apply({"params": mesh_lib.gather({name: params[name] for name in used})}, **inputs, train=False)

    def validate(params, batch: Batch):
        _, targets = _make_targets(config, phase, 0, batch)
        if chunk_size in (0, config.data.batch_size):
            embeddings = _constrain(embed(params, batch), PartitionSpec())
        else:
            chunks = {name: _split_rows(x, chunk_size) for name, x in batch.items()}
            embeddings = jax.lax.map(functools.partial(embed, params), chunks)
            embeddings = jax.tree.map(_join_rows, _constrain(embeddings, PartitionSpec()))
        _, (terms, _) = objective.phase_loss(
            embeddings, phase, loss_params=params.get("loss"), targets=targets, groups=_make_groups(phase, batch),
            block_rows=config.loss_block_rows,
        )  # fmt: skip
        return {name: value for name, value in terms.items() if name != "temperature"}

    return validate


def _finite_rows(embeddings: Mapping[str, Array]) -> Array:
    """Returns whether each embedding is finite, bool [3, b]; True for modalities that the phase doesn't embed."""
    rows = {name: jnp.all(jnp.isfinite(x), axis=1) for name, x in embeddings.items()}
    all_fine = jnp.ones(len(next(iter(embeddings.values()))), bool)
    return jnp.stack([rows.get(name, all_fine) for name in config_lib.MODALITIES])


def make_grad_fn(model: MC3, config: config_lib.Config, phase: config_lib.PhaseConfig) -> Callable:
    """Returns `grad_fn(params, step, batch, memory=()) -> (gradients, (terms, memory))` of the loss of `make_loss_fn`.

    If `data.chunk_size` is set, that many rows are embedded at a time, in two passes. The first gives the loss's gradient
    with respect to the embeddings, the second propagates it to the parameters. Only one chunk's activations are held at a
    time, and the gradient is that of the whole batch: gradient caching, Gao et al., "Scaling Deep Contrastive Learning Batch
    Size under Memory Limited Setup" (RepL4NLP 2021).
    """
    chunk_size = config.data.chunk_size
    if chunk_size in (0, config.data.batch_size):
        return jax.grad(make_loss_fn(model, config, phase), has_aux=True)
    embed, head = make_train_embed_fn(model, config, phase), _make_head(config, phase)

    def grad_fn(params, step, batch: Batch, memory=()):
        chunks = {name: _split_rows(x, chunk_size) for name, x in batch.items()}

        def in_chunks(embed_chunk):
            embeddings = jax.lax.map(lambda chunk: embed_chunk(step, chunk), chunks)
            return jax.tree.map(_join_rows, _constrain(embeddings, PartitionSpec()))

        memory, make_keys = _ask_memory(model, config, phase, params, memory)
        _, targets = _make_targets(config, phase, step, batch)
        keys = in_chunks(make_keys) if phase.memory.pool_size else None
        embeddings = in_chunks(functools.partial(embed, params))
        loss_params = params.get("loss")
        (to_embeddings, to_loss_params), aux = jax.grad(head, argnums=(0, 1), has_aux=True)(
            embeddings, loss_params, targets, _make_groups(phase, batch), step, keys, memory
        )
        to_embeddings = jax.tree.map(lambda x: _split_rows(x, chunk_size), to_embeddings)

        def add(total, chunk_and_gradient):
            chunk, gradient = chunk_and_gradient
            _, to_params = jax.vjp(lambda p: embed(p, step, chunk), params)
            return jax.tree.map(jnp.add, total, to_params(gradient)[0]), None

        grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (chunks, to_embeddings))
        return grads | ({"loss": to_loss_params} if loss_params is not None else {}), aux

    return grad_fn


def _split_rows(x: Array, chunk_size: int) -> Array:
    """Returns [b, ...] as [chunks, chunk_size, ...], each chunk spread over the whole mesh; every row stays on its device."""
    mesh = jax.sharding.get_abstract_mesh()
    num_devices = _num_devices()
    x = x.reshape(num_devices, -1, chunk_size // num_devices, *x.shape[1:])
    x = jnp.swapaxes(x, 0, 1).reshape(-1, chunk_size, *x.shape[3:])
    return _constrain(x, PartitionSpec(None, mesh.axis_names))


def _join_rows(x: Array) -> Array:
    """Returns [chunks, chunk_size, ...] as [b, ...] with the rows in their original order, the inverse of `_split_rows`."""
    num_devices = _num_devices()
    x = x.reshape(len(x), num_devices, -1, *x.shape[2:])
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[3:])


def _num_devices() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def _leaf_norms(tree) -> Array:
    """Returns the L2 norm of each leaf, float32 [leaves].

    Small leaves of equal size share one reduction, since a GPU takes longer to start a reduction than to do it. Where leaves
    are sharded over devices (fsdp > 1), each has its own.
    """
    leaves, groups, whole = jax.tree.leaves(tree), {}, not mesh_lib.shards_params()
    for i, leaf in enumerate(leaves):
        groups.setdefault(leaf.size if whole and leaf.size <= SMALL_LEAF else f"leaf {i}", []).append(i)
    norms = []
    for group in groups.values():
        if len(group) == 1:
            norms.append(optax.tree.norm(leaves[group[0]])[None])
        else:
            norms.append(jnp.linalg.norm(jnp.stack([leaves[i].ravel() for i in group]), axis=1))
    return jnp.concatenate(norms)[np.argsort(np.concatenate(list(groups.values())))]


def make_train_step(
    model: MC3, config: config_lib.Config, phase: phases_lib.Phase, tx: optax.GradientTransformation
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array], Health]]:
    """Returns `train_step(state, batch, step) -> (state, metrics, health)` of a phase; jit it with the state donated.

    If the loss, the norm of the gradient or the norm of an update is not finite, the state is returned unchanged. The same
    happens if `step`, the number of steps done as the caller counts them, differs from `state.step`. The caller reads
    `health` late and may have begun another step by then, and that step must not be applied either.

    Metrics are float32 scalars: the loss and its terms, `grad_norm`, `learning_rate` and, for each tower, the norm of its
    update divided by that of its parameters (`update_ratio_audio` and so on).
    """
    grad_fn = make_grad_fn(model, config, phase.config)
    schedule = phases_lib.learning_rate(phase)
    # The inner jit makes JAX trace each function once for all its calls in a step; XLA inlines them.
    update, leaf_norms = jax.jit(tx.update), jax.jit(_leaf_norms)

    def train_step(state: TrainState, batch: Batch, step: Array):
        grads, (metrics, memory) = grad_fn(state.params, state.step, batch, state.memory)
        finite_rows = metrics.pop("finite_rows")
        rate = schedule(state.step)
        updates, _ = update(grads, state.opt_state, state.params)
        grad_norms, update_norms, param_norms = (leaf_norms(tree) for tree in (grads, updates, state.params))
        metrics |= {"grad_norm": optax.tree.norm(grad_norms), "learning_rate": rate}
        taken = (state.step == step) & jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        places = jax.tree.unflatten(jax.tree.structure(grads), range(len(grad_norms)))
        for tower in config_lib.MODALITIES:
            of_tower = np.array(jax.tree.leaves(places[tower]))
            update_norm, param_norm = (optax.tree.norm(norms[of_tower]) for norms in (update_norms, param_norms))
            metrics[f"update_ratio_{tower}"] = rate * update_norm / param_norm
            # Besides the check itself, this makes all reads of the old state come before the new one is written, so that XLA
            # need not keep a copy of the whole old state.
            taken &= jnp.isfinite(update_norm) & jnp.isfinite(param_norm)
        # The barrier makes XLA compute the updates again: kept, they would take as much memory as the parameters, and would
        # have to be written and read once more.
        grads, state = jax.lax.optimization_barrier((grads, state))
        updates, opt_state = update(grads, state.opt_state, state.params)
        params = objective.limit(jax.tree.map(lambda p, u: p - rate * u, state.params, updates))
        following = TrainState(state.step + 1, params, opt_state, memory)
        state = jax.tree.map(lambda new, old: jnp.where(taken, new, old), following, state)
        return state, metrics, Health(taken, grad_norms, finite_rows)

    return train_step


def jit_train_step(model: MC3, config: config_lib.Config, phase: phases_lib.Phase, state: TrainState):
    """Returns a phase's train step, jitted; the new state reuses the buffers of the old one, and has the same shardings.

    Args:
      model: Model of the config.
      config: Config of the run.
      phase: A phase of the run.
      state: Arrays on the mesh, or their shapes and shardings.
    """
    tx = phases_lib.make_optimizer(phase.config, state.params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    everywhere = NamedSharding(state.step.sharding.mesh, PartitionSpec())  # every process reads metrics and health
    step = make_train_step(model, config, phase, tx)
    options = compiler_options(state.step.sharding.mesh.devices.flat[0])
    return jax.jit(
        step, donate_argnums=0, out_shardings=(shardings, everywhere, everywhere), compiler_options=options
    )


def compiler_options(device: jax.Device) -> dict[str, Any] | None:
    """Returns XLA's options for a train step on devices of this kind; None where the defaults are right."""
    return GPU_OPTIONS if device.platform in ("gpu", "cuda", "rocm") else None
