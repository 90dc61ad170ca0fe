"""Kills a run hundreds of times: `python -m benchmarks.faults --kills=200`.

The runs of `tests/fault_test.py`, more of them, on one process and on several. Writes
`results/faults_cpu.json`: each kill, and whether the run ended in the bits of the one
that nothing killed.
"""

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks import harness

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def campaign(kills, processes, seed):
    """One campaign's figures."""
    import tiny_run
    from kills import EVERY, Campaign

    folder = Path(tempfile.mkdtemp())
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    try:
        made = Campaign(tiny_run.write(folder), kills, seed, processes)
        start = time.monotonic()
        made.run_uninterrupted()
        alone = time.monotonic() - start
        try:
            made.run_killed()
        except RuntimeError as error:  # what was seen until then is kept
            return summary(made.kills, made.seconds_to_first_step) | dict(
                processes=processes, failed=str(error), each=made.kills
            )
        a, b = (tiny_run.saved(w, made.steps) for w in (made.workdir, folder / "whole"))
        same = a.keys() == b.keys() and all(
            a[name].tobytes() == b[name].tobytes() for name in a
        )
        rows = tiny_run.rows(made.workdir)
        steps = [row["step"] for row in rows if "loss" in row]
        return summary(made.kills, made.seconds_to_first_step) | dict(
            processes=processes,
            steps=made.steps,
            steps_between_checkpoints=EVERY,
            seed=seed,
            bit_equal=same,
            each_step_once=steps == list(range(1, made.steps + 1)),
            metrics_equal=rows == tiny_run.rows(folder / "whole"),
            seconds_uninterrupted=round(alone, 1),
            seconds=round(time.monotonic() - start - alone, 1),
            each=made.kills,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def summary(kills, to_first_step):
    """Counts and quantiles of a campaign's kills."""

    def quantiles(values):
        found = np.quantile(values or [0.0], [0.5, 0.9, 1.0])
        return dict(zip(("median", "p90", "max"), found.round(2).tolist(), strict=True))

    by_kind = Counter(
        f"{kill['signal']}, aimed at {kill['aimed_at']}" for kill in kills
    )
    killed = [k["steps_lost"] for k in kills if k["signal"] == "SIGKILL"]
    asked = [k for k in kills if k["signal"] == "SIGTERM" and k["aimed_at"] != "start"]
    return dict(
        kills=len(kills),
        by_kind=dict(sorted(by_kind.items())),
        half_written_saves=sum(kill["half_written"] for kill in kills),
        exit_codes=dict(Counter(str(kill["exit_code"]) for kill in kills)),
        unexpected_exit_codes=sum(not kill["is_fine"] for kill in kills),
        steps_lost_to_sigkill=quantiles(killed),
        steps_lost_to_sigterm=quantiles([k["steps_lost"] for k in asked]),
        seconds_from_sigterm_to_end=quantiles([k["seconds_to_end"] for k in asked]),
        seconds_from_start_to_first_step=quantiles(to_first_step),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills_of_two", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    given = f"--kills={args.kills} --kills_of_two={args.kills_of_two}"
    result = dict(
        date=str(datetime.date.today()),
        command=f"python -m benchmarks.faults {given} --seed={args.seed}",
        machine=harness.machine(),
        versions=harness.versions(),
        campaigns=[],
    )
    for kills, processes in ((args.kills, 1), (args.kills_of_two, 2)):
        if kills:
            result["campaigns"].append(campaign(kills, processes, args.seed))
            # After each: the first is worth having without the second.
            file = ROOT / "benchmarks" / "results" / "faults_cpu.json"
            file.write_text(json.dumps(result, indent=1) + "\n")
            said = {k: v for k, v in result["campaigns"][-1].items() if k != "each"}
            harness.say(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
