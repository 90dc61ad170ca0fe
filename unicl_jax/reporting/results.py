"""Reading what `evaluate` wrote, of which any part may be missing or damaged."""

import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unicl_jax.errors import InputError

# What NumPy raises at files that are cut off, no archive, or of another kind.
_DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    TypeError,
    AttributeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
# Names for people.
PROTOCOLS = {
    "zero_shot": "zero-shot",
    "linear_probe": "linear probe",
    "logistic_probe": "logistic probe",
    "knn": "k-NN",
    "few_shot": "few-shot",
    "fine_tune": "fine-tuning",
    "retrieval": "retrieval",
}
METRICS = {
    "accuracy": "top-1",
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "roc_auc": "ROC AUC",
    "map11": "11-point mAP",
    "map": "mAP",
    "validation": "validation",
    "best_test_epoch": "best test epoch (chosen on test data)",
    **{
        f"{a}_to_{b}_r{k}": f"{a} to {b} R@{k}"
        for a, b in (("image", "text"), ("text", "image"))
        for k in (1, 5, 10)
    },
    "image_to_text_median_rank": "image to text, median rank",
    "text_to_image_median_rank": "text to image, median rank",
}


@dataclass
class Protocol:
    """How a model did on a task by one protocol.

    Attributes:
      score: a fraction; None if it failed or is not a number.
      interval: half the width of its 95 % interval, or None.
      details: all that is known: the summary, and the protocol's own file over it.
      problem: why there is no score or no file, in a sentence; or None.
      arrays: path of its arrays; they may not be there.
    """

    name: str
    score: float | None
    interval: float | None
    details: dict[str, Any]
    problem: str | None
    arrays: Path

    @property
    def title(self) -> str:
        """Its name for people."""
        return PROTOCOLS.get(self.name, self.name.replace("_", " "))


@dataclass
class Task:
    """A row of a suite.

    Attributes:
      name: of the task; `title` for people.
      folder: where its arrays lie.
      class_names: in the order of its labels; [] if unknown.
      missing: why, how and where, if its data was not there.
      skipped: why a protocol does not fit it, by name.
      protocols: by name.
    """

    name: str
    title: str
    folder: Path
    kind: str
    metric: str
    records: dict[str, Any]
    class_names: list[str]
    classes: int | None
    chance: float | None
    missing: dict[str, str] | None
    skipped: dict[str, str] = field(default_factory=dict)
    protocols: dict[str, Protocol] = field(default_factory=dict)


@dataclass
class Results:
    """One evaluation of one model on one suite.

    Attributes:
      provisional: why the suite is; "" if it is not.
    """

    path: Path
    suite: str
    provisional: str
    model: dict[str, Any]
    date: str | None
    versions: dict[str, Any]
    tasks: dict[str, Task]

    @property
    def step(self) -> int | None:
        """Of the model that was evaluated, if it says so."""
        step = number(self.model.get("step"))
        return None if step is None else int(step)


def read_results(out: Path) -> Results:
    """Reads an evaluation's folder.

    Args:
      out: the folder with `results.json`.

    Returns:
      What it says; arrays stay on disk.

    Raises:
      InputError: if `results.json` is missing or is not what `evaluate` writes.
    """
    found = _read(out / "results.json")
    if not isinstance(found.get("tasks"), Mapping):
        raise InputError(
            f'"{out / "results.json"}" must be what evaluate writes: it has no tasks; '
            "run evaluate again."
        )
    tasks = {
        str(name): _task(out, str(name), given)
        for name, given in found["tasks"].items()
        if isinstance(given, Mapping)
    }
    return Results(
        out,
        text(found.get("suite")) or out.name,
        text(found.get("provisional")) or "",
        mapping(found.get("model")),
        text(found.get("date")),
        mapping(found.get("versions")),
        tasks,
    )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file; {} if it is missing or damaged."""
    try:
        # Opened here: of a damaged file NumPy leaves its own open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except _DAMAGED:
        return {}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def whole(value: Any) -> int | None:
    """A whole number, or None."""
    value = number(value)
    return None if value is None else int(value)


def metrics_of(details: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a protocol that are numbers; of two names of one, one."""
    given = {k: number(v) for k, v in mapping(details.get("metrics")).items()}
    if given.get("top1") is not None:
        given.pop("accuracy", None)
    return {str(k): v for k, v in given.items() if v is not None}


