"""What an encoder is to the rest of the house: a pair of pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen as nn


class Encoder(NamedTuple):
    """A pure-functional encoder; linen, where it is used, stays inside.

    init(key) -> (params, state)
    apply(params, state, inputs, *, train=False, key=None) -> (features, state)

    `params` and `state` are plain dicts of arrays; `state` holds what a forward pass
    changes (batch-norm statistics) and is {} for most towers. `features` is
    [batch, width]; `key` drives drop path and is needed only with `train=True`.
    """

    init: Callable[[jax.Array], tuple[Any, Any]]
    apply: Callable[..., tuple[jax.Array, Any]]
    width: int  # of the features


def from_linen(module: nn.Module, example: jax.Array, width: int) -> Encoder:
    """Wraps a linen module whose `__call__(inputs, train)` gives [batch, width].

    Args:
      module: the module.
      example: an input of the right shape and dtype; its values don't matter.
      width: of the module's output.

    Returns:
      The encoder.
    """

    def init(key):
        variables = module.init(key, example, False)
        params = variables.pop("params")
        return params, dict(variables)

    def apply(params, state, inputs, *, train=False, key=None):
        rngs = {"drop_path": key} if train and key is not None else {}
        # With a list of mutable collections, even an empty one, linen returns a pair.
        features, changed = module.apply(
            {"params": params, **state},
            inputs,
            train,
            rngs=rngs,
            mutable=list(state) if train else [],
        )
        return features, {**state, **changed}

    return Encoder(init, apply, width)
