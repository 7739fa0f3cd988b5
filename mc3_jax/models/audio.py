"""The audio encoder: the Audio Spectrogram Transformer.

Ports `src/models/ast_models.py` of YuanGongND/ast (Gong et al., Interspeech 2021; BSD 3-Clause) on timm's distilled DeiT
(Touvron et al., ICML 2021; Apache 2.0). Its head, LayerNorm and Linear, is the projection in `mc3_jax.models.mc3`.

Differs only in how it is computed: patches are cut as slices and embedded by a matmul, and the last block computes only the
class and the distillation token, since no other token is read.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mc3_jax.models.attention import apart, row_major
from mc3_jax.models.layers import (
    TORCH_DEFAULT_INIT,
    Dense,
    LayerNorm,
    Mlp,
    SelfAttention,
    apply_blocks,
    sliding_windows,
    table_init,
)


class PreNormBlock(nn.Module):
    """ViT's block: y = x + attention(norm(x)); y + mlp(norm(y)).

    Attributes:
      num_heads: Number of attention heads; divides the width.
      mlp_ratio: Hidden width of the MLP divided by the width.
      dtype: Compute dtype.
      form: Form of attention, one of `attention.FORMS`.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    dtype: DTypeLike = jnp.float32
    form: str = "einsum"

    @nn.compact
    def __call__(self, x: Float[Array, "b n w"], *, num_outputs: int | None = None) -> Float[Array, "b m w"]:
        """Returns the first `num_outputs` tokens after the block, or all if None."""
        norm_attention, norm_mlp = (
            LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"norm_{name}")
            for name in ("attention", "mlp")
        )
        attention = SelfAttention(self.num_heads, dtype=self.dtype, form=self.form, name="attention")
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), dtype=self.dtype, name="mlp")
        x = row_major(x) if self.form == "cudnn" else x
        branch = apart if self.form == "cudnn" else lambda x: x
        x = x[:, :num_outputs] + branch(attention(norm_attention(x), num_outputs=num_outputs))
        return x + branch(mlp(norm_mlp(x)))


class AudioSpectrogramTransformer(nn.Module):
    """AST; the defaults are the paper's sizes (DeiT-B distilled, 12 x 14 patches), 85,385,472 parameters.

    Attributes:
      num_mel: Number of mel bands of the spectrogram.
      num_time_frames: Number of time frames of the spectrogram.
      patch_px: Height and width of a patch.
      stride_px: Distance between the starts of patches, along mel and along time; below `patch_px` they overlap.
      width, depth, num_heads: Width, number of blocks and number of attention heads of the transformer.
      mlp_ratio: Hidden width of the MLP divided by the width.
      dtype: Compute dtype; parameters are float32.
      scan_layers: Whether all blocks but the last run as one loop; see `layers.apply_blocks`.
      remat: Which activations of a block are kept for the backward pass; see `layers.REMAT_POLICIES`.
      form: Form of attention, one of `attention.FORMS`.
    """

    num_mel: int = 128
    num_time_frames: int = 149
    patch_px: int = 16
    stride_px: int = 10
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    dtype: DTypeLike = jnp.float32
    scan_layers: bool = False
    remat: str = "none"
    form: str = "einsum"

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches along mel and along time."""
        return tuple((size - self.patch_px) // self.stride_px + 1 for size in (self.num_mel, self.num_time_frames))

    @nn.compact
    def __call__(self, log_mel: Float[Array, "b time mel"]) -> Float[Array, "b w"]:
        """Returns the mean of the class and the distillation token after the final norm, before the projection.

        Args:
          log_mel: Normalised spectrograms; see `mc3_jax.models.frontend`.

        Raises:
          ValueError: If the spectrograms are not `num_time_frames` x `num_mel` or are smaller than a patch.
        """
        self._check(log_mel.shape)
        num_special = 2
        num_patches = self.grid[0] * self.grid[1]
        class_token = self.param("class_token", table_init, (self.width,))
        distillation_token = self.param("distillation_token", table_init, (self.width,))
        position = self.param("position_embedding", table_init, (num_special + num_patches, self.width))

        # Mel first: the copies that overlapping windows need are then of arrays half as large.
        patches = sliding_windows(log_mel, self.patch_px, self.stride_px, axis=2)
        patches = sliding_windows(patches, self.patch_px, self.stride_px, axis=1)
        patches = rearrange(patches, "b t j f i -> b (f t) (i j)")
        embed = Dense(self.width, kernel_init=TORCH_DEFAULT_INIT, dtype=self.dtype, name="patch_embedding")
        special = jnp.broadcast_to(jnp.stack([class_token, distillation_token]), (len(log_mel), 2, self.width))
        # Added before the cast, so that the gradients of tokens and positions are summed in float32.
        x = jnp.concatenate([special, embed(patches).astype(jnp.float32)], axis=1) + position

        make_block = functools.partial(PreNormBlock, self.num_heads, self.mlp_ratio, self.dtype, self.form)
        x = apply_blocks(
            self, make_block, self.depth, x.astype(self.dtype), last={"num_outputs": num_special},
            scan_layers=self.scan_layers, remat=self.remat,
        )  # fmt: skip
        norm = LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")
        return jnp.mean(norm(x), axis=1)

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape[1:] != (self.num_time_frames, self.num_mel):
            raise ValueError(
                f"spectrograms are {shape[1]} frames x {shape[2]} mel bands but num_time_frames is "
                f"{self.num_time_frames} and num_mel {self.num_mel}: pad or cut the spectrogram"
            )
        if min(self.grid) < 1:
            raise ValueError(f"a spectrogram of {shape[1]} x {shape[2]} is smaller than a patch of patch_px {self.patch_px}")
