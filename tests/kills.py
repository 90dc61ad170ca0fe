"""Kills a run, by random moments, and counts what that costs; see fault_test.py."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
LIMIT = 900  # seconds until a start counts as hung
MOMENTS = ("step", "save", "start")  # what a kill is aimed at
SHARES = (0.45, 0.4, 0.15)
EVERY = 3  # steps between checkpoints


class Campaign:
    """One run that is killed, beside one that is not.

    Attributes:
      steps: of each run.
      workdir, uninterrupted: theirs.
      kills: of each kill a dict: what `benchmarks/faults.py` writes down.
    """

    def __init__(self, folder, kills, seed=0, processes=1, steps_a_kill=12):
        """Plans.

        Args:
          folder: where `tiny_run.write` has been.
          kills: how many.
          seed: of the moments.
          processes: of the run; one of them is killed, and then the others, too.
          steps_a_kill: the run is so many times longer than there are kills.
        """
        self.steps = steps_a_kill * (kills + 1)
        self.workdir, self.uninterrupted = folder / "killed", folder / "whole"
        self.kills, self.seconds_to_first_step = [], []
        self._folder, self._number, self._processes = folder, kills, processes
        self._rng = np.random.default_rng(seed)

    def run_uninterrupted(self):
        """The run to compare with, which saves at its end alone."""
        self._finish(self._start(self.uninterrupted, every=self.steps))

    def run_killed(self):
        """Kills and starts again, so often; then lets the run end."""
        for number in range(self._number):
            old, starts = half_written(self.workdir), self._first_steps()
            group = self._start(self.workdir)
            try:
                kill = self._kill(group, old, starts)
                self.kills.append(dict(number=number) | kill)
            finally:
                for process in group:
                    process.kill()
                    process.wait()
        self._finish(self._start(self.workdir, every=self.steps))

    def _kill(self, group, old, starts):
        before, started = newest(self.workdir), time.monotonic()
        aim = str(self._rng.choice(MOMENTS, p=SHARES))
        kind = signal.SIGKILL if self._rng.random() < 0.6 else signal.SIGTERM
        victim = group[int(self._rng.integers(len(group)))]
        fine = {-signal.SIGKILL} if kind == signal.SIGKILL else {128 + kind}
        if aim == "start":
            fine |= {-kind}  # Python was not up yet
            typical = np.median(self.seconds_to_first_step or [2.0])
            time.sleep(self._rng.uniform(0.05, 1.0) * typical)
        else:
            self._wait(group, lambda: self._first_steps() > starts)
            self.seconds_to_first_step.append(time.monotonic() - started)
            if aim == "save":
                self._wait(group, lambda: half_written(self.workdir) - old)
            time.sleep(self._rng.uniform(0, 0.15 if aim == "save" else 0.5))
        sent = time.monotonic()
        victim.send_signal(kind)
        code = victim.wait(LIMIT)
        seconds = time.monotonic() - sent
        for process in group:  # as a launcher would
            if kind == signal.SIGKILL or aim == "start":
                process.kill()
            process.wait(LIMIT)
        kept = newest(self.workdir)
        reached = max(before, last_step(self.workdir))
        return dict(
            signal=kind.name,
            aimed_at=aim,
            # A half-written checkpoint is a save that was met.
            half_written=bool(half_written(self.workdir) - old),
            exit_code=code,
            is_fine=code in fine,
            step=reached,
            newest_checkpoint=kept,
            steps_lost=max(0, reached - kept),
            seconds_to_end=round(seconds, 3),
        )

    def _start(self, workdir, every=EVERY):
        flags = [
            f"--config={self._folder / 'recipe.py'}",
            f"--workdir={workdir}",
            f"--config.total_steps={self.steps}",
            f"--config.checkpoint_every_steps={every}",
            f"--config.evaluate_every_steps={self.steps}",
        ]
        several = [[]]
        if self._processes > 1:
            address = f"--coordinator_address=127.0.0.1:{free_port()}"
            several = [
                [address, f"--num_processes={self._processes}", f"--process_id={i}"]
                for i in range(self._processes)
            ]
        with (workdir.parent / f"{workdir.name}.log").open("a") as log:
            return [
                subprocess.Popen(
                    [sys.executable, "-m", "unicl_jax.main", *flags, *more],
                    env={
                        **os.environ,
                        "JAX_NUM_CPU_DEVICES": "1",
                        "PYTHONPATH": str(ROOT),
                        # Without it, every start would be two.
                        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",
                    },
                    cwd=self._folder,
                    stdout=log,
                    stderr=log,
                )
                for more in several
            ]

    def _first_steps(self):
        """How many starts have come to their first step, by what they say."""
        log = self._folder / f"{self.workdir.name}.log"
        if not log.exists():
            return 0
        return log.read_bytes().count(b"compiled in ")

    def _wait(self, group, is_so):
        """Returns when it is so."""
        deadline = time.monotonic() + LIMIT
        while not is_so():
            for process in group:
                if process.poll() is not None:
                    raise RuntimeError(f"ended by itself: {self._said()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"hung: {self._said()}")
            time.sleep(0.002)

    def _finish(self, group):
        codes = [process.wait(LIMIT) for process in group]
        if any(codes):
            raise RuntimeError(f"exit codes {codes}: {self._said()}")

    def _said(self):
        return "".join(
            path.read_text(errors="replace")[-3000:]
            for path in self._folder.glob("*.log")
        )


def newest(workdir):
    """The step of the newest whole checkpoint, or 0."""
    names = (p.name for p in (workdir / "checkpoints").glob("[0-9]*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def half_written(workdir):
    """The checkpoints that are on their way to the disk, or never got there."""
    found = set()
    for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
        with contextlib.suppress(OSError):  # it is whole by now
            found.add((path.name, path.stat().st_ino))
    return found


def last_step(workdir):
    """The last step of `metrics.jsonl`."""
    try:
        content = (workdir / "metrics.jsonl").read_text()
    except OSError:
        return 0
    steps = []
    for line in content.splitlines()[-2:]:
        if re.match(r'\{"step": \d+.*\}$', line):
            steps.append(json.loads(line)["step"])
    return max(steps, default=0)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
