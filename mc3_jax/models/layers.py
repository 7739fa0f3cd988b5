"""Layers that the three encoders share: the stack of blocks, attention, the MLP, patches, dropout, L2 normalisation.

Parameters are float32; `dtype` is the compute dtype. Softmax and LayerNorm are float32 for any `dtype`. Gradients of
parameters are summed over rows, and over devices, in float32: no term of these sums is first rounded to the compute dtype.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from mc3_jax.models.attention import attend, attend_flash, written_once


def _std(width: int) -> float:
    """Returns the standard deviation of initial weights: 0.02 from 768 channels on, LeCun's 1 / √width below.

    ViT, DeiT and BERT, with 768 channels, draw all weights with standard deviation 0.02; timm's "truncated" normal
    cuts at ±2, a hundred deviations. Narrower models follow no source: with 0.02, a block of width 128 would stay close to
    the identity for hundreds of steps.
    """
    return 0.02 if width >= 768 else width**-0.5


def kernel_init(key, shape, dtype=jnp.float32) -> Array:
    """Returns initial values of a kernel [in, out] next to a residual stream, whose width is the smaller of in and out."""
    return _std(min(shape)) * jax.random.normal(key, shape, dtype)


def table_init(key, shape, dtype=jnp.float32) -> Array:
    """Returns initial values of a token or a table of embeddings, [..., width]."""
    return _std(shape[-1]) * jax.random.normal(key, shape, dtype)


# Default of torch.nn.Linear and Conv2d, which the sources keep for projections and patch embeddings.
TORCH_DEFAULT_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def sliding_windows(x: Shaped[Array, "..."], size: int, stride: int, axis: int) -> Shaped[Array, "..."]:
    """Returns all full windows along an axis, which is replaced by two: (window, position within the window).

    They are built from shifted slices, without a gather: `size / stride` copies of the array, rounded up.

    Args:
      x: Any array.
      size: Length of a window.
      stride: Distance between the starts of two windows.
      axis: Axis to cut, not negative.

    Raises:
      ValueError: If the axis is shorter than one window.
    """
    length = x.shape[axis]
    if length < size:
        raise ValueError(f"axis {axis} of shape {x.shape} holds {length} values: one window needs {size}")
    num_windows = (length - size) // stride + 1
    num_blocks = -(-size // stride)
    used = (num_windows - 1 + num_blocks) * stride
    x = jax.lax.slice_in_dim(x, 0, min(length, used), axis=axis)
    x = jnp.pad(x, [(0, used - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
    x = x.reshape(*x.shape[:axis], num_windows - 1 + num_blocks, stride, *x.shape[axis + 1 :])
    blocks = [jax.lax.slice_in_dim(x, i, i + num_windows, axis=axis) for i in range(num_blocks)]
    return jax.lax.slice_in_dim(jnp.concatenate(blocks, axis + 1), 0, size, axis=axis + 1)


def l2_normalize(x: Float[Array, "... d"], epsilon: float = 1e-6) -> Float[Array, "... d"]:
    """Returns float32 vectors divided by their length, or by `epsilon` if they are shorter, so that gradients are finite."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, epsilon**2))


def split_heads(qkv: Float[Array, "*n columns"], num_heads: int, num_parts: int = 3) -> list[Float[Array, "*n h d"]]:
    """Returns [query, key, value] with separate heads, from the output of one matmul.

    Args:
      qkv: Output of the matmul, its columns ordered by (q, k, v), then by head, as in timm.
      num_heads: Number of heads; divides the width.
      num_parts: Number of parts in the columns: 3, 2 for keys and values alone, or 1 for queries alone.

    Raises:
      ValueError: If the width is not a multiple of the number of heads.
    """
    width = qkv.shape[-1] // num_parts
    if width % num_heads:
        raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
    return [rearrange(part, "... (h d) -> ... h d", h=num_heads) for part in jnp.split(qkv, num_parts, axis=-1)]


