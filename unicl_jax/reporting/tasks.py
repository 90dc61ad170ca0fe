"""The part of the page that is about one task."""

from collections.abc import Callable, Sequence

from unicl_jax.reporting import examples, maps, probes
from unicl_jax.reporting.headline import percent, protocol_title
from unicl_jax.reporting.markup import Html, el, join, name_of
from unicl_jax.reporting.results import (
    METRICS,
    Protocol,
    Task,
    in_known_order,
    is_rank,
    metrics_of,
    numbers,
    objects,
    whole,
)
from unicl_jax.reporting.runs import Run

FEW_CLASSES = 25  # that get bars
PROBES = ("linear_probe", "logistic_probe", "knn", "fine_tune")


def task_section(
    suite: str,
    of_runs: Sequence[Task | None],
    runs: Sequence[Run],
    id_: str,
    is_open: bool,
    points: int,
    pairs: int,
    say: Callable[[str], None],
) -> Html:
    """All there is of a task.

    Args:
      suite: whose it is.
      of_runs: the task as each run has it.
      runs: of the page.
      id_: of the section.
      is_open: whether it is unfolded at first.
      points: of a map; 0: none.
      pairs: confused pairs with pictures, of each run.
      say: told what takes long.

    Returns:
      A `details` element.
    """
    there = [
        (i, run, task)
        for i, (run, task) in enumerate(zip(runs, of_runs, strict=True))
        if task
    ]
    one = there[0][2]
    head = el("summary", el("h3", name_of(one.title, 120)), _about(one))
    parts: list[Html | None] = []
    for _, run, task in there:
        if task.missing:
            said = "; ".join(v.strip().rstrip(".;") for v in task.missing.values())
            parts.append(
                el("p", name_of(run.name), f": no data. {said}.", class_="note")
            )
    used = list(dict.fromkeys(p for *_, task in there for p in task.protocols))
    main = next((name for name in ("zero_shot", *PROBES) if name in used), "")
    for name in used:
        done = [(i, r, t.protocols[name]) for i, r, t in there if name in t.protocols]
        parts.append(el("h4", protocol_title(name)))
        for _, run, p in done:
            if p.problem:
                parts.append(
                    el("p", name_of(run.name), f": {p.problem}", class_="note")
                )
        parts.append(metrics_table(done))
        if name == "few_shot":
            parts.append(probes.few_shot(done))
        elif name == "retrieval":
            parts += _retrieval(there, done)
        elif name in PROBES or any(p.details.get("curves") for *_, p in done):
            parts.append(probes.probe(done))
        if name == main:
            parts.append(_templates(done))
            parts.append(per_class(there, name))
            parts += _confused(there, name, pairs)
        elif name in PROBES:
            bars = per_class(there, name)
            if bars:
                folded = el("details", el("summary", "Per class"), bars)
                parts.append(folded)
    if points:
        parts.append(_maps(there, points, say))
    if not used and not one.missing:
        parts.append(el("p", "Not run yet; evaluate goes on where it stopped."))
    return el("details", head, *parts, id=id_, class_="task", open=is_open)


def metrics_table(done: Sequence[tuple[int, Run, Protocol]]) -> Html | None:
    """The numbers of a protocol, a row each, a column a run; None if there are none."""
    values = [metrics_of(p.details) for *_, p in done]
    keys = in_known_order(k for v in values for k in v)
    if not keys:
        return None
    heads = [el("th", name_of(r.name, 40), scope="col", class_="n") for _, r, _ in done]
    rows = [
        el(
            "tr",
            el("th", METRICS.get(key, key), scope="row"),
            [el("td", _value(key, v.get(key)), class_="n") for v in values],
        )
        for key in keys
    ]
    head = el("thead", el("tr", el("th", "%", scope="col"), heads))
    table = el("table", head, el("tbody", *rows))
    said = f"{done[0][2].title}: metrics in percent"
    return el(
        "div", table, class_="scroll", role="region", aria_label=said, tabindex="0"
    )


