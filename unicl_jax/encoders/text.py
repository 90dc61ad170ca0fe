"""The text tower: CLIP's causal pre-norm transformer, with UniCL's constants.

Letters: B batch, L token slots, W width, h heads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from unicl_jax.encoders.encoder import Encoder, from_linen
from unicl_jax.encoders.layers import (
    Dtype,
    Linear,
    Mlp,
    attend,
    layer_norm,
    merge_heads,
    quick_gelu,
    split_heads,
)
from unicl_jax.errors import InputError

EPS = 1e-12  # UniCL's; CLIP has 1e-5
NORMAL = nn.initializers.normal(0.02)


class TextBlock(nn.Module):
    """Causal attention and an MLP, each behind a norm and a residual."""

    num_heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x, causal_bias):
        """[B, L, W] -> the same."""
        width = x.shape[-1]
        dense = functools.partial(Linear, dtype=self.dtype)
        y = layer_norm(EPS, self.dtype, "ln_1")(x)
        # The release keeps PyTorch's Xavier-uniform for the joint projection.
        xavier = nn.initializers.xavier_uniform()
        qkv = dense(3 * width, kernel_init=xavier, name="attn_in_proj")(y)
        y = merge_heads(attend(*split_heads(qkv, self.num_heads), causal_bias))
        x = x + dense(width, kernel_init=NORMAL, name="attn_out_proj")(y)
        mlp = Mlp(
            4, quick_gelu, NORMAL, self.dtype, names=("c_fc", "c_proj"), name="mlp"
        )
        return x + mlp(layer_norm(EPS, self.dtype, "ln_2")(x))


class TextTransformer(nn.Module):
    """Embeddings, causal blocks, norm, and the state at the end-of-text token."""

    vocab_size: int
    context_length: int
    width: int
    num_heads: int
    num_layers: int
    remat: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens, train: bool):
        """[B, L] int32, L <= context_length -> [B, W] float32."""
        del train  # no dropout and no drop path in this tower
        length = tokens.shape[1]
        embed = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=NORMAL,
            dtype=self.dtype,
            name="token_embedding",
        )
        position = self.param(
            "positional_embedding", NORMAL, (self.context_length, self.width)
        )
        x = embed(tokens) + position[:length].astype(self.dtype)
        above = np.triu(np.ones((length, length), bool), 1)
        causal_bias = np.where(above, -np.inf, 0).astype("f4")
        block = nn.remat(TextBlock) if self.remat else TextBlock
        for i in range(self.num_layers):
            x = block(self.num_heads, self.dtype, name=f"resblocks_{i}")(x, causal_bias)
        # End-of-text is the largest id, and argmax takes its first place. Nothing
        # after it is seen through the causal mask, so padding and slots don't matter.
        end = tokens.argmax(1)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        x = layer_norm(EPS, self.dtype, "ln_final")(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def transformer(
    *,
    vocab_size: int = 49408,
    context_length: int = 77,
    width: int = 512,
    num_heads: int = 8,
    num_layers: int = 12,
    remat: bool = False,
    dtype: Dtype = jnp.float32,
) -> Encoder:
    """The causal text transformer; the defaults are every released UniCL model's.

    Args:
      vocab_size: token ids are in [0, vocab_size); the largest is end-of-text.
      context_length: most token slots; fewer may be given, with the same result.
      width: of the embeddings; must be divisible by num_heads.
      num_heads: of each block.
      num_layers: blocks.
      remat: recompute each block in the backward pass instead of keeping it.
      dtype: of the computation; parameters and norms' statistics are float32.

    Returns:
      The encoder; inputs [B, L] int32.

    Raises:
      InputError: if num_heads does not divide width.

    Source: Radford et al., 2021, section 2.4; UniCL's release for eps, init, pooling.
    """
    if width % num_heads:
        raise InputError(
            f"num_heads must divide the text tower's width {width}: got {num_heads}."
        )
    module = TextTransformer(
        vocab_size, context_length, width, num_heads, num_layers, remat, dtype
    )
    return from_linen(module, jax.numpy.zeros((1, context_length), jnp.int32), width)
