"""Judges a model on a suite of tasks: `python -m unicl_jax.evaluate`.

python -m unicl_jax.evaluate --checkpoint=runs/quickstart --suite=offline

The model is a run's workdir, or anything else that `unicl_jax.load` takes. Each task is
done by each protocol that fits it; a second call goes on where the first one ended.
With --names=FILE, a name a line, it says instead which of those names pictures show.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from unicl_jax import model
from unicl_jax.errors import InputError
from unicl_jax.evaluation import context, results, runner
from unicl_jax.evaluation.context import Options
from unicl_jax.evaluation.embedder import BATCH, Embedder
from unicl_jax.evaluation.open_vocabulary import name_pictures
from unicl_jax.evaluation.protocols import PROTOCOLS
from unicl_jax.evaluation.suites import SUITES, load_suite

INCOMPLETE, BAD_INPUT, WIDTH = 1, 2, 80


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: what follows the module's name.

    Returns:
      The exit code: 0; 1 if a task that was asked for has no score; 2 for wrong input.
    """
    options = (parser := _parser()).parse_args(argv)
    if not (options.checkpoint or options.list):
        parser.error("--checkpoint is required, but with --list")
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    try:
        if options.names:
            return _name_pictures(options, console)
        return _evaluate(options, console)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130


def _evaluate(options, console):
    suite = load_suite(options.suite)
    if options.pictures:
        raise InputError(
            f'pictures are named with --names: got "{options.pictures[0]}" and no '
            "--names; name a text file of names, or leave the pictures out."
        )
    names = options.task or [task.name for task in suite.tasks]
    if options.list:
        console.print(_listed(suite, names, options.data_dir))
        return 0
    out = Path(options.out or _default_out(options.checkpoint, suite.name))
    start = time.perf_counter()
    embedder = Embedder(_load(options), options.batch_size)
    found = None
    with _progress(console) as progress:
        found = runner.evaluate(
            embedder,
            suite,
            out,
            model={"source": options.checkpoint, **_step(options.checkpoint)},
            data_dir=options.data_dir,
            tasks=options.task,
            protocols=options.protocol,
            options=Options(
                options.neighbors, options.shots, options.seeds, options.text_head
            ),
            progress=progress,
        )
    one = options.protocol if options.protocol != ("all",) else ()
    if any(task["protocols"] for task in found["tasks"].values()):
        console.print(results.table(found, one or list(PROTOCOLS)))
    if suite.provisional:
        console.print(f"{suite.name} is provisional: {suite.provisional}", markup=False)
    wanted = [found["tasks"][name] for name in names]
    missing = {
        name: task["missing"]
        for name, task in zip(names, wanted, strict=True)
        if task["missing"]
    }
    for name, why in missing.items():
        console.print(f"{name} is missing: {why['how']}", highlight=False, markup=False)
    failed = False
    for name, task in zip(names, wanted, strict=True):
        done = task["protocols"]
        # Of a whole suite, the tasks that a protocol is not for were not asked for.
        asked = options.task or not any(t["protocols"] for t in wanted)
        if asked and not task["missing"] and not {*(one or done)} & {*done}:
            failed = True
            whys = "; ".join(f"{p}: {why}" for p, why in task["skipped"].items())
            console.print(f"{name} has no score: {whys}", highlight=False, markup=False)
        for protocol, said in task["protocols"].items():
            if one and protocol not in one:
                continue
            if "error" in said:
                failed = True
                console.print(
                    f"{name}, {protocol}: {said['error']}",
                    highlight=False,
                    markup=False,
                )
            elif said.get("said"):
                console.print(
                    f"{name}, {protocol}: {said['said']}", highlight=False, markup=False
                )
    seconds = time.perf_counter() - start
    console.print(
        f"results.json, results.csv and tasks/: {out} ({seconds:.0f} s)",
        highlight=False,
        markup=False,
    )
    return INCOMPLETE if failed or missing else 0


