"""Says before a run whether it fits and how fast it is: `python -m unicl_jax.plan`.

python -m unicl_jax.plan --config=configs/swin_tiny.py --topology=v5e:16x16 --compile
python -m unicl_jax.plan --config=configs/swin_tiny.py --topology=h100:2x8

Needs no accelerator. `--compile` compiles the real train step for that TPU slice with
libtpu; without it, and for GPUs, the step is traced and counted.
"""

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from unicl_jax import exit_codes
from unicl_jax import main as trainer
from unicl_jax.checks.report import make_console
from unicl_jax.config import to_json
from unicl_jax.errors import InputError
from unicl_jax.planning import advice, plans, report
from unicl_jax.planning.compiling import compile_step, libtpu_flags
from unicl_jax.planning.topology import parse_topology
from unicl_jax.processes import agreement

BAD_INPUT = exit_codes.BAD_INPUT
DOES_NOT_FIT = 7  # none of the trainer's: 1 is an unforeseen error, here too


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: as `sys.argv`.

    Returns:
      The exit code: 0 if the run fits; 7 if it does not; 2 for what cannot be planned.
    """
    parser = argparse.ArgumentParser(
        prog="python -m unicl_jax.plan",
        description=__doc__.split("\n")[0],
        epilog="--config and --config.FIELD are those of the trainer.",
        allow_abbrev=False,
    )
    parser.add_argument("--topology", help="v5e:16x16; h100:8; h100:2x8, hosts by GPUs")
    parser.add_argument(
        "--compile", action="store_true", help="for a TPU; up to an hour"
    )
    parser.add_argument(
        "--largest_batch", action="store_true", help="search by compiling a few more"
    )
    parser.add_argument(
        "--text_slots", type=float, help="that a text takes on average, when packed"
    )
    parser.add_argument(
        "--concepts", type=int, default=1000, help="of the run's concept table"
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument(
        "--keep", type=Path, help="folder for compiled programs, read again from there"
    )
    options, rest = parser.parse_known_args(argv[1:])
    try:
        return _plan(options, [argv[0], *rest])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def _plan(options, argv):
    # No device is needed, and a busy one would be in the way.
    jax.config.update("jax_platforms", "cpu")
    if options.topology is None:
        raise InputError(
            "--topology must be given: chips and how many, as in v5e:16x16 or h100:2x8."
        )
    topology = parse_topology(options.topology)
    compiles = options.compile or options.largest_batch
    if compiles and topology.chip.kind != "tpu":
        raise InputError(
            f"--compile is for TPUs, whose compiler needs none: got {topology.name}; "
            "leave it out for an estimate."
        )
    if options.concepts < 1:
        raise InputError(f"--concepts must be at least 1: got {options.concepts}.")
    config, _ = trainer.parse(argv, ("config",), "unicl_jax.plan")
    plans.check(config, topology)
    with _writing("--json", options.json):  # before minutes of compiling
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.open("a").close()
    given = options.concepts, options.text_slots
    plan = plans.estimate_plan(config, topology, *given)

    def kept(config):
        return _kept(options.keep, config, topology, *given)

    if compiles:
        plan = plans.compile_plan(plan, *given, kept(config))

    def compile_at(batch):
        other = advice.at_batch(config, batch)
        name = plans.libtpu_name(topology)
        return compile_step(other, name, *given, kept(other))

    if options.largest_batch:
        largest = advice.search_largest_batch(plan, compile_at)
    else:
        largest = advice.largest_batch(plan)
    todo = advice.advice(plan, *given)
    report.print_report(make_console(), report.sections(plan, largest, todo))
    if options.json:
        found = report.to_json(plan, largest, todo)
        with _writing("--json", options.json):
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if plan.fits else DOES_NOT_FIT


@contextlib.contextmanager
def _writing(flag, path):
    try:
        yield
    except OSError as error:
        raise InputError(
            f'{flag} must be a place that can be written: "{path}" gave '
            f"{error.strerror}; name another."
        ) from error


def _kept(folder, config, topology, concepts, text_slots):
    """The file of a compiled program, by all that it depends on."""
    if folder is None:
        return None
    with _writing("--keep", folder):
        folder.mkdir(parents=True, exist_ok=True)
    facts = agreement.of_this_process({})
    made_of = to_json(config), concepts, text_slots, facts["code"], facts["version"]
    made_of += (libtpu_flags(),)
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]
    name = plans.libtpu_name(topology).replace(":", "_")
    return folder / f"{name}_{config.batch_size}_{key}.json.gz"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
