"""A run's directory: whose it is, and what of it is there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from unicl_jax import storage
from unicl_jax.config import FREE, FREE_FIELDS, default, flatten, to_json
from unicl_jax.errors import InputError

if TYPE_CHECKING:
    from unicl_jax.data import ConceptTable

_NAMED = 5  # differences in a message
CONTACT_SHEET = "contact_sheet.png"  # what a look at the data leaves before the run


def prepare_workdir(workdir: str | Path, config: ConfigDict, write: bool) -> Path:
    """Makes the run's directory, or makes sure that it is this run's.

    Args:
      workdir: the directory, or gs://bucket/folder; made if it is not there.
      config: the resolved config; saved as `config.json`.
      write: whether this process writes (one of them does).

    Returns:
      The absolute path.

    Raises:
      InputError: if it cannot be written, holds something else, or holds a run with
        another config (the message says which fields differ).
    """
    workdir = storage.absolute(workdir)
    storage.check_bucket(workdir)
    saved = workdir / "config.json"
    there = storage.names(workdir)
    if saved.name in there:
        # A start that failed before it learnt anything binds nobody to its config.
        if has_saved(workdir):
            _check_same_run(workdir, saved, config)
    elif others := there - {f"{saved.name}.new", CONTACT_SHEET}:
        entries = ", ".join(sorted(others)[:3])
        raise InputError(
            f'--workdir must be new, empty, or a run of this config: "{workdir}" holds '
            f"{entries} and no config.json; name another directory."
        )
    if not write:
        return workdir
    _write(workdir, saved.name, to_json(config).rstrip())
    return workdir


def keep_concepts(workdir: Path, table: "ConceptTable", write: bool) -> None:
    """Saves a run's concept table, or makes sure that it is still the same.

    A class list may lie in a file, which may change between two starts: the rows of a
    classifier, say, would then belong to other classes, and nobody would know.

    Args:
      workdir: of the run; `concepts.json` is written, unless it is there already. A run
        without a checkpoint is not bound to it.
      table: of this start; one without concepts leaves no file.
      write: whether this process writes (one of them does).

    Raises:
      InputError: if the run has another table, whose first differences are named, or
        the file cannot be read or written.
    """
    path = workdir / "concepts.json"
    if path.exists() and has_saved(workdir):
        try:
            differ = table.differences(json.loads(storage.read_text(path)))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(
                f'"{path}" must hold a run\'s concepts: it cannot be read '
                f"({error!r}); delete it, and it is written anew."
            ) from error
        if differ:
            more = len(differ) - _NAMED
            raise InputError(
                f'--workdir "{workdir}" holds a run whose labels mean something else:\n'
                + "\n".join(f"  {line}" for line in differ[:_NAMED])
                + (f"\n  and {more} more" if more > 0 else "")
                + "\nGo on with the class names of that run (its concepts.json has "
                "them), or name another directory."
            )
        return
    if not write or not table.names:
        return
    text = json.dumps(table.to_dict(), indent=1, ensure_ascii=False)
    _write(workdir, "concepts.json", text)


def keep_records(
    workdir: Path, found: Mapping[str, tuple[int, str]], write: bool
) -> list[str]:
    """Saves which records a run started with, or says where there are others now.

    Files may come, go or be mended between two starts. The run goes on, but in another
    order: it is no longer the run that was never stopped.

    Args:
      workdir: of the run; `records.json` is written, unless it is there already.
      found: by source, how many records there are now and their fingerprint.
      write: whether this process writes (one of them does).

    Returns:
      A line for each source that changed.
    """
    path = workdir / "records.json"
    now = {name: {"records": n, "hash": mark} for name, (n, mark) in found.items()}
    if path.exists() and has_saved(workdir):
        try:
            before = json.loads(storage.read_text(path))
            return [
                f"{name}: its records are others than when the run started "
                f"({before[name]['records']:,} then, {now[name]['records']:,} now), so "
                "that their order is another one from here on"
                for name in now
                if name in before and before[name] != now[name]
            ]
        except (OSError, ValueError, LookupError, TypeError):
            return [f"{path} cannot be read: whether records changed is not known"]
    if write:
        _write(workdir, "records.json", json.dumps(now, indent=1))
    return []


def has_saved(workdir: str | Path) -> bool:
    """Whether a run has a checkpoint: not one that a kill left half written."""
    return bool(saved_steps(workdir))


def saved_steps(workdir: str | Path) -> list[int]:
    """The steps of a run's checkpoints, in order."""
    # Orbax writes to "6.orbax-checkpoint-tmp", and renames it to "6".
    folder = storage.path(workdir) / "checkpoints"
    found = [name for name in storage.names(folder) if name.isdigit()]
    return sorted(int(name) for name in storage.committed(folder, found))


def saved_config(workdir: str | Path) -> dict[str, Any]:
    """What a run's config.json holds; {} if that cannot be read."""
    try:
        found = json.loads(storage.read_text(storage.path(workdir) / "config.json"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(workdir, name, text):
    """At once: a kill leaves the old file or the new one."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        storage.write_text(workdir / name, text + "\n")
    except OSError as error:
        raise InputError(
            f'--workdir must be a directory that can be written: "{workdir}" gave '
            f"{error.strerror}; {storage.advice(workdir)}."
        ) from error


def _check_same_run(workdir, saved, config):
    try:
        old = flatten(json.loads(storage.read_text(saved)))
    except (OSError, ValueError, AttributeError) as error:  # the last: not a dict
        raise InputError(
            f'"{saved}" must hold a run\'s config: it cannot be read ({error}); name '
            "another directory."
        ) from error
    new, defaults = flatten(config), flatten(default())
    # A field that is newer than the run had its default's effect there.
    old |= {k: v for k, v in defaults.items() if k in new and k not in old}
    differ = [
        f"  {key}: the run has {old.get(key, 'no such field')}, now "
        f"{new.get(key, 'no such field')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, saved) != new.get(key, saved)
        and key.split(".")[0] not in FREE
        and key.split(".")[-1] not in FREE_FIELDS
    ]
    if differ:
        raise InputError(
            f'--workdir "{workdir}" holds a run with another config:\n'
            + "\n".join(differ)
            + "\nGo on with that run's values, or name another directory."
        )
