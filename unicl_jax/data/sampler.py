"""Which records make which batch: a pure function of (seed, step).

Nothing of the sampler is saved in a checkpoint but the step; the order is the same on
any number of processes, and stays the same with any version of NumPy, whose random
streams may change.
"""

import zlib
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from unicl_jax.data.permutation import hash_bits, permute, permute_each
from unicl_jax.data.windows import WindowedOrder, of_lane
from unicl_jax.errors import InputError, choose


class SourceInfo(NamedTuple):
    """What the sampler needs to know of a source."""

    name: str
    kind: str
    length: int
    weight: float = 1.0
    shard_sizes: Sequence[int] = ()  # records of each; a shard's lie side by side


class Plan(NamedTuple):
    """The rows of one global batch, in order; arrays of length B."""

    source: np.ndarray  # which source, int64
    index: np.ndarray  # which of its records, int64
    seed: np.ndarray  # uint32: of its crop, flip, prompt or caption


class Sampler:
    """The order of records: epochs of each source, mixed by exact counts.

    Every source is walked in its own random order, each record once an epoch. The
    number of rows a source has in a batch is its share of the batch, rounded so that
    after every step its total is within one row of the exact share: there is no
    sampling noise in the mixture.

    The batch is made of lanes, equal runs of its rows, and all that holds of each lane,
    too. With a window, the lanes walk a source that lies in shards as `windows` says;
    else its order is one permutation of all its records.

    Attributes:
      sources: as given.
      batch_size: B.
      lanes: L.
      shares: fraction of the batch, by source; they sum to 1.
      windowed: the orders of sources that are read window by window, by source number.
    """

    def __init__(
        self,
        sources: Sequence[SourceInfo],
        batch_size: int,
        mixture: str,
        seed: int,
        lanes: int = 1,
        window: int = 0,
    ):
        """Sets the shares.

        Args:
          sources: at least one.
          batch_size: global, > 0.
          mixture: a key of MIXTURES.
          seed: of the whole order.
          lanes: lane l has the rows [l B / L, (l + 1) B / L) of every batch.
          window: records that a lane mixes; 0: all records of a source are mixed.

        Raises:
          InputError: if the mixture does not fit the sources, lanes do not divide the
            batch, or a source would get less than one row a batch.
        """
        self.sources, self.batch_size, self._seed = tuple(sources), batch_size, seed
        self.lanes = lanes
        if batch_size % lanes:
            raise InputError(
                f"batch_size must be divisible by data.lanes: got {batch_size} and "
                f"{lanes}."
            )
        shares = choose(MIXTURES, mixture, "data.mixture")(self.sources)
        self.shares = tuple(Fraction(s) / sum(shares) for s in shares)
        for source, share in zip(self.sources, self.shares, strict=True):
            if share * batch_size < 1:
                raise InputError(
                    "every source must get at least one row a batch: "
                    f'"{source.name}" has a share of {float(share):.2g} of batch_size '
                    f"{batch_size}; raise its weight or the batch size."
                )
        self._side_by_side = self._arranged()
        self._check_lanes()
        self.windowed = {
            k: WindowedOrder(source.name, source.shard_sizes, lanes, window, seed)
            for k, source in enumerate(self.sources)
            if window and len(source.shard_sizes)
        }

    def _arranged(self):
        """The sources, as a batch's rows are laid side by side to be rounded."""
        # Kind by kind, so that rounding never moves a row from one kind to the other.
        kinds = dict.fromkeys(source.kind for source in self.sources)
        order = []
        for kind in kinds:
            own = [k for k, source in enumerate(self.sources) if source.kind == kind]
            if self.lanes > 1:  # small ones where `_check_lanes` asks least: outside
                own.sort(key=lambda k: self.shares[k])
                own = own[::2] + own[1::2][::-1]
            order += own
        return order

    def _check_lanes(self):
        """With a whole row between the edges of a source, it never loses one."""
        size, reached = self.batch_size // self.lanes, Fraction(0)
        for k in self._side_by_side:
            start, reached = reached, reached + size * self.shares[k]
            if reached // 1 < -(-start // 1):
                raise InputError(
                    "sources must get about a row a batch in each of data.lanes: "
                    f'"{self.sources[k].name}" has a share of '
                    f"{float(self.shares[k]):.2g} of {size} rows; raise its weight or "
                    "the batch size, or set fewer data.lanes."
                )

    def drawn(self, step: int) -> list[int]:
        """How many rows of each source the batches before `step` hold."""
        return [stop - start for start, stop in self._edges(step)]

    def _edges(self, step):
        """The rows before `step`, laid side by side: from where to where a source's."""
        edges, exact, reached = [(0, 0)] * len(self.shares), Fraction(0), 0
        for k in self._side_by_side:
            exact += step * self.batch_size * self.shares[k]
            edge = (2 * exact.numerator + exact.denominator) // (2 * exact.denominator)
            edges[k], reached = (reached, edge), edge
        return edges

    def drawn_by_lane(self, step: int) -> np.ndarray:
        """As `drawn`, [sources, L]: the rows so laid are dealt out to the lanes."""
        lane = np.arange(self.lanes)
        return np.array(
            [
                of_lane(stop, lane, self.lanes) - of_lane(start, lane, self.lanes)
                for start, stop in self._edges(step)
            ]
        )

    def epochs(self, step: int) -> dict[str, float]:
        """Epochs of each source seen before `step`."""
        return {
            source.name: n / source.length
            for source, n in zip(self.sources, self.drawn(step), strict=True)
        }

    def most_rows(self) -> list[int]:
        """The most rows a batch can hold of each source."""
        return [int(-(-share * self.batch_size // 1)) + 1 for share in self.shares]

    def plan(self, step: int) -> Plan:
        """Says which records make the batch of a step.

        Args:
          step: >= 0.

        Returns:
          The rows; in each lane the sources are shuffled among each other.
        """
        sources, indices, lanes = [], [], []
        before, after = self.drawn_by_lane(step), self.drawn_by_lane(step + 1)
        for s, counts in enumerate(after - before):
            lane = np.repeat(np.arange(self.lanes), counts)
            start = np.cumsum(counts) - counts  # of a lane's rows among these
            number = np.arange(len(lane)) + np.repeat(before[s] - start, counts)
            if s in self.windowed:
                indices.append(self.windowed[s].indices(lane, number))
            else:
                indices.append(self._anywhere(s, number * self.lanes + lane))
            sources.append(np.full(len(lane), s))
            lanes.append(lane)
        by_lane = np.argsort(np.concatenate(lanes), kind="stable")
        order = by_lane[self._shuffled(step)]
        seeds = hash_bits(self._seed, 1, step, np.arange(self.batch_size))
        return Plan(
            np.concatenate(sources)[order],
            np.concatenate(indices)[order],
            (seeds >> np.uint64(32)).astype(np.uint32),
        )

    def _anywhere(self, s, position):
        """The records of a source at positions of its epochs, one after the other."""
        source = self.sources[s]
        index = np.empty(len(position), np.int64)
        epoch = position // source.length
        for e in np.unique(epoch):
            at = epoch == e
            name_key = zlib.crc32(source.name.encode())
            index[at] = permute(
                position[at] % source.length, source.length, self._seed, name_key, e
            )
        return index

    def _shuffled(self, step):
        """[B]: the rows' order, which leaves each lane's where they are."""
        size = self.batch_size // self.lanes
        if self.lanes == 1:
            return permute(np.arange(size), size, self._seed, step)
        lane, row = np.divmod(np.arange(self.batch_size), size)
        sizes = np.full(self.batch_size, size)
        return lane * size + permute_each(row, sizes, self._seed, step, lane)


def _proportional(sources):
    return [source.length * Fraction(str(source.weight)) for source in sources]


def _weights(sources):
    return [Fraction(str(source.weight)) for source in sources]


def _balanced(sources):
    """Half image-label, half image-text; within a kind by size times weight."""
    sizes = _proportional(sources)
    totals = {}
    for source, size in zip(sources, sizes, strict=True):
        totals[source.kind] = totals.get(source.kind, 0) + size
    if len(totals) < 2:
        raise InputError(
            'data.mixture "balanced" needs image-label and image-text sources: all are '
            f'{next(iter(totals))}; use "proportional".'
        )
    return [
        size / totals[source.kind] / 2
        for source, size in zip(sources, sizes, strict=True)
    ]


MIXTURES = {
    "balanced": _balanced,  # the paper's section 4.2.1
    "proportional": _proportional,  # all records alike: its section 4.2.2
    "weights": _weights,  # each source's `weight` is its share, whatever its size
}
