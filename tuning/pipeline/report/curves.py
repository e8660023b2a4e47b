"""The report's curves: what metrics.jsonl holds, by step."""

from __future__ import annotations

from typing import Any

from tuning.pipeline.report import charts
from tuning.pipeline.report.charts import Point, Series
from tuning.pipeline.report.markup import section
from tuning.pipeline.report.record import Record

TREND = 60  # steps from which the trend of the loss is drawn beside its points


def curves(record: Record) -> str:
    """Loss, learning rate, speed and, of preferences, how answers are told apart, by step."""
    loss, window = _points(record, "loss"), max(1, len(record.metrics) // 60)
    if len(loss) < 2:
        return ""
    training = [Series("training rows", loss)]
    if len(loss) >= TREND:
        smooth = Series(f"training rows, mean of {2 * window + 1}", charts.trend(loss, window))
        training = [Series("", loss, faint=True), smooth]
    held_out = Series("held-out rows", _held_out(record, "loss"), dots=True)
    single = (
        ("Accuracy on held-out pairs", _held_out(record, "reward_accuracy"), (0, 1)),
        ("Margin on held-out pairs", _held_out(record, "reward_margin"), (0,)),
        ("Learning rate", _points(record, "lr"), (0,)),
        ("Tokens/s", _points(record, "tokens_per_second"), (0,)),
    )
    small = "".join(
        charts.chart(title, [Series("", points)], least=least) for title, points, least in single
    )
    whole = charts.chart("Loss", [*training, held_out])
    return section("Curves", whole, f'<div class="pair">{small}</div>\n')


def _points(record: Record, name: str) -> list[Point]:
    return [(r["step"], r[name]) for r in record.metrics if _is_number(r.get(name))]


def _held_out(record: Record, name: str) -> list[Point]:
    """The values on the evaluation split, and at step 0 that of the base alone."""
    before: Any = record.value("train").get(f"eval_{name}_before")
    points = _points(record, f"eval_{name}")
    return [(0, before), *points] if _is_number(before) else points


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
