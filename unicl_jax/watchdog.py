"""A thread that ends a process which no longer gets on, and says where it stood."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from unicl_jax import storage
from unicl_jax.exit_codes import HUNG

COMPILING = 4  # times as patient
_WRITING = 10  # seconds that a report may take: the file system may be what hangs


class Watchdog:
    """Waits for signs of life; without them it reports and ends the process.

    A main thread that waits in C for a device, for other processes or for a disk cannot
    be interrupted, so there is no way to save first: what is lost is what a kill would
    lose. The report has the stacks of all of Python's threads.
    """

    def __init__(
        self,
        workdir: Path,
        minutes: float,
        process_index: int = 0,
        linger: float = 0.0,
        end: Callable[[int], None] = os._exit,
    ):
        """Starts the thread.

        Args:
          workdir: of the run; the report is `hang_process_<i>.txt` there.
          minutes: without a sign of life; 0: no watchdog.
          process_index: of this process.
          linger: seconds between report and end, for the other processes to report
            themselves: they are ended when one is gone.
          end: ends the process.
        """
        self._path = workdir / f"hang_process_{process_index}.txt"
        self._name = f"process {process_index}"
        self._limit, self._linger, self._end = 60 * minutes, linger, end
        self._closed = threading.Event()
        self.at("starting")
        if minutes:
            threading.Thread(target=self._watch, daemon=True).start()

    def at(self, what: str, patience: float = 1.0) -> None:
        """A sign of life.

        Args:
          what: the process is at from now on.
          patience: how many times the usual it may take.
        """
        self._last = time.monotonic(), what, patience

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()

    def _watch(self):
        while not self._closed.wait(min(5.0, self._limit / 10)):
            since, what, patience = self._last
            quiet = time.monotonic() - since
            if quiet < self._limit * patience:
                continue
            said = (
                f"{self._name} hangs: {quiet:.0f} s at {what} without getting on "
                f"(hang_minutes: {self._limit / 60:g}). Threads of Python:"
            )
            sys.stderr.write(f"error: {said}\n")
            sys.stderr.flush()
            _dump(sys.__stderr__)
            writer = threading.Thread(target=self._write, args=(said,), daemon=True)
            writer.start()
            writer.join(_WRITING)
            time.sleep(self._linger)
            self._end(HUNG)
            return

    def _write(self, said):
        try:
            with storage.written_whole(self._path) as file:
                file.write(f"{time.strftime('%F %T %z')} {said}\n\n")
                file.flush()
                _dump(file)
        except OSError as error:
            sys.stderr.write(f"{self._path} cannot be written: {error}\n")


def _dump(file):
    faulthandler.dump_traceback(file, all_threads=True)