@jax.custom_vjp
def gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns the exact GELU, x Φ(x), evaluated in float32 as PyTorch does for bfloat16.

    The backward pass recomputes everything from `x`. JAX's own would keep three float32 arrays of the MLP's width.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal(wide, x.dtype)[0]).astype(x.dtype)


def _normal(x: Float[Array, "*n"], dtype: DTypeLike) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Returns Φ(x) of the normal distribution and its density, accurate enough to be rounded to `dtype` next.

    If `dtype` is narrower than float32, Φ is computed by Abramowitz and Stegun's formula 7.1.26, with an error below 3e-7. It
    shares the exponential of the density, and on a GPU `erf` would take longer than reading and writing the array.
    """
    bell = jnp.exp(-0.5 * x * x)
    density = bell * (2 * jnp.pi) ** -0.5
    if jnp.finfo(dtype).bits >= 32:
        return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5)), density  # cheaper than `erfc`
    t = 1 / (1 + 0.3275911 * 0.5**0.5 * jnp.abs(x))
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * bell * tail
    return jnp.where(x < 0, tail, 1 - tail), density


def _gelu_forward(x):
    return gelu(x), x


def _gelu_backward(x, gradient):
    # Because of the barrier XLA doesn't recognise the computation of the forward pass, so it doesn't keep its results.
    wide = jax.lax.optimization_barrier(x).astype(jnp.float32)
    cdf, density = _normal(wide, x.dtype)
    return ((gradient.astype(jnp.float32) * (cdf + wide * density)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalize(
    x: Float[Array, "*n w"], scale: Float[Array, " w"], bias: Float[Array, " w"], epsilon: float, dtype: DTypeLike
) -> Float[Array, "*n w"]:
    return _normalize_forward(x, scale, bias, epsilon, dtype)[0]


def _normalize_forward(x, scale, bias, epsilon, dtype):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True) + epsilon)
    return ((wide - mean) * (inverse * scale) + bias).astype(dtype), (x, mean, inverse, scale)


def _normalize_backward(epsilon, dtype, residuals, gradient):
    del epsilon, dtype
    x, mean, inverse, scale = residuals

    def widen(x, gradient):
        return (x.astype(jnp.float32) - mean) * inverse, gradient.astype(jnp.float32)

    normal, wide = widen(x, gradient)
    scaled = wide * scale
    along, across = jnp.mean(scaled, axis=-1, keepdims=True), jnp.mean(scaled * normal, axis=-1, keepdims=True)
    to_x = (inverse * (scaled - along - normal * across)).astype(x.dtype)
    # Because of the barrier XLA computes these once more within the sums, instead of writing them to memory.
    normal, wide = widen(*jax.lax.optimization_barrier((x, gradient)))
    rows = tuple(range(x.ndim - 1))
    return to_x, jnp.sum(wide * normal, axis=rows), jnp.sum(wide, axis=rows)


_normalize.defvjp(_normalize_forward, _normalize_backward)


class LayerNorm(nn.Module):
    """Flax's LayerNorm, computed in float32 for any `dtype`.

    For the backward pass it keeps the input, its mean and the inverse of its deviation. With flax's own, XLA's GPU compiler
    would write the normalised input in float32 once more in the backward pass.

    Attributes:
      epsilon: Added to the variance.
      dtype: Dtype of the result.
    """

    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n w"]) -> Float[Array, "*n w"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return _normalize(x, jnp.asarray(scale), jnp.asarray(bias), self.epsilon, self.dtype)


DENSE_OUTPUT = "dense_output"  # name of Dense layers' outputs in rematerialisation policies


@jax.custom_vjp
def _affine(x: Float[Array, "n i"], kernel: Float[Array, "i o"], bias: Float[Array, " o"]) -> Float[Array, "n o"]:
    """Returns x kernel + bias in the dtype of `x`; gradients of kernel and bias are summed in float32."""
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def _affine_forward(x, kernel, bias):
    return _affine(x, kernel, bias), (x, kernel)


def _affine_backward(residuals, gradient):
    x, kernel = residuals
    along_rows = (((0,), (0,)), ((), ()))
    to_kernel = jax.lax.dot_general(x, gradient, along_rows, preferred_element_type=kernel.dtype)
    return gradient @ kernel.astype(x.dtype).T, to_kernel, jnp.sum(gradient, axis=0, dtype=kernel.dtype)


_affine.defvjp(_affine_forward, _affine_backward)


def _whole(parameter: Array) -> Array:
    """Returns a parameter, gathered whole on every device of a mesh: to slice a sharded one, parts of it would be moved.

    It says so for parameters that are gathered already as well: otherwise XLA may shard the slice, and move activations.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return parameter
    return jax.lax.with_sharding_constraint(parameter, PartitionSpec())


