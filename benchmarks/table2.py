"""The paper's Table 2 in small: cross-entropy, SupCon and UniCL from scratch.

python -m benchmarks.table2 --runs=runs/table2

Each with the same tower, data (the quick start's labels alone), steps and batch; SupCon
trains its tower and then a linear classifier for as many steps each. Runs go on where
they were stopped; those that are done are not run again. The paper's numbers are of
another tower, data and length: they stand beside for the order, not the values.
"""

import argparse
import datetime
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import harness
from unicl_jax import metrics

# Of each row: its recipe, and the paper's Swin-T on ImageNet-1k without MixUp or CutMix
# (CE from its text, UniCL's from its release; SupCon's is in neither).
ROWS = {
    "cross-entropy": ("configs/baselines/cross_entropy.py", 76.8),
    "SupCon, two stages": ("configs/baselines/supcon.py:two_stage", None),
    "UniCL": ("configs/quickstart.py:labels", 79.9),
}
TASKS = {
    "fashion_mnist": "Fashion-MNIST, 10 ways",
    "twemoji_subgroups": "subgroups, 99 ways",
}


def measure(options):
    """Every row with every seed."""
    options.runs.mkdir(parents=True, exist_ok=True)
    return {
        "command": harness.command("benchmarks.table2"),
        "date": str(datetime.date.today()),
        "versions": harness.versions(),
        "machine": harness.machine(),
        "steps": options.steps,
        "rows": {
            row: [_run(options, row, seed) for seed in range(options.seeds)]
            for row in ROWS
        },
    }


def _run(options, row, seed):
    """Trains one row with one seed; its top-1 by task."""
    recipe = ROWS[row][0]
    name = recipe.removeprefix("configs/").replace("/", "_").replace(".py", "")
    workdir = options.runs / f"{name.replace(':', '_')}-{options.steps}-{seed}"
    last = workdir / "stage_2" if recipe.endswith("two_stage") else workdir
    if not (found := _scores(last, options.steps)):
        start = time.perf_counter()
        arguments = [
            *(f"--config={recipe}", f"--workdir={workdir}", f"--config.seed={seed}"),
            f"--config.total_steps={options.steps}",
            f"--config.optimizer.warmup_steps={max(1, options.steps // 14)}",
        ]
        with open(f"{workdir}.log", "a") as log:
            subprocess.run(
                [sys.executable, "-m", "unicl_jax.main", *arguments],
                stdout=log,
                stderr=log,
                check=True,
            )
        harness.say(f"{workdir.name}: {time.perf_counter() - start:.0f} s")
        found = _scores(last, options.steps)
    return found


def _scores(workdir, steps):
    """Of a run that was evaluated at its last step; {} for another."""
    if not (workdir / "metrics.jsonl").is_file():
        return {}
    keys = {task: f"eval/{task}_top1" for task in TASKS}
    for line in reversed(metrics.read(workdir)):
        if line["step"] == steps and all(key in line for key in keys.values()):
            return {task: line[key] for task, key in keys.items()}
    return {}


def rows_of(found):
    """The table of one JSON file as rows of text."""
    rows = [["objective", *TASKS.values(), "the paper's, ImageNet-1k"]]
    for row, runs in found["rows"].items():
        cells = []
        for task in TASKS:
            tops = [100 * run[task] for run in runs]
            spread = f" ± {statistics.stdev(tops):.1f}" if len(tops) > 1 else ""
            cells.append(f"{statistics.mean(tops):.1f}{spread}")
        paper = ROWS[row][1]
        rows.append([row, *cells, "" if paper is None else f"{paper:.1f}"])
    return rows


def title(found):
    """One line: what was measured, on what."""
    seeds = len(next(iter(found["rows"].values())))
    return (
        f"{found['steps']} steps on the quick start's labels, {seeds} "
        f"seed{'s' * (seeds > 1)}: top-1 in percent; {harness.where(found['machine'])}"
    )


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/table2"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--out", type=Path, help="JSON; default in benchmarks/results")
    parser.add_argument("--markdown", action="store_true", help="print all results")
    return parser.parse_args(argv)


def main(argv):
    """Trains, prints a table and writes JSON; or prints what was found before."""
    harness.report("table2", _options(argv), measure, title, rows_of)


if __name__ == "__main__":
    main(sys.argv[1:])
