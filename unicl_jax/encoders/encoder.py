"""What an encoder is to the rest of the house: a pair of pure functions."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from flax import linen as nn


class PartKey(NamedTuple):
    """A key for a tower that sees a part of the batch, and draws what is the part's.

    Of the batch's units of `together` neighbouring rows the part holds those numbered
    index, index + count, ...; what is drawn for its rows is what would be drawn for
    them if the tower saw the whole batch with `key`.
    """

    key: jax.Array
    index: jax.Array | int
    count: int
    together: int = 1


class Encoder(NamedTuple):
    """A pure-functional encoder; linen, where it is used, stays inside.

    init(key) -> (params, state)
    apply(params, state, inputs, *, train=False, key=None) -> (features, state)

    `params` and `state` are plain dicts of arrays; `state` holds what a forward pass
    changes (batch-norm statistics) and is {} for most towers. `features` is
    [batch, width]; `key` drives drop path and is needed only with `train=True`: a key,
    or a PartKey where `inputs` are a part of the batch.
    """

    init: Callable[[jax.Array], tuple[Any, Any]]
    apply: Callable[..., tuple[jax.Array, Any]]
    width: int  # of the features


# Linen modules, at any depth and inside loops and checkpoints, have no other way to
# be told; it is read while they are traced, inside the one `apply` that sets it.
_part: contextvars.ContextVar[PartKey | None] = contextvars.ContextVar(
    "part", default=None
)


@contextlib.contextmanager
def _seeing(part: PartKey | None) -> Iterator[None]:
    token = _part.set(part)
    try:
        yield
    finally:
        _part.reset(token)


def draw_rows(draw: Callable[[int], jax.Array], rows: int) -> jax.Array:
    """What is drawn for the rows that a tower sees.

    Args:
      draw: number of rows n -> [n, ...].
      rows: that the tower sees.

    Returns:
      [rows, ...]; in a part of a batch, its rows of the whole batch's draw: numbers,
      beside its activations, are few.
    """
    part = _part.get()
    if part is None:
        return draw(rows)
    drawn = draw(rows * part.count)
    shape = drawn.shape[1:]
    drawn = drawn.reshape(rows // part.together, part.count, part.together, *shape)
    drawn = jax.lax.dynamic_index_in_dim(drawn, part.index, 1, keepdims=False)
    return drawn.reshape(rows, *shape)


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
        part, rngs = None, {}
        if train and key is not None:
            if isinstance(key, PartKey):
                key, part = key.key, key
            rngs = {"drop_path": key}
        # With a list of mutable collections, even an empty one, linen returns a pair.
        with _seeing(part):
            features, changed = module.apply(
                {"params": params, **state},
                inputs,
                train,
                rngs=rngs,
                mutable=list(state) if train else [],
            )
        return features, {**state, **changed}

    return Encoder(init, apply, width)
