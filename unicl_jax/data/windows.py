"""An order that reads shards in sequence and divides them over processes.

A source's shards are put in a random order each epoch, and the records behind each
other are divided into as many chunks as the batch has lanes. A lane walks its chunk in
windows, and in random order within a window. Nothing here is state: where the row
number `number` of a lane lies is computed.
"""

import functools
import zlib
from typing import NamedTuple

import numpy as np

from unicl_jax.data.permutation import permute, permute_each

_SPREAD = 0x9E3779B9  # 2^32 over the golden ratio: multiples of it lie far apart


class Span(NamedTuple):
    """A stretch of the epochs' records; [n] int64 each, or one integer."""

    epoch: np.ndarray
    start: np.ndarray  # in the epoch's sequence
    size: np.ndarray


def of_lane(total, lane, lanes: int):
    """How many of `total` things dealt out in turn a lane gets.

    Over the lanes they sum to `total`, and any two differ by one at most (Hermite's
    identity).

    Args:
      total: integer or array.
      lane: in [0, lanes); integer or array.
      lanes: how many there are.

    Returns:
      ceil((total - lane) / lanes).
    """
    return (total + lanes - 1 - lane) // lanes


class WindowedOrder:
    """Where a source's rows lie, by lane, each record once an epoch.

    Memory is of the number of shards, not of records.

    Attributes:
      length: records.
      lanes: how many share an epoch.
      window: records that a lane mixes.
    """

    def __init__(self, name: str, shard_sizes, lanes: int, window: int, seed: int):
        """Holds the settings.

        Args:
          name: of the source; a key of the order.
          shard_sizes: [s] records of each shard; a shard's lie side by side.
          lanes: how many share an epoch.
          window: records that a lane mixes.
          seed: of the run.
        """
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self.length = int(self._sizes.sum())
        self.lanes, self.window = lanes, window
        self._keys = seed, zlib.crc32(name.encode())
        self._shards = functools.lru_cache(2)(self._shards_of)  # of the last epochs

    def chunk(self, epoch, lane) -> Span:
        """What a lane reads in an epoch.

        Args:
          epoch: integer or array.
          lane: integer or array; `lanes` is where the last one ends.

        Returns:
          The span; sizes differ by one at most.
        """
        begin, end = epoch * self.length, (epoch + 1) * self.length
        size = self._drawn(end, lane) - self._drawn(begin, lane)
        return Span(epoch, self._before(end, lane) - self._before(begin, lane), size)

    def indices(self, lane: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Which records the lanes' rows are.

        Args:
          lane: [n] in [0, lanes).
          number: [n] of the row among its lane's of this source, since the run began.

        Returns:
          [n] int64, indices of records.
        """
        # Dealt out in turn, a lane's rows have these numbers among all.
        epoch = (number * self.lanes + lane) // self.length
        chunk = self.chunk(epoch, lane)
        rank = number - self._drawn(epoch * self.length, lane)
        # Lanes begin new windows at times of their own, so that blocks are not all
        # fetched at once.
        early = (lane * _SPREAD % 2**32) * self.window >> 32
        window = (rank + early) // self.window
        low = np.maximum(window * self.window - early, 0)
        high = np.minimum((window + 1) * self.window - early, chunk.size)
        keys = *self._keys, epoch, lane, window
        place = low + permute_each(rank - low, high - low, *keys)
        return self._at(epoch, chunk.start + place)

    def shards_between(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The shards that positions [start, stop) of an epoch's sequence lie in."""
        order, ends = self._shards(epoch)
        first = np.searchsorted(ends, start, "right")
        last = np.searchsorted(ends, stop, "left")
        among = order[first : last + 1] if start < stop else order[:0]
        return among[self._sizes[among] > 0]

    def _drawn(self, total, lane):
        return of_lane(total, lane, self.lanes)

    def _before(self, total, lane):
        """How many of `total` the lanes before `lane` get."""
        each, more = np.divmod(total, self.lanes)
        return lane * each + np.minimum(lane, more)

    def _shards_of(self, epoch: int):
        """The epoch's order of shards, and where each ends in its sequence."""
        order = permute(
            np.arange(len(self._sizes)), len(self._sizes), *self._keys, epoch
        )
        return order, np.cumsum(self._sizes[order])

    def _at(self, epoch, position):
        """The records at positions of the epochs' sequences."""
        index = np.empty(len(position), np.int64)
        for e in np.unique(epoch):
            mine = epoch == e
            order, ends = self._shards(int(e))
            k = np.searchsorted(ends, position[mine], "right")
            before = ends[k] - self._sizes[order[k]]
            index[mine] = self._firsts[order[k]] + position[mine] - before
        return index
