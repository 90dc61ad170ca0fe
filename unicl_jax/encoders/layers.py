"""What several towers share: attention, MLP, drop path, initialisers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from unicl_jax.encoders.encoder import draw_rows

Dtype = Any


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(d) + bias) v, the softmax in float32 at least.

    Args:
      q: [..., heads, n, d].
      k: [..., heads, n, d].
      v: [..., heads, n, d].
      bias: broadcastable to [..., heads, n, n]: position biases, masks; or None.

    Returns:
      [..., heads, n, d] in q's dtype.
    """
    logits = jnp.einsum("...nd,...md->...nm", q * q.shape[-1] ** -0.5, k)
    logits = logits.astype(jnp.promote_types(q.dtype, jnp.float32))
    if bias is not None:
        logits += bias
    return jnp.einsum(
        "...nm,...md->...nd", jax.nn.softmax(logits, axis=-1).astype(q.dtype), v
    )


def split_heads(qkv: jax.Array, num_heads: int) -> jax.Array:
    """[..., n, 3 C] -> [3, ..., heads, n, C / heads]: a q, a k and a v block."""
    return rearrange(qkv, "... n (three h d) -> three ... h n d", three=3, h=num_heads)


def merge_heads(x: jax.Array) -> jax.Array:
    """[..., heads, n, d] -> [..., n, heads d]."""
    return rearrange(x, "... h n d -> ... n (h d)")


class Linear(nn.Dense):
    """`nn.Dense` over rows flattened to one axis.

    The same numbers, but the gradient of the kernel is then one matmul; with several
    leading axes XLA's CPU backend transposes first: a step took half as long again.
    """

    @nn.compact
    def __call__(self, x):
        """[..., C] -> [..., features]."""
        y = super().__call__(x.reshape(-1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], self.features)


class Mlp(nn.Module):
    """Linear, activation, Linear, back to the input's width."""

    ratio: float
    activation: Callable[[jax.Array], jax.Array]
    kernel_init: Callable
    dtype: Dtype
    names: tuple[str, str] = ("fc1", "fc2")

    @nn.compact
    def __call__(self, x):
        """[..., C] -> [..., C]."""
        width = x.shape[-1]
        first, second = self.names
        dense = dict(kernel_init=self.kernel_init, dtype=self.dtype)
        x = Linear(int(width * self.ratio), name=first, **dense)(x)
        return Linear(width, name=second, **dense)(self.activation(x))


class DropPath(nn.Module):
    """Drops a residual branch for a whole sample, and scales the others up.

    Source: stochastic depth, Huang et al., 2016, arXiv 1603.09382, as Swin uses it.
    """

    rate: float | jax.Array

    @nn.compact
    def __call__(self, x, train: bool):
        """[batch, ...] -> [batch, ...]."""
        # A rate that is traced, in a loop over blocks, is not 0 in all of them.
        if not train or (isinstance(self.rate, float) and self.rate == 0):
            return x
        keep = 1 - self.rate
        key, ones = self.make_rng("drop_path"), (1,) * (x.ndim - 1)
        kept = draw_rows(
            lambda rows: jax.random.bernoulli(key, keep, (rows, *ones)), len(x)
        )
        return jnp.where(kept, x / jnp.asarray(keep, x.dtype), 0)


def layer_norm(eps: float, dtype: Dtype, name: str | None = None) -> nn.LayerNorm:
    """Layer norm with float32 statistics and the two-pass variance.

    The one-pass form, E[x^2] - E[x]^2, cancels where the mean is large.
    """
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) form, as in Swin; the tanh form moves features by 8e-5."""
    return nn.gelu(x, approximate=False)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), as in CLIP's towers."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


def uniform_fan_in(key, shape, dtype=jnp.float32):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's start of a convolution's kernel."""
    fan_in = 1
    for size in shape[:-1]:
        fan_in *= size
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)
