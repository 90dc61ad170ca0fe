"""A plan for people: at most 80 columns; and for programs."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unicl_jax.checks.report import Section, percent, show, size, some
from unicl_jax.planning import network, roofline
from unicl_jax.planning.advice import Largest
from unicl_jax.planning.estimate import LEAST, MOST
from unicl_jax.planning.plans import USABLE, Plan

SHOWN = 8  # kinds of collectives


def sections(
    plan: Plan, largest: Largest, todo: list[str]
) -> Iterator[Section | Table]:
    """The report, part by part.

    Args:
      plan: what is reported.
      largest: the largest batch.
      todo: what to change.

    Yields:
      Sections and tables.
    """
    yield _run(plan)
    yield _memory(plan)
    if plan.fits or not plan.compiled:
        yield from _collectives(plan)
        yield _time(plan)
    yield _batch(plan, largest)
    if todo:
        section = Section("what to change")
        for line in todo:
            section.note(line)
        yield section
    yield _assumed(plan)


def print_report(console: Console, parts) -> None:
    """Prints sections as the doctor's, and tables."""
    for part in parts:
        if isinstance(part, Section):
            show(console, part)
        else:
            console.print(part)
            console.print()


def seconds(value: float) -> str:
    """Seconds as 3.2 us, 41 ms, 1.3 s."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale or unit == "us":
            number = value / scale
            return f"{number:.{0 if number >= 9.95 else 1}f} {unit}"
    raise AssertionError


def duration(value: float) -> str:
    """Seconds as 3.2 days, 11 hours, 5.0 minutes, 20 seconds."""
    for unit, scale in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        if value >= scale or unit == "second":
            number = value / scale
            return f"{number:,.{0 if number >= 9.95 else 1}f} {unit}s"
    raise AssertionError


def _run(plan):
    config, topology = plan.config, plan.topology
    section = Section("run")
    chip = topology.chip
    things = "GPU" if chip.kind == "gpu" else "chip"
    section.good(
        f"{topology.name}: {some(topology.chips, things)}, {chip.title}, "
        f"{some(topology.hosts, 'host')}"
        + (f", {topology.devices} devices" if chip.devices > 1 else "")
    )
    mesh = {**config.mesh}
    mesh["data"] = topology.devices // (mesh["fsdp"] * mesh["tensor"])
    axes = ", ".join(f"{k} {v}" for k, v in mesh.items() if v > 1 or k == "data")
    section.good(
        f"batch_size {config.batch_size:,}: {some(plan.rows, 'row')} a device "
        f"(mesh: {axes}), {config.total_steps:,} steps"
    )
    section.good(
        f"{config.model.image.name} and {config.model.text.name}, "
        f"{plan.estimate.whole / 4e6:,.1f} million parameters, {config.model.dtype}, "
        f"{config.optimizer.name}, objective {config.objective}"
    )
    if plan.compiled:
        section.good(
            f"compiled for it in {plan.compiled.compile_seconds:,.0f} s, traced in "
            f"{plan.compiled.lower_seconds:,.0f} s"
        )
    else:
        section.note("estimated by tracing; nothing was compiled")
    return section


def _memory(plan):
    memory = plan.memory
    section = Section("memory of a device")
    held = [
        ("parameters", memory.parameters),
        ("optimizer", memory.optimizer),
        ("batch statistics and averages", memory.other),
        ("batch", memory.batch),
        ("activations, gradients and all else in a step", memory.temporary),
        ("program", memory.code),
    ]
    for name, count in held:
        if count >= 0.001 * memory.total:
            section.note(f"{size(count):>7}  {name}")
    total, limit = memory.total, memory.limit
    text = f"{size(total)} of {size(limit)}: "
    if plan.fits:
        section.good(f"{text}fits, {size(max(0, limit - total))} left")
    else:
        section.fail(f"{text}does not fit, {size(total - limit)} too much")
    if plan.compiled:
        for line in plan.compiled.largest[:4]:
            section.note(f"among the largest: {line}")
    return section


def _collectives(plan):
    groups: dict[tuple, list] = {}
    for one in plan.collectives:
        if one.devices > 1:
            hidden = one.hidden is not None
            key = one.kind, one.devices, hidden, _origin(one)
            groups.setdefault(key, []).append(one)
    section = Section("collectives, of each step")
    if not groups:
        section.good("none: one device")
        yield section
        return
    table = Table.grid(padding=(0, 2), pad_edge=True)
    for _ in range(4):
        table.add_column(justify="right")
    table.add_column()
    rows = []
    for (kind, devices, hidden, origin), all_of in groups.items():
        total = sum(c.bytes * c.count for c in all_of)
        taken = sum(network.seconds(c, plan.topology) * c.count for c in all_of)
        count = sum(c.count for c in all_of)
        rows.append((total, taken, kind, devices, hidden, count, origin))
    rows.sort(key=lambda row: row[:2], reverse=True)
    for total, taken, kind, devices, hidden, count, origin in rows[:SHOWN]:
        table.add_row(
            f"{count:,.0f} x",
            size(total),
            seconds(taken),
            f"{devices:,}",
            f"{kind}{origin and f', {origin}'}{' (beside work)' if hidden else ''}",
        )
    title = Table.grid()
    title.add_row(Text("collectives of a step: how many, bytes, time, devices", "bold"))
    title.add_row(table)
    if len(rows) > SHOWN:
        title.add_row(Text(f" and {len(rows) - SHOWN} smaller kinds"))
    yield title


def _origin(collective):
    """What a collective is for, as far as its name tells."""
    what = collective.what
    if "shard_map" in what:
        return "loss"
    if "params[" in what:
        return "weights"
    return "gradients" if "transpose(" in what else what if "(" not in what else ""


def _time(plan):
    times, chip = plan.times, plan.topology.chip
    section = Section("time of a step")
    per_second = plan.flops / times.step if times.step else 0.0
    peak = (chip.bf16 if plan.config.model.dtype == "bfloat16" else chip.f32) / (
        chip.devices
    )
    section.note(
        f"{seconds(times.products):>7}  products: {plan.flops / 1e12:,.2f} TFLOP a "
        "device, at the peak"
    )
    section.note(
        f"{seconds(times.memory):>7}  memory: {size(plan.bytes)} read and written, at "
        "the peak"
    )
    section.note(f"{seconds(times.work):>7}  work: {_of_work(plan)}")
    section.note(
        f"{seconds(times.links):>7}  links, of which {seconds(times.waiting)} are "
        "waited for"
    )
    section.good(
        f"{seconds(times.step)} a step: {plan.images_per_second:,.0f} images/s, "
        f"{percent(per_second / peak)} of the peak; {duration(86400 * plan.days)} for "
        f"{plan.config.total_steps:,} steps"
    )
    section.good(
        f"bound by {_BOUNDS[times.bound]}; {percent(times.efficiency)} of what so many "
        "lone chips would do"
    )
    if times.waiting > 0.02 * times.step:
        section.note(
            f"if all exchange were beside work: {seconds(times.overlapped)}; if none: "
            f"{seconds(times.serial)}"
        )
    return section


_BOUNDS = {
    "products": "matrix products",
    "memory": "memory bandwidth",
    "links": "links between chips",
}


def _of_work(plan):
    if plan.program and plan.program.cycles and plan.topology.chip.clock:
        return f"the compiler's estimate at {plan.topology.chip.clock / 1e9:g} GHz"
    return (
        f"each operation at {roofline.PRODUCTS:.0%} of the products' peak or "
        f"{roofline.MEMORY:.0%} of the memory's"
    )


def _batch(plan, largest):
    section = Section("largest batch")
    if largest.tried:
        for batch, good in largest.tried:
            fits = "fits" if good else "does not fit"
            section.note(f"{batch:,}: compiled, {fits}")
    if largest.batch:
        a_device = largest.batch * plan.rows // plan.config.batch_size
        section.good(
            f"batch_size {largest.batch:,}, {some(a_device, 'row')} a device: "
            f"{largest.how}"
        )
    else:
        section.fail("none fits")
    return section


def _assumed(plan):
    section = Section("what this rests on")
    for line in plan.estimate.assumed:
        section.note(line)
    if not plan.compiled:
        section.note(
            f"an estimate: compiled steps held {LEAST} to {MOST} times as much of "
            "activations, gradients and the rest; so much may the largest batch be off"
        )
    if plan.compiled and plan.compiled.flags:
        section.note(f"LIBTPU_INIT_ARGS: {plan.compiled.flags}")
    if plan.topology.chip.kind == "gpu":
        section.note(
            f"JAX takes {USABLE['gpu']:.0%} of a GPU's memory: "
            "XLA_PYTHON_CLIENT_MEM_FRACTION"
        )
    if plan.program and None in plan.program.loops:
        section.note("loops whose length the program does not say count once")
    if plan.config.mesh.tensor > 1 and not plan.compiled:
        section.note(
            "mesh.tensor: its sums inside blocks, and what it saves of activations, "
            "are not estimated: --compile"
        )
    section.note(f"{plan.topology.chip.title}: {plan.topology.chip.sources}")
    section.note(
        "no evaluation, no checkpoint, and data that is there in time: "
        "python -m benchmarks.data"
    )
    return section


def to_json(plan: Plan, largest: Largest, todo: list[str]) -> dict[str, Any]:
    """The report as what json takes.

    Args:
      plan: what is reported.
      largest: the largest batch.
      todo: what to change.

    Returns:
      Nested dicts; bytes, seconds and FLOPs as they are.
    """
    memory, times, topology = plan.memory, plan.times, plan.topology
    found = dict(
        topology=topology.name,
        chip=topology.chip.title,
        chips=topology.chips,
        devices=topology.devices,
        hosts=topology.hosts,
        how=plan.how,
        fits=plan.fits,
        batch_size=plan.config.batch_size,
        rows_per_device=plan.rows,
        memory={
            **vars(memory),
            "total": memory.total,
        },
        flops_per_device=plan.flops,
        bytes_per_device=plan.bytes,
        largest_batch=largest._asdict(),
        change=todo,
        assumed=plan.estimate.assumed,
    )
    found["collectives"] = [
        {**vars(c), "seconds": network.seconds(c, topology)} for c in plan.collectives
    ]
    if plan.fits or not plan.compiled:
        found["times"] = {
            **vars(times),
            **dict(step=times.step, overlapped=times.overlapped, serial=times.serial),
            **dict(efficiency=times.efficiency, bound=times.bound),
            "images_per_second": plan.images_per_second,
            "days": plan.days,
        }
    if plan.compiled:
        found["compiled"] = dict(
            seconds=plan.compiled.compile_seconds,
            cost={
                k: plan.compiled.cost[k]
                for k in ("flops", "bytes accessed")
                if k in plan.compiled.cost
            },
            loops=plan.program.loops if plan.program else [],
            warnings=plan.compiled.warnings,
            flags=plan.compiled.flags,
            largest=list(plan.compiled.largest),
        )
    return found
