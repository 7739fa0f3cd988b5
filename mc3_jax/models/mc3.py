"""The three towers, which embed audio, video and text in one joint space.

A tower is an encoder, a projection and L2 normalisation. The projections are those of the sources: EgoVLP's Linear for
video and ReLU, Linear for text; AST's head, LayerNorm (eps 1e-5) and Linear, for audio.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mc3_jax.models.audio import AudioSpectrogramTransformer
from mc3_jax.models.layers import TORCH_DEFAULT_INIT, Dense, LayerNorm, l2_normalize
from mc3_jax.models.text import DistilBert
from mc3_jax.models.video import SpaceTimeTransformer


class AudioTower(nn.Module):
    """AST, LayerNorm, Linear, L2 normalisation. Returns (embeddings, the encoder's features before the LayerNorm)."""

    encoder: AudioSpectrogramTransformer
    embed_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, log_mel: Float[Array, "b time mel"]) -> tuple[Float[Array, "b d"], Float[Array, "b w"]]:
        features = self.encoder(log_mel)
        x = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(features)
        return l2_normalize(_projection(self)(x)), features


class Classifier(nn.Module):
    """AST's head, LayerNorm and Linear. Returns float32 logits of a sound's classes."""

    num_classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "b w"]) -> Float[Array, "b c"]:
        features = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(features)
        head = Dense(self.num_classes, kernel_init=TORCH_DEFAULT_INIT, dtype=self.dtype, name="head")
        return head(features).astype(jnp.float32)


class VideoTower(nn.Module):
    """SpaceTimeTransformer, Linear, L2 normalisation."""

    encoder: SpaceTimeTransformer
    embed_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, video: Float[Array, "b t y x 3"]) -> Float[Array, "b d"]:
        return l2_normalize(_projection(self)(self.encoder(video)))


class TextTower(nn.Module):
    """First token of DistilBERT's last layer, ReLU, Linear, L2 normalisation."""

    encoder: DistilBert
    embed_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        text_ids: Int[Array, "b l"],
        text_mask: Int[Array, "b l"],
        *,
        row: Int[Array, " b"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b d"]:
        first = self.encoder(text_ids, text_mask, num_outputs=1, row=row, train=train)[:, 0]
        return l2_normalize(_projection(self)(nn.relu(first)))


def _projection(tower: AudioTower | VideoTower | TextTower) -> Dense:
    return Dense(tower.embed_dim, kernel_init=TORCH_DEFAULT_INIT, dtype=tower.dtype, name="projection")


class MC3(nn.Module):
    """Embeds audio, video and text, or any of them, in one joint space.

    Parameters: {"audio": {"encoder", "norm", "projection"}, "video": {"encoder", "projection"}, "text": {"encoder",
    "projection"}} and, with classes, "classifier": {"norm", "head"}. A tower that gets no input is not run, and `init` gives
    it no parameters.

    Attributes:
      audio_tower, video_tower, text_tower: Encoders of the three towers.
      embed_dim: Dimension of the joint space (256 in EgoVLP).
      dtype: Compute dtype of the projections; embeddings are float32.
      num_classes: Number of classes of a classifier on the audio encoder's features; 0 makes none.
    """

    audio_tower: AudioSpectrogramTransformer
    video_tower: SpaceTimeTransformer
    text_tower: DistilBert
    embed_dim: int = 256
    dtype: DTypeLike = jnp.float32
    num_classes: int = 0

    def setup(self) -> None:
        # Flax makes a module in a field a child of this module. The unbound copy becomes a child of its tower instead.
        self.audio = AudioTower(self.audio_tower.clone(parent=None, name=None), self.embed_dim, self.dtype)
        self.video = VideoTower(self.video_tower.clone(parent=None, name=None), self.embed_dim, self.dtype)
        self.text = TextTower(self.text_tower.clone(parent=None, name=None), self.embed_dim, self.dtype)
        if self.num_classes:
            self.classifier = Classifier(self.num_classes, self.dtype)

    def __call__(
        self,
        *,
        audio: Float[Array, "b time mel"] | None = None,
        video: Float[Array, "b t y x 3"] | None = None,
        text_ids: Int[Array, "b l"] | None = None,
        text_mask: Int[Array, "b l"] | None = None,
        row: Int[Array, " b"] | None = None,
        train: bool = False,
    ) -> dict[str, Float[Array, "b d"]]:
        """Returns modality → L2-normalised float32 embeddings [b, d] for each of "audio", "video", "text" that is given.

        With classes, and if audio is given, the result also has "logits" [b, c].

        Args:
          audio: Normalised log-mel spectrograms.
          video: Normalised frames.
          text_ids: Token ids.
          text_mask: 1 for a token, 0 for padding; given with `text_ids`.
          row: Index of each row in the batch, which seeds its dropout; None numbers them from 0.
          train: Whether to apply dropout; needs an rng named "dropout".

        Raises:
          ValueError: If nothing is given, or only one of `text_ids` and `text_mask`.
        """
        if (text_ids is None) != (text_mask is None):
            raise ValueError("text needs both text_ids and text_mask: one of them is missing")
        embeddings = {}
        if audio is not None:
            embeddings["audio"], features = self.audio(audio)
            if self.num_classes:
                embeddings["logits"] = self.classifier(features)
        if video is not None:
            embeddings["video"] = self.video(video)
        if text_ids is not None:
            embeddings["text"] = self.text(text_ids, text_mask, row=row, train=train)
        if not embeddings:
            raise ValueError("no modality given: pass audio, video or text_ids with text_mask")
        return embeddings
