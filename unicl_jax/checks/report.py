"""What was found, section by section, and how it is printed."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unicl_jax.errors import InputError

GOOD, NOTE, WARNING, PROBLEM = "good", "note", "warning", "problem"
WIDTH = 80  # columns
MARKS = {GOOD: "✓", NOTE: "·", WARNING: "!", PROBLEM: "✗"}
PLAIN = {GOOD: "+", NOTE: "-", WARNING: "!", PROBLEM: "x"}  # where those can't be shown
STYLES = {GOOD: "green", NOTE: "dim", WARNING: "yellow", PROBLEM: "bold red"}
NAMED = 3  # examples in a line


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of a report, and of what is to be mended, what to do."""

    mark: str  # a key of MARKS
    text: str
    todo: str = ""


@dataclasses.dataclass
class Section:
    """What was found about one thing.

    Attributes:
      title: of it.
      findings: in the order in which they are shown.
    """

    title: str
    findings: list[Finding] = dataclasses.field(default_factory=list)

    def good(self, text: str) -> None:
        """Adds what is as it should be."""
        self.findings.append(Finding(GOOD, text))

    def note(self, text: str) -> None:
        """Adds what is worth knowing, and nothing to mend."""
        self.findings.append(Finding(NOTE, text))

    def warn(self, text: str, todo: str) -> None:
        """Adds what training gets along with, and should not have to."""
        self.findings.append(Finding(WARNING, text, todo))

    def fail(self, text: str, todo: str = "") -> None:
        """Adds what training stops at."""
        self.findings.append(Finding(PROBLEM, text, todo))

    def refuse(self, error: InputError) -> None:
        """Adds what the trainer would stop at, in its own words."""
        # "What must hold: what was given; what to do", but for some without the last.
        what, _, todo = str(error).rpartition("; ")
        if not what or todo.count(")") > todo.count("("):
            what, todo = str(error), ""
        self.fail(what, todo)

    def count(self, mark: str) -> int:
        """Returns how many findings have a mark."""
        return sum(finding.mark == mark for finding in self.findings)


def make_console() -> Console:
    """A console of at most WIDTH columns, without guesses at what is a number."""
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH)
    return console


def show(console: Console, section: Section) -> None:
    """Prints a section, and an empty line.

    Args:
      console: where.
      section: what.
    """
    marks, arrow = MARKS, "→"
    try:
        "".join([*MARKS.values(), arrow]).encode(console.encoding)
    except UnicodeEncodeError:
        marks, arrow = PLAIN, "->"
    table = Table.grid(padding=(0, 1), pad_edge=True)
    table.add_column()
    table.add_column(overflow="fold")
    for finding in section.findings:
        text = Text(finding.text)
        if finding.todo:
            text.append(f"\n{arrow} {finding.todo}", "bold")
        table.add_row(Text(marks[finding.mark], STYLES[finding.mark]), text)
    console.print(Text(section.title, "bold"))
    console.print(table)
    console.print()


def verdict(sections: Iterable[Section]) -> tuple[int, str]:
    """What the whole report comes to.

    Args:
      sections: all of them.

    Returns:
      The number of problems, and the last line.
    """
    sections = list(sections)
    problems = sum(section.count(PROBLEM) for section in sections)
    warnings = sum(section.count(WARNING) for section in sections)
    if not problems + warnings:
        return 0, "ready to train"
    said = f"{some(problems, 'problem')}, {some(warnings, 'warning')}"
    return problems, said if problems else f"ready to train: {said}"


def some(count: int, thing: str) -> str:
    """A count and its noun: 1 record, 2,000 records, 3 classes."""
    plural = thing + ("es" if thing.endswith(("s", "sh", "x")) else "s")
    if thing.endswith("y"):
        plural = thing[:-1] + "ies"
    return f"{count:,} {thing if count == 1 else plural}"


def named(names: Sequence[str], quote: str = '"') -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(f"{quote}{name}{quote}" for name in names[:NAMED]) + more


def size(count: float) -> str:
    """Bytes as 512 bytes, 3.2 MB, 14 GB."""
    if count < 1e3:
        return f"{count:.0f} bytes"
    power = min(4, int(math.log10(count) // 3))
    value = count / 1e3**power
    return f"{value:.{0 if value >= 10 else 1}f} {('', 'kB', 'MB', 'GB', 'TB')[power]}"


def percent(share: float) -> str:
    """A share as 3 %, 0.2 %, under 0.1 %."""
    if 0 < share < 1e-3:
        return "under 0.1 %"
    return f"{100 * share:.{0 if share in (0, 1) or share >= 0.1 else 1}f} %"


def two_digits(number: float) -> str:
    """A measured number as 0.083, 12, 1,400: no more digits than it has."""
    return f"{float(f'{number:.2g}'):,.15g}"
