"""Suites: named lists of tasks, read from TOML files with one table row a task."""

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from unicl_jax.data.shards import open_shard
from unicl_jax.errors import InputError, did_you_mean
from unicl_jax.evaluation.suites.rows import task_of
from unicl_jax.evaluation.tasks import Task

__all__ = ["SUITES", "Suite", "load_suite", "load_tasks"]

SUITES = (
    "offline",
    "imagenet",
    "elevater20",
    "clip_extra",
    "unicl14",
    "unicl18",
    "robustness",
    "retrieval",
)
_FIELDS = ("title", "provisional", "take", "task")


class Suite(NamedTuple):
    """A named list of tasks."""

    name: str
    title: str
    provisional: str  # why it is not final; "" if it is
    tasks: tuple[Task, ...]

    def task(self, name: str) -> Task:
        """One of the tasks by its name; InputError, with a guess, if there is none."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise InputError(
            f'suite "{self.name}": got task "{name}"; '
            f"{did_you_mean(name, [task.name for task in self.tasks])}"
        )


def load_suite(suite: str) -> Suite:
    """Reads a suite.

    Args:
      suite: one of SUITES, or the path of a TOML file, local or remote: `title`;
        `task`, an array of tables, one a task, see `rows.FIELDS`; `take`, a list of
        "suite/task" that are taken as they are; `provisional`, why it is not final.

    Returns:
      The suite, every class name and template read. No data is looked at.

    Raises:
      InputError: if there is no such suite, or a row is wrong: it names file, task and
        field.
    """
    file, text = _read(suite)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file} must be TOML: {error}; mend it.") from error
    unknown = sorted(set(table) - set(_FIELDS))
    if unknown:
        raise InputError(
            f'{file} must hold known fields: got "{unknown[0]}"; '
            f"{did_you_mean(unknown[0], _FIELDS)}"
        )
    rows = table.get("task", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file}: a task must be a table under [[task]]: got {rows}.")
    rows = [*({"like": name} for name in table.get("take", [])), *rows]
    name = Path(suite).stem
    tasks = load_tasks(rows, name, file)
    title, why = str(table.get("title", name)), str(table.get("provisional", ""))
    return Suite(name, title, why, tasks)


def load_tasks(
    rows: Sequence[Mapping[str, Any]], suite: str, file: str
) -> tuple[Task, ...]:
    """Reads rows, of a recipe, say.

    Args:
      rows: each as a `[[task]]` of a suite's file.
      suite: its name, which the tasks hold.
      file: where they stand, for errors; what is read besides lies beside it.

    Returns:
      The tasks, in order.

    Raises:
      InputError: if a row is wrong, or two tasks have one name.
    """
    tasks = []
    for number, row in enumerate(rows, 1):
        tasks.append(task_of(row, suite, file, number, _like))
        if tasks[-1].name in [task.name for task in tasks[:-1]]:
            raise InputError(
                f'{file}: tasks must have names of their own: two are "'
                f'{tasks[-1].name}"; rename one.'
            )
    if not tasks:
        raise InputError(f"{file} must hold a task: it has none; add a [[task]].")
    return tuple(tasks)


def _like(name: str, where: str) -> dict[str, Any]:
    """The row of "suite/task" in a suite that ships with the package."""
    suite, _, task = str(name).partition("/")
    if suite not in SUITES or not task:
        raise InputError(
            f'{where}: must be "suite/task" of {", ".join(SUITES)}: got "{name}".'
        )
    table = tomllib.loads(_read(suite)[1])
    rows = [*({"like": name} for name in table.get("take", [])), *table["task"]]
    found = {row.get("name") or row["like"].partition("/")[2]: row for row in rows}
    if task not in found:
        raise InputError(f'{where}: got "{name}"; {did_you_mean(task, found)}')
    row = found[task]
    return {**_like(row["like"], where), **row} if "like" in row else row


def _read(suite: str) -> tuple[str, str]:
    """A suite's file, as errors call it, and its text."""
    if suite in SUITES:
        file = resources.files(__package__) / f"{suite}.toml"
        return f"{suite}.toml", file.read_text(encoding="utf-8")
    if not suite.endswith(".toml"):
        raise InputError(
            f'suite: must be the path of a .toml file or a known suite: got "{suite}"; '
            f"{did_you_mean(suite, SUITES)}"
        )
    try:
        with open_shard(suite) as file:
            return suite, file.read().decode("utf-8")
    except Exception as error:  # gfile has error types of its own
        raise InputError(
            f"suite: the file must be readable: {suite} is not ({error})."
        ) from error
