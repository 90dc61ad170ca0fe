"""Training curves: runs over each other."""

from collections.abc import Sequence

from unicl_jax.reporting import svg
from unicl_jax.reporting.markup import Html, el, join, name_of
from unicl_jax.reporting.runs import Run
from unicl_jax.reporting.series import Series, series

# Scalar, title, unit; of the first two the second is shown where there is one.
SCALARS = (
    ("loss", "Loss", "nats"),
    ("excess", "Excess loss: above its floor", "nats"),
    ("logit_scale", "logit_scale", "s"),
    ("learning_rate", "Learning rate", ""),
    ("grad_norm", "Gradient norm", ""),
    ("images_per_second", "Images per second", ""),
)


def training(runs: Sequence[Run]) -> Html:
    """The section of the page.

    Args:
      runs: all of the page, so that colours are those of its legend.

    Returns:
      Figures; a sentence where no run has metrics.
    """
    if not any(run.rows for run in runs):
        said = "No run here has a metrics.jsonl with steps: there are no curves."
        return el("p", said, class_="note")
    figures = [_overlaid(runs, key, title, unit) for key, title, unit in SCALARS]
    for task in evaluated(runs):
        title = f"Top-1 while training: {task.replace('_', ' ')}"
        figures.append(_overlaid(runs, f"eval/{task}_top1", title, "%"))
    return join(
        legend(runs),
        el("div", *[f for f in figures if f is not None], class_="figures"),
    )


def evaluated(runs: Sequence[Run]) -> list[str]:
    """The tasks that runs were evaluated on as they trained, in order of appearance."""
    names: dict[str, None] = {}
    for run in runs:
        for row in run.rows:
            for key in row:
                if key.startswith("eval/") and key.endswith("_top1"):
                    names[key.removeprefix("eval/").removesuffix("_top1")] = None
    return list(names)


def legend(runs: Sequence[Run]) -> Html:
    """Which line is which run's."""
    entries = []
    for i, run in enumerate(runs):
        sample = el(
            "svg",
            svg.line((1, 25), (6, 6), **svg.style_of(i)),
            viewbox="0 0 26 12",
            aria_hidden="true",
        )
        entries.append(el("li", sample, name_of(run.name, 60)))
    return el("ul", *entries, class_="legend")


def _overlaid(runs, key, title, unit):
    lines = [(i, run, series(run.rows, key)) for i, run in enumerate(runs)]
    lines = [(i, run, found) for i, run, found in lines if found is not None]
    if not lines:
        return None
    shown = [(i, run, found) for i, run, found in lines if found.x]
    notes = [
        f"{run.name}: {found.left_out:,} of its values were not finite, and are left "
        "out."
        for _, run, found in lines
        if found.left_out
    ]
    if not shown:
        return svg.figure(title, Html(""), *notes)
    percent = unit == "%"
    x, y = svg.axes(
        [s for *_, found in shown for s in (found.x[0], found.x[-1])] + [0],
        [v for *_, found in shown for v in found.low + found.high],
        percent=percent,
        from_zero=percent or key in ("learning_rate", "images_per_second"),
    )
    parts = [svg.frame(x, y, "step", unit)]
    for i, run, found in shown:
        parts.append(_line(i, run, found, x, y))
    return svg.figure(title, svg.svg(_words(title, shown, percent), *parts), *notes)


def _line(i, run, found: Series, x, y):
    style = svg.style_of(i)
    at = [x(v) for v in found.x]
    parts = [el("title", run.name)]
    if found.low != found.high:
        lows, highs = ([y(v) for v in ends] for ends in (found.low, found.high))
        parts.append(svg.band(at, lows, highs, class_=f"band {style['class_']}"))
    heights = [y(v) for v in found.y]
    if len(at) <= 12:
        parts.append(svg.dots(at, heights, 4.5, class_=style["class_"]))
    parts.append(svg.line(at, heights, **style))
    return el("g", *parts)


def _words(title, shown, percent):
    def said(value):
        return f"{100 * value:.1f} %" if percent else svg.short_number(value)

    ends = "; ".join(
        f"{run.name} from {said(f.y[0])} to {said(f.y[-1])} at step {f.x[-1]:,.0f}"
        for _, run, f in shown[:6]
    )
    return f"{title} over the steps: {ends}"
