"""The headline tables: tasks by runs, as HTML and as Markdown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from unicl_jax.reporting.markup import Html, el, markdown, name_of
from unicl_jax.reporting.results import (
    METRICS,
    PROTOCOLS,
    Protocol,
    Task,
    in_known_order,
    is_rank,
    metrics_of,
    number,
)
from unicl_jax.reporting.runs import Run
from unicl_jax.reporting.training import evaluated

WHILE_TRAINING = "while training"


class Cell(NamedTuple):
    """A run's score, or why there is none."""

    score: float | None
    interval: float | None = None
    why: str = "not run"


@dataclass
class Row:
    """A task, or one number of it."""

    title: str
    metric: str
    classes: int | None
    chance: float | None
    cells: list[Cell]

    def is_best(self, i: int) -> bool:
        """Whether run i's score is the best of several that differ, as printed."""
        shown = [round(c.score, 3) for c in self.cells if c.score is not None]
        score = self.cells[i].score
        return score is not None and round(score, 3) == max(shown) > min(shown)


@dataclass
class Board:
    """All tasks of a suite by one protocol.

    Attributes:
      notes: tasks of which nothing is known yet, and why.
    """

    suite: str
    protocol: str
    rows: list[Row]
    notes: list[str]

    @property
    def title(self) -> str:
        """For people."""
        return protocol_title(self.protocol)

    def means(self) -> tuple[int, list[float | None]]:
        """The mean score of each run over the tasks that all of them have.

        Returns:
          How many tasks these are; and the means, None for a run without scores.
        """
        runs = range(len(self.rows[0].cells)) if self.rows else ()
        scored = [
            i for i in runs if any(r.cells[i].score is not None for r in self.rows)
        ]
        shared = [
            r for r in self.rows if all(r.cells[i].score is not None for i in scored)
        ]
        means = [
            sum(r.cells[i].score for r in shared) / len(shared)
            if i in scored and shared
            else None
            for i in runs
        ]
        return len(shared), means


def boards(runs: Sequence[Run]) -> list[Board]:
    """What the runs reached.

    Args:
      runs: of the page.

    Returns:
      A board for each suite and protocol that a run has; and what runs without results
      reached while they trained.
    """
    found = []
    for suite in suites(runs):
        tasks = tasks_of(runs, suite)
        used = [p for task in tasks for t in task if t for p in t.protocols]
        for protocol in sorted(set(used), key=_order):
            rows = [row for task in tasks for row in _rows(task, protocol)]
            found.append(Board(suite, protocol, rows, []))
        notes = list(_missing(tasks, runs))
        if notes and (not found or found[-1].suite != suite):
            found.append(Board(suite, "", [], []))
        if notes:
            found[-1].notes.extend(notes)
    if any(not run.results for run in runs):
        rows = [_while_training(runs, name) for name in evaluated(runs)]
        if rows:
            found.append(Board(WHILE_TRAINING, "zero_shot", rows, []))
    return found


def protocol_title(protocol: str) -> str:
    """A protocol's name, as a heading says it."""
    name = PROTOCOLS.get(protocol, protocol.replace("_", " "))
    return name if name.startswith("k-") else name[:1].upper() + name[1:]


def suites(runs: Sequence[Run]) -> list[str]:
    """The suites that runs were evaluated on, in order of appearance."""
    return list(dict.fromkeys(r.suite for run in runs for r in run.results))


def tasks_of(runs: Sequence[Run], suite: str) -> list[list[Task | None]]:
    """A suite's tasks in order of appearance, each as every run has it, or None."""
    of_runs = [
        {k: t for r in run.results if r.suite == suite for k, t in r.tasks.items()}
        for run in runs
    ]
    names = dict.fromkeys(name for tasks in of_runs for name in tasks)
    return [[tasks.get(name) for tasks in of_runs] for name in names]


def board_html(board: Board, runs: Sequence[Run]) -> Html:
    """A board as a table that scrolls in its own box."""
    heads = [el("th", name_of(run.name, 40), scope="col", class_="n") for run in runs]
    chances = any(row.chance is not None for row in board.rows)
    head = el(
        "tr",
        el("th", "task", scope="col"),
        el("th", "chance", scope="col", class_="n") if chances else None,
        heads,
    )
    body, group = [], None
    for row in board.rows:
        cells = [_cell(cell, row.is_best(i)) for i, cell in enumerate(row.cells)]
        of = f" of {row.classes:,}" if row.classes else ""
        name = [name_of(row.title, 80), el("small", f" {row.metric}{of}")]
        if board.protocol == "retrieval":  # several rows are of one task
            if row.title != group:
                group, across = row.title, 1 + chances + len(row.cells)
                head_of = el("th", name_of(group, 80), scope="rowgroup", colspan=across)
                body.append(el("tr", head_of, class_="group"))
            name = row.metric
        chance = el("td", percent(row.chance, 2), class_="n") if chances else None
        body.append(el("tr", el("th", name, scope="row"), chance, cells))
    count, means = board.means()
    if count > 1 and board.protocol != "retrieval":
        cells = [el("td", percent(m) or "\u2014", class_="n") for m in means]
        title = f"mean of {count} tasks"
        blank = el("td") if chances else None
        body.append(el("tr", el("th", title, scope="row"), blank, cells, class_="mean"))
    notes = [el("p", note, class_="note") for note in board.notes]
    if not body:
        return el("div", *notes)
    table = el("table", el("thead", head), el("tbody", *body))
    said = f"{board.title}, scores in percent"
    box = el(
        "div", table, class_="scroll", role="region", aria_label=said, tabindex="0"
    )
    return el("div", el("h4", board.title), box, *notes)


