"""Curves: round ticks that hold the values, long runs thinned, what cannot be drawn left out."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from tuning.pipeline.report import charts
from tuning.pipeline.report.charts import Point, Series

VALUES = st.floats(-1e12, 1e12)


@given(VALUES, VALUES, st.integers(2, 8))
def test_ticks_are_round_few_and_hold_every_value(a: float, b: float, spaces: int) -> None:
    """1, 2 or 5 times a power of ten apart, from at most the lowest to at least the highest."""
    low, high = min(a, b), max(a, b)
    if high - low < 1e-6 * max(abs(low), abs(high)):
        low = high
    ticks = charts.ticks(low, high, spaces)

    apart = ticks[1] - ticks[0]
    assert ticks[0] <= low + apart * 1e-3 and high - apart * 1e-3 <= ticks[-1]
    assert 2 <= len(ticks) <= spaces + 3
    digits = apart / 10.0 ** math.floor(math.log10(apart) + 1e-3)
    assert min(abs(digits - one) for one in (1, 2, 5, 10)) < 0.01


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=2000))
def test_thinning_keeps_ends_and_extremes(values: list[float]) -> None:
    """Of thousands of points a few hundred, in order, with the first, last, lowest, highest."""
    points: list[Point] = [(float(step), value) for step, value in enumerate(values)]
    drawable = [point for point in points if abs(point[1]) < 1e100]
    thin = charts.thinned(points)

    assert thin == sorted(thin) and set(thin) <= set(drawable)
    assert len(thin) <= 2 * charts.BUCKETS + 2
    if drawable:
        assert {drawable[0], drawable[-1]} <= set(thin)
        for extreme in (min, max):
            assert extreme(y for _, y in drawable) == extreme(y for _, y in thin)


def figure(*series: Series, least: Sequence[float] = ()) -> ET.Element:
    return ET.fromstring(charts.chart("Loss", series, least=least))


def test_the_loss_is_drawn_with_the_held_out_rows_as_dots() -> None:
    """A falling loss falls on the picture, from the left edge to the right one."""
    drawn = figure(
        Series("training", [(1, 4.0), (2, 2.0), (3, 1.0)]),
        Series("held out", [(3, 1.5)], dots=True),
    )

    (line,) = drawn.iter("polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    (dot,) = drawn.iter("circle")
    assert [x for x, _ in points] == [0, 50, 100]
    assert [y for _, y in points] == sorted(y for _, y in points)
    assert dot.attrib["cx"] == "100.0%"
    assert points[1][1] < float(dot.attrib["cy"].rstrip("%")) < points[2][1]
    assert ["training 1", "held out 1.5"] == [
        "".join(key.itertext()) for key in drawn.iter("span") if "key" in key.attrib["class"]
    ]


def test_every_tick_has_a_label_and_steps_are_whole() -> None:
    """Values between the ticks, thousands in groups; between two steps there is no third."""
    labels = [each.text for each in figure(Series("", [(1, 1200.0), (2, 3.0)])).iter("text")]

    assert ["1,500", "1,000", "500", "0"] == sorted(
        (label for label in labels[:4] if label), key=lambda label: -float(label.replace(",", ""))
    )
    assert ["1", "2", "step"] == labels[4:]


def test_an_axis_holds_what_it_has_to() -> None:
    """An accuracy of one, all the time, is drawn at the top of an axis from nothing to all."""
    drawn = figure(Series("", [(5, 1.0), (10, 1.0)]), least=(0, 1))

    assert {"0", "1"} <= {each.text for each in drawn.iter("text")}
    (line,) = drawn.iter("polyline")
    assert "0.0,0.0 100.0,0.0" == line.attrib["points"]


def test_what_cannot_be_drawn_is_left_out() -> None:
    """Nothing, one step, or values that are not finite."""
    nan, infinity = float("nan"), float("inf")
    for points in ([], [(1, 2.0)], [(1, 2.0), (1, 3.0)], [(1, 2.0), (2, nan), (3, infinity)]):
        assert "" == charts.chart("Loss", [Series("a", points)])


def test_numbers_are_short() -> None:
    """As a person writes them."""
    written = {0: "0", 1500: "1,500", 0.02: "0.02", 2e-5: "2e-5", -3e7: "-3e7", 1e-3: "0.001"}
    assert list(written.values()) == [charts.label(value) for value in written]


def test_a_trend_follows_a_line_and_smooths_noise() -> None:
    """A straight line is its own trend; of noise the trend is far calmer."""
    line: list[Point] = [(x, 2.0 * x) for x in range(50)]
    assert all(math.isclose(a[1], b[1]) for a, b in zip(line, charts.trend(line, 5), strict=True))
    noise = charts.trend([(x, float(x % 2)) for x in range(50)], 5)
    assert all(0.4 < y < 0.6 for _, y in noise[5:-5])


def test_titles_and_names_are_text() -> None:
    """What is written in a figure is never read as markup."""
    page = charts.chart("<b>", [Series('"><script>', [(1, 1.0), (2, 2.0)])])
    assert not re.search(r"<script|<b><b>", page)