def _name_pictures(options, console):
    loaded = _load(options)
    named = name_pictures(loaded, options.names, options.pictures)
    table = Table()
    table.add_column("picture", overflow="fold")
    table.add_column("names, the likeliest first, %", overflow="fold")
    for picture, best in named.items():
        said = ", ".join(f"{name} {100 * share:.1f}" for name, share in best)
        table.add_row(escape(Path(picture).name), escape(said))
    console.print(table)
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m unicl_jax.evaluate",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        help="workdir, weights file or folder, or a tower's name for random weights",
    )
    add(
        "--suite",
        default="offline",
        help=f"one of {', '.join(SUITES)}, or a .toml file of your own",
    )
    add("--task", type=_names, default=(), help="of the suite: a,b; default all")
    add(
        "--protocol",
        type=_names,
        default=(),
        help=f"some of {', '.join(PROTOCOLS)}; or all; default the quick ones",
    )
    add("--data_dir", help="where the suites' data lies")
    add("--out", help="folder of results; default evaluation/SUITE in the workdir")
    add("--list", action="store_true", help="show the suite, and which data is there")
    add("--batch_size", type=_count, default=BATCH, help="rows at a time")
    add("--neighbors", type=_count, default=Options.neighbors, help="k of k-NN")
    add("--shots", type=_counts, default=Options.shots, help="of few-shot: 5,20,50")
    add("--seeds", type=_seeds, default=Options.seeds, help="of few-shot: 0,1,2")
    add(
        "--text_head",
        type=_truth,
        default=Options.text_head,
        help="start linear probes at the classes' texts (True) or at zeros",
    )
    add("--layout", help="of a weights file, if its names should not tell")
    add("--names", help="text file: which of these names do the pictures show?")
    add("pictures", nargs="*", help="with --names")
    return parser


def _names(text):
    return tuple(name for name in text.split(",") if name)


def _count(text):
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: got {text}")
    return number


def _counts(text):
    return tuple(_count(part) for part in text.split(","))


def _seeds(text):
    return tuple(int(part) for part in text.split(","))


def _truth(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be True or False: got {text}")
    return text.lower() == "true"


def _load(options):
    if model.is_random(options.checkpoint):
        print(f"Random weights: {options.checkpoint} is a name, no file or workdir")
    return model.load(
        options.checkpoint, **({"layout": options.layout} if options.layout else {})
    )


def _step(checkpoint):
    """Which of a run's checkpoints is judged."""
    from unicl_jax.workdir import saved_steps

    steps = saved_steps(checkpoint)
    return {"step": steps[-1]} if steps else {}


def _default_out(checkpoint, suite):
    path = Path(checkpoint)
    if path.is_dir():
        return path / "evaluation" / suite
    return Path("evaluation") / path.stem / suite


def _listed(suite, names, data_dir):
    table = Table(title=suite.provisional and f"provisional: {suite.provisional}")
    for header in (suite.name, "metric", "ways", "data"):
        table.add_column(header, justify="right" if header == "ways" else "left")
    for name in names:
        task = suite.task(name)
        ways = f"{task.num_classes:,}" if task.num_classes else ""
        there = ", ".join(task.splits(data_dir)) or "missing"
        table.add_row(name, results.METRIC_NAMES[task.metric], ways, there)
    return table


class _progress:
    """A line that moves on a terminal; elsewhere a line for each thing begun."""

    def __init__(self, console):
        self._console, self._bar, self._job = console, None, None

    def __enter__(self):
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[at]}"),
                console=self._console,
                transient=True,
            )
            self._bar.start()
        return context.Progress(self._start, self._done, self._say)

    def __exit__(self, *exception):
        if self._bar is not None:
            self._bar.stop()

    def _start(self, what):
        if self._bar is None:
            print(what, flush=True)
            return
        if self._job is not None:
            self._bar.remove_task(self._job)
        self._job = self._bar.add_task(what, total=None, at="")

    def _done(self, done, of):
        if self._job is not None:
            at = f"{done:,} of {of:,}" if of else f"{done:,}"
            self._bar.update(self._job, completed=done, total=of or None, at=at)

    def _say(self, line):
        self._console.print(line, highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
