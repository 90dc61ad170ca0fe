"""Weak scaling over TPU slices, compiled for each; nothing runs.

The same rows a chip on ever more chips. Of each: what crosses the links, and what of
that the compiler's schedule leaves waiting, by the formulas of unicl_jax/planning.
"""

import datetime
import hashlib
import runpy
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import say
from unicl_jax.checks.report import size
from unicl_jax.errors import InputError
from unicl_jax.planning import network, plans
from unicl_jax.planning.advice import at_batch
from unicl_jax.planning.compiling import libtpu_flags
from unicl_jax.planning.topology import parse_topology

TOPOLOGIES = (
    *("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16"),
    *("v5p:2x2x1", "v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x8"),
)
CONCEPTS = 1000


def swin_tiny():
    """The paper's recipe."""
    return runpy.run_path("configs/swin_tiny.py")["get_config"]()


def vit_l14():
    """CLIP's ViT-L/14 and its text tower on the same data, blocks recomputed."""
    config = swin_tiny()
    config.model.image = dict(name="vit_l14", image_size=224, remat=True)
    config.model.text.update(width=768, num_heads=12)
    config.model.text.remat = True
    config.model.embed_dim = 768
    return config


MODELS = {"swin_tiny": swin_tiny, "vit_l14": vit_l14}


def add_options(parser):
    """Of the command line."""

    def several(text):
        return text.split(",")

    parser.add_argument("--models", type=several, default=list(MODELS))
    parser.add_argument("--topologies", type=several, default=list(TOPOLOGIES))
    parser.add_argument(
        "--rows", type=int, default=16, help="of a chip: 16 on 256 chips are 4,096"
    )
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for compiled programs")


def measure(options):
    """Compiles each model for each topology; returns what goes to JSON."""
    import jax

    # A backend of libtpu here would hold what the compiler needs.
    jax.config.update("jax_platforms", "cpu")
    found = []
    machine = harness.machine()
    for model in options.models:
        for name in options.topologies:
            say(f"{model}, {name}")
            found.append(_one(model, name, options))
    return {
        "date": datetime.date.today().isoformat(),
        "command": harness.command("benchmarks.scaling"),
        "machine": machine,
        "versions": harness.versions("libtpu"),
        "rows": options.rows,
        "flags": libtpu_flags(),
        "runs": found,
    }


def _one(model, name, options):
    topology = parse_topology(name)
    config = MODELS[model]()
    config.mesh.fsdp = min(options.fsdp, topology.devices)
    config.mesh.tensor = options.tensor
    batch = options.rows * plans.rows_divisor(config, topology)
    config = at_batch(config, batch)
    said = dict(model=model, topology=name, chips=topology.chips, batch_size=batch)
    keep = None
    if options.keep:
        shape = f"{options.fsdp}_{options.tensor}_{batch}"
        if libtpu_flags():
            shape += "_" + hashlib.sha256(libtpu_flags().encode()).hexdigest()[:8]
        keep = options.keep / f"{model}_{name.replace(':', '_')}_{shape}.json.gz"
    try:
        plans.check(config, topology)
        plan = plans.estimate_plan(config, topology, CONCEPTS, None)
        said["estimated_temporary"] = plan.memory.temporary
        plan = plans.compile_plan(plan, CONCEPTS, None, keep)
    except InputError as error:
        return said | {"error": str(error)}
    said |= {
        "fits": plan.fits,
        "compile_seconds": plan.compiled.compile_seconds,
        "temporary": plan.memory.temporary,
        "total": plan.memory.total,
        "limit": plan.memory.limit,
    }
    if not plan.fits:
        return said
    by_kind = {}
    for one in plan.collectives:
        if one.devices > 1:
            sums = by_kind.setdefault(one.kind, [0.0, 0.0, 0.0])
            sums[0] += one.count
            sums[1] += one.count * one.bytes
            sums[2] += one.count * network.seconds(one, topology)
    return said | {
        "collectives": {
            kind: dict(zip(("count", "bytes", "seconds"), sums, strict=True))
            for kind, sums in by_kind.items()
        },
        "warnings": plan.compiled.warnings,
        "cycles": plan.program.cycles,
        "work": plan.times.work,
        "links": plan.times.links,
        "waiting": plan.times.waiting,
        "efficiency": plan.times.efficiency,
        "overlapped": plan.times.work / plan.times.overlapped,
        "images_per_second": plan.images_per_second,
    }


def title(found):
    """One line: what was compiled."""
    flags = found.get("flags")
    with_flags = f"; LIBTPU_INIT_ARGS=`{flags}`" if flags else ""
    return (
        f"weak scaling, {found['rows']} rows a chip, compiled for each slice; "
        f"times are estimates{with_flags}"
    )


def rows_of(found):
    """The table of one JSON file as rows of text."""
    rows = [
        [
            *("model", "slice", "chips", "batch", "exchanged", "work", "links"),
            *("waiting", "step", "efficiency", "overlapped"),
        ]
    ]
    for run in found["runs"]:
        row = [run["model"], run["topology"], f"{run['chips']:,}"]
        row.append(f"{run['batch_size']:,}")
        if "work" not in run:
            why = run.get("error", "does not fit")[:40]
            rows.append([*row, why, *[""] * 6])
            continue
        moved = sum(kind["bytes"] for kind in run["collectives"].values())
        row += [size(moved), f"{1e3 * run['work']:.1f} ms"]
        row += [f"{1e3 * run[key]:.1f} ms" for key in ("links", "waiting")]
        row += [f"{1e3 * (run['work'] + run['waiting']):.1f} ms"]
        row += [f"{100 * run[key]:.1f} %" for key in ("efficiency", "overlapped")]
        rows.append(row)
    return rows
