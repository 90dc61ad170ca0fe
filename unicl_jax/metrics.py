"""What a run reports: the console, `metrics.jsonl`, TensorBoard event files."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from unicl_jax import storage

_FLUSH_SECONDS = 60  # between writes of events to disk


class Metrics:
    """Writes scalars; on all processes but the first it does nothing.

    `metrics.jsonl` has one object a line with `step` and the scalars of that step:
    training ones by their bare names, evaluations as `eval/<task>_top1`. After a resume
    the lines of what is run again are dropped first, so that the file reads as if
    nothing had happened.
    """

    def __init__(
        self,
        workdir: Path,
        first_step: int,
        active: bool,
        say: Callable[[str], None] = print,
    ):
        """Opens the files.

        Args:
          workdir: of the run.
          first_step: updates made before; later steps will be written again, and so
            will the evaluation of this one.
          active: whether this process writes.
          say: where a line goes that says that something could not be written.
        """
        self._active, self._say, self._is_failing = active, say, False
        self._file = self._board = None
        if not active:
            return
        self._path = workdir / "metrics.jsonl"

        def is_kept(row):
            is_evaluation = any(k.startswith("eval/") for k in row)
            return row["step"] < first_step + (not is_evaluation)

        with self._trying():
            if self._path.exists():
                of_steps_before(self._path, is_kept)
            self._file = storage.open_log(self._path)
            self._board = _Board(workdir / "tensorboard", first_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one step's scalars to both files.

        Args:
          step: how many updates were made.
          scalars: finite or not; JSON gets null for what it cannot say.
        """
        values = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        if self._file is not None:
            with self._trying():
                self._file.write(json.dumps({"step": step, **values}) + "\n")
                self._file.flush()  # what fails stays in its buffer for the next time
        if self._board is not None:
            with self._trying():
                self._board.write(step, scalars)

    def sync(self) -> None:
        """Has all that was written be there before a save is."""
        with self._trying():
            storage.sync(self._file)
        if self._board is not None:
            with self._trying():
                self._board.sync()

    def close(self) -> None:
        """Closes both files."""
        for file in (self._file, self._board):
            if file is not None:
                with self._trying():
                    file.close()
        self._file = self._board = None

    @contextlib.contextmanager
    def _trying(self):
        """What a full disk refuses is said once; a run is worth more than its curve."""
        try:
            yield
        except OSError as error:
            if not self._is_failing:
                self._is_failing = True
                self._say(
                    f'metrics cannot be written to "{self._path.parent}" '
                    f"({error.strerror}): training goes on, lines may be missing"
                )


class _Board:
    """Event files for TensorBoard.

    Written from the main thread: tensorboardX's own writer has one of its own, which
    dies of a full disk, and whose queue then blocks the run.
    """

    def __init__(self, directory, first_step):
        # Imported here: where PyTorch is installed, it imports that too.
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._folder = storage.LocalFolder(directory)
        self._event, self._scalar = event_pb2.Event, summary.scalar
        self._writer = event_file_writer.EventsWriter(f"{self._folder.path}/events")
        # TensorBoard forgets what earlier starts wrote of these steps.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        for more in (dict(file_version="brain.Event:2"), dict(session_log=start)):
            self._writer.write_event(self._event(step=first_step, **more))
        self._flushed = time.monotonic()

    def write(self, step, scalars):
        for key, value in scalars.items():
            summary, now = self._scalar(key, value), time.time()
            event = self._event(step=step, wall_time=now, summary=summary)
            self._writer.write_event(event)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flushed = time.monotonic()
            self._writer.flush()
            self._folder.copy()

    def sync(self):
        if self._folder.is_copied:
            self._writer.flush()
            self._folder.copy()

    def close(self):
        self._writer.close()
        self._folder.close()


