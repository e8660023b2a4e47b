"""Run directory -> one HTML page: progress, speed, loss, planned and measured values.

One self-contained file. While a run lasts it is served and reloads itself (`progress_server`); at
the end it is `report.html` in the run directory. It shows no row of the data and no answer.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tuning import files
from tuning.pipeline import outcome, tracking

WIDTH, HEIGHT, EDGE = 640, 220, 44  # of the chart, in pixels
RELOAD = '<meta http-equiv="refresh" content="5">'
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">{reload}
<meta name="viewport" content="width=device-width"><title>{name}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; margin: 1em 0 }}
td, th {{ text-align: right; padding: .15em 1em .15em 0 }}
td:first-child, th:first-child {{ text-align: left }}
svg {{ width: 100%; height: auto }} svg text {{ font-size: 12px; fill: currentColor }}
</style>
<h1>{name}</h1><p>{state}</p>
{chart}
{tables}
</html>
"""
GIB = 2**30


def write(run: Path, *, name: str, ended: str = "") -> None:
    """Write the run's report.html; `ended` says why a run has ended early."""
    files.write(run / "report.html", page(run, name=name, ended=ended))


def page(run: Path, *, name: str, reload: bool = False, ended: str = "") -> str:
    """The page of the run directory `run` as it is now."""
    now, records = outcome.progress(run), _records(run)
    idle = "no step done" if ended else "not training yet"
    state = f"step {now['step']:,} of {now.get('steps', 0):,}" if now else idle
    if now and isinstance(now.get("no_better_since"), int):
        state += f": stopped, no better on held-out rows since step {now['no_better_since']:,}"
    if ended:
        state = f"{ended} ({state})"
    elif now and reload and now.get("eta_seconds"):
        state += f", {now['eta_seconds'] / 60:,.0f} min to go"
    return PAGE.format(
        reload=RELOAD if reload else "",
        name=html.escape(name),
        state=html.escape(state),
        chart=chart(
            [(r["step"], r.get("loss")) for r in records if "eval_loss" not in r],
            [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r],
        ),
        tables=_table(("now", ""), _now(now))
        + _table(*_planned(run, now))
        + "".join(
            f'<p>{html.escape(name)}: <a href="{html.escape(link)}">{html.escape(link)}</a></p>'
            for name, link in tracking.links(run).items()
        ),
    )


def chart(loss: Sequence[tuple[int, Any]], held_out: Sequence[tuple[int, Any]]) -> str:
    """The loss by step as inline SVG: a line for the training rows, dots for those held out."""
    lines = [[(x, y) for x, y in points if isinstance(y, float)] for points in (loss, held_out)]
    points = lines[0] + lines[1]
    if len(points) < 2:
        return ""
    (left, right), (low, high) = (
        (min(values), max(values)) for values in zip(*points, strict=True)
    )

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / ((right - left) or 1)
        up = (y - low) / ((high - low) or 1)
        wide, tall = WIDTH - 2 * EDGE, HEIGHT - 2 * EDGE
        return round(EDGE + across * wide, 1), round(HEIGHT - EDGE - up * tall, 1)

    drawn = " ".join("{},{}".format(*place(x, y)) for x, y in lines[0])
    dots = "".join(
        '<circle cx="{}" cy="{}" r="4" fill="#d33">'.format(*place(x, y))
        + f"<title>step {x:,}, held out: {y:.4f}</title></circle>"
        for x, y in lines[1]
    )
    legend = "loss by step; dots: on held-out rows" if lines[1] else "loss by step"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{legend}">'
        f'<polyline points="{drawn}" fill="none" stroke="#27c" stroke-width="1.5"/>{dots}'
        f'<text x="0" y="{EDGE}">{high:.3g}</text><text x="0" y="{HEIGHT - EDGE}">{low:.3g}</text>'
        f'<text x="{EDGE}" y="{HEIGHT - 12}">step {left:,}</text>'
        f'<text x="{WIDTH - EDGE}" y="{HEIGHT - 12}" text-anchor="end">{right:,}</text>'
        f'<text x="{WIDTH // 2}" y="{HEIGHT - 12}" text-anchor="middle">{legend}</text></svg>'
    )


def _now(now: dict[str, Any] | None) -> Iterable[tuple[str, ...]]:
    names = {
        "epoch": "epoch",
        "loss": "loss",
        "lr": "learning rate",
        "grad_norm": "gradient norm",
        "tokens": "tokens trained",
        "reward_accuracy": "answers told apart",
        "reward_margin": "reward margin",
    }
    for key, label in names.items():
        if now and isinstance(now.get(key), int | float):
            yield label, f"{now[key]:,.4g}" if isinstance(now[key], float) else f"{now[key]:,}"


def _planned(
    run: Path, now: dict[str, Any] | None
) -> tuple[tuple[str, ...], Iterable[tuple[str, ...]]]:
    """Headings and rows of planned and measured values."""
    try:
        plan = files.read_json(run / "plan.json")
    except (OSError, ValueError):
        plan = {}
    memory, speed, measured = plan.get("memory") or {}, plan.get("speed") or {}, now or {}
    tokens = "tokens_per_second"
    values = (
        ("peak memory, GiB", memory.get("allocated"), measured.get("memory_bytes"), GIB, ".2f"),
        ("tokens a second", speed.get(tokens), measured.get(tokens), 1, ",.0f"),
    )
    rows = [
        (label, format(planned / unit, spec) if planned else "–", format(seen / unit, spec))
        for label, planned, seen, unit, spec in values
        if seen
    ]
    return ("", "planned", "measured"), rows


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    return f"<table><tr>{head}</tr>{body}</table>" if body else ""


def _records(run: Path) -> list[dict[str, Any]]:
    try:
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [record for line in lines if (record := outcome.metrics_record(line))]
