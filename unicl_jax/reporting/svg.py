"""Figures as SVG, drawn small: a phone shows them at their own size."""

import math
from collections.abc import Sequence
from typing import Any

from unicl_jax.reporting.markup import Html, el, join, shorten

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 12, 34  # around the axes
COLORS = 8  # classes .c0 .. .c7 of the page's style
DASHES = (None, "6 3", "2 3", "8 3 2 3")  # beside colours, which not all can tell


class Axis:
    """Data to pixels, and where the ticks are."""

    def __init__(
        self,
        values: Sequence[float],
        start: float,
        end: float,
        log: bool = False,
        percent: bool = False,
        from_zero: bool = False,
    ):
        """Makes an axis around values.

        Args:
          values: finite; those that are not above 0 lie at the left end of a log axis.
          start: pixel of the smallest value.
          end: pixel of the largest.
          log: whether equal distances are equal ratios.
          percent: whether ticks are fractions in percent.
          from_zero: whether 0 is on it.
        """
        self._start, self._end, self._percent = start, end, percent
        self.log = log and any(v > 0 for v in values)
        self._has_zero = self.log and any(v <= 0 for v in values)
        if self.log:
            above = [math.log10(v) for v in values if v > 0]
            low, high = min(above), max(above)
            if high - low < 1e-9:
                low, high = low - 0.5, high + 0.5
            self._above = low
            # A log axis has no place for a weight decay of 0: it gets one at the left.
            self._low, self._high = low - self._has_zero * (high - low) / 6, high
        else:
            low, high = min(values, default=0.0), max(values, default=1.0)
            if from_zero:
                low, high = min(low, 0.0), max(high, 0.0)
            if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
                low, high = low - (0.5 * abs(low) or 0.5), high + (0.5 * abs(high) or 1)
            room = 0.04 * (high - low)
            low -= room * (low != 0 or not from_zero)
            high += room * (high != 0 or not from_zero)
            self._low, self._high = low, high

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        if self.log:
            value = math.log10(value) if value > 0 else self._low
        share = (value - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Pixels and texts of round values, about `count` of them."""
        if self.log:
            return self._log_ticks(count)
        raw = (self._high - self._low) / max(count, 1)
        unit = 10 ** math.floor(math.log10(raw))
        step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
        first, last = math.ceil(self._low / step - 1e-9), self._high / step + 1e-9
        values = [i * step for i in range(first, math.floor(last) + 1)]
        return [(self(v), self._said(v)) for v in values]

    def _said(self, value):
        if self._percent:
            return f"{100 * value:.6g}"
        return short_number(value)

    def _log_ticks(self, count):
        low = math.ceil(self._above - 1e-9)
        decades = list(range(low, math.floor(self._high + 1e-9) + 1))
        every = max(1, -(-len(decades) // count))
        ticks = [(self(10.0**d), short_number(10.0**d)) for d in decades[::every]]
        if self._has_zero:
            ticks.insert(0, (self._start, "0"))
        if len(ticks) < 2:
            ends = [10**self._above, 10**self._high]
            ticks += [(self(v), short_number(v)) for v in ends]
        return ticks


def short_number(value: float) -> str:
    """A number in few characters: 0.003, 1.5k, 2M, 1e-6."""
    if value == 0:
        return "0"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size <= abs(value) < 1000 * size and abs(value) >= 1e4:
            return f"{value / size:.4g}{unit}"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def at(value: float) -> str:
    """A coordinate in few characters."""
    return f"{value:.1f}".removesuffix(".0")


def style_of(i: int) -> dict[str, Any]:
    """Class and dashes of the i-th line of a figure."""
    dash = DASHES[(i // COLORS + i) % len(DASHES)]
    return {"class_": f"c{i % COLORS}", "stroke_dasharray": dash}


def line(x: Sequence[float], y: Sequence[float], **attributes: Any) -> Html:
    """A line through pixels."""
    points = "L".join(f"{at(a)} {at(b)}" for a, b in zip(x, y, strict=True))
    given = {"fill": "none", **attributes}
    return el("path", d=f"M{points}", **given) if points else Html("")


def band(
    x: Sequence[float], low: Sequence[float], high: Sequence[float], **attributes: Any
) -> Html:
    """What lies between two lines."""
    there = [f"{at(a)} {at(b)}" for a, b in zip(x, low, strict=True)]
    back = [f"{at(a)} {at(b)}" for a, b in zip(x, high, strict=True)][::-1]
    return el("path", d=f"M{'L'.join(there + back)}Z", **attributes)


def dots(x: Sequence[float], y: Sequence[float], size: float, **attributes: Any):
    """Round points: one path, since a thousand circles are a big file."""
    path = "".join(f"M{at(a)} {at(b)}h0" for a, b in zip(x, y, strict=True))
    return el(
        "path", d=path, stroke_linecap="round", stroke_width=size, fill="none",
        **attributes,
    )  # fmt: skip


def label(x: float, y: float, value: Any, limit: int = 24, **attributes: Any) -> Html:
    """A text at pixels, cut to `limit` characters."""
    whole = str(value)
    short = shorten(whole, limit)
    more = el("title", whole) if short != whole else None
    return el("text", short, more, x=at(x), y=at(y), **attributes)


def frame(x: Axis, y: Axis, x_title: str, y_title: str) -> Html:
    """Grid, ticks and titles of a figure's axes."""
    parts = []
    for pixel, said in y.ticks():
        parts.append(
            el("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=at(pixel),
               y2=at(pixel))
        )  # fmt: skip
        parts.append(label(LEFT - 5, pixel + 3.5, said, text_anchor="end"))
    base = HEIGHT - BOTTOM
    for pixel, said in x.ticks():
        parts.append(
            el("line", class_="tick", x1=at(pixel), x2=at(pixel), y1=base, y2=base + 4)
        )
        parts.append(label(pixel, base + 15, said, text_anchor="middle"))
    parts.append(el("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(label(middle, HEIGHT - 4, x_title, 48, text_anchor="middle"))
    turned = f"translate(11 {at((TOP + base) / 2)}) rotate(-90)"
    parts.append(
        label(0, 0, y_title, 30, text_anchor="middle", transform=turned)
    )  # fmt: skip
    return join(parts)


def axes(
    x: Sequence[float],
    y: Sequence[float],
    log_x: bool = False,
    percent: bool = False,
    from_zero: bool = False,
) -> tuple[Axis, Axis]:
    """The two axes of a figure of the usual size, around all that it shows."""
    base = HEIGHT - BOTTOM
    return (
        Axis(x, LEFT + 4, WIDTH - RIGHT - 8, log=log_x),
        Axis(y, base, TOP, percent=percent, from_zero=from_zero),
    )


def svg(description: str, *parts: Any, height: float = HEIGHT) -> Html:
    """A figure with words for those who don't see it.

    Args:
      description: what it shows.
      *parts: of the figure.
      height: in pixels.

    Returns:
      An `svg` element, as wide as its place.
    """
    return el(
        "svg",
        *parts,
        viewbox=f"0 0 {WIDTH} {at(height)}",
        role="img",
        aria_label=shorten(description, 400),
    )


def figure(title: str, drawing: Html, *notes: Any) -> Html:
    """A figure under its title, notes below."""
    caption = el("figcaption", el("b", title), *[el("small", n) for n in notes if n])
    return el("figure", caption, drawing)
