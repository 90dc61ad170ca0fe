"""Totals over all pairs of a batch, a tile at a time, on one device or around a ring.

Nothing here knows of a loss: a `tile` function looks at a block of rows against a block
of columns and says what it adds to the totals of either side.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from unicl_jax.losses.pairs import gather

Axes = str | tuple[str, ...] | None


class Plan(NamedTuple):
    """How the pairs are walked: hashable, so that it can be a static argument."""

    block_size: int  # rows and columns of a tile
    axis_name: Axes = None  # the mapped axes over which the columns are spread
    ring: bool = False  # pass the columns around instead of gathering them


def sweep(
    tile: Callable[[Any, Any], tuple[Any, Any]],
    rows: Any,
    columns: Any,
    row_totals: Any,
    column_totals: Any,
    plan: Plan,
    combine: Callable = jnp.add,
) -> tuple[Any, Any]:
    """Combines what `tile` says of every block of rows and every block of columns.

    Each device holds its rows and its columns. Gathered, all columns are on all devices
    at once, and their totals go home in one reduction. Around the ring they travel with
    their totals from device to device, and nothing as large as the global batch is
    held.

    Args:
      tile: (row block, column block) -> (row totals, column totals): trees of arrays
        [block_size, ...]. The last block may be filled up with zeros.
      rows: tree of [b, ...].
      columns: tree of [b, ...].
      row_totals: what `combine` starts from: a tree like the tile's first, [b, ...].
      column_totals: the same for the columns, [b, ...].
      plan: how the pairs are walked.
      combine: addition or maximum.

    Returns:
      The totals of the rows and of the columns, each [b, ...].
    """
    if plan.axis_name is None:
        return _local(tile, rows, columns, row_totals, column_totals, plan, combine)
    if plan.ring:
        return _around(tile, rows, columns, row_totals, column_totals, plan, combine)
    count = lax.axis_size(plan.axis_name)
    columns = gather(columns, plan.axis_name)
    starts = jax.tree.map(lambda x: jnp.concatenate([x] * count), column_totals)
    row_totals, of_all = _local(tile, rows, columns, row_totals, starts, plan, combine)
    return row_totals, jax.tree.map(lambda x: _home(x, plan, combine, count), of_all)


def _home(totals, plan, combine, count):
    """Totals of all columns [B, ...] -> this device's columns', over all devices."""
    if combine is jnp.add:
        return lax.psum_scatter(totals, plan.axis_name, tiled=True)
    b = totals.shape[0] // count
    start = lax.axis_index(plan.axis_name) * b
    return lax.dynamic_slice_in_dim(lax.pmax(totals, plan.axis_name), start, b)


def _around(tile, rows, columns, row_totals, column_totals, plan, combine):
    count = lax.axis_size(plan.axis_name)
    to_next = [(i, (i + 1) % count) for i in range(count)]

    def hop(carry, _):
        columns, row_totals, column_totals = carry
        row_totals, column_totals = _local(
            tile, rows, columns, row_totals, column_totals, plan, combine
        )
        columns, column_totals = jax.tree.map(
            lambda x: lax.ppermute(x, plan.axis_name, to_next),
            (columns, column_totals),
        )
        return (columns, row_totals, column_totals), None

    carry = (columns, row_totals, column_totals)
    (_, row_totals, column_totals), _ = lax.scan(hop, carry, length=count)
    return row_totals, column_totals


def _local(tile, rows, columns, row_totals, column_totals, plan, combine):
    """All tiles of what this device holds; the totals so far come in and go out."""
    row_blocks, row_totals = _split((rows, row_totals), plan.block_size)
    column_blocks, column_totals = _split((columns, column_totals), plan.block_size)

    def against_column(row_totals, column):
        column_block, column_total = column

        def against_row(column_total, row):
            row_block, row_total = row
            of_rows, of_columns = tile(row_block, column_block)
            return (
                jax.tree.map(combine, column_total, of_columns),
                jax.tree.map(combine, row_total, of_rows),
            )

        column_total, row_totals = lax.scan(
            against_row, column_total, (row_blocks, row_totals)
        )
        return row_totals, column_total

    row_totals, column_totals = lax.scan(
        against_column, row_totals, (column_blocks, column_totals)
    )
    b, columns_held = (jax.tree.leaves(x)[0].shape[0] for x in (rows, columns))
    return _join(row_totals, b), _join(column_totals, columns_held)


def _split(tree, size):
    """[n, ...] -> [blocks, size, ...], the last block filled up with zeros."""

    def split(x):
        missing = -x.shape[0] % size
        if missing:
            x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, size, *x.shape[1:])

    return jax.tree.map(split, tree)


def _join(tree, n):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], tree)
