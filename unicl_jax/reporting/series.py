"""A run's numbers over its steps, few enough to draw."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

POINTS = 240  # of a line; a figure is hardly twice as many pixels wide


class Series(NamedTuple):
    """A line, and how far what it stands for spread around it."""

    x: list[float]
    y: list[float]  # means
    low: list[float]
    high: list[float]
    left_out: int  # values that were not finite


def series(
    rows: Sequence[Mapping[str, Any]], key: str, points: int = POINTS
) -> Series | None:
    """One scalar over the steps.

    More values than `points` are put in that many bins of equal width; a bin is shown
    by the means of its steps and values, and their extremes.

    Args:
      rows: of `metrics.jsonl`, by step; a step that is there twice counts as it was
        last.
      key: of the scalar.
      points: at most so many.

    Returns:
      The line; None if no row has the scalar.
    """
    given = {row["step"]: row[key] for row in rows if key in row}
    if not given:
        return None
    finite = [(float(s), float(v)) for s, v in given.items() if _is_finite(v)]
    left_out = len(given) - len(finite)
    if len(finite) <= points:
        x, y = [s for s, _ in finite], [v for _, v in finite]
        return Series(x, y, y, y, left_out)
    first, last = finite[0][0], finite[-1][0]
    bins: list[list[tuple[float, float]]] = [[] for _ in range(points)]
    for s, v in finite:
        bins[min(points - 1, int((s - first) / (last - first) * points))].append((s, v))
    bins = [b for b in bins if b]
    values = [[v for _, v in b] for b in bins]
    return Series(
        [math.fsum(s for s, _ in b) / len(b) for b in bins],
        [math.fsum(v) / len(v) for v in values],
        [min(v) for v in values],
        [max(v) for v in values],
        left_out,
    )


def _is_finite(value):
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300  # also false for NaN; sums of more would overflow
