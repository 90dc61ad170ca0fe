"""Large batches in small memory: embed in micro-batches, compare the whole batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def in_micro_batches(
    encode: Callable, count: int, *, numbered: bool = False
) -> Callable:
    """Makes an encode function that holds one micro-batch's activations at a time.

    Use it in place of `encode` and put one loss on all the embeddings: value and
    gradient are those of the whole batch, every parameter's and logit_scale's, since
    nothing but the order of sums differs. The backward pass embeds each micro-batch
    again: one more forward pass, and activations of batch / count rows.

    Micro-batch k holds the rows k, k + count, ..., so that a batch divided over devices
    in contiguous parts stays so divided.

    Args:
      encode: (params, rows) -> embeddings. `rows` is any tree of [batch, ...]; what is
        random must come in with the rows (a key for each), or the micro-batches would
        share it. Statistics over the batch, as of batch norm, are of the micro-batch.
      count: of micro-batches; must divide the batch. 1: `encode`, checkpointed.
      numbered: whether `encode` takes k, an int32 scalar, as a third argument: for
        draws that are made for the whole batch, of which it takes its rows'.

    Returns:
      (params, rows) -> embeddings, in the rows' order.

    Raises:
      ValueError: at trace time, if the batch is not divisible.

    Source: gradient caching, Gao et al., 2021, arXiv 2101.06983; here by
    rematerialisation, so that autodiff does the bookkeeping.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1: got {count}.")

    def split(x):
        if x.shape[0] % count:
            raise ValueError(
                f"the batch must be divisible by {count} micro-batches: got "
                f"{x.shape[0]} rows."
            )
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def encode_all(params: Any, rows: Any) -> Any:
        @jax.checkpoint
        def one(rows, *k):
            return encode(params, rows, *k)

        numbers = [jnp.arange(count, dtype=jnp.int32)] * numbered
        parts = (jax.tree.map(split, rows), *numbers)
        embeddings = jax.lax.map(lambda part: one(*part), parts)
        return jax.tree.map(join, embeddings)

    return encode_all
