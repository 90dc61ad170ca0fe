"""The largest batch that fits, and what to change where a run doesn't, or waits."""

import copy
import math
from typing import NamedTuple

from unicl_jax.checks.report import size
from unicl_jax.errors import InputError
from unicl_jax.planning.estimate import estimate_step
from unicl_jax.planning.plans import (
    MOST_OF_A_GPU,
    USABLE,
    Plan,
    rows_divisor,
)

SEARCHED = 3  # programs that a search for the largest batch compiles, at most


class Largest(NamedTuple):
    """The largest batch that fits.

    batch: global; 0: none
    how: how that is known
    tried: batches that were compiled, and whether they fit
    """

    batch: int
    how: str
    tried: tuple[tuple[int, bool], ...] = ()


def fixed_and_by_row(plan: Plan) -> tuple[float, float]:
    """Bytes of a device that do not depend on its rows, and those of each row.

    What lives inside a step is taken for gradients, as large as what learns, and for
    activations, in proportion to the rows.

    Args:
      plan: of some batch.

    Returns:
      The two.
    """
    memory, found = plan.memory, plan.estimate
    gradients = min(
        found.trained * plan.memory.parameters / _whole(plan), 0.9 * (memory.temporary)
    )
    by_row = (memory.temporary - gradients + memory.batch) / plan.rows
    return memory.state + memory.code + gradients, by_row


def _whole(plan):
    """Bytes of the parameters, undivided; at least those that a device holds."""
    return max(plan.estimate.whole, plan.memory.parameters)


def largest_batch(plan: Plan) -> Largest:
    """The largest batch by a straight line through one plan.

    Args:
      plan: of some batch.

    Returns:
      The batch, a multiple of the devices that share it.
    """
    fixed, by_row = fixed_and_by_row(plan)
    rows = max(0, math.floor((plan.memory.limit - fixed) / by_row))
    batch = rows * rows_divisor(plan.config, plan.topology)
    said = "from this batch in proportion"
    return Largest(
        batch, said if plan.fits or not plan.compiled else f"{said}, roughly"
    )


def search_largest_batch(plan: Plan, compile_at) -> Largest:
    """The largest batch by compiling a few: a line through two, and one to see.

    Temporary memory is close to a line in the rows. Where memory is tight XLA computes
    things again rather than refuse, so more may fit, slower.

    Args:
      plan: a compiled one.
      compile_at: global batch -> `compiling.Compiled`.

    Returns:
      The largest batch seen to fit, if any was.
    """
    unit = rows_divisor(plan.config, plan.topology)
    points = {plan.rows: _total(plan, plan.compiled)}
    tried = {plan.rows: plan.fits}
    rows = largest_batch(plan).batch // unit
    for _ in range(SEARCHED):
        rows = max(1, rows)
        if rows in tried:
            break
        compiled = compile_at(rows * unit)
        tried[rows] = compiled.fits
        points[rows] = _total(plan, compiled)
        most = compiled.limit or plan.memory.limit
        (a, at_a), (b, at_b) = sorted(points.items())[-2:]
        slope = max((at_b - at_a) / (b - a), 1.0)
        rows = math.floor(a + (most - at_a) / slope)
        fit = [r for r, good in tried.items() if good]
        bad = [r for r, good in tried.items() if not good]
        if bad:
            rows = min(rows, min(bad) - 1)
        if fit and rows <= max(fit) * 1.05:
            break
    fit = [r for r, good in tried.items() if good]
    seen = tuple((r * unit, good) for r, good in sorted(tried.items()))
    return Largest(max(fit, default=0) * unit, "compiled", seen)


def _total(plan, compiled):
    if not compiled.fits:
        return float(compiled.used)
    memory = compiled.memory
    return float(memory["arguments"] + memory["temporary"] + memory["code"])


def advice(plan: Plan, concepts: int, text_slots: float | None) -> list[str]:
    """What to change, the most useful first.

    Args:
      plan: of the run.
      concepts: as for `plans.estimate_plan`.
      text_slots: as for `plans.estimate_plan`.

    Returns:
      Lines, each with the field and what it brings.
    """
    said = []
    if not plan.fits:
        said += _to_fit(plan, concepts, text_slots)
    if plan.times is not None:
        said += _to_hurry(plan)
    return said


