"""The pre-norm transformer block of CLIP's towers, and what masks its attention."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

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
from unicl_jax.encoders.remat import Remat, recomputed, recomputed_body


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and a residual."""

    num_heads: int
    activation: Callable[[jax.Array], jax.Array]
    eps: float
    kernel_init: Callable
    dtype: Dtype
    drop_path: float | jax.Array = 0.0

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


def run_blocks(
    tower: nn.Module,
    make: functools.partial,
    rates: Sequence[float],
    x: jax.Array,
    bias: jax.Array | np.ndarray | None,
    train: bool,
    *,
    remat: Remat,
    scan: bool,
) -> jax.Array:
    """Runs a tower's equal blocks one behind another, named `resblocks_0` and so on.

    Args:
      tower: whose `__call__` this is part of.
      make: of Block, with all but its drop path.
      rates: of each block's drop path.
      x: [B, L, W].
      bias: of the attention, for every block.
      train: whether drop path is on.
      remat: recompute each block in the backward pass instead of keeping it; "dots"
        keeps what its linear maps gave.
      scan: compile one block, as the body of a loop over all blocks' parameters, which
        are stacked for it; they are kept a block each, so the tower's parameters are
        the same. Drop path draws other numbers.

    Returns:
      [B, L, W].
    """
    if not scan or tower.is_initializing():
        block = recomputed(make.func, remat, static_argnums=(3,))
        make = functools.partial(block, *make.args, **make.keywords)
        for i, rate in enumerate(rates):
            x = make(drop_path=rate, name=f"resblocks_{i}")(x, bias, train)
        return x
    blocks = [tower.variables["params"][f"resblocks_{i}"] for i in range(len(rates))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    drawn = keys = None
    if train and max(rates) > 0:
        drawn = jnp.array(rates, jnp.float32)
        keys = jax.random.split(tower.make_rng("drop_path"), len(rates))

    def body(x, of_block):
        params, rate, key = of_block
        block = make(drop_path=0.0 if rate is None else rate, parent=None)
        rngs = {} if key is None else {"drop_path": key}
        return block.apply({"params": params}, x, bias, train, rngs=rngs), None

    return lax.scan(recomputed_body(body, remat), x, (stacked, drawn, keys))[0]


def padding_bias(real: jax.Array) -> jax.Array:
    """What to add to attention's logits so that no token sees padding.

    Args:
      real: [B, L] bool, False for padding.

    Returns:
      [B, 1, 1, L] float32: 0 or float32's least number. Not minus infinity: a row of
      padding alone then gets features that mean nothing, where its NaN would spread.
    """
    return jnp.where(real, 0, jnp.finfo(jnp.float32).min)[:, None, None].astype("f4")
