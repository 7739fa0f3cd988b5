"""The text encoder: DistilBERT (Sanh et al., 2019).

Ports `DistilBertModel` of huggingface/transformers (Apache 2.0). Differs in that one matmul computes queries, keys and
values.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mc3_jax.models.layers import Dropout, LayerNorm, Mlp, SelfAttention, apply_blocks, table_init


class PostNormBlock(nn.Module):
    """BERT's block: y = norm(x + attention(x)); norm(y + mlp(y)).

    Attributes:
      num_heads: Number of attention heads; divides the width.
      mlp_width: Hidden width of the MLP.
      dropout: Dropout rate of the attention weights and of the MLP's output in training.
      dtype: Compute dtype.
    """

    num_heads: int
    mlp_width: int
    dropout: float = 0.1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l w"],
        mask: Bool[Array, "b l"],
        *,
        num_outputs: int | None = None,
        row: Int[Array, " b"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b m w"]:
        """Returns the first `num_outputs` tokens after the block, or all if None."""
        norm_attention, norm_mlp = (
            LayerNorm(epsilon=1e-12, dtype=self.dtype, name=f"norm_{name}")
            for name in ("attention", "mlp")
        )
        attention = SelfAttention(self.num_heads, self.dropout, self.dtype, name="attention")
        mlp = Mlp(self.mlp_width, self.dropout, self.dtype, name="mlp")
        x = norm_attention(x[:, :num_outputs] + attention(x, mask, num_outputs=num_outputs, row=row, train=train))
        return norm_mlp(x + mlp(x, row=row, train=train))


class DistilBert(nn.Module):
    """DistilBERT; the defaults are the sizes of `distilbert-base-uncased`, 66,362,880 parameters.

    Attributes:
      vocab_size: Number of rows of the word embedding.
      num_positions: Number of rows of the position embedding.
      width, depth, num_heads, mlp_width: Width, number of blocks, number of heads and hidden width of the MLPs.
      dropout: Dropout rate of embeddings, attention weights and the MLP's output in training.
      dtype: Compute dtype; parameters are float32.
      scan_layers: Whether all blocks but the last run as one loop; see `layers.apply_blocks`.
      remat: Which activations of a block are kept for the backward pass; see `layers.REMAT_POLICIES`.
    """

    vocab_size: int = 30522
    num_positions: int = 512
    width: int = 768
    depth: int = 6
    num_heads: int = 12
    mlp_width: int = 3072
    dropout: float = 0.1
    dtype: DTypeLike = jnp.float32
    scan_layers: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        text_ids: Int[Array, "b l"],
        text_mask: Int[Array, "b l"],
        *,
        num_outputs: int | None = None,
        row: Int[Array, " b"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b m w"]:
        """Returns the first `num_outputs` tokens of the last layer, or all of them if None.

        Args:
          text_ids: Token ids, padded at the end.
          text_mask: 1 for a token, 0 for padding. The first token of a row is never padding.
          num_outputs: Number of tokens, from the first, that the last block computes.
          row: Index of each row in the batch, which seeds its dropout; None numbers them from 0.
          train: Whether to apply dropout; needs an rng named "dropout".

        Raises:
          ValueError: If there are more tokens than positions.
        """
        length = text_ids.shape[1]
        if length > self.num_positions:
            raise ValueError(f"{length} tokens but num_positions is {self.num_positions}: raise it or cut the text")
        # Embeddings stay float32 up to the norm, so that the gradients of both tables are summed in float32.
        words = nn.Embed(self.vocab_size, self.width, embedding_init=table_init, name="word_embedding")
        position = self.param("position_embedding", table_init, (self.num_positions, self.width))
        norm = LayerNorm(epsilon=1e-12, dtype=self.dtype, name="norm_embedding")
        x = Dropout(self.dropout)(norm(words(text_ids) + position[:length]), row, train=train)
        make_block = functools.partial(PostNormBlock, self.num_heads, self.mlp_width, self.dropout, self.dtype)
        return apply_blocks(
            self, make_block, self.depth, x, last={"num_outputs": num_outputs}, scan_layers=self.scan_layers,
            remat=self.remat, mask=text_mask != 0, row=row, train=train,
        )  # fmt: skip
