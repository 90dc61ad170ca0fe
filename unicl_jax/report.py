"""Reports on runs: one HTML page that needs nothing else, and a Markdown table.

python -m unicl_jax.report runs/quickstart
python -m unicl_jax.report runs/quickstart runs/labels --out=compared.html

A RUN is a training's workdir, with its evaluations, or a folder that `evaluate` wrote.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from unicl_jax.errors import InputError
from unicl_jax.reporting.maps import POINTS
from unicl_jax.reporting.page import make_markdown, make_page
from unicl_jax.reporting.runs import read_runs

MOST_POINTS = 1500


def report(
    paths: Sequence[str | Path],
    out: str | Path | None = None,
    title: str = "",
    points: int = POINTS,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Path, Path]:
    """Writes the report of runs.

    Args:
      paths: of workdirs, or of evaluations' folders.
      out: the page, `.html`; None: `report.html` in the first run's folder.
      title: of the page; "": made of the runs' names.
      points: images of a map at most, 10 to 1,500; 0: no maps.
      say: told what takes long.

    Returns:
      The page, and the Markdown beside it.

    Raises:
      InputError: if something is no run, or the files cannot be written.
    """
    if points and not 10 <= points <= MOST_POINTS:
        raise InputError(
            f"--map_points must be 10 to {MOST_POINTS:,}, or 0 for no maps: got "
            f"{points}."
        )
    runs = read_runs(paths)
    page = runs[0].path / "report.html" if out is None else Path(out)
    if page.suffix.lower() not in (".html", ".htm"):
        raise InputError(
            f'--out must be an HTML file: got "{out}"; name it "{out}.html".'
        )
    table = page.with_suffix(".md")
    # Markdown first: it fails at once where nothing can be written, maps take minutes.
    for path, make in (
        (table, lambda: make_markdown(runs, title)),
        (page, lambda: make_page(runs, title, points, say)),
    ):
        content = make()
        temporary = path.with_name(path.name + ".new")
        try:
            temporary.write_text(content, "utf-8")
            temporary.replace(path)
        except OSError as error:
            raise InputError(
                f'--out must be a file that can be written: "{path}" gave '
                f"{error.strerror}; name another place."
            ) from error
    return page, table


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: what follows the module's name.

    Returns:
      The exit code: 0; 2 for wrong input.
    """
    parser = argparse.ArgumentParser(
        prog="python -m unicl_jax.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a workdir, or an evaluation's folder"
    )
    parser.add_argument("--out", help=".html; default: report.html in the first RUN")
    parser.add_argument("--title", default="", help="of the page")
    parser.add_argument(
        "--map_points",
        type=int,
        default=POINTS,
        help=f"images of a t-SNE map at most; 0: no maps (default {POINTS})",
    )
    options = parser.parse_args(argv)

    def say(line):
        print(line, file=sys.stderr, flush=True)

    try:
        page, table = report(
            options.runs, options.out, options.title, options.map_points, say
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{page}: {page.stat().st_size / 1e6:.2f} MB; {table.name} beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
