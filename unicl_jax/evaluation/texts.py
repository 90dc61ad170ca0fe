"""Many texts through the text tower once: distinct ones, in the slots that they need.

A causal tower gets several texts in a row, so that prompts of 10 ids don't cost the 77
slots of a row each; another tower gets rows of like length, cut where the rest is what
it takes for padding. Shapes are few, as each is a program to compile, and don't depend
on the task, so that the tasks of a suite share them.

Letters: n texts, u distinct ones, L slots of a row, G groups of rows, one a device.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from unicl_jax import sharding
from unicl_jax.encoders.packing import Packed, pack, with_rows
from unicl_jax.encoders.text import PADDING

SLOTS = 8192  # of a batch, on each device
ROW = 128  # slots of a packed row; twice that if no two of the longest texts fit
IDS = 4  # of a text, at least, on the average, for packed rows to be full
BUCKET = 8  # lengths of rows that are not packed are multiples of it


class Batch(NamedTuple):
    """Texts in one shape."""

    texts: np.ndarray  # [k] int, which they are
    rows: np.ndarray  # [k] int, and where the tower's result has them
    tokens: np.ndarray | Packed


def distinct(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tells equal rows.

    Args:
      tokens: [n, L] integers.

    Returns:
      The rows, [u, L], each once, in the order of their first; and which of them each
      row is, [n] int64.
    """
    seen: dict[bytes, int] = {}
    index = [seen.setdefault(row.tobytes(), len(seen)) for row in tokens]
    index = np.array(index, np.int64)
    first = np.unique(index, return_index=True)[1]
    return tokens[first], index


def seen_ids(tokens: np.ndarray, tower: Mapping[str, Any] | None) -> np.ndarray:
    """How many slots of each text a tower must be given.

    Args:
      tokens: [n, L] integers.
      tower: options of the text tower, defaults included; None: it sees all.

    Returns:
      [n] int64, in [1, L]: up to the end (the first place of the largest id) for a
      causal tower, up to the last id that is not padding for another.
    """
    length = tokens.shape[1]
    if tower is None:
        return np.full(len(tokens), length)
    if tower.get("causal", False):
        return tokens.argmax(1) + 1
    real = tokens != tower.get("pad_id", PADDING)
    return np.where(real.any(1), length - real[:, ::-1].argmax(1), 1)


def in_batches(
    tokens: np.ndarray, tower: Mapping[str, Any] | None, groups: int
) -> list[Batch]:
    """Divides texts into batches of few shapes.

    Args:
      tokens: [n, L] int32.
      tower: as for `seen_ids`.
      groups: G, devices that have rows of their own.

    Returns:
      The batches; each text is in one.
    """
    if not len(tokens):
        return []
    ids = seen_ids(tokens, tower)
    order = np.argsort(-ids, kind="stable")
    if tower is not None and tower.get("causal", False):
        return _packed(tokens, ids, order, groups)
    return _cut(tokens, ids, order, groups)


