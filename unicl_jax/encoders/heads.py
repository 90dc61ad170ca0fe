"""Between an image tower's features and its projection: what some objectives add."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from unicl_jax.encoders.layers import Linear, gelu, layer_norm


class Head(NamedTuple):
    """A pure-functional head, in float32 as the projection behind it.

    init(key) -> params
    apply(params, *inputs) -> [n, width]; the first input is the features [n, width]
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[..., jax.Array]


def hidden_layer(width: int) -> Head:
    """relu(W x + b): with the projection after it, the two-layer head of SupCon.

    Args:
      width: of the features, and of the result.

    Returns:
      The head, of features alone.

    Source: arXiv 2004.11362, section 3.1.
    """
    return _from_linen(_HiddenLayer(width), jnp.zeros((1, width)))


def augmentation_aware(
    width: int, num_parameters: int, *, hidden: int = 64, blocks: int = 3
) -> Head:
    """Lets the embedding know what was done to the picture: UniCLIP's image head.

    a = MLP(parameters), three layers; x = (features, a);
    x = x + MLP(x), `blocks` times; W x + b

    Args:
      width: of the features, and of the result.
      num_parameters: that describe an augmentation; all 0 for an untouched picture.
      hidden: width of the MLP of the parameters, and of a.
      blocks: residual ones.

    Returns:
      The head, of features [n, width] and parameters [n, num_parameters].

    Source: UniCLIP, arXiv 2209.13430, whose authors published no code. That the image
      tower knows nothing of the augmentation and this head everything is theirs; the
      widths and the parameters' form are our reading.
    """
    module = _AugmentationAware(width, hidden, blocks)
    return _from_linen(module, jnp.zeros((1, width)), jnp.zeros((1, num_parameters)))


def _from_linen(module, *example):
    def init(key):
        return module.init(key, *example)["params"]

    def apply(params, features, *inputs):
        return module.apply({"params": params}, features, *inputs)

    return Head(init, apply)


class _HiddenLayer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, features):
        return nn.relu(Linear(self.width, precision=lax.Precision.HIGHEST)(features))


class _AugmentationAware(nn.Module):
    width: int
    hidden: int
    blocks: int

    @nn.compact
    def __call__(self, features, parameters):
        linear = functools.partial(Linear, precision=lax.Precision.HIGHEST)
        a = gelu(linear(self.hidden)(parameters))
        a = gelu(linear(self.hidden)(a))
        a = linear(self.hidden)(a)
        x = jnp.concatenate([features.astype(a.dtype), a], axis=-1)
        for _ in range(self.blocks):
            y = layer_norm(1e-5, jnp.float32)(x)
            x += linear(x.shape[-1])(gelu(linear(x.shape[-1])(y)))
        return linear(self.width)(x)