class Dense(nn.Module):
    """Flax's Dense, with all axes before the last flattened to rows, [n, in].

    With several axes before the last, XLA's CPU compiler computes the kernel's gradient from a transposed copy of the
    output's gradient, at three times the cost of the layer; with rows it needs no copy. Flax would also round the kernel's
    gradient to the compute dtype before it is summed over devices.

    Attributes:
      features: Width of the output.
      kernel_init: Initialiser of the kernel [in, out].
      dtype: Compute dtype.
    """

    features: int
    kernel_init: nn.initializers.Initializer = kernel_init
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n i"], columns: slice = slice(None)) -> Float[Array, "*n o"]:
        """Returns the output, or only the `columns` of it."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        # Outside of jit, parameters that were read from a file are numpy arrays.
        kernel, bias = jnp.asarray(kernel), jnp.asarray(bias)
        if columns != slice(None):
            kernel, bias = _whole(kernel)[:, columns], _whole(bias)[columns]
        out = _affine(x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel, bias)
        return checkpoint_name(out, DENSE_OUTPUT).reshape(*x.shape[:-1], len(bias))


class Dropout(nn.Module):
    """Dropout whose mask for a row depends only on the rng "dropout" and the row's index, not on the rest of the batch.

    So the batch may be embedded in parts, and its rows may lie on any devices.

    Attributes:
      rate: Share of values that are dropped, below 1.
    """

    rate: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *n"], row: Int[Array, " b"] | None = None, *, train: bool
    ) -> Float[Array, "b *n"]:
        """Returns `x`; in training some values are set to 0 and the others scaled up by 1 / (1 - rate).

        Args:
          x: Array whose first axis is the batch.
          row: Index of each row in the batch; None numbers them from 0.
          train: Whether to drop values.
        """
        if not train or self.rate == 0:
            return x
        key = self.make_rng("dropout")
        row = jnp.arange(len(x)) if row is None else row
        keep = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), 1 - self.rate, x.shape[1:]))(row)
        return jnp.where(keep, x / (1 - self.rate), 0)


# What is kept of a block's forward pass for its backward pass: everything, the outputs of Dense layers, or only its input.
REMAT_POLICIES = {
    "none": lambda block, _: block,
    "dots": lambda block, scanned: jax.checkpoint(
        block, policy=jax.checkpoint_policies.save_only_these_names(DENSE_OUTPUT), prevent_cse=not scanned
    ),
    "full": lambda block, scanned: jax.checkpoint(block, prevent_cse=not scanned),
}


def apply_blocks(
    parent: nn.Module,
    make_block: Callable[..., nn.Module],
    depth: int,
    x: Any,
    *,
    last: dict[str, Any],
    scan_layers: bool,
    remat: str,
    **options: Any,
) -> Any:
    """Returns block_{depth-1}(... block_0(x)), for blocks whose parameters are the parent's "block_0", "block_1", ...

    With any `scan_layers` and `remat`, names and shapes of parameters, results and dropout are the same as for blocks called
    one by one. Call it under `jax.jit`: outside, each call would compile a block anew.

    Args:
      parent: Bound module that the blocks belong to.
      make_block: Makes a block; all blocks are alike.
      depth: Number of blocks.
      x: Tokens, an array or a tree of arrays.
      last: Additional arguments of the last block, which may compute less than the others.
      scan_layers: Whether all blocks but the last run as one loop. The program to compile then does not grow with the depth,
        at the price of a copy of their parameters.
      remat: One of `REMAT_POLICIES`.
      options: Arguments of every block.
    """
    if parent.is_initializing():
        for i in range(depth):
            x = make_block(name=f"block_{i}")(x, **options, **(last if i == depth - 1 else {}))
        return x
    key = parent.make_rng("dropout") if parent.has_rng("dropout") else None
    params = parent.variables["params"]
    layers = [
        (params[f"block_{i}"], {} if key is None else {"dropout": jax.random.fold_in(key, i)}) for i in range(depth)
    ]

    def apply(x, layer, **last):
        return make_block(parent=None).apply({"params": layer[0]}, x, rngs=layer[1], **options, **last)

    wrap, scanned = REMAT_POLICIES[remat], scan_layers and depth > 2
    # jit traces the block once for all layers, which halves the time to trace and lower a step; XLA inlines each call.
    block = jax.jit(wrap(apply, scanned))
    if scanned:
        x, _ = jax.lax.scan(lambda x, layer: (block(x, layer), None), x, jax.tree.map(_stack, *layers[:-1]))
    else:
        for layer in layers[:-1]:
            x = block(x, layer)
    return wrap(functools.partial(apply, **last), False)(x, layers[-1])


def _stack(*leaves: Array) -> Array:
    return jnp.stack(leaves)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused matmul for queries, keys and values.

    Attributes:
      num_heads: Number of attention heads; divides the width.
      dropout: Dropout rate of the attention weights in training.
      dtype: Compute dtype.
      form: One of `attention.FORMS`; "cudnn" supports neither mask nor dropout.
    """

    num_heads: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    form: str = "einsum"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n w"],
        mask: Bool[Array, "b n"] | None = None,
        *,
        num_outputs: int | None = None,
        row: Int[Array, " b"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b m w"]:
        """Returns the output for the first `num_outputs` tokens, or for all; each attends to all tokens of its row.

        Args:
          x: Tokens.
          mask: True for tokens that may be attended to; None allows all.
          num_outputs: Number of tokens, from the first, for which the output is computed; None computes all.
          row: Index of each row in the batch, for dropout.
          train: Whether to drop attention weights.
        """
        width = x.shape[-1]
        qkv = Dense(3 * width, dtype=self.dtype, name="qkv")
        once = written_once if self.form == "cudnn" else lambda x: x
        if num_outputs is None:
            query, key, value = split_heads(once(qkv(x)), self.num_heads)
        else:  # queries of the other tokens are not needed
            [query] = split_heads(qkv(x[:, :num_outputs], slice(width)), self.num_heads, 1)
            key, value = split_heads(once(qkv(x, slice(width, None))), self.num_heads, 2)
        if self.form == "cudnn":
            assert mask is None
            assert self.dropout == 0
            out = attend_flash(query, key, value)
        else:
            dropout = functools.partial(Dropout(self.dropout), row=row, train=train)
            out = attend(query, key, value, mask=mask, dropout=dropout)
        out = rearrange(out, "b n h d -> b n (h d)")
        return Dense(width, dtype=self.dtype, name="out")(out)


class Mlp(nn.Module):
    """Dense, exact GELU, Dense back to the input's width, dropout.

    Attributes:
      width: Width of the hidden layer.
      dropout: Dropout rate of the output in training.
      dtype: Compute dtype.
    """

    width: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*n w"], *, row: Int[Array, " b"] | None = None, train: bool = False
    ) -> Float[Array, "*n w"]:
        hidden = gelu(Dense(self.width, dtype=self.dtype, name="hidden")(x))
        out = Dense(x.shape[-1], dtype=self.dtype, name="out")(hidden)
        return Dropout(self.dropout)(out, row, train=train)