def per_class(there: Sequence[tuple[int, Run, Task]], protocol: str) -> Html | None:
    """Bars of the accuracy of each class, where there are few; None where not."""
    found = []
    for i, run, task in there:
        if protocol in task.protocols:
            details = task.protocols[protocol].details
            values = numbers(details.get("per_class"))
            if 1 < len(values) <= FEW_CLASSES:
                found.append((i, run, values, details.get("per_class_records")))
    if not found:
        return None
    task, size = there[0][2], max(len(v) for *_, v, _ in found)
    rows = []
    for k in range(size):
        bars = []
        for i, run, values, _ in found:
            value = values[k] if k < len(values) else None
            if value is None:
                bars.append(
                    el("div", el("span", "\u2014", class_="none"), class_="bar")
                )
                continue
            share = min(max(value, 0.0), 1.0)
            width = f"width:calc((100% - 3em)*{share:.3f})"
            bar = el("i", style=width, class_=f"c{i % 8}", title=run.name)
            whose = el("span", f"{run.name}: ", class_="unseen")
            said = el("span", percent(value))
            bars.append(el("div", bar, whose if len(found) > 1 else None, said,
                           class_="bar"))  # fmt: skip
        name = examples.class_name(task, k)
        head = el("th", name_of(name, 60), scope="row")
        rows.append(el("tr", head, el("td", *bars)))
    counts = numbers(found[0][3])
    each = {c for c in counts if c}
    told = f" ({min(each):g} to {max(each):g} records a class)" if len(each) > 1 else ""
    told = f" ({min(each):g} records a class)" if len(each) == 1 else told
    metric = "Average precision" if task.kind == "multi_label" else "Accuracy"
    caption = el("caption", f"{metric} of each class, %{told}")
    return el("table", caption, el("tbody", *rows), class_="bars")


def _value(key, value):
    if value is not None and is_rank(key):
        return f"{value:,.0f}"
    return percent(value)


def _about(task):
    records = [
        f"{whole(v):,} {k}" for k, v in task.records.items() if whole(v) is not None
    ]
    parts = [f"{task.classes:,} classes" if task.classes else "", ", ".join(records)]
    if task.chance is not None:
        parts.append(f"chance {percent(task.chance, 2)} %")
    return el("small", " \u00b7 ".join(p for p in parts if p))


def _templates(done):
    given = done[0][2].details.get("templates")
    if not isinstance(given, list) or not given:
        return None
    shown = [join("\u201c", name_of(t, 80), "\u201d ") for t in given[:5]]
    more = f"and {len(given) - 5:,} more" if len(given) > 5 else None
    return el("p", f"Templates ({len(given):,}): ", *shown, more, class_="note")


def _confused(there, name, pairs):
    known = False
    for _, run, task in there:
        protocol = task.protocols.get(name)
        found = examples.confusions(task, protocol, pairs) if protocol else None
        if found:
            yield join(el("h5", "Most confused, ", name_of(run.name, 60)), found)
            known = known or bool(objects(protocol.details.get("confusions")))
    if known:
        yield el(
            "p",
            "\u2717 taken for the second class; \u2713 named right, one of each class.",
            class_="note",
        )


def _retrieval(there, done):
    for _, run, task in there:
        protocol = task.protocols.get("retrieval")
        found = examples.retrieval(task, protocol) if protocol else None
        if found:
            yield join(el("h5", "Examples, ", name_of(run.name, 60)), found)


def _maps(there, points, say):
    figures = []
    for _, run, task in there:
        if task.missing or task.kind == "retrieval":
            continue
        say(f"map of {task.name}, {run.name}")
        found = maps.make_map(task, points)
        if found is not None:
            figures.append(maps.map_figure(found, task, run.name))
    if not figures:
        return None
    head = el("h4", "Image and text features")
    return join(head, el("div", *figures, class_="figures maps"))
