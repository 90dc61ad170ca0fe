"""BERT (Devlin et al., NAACL 2019, arXiv 1810.04805) as a text tower.

Letters: B batch, L token slots, W width, h heads.
Parameters are named after Hugging Face's, so that its weights need a rename and a
transposition. No pooler, no dropout; text pairs (type 1) are not used.
"""

import functools

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from unicl_jax.encoders.blocks import padding_bias
from unicl_jax.encoders.encoder import Encoder, from_linen
from unicl_jax.encoders.layers import (
    Dtype,
    Linear,
    attend,
    gelu,
    layer_norm,
    merge_heads,
)
from unicl_jax.encoders.remat import Remat, recomputed
from unicl_jax.errors import InputError

INIT = nn.initializers.truncated_normal(0.02)
TYPES = 2  # rows of the type table, of which the first is used


class BertEmbeddings(nn.Module):
    """The sum of a word's, its position's and type 0's embedding, then a norm."""

    vocab_size: int
    context_length: int
    width: int
    eps: float
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens):
        """[B, L] int32 -> [B, L, W]."""

        def table(rows, name):
            return nn.Embed(
                rows, self.width, embedding_init=INIT, dtype=self.dtype, name=name
            )

        x = table(self.vocab_size, "word_embeddings")(tokens)
        position = table(self.context_length, "position_embeddings").embedding
        kind = table(TYPES, "token_type_embeddings").embedding
        x = x + (position[: tokens.shape[1]] + kind[0]).astype(self.dtype)
        return layer_norm(self.eps, self.dtype, "LayerNorm")(x)


class BertLayer(nn.Module):
    """Attention and an MLP, each followed by a residual and a norm."""

    num_heads: int
    hidden: int
    eps: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x, bias):
        """[B, L, W] -> the same; bias broadcastable to [B, heads, L, L]."""
        width = x.shape[-1]
        dense = functools.partial(Linear, kernel_init=INIT, dtype=self.dtype)
        q, k, v = (
            rearrange(
                dense(width, name=name)(x), "b n (h d) -> b h n d", h=self.num_heads
            )
            for name in ("query", "key", "value")
        )
        y = merge_heads(attend(q, k, v, bias))
        y = dense(width, name="attention_output")(y)
        x = layer_norm(self.eps, self.dtype, "attention_norm")(x + y)
        y = gelu(dense(self.hidden, name="intermediate")(x))
        y = dense(width, name="output")(y)
        return layer_norm(self.eps, self.dtype, "output_norm")(x + y)


class Bert(nn.Module):
    """Embeddings, layers, and the last state of the first token."""

    vocab_size: int
    context_length: int
    width: int
    num_heads: int
    num_layers: int
    hidden: int
    eps: float
    pad_id: int
    remat: Remat
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens, train: bool):
        """[B, L] int32, L <= context_length -> [B, W] float32."""
        del train  # no dropout and no drop path in this tower
        x = BertEmbeddings(
            self.vocab_size,
            self.context_length,
            self.width,
            self.eps,
            self.dtype,
            name="embeddings",
        )(tokens)
        bias = padding_bias(tokens != self.pad_id)
        layer = recomputed(BertLayer, self.remat)
        for i in range(self.num_layers):
            x = layer(
                self.num_heads,
                self.hidden,
                self.eps,
                self.dtype,
                name=f"encoder_layer_{i}",
            )(x, bias)
        x = x[:, 0]
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def bert(
    *,
    vocab_size: int = 30522,
    context_length: int = 77,
    width: int = 768,
    num_heads: int = 12,
    num_layers: int = 12,
    hidden: int = 3072,
    eps: float = 1e-12,
    pad_id: int = 0,
    remat: Remat = False,
    dtype: Dtype = jnp.float32,
) -> Encoder:
    """A BERT encoder; the defaults are BERT-Base's (uncased), with 77 positions of 512.

    Args:
      vocab_size: token ids are in [0, vocab_size).
      context_length: most token slots; fewer may be given, with the same result where
        the others are padding.
      width: of the states; must be divisible by num_heads.
      num_heads: of each layer.
      num_layers: layers.
      hidden: width inside the MLPs.
      eps: of the norms.
      pad_id: the id that no token sees. Ours for CLIP's vocabulary pads with
        end-of-text, vocab_size - 1: the text's own end is then not seen either.
      remat: recompute each layer in the backward pass instead of keeping it; "dots"
        keeps what its linear maps gave.
      dtype: of the computation; parameters and norms' statistics are float32.

    Returns:
      The encoder; inputs [B, L] int32.

    Raises:
      InputError: if num_heads does not divide width, or pad_id is no token id.

    Source: arXiv 1810.04805, section 3; the release for eps, exact GELU and init. The
      feature is the first token's state, as in UniCL's release for such encoders, not
      BERT's pooler of it.
    """
    if width % num_heads:
        raise InputError(
            f"num_heads must divide the text tower's width {width}: got {num_heads}."
        )
    if not 0 <= pad_id < vocab_size:
        raise InputError(
            f"pad_id must be in [0, {vocab_size}), a token id: got {pad_id}."
        )
    module = Bert(
        vocab_size,
        context_length,
        width,
        num_heads,
        num_layers,
        hidden,
        eps,
        pad_id,
        remat,
        dtype,
    )
    return from_linen(module, jnp.zeros((1, context_length), jnp.int32), width)
