"""A plan: whether a run fits a topology, how fast it is, and what bounds it."""

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from unicl_jax import encoders, objectives, validation
from unicl_jax.planning import hlo, roofline
from unicl_jax.planning.compiling import Compiled, compile_step
from unicl_jax.planning.estimate import Estimate, estimate_step
from unicl_jax.planning.network import Collective
from unicl_jax.planning.roofline import Times
from unicl_jax.planning.topology import Topology

# Of a TPU's memory what a program can have (the compiler's own limit: 15.75 of 16 GiB),
# and of a GPU's what JAX takes at its start: XLA_PYTHON_CLIENT_MEM_FRACTION.
USABLE = {"tpu": 0.977, "gpu": 0.75}
MOST_OF_A_GPU = 0.95  # that the fraction can well be set to


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
      parameters: of them; this and the next two as the mesh divides them.
      optimizer: of its state.
      other: of batch statistics and averages of the parameters.
      batch: of this device's rows.
      temporary: of activations, gradients and what else lives inside a step.
      code: of the program.
      limit: that there is.
    """

    parameters: float
    optimizer: float
    other: float
    batch: float
    temporary: float
    code: float
    limit: float

    @property
    def state(self) -> float:
        """What is there between steps, too."""
        return self.parameters + self.optimizer + self.other

    @property
    def total(self) -> float:
        """All of it."""
        return self.state + self.batch + self.temporary + self.code

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be known before a run.

    Attributes:
      config: of it.
      topology: of it.
      how: "compiled", or "estimated".
      memory: of each device.
      flops: of products, each device and step.
      bytes: read and written, each device and step.
      times: of a step; None if it does not fit and was compiled.
      collectives: of a step.
      compiled: what the compiler says; None: it was not asked.
      estimate: what tracing says.
      program: what the compiled text says; None without.
    """

    config: ConfigDict
    topology: Topology
    how: str
    memory: Memory
    flops: float
    bytes: float
    times: Times
    collectives: list[Collective]
    compiled: Compiled | None
    estimate: Estimate
    program: hlo.Program | None

    @property
    def fits(self) -> bool:
        """Whether each device has room; the compiler's word goes before an estimate."""
        return self.compiled.fits if self.compiled else self.memory.fits

    @property
    def rows(self) -> int:
        """Rows of the batch on a device."""
        return self.config.batch_size // rows_divisor(self.config, self.topology)

    @property
    def images_per_second(self) -> float:
        """Of the whole run."""
        return self.config.batch_size / self.times.step

    @property
    def days(self) -> float:
        """Of all steps, without evaluations."""
        return self.config.total_steps * self.times.step / 86400


def rows_divisor(config: ConfigDict, topology: Topology) -> int:
    """Devices over which the rows of a batch are divided."""
    return topology.devices // config.mesh.tensor


def check(config: ConfigDict, topology: Topology) -> None:
    """Refuses what the trainer would, on that topology.

    Args:
      config: the resolved config.
      topology: the devices.

    Raises:
      InputError: in the trainer's words.
    """
    validation.validate(config, topology.devices, topology.hosts)
    objectives.check(config)
    encoders.from_config(config.model)


def limit_of(topology: Topology) -> float:
    """Bytes that a program can have on a device."""
    chip = topology.chip
    return chip.memory / chip.devices * USABLE[chip.kind]


def estimate_plan(
    config: ConfigDict, topology: Topology, concepts: int, text_slots: float | None
) -> Plan:
    """A plan by tracing alone: seconds, for TPUs and GPUs.

    Args:
      config: the resolved config, which `check` takes.
      topology: the devices.
      concepts: of the concept table.
      text_slots: as for `batch.make_batch`.

    Returns:
      The plan.

    Raises:
      InputError: what building the step refuses.
    """
    found = estimate_step(config, topology.devices, concepts, text_slots)
    memory = _memory(found, topology, found.temporary, 0.0)
    share = 1 / config.mesh.tensor  # what it divides is nearly all the work
    products, moved, work = (
        share * x for x in roofline.work_seconds(found.counted.work, topology.chip)
    )
    links, waiting = roofline.link_seconds(found.collectives, topology, work)
    return Plan(
        config,
        topology,
        "estimated",
        memory,
        found.counted.flops * share,
        found.counted.bytes * share,
        Times(products, moved, work, links, waiting),
        found.collectives,
        None,
        found,
        None,
    )


def compile_plan(
    estimated: Plan,
    concepts: int,
    text_slots: float | None,
    keep: Path | None = None,
) -> Plan:
    """The same by compiling the step: minutes, for TPUs.

    Args:
      estimated: the plan without.
      concepts: as for `estimate_plan`.
      text_slots: as for `estimate_plan`.
      keep: as for `compiling.compile_step`.

    Returns:
      The plan; of a step that does not fit, its work and time are estimates.

    Raises:
      InputError: as `compile_step`.
    """
    config, topology = estimated.config, estimated.topology
    name = libtpu_name(topology)
    compiled = compile_step(config, name, concepts, text_slots, keep)
    if not compiled.fits:
        held = estimated.memory
        memory = dataclasses.replace(
            held,
            temporary=compiled.used - held.state - held.batch,
            limit=compiled.limit,
        )
        return dataclasses.replace(
            estimated, how="compiled", memory=memory, compiled=compiled
        )
    return with_compiled(estimated, compiled)


def with_compiled(estimated: Plan, compiled: Compiled) -> Plan:
    """An estimate, corrected by what the compiler says of a step that fits."""
    topology, found = estimated.topology, estimated.estimate
    chip = topology.chip
    program = hlo.read(compiled.text, topology.devices, compiled.places, chip.clock)
    sizes = compiled.memory
    memory = _memory(found, topology, sizes["temporary"], sizes["code"])
    # XLA counts a loop's body once.
    flops = max(compiled.cost.get("flops", 0.0), estimated.flops)
    moved = compiled.cost.get("bytes accessed", estimated.bytes)
    work = program.cycles / chip.clock if chip.clock else 0.0
    work = work or estimated.times.work
    links, waiting = roofline.link_seconds(program.collectives, topology, work)
    products = estimated.times.products
    times = Times(products, moved / chip.bandwidth * chip.devices, work, links, waiting)
    return dataclasses.replace(
        estimated,
        how="compiled",
        memory=memory,
        flops=flops,
        bytes=moved,
        times=times,
        collectives=program.collectives,
        compiled=compiled,
        program=program,
    )


def libtpu_name(topology: Topology) -> str:
    """What the compiler calls a topology."""
    return f"{topology.chip.libtpu}:{'x'.join(map(str, topology.shape))}"


def _memory(found: Estimate, topology: Topology, temporary: Any, code: Any) -> Memory:
    return Memory(
        found.parameters,
        found.optimizer,
        found.other,
        found.batch,
        temporary,
        code,
        limit_of(topology),
    )
