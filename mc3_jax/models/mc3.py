"""The three towers and the space they meet in.

A tower is an encoder, its projection and the L2 norm. The projections are those of the sources: EgoVLP's Linear for video
and ReLU, Linear for text; AST's head, LayerNorm (eps 1e-5) and Linear, for audio.
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
    """AST, LayerNorm, Linear, L2 norm. Returns the encoder's features as well."""

    encoder: AudioSpectrogramTransformer
    embed_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, log_mel: Float[Array, "b time mel"]) -> tuple[Float[Array, "b d"], Float[Array, "b w"]]:
        features = self.encoder(log_mel)
        x = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(features)
        return l2_normalize(_projection(self)(x)), features


class Classifier(nn.Module):
    """LayerNorm and Linear, AST's head: float32 logits of the classes of a sound."""

    num_classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "b w"]) -> Float[Array, "b c"]:
        features = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(features)
        head = Dense(self.num_classes, kernel_init=TORCH_DEFAULT_INIT, dtype=self.dtype, name="head")
        return head(features).astype(jnp.float32)


class VideoTower(nn.Module):
    """SpaceTimeTransformer, Linear, L2 norm."""

    encoder: SpaceTimeTransformer
    embed_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, video: Float[Array, "b t y x 3"]) -> Float[Array, "b d"]:
        return l2_normalize(_projection(self)(self.encoder(video)))


class TextTower(nn.Module):
    """First token of DistilBERT's last layer, ReLU, Linear, L2 norm."""

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
    """Embeds any of audio, video and text in one space.

    Parameters: {"audio": {"encoder", "norm", "projection"}, "video": {"encoder", "projection"}, "text": {"encoder",
    "projection"}} and, with classes, "classifier": {"norm", "head"}. A tower whose input is left out is not run, and at
    `init` gets no parameters.

    Attributes:
      audio_tower, video_tower, text_tower: Encoders.
      embed_dim: Of the joint space (EgoVLP's: 256).
      dtype: Compute dtype of the projections; embeddings are float32.
      num_classes: Of a head on the audio tower; 0 is none.
    """

    audio_tower: AudioSpectrogramTransformer
    video_tower: SpaceTimeTransformer
    text_tower: DistilBert
    embed_dim: int = 256
    dtype: DTypeLike = jnp.float32
    num_classes: int = 0

    def setup(self) -> None:
        # A field that is a module would be a child of this one; unbound, it becomes its tower's.
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
        """Returns L2-normalised float32 embeddings of the modalities given: of {"audio", "video", "text"}.

        With classes, and where audio is given, "logits" [b, c] too.

        Args:
          audio: Normalised log-mel spectrograms.
          video: Normalised frames.
          text_ids: Token ids.
          text_mask: 1 for a token, 0 for padding; given with `text_ids`.
          row: Index of each row in the batch, which dropout goes by; None counts them.
          train: Whether to drop; needs an rng named "dropout".

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