def encoded(
    encode: Callable,
    params,
    state,
    batches: list[Batch],
    mesh: Mesh,
    between: Callable[[], None] = lambda: None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Runs a tower over batches, the next one under way while one is looked at.

    Args:
      encode: (params, state, tokens or packed texts, divided over the devices) ->
        features [.., D], a copy on every device.
      params: of the towers.
      state: of the towers.
      batches: of `in_batches`, the same on every process.
      mesh: the devices.
      between: called after every batch; what it raises ends the work.

    Yields:
      Which texts [k], and their features [k, D].
    """
    count, mine = jax.process_count(), jax.process_index()

    def local(x):
        return x.reshape(count, -1, *x.shape[1:])[mine]

    def start(batch):
        put = sharding.global_batch(mesh, {"": jax.tree.map(local, batch.tokens)})
        return batch, encode(params, state, put[""])

    def finish(batch, features):
        features = np.asarray(features)[batch.rows]
        between()
        return batch.texts, features

    ahead = None
    for batch in batches:
        ahead, ready = start(batch), ahead
        if ready is not None:
            yield finish(*ready)
    if ahead is not None:
        yield finish(*ahead)


def text_features(
    encode: Callable,
    params,
    state,
    tokens: np.ndarray,
    mesh: Mesh,
    tower: Mapping[str, Any] | None = None,
    between: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Features of texts, whose order is kept and of which equal ones are run once.

    Args:
      encode: as for `encoded`.
      params: of the towers.
      state: of the towers.
      tokens: [n, L] int32, n at least 1.
      mesh: the devices.
      tower: as for `seen_ids`.
      between: as for `encoded`.

    Returns:
      [n, D], as `encode` gives them.
    """
    tokens, index = distinct(tokens)
    batches = in_batches(tokens, tower, groups_of(mesh))
    found = None
    for texts, features in encoded(encode, params, state, batches, mesh, between):
        if found is None:
            found = np.empty((len(tokens), features.shape[1]), features.dtype)
        found[texts] = features
    return found[index]


def groups_of(mesh: Mesh) -> int:
    """Devices of a mesh that have rows of their own."""
    return int(np.prod([mesh.shape[axis] for axis in sharding.batch_axes(mesh)]))


def _power(number):
    """The next power of 2."""
    return 1 << max(0, int(number) - 1).bit_length()


def _packed(tokens, ids, order, groups):
    """Batches of rows of several texts, all of one shape.

    Each has texts of all lengths: the short ones fill up what the long ones leave.
    """
    slots = ROW if 2 * ids.max() <= ROW else max(2 * ROW, int(ids.max()))
    most = max(1, SLOTS // slots)  # rows of a group
    # A row holds its texts' ids, and a share of the ends that can be asked for.
    needed = max(ids.sum() / slots, len(ids) * IDS / slots) / groups
    rows = min(most, _power(needed))
    ends = rows * slots // IDS
    count = max(1, int(np.ceil(needed / rows)))
    while True:
        parts = [order[i::count] for i in range(count)]
        made = [_pack_one(tokens, part, slots, groups) for part in parts]
        largest = max(batch.tokens.rows for batch in made)
        if largest <= rows and max(b.tokens.ends.shape[1] for b in made) <= ends:
            break
        if rows < most:
            rows = min(most, 2 * rows)
            ends = rows * slots // IDS
        else:
            count = max(count + 1, int(count * largest / rows))
    return [
        batch._replace(
            tokens=_with_ends(with_rows(batch.tokens, rows), ends),
            rows=batch.rows // per * ends + batch.rows % per,
        )
        for batch in made
        for per in (batch.tokens.ends.shape[1],)
    ]


def _pack_one(tokens, texts, slots, groups):
    """The texts, dealt to the groups in turn; what one lacks is a text of one id."""
    per = -(-len(texts) // groups)
    filled = np.zeros((per * groups, tokens.shape[1]), np.int32)
    # The i-th text is the (i // groups)-th of group i % groups.
    place = np.arange(len(texts))
    place = place % groups * per + place // groups
    filled[place] = tokens[texts]
    return Batch(texts, place, pack(filled, slots, groups=groups))


def _with_ends(packed, ends):
    """As many ends a group, of which the last are no text's."""
    missing = ends - packed.ends.shape[1]
    return packed._replace(ends=np.pad(packed.ends, ((0, 0), (0, missing))))


def _cut(tokens, ids, order, groups):
    """Batches of rows that are cut where the longest of them ends."""
    batches, start = [], 0
    while start < len(order):
        length = -(-int(ids[order[start]]) // BUCKET) * BUCKET
        length = min(length, tokens.shape[1])
        rows = max(1, SLOTS // _power(length))
        rows = min(rows, _power(-(-(len(order) - start) // groups))) * groups
        texts = order[start : start + rows]
        filled = np.repeat(tokens[texts[-1:], :length], rows, 0)
        filled[: len(texts)] = tokens[texts, :length]
        batches.append(Batch(texts, np.arange(len(texts)), filled))
        start += rows
    return batches
