"""Writes sources as sharded TFRecords with an index and a manifest, to train from.

python -m unicl_jax.prepare --config=configs/own_data.py --out=prepared \
  --config.data.sources.labels.path=pictures --only=labels
python -m unicl_jax.prepare --format=folder --kind=image_label --path=pictures \
  --out=prepared/pictures
python -m unicl_jax.prepare --verify --out=prepared

The first prepares sources of a recipe (into prepared/labels, say), the second one
source, any field of which is a flag (--fields.image=jpg). The same command goes on
where it was stopped. A config then says format="prepared" and that path.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from rich.console import Console

from unicl_jax.data import prepared
from unicl_jax.data.prepare_plan import NOT_OF_RECORDS, Options
from unicl_jax.data.preparing import prepare
from unicl_jax.data.shard_writer import list_folder
from unicl_jax.data.shards import cores
from unicl_jax.errors import InputError, choose, did_you_mean
from unicl_jax.metrics import clock, live_line
from unicl_jax.recipe import literal, read_recipe, set_field
from unicl_jax.validation import SOURCE_FIELDS, check_source

BAD_INPUT, STOPPED = 2, 130
EVALUATIONS = "evaluations"  # the folder of those, for a source may be called as one is
_INTEGERS = ("label_offset", "max_skips_in_a_row", "max_pixels")
_EVERY = 0.2  # seconds between two looks of the live line
_EVERY_LINE = 30.0  # seconds between two lines where there is no terminal


class _Task(NamedTuple):
    """A source to prepare."""

    name: str
    config: Mapping[str, Any]
    folder: str
    train: bool


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: what follows the module's name.

    Returns:
      The exit code: 0; 2 for wrong input or damaged files, 130 when stopped by Ctrl-C.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    try:
        options, fields = _parse(argv)
        if options.verify:
            return _verify(options.out, fields, console)
        tasks = _of_recipe(options, fields) if options.config else []
        for task in tasks or [_of_flags(options.out, fields)]:
            _prepare(task, options, console)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("stopped. The same command goes on from there.", file=sys.stderr)
        return STOPPED
    return 0


def _parse(argv):
    """The options, and what else was given: fields of a source or of a recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m unicl_jax.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, help="folder, local or gs://")
    parser.add_argument("--config", help="a recipe; --config.x.y=z sets a field of it")
    parser.add_argument("--only", help="of a recipe: names, with commas between them")
    parser.add_argument(
        "--evaluations", action="store_true", help="of a recipe: those, too"
    )
    parser.add_argument("--shard_mib", type=int, default=128, help="about; default 128")
    parser.add_argument("--shards", type=int, help="exactly so many instead")
    parser.add_argument(
        "--max_side", type=int, help="shrink images whose shorter side has more pixels"
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode every image and leave out what is broken; default: do",
    )
    parser.add_argument(
        "--workers", type=int, default=cores(), help="threads; default: cores"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare all bytes with the manifests"
    )
    options, rest = parser.parse_known_args(argv)
    fields = {}
    for argument in rest:
        match = re.fullmatch(r"--?([\w.]+)=(.*)", argument, re.DOTALL)
        if not match:
            raise InputError(
                f"flags must be written --name=value: got {argument}; see --help."
            )
        fields[match[1]] = match[2]
    return options, fields


def _of_flags(folder: str, flags: Mapping[str, str]) -> _Task:
    """The one source that flags describe."""
    config = {}
    for flag, text in flags.items():
        *parents, leaf = flag.split(".")
        inner = config
        for part in parents:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise InputError(f"--{flag}: {part} must hold fields or a value.")
        inner[leaf] = _value(leaf, text)
    for field in ("format", "path", "kind"):
        if not config.get(field):
            raise InputError(
                "--config, or --format, --path and --kind must be given: got no "
                f"--{field}; see --help."
            )
    formats = {name: () for name in SOURCE_FIELDS if name != "all"}
    choose(formats, config["format"], "--format")
    known = SOURCE_FIELDS["all"] + SOURCE_FIELDS[config["format"]]
    known = [field for field in known if field not in NOT_OF_RECORDS]
    for field in config:
        if field not in known:
            options = ("config", "only", "shards", "shard_mib", "max_side", "workers")
            raise InputError(
                f"there is no flag --{field}; {did_you_mean(field, (*known, *options))}"
            )
    name = Path(folder.rstrip("/")).name or "source"
    return _Task(name, config, folder, True)


def _value(field: str, text: str):
    """Lists and mappings are written as in Python; all else but counts is text."""
    if field in _INTEGERS:
        try:
            return int(text)
        except ValueError as error:
            raise InputError(f"--{field} must be a number: got {text}.") from error
    value = literal(text)
    return value if isinstance(value, list | tuple | dict) else text