def in_known_order(keys: Iterable[str]) -> list[str]:
    """Names of metrics, the known ones first."""
    known = {key: i for i, key in enumerate(METRICS)}
    return sorted(set(keys), key=lambda key: (known.get(key, len(known)), key))


def is_rank(metric: str) -> bool:
    """Whether a metric is no fraction, and better if smaller."""
    return metric.endswith("_rank")


def text(value: Any) -> str | None:
    """A text that says something, or None."""
    return value if isinstance(value, str) and value.strip() else None


def mapping(value: Any) -> dict[str, Any]:
    """A JSON object, or {}."""
    return dict(value) if isinstance(value, Mapping) else {}


def objects(value: Any) -> list[dict[str, Any]]:
    """The objects of a JSON list."""
    given = value if isinstance(value, list) else []
    return [dict(x) for x in given if isinstance(x, Mapping)]


def numbers(value: Any) -> list[float | None]:
    """A JSON list of numbers, None for what is none; [] if it is no list."""
    return [number(x) for x in value] if isinstance(value, list) else []


def _read(path):
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f'"{path}" must be a JSON file that evaluate wrote: it cannot be read '
            f"({error}); run evaluate again."
        ) from error
    if not isinstance(found, Mapping):
        raise InputError(
            f'"{path}" must hold a JSON object: got {type(found).__name__}; run '
            "evaluate again."
        )
    return dict(found)


def _task(out, name, given):
    protocols = {
        str(key): _protocol(out, name, str(key), mapping(value))
        for key, value in mapping(given.get("protocols")).items()
    }
    names = given.get("class_names")
    if not isinstance(names, list):
        found = [p.details.get("class_names") for p in protocols.values()]
        names = next((x for x in found if isinstance(x, list)), [])
    classes = whole(given.get("classes")) or len(names) or None
    metric = text(given.get("metric")) or "accuracy"
    missing = mapping(given.get("missing"))
    return Task(
        name,
        text(given.get("title")) or name.replace("_", " "),
        out / "tasks" / name,
        text(given.get("kind")) or "classification",
        metric,
        mapping(given.get("records")),
        [str(x) for x in names],
        classes,
        _chance(number(given.get("chance")), metric, classes),
        {k: str(v) for k, v in missing.items() if v} or None,
        {k: v for k, v in mapping(given.get("skipped")).items() if text(v)},
        protocols,
    )


def _chance(given, metric, classes):
    if given is not None:
        return given
    if metric == "roc_auc":
        return 0.5
    if metric in ("accuracy", "mean_per_class", "top1") and classes:
        return 1 / classes
    return None


def _protocol(out, task, name, summary):
    beside = f"tasks/{task}/{name}"
    file = _inside(out, summary.get("details"), f"{beside}.json")
    details, problem = dict(summary), text(summary.get("error"))
    try:
        details |= _read(file)
    except InputError as error:
        if file.exists():
            problem = problem or str(error)
        elif not problem:
            problem = f"{file.name} is not there: only the score is known."
    score = number(summary.get("score"))
    interval = number(summary.get("interval"))
    return Protocol(
        name,
        number(details.get("score")) if score is None else score,
        number(details.get("interval")) if interval is None else interval,
        details,
        problem,
        _inside(out, summary.get("arrays"), f"{beside}.npz"),
    )


def _inside(out, given, otherwise):
    """A file of the evaluation's own folder, whatever its JSON says."""
    path = Path(text(given) or otherwise)
    if path.is_absolute() or ".." in path.parts:
        path = Path(otherwise)
    return out / path
