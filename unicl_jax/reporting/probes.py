"""Curves of probes over their settings, of few-shot over the shots."""

from collections.abc import Sequence
from typing import Any

from unicl_jax.reporting import svg
from unicl_jax.reporting.headline import percent, protocol_title
from unicl_jax.reporting.markup import Html, el, join, name_of
from unicl_jax.reporting.results import Protocol, mapping, number, numbers, objects
from unicl_jax.reporting.runs import Run

NO_SETTING = frozenset({"val", "epoch", "test", "seconds"})
LINES = 8  # of the second setting; more would not be told apart
LOG = 20  # a setting that spans more than this factor gets a log axis
SYMBOLS = {
    "learning_rate": "learning rate",
    "weight_decay": "weight decay",
    "c": "C",
    "k": "k",
}

Done = Sequence[tuple[int, Run, Protocol]]  # a run's place on the page, the run, ...


def probe(done: Done) -> Html:
    """What a probe tried, what it chose, and what that gave."""
    chosen = [
        el("li", name_of(run.name, 60), ": ", *_chosen(protocol))
        for _, run, protocol in done
    ]
    figures = [f for f in (*(_sweep(run, p) for _, run, p in done), _epochs(done)) if f]
    box = el("div", *figures, class_="figures") if figures else None
    return join(el("ul", *chosen, class_="plain"), box)


def few_shot(done: Done) -> Html:
    """Accuracy over the number of examples a class, runs over each other."""
    shown = [(i, run, _shots(p), number(p.details.get("full"))) for i, run, p in done]
    shown = [x for x in shown if x[2]]
    remarks = {i: list(_remarks(p)) for i, _, p in done}
    if not shown:
        return el("p", "There are no numbers of single shots.", class_="note")
    ends = [v for *_, rows, full in shown for _, m, h in rows for v in (m - h, m + h)]
    ends += [full for *_, full in shown if full is not None]
    shots = [s for *_, rows, _ in shown for s, _, _ in rows]
    x, y = svg.axes(shots, ends, log_x=max(shots) > 4 * min(shots), percent=True)
    said = sorted(set(shots))
    x.ticks = lambda count=5: [(x(s), svg.short_number(s)) for s in said]
    parts = [svg.frame(x, y, "examples a class", "%")]
    items, words = [], []
    for i, run, rows, full in shown:
        style = svg.style_of(i)
        for s, mean, half in rows:
            ends = [y(mean - half), y(mean + half)]
            parts.append(svg.line([x(s)] * 2, ends, class_=style["class_"]))
        at, heights = [x(s) for s, *_ in rows], [y(m) for _, m, _ in rows]
        parts.append(svg.line(at, heights, **style))
        parts.append(svg.dots(at, heights, 6, class_=style["class_"]))
        if full is not None:
            across = svg.line(
                [svg.LEFT, svg.WIDTH - svg.RIGHT], [y(full)] * 2,
                **style | {"stroke_dasharray": "1 4"},
            )  # fmt: skip
            parts.append(across)
        told = ", ".join(
            f"{s:g} examples {percent(m)}" + (f" \u00b1 {percent(h)}" if h else "")
            for s, m, h in rows
        )
        told += f"; all {percent(full)} (dotted)" if full is not None else ""
        items.append(el("li", name_of(run.name, 60), f": {told}", *remarks[i]))
        words.append(f"{run.name}: {told}")
    drawing = svg.svg("Few-shot accuracy in percent. " + "; ".join(words), *parts)
    title = "Few-shot: mean over seeds, 95 % interval"
    figures = el("div", svg.figure(title, drawing), class_="figures")
    return join(el("ul", *items, class_="plain"), figures)


def _shots(protocol):
    rows = [
        (number(r.get("shots")), number(r.get("mean")), number(r.get("interval")) or 0)
        for r in objects(protocol.details.get("few_shot"))
    ]
    return sorted((s, m, h) for s, m, h in rows if s and s > 0 and m is not None)


def _remarks(protocol):
    """What a row of shots says beside its mean."""
    rows = objects(protocol.details.get("few_shot"))
    best = [(number(r.get("shots")), number(r.get("best_test_epoch"))) for r in rows]
    said = ", ".join(f"{s:g} {percent(b)}" for s, b in best if None not in (s, b))
    if said:
        yield el(
            "span", f"; best test epochs, chosen on test data: {said}", class_="warn"
        )
    short = [(number(r.get("shots")), number(r.get("classes_short"))) for r in rows]
    said = ", ".join(f"{c:g} of {s:g}" for s, c in short if s and c)
    if said:
        yield f"; classes with fewer images: {said}"


def _chosen(protocol):
    details = protocol.details
    setting = mapping(details.get("chosen"))
    told = ", ".join(
        f"{SYMBOLS.get(k, k.replace('_', ' '))} {_value(v)}" for k, v in setting.items()
    )
    how = "chosen on validation data: " if objects(details.get("curves")) else ""
    yield f"{how}{told}" if told else "the setting is not known"
    selected = number(details.get("selected"))
    if selected is None:
        selected = protocol.score
    if selected is not None:
        yield join("; ", el("strong", f"test {percent(selected)}"))
    best = mapping(details.get("best_test_epoch"))
    score, epoch = number(best.get("score")), number(best.get("epoch"))
    if score is not None:
        at = f" (epoch {epoch:g})" if epoch is not None else ""
        yield el(
            "span",
            f"; best test epoch {percent(score)}{at}: chosen on test data, as ELEVATER "
            "does, so it is no held-out result",
            class_="warn",
        )
    init = details.get("head_init")
    if init:
        yield f"; head starts from {init}"
    per_seed = numbers(details.get("seeds"))
    if any(v is not None for v in per_seed):
        yield "; seeds " + ", ".join(percent(v) for v in per_seed if v is not None)


