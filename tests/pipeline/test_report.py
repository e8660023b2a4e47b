"""The page of a run: progress, the loss as a picture, and plan against measured."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from tuning.pipeline import report

STEP = {
    "step": 3,
    "steps": 12,
    "epoch": 1.5,
    "loss": 1.5,
    "lr": 1e-4,
    "grad_norm": 0.5,
    "tokens": 4096,
    "tokens_per_second": 812.0,
    "eta_seconds": 120.0,
    "memory_bytes": 3 << 30,
}


def write(run: Path, *records: dict[str, Any]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_a_finished_run_s_page_is_one_file_that_stays_as_it_is(tmp_path: Path) -> None:
    """It names the run as text, does not reload, and loads nothing from anywhere."""
    write(tmp_path, STEP)

    kept = report.page(tmp_path, name="<demo>")

    assert "step 3 of 12" in kept
    assert "&lt;demo&gt;" in kept
    assert "refresh" not in kept
    assert "src=" not in kept and "href=" not in kept


def test_plan_and_measurement_stand_side_by_side(tmp_path: Path) -> None:
    """Peak memory and speed, each planned and measured; a dash where nothing was foretold."""
    write(tmp_path, STEP)
    bare = report.page(tmp_path, name="demo")
    planned = {"memory": {"allocated": 2 << 30}, "speed": {"tokens_per_second": 1000.0}}
    (tmp_path / "plan.json").write_text(json.dumps(planned))

    page = report.page(tmp_path, name="demo")

    assert "<td>peak memory, GiB</td><td>–</td><td>3.00</td>" in bare
    assert "<td>peak memory, GiB</td><td>2.00</td><td>3.00</td>" in page
    assert "<td>tokens a second</td><td>1,000</td><td>812</td>" in page


def test_the_loss_is_drawn_with_the_held_out_rows_as_dots() -> None:
    """A falling loss falls on the picture, from the left edge to the right one."""
    drawn = ET.fromstring(report.chart([(1, 4.0), (2, 2.0), (3, 1.0)], [(3, 1.5)]))

    (line,) = drawn.iter("polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    (dot,) = drawn.iter("circle")

    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted(y for _, y in points)
    assert points[-1][0] == float(dot.attrib["cx"])
    assert points[1][1] < float(dot.attrib["cy"]) < points[2][1]


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path) -> None:
    """Before the first step, with one step, or with a loss that is not known, there is no line."""
    assert "not training yet" in report.page(tmp_path, name="demo")
    assert report.chart([(1, 2.0)], []) == ""
    assert "polyline" in report.chart([(1, 2.0), (2, None), (3, 2.0)], [])
