"""Requests to stop: Ctrl-C, SIGTERM, a cluster's notice that a machine will go."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Stopped(RuntimeError):
    """Ctrl-C or SIGTERM came; the state was saved. `signal` is its number."""

    def __init__(self, message: str, signal_number: int):
        """Keeps the signal for the exit code."""
        super().__init__(message)
        self.signal = signal_number


class Interrupted(Exception):
    """A signal came during a wait that may last; what is learnt has to be saved."""


class StopRequest:
    """Whether the run is asked to save and stop.

    Until the first step is done there is nothing to save: SIGTERM then ends the process
    at once, in the middle of a compilation, too. Later the run stops where it next
    asks. A second SIGTERM changes nothing: launchers send several. A second Ctrl-C
    interrupts, as Python has it.

    With several processes jax's own notifier holds SIGTERM, so that all of them learn
    of it and stop at the same step.
    """

    def __init__(self):
        """Takes the signals over."""
        self.signal, self._step, self._asked = 0, None, 0
        self._is_waiting, self._old = False, {}
        if jax.process_count() > 1:
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._handle)
        # Python runs a handler when the main thread is back from C, which takes as long
        # as a compilation; what C itself writes to this pipe, a thread reads at once.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._read,), daemon=True).start()

    def _handle(self, number, frame):
        del frame
        if number == signal.SIGINT and (self.signal or self._step is None):
            raise KeyboardInterrupt
        self.signal = self.signal or number
        if self._is_waiting:
            raise Interrupted

    def _listen(self, pipe):
        while came := os.read(pipe, 64):
            if signal.SIGTERM in came and self._step is None:
                print(
                    "stopped before the first step: there was nothing to save.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(128 + signal.SIGTERM)
        os.close(pipe)

    def requested(self, step: int) -> int:
        """The signal that asks for it, or 0; the same on all processes.

        Args:
          step: the last one that is done. All processes ask equally often.
        """
        self._step = step
        self._asked += 1
        # A number of its own: an evaluation asks often within one step.
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
            self._asked
        ):
            self.signal = signal.SIGTERM
        return self.signal

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A wait that a signal ends, by Interrupted: for data that may never come."""
        self._is_waiting = self._step is not None
        try:
            if self.signal and self._is_waiting:
                raise Interrupted
            yield
        finally:
            self._is_waiting = False

    def restore(self) -> None:
        """Gives the signals back."""
        if self._old:
            signal.set_wakeup_fd(self._old_wakeup)
            os.close(self._write)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}
