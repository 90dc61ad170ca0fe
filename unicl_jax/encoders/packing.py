"""Several texts in one row of the causal text tower: work follows their real tokens.

Letters: T texts, L token slots of a text's own row, R packed rows, S slots of each.
"""

from typing import NamedTuple

import jax
import numpy as np

from unicl_jax.errors import InputError


class Packed(NamedTuple):
    """Rows of several texts, which the causal tower takes in place of [T, L] tokens."""

    tokens: jax.Array | np.ndarray  # [R, S] int32; 0 in free slots
    segments: jax.Array | np.ndarray  # [R, S] int32; 1, 2, ... in a row; 0: free
    positions: jax.Array | np.ndarray  # [R, S] int32; each text starts at 0
    ends: jax.Array | np.ndarray  # [T] int32; where each text ends, among the R S slots


def pack(tokens: np.ndarray, slots: int, rows: int | None = None) -> Packed:
    """Puts texts, each up to its end, into as few rows as first-fit decreasing needs.

    On the host. The tower's embeddings of the result are those of `tokens`, in their
    order. A step compiled for one number of rows needs that number each time: `rows`.

    Args:
      tokens: [T, L] integers; a text ends at the first place of its row's largest id.
      slots: of a packed row; no less than the longest text's ids, SOT and EOT included.
      rows: the number of packed rows, of which some may stay free; None for as many as
        are needed.

    Returns:
      The packed texts, as NumPy arrays.

    Raises:
      InputError: if a text is longer than `slots`, or the texts need more than `rows`.

    Source: the largest id as the end is CLIP's, as in the tower; packing as in Krell et
      al., 2021, arXiv 2107.02027, with another heuristic.
    """
    tokens = np.asarray(tokens)
    lengths = tokens.argmax(1) + 1
    if lengths.max(initial=0) > slots:
        raise InputError(
            f"slots must hold the longest text: got {slots} for one of {lengths.max()} "
            f"ids; take at least {lengths.max()}, or cut the texts."
        )
    free = np.full(len(tokens), slots)  # one row a text is always enough
    starts = np.zeros(len(tokens), np.int64)
    held = np.zeros(len(tokens), np.int32)
    places = []
    for text in np.argsort(-lengths, kind="stable"):
        row = (free >= lengths[text]).argmax()
        starts[text] = row * slots + slots - free[row]
        free[row] -= lengths[text]
        held[row] += 1
        places.append((text, held[row]))
    needed = np.count_nonzero(held)
    if rows is None:
        rows = needed
    if needed > rows:
        raise InputError(
            f"rows must hold all texts: got {rows} rows of {slots} slots where "
            f"{needed} are needed; take more rows or slots, or fewer texts."
        )
    packed = np.zeros((3, rows * slots), np.int32)
    for text, segment in places:
        start, length = starts[text], lengths[text]
        packed[0, start : start + length] = tokens[text, :length]
        packed[1, start : start + length] = segment
        packed[2, start : start + length] = np.arange(length)
    ends = (starts + lengths - 1).astype(np.int32)
    return Packed(*packed.reshape(3, rows, slots), ends)
