"""What the three encoders share: blocks one after the other, attention, the MLP, patches, dropout, L2 normalisation.

Parameters are float32; `dtype` is the compute dtype. Softmax and LayerNorm are float32 whatever it is. Gradients of
parameters are summed over rows in float32, and so over devices too: nothing that is added to a parameter's gradient is
rounded to the compute dtype first.
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
    """ViT, DeiT and BERT draw all weights from a normal of 0.02; timm's "truncated" normal cuts at ±2, a hundred sigmas.

    That is for 768 channels. Narrower models, which have no source, get LeCun's 1 / √width: with 0.02 a block 128 wide
    stays close to an identity for hundreds of steps.
    """
    return 0.02 if width >= 768 else width**-0.5


def kernel_init(key, shape, dtype=jnp.float32) -> Array:
    """Initialises a kernel [in, out] within or around a residual stream, whose width is the smaller of the two."""
    return _std(min(shape)) * jax.random.normal(key, shape, dtype)


def table_init(key, shape, dtype=jnp.float32) -> Array:
    """Initialises tokens and tables of embeddings [..., width]."""
    return _std(shape[-1]) * jax.random.normal(key, shape, dtype)


# torch.nn.Linear's and Conv2d's default, which the sources leave in place for projections and patch embeddings.
TORCH_DEFAULT_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def sliding_windows(x: Shaped[Array, "..."], size: int, stride: int, axis: int) -> Shaped[Array, "..."]:
    """Returns all full windows along an axis, which is replaced by two: (window, position within the window).

    Built from shifted slices, without a gather: `size / stride` copies of the array, rounded up.

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
    """Returns float32 vectors of length 1; shorter than `epsilon` they are divided by it, so the gradient is finite."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, epsilon**2))


def split_heads(qkv: Float[Array, "*n columns"], num_heads: int, num_parts: int = 3) -> list[Float[Array, "*n h d"]]:
    """Returns [query, key, value], heads apart, of one matmul's columns ordered (q, k, v), then heads, as in timm.

    Args:
      qkv: The columns.
      num_heads: Divides the width.
      num_parts: 2 where the columns are keys and values alone.

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

    The backward pass takes all from `x`. Left to itself, it would find three float32 arrays of the MLP's width kept for it.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal(wide, x.dtype)[0]).astype(x.dtype)


def _normal(x: Float[Array, "*n"], dtype: DTypeLike) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Returns the normal distribution's Φ(x) and its density, for what is rounded to `dtype` next.

    In a narrower dtype than float32, Φ is Abramowitz and Stegun's formula 7.1.26, off by less than 3e-7, which has the
    density's exponential in it: on a GPU `erf` is slower than reading and writing the array.
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
    # Behind the barrier XLA does not know that it has computed this before, and so does not keep it.
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
    # Behind the barrier XLA computes these again, and so does not write them.
    normal, wide = widen(*jax.lax.optimization_barrier((x, gradient)))
    rows = tuple(range(x.ndim - 1))
    return to_x, jnp.sum(wide * normal, axis=rows), jnp.sum(wide, axis=rows)


_normalize.defvjp(_normalize_forward, _normalize_backward)


class LayerNorm(nn.Module):
    """flax's LayerNorm, in float32 whatever the dtype is; to go back it keeps its input, mean and one over its deviation.

    Left to itself, XLA's GPU compiler would write the normalised input in float32 once more on the way back.

    Attributes:
      epsilon: Added to the variance.
      dtype: Of the result.
    """

    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n w"]) -> Float[Array, "*n w"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return _normalize(x, jnp.asarray(scale), jnp.asarray(bias), self.epsilon, self.dtype)


DENSE_OUTPUT = "dense_output"  # the name that rematerialisation knows it by


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
    """Returns a parameter that may be spread over a mesh, whole on every device: cut where it is spread, its parts move."""
    if jax.sharding.get_abstract_mesh().empty:
        return parameter
    return jax.lax.with_sharding_constraint(parameter, PartitionSpec())


class Dense(nn.Module):
    """flax's Dense, on rows [n, in] whatever the axes before the last are.

    With several axes before the last, XLA's CPU compiler takes the kernel's gradient from a transposed copy of the
    output's, at three times the cost of the layer; on rows it makes none. flax would round that gradient to the compute
    dtype before it is summed over devices.

    Attributes:
      features: Width of the output.
      kernel_init: Of the kernel [in, out].
      dtype: Compute dtype.
    """

    features: int
    kernel_init: nn.initializers.Initializer = kernel_init
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n i"], columns: slice = slice(None)) -> Float[Array, "*n o"]:
        """Returns the output, or some columns of it alone."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        # Parameters read from a file are numpy's where nobody compiles.
        kernel, bias = jnp.asarray(kernel), jnp.asarray(bias)
        if columns != slice(None):
            kernel, bias = _whole(kernel)[:, columns], _whole(bias)[columns]
        out = _affine(x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel, bias)
        return checkpoint_name(out, DENSE_OUTPUT).reshape(*x.shape[:-1], len(bias))


class Dropout(nn.Module):
    """Dropout where what a row loses depends on the rng "dropout" and the row's index alone, not on its neighbours.

    So the batch may be embedded in parts, or its rows lie on any devices.

    Attributes:
      rate: Share that is dropped, below 1.
    """

    rate: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *n"], row: Int[Array, " b"] | None = None, *, train: bool
    ) -> Float[Array, "b *n"]:
        """Returns `x` with values dropped in training, the others scaled up.

        Args:
          x: Any rows.
          row: Index of each row in the batch; None counts them.
          train: Whether to drop.
        """
        if not train or self.rate == 0:
            return x
        key = self.make_rng("dropout")
        row = jnp.arange(len(x)) if row is None else row
        keep = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), 1 - self.rate, x.shape[1:]))(row)
        return jnp.where(keep, x / (1 - self.rate), 0)


# What of a block's forward pass is kept for its backward pass: everything, what Dense layers put out, or its input alone.
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
    """Returns block_{depth-1}(... block_0(x)): blocks whose parameters are the parent's "block_0", "block_1", ...

    However it is computed, names and shapes of parameters are those of blocks written out one by one, and so are the
    numbers, dropout's among them. To be called under `jax.jit`: outside, each call would compile a block anew.

    Args:
      parent: Bound module that the blocks belong to.
      make_block: Makes one; all are alike.
      depth: How many.
      x: Tokens.
      last: Arguments of the last block alone, which may compute less.
      scan_layers: Whether all but the last run as one loop: a program to compile that does not grow with the depth, for a
        copy of their parameters.
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
    # Traced once for all, which halves the time to trace and lower a step; XLA sees them written out one by one.
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
      num_heads: Divides the width.
      dropout: Of the attention weights, in training.
      dtype: Compute dtype.
      form: One of `attention.FORMS`; "cudnn" takes neither mask nor dropout.
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
        """Returns the output of the first `num_outputs` tokens, or of all; every token is attended to.

        Args:
          x: Tokens.
          mask: True for the tokens that may be attended to; None is all.
          num_outputs: How many tokens, from the first, ask.
          row: Index of each row in the batch, for dropout.
          train: Whether to drop weights.
        """
        width = x.shape[-1]
        qkv = Dense(3 * width, dtype=self.dtype, name="qkv")
        once = written_once if self.form == "cudnn" else lambda x: x
        if num_outputs is None:
            query, key, value = split_heads(once(qkv(x)), self.num_heads)
        else:  # the others' queries are asked nowhere
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
      width: Of the hidden layer.
      dropout: Of the output, in training.
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
