"""What a run reports: the console, `metrics.jsonl`, TensorBoard event files."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class Metrics:
    """Writes scalars; on all processes but the first it does nothing.

    `metrics.jsonl` has one object a line with `step` and the scalars of that step:
    training ones by their bare names, evaluations as `eval/<task>_top1`. After a resume
    the lines of what is run again are dropped first, so that the file reads as if
    nothing had happened.
    """

    def __init__(self, workdir: Path, first_step: int, active: bool):
        """Opens the files.

        Args:
          workdir: of the run.
          first_step: updates made before; later steps will be written again, and so
            will the evaluation of this one.
          active: whether this process writes.
        """
        self._active = active
        if not active:
            return
        path = workdir / "metrics.jsonl"
        if path.exists():
            lines = [x for x in path.read_text().splitlines() if _kept(x, first_step)]
            temporary = path.with_suffix(".new")
            temporary.write_text("".join(f"{x}\n" for x in lines))
            temporary.replace(path)
        # Imported here: where PyTorch is installed, it imports that too.
        from tensorboardX import SummaryWriter

        self._file = path.open("a")
        self._board = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=first_step + 1
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one step's scalars to both files.

        Args:
          step: how many updates were made.
          scalars: finite or not; JSON gets null for what it cannot say.
        """
        if not self._active:
            return
        values = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for key, value in scalars.items():
            self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Closes both files."""
        if self._active:
            self._file.close()
            self._board.close()


def _kept(line, first_step):
    try:
        row = json.loads(line)
        return row["step"] < first_step + (not any(k.startswith("eval/") for k in row))
    except (ValueError, KeyError, TypeError):
        return False  # a line that a kill cut off


def read(workdir: Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`, in order; cut-off ones are left out."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
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
