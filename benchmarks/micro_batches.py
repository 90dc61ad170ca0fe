"""What a step in micro-batches saves and costs: compiled for TPUs, none needed.

python -m benchmarks.micro_batches --counts=1,2,4,8
python -m benchmarks.micro_batches --remat=True --topology=v5e:2x4 --batch_size=4096

The whole train step of configs/swin_tiny.py, or of another recipe. Needs no TPU:
libtpu compiles without one (`pip install "jax[tpu]"`).
"""

import argparse
import os
import re
import runpy
import sys
import time

MIB = 2**20


def compiled(options, count):
    """The step's program for one topology."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it only compiles
    import jax
    from jax.experimental import topologies

    from unicl_jax import encoders, sharding
    from unicl_jax.program import make_program

    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_platforms", "cpu")
    found = topologies.get_topology_desc(platform="tpu", topology_name=options.topology)
    devices = found.devices[: options.chips or None]
    config = runpy.run_path(options.config)["get_config"](options.variant)
    config.batch_size, config.micro_batches = options.batch_size, count
    if options.remat != "False":
        for tower in (config.model.image, config.model.text):
            tower.remat = True if options.remat == "True" else options.remat
    mesh = sharding.make_mesh(config.mesh, devices)
    program = make_program(config, encoders.from_config(config.model), mesh, 1000)
    rows, size = sharding.over_batch(mesh), config.model.image.image_size

    def shape(dtype, *rest):
        return jax.ShapeDtypeStruct((config.batch_size, *rest), dtype, sharding=rows)

    batch = {
        "image": shape("uint8", size, size, 3),
        "label": shape("int32"),
        "tokens": shape("int32", options.slots),
    }
    step = jax.ShapeDtypeStruct((), "int32")
    start = time.perf_counter()
    lowered = program.train_step.lower(program.state, batch, step)
    try:
        return lowered.compile(), time.perf_counter() - start
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used (\S+) of (\S+) hbm", str(error))
        said = used.group(0) if used else "more than there is"
        return said, time.perf_counter() - start


def loops(text):
    """How many all-reduces stand in the bodies of loops, and how many elsewhere."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    inside = outside = 0
    for computation in re.split(r"\n(?=[%\w].*\{\n|ENTRY)", text):
        name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", computation)
        found = len(re.findall(r" all-reduce(?:-start)?\(", computation))
        if name and name.group(1) in bodies:
            inside += found
        else:
            outside += found
    return inside, outside


def main(argv):
    """Prints a row for each number of micro-batches."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/swin_tiny.py")
    parser.add_argument("--variant", default="")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--chips", type=int, default=1, help="of it; 0: all")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--slots", type=int, default=32, help="of a text")
    parser.add_argument("--counts", default="1,2,4,8")
    parser.add_argument("--remat", default="False", help='False, True or "dots"')
    options = parser.parse_args(argv)
    print("| micro-batches | temporary MiB a chip | all-reduces: in loops, outside |")
    print("|---|---|---|")
    for count in map(int, options.counts.split(",")):
        program, seconds = compiled(options, count)
        print(f"compiled in {seconds:.0f} s", file=sys.stderr)
        if isinstance(program, str):
            print(f"| {count} | does not fit: {program} | |", flush=True)
            continue
        size = program.memory_analysis().temp_size_in_bytes / MIB
        inside, outside = loops(program.as_text())
        print(f"| {count} | {size:,.0f} | {inside}, {outside} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
