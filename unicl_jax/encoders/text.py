"""The text tower: CLIP's pre-norm transformer, with UniCL's constants.

Letters: B batch, L token slots, W width, h heads.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from unicl_jax.encoders.blocks import Block, padding_bias, run_blocks
from unicl_jax.encoders.encoder import Encoder, from_linen
from unicl_jax.encoders.layers import ACTIVATIONS, Dtype, layer_norm
from unicl_jax.encoders.packing import Packed
from unicl_jax.encoders.remat import Remat
from unicl_jax.errors import InputError, choose

PADDING = 0  # what the non-causal mode takes for padding
NORMAL = nn.initializers.normal(0.02)


class TextTransformer(nn.Module):
    """Embeddings, blocks, norm, and the state at the end-of-text token."""

    vocab_size: int
    context_length: int
    width: int
    num_heads: int
    num_layers: int
    eps: float
    activation: Callable[[jax.Array], jax.Array]
    causal: bool
    remat: Remat
    scan: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens, train: bool):
        """[B, L] int32, L <= context_length, or B packed texts -> [B, W] float32."""
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
        packed = None
        if isinstance(tokens, Packed):
            if not self.causal:
                raise ValueError(
                    "packed texts must go to a causal tower, where nothing after a "
                    "text's end matters: got causal=False; give it [B, L] tokens."
                )
            packed, tokens = tokens, tokens.tokens
        length = tokens.shape[1]
        if packed is None:
            position = position[:length]
        else:
            # NaN, where indexing would take the last, for positions there are none of.
            position = jnp.take(position, packed.positions, axis=0, mode="fill")
        x = embed(tokens) + position.astype(self.dtype)
        if self.causal:
            above = np.triu(np.ones((length, length), bool), 1)
            bias = np.where(above, -np.inf, 0).astype("f4")
        else:
            bias = padding_bias(tokens != PADDING)
        if packed is not None:
            # A text sees itself alone: [R, 1, S, 1] against [R, 1, 1, S].
            segments = packed.segments[:, None]
            own = segments[..., :, None] == segments[..., None, :]
            bias = jnp.where(own, bias, -jnp.inf)
        block = functools.partial(
            Block, self.num_heads, self.activation, self.eps, NORMAL, self.dtype
        )
        rates, how = [0.0] * self.num_layers, dict(remat=self.remat, scan=self.scan)
        x = run_blocks(self, block, rates, x, bias, train, **how)
        # End-of-text is the largest id, and argmax takes its first place. Nothing
        # after it is seen through a causal mask, so padding and slots don't matter.
        if packed is None:
            end = tokens.argmax(1)
            x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        else:
            # By groups, each of which a device holds whole: nothing travels.
            groups = len(packed.ends)
            x = x.reshape(groups, -1, self.width)
            x = jnp.take_along_axis(x, packed.ends[:, :, None], axis=1)
            x = x.reshape(-1, self.width)
        x = layer_norm(self.eps, self.dtype, "ln_final")(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def transformer(
    *,
    vocab_size: int = 49408,
    context_length: int = 77,
    width: int = 512,
    num_heads: int = 8,
    num_layers: int = 12,
    eps: float = 1e-12,
    activation: str = "quick_gelu",
    causal: bool = True,
    remat: Remat = False,
    scan: bool = False,
    dtype: Dtype = jnp.float32,
) -> Encoder:
    """The text transformer; the defaults are every released UniCL model's.

    Args:
      vocab_size: token ids are in [0, vocab_size); the largest is end-of-text.
      context_length: most token slots; fewer may be given, with the same result if
        causal.
      width: of the embeddings; must be divisible by num_heads.
      num_heads: of each block.
      num_layers: blocks.
      eps: of the norms; CLIP has 1e-5.
      activation: of the MLPs, "quick_gelu" or "gelu" (the exact form).
      causal: a token sees those before it. False is the method's other mode: a token
        sees all but id 0, so features depend on padding that is not 0. Our tokenizer
        pads with end-of-text, which is seen; its id 0 is "!" inside a word, which is
        not.
      remat: recompute each block in the backward pass instead of keeping it; "dots"
        keeps what its linear maps gave.
      scan: compile a loop over the blocks, not each of them; see `docs/models.md`.
      dtype: of the computation; parameters and norms' statistics are float32.

    Returns:
      The encoder; inputs [B, L] int32 or, if causal, B texts of `pack`, whose features
      are the same.

    Raises:
      InputError: if num_heads does not divide width, or for an unknown activation.

    Source: Radford et al., 2021, section 2.4; UniCL's release for eps, init, pooling.
    """
    if width % num_heads:
        raise InputError(
            f"num_heads must divide the text tower's width {width}: got {num_heads}."
        )
    module = TextTransformer(
        vocab_size,
        context_length,
        width,
        num_heads,
        num_layers,
        eps,
        choose(ACTIVATIONS, activation, "activation"),
        causal,
        remat,
        scan,
        dtype,
    )
    return from_linen(module, jax.numpy.zeros((1, context_length), jnp.int32), width)
