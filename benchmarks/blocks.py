"""What recomputing blocks, and a loop over them, save and cost: compiled for a TPU.

python -m benchmarks.blocks
python -m benchmarks.blocks --towers=vit_l14 --batch_size=64 --topology=v5p:2x2x1
python -m benchmarks.blocks --markdown

Needs no TPU: libtpu compiles without one (`pip install "jax[tpu]"`). Each program in a
process of its own, with no cache.
"""

import argparse
import datetime
import os
import sys
import time
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Worker, say

SIZE, LENGTH = 224, 77
MIB = 2**20
WAYS = {
    "kept": dict(),
    "linear maps kept": dict(remat="dots"),
    "recomputed": dict(remat=True),
    "loop": dict(scan=True),
    "loop, linear maps kept": dict(scan=True, remat="dots"),
    "loop, recomputed": dict(scan=True, remat=True),
}
NO_LOOP = ("swin", "focalnet", "klite", "resnet", "bert")  # towers without `scan`


class Compiler:
    """Compiles a tower's training step for one chip."""

    def __init__(self, topology):
        """Finds the chip."""
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it only compiles
        import jax
        from jax.experimental import topologies

        jax.config.update("jax_enable_compilation_cache", False)
        jax.config.update("jax_platforms", "cpu")
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        self._chip = found.devices[0]

    def about(self):
        """The chip."""
        return {"device_kind": self._chip.device_kind}

    def compiled(self, tower, options, batch_size, dtype):
        """Seconds to compile, bytes of temporaries (None: too many), FLOPs."""
        import jax
        import jax.numpy as jnp
        import optax
        from jax.sharding import SingleDeviceSharding

        from unicl_jax import encoders

        factory = {**encoders.IMAGE_TOWERS, **encoders.TEXT_TOWERS}[tower]
        encoder = factory(dtype=encoders.DTYPES[dtype], **options)
        optimizer = optax.adamw(1e-4)

        def step(trained, x):
            params, state, opt_state = trained

            def loss(params):
                key = jax.random.key(0)
                features, new = encoder.apply(params, state, x, train=True, key=key)
                return (features**2).mean(), new

            grads, state = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), state, opt_state

        params, state = jax.eval_shape(encoder.init, jax.random.key(0))
        x = jax.ShapeDtypeStruct((batch_size, SIZE, SIZE, 3), jnp.float32)
        if tower in encoders.TEXT_TOWERS:
            x = jax.ShapeDtypeStruct((batch_size, LENGTH), jnp.int32)
        place = SingleDeviceSharding(self._chip)
        trained, x = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
            ((params, state, jax.eval_shape(optimizer.init, params)), x),
        )
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(trained, x)
        middle = time.perf_counter()
        found = {"trace_seconds": middle - start, "temporary_bytes": None}
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        else:
            found["temporary_bytes"] = program.memory_analysis().temp_size_in_bytes
            # Of a loop the compiler counts one turn.
            if not options.get("scan"):
                found["flops"] = program.cost_analysis().get("flops")
        return found | {"compile_seconds": time.perf_counter() - middle}


def measure(options):
    """Every tower and way; returns what goes to JSON."""
    machine, towers = harness.machine(), {}
    for tower in options.towers:
        towers[tower] = {}
        for name, way in WAYS.items():
            if "scan" in way and tower.startswith(NO_LOOP):
                continue
            say(f"{tower}, {name}")
            worker = Worker(Compiler, options.topology)
            about = worker.ask("about")
            towers[tower][name] = worker.ask(
                "compiled", tower, way, options.batch_size, options.dtype
            )
            worker.close()
    return {
        "date": datetime.date.today().isoformat(),
        "command": harness.command("benchmarks.blocks"),
        "machine": machine | about,
        "versions": harness.versions(),
        "topology": options.topology,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "towers": towers,
    }


def rows_of(found):
    """The table of one JSON file as rows of text."""
    rows = [["tower", "blocks", "tracing", "compiling", "temporary MiB", "GFLOP"]]
    for tower, ways in found["towers"].items():
        for name, way in ways.items():
            size = way["temporary_bytes"]
            flops = way.get("flops")
            rows.append(
                [
                    tower,
                    name,
                    f"{way['trace_seconds']:.1f} s",
                    f"{way['compile_seconds']:.1f} s",
                    "does not fit" if size is None else f"{size / MIB:,.0f}",
                    f"{flops / 1e9:,.0f}" if flops else "",
                ]
            )
    return rows


def title(found):
    """One line: what was compiled, for what, on what."""
    machine = found["machine"]
    shared = " (shared with other work)" * harness.shared_with_others(machine)
    return (
        f"training steps of {found['batch_size']} in {found['dtype']} for one "
        f"{machine['device_kind']}; compiled on {machine['cpu']}, "
        f"{machine['cores']} cores{shared}"
    )


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--towers",
        type=lambda text: text.split(","),
        default=["vit_b16", "vit_l14", "transformer", "swin_tiny", "swin_base"],
    )
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--out", type=Path, help="JSON; default in benchmarks/results")
    parser.add_argument("--markdown", action="store_true", help="print all results")
    return parser.parse_args(argv)


def main(argv):
    """Measures, prints a table and writes JSON; or prints what was measured before."""
    harness.report("blocks", _options(argv), measure, title, rows_of)


if __name__ == "__main__":
    main(sys.argv[1:])
