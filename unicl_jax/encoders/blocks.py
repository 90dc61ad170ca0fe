"""The pre-norm transformer block of CLIP's towers, and what masks its attention."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from unicl_jax.encoders.layers import (
    DropPath,
    Dtype,
    Linear,
    Mlp,
    attend,
    layer_norm,
    merge_heads,
    split_heads,
)


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and a residual."""

    num_heads: int
    activation: Callable[[jax.Array], jax.Array]
    eps: float
    kernel_init: Callable
    dtype: Dtype
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x, bias, train: bool):
        """[B, L, W] -> the same; bias broadcastable to [B, heads, L, L], or None."""
        width = x.shape[-1]
        init = self.kernel_init
        dense = functools.partial(Linear, dtype=self.dtype)
        y = layer_norm(self.eps, self.dtype, "ln_1")(x)
        # The releases keep PyTorch's Xavier-uniform for the joint projection.
        xavier = nn.initializers.xavier_uniform()
        qkv = dense(3 * width, kernel_init=xavier, name="attn_in_proj")(y)
        y = merge_heads(attend(*split_heads(qkv, self.num_heads), bias))
        y = dense(width, kernel_init=init, name="attn_out_proj")(y)
        drop_path = DropPath(self.drop_path)
        x = x + drop_path(y, train)
        mlp = Mlp(
            4, self.activation, init, self.dtype, names=("c_fc", "c_proj"), name="mlp"
        )
        return x + drop_path(mlp(layer_norm(self.eps, self.dtype, "ln_2")(x)), train)


def padding_bias(real: jax.Array) -> jax.Array:
    """What to add to attention's logits so that no token sees padding.

    Args:
      real: [B, L] bool, False for padding.

    Returns:
      [B, 1, 1, L] float32: 0 or float32's least number. Not minus infinity: a row of
      padding alone then gets features that mean nothing, where its NaN would spread.
    """
    return jnp.where(real, 0, jnp.finfo(jnp.float32).min)[:, None, None].astype("f4")
