"""A train step compiled for a TPU that is not there, in a process of its own.

libtpu prints what it likes on the terminal, takes a lock, and keeps gigabytes: none of
that reaches the process that asks.
"""

import gzip
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from unicl_jax.errors import InputError

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Compiled(NamedTuple):
    """What the compiler says of a step.

    Attributes:
      text: the optimised program, HLO, of one device; "" if it does not fit.
      memory: bytes on a device: `arguments`, `temporary`, `code`, `output`, `aliased`;
        empty if it does not fit.
      cost: `flops`, `bytes accessed` and the like of one device, bodies of loops once.
      lower_seconds, compile_seconds: what it took.
      places: of each device, the coordinates of its chip.
      warnings: of the compiler: arrays that it moves whole where they need not be.
      used, limit: bytes of HBM it would need and could have, if it does not fit.
      largest: if it does not fit, the largest arrays, a line each.
      flags: of libtpu, from LIBTPU_INIT_ARGS.
    """

    text: str
    memory: dict[str, int]
    cost: dict[str, float]
    lower_seconds: float
    compile_seconds: float
    places: list[list[int]]
    warnings: list[str]
    used: int | None = None
    limit: int | None = None
    largest: tuple[str, ...] = ()
    flags: str = ""

    @property
    def fits(self) -> bool:
        """Whether the compiler found room for it."""
        return self.used is None


class Busy(InputError):
    """Another process holds libtpu."""


def compile_step(
    config, topology: str, concepts: int, text_slots: float | None, keep=None
) -> Compiled:
    """Compiles `program.train_step` for a topology; minutes.

    Args:
      config: the resolved config.
      topology: as libtpu names it, "v5e:4x4".
      concepts: of the concept table.
      text_slots: as for `batch.make_batch`.
      keep: file for what was found, which is read instead if it is there; None: none.

    Returns:
      What the compiler says; also if the step does not fit.

    Raises:
      InputError: if libtpu is missing or held by another process, has no such
        topology, or fails at something else.
    """
    if keep is not None and Path(keep).exists():
        return Compiled(**json.loads(gzip.decompress(Path(keep).read_bytes())))
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "--compile needs libtpu, which compiles for TPUs without one: it is not "
            'installed; pip install "jax[tpu]", or leave --compile out for an estimate.'
        )
    request = dict(
        config=config, topology=topology, concepts=concepts, text_slots=text_slots
    )
    # Not on a real TPU's host or devices, nor asking a cloud who it is.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so none is shared
        "TF_CPP_MIN_LOG_LEVEL": "0",
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json.gz"
        done = subprocess.run(
            [sys.executable, "-m", "unicl_jax.planning.compiling", str(out)],
            input=pickle.dumps(request),
            env=environment,
            capture_output=True,
        )
        said = done.stderr.decode(errors="replace")
        if done.returncode or not out.exists():
            raise _what_failed(said, topology, done.returncode)
        found = json.loads(gzip.decompress(out.read_bytes()))
    found["warnings"] = compiler_warnings(said)
    found["flags"] = libtpu_flags()
    if keep is not None:
        Path(keep).parent.mkdir(parents=True, exist_ok=True)
        # At once: what is there is whole, also beside another process that writes it.
        temporary = Path(f"{keep}.{os.getpid()}")
        try:
            temporary.write_bytes(gzip.compress(json.dumps(found).encode()))
            temporary.replace(keep)
        finally:
            temporary.unlink(missing_ok=True)
    return Compiled(**found)


def libtpu_flags() -> str:
    """Flags of libtpu that programs are compiled with here: LIBTPU_INIT_ARGS."""
    return " ".join(os.environ.get("LIBTPU_INIT_ARGS", "").split())


def compiler_warnings(said: str) -> list[str]:
    """What the compiler warns of in what it prints, each once.

    Args:
      said: its stderr.

    Returns:
      Lines on "involuntary full rematerialization": an array that is gathered whole on
      every device since its sharding before and after don't fit.
    """
    found = re.findall(r"\[SPMD\] (Involuntary full remat[^\n]*)", said)
    return list(dict.fromkeys(line[:300] for line in found))


def _what_failed(said, topology, code):
    if "already in use" in said or "lockfile" in said:
        return Busy(
            "libtpu compiles for one process at a time: another one has it; wait for "
            "that to end, or leave --compile out for an estimate."
        )
    unknown = re.search(r"Unknown command line flag '([^']*)'", said)
    if unknown:
        return InputError(
            "LIBTPU_INIT_ARGS must hold flags that this libtpu knows: it does not know "
            f"{unknown[1]}; leave that out, or take the libtpu that has it."
        )
    if code < 0:
        return InputError(
            f"the compiler needs memory of this machine: it was stopped by signal "
            f"{-code}, as where that ran out; close other programs, or leave --compile "
            "out for an estimate."
        )
    lines = [x for x in said.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", x)]
    last = lines[-1] if lines else said.strip().splitlines()[-1:] or [""]
    last = last if isinstance(last, str) else last[0]
    if "topology" in last.lower():
        return InputError(
            f"libtpu must know the topology: it does not compile for {topology} "
            f"({last[:200]}); take another shape, or leave --compile out."
        )
    return InputError(
        f"the compiler must take the step: it stopped at {last[:500]}; leave --compile "
        "out for an estimate."
    )


def out_of_memory(message: str) -> dict | None:
    """What XLA's refusal of a program that is too large says.

    Args:
      message: of its error.

    Returns:
      `used` and `limit` in bytes, the `largest` arrays; None for another error.
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?)B? of ([\d.]+)([KMGT]?)B? hbm", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    largest = []
    for block in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        size = block.split("\n")[0].strip()
        operator = re.search(r'op_name="([^"]*)"', block)
        shape = re.search(r"Shape: (\S+)", block)
        name = re.sub(r"\w*\(|\)", "", operator[1]) if operator else ""
        shape = shape[1].split("{")[0] if shape else ""
        largest.append(f"{size} {shape} {name}".strip())
    used, limit = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
    return dict(used=int(used), limit=int(limit), largest=list(dict.fromkeys(largest)))


def _child(out):
    """Reads a request from stdin, compiles, and writes what was found."""
    request = pickle.loads(sys.stdin.buffer.read())
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from unicl_jax import encoders, sharding
    from unicl_jax.planning.batch import make_batch
    from unicl_jax.program import make_program

    jax.config.update("jax_enable_compilation_cache", False)
    config = request["config"]
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=request["topology"]
    )
    mesh = sharding.make_mesh(config.mesh, found.devices)
    model = encoders.from_config(config.model)
    program = make_program(config, model, mesh, request["concepts"])
    batch = make_batch(config, mesh, request["text_slots"])
    start = time.perf_counter()
    step = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = program.train_step.lower(program.state, batch.arrays, step)
    middle = time.perf_counter()
    places = [list(device.coords) for device in mesh.devices.flat]
    said = dict(text="", memory={}, cost={}, places=places, warnings=[])
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = out_of_memory(str(error))
        if refusal is None:
            raise
        said |= refusal
    else:
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        said["text"] = compiled.as_text()
        said["memory"] = dict(
            arguments=memory.argument_size_in_bytes,
            output=memory.output_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
            temporary=memory.temp_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
        )
        said["cost"] = {k: float(v) for k, v in cost.items() if "{" not in k}
    said["lower_seconds"] = middle - start
    said["compile_seconds"] = time.perf_counter() - middle
    Path(out).write_bytes(gzip.compress(json.dumps(said).encode()))


if __name__ == "__main__":
    _child(sys.argv[1])
