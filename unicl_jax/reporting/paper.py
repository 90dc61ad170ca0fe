"""Our runs beside the paper's numbers."""

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from unicl_jax.reporting.headline import percent
from unicl_jax.reporting.markup import Html, el, join, name_of, shorten
from unicl_jax.reporting.runs import Run

SUFFICES = "A mean is compared only if every task of its suite has a score."


def read_paper() -> dict[str, Any]:
    """The columns and tables of `paper.toml`."""
    file = resources.files(__package__) / "paper.toml"
    return tomllib.loads(file.read_text("utf-8"))


def ours(runs: Sequence[Run], columns: Mapping[str, Any]) -> list[dict[str, float]]:
    """What each run has in the paper's columns.

    Args:
      runs: of the page.
      columns: of `read_paper`.

    Returns:
      Fractions by column, for each run; a column without a number is left out.
    """
    found = []
    for run in runs:
        values = {key: _value(run, column) for key, column in columns.items()}
        found.append({key: v for key, v in values.items() if v is not None})
    return found


def comparison(runs: Sequence[Run]) -> Html:
    """The section: open where a run has one of the columns, folded otherwise."""
    paper = read_paper()
    columns, values = paper["columns"], ours(runs, paper["columns"])
    shared = any(values)
    tables = [_table(t, columns, runs, values) for t in paper["tables"]]
    notes = [column["note"] for column in columns.values() if "note" in column]
    about = el(
        "p",
        "In percent; blank: not published, or not found. Sources: paper is the text of "
        "arXiv 2204.03610, readme that of microsoft/UniCL, klite that of "
        f"microsoft/klite. {SUFFICES} {' '.join(notes)}",
        class_="note",
    )
    if shared:
        return join(about, *tables)
    said = (
        "No run here has a task of the paper's (ImageNet-1K, ZS-14, ZS-20): there is "
        "nothing to compare. Its numbers, for reference:"
    )
    return el("details", el("summary", said), about, *tables)


def _value(run, column):
    for results in run.results:
        tasks = results.tasks
        if "tasks" in column:
            scores = [_zero_shot(tasks[n]) for n in column["tasks"] if n in tasks]
            if scores and scores[0] is not None:
                return scores[0]
        elif results.suite in column["suites"]:
            left = set(column.get("without", ()))
            scores = [_zero_shot(t) for n, t in tasks.items() if n not in left]
            if len(scores) == column["count"] and None not in scores:
                return sum(scores) / len(scores)
    return None


def _zero_shot(task):
    protocol = task.protocols.get("zero_shot")
    return protocol.score if protocol else None


def _table(table, columns, runs, values):
    shown = [k for k in columns if any(k in row for row in table["rows"])]
    titles = [el("th", columns[k]["title"], scope="col", class_="n") for k in shown]
    rows = []
    for run, has in zip(runs, values, strict=True):
        if any(k in has for k in shown):
            cells = [el("td", percent(has.get(k)), class_="n") for k in shown]
            model = run.config.get("model.image.name") or "this run"
            about = [name_of(run.name, 60), el("small", shorten(model, 40))]
            name = el("th", about, scope="row")
            rows.append(el("tr", name, cells, el("td", "ours"), class_="ours"))
    for row in table["rows"]:
        cells = [
            el("td", f"{row[k]:.1f}" if k in row else "", class_="n") for k in shown
        ]
        note = "; ".join(x for x in (row["source"], row.get("note")) if x)
        about = [name_of(row["data"]), el("small", row["model"])]
        name = el("th", about, scope="row")
        rows.append(el("tr", name, cells, el("td", name_of(note))))
    head = el("th", "trained on", scope="col")
    head = el("tr", head, titles, el("th", "source", scope="col"))
    grid = el("table", el("thead", head), el("tbody", *rows))
    box = el(
        "div", grid, class_="scroll", role="region", aria_label=table["name"],
        tabindex="0",
    )  # fmt: skip
    note = el("p", table["note"], class_="note") if "note" in table else None
    return join(el("h3", table["name"]), note, box)