def _value(value):
    found = number(value)
    return svg.short_number(found) if found is not None else str(value)


def _sweep(run, protocol):
    """Validation score over the settings: one is x, a second one the lines."""
    given = objects(protocol.details.get("curves"))
    values: dict[str, set[float]] = {}
    for row in given:
        for key, value in row.items():
            if key not in NO_SETTING and number(value) is not None:
                values.setdefault(key, set()).add(number(value))
    axes = sorted(values, key=lambda k: (-len(values[k]), k))[:2]
    if not axes or len(values[axes[0]]) < 2:
        return None
    rows = [
        (number(r.get(axes[0])), number(r.get(axes[-1])), number(r.get("val")))
        for r in given
    ]
    lost = sum(v is None for *_, v in rows)
    rows = [r for r in rows if None not in r]
    if not rows:
        return None
    lines: dict[float | None, list[tuple[float, float]]] = {}
    for a, b, v in sorted(rows):
        lines.setdefault(b if len(axes) > 1 else None, []).append((a, v))
    lines = _best_lines(lines)
    xs = [a for points in lines.values() for a, _ in points]
    positive = [a for a in xs if a > 0]
    log = bool(positive) and max(positive) > LOG * min(positive)
    ys = [v for points in lines.values() for _, v in points]
    x, y = svg.axes(xs, ys, log_x=log, percent=True)
    names = [SYMBOLS.get(a, a.replace("_", " ")) for a in axes]
    parts, key = [svg.frame(x, y, names[0], "validation, %")], []
    for i, (other, points) in enumerate(sorted(lines.items(), key=_by_value)):
        style = _ramp(i, len(lines))
        at, heights = [x(a) for a, _ in points], [y(v) for _, v in points]
        parts.append(svg.line(at, heights, **style))
        parts.append(svg.dots(at, heights, 3.5, class_=style["class_"]))
        if other is not None:
            sample = svg.line((1, 25), (6, 6), **style)
            drawn = el("svg", sample, viewbox="0 0 26 12", aria_hidden="true")
            key.append(el("li", drawn, svg.short_number(other)))
    parts.append(_mark(mapping(protocol.details.get("chosen")), axes, rows, x, y))
    count = f"{len(rows):,} settings; the ring is the chosen one"
    count += f"; {lost:,} diverged" if lost else ""
    words = f"{protocol.title} of {run.name}: validation score over {names[0]}"
    highest = max(rows, key=lambda r: r[2])
    words += f"; the best is {percent(highest[2])} % at {svg.short_number(highest[0])}"
    title = join(f"{protocol_title(protocol.name)}, ", name_of(run.name, 40))
    legend = el("ul", el("li", f"{names[-1]}:"), *key, class_="legend") if key else None
    drawn = svg.svg(words, *parts)
    return svg.figure(title, join(legend, drawn), count)


def _best_lines(lines):
    """So many as can be told apart: those that reach most."""
    best = sorted(lines, key=lambda k: -max(v for _, v in lines[k]))[:LINES]
    return {k: v for k, v in lines.items() if k in best}


def _by_value(item):
    return item[0] is not None, item[0] or 0


def _ramp(i, count):
    """From one end of an ordered scale to the other."""
    step = round(i * 7 / max(count - 1, 1))
    dash = (None, "7 3", "2 3")[i % 3]
    return {"class_": f"r{step}", "stroke_dasharray": dash}


def _mark(chosen: dict[str, Any], axes, rows, x, y):
    wanted = [number(chosen.get(a)) for a in axes]
    for a, b, v in rows:
        given = (a, b)[: len(axes)]
        if None not in wanted and all(
            abs(g - w) <= 1e-6 * max(abs(w), 1e-30) or g == w
            for g, w in zip(given, wanted, strict=True)
        ):
            return el("circle", class_="ring", cx=svg.at(x(a)), cy=svg.at(y(v)), r=6)
    return None


def _epochs(done):
    """The final trainings: the test score over their epochs."""
    lines = []
    for i, run, protocol in done:
        rows = objects(protocol.details.get("epochs"))
        found = [(number(r.get("epoch")), number(r.get("test"))) for r in rows]
        points = sorted((e, t) for e, t in found if None not in (e, t))
        if len(points) > 1:
            lines.append((i, run, points))
    if not lines:
        return None
    x, y = svg.axes(
        [e for *_, points in lines for e, _ in points],
        [t for *_, points in lines for _, t in points],
        percent=True,
    )
    parts, words = [svg.frame(x, y, "epoch", "test, %")], []
    for i, run, points in lines:
        at, heights = [x(e) for e, _ in points], [y(t) for _, t in points]
        parts.append(svg.line(at, heights, **svg.style_of(i)))
        ends = [percent(points[k][1]) for k in (0, -1)]
        words.append(f"{run.name} from {ends[0]} to {ends[1]} %")
    told = "test score over the epochs of the final training: " + "; ".join(words)
    note = "Looked at afterwards: nothing was chosen by it but the best test epoch."
    return svg.figure("Final training", svg.svg(told, *parts), note)