def _to_fit(plan, concepts, text_slots):
    memory = plan.memory
    fixed, by_row = fixed_and_by_row(plan)
    said = []
    if plan.topology.chip.kind == "gpu":
        most = memory.limit / USABLE["gpu"] * MOST_OF_A_GPU
        if memory.total <= most:
            said.append(
                f"XLA_PYTHON_CLIENT_MEM_FRACTION={MOST_OF_A_GPU}: JAX takes "
                f"{USABLE['gpu']:.0%} of a GPU unless told so"
            )
    largest = largest_batch(plan).batch
    if largest:
        said.append(f"--config.batch_size={largest}: the largest that fits, about")
    micro = _micro_batches(memory.limit - fixed, by_row * plan.rows, plan.rows)
    if micro:
        said.append(
            f"--config.micro_batches={micro}: the same batch and gradient, "
            "with the memory of a part at a time"
        )
    for tower in ("image", "text"):
        saved = _with_remat(plan, tower, concepts, text_slots)
        if saved is not None:
            left = memory.total - saved
            fits = "fits" if left <= memory.limit else "does not do alone"
            said.append(
                f"--config.model.{tower}.remat=True: about {size(saved)} less a device "
                f"for its forward pass once more: {fits}"
            )
    said += _to_divide(plan)
    return said or ["more chips, or a smaller model: the state alone does not fit"]


def _micro_batches(room, activations, rows):
    if room <= 0:
        return 0
    parts = math.ceil(activations / room)
    while parts <= rows and rows % parts:
        parts += 1
    return parts if 1 < parts <= rows else 0


def _with_remat(plan, tower, concepts, text_slots):
    """Bytes that recomputing a tower's blocks saves; None: it does so, or cannot."""
    section = plan.config.model[tower]
    if section.get("remat", False):
        return None
    config = copy.deepcopy(plan.config)
    with config.unlocked():
        config.model[tower].remat = True
    try:
        found = estimate_step(config, plan.topology.devices, concepts, text_slots)
    except InputError:
        return None
    share = 1 - found.temporary / plan.estimate.temporary
    return share * plan.memory.temporary if share > 0.02 else None


def _to_divide(plan):
    """fsdp, where the state is much of the memory."""
    memory, sizes = plan.memory, dict(plan.config.mesh)
    devices = plan.topology.devices
    if memory.state < 0.25 * memory.limit or devices // plan.config.mesh.tensor < 2:
        return []
    if sizes["fsdp"] >= devices // plan.config.mesh.tensor:
        return []
    fsdp = devices // plan.config.mesh.tensor
    if plan.topology.chip.kind == "gpu" and plan.topology.hosts > 1:
        fsdp = plan.topology.shape[1] // plan.config.mesh.tensor
    left = memory.state * plan.config.mesh.fsdp / fsdp
    return [
        f"--config.mesh.fsdp={fsdp}: parameters and optimizer state divided, "
        f"{size(left)} a device instead of {size(memory.state)}"
    ]


def _to_hurry(plan):
    times, config, said = plan.times, plan.config, []
    waits = times.waiting / times.step
    if waits > 0.1:
        largest = sorted(
            plan.collectives, key=lambda c: c.bytes * c.count, reverse=True
        )
        what = f"{largest[0].kind} of {size(largest[0].bytes)}" if largest else ""
        said.append(
            f"{waits:.0%} of the step waits for links, most of it {what}: a larger "
            "batch_size has more work for the same exchange"
        )
        if plan.topology.hosts > 1 and plan.topology.chip.kind == "gpu":
            said.append(
                "mesh.data over hosts and mesh.fsdp inside them keeps most of it off "
                "the network"
            )
    if config.model.dtype == "float32":
        chip = plan.topology.chip
        if chip.bf16 > chip.f32 or times.bound == "memory":
            line = "--config.model.dtype=bfloat16: half the memory traffic"
            if chip.bf16 > chip.f32:
                line += (
                    f", and products at {chip.bf16 / 1e12:,.0f} TFLOP/s instead of "
                    f"{chip.f32 / 1e12:,.0f}"
                )
            said.append(line)
    if times.bound == "memory" and plan.rows < 32 and plan.fits:
        said.append(
            f"{plan.rows} rows a device: parameters and optimizer state are read and "
            "written for little work; fewer chips, or a larger batch_size, use them "
            "better"
        )
    warned = plan.compiled.warnings if plan.compiled else []
    if warned:
        said.append(
            "the compiler moves an array whole where its parts would do: "
            f"{warned[0][:160]}"
        )
    return said


def at_batch(config, batch: int):
    """The config with another batch."""
    other = copy.deepcopy(config)
    with other.unlocked():
        other.batch_size = batch
    return other
