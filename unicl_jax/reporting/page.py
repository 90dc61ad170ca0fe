"""The page, and the Markdown beside it."""

import datetime
import re
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import unicl_jax
from unicl_jax.reporting import headline, maps, paper
from unicl_jax.reporting.markup import (
    Html,
    clean,
    el,
    join,
    markdown,
    name_of,
    shorten,
    slug,
)
from unicl_jax.reporting.results import number, text
from unicl_jax.reporting.runs import Run, differing
from unicl_jax.reporting.tasks import task_section
from unicl_jax.reporting.training import legend, training

OPEN = 8  # with more tasks than these, they are folded
PICTURES = 500  # of confused pairs, over the whole page
UNITS = "Scores are in percent; \u00b1 is half of a 95 % interval."
FIELDS = 40  # that differ, before the rest is folded
ABOUT = (  # of a run by itself
    "model.image.name",
    "model.text.name",
    "model.embed_dim",
    "objective.name",
    "optimizer.name",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "batch_size",
    "total_steps",
    "seed",
)


def make_page(
    runs: Sequence[Run],
    title: str = "",
    points: int = maps.POINTS,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """The whole report as one HTML file that needs nothing else.

    Args:
      runs: what is reported.
      title: of the page; "": made of the runs' names.
      points: images of a map at most; 0: no maps.
      say: told what takes long.

    Returns:
      The file's text. Nothing in it is a program, and its policy allows none.
    """
    title = title or "Report: " + ", ".join(run.name for run in runs)
    sections = [("Results", "results", _results(runs))]
    sections.append(("Runs", "runs", _about(runs)))
    sections.append(("Training", "training", training(runs)))
    tasks = _tasks(runs, points, say)
    if tasks:
        sections.append(("Tasks", "tasks", tasks))
    sections.append(("The paper's results", "paper", paper.comparison(runs)))
    links = [el("li", el("a", name, href=f"#{id_}")) for name, id_, _ in sections]
    parts = [
        el("section", el("h2", name), body, id=id_) for name, id_, body in sections
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    style = (resources.files(__package__) / "style.css").read_text("utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", Html(style)),
    )
    body = el(
        "body",
        el("header", el("h1", title)),
        el("nav", el("ul", *links), aria_label="contents"),
        el("main", *parts),
        el("footer", f"unicl_jax {unicl_jax.__version__}. {UNITS}"),
    )
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def make_markdown(runs: Sequence[Run], title: str = "") -> str:
    """The headline tables as Markdown."""
    title = title or "Report: " + ", ".join(run.name for run in runs)
    lines = [f"# {markdown(title)}", ""]
    for run in runs:
        step = run.last_step
        at = f" at step {step:,}" if step is not None else ""
        when = f", {markdown(_date(run))}" if _date(run) else ""
        lines.append(f"- **{markdown(run.name)}**{at}{when}")
        lines += [f"  - {markdown(problem)}" for problem in run.problems]
    boards = headline.boards(runs)
    lines += ["", UNITS, ""]
    if not boards:
        lines.append("Nothing was evaluated yet.")
    lines += [headline.board_markdown(board, runs) for board in boards]
    return clean_lines("\n".join(lines).rstrip() + "\n")


def clean_lines(value: str) -> str:
    """A text whose lines can be written as UTF-8."""
    return "\n".join(clean(line) for line in value.split("\n"))


def _results(runs):
    boards = headline.boards(runs)
    if not boards:
        return el(
            "p",
            "Nothing was evaluated yet: python -m unicl_jax.evaluate does it.",
            class_="note",
        )
    parts = []
    for suite in dict.fromkeys(board.suite for board in boards):
        own = [headline.board_html(b, runs) for b in boards if b.suite == suite]
        title = suite if suite == headline.WHILE_TRAINING else f"suite {suite}"
        parts.append(el("h3", name_of(title[:1].upper() + title[1:], 80)))
        parts += [el("p", why, class_="note") for why in _provisional(runs, suite)]
        parts.append(el("div", *own, class_="boards"))
    return join(*parts)


def _provisional(runs, suite):
    """Why a suite is provisional, if it is."""
    given = [r.provisional for run in runs for r in run.results if r.suite == suite]
    return [f"Provisional: {why}" for why in dict.fromkeys(given) if why]


def _about(runs):
    heads = [el("th", name_of(run.name, 40), scope="col") for run in runs]
    rows = [
        ("path", [str(run.path) for run in runs]),
        ("last step", [run.last_step for run in runs]),
        ("evaluated", [_evaluated(run) for run in runs]),
        ("date", [_date(run) for run in runs]),
        ("data", [_data(run) for run in runs]),
        ("versions", [_versions(run) for run in runs]),
    ]
    differ = list(differing(runs).items()) if len(runs) > 1 else []
    if not differ:
        names = [k for k in ABOUT if any(k in run.config for run in runs)]
        differ = [(k, [run.config.get(k) for run in runs]) for k in names]
        title = "The recipe"
    else:
        title = "The recipe, where the runs differ"
    parts = [_table(heads, rows, "what each run is")]
    for run in runs:
        for problem in run.problems:
            parts.append(el("p", name_of(run.name, 60), f": {problem}", class_="note"))
    if differ:
        parts += [el("h3", title), _table(heads, differ[:FIELDS], title)]
    if len(differ) > FIELDS:
        more = _table(heads, differ[FIELDS:], title)
        told = f"{len(differ) - FIELDS:,} more fields"
        parts.append(el("details", el("summary", told), more))
    return join(*parts)


def _table(heads, rows, said):
    body = []
    for key, values in rows:
        if any(v not in (None, "") for v in values):
            cells = [el("td", _value(v)) for v in values]
            body.append(el("tr", el("th", _field(key), scope="row"), cells))
    head = el("thead", el("tr", el("th", el("span", "field", class_="unseen")), heads))
    table = el("table", head, el("tbody", *body), class_="fields")
    return el(
        "div", table, class_="scroll", role="region", aria_label=said, tabindex="0"
    )


def _field(key):
    """A field's name, which may be broken behind its dots and underscores."""
    parts = re.split(r"(?<=[._])", shorten(key, 80))
    return el("bdi", *[join(el("wbr") if i else None, p) for i, p in enumerate(parts)])


def _value(value: Any) -> Html:
    if value in ((), [], {}):
        return el("span", "none", class_="none")
    if value is None:
        return el("span", "\u2014", class_="none")
    if isinstance(value, bool):
        return name_of("yes" if value else "no")
    if number(value) is not None:
        return name_of(f"{value:,}" if isinstance(value, int) else f"{value:g}")
    if isinstance(value, list | tuple):
        value = ", ".join(str(v) for v in value)
    return name_of(value, 160)


def _date(run):
    given = next((r.date for r in run.results if r.date), run.date)
    try:
        moment = datetime.datetime.fromisoformat(given or "")
    except ValueError:
        return given
    zone = " UTC" if moment.utcoffset() == datetime.timedelta(0) else ""
    return f"{moment:%Y-%m-%d %H:%M}{zone}"


def _evaluated(run):
    said = []
    for results in run.results:
        at = f" at step {results.step:,}" if results.step is not None else ""
        digest = text(results.model.get("digest"))
        said.append(f"{results.suite}{at}" + (f" ({digest[:8]})" if digest else ""))
    return "; ".join(said)


def _data(run):
    """Sources with kind and weight, from a flat config."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in run.config.items():
        parts = key.split(".")
        if parts[:2] == ["data", "sources"] and len(parts) > 3:
            found.setdefault(".".join(parts[2:-1]), {})[parts[-1]] = value
    return "; ".join(
        f"{name} ({source.get('kind', '?')}, weight {source.get('weight', 1)})"
        for name, source in found.items()
    )


def _versions(run):
    found = {k: v for r in run.results for k, v in r.versions.items()}
    return ", ".join(f"{k} {v}" for k, v in found.items())


def _tasks(runs, points, say):
    found = [
        (suite, task)
        for suite in headline.suites(runs)
        for task in headline.tasks_of(runs, suite)
    ]
    shares = max(1, len(found) * len(runs))
    pairs = max(2, min(8, PICTURES // (5 * shares)))
    used, parts = set(), [legend(runs)] if len(runs) > 1 else []
    for suite, of_runs in found:
        name = next(t.name for t in of_runs if t)
        id_ = base = f"task-{slug(suite, name)}"
        count = 1
        while id_ in used:
            count += 1
            id_ = f"{base}-{count}"
        used.add(id_)
        is_open = len(found) <= OPEN
        parts.append(
            task_section(suite, of_runs, runs, id_, is_open, points, pairs, say)
        )
    return join(*parts) if found else None
