"""Several texts in one row of the causal text tower: work follows their real tokens.

Letters: T texts, L token slots of a text's own row, G groups of T / G texts, R packed
rows, R / G a group, S slots of each.
"""

from typing import NamedTuple

import jax
import numpy as np

from unicl_jax.errors import InputError


class Packed(NamedTuple):
    """Rows of several texts, which the causal tower takes in place of [T, L] tokens."""

    tokens: jax.Array | np.ndarray  # [R, S] int32, a group's rows together; 0 if free
    segments: jax.Array | np.ndarray  # [R, S] int32; 1, 2, ... in a row; 0: free
    positions: jax.Array | np.ndarray  # [R, S] int32; each text starts at 0
    # [G, T / G] int32; where each text ends, among the slots of its group.
    ends: jax.Array | np.ndarray

    @property
    def rows(self) -> int:
        """Rows of a group, R / G."""
        return len(self.tokens) // len(self.ends)

    def by_groups(self) -> "Packed":
        """Each array as [G, ...], to be cut into parts of whole groups."""
        groups = len(self.ends)
        rows = (x.reshape(groups, -1, x.shape[1]) for x in self[:3])
        return Packed(*rows, self.ends)

    def in_rows(self) -> "Packed":
        """What `by_groups` made, or some of its groups, as the tower takes it."""
        rows = (x.reshape(-1, x.shape[2]) for x in self[:3])
        return Packed(*rows, self.ends)


def pack(
    tokens: np.ndarray, slots: int, rows: int | None = None, groups: int = 1
) -> Packed:
    """Puts texts, each up to its end, into as few rows as first-fit decreasing needs.

    On the host. The tower's embeddings of the result are those of `tokens`, in their
    order. A step compiled for one number of rows needs that number each time: `rows`.
    Divided over devices, with a group for each, no device needs another's rows.

    Args:
      tokens: [T, L] integers; a text ends at the first place of its row's largest id.
      slots: of a packed row; no less than the longest text's ids, SOT and EOT included.
      rows: the number of packed rows of a group, of which some may stay free; None for
        as many as the fullest group needs.
      groups: equal parts of `tokens`, packed each by itself; must divide T.

    Returns:
      The packed texts, as NumPy arrays.

    Raises:
      InputError: if a text is longer than `slots`, the texts of a group need more than
        `rows`, or there is no such number of groups.

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
    if groups < 1 or len(tokens) % groups:
        raise InputError(
            f"groups must divide the number of texts: got {groups} for {len(tokens)}."
        )
    parts = [_first_fit(part, slots) for part in lengths.reshape(groups, -1)]
    needed = max(row.max(initial=-1) + 1 for row, _, _ in parts)
    packed = _fill(tokens, lengths, parts, slots, needed)
    return packed if rows is None else with_rows(packed, rows)


def with_rows(packed: Packed, rows: int) -> Packed:
    """The same texts with free rows after each group's own.

    Args:
      packed: as `pack` makes it.
      rows: of each group.

    Returns:
      The packed texts, with `rows` rows a group.

    Raises:
      InputError: if the texts need more.
    """
    groups, slots = len(packed.ends), packed.tokens.shape[1]
    if packed.rows > rows:
        raise InputError(
            f"rows must hold all texts: got {rows} rows of {slots} slots where "
            f"{packed.rows} are needed; take more rows or slots, or fewer texts."
        )

    def widened(array):
        array = array.reshape(groups, packed.rows, slots)
        array = np.pad(array, ((0, 0), (0, rows - packed.rows), (0, 0)))
        return array.reshape(-1, slots)

    return Packed(*map(widened, packed[:3]), packed.ends)


def _first_fit(lengths, slots):
    """Each text's row, first slot there and number in it; the longest go first."""
    free = np.full(len(lengths), slots)  # one row a text is always enough
    row, start, segment = (np.zeros(len(lengths), np.int32) for _ in range(3))
    held = np.zeros(len(lengths), np.int32)
    for text in np.argsort(-lengths, kind="stable"):
        first = (free >= lengths[text]).argmax()
        row[text], start[text] = first, slots - free[first]
        free[first] -= lengths[text]
        held[first] += 1
        segment[text] = held[first]
    return row, start, segment


def _fill(tokens, lengths, parts, slots, rows):
    """The texts at their places, `rows` rows a group."""
    row, start, segment = (np.stack(x) for x in zip(*parts, strict=True))
    first = row * slots + start  # [G, T / G], among the slots of the group
    ends = first + lengths.reshape(first.shape) - 1
    # Every id at once: text, place in the text, and slot among all.
    first += rows * slots * np.arange(len(parts), dtype=np.int32)[:, None]
    text = np.repeat(np.arange(len(tokens)), lengths)
    place = np.arange(len(text)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    slot = first.reshape(-1)[text] + place
    packed = np.zeros((3, len(parts) * rows * slots), np.int32)
    packed[:, slot] = tokens[text, place], segment.reshape(-1)[text], place
    packed = packed.reshape(3, -1, slots)
    return Packed(*packed, ends.astype(np.int32))
