"""Keyed random bits and permutations, the same with any version of NumPy."""

import functools

import numpy as np

_ROUNDS = 6
_TABLE_UNTIL = 2**16  # positions of a permutation that is kept whole: 512 KiB

# SplitMix64: what is added before each mixing and what mixing multiplies by. The start
# is the first digits of pi.
_START, _GOLDEN = 0x243F6A8885A308D3, 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


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


def permute_each(positions: np.ndarray, lengths: np.ndarray, *keys) -> np.ndarray:
    """`permute` with a length and keys of its own for every row.

    Args:
      positions: [n] integer, each in [0, its length).
      lengths: [n] integer, below 2^53.
      *keys: integers, or arrays [n] of them.

    Returns:
      [n] int64: what `permute` says row by row.
    """
    start = hash_bits(lengths, *keys)
    states = []
    with np.errstate(over="ignore"):
        for round_number in range(_ROUNDS):
            key = _mix(start + np.uint64(_GOLDEN) + np.uint64(round_number))
            states.append(hash_bits(key) + np.uint64(_GOLDEN))
    num_bits = np.frexp(np.maximum(lengths - 1, 1).astype(float))[1]
    half = np.maximum((num_bits + 1) // 2, 1).astype(np.uint64)
    return _rounds(_uint64(positions), _uint64(lengths), half, states)


def _walk(values: np.ndarray, length: int, *keys: int) -> np.ndarray:
    """`permute` of uint64 positions, which it overwrites."""
    half = max(1, (max(length - 1, 1).bit_length() + 1) // 2)
    states = _round_states(int(length), *map(int, keys))
    return _rounds(values, np.uint64([length]), np.uint64([half]), states)


def _rounds(values, lengths, half, states):
    """Feistel rounds until the values are below the lengths.

    What is not of the values is [n], or [1] for all rows.
    """
    todo = np.arange(len(values))
    own = slice(None)
    while len(todo):
        if len(half) > 1:
            own = todo
        bits = half[own]
        low = (np.uint64(1) << bits) - np.uint64(1)
        left, right = values[todo] >> bits, values[todo] & low
        for state in states:  # left ^= hash_bits(the round's key, right)
            left, right = right, left ^ (_mix(state[own] + right) & low)
        values[todo] = (left << bits) | right
        todo = todo[values[todo] >= lengths[own]]
    return values.astype(np.int64)
