"""Attention: as matrix products for any device, and in the forms that are fastest on an NVIDIA GPU.

All functions take arrays with separate heads, [..., tokens, h, d], and scale logits by 1 / √d; softmax is in float32. The
class token belongs to no group of patches, but every group attends to it: its key is one more column of logits. `attend` is
the plain form, which runs on any device and to which tests compare the others:

  * `attend_flash` for long groups: cuDNN's, through `jax.nn.dot_product_attention`;
  * `attend_few` if a group is the few frames of a clip, which a matrix-product kernel would pad to 64 or 128;
  * `attend_once` for the single query of the class token.

The last two multiply elementwise and sum. They keep one order of dimensions throughout, so that XLA can compile them to a few
passes over memory without transposes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

FORMS = ("einsum", "cudnn")  # values of `model.attention` besides "auto"
MOST_FRAMES = 8  # limit for `attend_few`, which is unrolled over every pair of frames


def choose_form(form: str, dtype: str, head_dim: int, device: jax.Device | None = None) -> str:
    """Returns the form of attention of a tower: "cudnn" if `form` isn't "einsum" and cuDNN supports it, else "einsum".

    cuDNN supports bfloat16 on NVIDIA GPUs since Ampere, with heads whose width is a multiple of 8 up to 128. Elsewhere
    "cudnn" falls back to "einsum", so that a model trained on a GPU runs anywhere. `check_form` refuses the fallback.

    Args:
      form: `model.attention`.
      dtype: `model.dtype`.
      head_dim: Width of a head of the tower.
      device: Device that the tower runs on; None is JAX's first device.
    """
    device = device or jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))  # not a number on AMD's GPUs
    is_able = device.platform == "gpu" and capability.replace(".", "").isdecimal() and float(capability) >= 8
    fits = dtype == "bfloat16" and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if form != "einsum" and is_able and fits else "einsum"


def check_form(form: str, dtype: str, head_dim: int, device: jax.Device | None = None) -> None:
    """Raises ValueError if `form` is "cudnn" and cuDNN does not support it; takes the arguments of `choose_form`."""
    device = device or jax.devices()[0]
    if form == "cudnn" and choose_form(form, dtype, head_dim, device) != form:
        raise ValueError(
            f"config.model.attention = 'cudnn' needs bfloat16, a head width that is a multiple of 8 up to 128, and an NVIDIA "
            f"GPU since Ampere, but this is {dtype}, {head_dim} wide, on {device.device_kind}: set auto or einsum"
        )


def row_major(x: Array) -> Array:
    """Returns `x`, and makes XLA store it and its gradient in row-major layout.

    Otherwise XLA's GPU compiler chooses a layout that suits one sum, extends it to all operations before, and transposes
    whole arrays to get there.

    Args:
      x: Any array whose first axis is the batch. On a mesh the layout is set for each device's rows separately: set for the
        whole array, it would make XLA bring all rows to every device.
    """
    return _by_rows(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), x)


def _by_rows(function: Callable[..., Array], *arguments: Array) -> Array:
    """Returns `function(*arguments)`, for a function of independent rows; on a mesh each device computes its own rows."""
    mesh, num_rows = jax.sharding.get_abstract_mesh(), len(arguments[0])
    if mesh.size > 1 and num_rows % mesh.size == 0:
        rows = PartitionSpec(mesh.axis_names)
        return jax.shard_map(function, in_specs=rows, out_specs=rows)(*arguments)
    return function(*arguments)


def apart(branch: Any) -> Any:
    """Returns `branch`, the output of a residual branch, and keeps XLA from fusing its addition into its last matmul.

    With the fusion cuBLAS would add in place, for which XLA copies the residual stream first.
    """
    return jax.tree.map(jax.lax.optimization_barrier, branch)


def written_once(x: Array) -> Array:
    """Returns `x`, and keeps XLA from recomputing it or its gradient for each use: both are written to memory once."""
    return jax.lax.optimization_barrier(x)


def attend(
    query: Float[Array, "b *group q h d"],
    key: Float[Array, "b *group k h d"],
    value: Float[Array, "b *group k h d"],
    *,
    class_key: Float[Array, "b h d"] | None = None,
    class_value: Float[Array, "b h d"] | None = None,
    mask: Bool[Array, "b k"] | None = None,
    dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, "b *group q h d"]:
    """Returns softmax(q kᵀ / √d) v within each group; all groups of a row may share one more key, the class token's.

    The class key is one more column of logits, which enters the softmax without being copied into the groups.

    Args:
      query: Queries, with separate heads.
      key: Keys of the same groups.
      value: Values of the same groups.
      class_key: Key that every group attends to as well.
      class_value: Value of `class_key`.
      mask: True for keys that may be attended to, at least one per row; only for input without groups.
      dropout: Function applied to the attention weights.
    """
    assert class_key is None or dropout is None, "grouped attention has no dropout"
    query = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("b...qhd,b...khd->b...hqk", query, key, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    if class_key is None:
        weights = jax.nn.softmax(logits, axis=-1)
        weights = weights if dropout is None else dropout(weights)
        return jnp.einsum("b...hqk,b...khd->b...qhd", weights.astype(value.dtype), value)
    class_logits = jnp.einsum("b...qhd,bhd->b...hq", query, class_key, preferred_element_type=jnp.float32)
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(logits, axis=-1), class_logits))
    weights = jnp.exp(logits - largest[..., None])
    class_weights = jnp.exp(class_logits - largest)
    total = jnp.sum(weights, axis=-1) + class_weights
    weights = (weights / total[..., None]).astype(value.dtype)
    class_weights = (class_weights / total).astype(value.dtype)
    out = jnp.einsum("b...hqk,b...khd->b...qhd", weights, value)
    return out + jnp.einsum("b...hq,bhd->b...qhd", class_weights, class_value)


def attend_flash(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    *,
    implementation: str = "cudnn",
) -> Float[Array, "b q h d"]:
    """Returns softmax(q kᵀ / √d) v in bfloat16 by cuDNN, which never writes the attention weights to memory.

    In the backward pass cuDNN sums in no fixed order, so two runs on a GPU may differ in the last bits. On a mesh each device
    computes its own rows. Otherwise, with parameters sharded over devices, XLA would split heads, which JAX doesn't always
    support for cuDNN's attention.

    Args:
      query: Queries.
      key: Keys.
      value: Values of the keys.
      implementation: Argument of `jax.nn.dot_product_attention`.
    """
    # JAX has no backward pass for an odd number of queries or keys.
    num_queries, num_keys = query.shape[1], key.shape[1]
    query = _pad_one(query) if num_queries % 2 else query
    key, value = (_pad_one(key), _pad_one(value)) if num_keys % 2 else (key, value)

    def attend_rows(query, key, value):
        lengths = {"key_value_seq_lengths": jnp.full(len(key), num_keys, jnp.int32)} if num_keys % 2 else {}
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation, **lengths)

    return _by_rows(attend_rows, query, key, value)[:, :num_queries]


def _pad_one(x: Float[Array, "b n h d"]) -> Float[Array, "b n+1 h d"]:
    return jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))


@jax.custom_vjp
def attend_once(
    query: Float[Array, "b h d"],
    key: Float[Array, "b t p h d"],
    value: Float[Array, "b t p h d"],
    class_key: Float[Array, "b h d"],
    class_value: Float[Array, "b h d"],
) -> Float[Array, "b h d"]:
    """Returns the attention output of one query per row over the class token and all patches."""
    return _once_forward(query, key, value, class_key, class_value)[0]


def _once_forward(query, key, value, class_key, class_value):
    scale = query.shape[-1] ** -0.5
    logits, class_logit = scale * _dot(key, query[:, None, None]), scale * _dot(class_key, query)
    largest = jnp.maximum(jnp.max(logits, axis=(1, 2)), class_logit)
    weights, class_weight = jnp.exp(logits - largest[:, None, None]), jnp.exp(class_logit - largest)
    total = jnp.sum(weights, axis=(1, 2)) + class_weight
    weights, class_weight = weights / total[:, None, None], class_weight / total
    out = _sum_patches(weights, value) + _scaled(class_weight, class_value)
    return out.astype(value.dtype), (query, key, value, class_key, class_value, weights, class_weight, out)


def _once_backward(residuals, gradient):
    query, key, value, class_key, class_value, weights, class_weight, out = residuals
    scale = query.shape[-1] ** -0.5
    mean = _dot(out, gradient)
    to_logits = scale * weights * (_dot(value, gradient[:, None, None]) - mean[:, None, None])
    to_class_logit = scale * class_weight * (_dot(class_value, gradient) - mean)
    to_query = _sum_patches(to_logits, key) + _scaled(to_class_logit, class_key)
    return (
        to_query.astype(query.dtype),
        _scaled(to_logits, query[:, None, None]).astype(key.dtype),
        _scaled(weights, gradient[:, None, None]).astype(value.dtype),
        _scaled(to_class_logit, query).astype(class_key.dtype),
        _scaled(class_weight, gradient).astype(class_value.dtype),
    )


attend_once.defvjp(_once_forward, _once_backward)


def _dot(x: Float[Array, "b *n h d"], y: Float[Array, "b *#n h d"]) -> Float[Array, "b *n h"]:
    """Returns the dot products of vectors along the last axis, summed in float32."""
    return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)


def _scaled(weight: Float[Array, "b *#n h"], x: Float[Array, "b *#n h d"]) -> Float[Array, "b *n h d"]:
    return weight[..., None] * x.astype(jnp.float32)


def _sum_patches(weight: Float[Array, "b t p h"], x: Float[Array, "b t p h d"]) -> Float[Array, "b h d"]:
    return jnp.sum(row_major(_scaled(weight, x)), axis=(1, 2))


@jax.custom_vjp
def attend_few(
    query: Float[Array, "b t p h d"],
    key: Float[Array, "b t p h d"],
    value: Float[Array, "b t p h d"],
    class_key: Float[Array, "b h d"],
    class_value: Float[Array, "b h d"],
) -> Float[Array, "b t p h d"]:
    """Returns the attention output of each patch over the patches at its place in all frames and over the class token.

    Sums over frames are unrolled: for a reduction, XLA would bring the frames together by a transpose.
    """
    return _few_forward(query, key, value, class_key, class_value)[0]


def _frames(x: Float[Array, "b t p *n"]) -> list[Float[Array, "b 1 p *n"]]:
    return [x[:, i : i + 1] for i in range(x.shape[1])]


def _weighted_sum(weights: Sequence[Array], frames: Sequence[Array]) -> Float[Array, "b t p h d"]:
    return functools.reduce(jnp.add, [_scaled(*pair) for pair in zip(weights, frames, strict=True)])


def _few_forward(query, key, value, class_key, class_value):
    scale = query.shape[-1] ** -0.5
    shared_key, shared_value = class_key[:, None, None], class_value[:, None, None]
    logits = [scale * _dot(query, frame) for frame in (*_frames(key), shared_key)]  # each [b, t, p, h]
    largest = functools.reduce(jnp.maximum, logits)
    weights = [jnp.exp(column - largest) for column in logits]
    total = functools.reduce(jnp.add, weights)
    weights = [column / total for column in weights]
    out = _weighted_sum(weights, (*_frames(value), shared_value))
    return out.astype(value.dtype), (query, key, value, class_key, class_value, weights)


def _few_backward(residuals, gradient):
    query, key, value, class_key, class_value, weights = residuals
    scale = query.shape[-1] ** -0.5
    shared_key, shared_value = class_key[:, None, None], class_value[:, None, None]
    to_weights = [_dot(gradient, frame) for frame in (*_frames(value), shared_value)]
    mean = functools.reduce(jnp.add, [w * to_w for w, to_w in zip(weights, to_weights, strict=True)])
    to_logits = [scale * w * (to_w - mean) for w, to_w in zip(weights, to_weights, strict=True)]
    to_query = _weighted_sum(to_logits, (*_frames(key), shared_key))

    def to_frames(columns, x):  # the gradient of a frame's key or value sums over the queries of all frames
        asked = jnp.stack(columns, axis=2)  # [b, t, frames, p, h]
        return _weighted_sum([asked[:, i] for i in range(asked.shape[1])], _frames(x))

    *to_key_logits, to_class_logits = to_logits
    *value_weights, class_weights = weights
    return (
        to_query.astype(query.dtype),
        to_frames(to_key_logits, query).astype(key.dtype),
        to_frames(value_weights, gradient).astype(value.dtype),
        _sum_patches(to_class_logits, query).astype(class_key.dtype),
        _sum_patches(class_weights, gradient).astype(class_value.dtype),
    )


attend_few.defvjp(_few_forward, _few_backward)
