"""Which records make which batch: a pure function of (seed, step).

Nothing of the sampler is saved in a checkpoint but the step; the order is the same on
any number of processes, and stays the same with any version of NumPy, whose random
streams may change.
"""

import functools
import zlib
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from unicl_jax.errors import InputError, choose

_ROUNDS = 6
_TABLE_UNTIL = 2**16  # positions of a permutation that is kept whole: 512 KiB

# SplitMix64: what is added before each mixing and what mixing multiplies by. The start
# is the first digits of pi.
_START, _GOLDEN = 0x243F6A8885A308D3, 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


class SourceInfo(NamedTuple):
    """What the sampler needs to know of a source."""

    name: str
    kind: str
    length: int
    weight: float = 1.0


class Plan(NamedTuple):
    """The rows of one global batch, in order; arrays of length B."""

    source: np.ndarray  # which source, int64
    index: np.ndarray  # which of its records, int64
    seed: np.ndarray  # uint32: of its crop, flip, prompt or caption


def hash_bits(*keys) -> np.ndarray:
    """64 well-mixed bits from integers, element by element.

    Args:
      *keys: integers or arrays of them, broadcast together; their order matters.

    Returns:
      uint64, of the broadcast shape.

    Source: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014), once a key.
    """
    state = np.uint64(_START)
    with np.errstate(over="ignore"):
        for key in keys:
            state = _mix(state + np.uint64(_GOLDEN) + _uint64(key))
    return state


def _mix(state):
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_FIRST)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_SECOND)
    return state ^ (state >> np.uint64(31))


def _uint64(key):
    return np.asarray(key).astype(np.int64).astype(np.uint64)


def absorb(state: int, key: int) -> int:
    """One key of `hash_bits`, in Python's integers: for one number they are faster."""
    state = (state + _GOLDEN + key) & _MASK
    state = ((state ^ (state >> 30)) * _FIRST) & _MASK
    state = ((state ^ (state >> 27)) * _SECOND) & _MASK
    return state ^ (state >> 31)


@functools.lru_cache(maxsize=64)
def _round_states(length: int, *keys: int) -> list[np.ndarray]:
    """What each round of `permute` has of `hash_bits` before it sees a position."""
    states = []
    for round_number in range(_ROUNDS):
        key = functools.reduce(absorb, (length, *keys, round_number), _START)
        state = absorb(_START, key) + _GOLDEN
        states.append(np.array([state & _MASK], np.uint64))
    return states


def permute(positions: np.ndarray, length: int, *keys: int) -> np.ndarray:
    """Where a keyed random permutation of `range(length)` sends each position.

    A Feistel network on the smallest even number of bits that covers the range, walked
    until it lands inside: a source of a billion records needs no table, and short ones
    have theirs from the same walk.

    Args:
      positions: [n] integer in [0, length).
      length: how many there are.
      *keys: integers that name the permutation.

    Returns:
      [n] int64 in [0, length); distinct for distinct positions.

    Source: Black and Rogaway, CT-RSA 2002 (cycle walking).
    """
    if length <= _TABLE_UNTIL:
        return _table(int(length), *map(int, keys))[positions]
    return _walk(_uint64(positions), length, *keys)


@functools.lru_cache(maxsize=32)
def _table(length: int, *keys: int) -> np.ndarray:
    """The whole permutation: cheaper than a walk for each batch of a short epoch."""
    return _walk(np.arange(length, dtype=np.uint64), length, *keys)


def _walk(values: np.ndarray, length: int, *keys: int) -> np.ndarray:
    """`permute` of uint64 positions, which it overwrites."""
    half = max(1, (max(length - 1, 1).bit_length() + 1) // 2)
    bits, low = np.uint64(half), np.uint64((1 << half) - 1)
    states = _round_states(int(length), *map(int, keys))
    todo = np.arange(len(values))
    while len(todo):
        left, right = values[todo] >> bits, values[todo] & low
        for state in states:  # left ^= hash_bits(the round's key, right)
            left, right = right, left ^ (_mix(state + right) & low)
        values[todo] = (left << bits) | right
        todo = todo[values[todo] >= length]
    return values.astype(np.int64)


class Sampler:
    """The order of records: epochs of each source, mixed by exact counts.

    Every source is walked in its own random order, each record once an epoch. The
    number of rows a source has in a batch is its share of the batch, rounded so that
    after every step its total is within one row of the exact share: there is no
    sampling noise in the mixture.

    Attributes:
      sources: as given.
      batch_size: B.
      shares: fraction of the batch, by source; they sum to 1.
    """

    def __init__(
        self,
        sources: Sequence[SourceInfo],
        batch_size: int,
        mixture: str,
        seed: int,
    ):
        """Sets the shares.

        Args:
          sources: at least one.
          batch_size: global, > 0.
          mixture: a key of MIXTURES.
          seed: of the whole order.

        Raises:
          InputError: if the mixture does not fit the sources, or a source would get
            less than one row a batch.
        """
        self.sources, self.batch_size, self._seed = tuple(sources), batch_size, seed
        shares = choose(MIXTURES, mixture, "data.mixture")(self.sources)
        self.shares = tuple(Fraction(s) / sum(shares) for s in shares)
        for source, share in zip(self.sources, self.shares, strict=True):
            if share * batch_size < 1:
                raise InputError(
                    "every source must get at least one row a batch: "
                    f'"{source.name}" has a share of {float(share):.2g} of batch_size '
                    f"{batch_size}; raise its weight or the batch size."
                )

    def drawn(self, step: int) -> list[int]:
        """How many rows of each source the batches before `step` hold."""
        # Kind by kind, so that rounding never moves a row from one kind to the other.
        kinds = list(dict.fromkeys(source.kind for source in self.sources))
        order = sorted(
            range(len(self.shares)), key=lambda k: kinds.index(self.sources[k].kind)
        )
        rows, exact, reached = [0] * len(order), Fraction(0), 0
        for k in order:
            exact += step * self.batch_size * self.shares[k]
            edge = (2 * exact.numerator + exact.denominator) // (2 * exact.denominator)
            rows[k], reached = edge - reached, edge
        return rows

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
          The rows, the sources shuffled among each other.
        """
        sources, indices = [], []
        before, after = self.drawn(step), self.drawn(step + 1)
        for s, (source, start, stop) in enumerate(
            zip(self.sources, before, after, strict=True)
        ):
            position = np.arange(start, stop)
            index = np.empty(len(position), np.int64)
            epoch = position // source.length
            for e in np.unique(epoch):
                at = epoch == e
                name_key = zlib.crc32(source.name.encode())
                index[at] = permute(
                    position[at] % source.length, source.length, self._seed, name_key, e
                )
            indices.append(index)
            sources.append(np.full(len(position), s))
        order = permute(np.arange(self.batch_size), self.batch_size, self._seed, step)
        seeds = hash_bits(self._seed, 1, step, np.arange(self.batch_size))
        return Plan(
            np.concatenate(sources)[order],
            np.concatenate(indices)[order],
            (seeds >> np.uint64(32)).astype(np.uint32),
        )


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
