"""Reading runs: what a training left behind, and what was measured of it."""

import datetime
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unicl_jax import metrics, storage
from unicl_jax.config import default, flatten
from unicl_jax.errors import InputError
from unicl_jax.reporting.results import Results, read_results


@dataclass
class Run:
    """One thing that is reported: a training, its evaluations, or both.

    Attributes:
      name: short, and different for each run of a page.
      path: as given.
      config: of the training, flat: {"optimizer.learning_rate": 1e-3}; {} if unknown.
      rows: of `metrics.jsonl`, by step; [] if there is none.
      results: of its evaluations, one a suite.
      problems: what could not be read, in sentences.
      date: of the last line of its metrics, if it has some.
    """

    name: str
    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    results: list[Results] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    date: str | None = None

    @property
    def last_step(self) -> int | None:
        """The last step that its metrics know; without them the evaluated one."""
        if self.rows:
            return int(self.rows[-1]["step"])
        return next((r.step for r in self.results if r.step is not None), None)


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Reads runs.

    Args:
      paths: of workdirs, or of folders (or `results.json` files) that `evaluate` wrote.

    Returns:
      A run each, with names that tell them apart.

    Raises:
      InputError: if one of them is neither, or the only file of one cannot be read.
    """
    if not paths:
        raise InputError(
            "RUN must be a run's workdir or a folder of an evaluation: got none; name "
            "one, or several to compare."
        )
    paths = list(dict.fromkeys(_folder(path) for path in paths))
    names = distinct_names([_naming(path) for path in paths])
    return [_read_run(name, path) for name, path in zip(names, paths, strict=True)]


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The config fields in which runs differ.

    Args:
      runs: those without a config are passed over.

    Returns:
      For each field its value in every run; None where there is none. A field that is
      newer than a run had its default's effect there.
    """
    defaults = flatten(default())
    configs = [defaults | run.config if run.config else {} for run in runs]
    known = [config for config in configs if config]
    keys = sorted({key for config in known for key in config})
    missing = object()
    return {
        key: [config.get(key) for config in configs]
        for key in keys
        if any(c.get(key, missing) != known[0].get(key, missing) for c in known)
    }


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest tails of paths that tell them apart: two parts at most are usual."""
    parts = [path.parts[1:] or path.parts for path in paths]
    names = [p[-1] for p in parts]
    for size in range(2, 1 + max(map(len, parts), default=1)):
        twice = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(p[-size:]) if name in twice else name
            for name, p in zip(names, parts, strict=True)
        ]
    return [
        f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _folder(given):
    if storage.is_bucket(given):
        raise InputError(
            f'RUN must be a folder on this machine: got "{given}"; copy it (gcloud '
            "storage rsync --recursive --exclude=checkpoints/), and name the copy."
        )
    path = Path(given).expanduser()
    if path.name == "results.json" and path.is_file():
        path = path.parent
    if not path.exists():
        raise InputError(
            f"RUN must be a run's workdir or a folder of an evaluation: there is no \""
            f'{given}"; name one that holds metrics.jsonl or results.json.'
        )
    path = path.resolve()
    if not (path.is_dir() and (_is_workdir(path) or (path / "results.json").exists())):
        raise InputError(
            f'RUN must be a run\'s workdir or a folder of an evaluation: "{given}" has '
            "no metrics.jsonl, config.json or results.json; name another folder."
        )
    return path


def _is_workdir(path):
    return any(
        (path / name).exists()
        for name in ("metrics.jsonl", "config.json", "evaluation")
    )


def _workdir_of(path):
    """Whose evaluation a folder is: `<workdir>/evaluation/<suite>`; or None."""
    owner = path.parent.parent
    if path.parent.name == "evaluation" and (owner / "config.json").exists():
        return owner
    return None


def _naming(path):
    return path if _is_workdir(path) else _workdir_of(path) or path


def _read_run(name, path):
    run = Run(name, path)
    if _is_workdir(path):
        workdir, outs = path, sorted((path / "evaluation").glob("*/results.json"))
    else:
        workdir, outs = _workdir_of(path), [path / "results.json"]
    if workdir is not None:
        run.config = _config(workdir, run.problems)
        _read_metrics(workdir, run)
    for out in outs:
        try:
            run.results.append(read_results(out.parent))
        except InputError as error:
            if workdir is None:
                raise
            run.problems.append(str(error))
    return run


def _config(workdir, problems):
    file = workdir / "config.json"
    if not file.exists():
        problems.append("There is no config.json: the recipe is not known.")
        return {}
    try:
        return flatten(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        problems.append(f"config.json cannot be read ({error}).")
        return {}


def _read_metrics(workdir, run):
    file = workdir / "metrics.jsonl"
    if not file.exists():
        run.problems.append(
            "There is no metrics.jsonl: the run has not reported a step yet."
        )
        return
    try:
        found = metrics.read(workdir)
        changed = file.stat().st_mtime
    except (OSError, ValueError, RecursionError) as error:
        run.problems.append(f"metrics.jsonl cannot be read ({error}).")
        return
    run.rows = in_order(found)
    if not run.rows:
        run.problems.append("metrics.jsonl has no line with a step.")
    moment = datetime.datetime.fromtimestamp(changed, datetime.UTC)
    run.date = moment.isoformat(timespec="minutes")


def in_order(rows: Iterable[Any]) -> list[dict[str, Any]]:
    """The rows that have a step, by step."""
    kept = [r for r in rows if isinstance(r, Mapping) and _is_step(r.get("step"))]
    return sorted(kept, key=lambda row: row["step"])


def _is_step(value):
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0
