"""When to save by the clock: at a step that all processes agree on."""

import time

import jax
from jax._src import distributed  # its key-value store has no public name


class SaveClock:
    """Says at which steps a save is due, so many minutes after the last one.

    With several processes the first one's clock counts. It announces a step two ahead
    of its own, and the others look for that at every step: one that is done with step n
    waited for step n - 1 of all, so nobody is two steps ahead of the first.
    """

    def __init__(self, minutes: float):
        """Starts the clock.

        Args:
          minutes: between saves; 0: none is ever due.
        """
        self._seconds, self._saves, self._step = 60 * minutes, 0, None
        self._client = None
        if jax.process_count() > 1:
            self._client = distributed.global_state.client
        self.restart()

    def restart(self) -> None:
        """A save was made."""
        self._start = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save now; the same on all processes, each of which asks.

        Args:
          step: the one that was dispatched last; the one before it is done.
        """
        if not self._seconds:
            return False
        is_late = time.monotonic() - self._start >= self._seconds
        if self._client is None:
            return is_late
        if self._step is None:
            key = f"unicl_jax/save/{self._saves}"
            if jax.process_index() == 0:
                if is_late:
                    self._step = step + 2
                    self._client.key_value_set(key, str(self._step))
            else:
                self._step = _look_up(self._client, key)
        if self._step != step:
            return False
        self._saves, self._step = self._saves + 1, None
        return True


def _look_up(client, key):
    try:
        return int(client.key_value_try_get(key))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise
