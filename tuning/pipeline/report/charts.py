"""Curves as inline SVG that needs no script: round ticks, a grid, a legend with the last values.

The plot is as wide as its place: positions are percentages and only the lines are stretched, so
that text and strokes keep their size on a telephone, a wide screen and paper. The page has colours.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]  # step, value
BUCKETS = 250  # of a long curve; each keeps its lowest and highest point
ROWS, COLUMNS = 4, 5  # spaces between ticks, about


@dataclass(frozen=True)
class Series:
    """Points of one kind by step: a line, or `dots`; `faint` where another line tells its trend."""

    name: str
    points: Sequence[Point]
    dots: bool = False
    faint: bool = False


def chart(title: str, series: Sequence[Series], *, least: Sequence[float] = ()) -> str:
    """A figure of `series` with legend and axes; empty without points at two steps.

    `least` are values that the axis holds in any case.
    """
    shown = [Series(s.name, thinned(s.points), s.dots, s.faint) for s in series if s.points]
    steps = [x for each in shown for x, _ in each.points]
    values = [y for each in shown for _, y in each.points] + list(least)
    if len(set(steps)) < 2:
        return ""
    left, right = min(steps), max(steps)
    rows = ticks(min(values), max(values), ROWS)
    columns = [x for x in ticks(left, right, COLUMNS) if left <= x <= right and x == int(x)]

    def across(x: float) -> float:
        return round(100 * (x - left) / (right - left), 2)

    def down(y: float) -> float:
        return round(100 * (rows[-1] - y) / (rows[-1] - rows[0]), 2)

    def drawn(number: int, each: Series) -> str:
        if each.dots:
            return "".join(
                f'<circle class="s{number}" cx="{across(x)}%" cy="{down(y)}%" r="4">'
                f"<title>step {x:,.0f}: {y:.4g}</title></circle>"
                for x, y in each.points
            )
        line = " ".join(f"{across(x)},{down(y)}" for x, y in each.points)
        kind = f"s{number} faint" if each.faint else f"s{number}"
        box = 'viewBox="0 0 100 100" preserveAspectRatio="none"'
        return f'<svg {box}><polyline class="{kind}" points="{line}"/></svg>'

    grid = "".join(
        f'<line x1="0" x2="100%" y1="{down(y)}%" y2="{down(y)}%"/>'
        f'<text class="y" x="-6" y="{down(y)}%" dy=".35em">{label(y)}</text>'
        for y in rows
    ) + "".join(
        f'<line x1="{across(x)}%" x2="{across(x)}%" y1="100%" y2="100%" class="tick"/>'
        f'<text class="x" x="{across(x)}%" y="100%" dy="1.5em">{label(x)}</text>'
        for x in columns
    )
    names = [
        f'<span class="key s{number}{" dot" if each.dots else ""}">{html.escape(each.name)}'
        f" <b>{label(float(f'{each.points[-1][1]:.3g}'))}</b></span>"
        for number, each in enumerate(shown)
        if not each.faint
    ]
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b> {' '.join(names)}</figcaption>"
        f'<svg role="img" aria-label="{html.escape(title)} by step">{grid}'
        f'<text class="y" x="-16" y="100%" dy="1.5em">step</text>'
        f"{''.join(itertools.starmap(drawn, enumerate(shown)))}</svg></figure>\n"
    )


def ticks(low: float, high: float, spaces: int) -> list[float]:
    """Round numbers from at most `low` to at least `high`: 1, 2 or 5 times a power of ten apart."""
    rough = ((high - low) or abs(high) or 1.0) / spaces
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    if first == last:
        first, last = first - 1, last + 1
    return [float(f"{number * step:.9g}") for number in range(first, last + 1)]


def label(value: float) -> str:
    """A tick's number as short as it can be: 1,500, 0.02, 2e-5."""
    if value and not 1e-3 <= abs(value) < 1e6:
        digits, _, power = f"{value:.3g}".partition("e")
        return f"{digits}e{int(power)}" if power else digits
    return f"{value:,.10g}"


def thinned(points: Sequence[Point]) -> list[Point]:
    """`points` in order of steps, and of many only those that a picture shows: every extreme."""
    points = sorted((x, y) for x, y in points if abs(y) < 1e100)  # no infinity, no NaN
    if len(points) <= 2 * BUCKETS:
        return points
    size = math.ceil(len(points) / BUCKETS)
    kept = {points[0], points[-1]}
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept |= {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
    return sorted(kept)


def trend(points: Sequence[Point], window: int) -> list[Point]:
    """Each point's mean with its neighbours, `window` on each side; fewer at both ends."""
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    result = []
    for index, (x, _) in enumerate(points):
        reach = min(window, index, len(points) - 1 - index)
        total = sums[index + reach + 1] - sums[index - reach]
        result.append((x, total / (2 * reach + 1)))
    return result
