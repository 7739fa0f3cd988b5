"""The video encoder: EgoVLP's SpaceTimeTransformer, which the MC3 paper calls TimeSformer.

Ports `model/video_transformer.py` of showlab/EgoVLP, which is Frozen in Time's (Bain et al., ICCV 2021,
github.com/m-bain/frozen-in-time; MIT): divided space-time attention after TimeSformer (Bertasius et al., ICML 2021), but
with the residual of the space attention taken from the block's input, not from the output of the time attention.

Differs only in how it is computed. The class token and the [frame, place] grid of patches are two arrays, so that grouping
by frame or by place needs neither a gather nor a copy. The last block computes only the class token, since no patch is read.
"""

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mc3_jax.models.attention import (
    MOST_FRAMES,
    apart,
    attend,
    attend_few,
    attend_flash,
    attend_once,
    row_major,
    written_once,
)
from mc3_jax.models.layers import (
    TORCH_DEFAULT_INIT,
    Dense,
    LayerNorm,
    Mlp,
    apply_blocks,
    kernel_init,
    split_heads,
    table_init,
)

# The class token and the patches of a clip; the patches are None after the last block, where nothing reads them.
Tokens = tuple[Float[Array, "b 1 w"], Float[Array, "b t p w"] | None]


def _add(x: Tokens, y: Tokens) -> Tokens:
    return jax.tree.map(jnp.add, x, y)


class DividedAttention(nn.Module):
    """Attention within groups: a patch attends to its group and the class token, the class token to everything.

    Attributes:
      over: "space" groups the patches of each frame, "time" those at the same place in all frames.
      num_heads: Number of attention heads; divides the width.
      zero_output: Whether to initialise like the source's time attention, whose output is 0: weights of qkv 0, output weights
        1, biases 0.
      dtype: Compute dtype.
      form: Form of attention, one of `attention.FORMS`.
    """

    over: Literal["space", "time"]
    num_heads: int
    zero_output: bool = False
    dtype: DTypeLike = jnp.float32
    form: str = "einsum"

    @nn.compact
    def __call__(self, tokens: Tokens, *, class_only: bool = False) -> Tokens:
        """Returns the attention's output for every token, or with `class_only` for the class token and None."""
        class_token, patches = tokens
        width = class_token.shape[-1]
        qkv_init = nn.initializers.zeros if self.zero_output else kernel_init
        out_init = nn.initializers.ones if self.zero_output else kernel_init
        qkv = Dense(3 * width, kernel_init=qkv_init, dtype=self.dtype, name="qkv")
        out = Dense(width, kernel_init=out_init, dtype=self.dtype, name="out")

        class_query, class_key, class_value = split_heads(qkv(class_token), self.num_heads)
        columns = qkv(patches, slice(width, None) if class_only else slice(None))  # class_only: no queries of patches
        columns = written_once(columns) if self.form == "cudnn" else columns
        *query, key, value = split_heads(columns, self.num_heads, 2 if class_only else 3)
        attend_class, attend_patches = _FORMS[self.form]
        class_out = attend_class(class_query[:, 0], key, value, class_key[:, 0], class_value[:, 0])
        class_out = out(rearrange(class_out, "b h d -> b 1 (h d)"))
        if class_only:
            return class_out, None
        is_few = patches.shape[1] <= MOST_FRAMES
        attend_patches = attend_patches[self.over] if self.over == "space" or is_few else _within_places
        patches = attend_patches(*query, key, value, class_key[:, 0], class_value[:, 0])
        return class_out, out(rearrange(patches, "b t p h d -> b t p (h d)"))


def _class_to_all(query, key, value, class_key, class_value):
    # The order of keys does not matter, so the grid is flattened as it lies in memory.
    key, value = (rearrange(x, "b t p h d -> b (t p) h d") for x in (key, value))
    return attend(query[:, None], key, value, class_key=class_key, class_value=class_value)[:, 0]


def _within_frames(query, key, value, class_key, class_value):
    return attend(query, key, value, class_key=class_key, class_value=class_value)


def _within_places(query, key, value, class_key, class_value):
    query, key, value = (rearrange(x, "b t p h d -> b p t h d") for x in (query, key, value))
    out = attend(query, key, value, class_key=class_key, class_value=class_value)
    return rearrange(out, "b p t h d -> b t p h d")


def _within_frames_flash(query, key, value, class_key, class_value):
    shape = query.shape

    def with_class(x, shared):
        shared = jnp.broadcast_to(shared[:, None, None], (*x.shape[:2], 1, *x.shape[3:]))
        return rearrange(jnp.concatenate([x, shared], axis=2), "b t k h d -> (b t) k h d")

    query = rearrange(query, "b t p h d -> (b t) p h d")
    return attend_flash(query, with_class(key, class_key), with_class(value, class_value)).reshape(shape)


# Form → (attention of the class token, attention of the patches by `over`). All are functions of (query, key, value, class
# key, class value).
_FORMS = {
    "einsum": (_class_to_all, {"space": _within_frames, "time": _within_places}),
    "cudnn": (attend_once, {"space": _within_frames_flash, "time": attend_few}),
}


