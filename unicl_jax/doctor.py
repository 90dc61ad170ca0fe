"""Checks a config and its data before a run: `python -m unicl_jax.doctor`.

python -m unicl_jax.doctor --config=configs/own_data.py --workdir=runs/own \
  --config.data.sources.labels.path=pictures

It opens and samples every source as training does, says what to mend, and draws
`contact_sheet.png`: images as a step sees them, with their texts.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import jax

from unicl_jax import main as trainer
from unicl_jax import storage
from unicl_jax.checks import Setting, examine
from unicl_jax.checks.report import make_console, show, verdict
from unicl_jax.errors import InputError

PROBLEMS, BAD_INPUT = 1, 2


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: as `sys.argv`.

    Returns:
      The exit code: 0 if training can start; 1 if it would stop, at what the report
      shows; 2 for wrong flags.
    """
    parser = argparse.ArgumentParser(
        prog="python -m unicl_jax.doctor",
        description=__doc__.split("\n")[0],
        epilog="--config, --config.FIELD and --workdir are those of the trainer.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--records", type=int, default=64, help="that are read of each source"
    )
    parser.add_argument("--processes", type=int, help="of the run to come")
    parser.add_argument("--devices", type=int, help="of it, over all processes")
    parser.add_argument("--out", help="folder of contact_sheet.png")
    options, rest = parser.parse_known_args(argv[1:])
    start = time.perf_counter()
    console = make_console()
    try:
        setting = _setting(options, [argv[0], *rest])
        sections = []
        for section in examine(setting):
            sections.append(section)
            show(console, section)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    problems, said = verdict(sections)
    console.print(f"{said} (looked for {time.perf_counter() - start:.0f} s)")
    return PROBLEMS if problems else 0


def _setting(options, argv):
    for name in ("records", "processes", "devices"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1: got {value}.")
    config, workdir = trainer.parse(argv, ("config",), "unicl_jax.doctor")
    processes = options.processes or 1
    devices = options.devices or processes * jax.local_device_count()
    if devices % processes:
        raise InputError(
            f"--devices must be divisible by --processes: got {devices} and "
            f"{processes}; each process has as many."
        )
    return Setting(
        config=config,
        workdir=storage.path(workdir) if workdir else None,
        out=storage.path(options.out or workdir or "."),
        processes=processes,
        devices=devices,
        records=options.records,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