def board_markdown(board: Board, runs: Sequence[Run]) -> str:
    """A board as a Markdown table."""
    lines = [f"### {markdown(board.suite)}: {markdown(board.title or 'missing')}", ""]
    if board.rows:
        names = [markdown(run.name) for run in runs]
        lines.append(_line(["task", "metric", "chance", *names]))
        lines.append(_line(["---", "---", "--:", *["--:"] * len(names)]))
    for row in board.rows:
        cells = []
        for i, cell in enumerate(row.cells):
            shown = _plain(cell)
            cells.append(f"**{shown}**" if row.is_best(i) else shown)
        about = [markdown(row.title), markdown(row.metric), percent(row.chance, 2)]
        lines.append(_line([*about, *cells]))
    count, means = board.means()
    if count > 1 and board.protocol != "retrieval":
        cells = [percent(m) or "\u2014" for m in means]
        lines.append(_line([f"mean of {count} tasks", "", "", *cells]))
    lines += ["", *(f"- {markdown(note)}" for note in board.notes)]
    return "\n".join(lines).rstrip() + "\n"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent; nothing for None."""
    return "" if value is None else f"{100 * value:.{digits}f}"


def _order(protocol):
    known = list(PROTOCOLS)
    return (known.index(protocol) if protocol in known else len(known), protocol)


def _rows(task: Sequence[Task | None], protocol: str) -> Iterator[Row]:
    one = next(t for t in task if t)
    done = [t.protocols.get(protocol) if t else None for t in task]
    if not any(done):
        return
    if protocol != "retrieval":
        cells = [_of(t, p, protocol) for t, p in zip(task, done, strict=True)]
        metric = METRICS.get(one.metric, one.metric)
        classes = next((t.classes for t in task if t and t.classes), None)
        yield Row(one.title, metric, classes, one.chance, cells)
        return
    values = [metrics_of(p.details) if p else {} for p in done]
    keys = [k for k in in_known_order(k for v in values for k in v) if not is_rank(k)]
    if not keys:
        cells = [_of(t, p, protocol) for t, p in zip(task, done, strict=True)]
        yield Row(one.title, "", None, None, cells)
    for key in keys:
        cells = [
            Cell(v[key]) if key in v else _of(t, p, protocol)._replace(score=None)
            for t, p, v in zip(task, done, values, strict=True)
        ]
        yield Row(one.title, METRICS.get(key, key), None, None, cells)


def _of(task: Task | None, protocol: Protocol | None, name: str) -> Cell:
    if task is not None and task.missing:
        return Cell(None, why="no data")
    if protocol is None:
        skipped = task.skipped.get(name) if task else None
        return Cell(None, why=skipped or "not run")
    if protocol.score is None:
        return Cell(None, why="failed" if protocol.problem else "no score")
    return Cell(protocol.score, protocol.interval)


def _missing(tasks, runs):
    """A sentence for each task without data, and for each protocol that failed."""
    for task in tasks:
        lacking = [t.missing for t in task if t and t.missing]
        one = next(t for t in task if t)
        if lacking:
            said = lacking[0]
            # What to do comes first: Markdown cuts long lines.
            parts = [said.get("how"), said.get("where"), said.get("why")]
            tail = "; ".join(p.strip().rstrip(".;") for p in parts if p)
            yield f"{one.title} was not evaluated: {tail or 'its data is missing'}."
        elif not any(t.protocols for t in task if t):
            yield f"{one.title} was not run yet; evaluate goes on where it stopped."
        for run, t in zip(runs, task, strict=True):
            for p in t.protocols.values() if t else ():
                if p.problem:
                    yield f"{one.title}, {p.title}, {run.name}: {p.problem}"


def _while_training(runs, name):
    cells = []
    for run in runs:
        values = [number(row.get(f"eval/{name}_top1")) for row in run.rows]
        last = next((v for v in reversed(values) if v is not None), None)
        cells.append(Cell(last))
    title = name.replace("_", " ")
    return Row(title, "top-1, last evaluation while training", None, None, cells)


def _cell(cell: Cell, best: bool):
    if cell.score is None:
        return el("td", el("span", f"\u2014 {cell.why}", class_="none"), class_="n")
    shown = percent(cell.score)
    shown = el("strong", shown) if best else shown
    half = el("small", f" \u00b1 {percent(cell.interval)}") if cell.interval else None
    return el("td", shown, half, class_="n best" if best else "n")


def _plain(cell):
    if cell.score is None:
        return f"\u2014 {cell.why}"
    half = f" \u00b1 {percent(cell.interval)}" if cell.interval else ""
    return percent(cell.score) + half


def _line(cells):
    return "| " + " | ".join(cells) + " |"
