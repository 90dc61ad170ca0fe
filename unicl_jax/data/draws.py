"""Random numbers of one record: a pure function of its seed, the same everywhere.

They are our own, since NumPy and OpenCV may change their streams between versions.
"""

import math

import numpy as np

from unicl_jax.data.permutation import absorb

_START = 0x452821E638D01377  # pi's digits again, from where `sampler` has not taken
_FLOAT = 2.0**-53
_HALF = np.float32(2.0**-32)


class Draws:
    """A stream of numbers, named by integers."""

    def __init__(self, *keys: int):
        """Starts the stream.

        Args:
          *keys: the record's seed, and what the numbers are for.
        """
        state = _START
        for key in keys:
            state = absorb(state, int(key))
        self._state, self._count = state, 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Returns the next number of [low, high)."""
        self._count += 1
        return low + (high - low) * ((absorb(self._state, self._count) >> 11) * _FLOAT)

    def below(self, end: int) -> int:
        """Returns the next whole number of [0, end)."""
        return min(int(self.uniform() * end), end - 1)

    def normal(self) -> float:
        """Returns the next number of the normal distribution.

        Source: Box and Muller, Annals of Mathematical Statistics 29 (1958).
        """
        radius = math.sqrt(-2 * math.log(1 - self.uniform()))
        return radius * math.cos(2 * math.pi * self.uniform())

    def normals(self, *shape: int) -> np.ndarray:
        """Returns an array of the normal distribution, float32."""
        self._count += 1
        # NumPy promises a generator's bits, if not what is made of them.
        bits = np.random.SFC64(absorb(self._state, self._count))
        count = math.prod(shape)
        pairs = bits.random_raw((count + 1) // 2).view(np.uint32).reshape(2, -1)
        first, second = (pairs + np.float32(0.5)) * _HALF
        radius = np.sqrt(-2 * np.log(first))
        angle = np.float32(2 * math.pi) * second
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return both[:count].reshape(shape)
