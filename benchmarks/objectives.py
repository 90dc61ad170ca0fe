"""Trains every objective on the quick start's data for as many steps, and compares.

python -m benchmarks.objectives --runs=runs/objectives

Runs that are done already are not run again: stop it and go on when you like.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import harness
from unicl_jax import metrics

# Of each row: the recipe, and what follows it, started from the recipe's weights.
ROWS = {
    "unicl": ("configs/quickstart.py",),
    "one_way": ("configs/baselines/one_way.py",),
    "clip": ("configs/baselines/clip.py",),
    "siglip": ("configs/baselines/siglip.py",),
    "multitask": ("configs/baselines/multitask.py",),
    "uniclip": ("configs/baselines/uniclip.py",),
    "unicl, labels alone": ("configs/quickstart.py:labels",),
    "linear_text": ("configs/baselines/linear_text.py",),
    "cross_entropy": ("configs/baselines/cross_entropy.py",),
    "supcon": (
        "configs/baselines/supcon.py",
        "configs/baselines/supcon.py:linear",
    ),
}
TASKS = {
    "twemoji_names": "names, 1,898 ways",
    "twemoji_subgroups": "subgroups, 99 ways",
    "fashion_mnist": "Fashion-MNIST, 10 ways",
}


def measure(options):
    """Every row with every seed."""
    options.runs.mkdir(parents=True, exist_ok=True)
    found = {
        "command": harness.command("benchmarks.objectives"),
        "date": str(datetime.date.today()),
        "versions": harness.versions(),
        "machine": harness.machine(),
        "steps": options.steps,
        "rows": {},
    }
    for row in options.rows:
        found["rows"][row] = [_run(options, row, seed) for seed in range(options.seeds)]
    return found


def _run(options, row, seed):
    """Trains one row with one seed, stage after stage; scores of the last one."""
    before = None
    for stage, recipe in enumerate(ROWS[row]):
        name = row.replace(", ", "_").replace(" ", "_")
        workdir = options.runs / f"{name}-{stage}-{seed}"
        arguments = [
            f"--config={recipe}",
            f"--workdir={workdir}",
            f"--config.seed={seed}",
            f"--config.total_steps={options.steps}",
            f"--config.evaluate_every_steps={options.steps}",
            f"--config.checkpoint_every_steps={options.steps}",
        ]
        if before is not None:
            arguments.append(f"--config.init_from={before}")
        if not _is_done(workdir, options.steps):
            start = time.perf_counter()
            with open(options.runs / f"{workdir.name}.log", "w") as log:
                subprocess.run(
                    [sys.executable, "-m", "unicl_jax.main", *arguments],
                    stdout=log,
                    stderr=log,
                    check=True,
                )
            harness.say(f"{workdir.name}: {time.perf_counter() - start:.0f} s")
        lines = metrics.read(workdir)
        before = workdir
    return {
        key: [line[f"eval/{key}_top{k}"] for k in (1, 5)]
        for line in lines
        for key in TASKS
        if f"eval/{key}_top1" in line
    }


def _is_done(workdir, steps):
    """Whether a run of so many steps was evaluated at its last one."""
    if not (workdir / "metrics.jsonl").exists():
        return False
    lines = metrics.read(workdir)
    tasks = json.loads((workdir / "config.json").read_text())["evaluations"]
    return any(
        line["step"] == steps
        and all(f"eval/{task}_top1" in line for task in tasks)
        and (tasks or "loss" in line)
        for line in lines
    )


def rows_of(found):
    """The table of one JSON file as rows of text."""
    rows = [["objective", *TASKS.values()]]
    for row, runs in found["rows"].items():
        cells = [row]
        for task in TASKS:
            tops = [run.get(task) for run in runs]
            if None in tops:
                cells.append("")
                continue
            cells.append(
                " / ".join(
                    f"{100 * statistics.mean(top):.1f} "
                    f"± {100 * (statistics.stdev(top) if len(top) > 1 else 0):.1f}"
                    for top in zip(*tops, strict=True)
                )
            )
        rows.append(cells)
    return rows


def title(found):
    """One line: what was measured, on what."""
    seeds = len(next(iter(found["rows"].values())))
    machine = found["machine"]
    return (
        f"{found['steps']} steps of the quick start, {seeds} seeds: top-1 / top-5 in "
        "percent, mean and standard deviation; "
        f"{machine['cpu']}, {machine['cores']} cores"
    )


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--rows", default=";".join(ROWS), help='as "clip;siglip"')
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--out", type=Path, help="JSON; default in benchmarks/results")
    parser.add_argument("--markdown", action="store_true", help="print all results")
    options = parser.parse_args(argv)
    options.rows = options.rows.split(";")
    if wrong := [row for row in options.rows if row not in ROWS]:
        parser.error(f"--rows must be some of {'; '.join(ROWS)}: got {wrong}")
    return options


def main(argv):
    """Trains, prints a table and writes JSON; or prints what was found before."""
    harness.report("objectives", _options(argv), measure, title, rows_of)


if __name__ == "__main__":
    main(sys.argv[1:])