class SpaceTimeBlock(nn.Module):
    """EgoVLP's block: t = time(norm(x)); s = space(norm(x + t)); y = x + s, not x + t + s; y + mlp(norm(y)).

    Attributes:
      num_heads: Number of attention heads; divides the width.
      mlp_ratio: Hidden width of the MLP divided by the width.
      time_init: Initialisation of the time attention, "zeros" as in the source or "random"; see `SpaceTimeTransformer`.
      dtype: Compute dtype.
      form: Form of attention, one of `attention.FORMS`.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    time_init: Literal["zeros", "random"] = "zeros"
    dtype: DTypeLike = jnp.float32
    form: str = "einsum"

    @nn.compact
    def __call__(self, tokens: Tokens, *, class_only: bool = False) -> Tokens:
        """Returns the tokens after the block, or with `class_only` the class token and None."""
        norm_time, norm_space, norm_mlp = (
            LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"norm_{name}")
            for name in ("time", "space", "mlp")
        )
        same = {"dtype": self.dtype, "form": self.form}
        time_attention = DividedAttention("time", self.num_heads, self.time_init == "zeros", **same, name="time_attention")
        space_attention = DividedAttention("space", self.num_heads, **same, name="space_attention")
        mlp = Mlp(int(tokens[0].shape[-1] * self.mlp_ratio), dtype=self.dtype, name="mlp")

        tokens = jax.tree.map(row_major, tokens) if self.form == "cudnn" else tokens
        branch = apart if self.form == "cudnn" else lambda x: x
        time = branch(time_attention(jax.tree.map(norm_time, tokens)))
        space = branch(space_attention(jax.tree.map(norm_space, _add(tokens, time)), class_only=class_only))
        tokens = _add((tokens[0], None) if class_only else tokens, space)
        return _add(tokens, branch(jax.tree.map(lambda x: mlp(norm_mlp(x)), tokens)))


class SpaceTimeTransformer(nn.Module):
    """EgoVLP's video encoder; the defaults are its sizes (ViT-B/16), 114,177,792 parameters.

    Attributes:
      image_size_px: Height and width of a frame.
      patch_px: Height and width of a patch; divides `image_size_px`.
      num_positions: Number of temporal positions; a clip of fewer frames uses the first ones.
      width, depth, num_heads: Width, number of blocks and number of attention heads of the transformer.
      mlp_ratio: Hidden width of the MLP divided by the width.
      time_init: Initialisation of the time attention. "zeros" is the source's: the output of the time branch is 0, so that a
        tower inflated from an image model sees a still as that model does. But the output weights are all ones, and the
        LayerNorm that follows removes the mean over channels, so the gradients of the branch's qkv and output weights are
        exactly 0, whatever the other weights are. Only rounding errors, which Adam scales up to full steps, change them.
        "random" draws them like all other weights, and they have a gradient from the first step.
      dtype: Compute dtype; parameters are float32.
      scan_layers: Whether all blocks but the last run as one loop; see `layers.apply_blocks`.
      remat: Which activations of a block are kept for the backward pass; see `layers.REMAT_POLICIES`.
      form: Form of attention, one of `attention.FORMS`.
    """

    image_size_px: int = 224
    patch_px: int = 16
    num_positions: int = 16
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    time_init: Literal["zeros", "random"] = "zeros"
    dtype: DTypeLike = jnp.float32
    scan_layers: bool = False
    remat: str = "none"
    form: str = "einsum"

    @nn.compact
    def __call__(self, video: Float[Array, "b t y x 3"]) -> Float[Array, "b w"]:
        """Returns the class token after the final norm, before the projection.

        Args:
          video: Normalised frames of height and width `image_size_px`.

        Raises:
          ValueError: If a frame has another size or is not a whole number of patches, or there are more frames than
            temporal positions.
        """
        self._check(video.shape)
        num_patches = (self.image_size_px // self.patch_px) ** 2
        class_token = self.param("class_token", table_init, (self.width,))
        position = self.param("position_embedding", table_init, (1 + num_patches, self.width))
        temporal = self.param("temporal_embedding", nn.initializers.zeros, (self.num_positions, self.width))

        patches = rearrange(video, "b t (h i) (w j) c -> b t (h w) (i j c)", i=self.patch_px, j=self.patch_px)
        # A convolution whose stride is its kernel is a matmul of patches.
        embed = Dense(self.width, kernel_init=TORCH_DEFAULT_INIT, dtype=self.dtype, name="patch_embedding")
        # Added before the cast, so that the gradients of class token and positions are summed in float32.
        grid = position[1:] + temporal[: video.shape[1], None]
        patches = (embed(patches).astype(jnp.float32) + grid).astype(self.dtype)
        class_token = jnp.broadcast_to(class_token + position[0], (len(video), 1, self.width)).astype(self.dtype)

        make_block = functools.partial(SpaceTimeBlock, self.num_heads, self.mlp_ratio, self.time_init, self.dtype, self.form)
        tokens = apply_blocks(
            self, make_block, self.depth, (class_token, patches), last={"class_only": True},
            scan_layers=self.scan_layers, remat=self.remat,
        )  # fmt: skip
        norm = LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")
        return norm(tokens[0][:, 0])

    def _check(self, shape: tuple[int, ...]) -> None:
        size = self.image_size_px
        if size % self.patch_px:
            raise ValueError(f"image_size_px {size} is not a multiple of patch_px {self.patch_px}")
        if shape[2:4] != (size, size):
            raise ValueError(f"frames are {shape[2]}x{shape[3]} pixels but image_size_px is {size}: resize the frames")
        if shape[1] > self.num_positions:
            raise ValueError(f"{shape[1]} frames but num_positions is {self.num_positions}: raise it or use fewer")
