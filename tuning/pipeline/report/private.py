"""Parts of the report that hold rows and answers: for report.html alone, never for the network."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from tuning.pipeline.report.markup import note, section, table, text
from tuning.pipeline.report.record import Private, Value

SHOWN = 20  # questions of an evaluation
LONGEST = 2000  # characters of a text


def answers(private: Private) -> str:
    """Questions and samples with the base's and the tuned model's answer side by side."""
    cards = [
        _card(each.get("question"), {"before": each.get("base"), "after": each.get("tuned")})
        for each in private.answers
    ]
    samples = [
        _card(
            each.get("prompt"),
            {
                "expected": each.get("expected"),
                "before": each.get("base"),
                "after": each.get("tuned"),
            },
        )
        for each in private.samples
    ]
    title = "<h3>The first of the held-out rows</h3>" if samples else ""
    return section("Before and after", *cards, title, *samples)


def _card(question: Any, replies: dict[str, Any]) -> str:
    boxes = "".join(
        f'<div class="{name}"><span>{name}</span><p>{text(str(reply)[:LONGEST])}</p></div>'
        for name, reply in replies.items()
    )
    asked = text(str(question)[:LONGEST])
    return f'<article><p class="asked">{asked}</p><div class="sides">{boxes}</div></article>\n'


def evaluation(private: Private) -> str:
    """evaluation.json as tables: each measure of base and adapter, and the questions asked."""
    tasks = private.evaluation.get("tasks") or []
    if not tasks:
        return ""
    models = list(dict.fromkeys(name for task in tasks for name in task["models"]))
    scores = (
        (
            f"{task['task']}: {task['metric']}",
            f"{task['samples']:,}" if task.get("samples") else None,
            *(_score(task["models"].get(name)) for name in models),
        )
        for task in tasks
    )
    asked = private.evaluation.get("asked") or []
    return section(
        "Evaluation",
        table(("task", "samples", *models), scores, kind="numbers"),
        note("In brackets: 95 % confidence interval."),
        table(("question", "right", *models), _asked(asked, models), kind="wide"),
    )


def _score(measured: Value | None) -> str:
    if measured is None:
        return "not measured"
    if measured.get("low") is None:
        return f"{measured['value']:.4g}"
    return f"{measured['value']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}]"


def _asked(asked: list[Value], models: list[str]) -> Iterator[tuple[Any, ...]]:
    for each in islice(asked, SHOWN):
        replies = each.get("replies") or {}
        yield each["question"], each.get("answer"), *(replies.get(name) for name in models)
