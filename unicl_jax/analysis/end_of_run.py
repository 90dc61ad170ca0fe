"""What a run ends with: a table of its evaluations and two pictures."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from unicl_jax import metrics
from unicl_jax.analysis import pictures
from unicl_jax.data import quickstart
from unicl_jax.evaluation import FeatureTask, Scores, ZeroShotTask, pixel_nearest


def end_of_run(
    workdir: Path,
    tasks: Sequence[ZeroShotTask | FeatureTask],
    scores: Mapping[str, Scores],
    config: Mapping,
) -> Iterator[Table | str]:
    """Draws `curves.png` and `predictions.png`, and makes the table.

    Args:
      workdir: of the run; its `metrics.jsonl` is read.
      tasks: the evaluations.
      scores: of the final model, by task.
      config: the config's `evaluations`: the quick start's sets get a baseline.

    Yields:
      What to print: the table, one row a task, if there are some; what lies where.
    """
    pictures.draw_curves(metrics.read(workdir), workdir / "curves.png")
    if not tasks:
        yield f"curves.png and metrics.jsonl: {workdir}"
        return
    pictures.draw_predictions(tasks, scores, workdir / "predictions.png")
    nearest = {
        task.name: quickstart_nearest(config[task.name]["path"])
        for task in tasks
        if config[task.name].get("format") == "quickstart"
        and not config[task.name].get("part")  # of the training set, for validation
        and task.ways
    }
    named = [task for task in tasks if "top1" in scores[task.name].metrics]
    if named:
        yield evaluation_table(named, scores, nearest)
    for task in tasks:
        if task not in named:
            found = scores[task.name].metrics.items()
            yield f"{task.name}: " + ", ".join(f"{k} {100 * x:.1f} %" for k, x in found)
    yield f"curves.png, predictions.png and metrics.jsonl: {workdir}"


def quickstart_nearest(name: str) -> tuple[float, float]:
    """Pixel nearest neighbours on one of the quick start's evaluation sets.

    Args:
      name: a key of `quickstart.EVALUATION_SETS`.

    Returns:
      Top-1 and top-5 as fractions.
    """
    held_out = quickstart.evaluation_set(name)
    return pixel_nearest(
        *quickstart.training_examples(name), held_out.images, held_out.labels
    )


def evaluation_table(
    tasks: Sequence[ZeroShotTask | FeatureTask],
    scores: Mapping[str, Scores],
    nearest: Mapping[str, tuple[float, float]],
) -> Table:
    """Scores in percent, one row a task.

    Args:
      tasks: the evaluations that have a top-1.
      scores: by task.
      nearest: top-1 and top-5 of pixel nearest neighbours, for some tasks.

    Returns:
      A rich table that fits 80 columns.
    """
    table = Table()
    ways = {task.by for task in tasks}
    table.add_column(f"task, by {min(ways)}" if len(ways) == 1 else "task")
    headers = ["ways", "top-1 %", "top-5 %", "chance %"]
    for header in headers + ["pixel 1-NN %"] * bool(nearest):
        table.add_column(header, justify="right")
    for task in tasks:
        score = scores[task.name]
        cells = [
            task.name if len(ways) == 1 else f"{task.name}, by {task.by}",
            f"{task.ways:,}",
            f"{100 * score.metrics['top1']:.1f}",
            f"{100 * score.metrics['top5']:.1f}",
            f"{100 / task.ways:.2f}",
        ]
        if task.name in nearest:
            cells.append(" / ".join(f"{100 * x:.1f}" for x in nearest[task.name]))
        table.add_row(*cells)
    return table