def of_steps_before(path: Path, is_kept: Callable[[dict], bool]) -> None:
    """Drops lines of a JSONL file, at once: a kill leaves the old file or the new one.

    Args:
      path: of the file.
      is_kept: of an object; lines that hold none, which a kill cut off, are dropped.
    """

    def is_kept_line(line):
        try:
            return is_kept(json.loads(line))
        except (ValueError, LookupError, TypeError, AttributeError):
            return False

    lines = [x for x in storage.read_text(path).splitlines() if x]
    storage.write_text(path, "".join(f"{x}\n" for x in lines if is_kept_line(x)))


def read(workdir: Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`, in order; cut-off ones are left out."""
    lines = storage.read_text(workdir / "metrics.jsonl").splitlines()
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class StepTimer:
    """Where the time between two log lines went; evaluation and saving are left out."""

    def __init__(self, step: int):
        """Starts the clock.

        Args:
          step: how many were made before.
        """
        self.restart(step)

    def restart(self, step: int) -> None:
        """Forgets what was counted: after compiling, evaluating or saving.

        Args:
          step: the last one that is done.
        """
        self._start, self._waited, self._step = time.perf_counter(), 0.0, step

    def timed(self, batches: Iterator) -> Iterator:
        """Gives the batches on, counting the wait for each."""
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - start
            yield batch

    def lap(self, step: int, batch_size: int) -> dict[str, float]:
        """What was counted since the last lap, or {} if no step was.

        Args:
          step: the last one that is done; later ones may be on their way.
          batch_size: global.

        Returns:
          `step_seconds`, `data_wait` (fraction of it) and `images_per_second`.
        """
        steps = step - self._step
        if not steps:
            return {}
        seconds = max(time.perf_counter() - self._start, 1e-9)
        scalars = {
            "step_seconds": seconds / steps,
            "data_wait": self._waited / seconds,
            "images_per_second": steps * batch_size / seconds,
        }
        self.restart(step)
        return scalars


def live_line(console: Console) -> Progress:
    """A line of a terminal: how much is done, a bar, and a task's `text`."""
    return Progress(
        TextColumn("{task.completed}/{task.total}"),  # 80 columns are few
        BarColumn(bar_width=10),
        TextColumn("{task.fields[text]}"),
        console=console,
        transient=True,
    )


class ConsoleProgress:
    """One live line on a terminal; elsewhere a plain line now and then.

    Off a terminal (a log file, a cluster's console) it prints about 20 lines a run.
    """

    def __init__(self, total_steps: int, first_step: int, active: bool = True):
        """Starts the line.

        Args:
          total_steps: of the run.
          first_step: where this start goes on.
          active: whether this process prints.
        """
        self.console = Console(quiet=not active, highlight=False, soft_wrap=True)
        self._total, self._printed = total_steps, first_step
        self._every = max(1, total_steps // 20)
        self._live = None
        if self.console.is_terminal and active:
            self._live = live_line(self.console)
            self._task = self._live.add_task("", total=total_steps, text="starting")
            self._live.update(self._task, completed=first_step)
            self._live.start()

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Shows where the run is.

        Args:
          step: updates made.
          scalars: `loss`, `images_per_second`, `step_seconds`; `excess` if it is there.
        """
        left = clock((self._total - step) * scalars["step_seconds"])
        excess = f"excess {scalars['excess']:.3f}  " if "excess" in scalars else ""
        text = (
            f"loss {scalars['loss']:.3f}  {excess}"
            f"{scalars['images_per_second']:,.0f} images/s  ETA {left}"
        )
        if self._live:
            self._live.update(self._task, completed=step, text=text)
        elif step - self._printed >= self._every:
            self._printed = step
            self.console.print(f"step {step}/{self._total}  {text}")

    def status(self, text: str) -> None:
        """Shows what the run is at, where there is a live line.

        Args:
          text: until the next `update`.
        """
        if self._live:
            self._live.update(self._task, text=text)

    def say(self, *things) -> None:
        """Prints above the line."""
        # Names may hold brackets, which would be taken for styles.
        self.console.print(*things, markup=False)

    def close(self) -> None:
        """Takes the live line away."""
        if self._live:
            self._live.stop()
            self._live = None


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"
