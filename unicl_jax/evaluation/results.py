"""What an evaluation found: files that a second call goes on from, and a table."""

import contextlib
import csv
import fcntl
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from unicl_jax.errors import InputError


def read_results(out: str | Path) -> dict[str, Any]:
    """Reads what an evaluation wrote.

    Args:
      out: its folder.

    Returns:
      What `results.json` holds; {} if it is not there.

    Raises:
      InputError: if it cannot be read.
    """
    path = Path(out) / "results.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        tasks = found.get("tasks", {}).values()
        if not isinstance(found.get("model", {}), dict) or not all(
            isinstance(task["protocols"], dict) for task in tasks
        ):
            raise ValueError("it holds something else")
        return found
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f'"{path}" must hold an evaluation\'s results: it cannot be read '
            f"({error}); delete it, and the evaluation is summed up anew."
        ) from error


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Keeps others out of a folder of results, whose files are of one evaluation.

    Args:
      out: the folder; it is made.

    Raises:
      InputError: if another evaluation is at work there, or it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a")  # noqa: SIM115 - closed below
    except OSError as error:
        raise _unwritable(out, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f'"{out}" must have one evaluation at work: there is another; wait for '
                "it, or name another folder with --out."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON at once: a kill leaves the old file or the new one.

    Args:
      path: of the file; its folder is made.
      value: NaN and infinities become null.

    Raises:
      InputError: if it cannot be written.
    """
    text = json.dumps(_plain(value), indent=1, ensure_ascii=False) + "\n"
    _write(path, text)


def write_csv(path: Path, results: Mapping[str, Any]) -> None:
    """Writes one row a task, protocol and metric.

    Args:
      path: of the file.
      results: as `results.json` holds them.

    Raises:
      InputError: if it cannot be written.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["task", "protocol", "metric", "value", "interval", "records"])
    for name, task in results["tasks"].items():
        for protocol, found in task["protocols"].items():
            intervals = found.get("intervals", {})
            for metric, value in found["metrics"].items():
                interval = intervals.get(metric)
                cells = ["" if x is None else f"{x:.6g}" for x in (value, interval)]
                writer.writerow([name, protocol, metric, *cells, found["records"]])
    _write(path, file.getvalue())


def table(results: Mapping[str, Any], protocols: Sequence[str]) -> Table:
    """Each task's own metric in percent, a column a protocol; of one, all its metrics.

    Args:
      results: as `results.json` holds them.
      protocols: the columns.

    Returns:
      A rich table that fits 80 columns.
    """
    tasks = results["tasks"]
    if len(protocols) == 1:
        return _of_one(results, *protocols)
    shown = [p for p in protocols if any(p in t["protocols"] for t in tasks.values())]
    found, with_ways = Table(), len(shown) <= FEW
    found.add_column(f"{results['suite']}, %")
    for header in ["ways"] * with_ways + [HEADERS.get(p, p) for p in shown]:
        found.add_column(header, justify="right")
    for name, task in tasks.items():
        if not task.get("missing") and not {*shown} & {*task["protocols"]}:
            continue
        scores = [_percent(task["protocols"].get(p), p) for p in shown]
        if task.get("missing"):
            scores = ["missing", *[""] * (len(shown) - 1)][: len(shown)]
        ways = [f"{task['classes']:,}" if task.get("classes") else ""] * with_ways
        more = (
            "" if task["metric"] in ("accuracy", "") else METRIC_NAMES[task["metric"]]
        )
        found.add_row(f"{name}, {more}" if more else name, *ways, *scores)
    averaged = [
        [
            task["protocols"][p]["score"]
            for task in tasks.values()
            if task["protocols"].get(p, {}).get("score") is not None
        ]
        for p in shown
    ]
    if any(len(scores) > 1 for scores in averaged):
        found.add_section()
        means = [f"{100 * np.mean(x):.1f}" if len(x) > 1 else "" for x in averaged]
        counts = [str(len(x)) if len(x) > 1 else "" for x in averaged]
        found.add_row("mean", *[""] * with_ways, *means)
        found.add_row("of so many tasks", *[""] * with_ways, *counts)
    return found


def _of_one(results, protocol):
    """Every metric of one protocol."""
    done = {
        name: task["protocols"][protocol]
        for name, task in results["tasks"].items()
        if task["protocols"].get(protocol, {}).get("metrics")
    }
    columns = {}  # header -> its metrics, whose values stand with "/" between them
    for found in done.values():
        for metric in found["metrics"]:
            way, _, k = metric.rpartition("_")
            number = k.removeprefix("r")
            if number.isdigit():
                header = way.replace("_", " ") + (" R@" if k != number else " ")
                columns.setdefault(header, {})[metric] = number
            elif metric in _SHORT:
                columns.setdefault(f"{_SHORT[metric]} %", {})[metric] = ""
    table = Table()
    table.add_column(f"{results['suite']}, {HEADERS.get(protocol, protocol)}")
    labelled = any(results["tasks"][name].get("classes") for name in done)
    headers = [header + "/".join(ks.values()) for header, ks in columns.items()]
    for header in ["ways"] * labelled + headers + ["chance %"] * labelled:
        table.add_column(header, justify="right")
    for name, found in done.items():
        values = found["metrics"]
        cells = [
            " / ".join(f"{100 * values[m]:.1f}" for m in ms if m in values)
            for ms in columns.values()
        ]
        if labelled:
            ways = results["tasks"][name].get("classes") or 0
            by_chance = results["tasks"][name]["metric"] in (
                "accuracy",
                "mean_per_class",
            )
            chance = f"{100 / ways:.2f}" if ways and by_chance else ""
            cells = [f"{ways:,}", *cells, chance]
        table.add_row(name, *cells)
    return table


FEW = 3  # protocols, with which there is room for another column
HEADERS = {
    "zero_shot": "zero-shot",
    "knn": "k-NN",
    "linear_probe": "linear",
    "logistic_probe": "L-BFGS",
    "few_shot": "few-shot",
    "retrieval": "recall",
}
_SHORT = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "per class",
    "roc_auc": "ROC AUC",
    "map11": "mAP",
}
METRIC_NAMES = {
    "accuracy": "top-1",
    "mean_per_class": "per class",
    "roc_auc": "ROC AUC",
    "map11": "mAP",
    "": "mean R@1",
}


def _percent(found, protocol):
    if found is None or found["score"] is None:
        return ""
    # Over seeds; that of the number of records is in the files.
    interval = found.get("interval") if protocol == "few_shot" else None
    more = f" ±{100 * interval:.1f}" if interval is not None else ""
    return f"{100 * found['score']:.1f}{more}"


def _plain(value):
    """What JSON can say."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _write(path, text):
    temporary = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path, error):
    return InputError(
        f'results are kept in files: "{path}" cannot be written '
        f"({error.strerror}); name another folder with --out."
    )