def _of_recipe(options, fields: Mapping[str, str]) -> list[_Task]:
    """The sources of a recipe, and its evaluations where they are wanted."""
    config = read_recipe(options.config)
    for field, text in fields.items():
        section, _, path = field.partition(".")
        if section != "config" or not path:
            raise InputError(
                f"with --config a source's fields are the recipe's: got --{field}; "
                f"write --config.data.sources.NAME.{field}=, or leave out --config."
            )
        set_field(config, path, text)
    tasks = [
        _Task(name, source, os.path.join(options.out, name), True)
        for name, source in config.data.sources.items()
    ]
    for name, source in config.evaluations.items():
        if not source.get("format"):  # a suite's task, which lies as it does
            continue
        folder = os.path.join(options.out, EVALUATIONS, name)
        tasks.append(_Task(name, source, folder, False))
    names = [name.strip() for name in (options.only or "").split(",") if name.strip()]
    for name in names:
        if name not in {task.name for task in tasks}:
            raise InputError(
                f'--only: the recipe has no source or evaluation "{name}"; '
                f"{did_you_mean(name, [task.name for task in tasks])}"
            )
    with_evaluations = options.evaluations or bool(names)
    tasks = [task for task in tasks if task.train or with_evaluations]
    tasks = [task for task in tasks if not names or task.name in names]
    for task in tasks:
        group = "data.sources" if task.train else "evaluations"
        needed = ("format", "path", "kind") if task.train else ("format", "path")
        check_source(group, task.name, task.config, needed)
    # An evaluation whose path is "" is left out of a run, too.
    return [task for task in tasks if task.train or task.config.path]


def _prepare(task: _Task, options, console: Console) -> None:
    console.print(f"{task.name}: {task.config['format']} -> {task.folder}")
    progress = _Line(console)
    plain = task.config
    plain = plain.to_dict() if isinstance(plain, ConfigDict) else plain
    try:
        manifest = prepare(
            task.name,
            plain,
            task.folder,
            Options(
                shard_mib=options.shard_mib,
                shards=options.shards,
                max_side=options.max_side,
                check=options.check,
            ),
            workers=options.workers,
            train=task.train,
            say=lambda line: console.print(f"{task.name}: {line}"),
            watch=progress.watch,
        )
    finally:
        progress.close()
    kind, names = manifest["kind"], manifest["class_names"]
    what = f"{len(names):,} classes" if names else f"{manifest['captions']:,} captions"
    console.print(
        f"{task.name}: {manifest['records']:,} records, {what}, "
        f"{manifest['bytes'] / 1e6:,.1f} MB, shards: {len(manifest['shards'])}"
        f"{progress.rate()}"
    )
    skipped = sorted(manifest["skipped"].items(), key=lambda item: -item[1])
    if skipped:
        counts = ", ".join(f"{n:,} x {reason}" for reason, n in skipped)
        console.print(f"{task.name}: left out {counts}")
    console.print(f'format="prepared", kind="{kind}", path="{task.folder}"')


class _Line:
    """One live line on a terminal; elsewhere a plain line now and then."""

    def __init__(self, console: Console):
        self._console, self._live, self._task = console, None, None
        self._start, self._first, self._last, self._shown = None, 0, None, 0.0

    def watch(self, progress) -> None:
        """Shows how far it is; called after each record."""
        now = time.monotonic()
        if self._start is None:
            self._start, self._first, self._shown = now, progress.done - 1, now
            self._open(progress.total)
        self._last = progress
        every = _EVERY if self._live else _EVERY_LINE
        if now - self._shown < every and progress.done < progress.total:
            return
        self._shown = now
        rate = self._rate()
        left = clock((progress.total - progress.done) / max(rate, 1e-9))
        lost = f"  left out {progress.left_out:,}" if progress.left_out else ""
        text = f"{rate:,.0f} records/s{lost}  ETA {left}"
        if self._live:
            self._live.update(self._task, completed=progress.done, text=text)
        else:
            self._console.print(f"{progress.done:,}/{progress.total:,}  {text}")

    def _open(self, total):
        if self._console.is_terminal:
            self._live = live_line(self._console)
            self._task = self._live.add_task("", total=total, text="starting")
            self._live.start()

    def _rate(self) -> float:
        seconds = max(time.monotonic() - self._start, 1e-9)
        return (self._last.done - self._first) / seconds

    def rate(self) -> str:
        """Returns how fast it was, "" if nothing was written."""
        return f", {self._rate():,.0f} records/s" if self._last else ""

    def close(self) -> None:
        """Takes the live line away."""
        if self._live:
            self._live.stop()


def _verify(out: str, fields: Mapping[str, str], console: Console) -> int:
    """Compares every byte of the prepared folders in `out` with their manifests."""
    if fields:
        raise InputError(f"--verify takes --out alone: got --{[*fields][0]}, too.")
    out = os.path.expanduser(out)
    found = {out: prepared.read_manifest(out)}
    for folder in (out, os.path.join(out, EVALUATIONS)):
        for name in sorted(list_folder(folder)):
            inner = os.path.join(folder, name)
            found[inner] = prepared.read_manifest(inner)
    found = {folder: manifest for folder, manifest in found.items() if manifest}
    if not found:
        raise InputError(
            f'--out must be a prepared folder, or hold some: "{out}" has no '
            f"{prepared.MANIFEST}, nor has a folder in it; name another, or prepare it."
        )
    bad = []
    for folder, manifest in found.items():
        damage = prepared.verify(folder, manifest)
        bad += [os.path.join(folder, name) for name in damage]
        for name, what in damage.items():
            console.print(f"{os.path.join(folder, name)} {what}")
        if not damage:
            size = sum(entry["bytes"] for entry in prepared.files(manifest))
            console.print(f"{folder}: {size / 1e6:,.1f} MB as they were written")
    if bad:
        raise InputError(
            f"every file must be as it was written: {len(bad)} are not; delete "
            f"{' '.join(bad)} and run the command that prepared them, which writes "
            "anew what is missing; or copy them again."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
