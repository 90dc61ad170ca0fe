"""The tables of `step.py`, for the terminal and for docs/performance.md."""

import statistics

from benchmarks.harness import shared_with_others

MIB = 2**20


def table(found):
    """The figures of one JSON file as rows of text: a name, ours, each peer."""
    results = found["results"]

    def row(name, value, ratio=True):
        cells = [value(result) for result in results.values()]
        texts = []
        for cell in cells:
            text = "" if cell is None else _number(cell)
            if ratio and cell is not None and cell is not cells[0] and cells[0]:
                text += f" ({cell / cells[0]:.2f} x)"
            texts.append(text)
        return [name, *texts]

    def milliseconds(part):
        return lambda result: 1e3 * result["seconds"][part]["median"]

    def split(part):
        return lambda result: 1e3 * result["split"][part]

    def memory(result):
        memory = result["memory"]
        return (memory["device_bytes"] or memory["process_stepping_bytes"]) / MIB

    def compiling(result):
        first = result["compile"].get("first_step_seconds")
        if first is None:
            compiled = result["compile"]
            return compiled["trace_seconds"] + compiled["compile_seconds"]
        return max(0.0, first - result["seconds"]["step"]["median"])

    ours = results["ours"]
    rows = [
        ["data, ms", _number(1e3 * ours["seconds"]["data"]["median"])],
        row("transfer, ms", milliseconds("transfer"), ratio=False),
        row("forward, ms", split("forward")),
        row("backward, ms", split("backward")),
        row("update, ms", split("update")),
        row("whole step, ms", milliseconds("step")),
        ["  least to most"]
        + [
            f"{_number(1e3 * s['min'])} to {_number(1e3 * s['max'])}"
            for s in (result["seconds"]["step"] for result in results.values())
        ],
        row("images/s", lambda result: result["images_per_second"]),
        row("compiling, s", compiling, ratio=False),
        row("peak memory, MiB", memory),
    ]
    trainer = found["trainer"]
    if trainer:
        seconds = [run["trainer_step_seconds"] for run in trainer["runs"]]
        rows.append(["trainer's step, ms", _number(1e3 * statistics.median(seconds))])
        rows.append(["  over the step", f"{100 * trainer['overhead']:+.1f} %"])
    width = 1 + len(results)
    names = [
        f"torch {name}, {result['model']}" if name != "ours" else "unicl_jax"
        for name, result in results.items()
    ]
    return [["", *names]] + [row + [""] * (width - len(row)) for row in rows]


def title(found):
    """One line: what was measured, on what."""
    machine = found["machine"]
    device = f"{machine['cpu']}, {machine['cores']} core"
    device += "s" * (machine["cores"] > 1)
    if machine["backend"] != "cpu":
        device = f"{machine['devices']} x {machine['device_kind']}"
    busy = shared_with_others(machine)
    return (
        f"{found['recipe']}: {found['image_size']} px, batch {found['batch_size']}, "
        f"{found['text_rows']} texts of {found['text_slots']}, {found['dtype']}; "
        f"{device}" + " (shared with other work)" * busy
    )


def _number(x):
    """Three figures or so, with thousands separated."""
    if abs(x) >= 100:
        return f"{x:,.0f}"
    return f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"
