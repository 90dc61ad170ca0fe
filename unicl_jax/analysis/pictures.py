"""The pictures a run leaves behind."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from unicl_jax import storage
from unicl_jax.data.records import Request
from unicl_jax.evaluation import Scores, ZeroShotTask

COLUMNS = 8  # examples in a row of the predictions
ROWS = 4
RIGHT, WRONG = "#1b7837", "#b2182b"  # told apart by colour-blind readers too


def _pyplot():
    """Matplotlib without a window; imported here, since it takes half a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_curves(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Loss and excess loss, and the accuracy of each evaluation, over the steps.

    Args:
      rows: the lines of `metrics.jsonl`.
      path: of the PNG.
    """
    pyplot = _pyplot()
    keys = [k for r in rows for k in r if k.startswith("eval/") and k.endswith("_top1")]
    panels = 2 if keys else 1
    figure, grid = pyplot.subplots(
        1, panels, figsize=(5 * panels, 4), layout="constrained", squeeze=False
    )
    left, right = grid[0, 0], grid[0, -1]
    for key, style in (("loss", "-"), ("excess", "--")):
        points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
        if points:
            left.plot(*zip(*points, strict=True), style, label=key)
    left.set(xlabel="step", ylabel="nats", title="training loss", ylim=(0, None))
    for key in dict.fromkeys(keys):
        points = [(r["step"], 100 * r[key]) for r in rows if r.get(key) is not None]
        label = key.removeprefix("eval/").removesuffix("_top1").replace("_", " ")
        right.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
    if keys:
        right.set(
            xlabel="step", ylabel="top-1, %", title="held-out accuracy", ylim=(0, 100)
        )
    for axes in grid[0]:
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
    with storage.written_whole(path, "wb") as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)


def draw_predictions(
    tasks: Sequence[ZeroShotTask], scores: Mapping[str, Scores], path: Path
) -> None:
    """Held-out images with the name the model gives each, right or wrong.

    Args:
      tasks: the evaluations; up to four that name images get a row, a single one gets
        all four.
      scores: by task.
      path: of the PNG; nothing is drawn if there are no such tasks.
    """
    tasks = [task for task in tasks if "top1" in scores[task.name].metrics]
    if not tasks:
        return
    pyplot = _pyplot()
    shown = tasks[:ROWS]
    shown = shown if len(shown) > 1 else shown * ROWS
    figure, grid = pyplot.subplots(
        len(shown),
        COLUMNS,
        figsize=(1.4 * COLUMNS, 2.3 * len(shown) + 0.4),
        squeeze=False,
    )
    figure.subplots_adjust(0.01, 0.09, 0.99, 0.89, wspace=0.12, hspace=0.75)
    for r, (task, axes_row) in enumerate(zip(shown, grid, strict=True)):
        score, names = scores[task.name], task.source.class_names
        rng = np.random.default_rng(r)
        size = min(COLUMNS, len(score.labels))
        picks = np.sort(rng.choice(len(score.labels), size, replace=False))
        request = Request(picks, np.zeros(size, np.uint32))
        images = next(iter(task.source.stream([request]))).images
        for axes in axes_row:
            axes.axis("off")
        for axes, image, i in zip(axes_row, images, picks, strict=False):
            guess, truth = score.predictions[i, 0], score.labels[i]
            right = guess == truth
            text = _short(names[guess])
            if not right:
                text += "\n(" + _short(names[truth]) + ")"
            axes.imshow(image, interpolation="nearest")
            axes.text(
                *(0.5, -0.06, text),
                color=RIGHT if right else WRONG,
                fontsize=7.5,
                ha="center",
                va="top",
                transform=axes.transAxes,
            )
        share = f"{score.metrics['top1']:.1%} of {len(score.labels):,}"
        axes_row[0].text(
            0,
            1.06,
            f"{task.name.replace('_', ' ')}: {share}"
            f" right, {task.ways:,} names to choose from",
            transform=axes_row[0].transAxes,
            fontsize=9,
        )
    figure.suptitle(
        "Evaluation images: the name given, and in brackets the right one", fontsize=10
    )
    with storage.written_whole(path, "wb") as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)


def _short(name):
    """At most two lines; a dollar sign is a dollar sign, not mathematics."""
    lines = textwrap.wrap(name, 18)[:2] or [""]
    return "\n".join(lines).replace("$", r"\$")
