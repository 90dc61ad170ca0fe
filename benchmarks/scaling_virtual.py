"""One batch divided ever further on one box: the losses stay, and what dividing costs.

python -m benchmarks.scaling virtual
python -m benchmarks.scaling virtual --layouts=1x1,1x8,1x8:fsdp=8,2x4 --steps=40

A layout is PROCESSES x DEVICES of each, and axes of the mesh. All layouts train the
quick start's model for some steps on equal batches, with the trainer itself. The box
has its cores and no more, so the same work takes as long however it is divided, but for
what dividing costs: more and smaller products, collectives, dispatch, and a Python
process each. `same batch` is that; `batch grows` has the first layout's rows on every
device and is compared by the row.
"""

import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import harness

LAYOUTS = "1x1,1x2,1x4,1x8,1x8:fsdp=8,1x8:fsdp=2:tensor=2,2x1,2x4,2x4:fsdp=8,4x1,4x2"
ROWS = 64  # of the batch that all layouts share
ROWS_A_DEVICE = 16
FIRST = 4  # steps that are not timed: the first runs of the step and its reader


def add_options(parser):
    """The options of this part."""
    parser.add_argument("--layouts", default=LAYOUTS)
    parser.add_argument("--steps", type=int, default=40)


def measure(options):
    """Trains each layout twice."""
    found = {
        "command": harness.command("benchmarks.scaling"),
        "date": time.strftime("%Y-%m-%d"),
        "versions": harness.versions(),
        "machine": harness.machine(),
        "steps": options.steps,
        "layouts": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in options.layouts.split(","):
            row = trained(name, options.steps, Path(folder))
            found["layouts"].append(row)
            harness.say(f"{name}: {1e3 * row['same_batch']['step_seconds']:.0f} ms")
    add_ratios(found["layouts"])
    return found


def trained(layout, steps, folder):
    """Both runs of a layout."""
    size, *axes = layout.split(":")
    processes, devices = map(int, size.split("x"))
    row = {"layout": layout, "processes": processes, "devices": processes * devices}
    along = processes * devices  # devices that have rows of their own
    for axis in axes:
        name, n = axis.split("=")
        along //= int(n) if name == "tensor" else 1
    for key, batch in (("same_batch", ROWS), ("batch_grows", ROWS_A_DEVICE * along)):
        workdir = folder / f"{layout.replace(':', '_')}_{key}"
        flags = [
            f"--config.batch_size={batch}",
            f"--config.total_steps={steps}",
            *(f"--config.mesh.{axis}" for axis in axes),
        ]
        train(workdir, processes, devices, flags)
        row[key] = {"batch_size": batch, **read(workdir)}
    return row


def train(workdir, processes, devices, flags):
    """Runs the trainer's command, in one process or several over loopback."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        *(sys.executable, "-m", "unicl_jax.main"),
        "--config=configs/quickstart.py",
        f"--workdir={workdir}",
        "--config.data.share_prompts=False",
        "--config.log_every_steps=1",
        "--config.optimizer.warmup_steps=1",
        "--config.optimizer.name=adamw",  # its compilation is a third of Muon's
        "--config.evaluate_every_steps=100000",
        "--config.checkpoint_every_steps=100000",
        *(f"--config.evaluations.{name}.path=" for name in EVALUATIONS),
        *flags,
    ]
    started = []
    for i in range(processes):
        several = [
            f"--coordinator_address=127.0.0.1:{port}",
            f"--num_processes={processes}",
            f"--process_id={i}",
        ]
        started.append(
            subprocess.Popen(
                command + several * (processes > 1),
                env={
                    **os.environ,
                    "JAX_PLATFORMS": "cpu",
                    "JAX_NUM_CPU_DEVICES": str(devices),
                },
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate()[1] for process in started]
    for process, err in zip(started, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"the trainer gave {process.returncode}:\n{err[-3000:]}")


EVALUATIONS = ("twemoji_names", "twemoji_subgroups", "fashion_mnist")


def read(workdir):
    """The losses of a run, and the median of its steps' seconds."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    timed = [row for row in rows[FIRST:] if "step_seconds" in row]
    return {
        "step_seconds": statistics.median(row["step_seconds"] for row in timed),
        "data_wait": statistics.median(row["data_wait"] for row in timed),
        "losses": [row["loss"] for row in rows],
    }


def add_ratios(rows):
    """Each layout beside the first: time for the work, and how far losses part."""
    first = rows[0]
    for row in rows:
        same, grows = row["same_batch"], row["batch_grows"]
        same["over_first"] = (
            same["step_seconds"] / first["same_batch"]["step_seconds"] - 1
        )
        by_row = [
            r["batch_grows"]["step_seconds"] / r["batch_grows"]["batch_size"]
            for r in (row, first)
        ]
        grows["over_first"] = by_row[0] / by_row[1] - 1
        pairs = list(zip(same["losses"], first["same_batch"]["losses"], strict=True))
        same["first_loss_differs"] = abs(pairs[0][0] / pairs[0][1] - 1)
        same["losses_differ"] = max(abs(a / b - 1) for a, b in pairs)


def rows_of(found):
    """A table: a header, and a row for each layout."""
    rows = [
        ["layout", "step, ms", "over 1x1", "first loss", "all losses", "batch grows"]
    ]
    for row in found["layouts"]:
        same, grows = row["same_batch"], row["batch_grows"]
        rows.append(
            [
                re.sub(":", " ", row["layout"]),
                f"{1e3 * same['step_seconds']:,.0f}",
                f"{same['over_first']:+.0%}",
                f"{same['first_loss_differs']:.0e}",
                f"{same['losses_differ']:.0e}",
                f"{grows['over_first']:+.0%}",
            ]
        )
    return rows


def title(found):
    """What the table is of."""
    return (
        f"the quick start's model, {ROWS} rows divided over virtual devices; "
        f"{harness.where(found['machine'])}"
    )
