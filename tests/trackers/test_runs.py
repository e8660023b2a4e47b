"""Runs that report to trackers, by the command line: killed, resumed, and with a dead tracker."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from commands import workspace
from fake_mlflow import Mlflow
from faults.kills import Aim, Ended, Run, released
from trackers.test_feed import events

from tuning.pipeline import report

STEP = Aim("open", r"metrics\.jsonl a", "tuning.training.train", nth=3, after=True)
HANG = replace(STEP, nth=4, after=False, act="hang")  # three records are written, and no more
SETTINGS: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "eval_steps": 2}
SPLIT = {"DatasetConfig": {"train_test_split": 0.9}}


@pytest.fixture
def server() -> Iterator[Mlflow]:
    with Mlflow() as running:
        yield running


Do = Callable[..., Ended]


@pytest.fixture(scope="module")
def run(tiny_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Do:
    """`run(folder, name)`: a `tuning run` of six steps, with an evaluation after each second."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = [json.dumps(row) + "\n" for row in tiny_models.message_rows(24)]
    rows.write_text("".join(made))
    return partial(tune, rows, tiny_base("llama"))


def tune(
    rows: Path,
    base: Path,
    folder: Path,
    name: str,
    *,
    aim: Aim | None = None,
    until: Callable[[], bool] | None = None,
    **settings: Any,
) -> Ended:
    """The run to its end; it is killed when `until` is true."""
    file = workspace(folder / "demo.yaml", settings=SETTINGS | settings, sections=SPLIT)
    command = [
        *("run", "-f", file, "--base-model", base, "--data", rows, "--run-dir", folder / name),
        *("--output", f"oci:{folder / name}-image", "--allow-host", "127.0.0.1", "--json"),
    ]
    running = Run(command, aim=aim)
    if until is not None:
        for _ in range(1000):
            if until() or running.process.poll() is not None:
                break
            time.sleep(0.2)
        running.send(signal.SIGKILL)
    ended = running.end()
    released(folder / name)
    return ended


def digest(ended: Ended) -> str:
    assert 0 == ended.status, ended.err
    return str(json.loads(ended.out)["digest"])


def test_a_run_that_was_killed_twice_is_one_curve_and_a_dead_tracker_costs_a_warning(
    run: Do, server: Mlflow, tmp_path: Path
) -> None:
    """MLflow and TensorBoard have each step and evaluation once; the image is as without them.

    At the third start MLflow answers nothing any more: the run ends well, soon and with a warning,
    and the same command again sends the rest.
    """
    alone = digest(run(tmp_path, "alone"))
    where = {"report_to": ["mlflow", "tensorboard"], "mlflow_tracking_uri": server.url}

    def steps(count: int) -> Callable[[], bool]:
        return lambda: bool(server.runs) and len(server.curve("loss")) >= count

    killed = [run(tmp_path, "run", aim=HANG, until=steps(n), **where).status for n in (2, 4)]
    had = len(server.curve("loss"))
    server.fault = "silent"
    ended = run(tmp_path, "run", **where)
    seconds = time.time() - (tmp_path / "run-image" / "index.json").stat().st_mtime
    server.fault = ""
    server.released.set()
    again = run(tmp_path, "run", **where)

    assert [-9, -9] == killed
    assert 4 == had
    assert alone == digest(ended) == digest(again)
    assert 2 == ended.err.count("tracker mlflow"), ended.err
    assert "the same command again sends the rest" in ended.err
    assert seconds < 45
    assert "nothing was done" in again.err
    assert list(range(1, 7)) == [step for step, _ in server.curve("loss")]
    assert [2, 4, 6] == [step for step, _ in server.curve("eval_loss")]
    (shown,) = server.runs
    assert ("FINISHED", "lora") == (shown.status, shown.params["method"])
    (folder,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert f"demo-{shown.params['run_id'][:8]}" == shown.name == folder.name
    assert sorted([*range(1, 7), 2, 4, 6]) == [step for step, _ in events(folder)]
    # the page is told and journalled, and not in the image
    link = f"{server.url}/#/experiments/1/runs/{shown.id}"
    assert link in ended.err + again.err
    journal = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    told = [r for r in map(json.loads, journal) if r["phase"] == "track"]
    ends = [(r["event"], r["link"], r["step"]) for r in told if r["tracker"] == "mlflow"]
    assert ("sent", link, 6) == ends[-1]
    assert link in report.page(tmp_path / "run")
    for path in (tmp_path / "run" / "image").rglob("*"):
        assert path.is_dir() or server.url.encode() not in path.read_bytes()


@pytest.mark.slow
def test_early_stopping_ends_a_run_well_and_is_told_everywhere(run: Do, tmp_path: Path) -> None:
    """No loss is lower by 50: after a kill, too, it stops at the second evaluation, exit 0."""
    stops = {"early_stopping_patience": 1, "early_stopping_threshold": 50, "max_steps": 60}
    struck = run(tmp_path, "run", aim=STEP, **stops)
    ended = run(tmp_path, "run", **stops)

    assert (-9, 0) == (struck.status, ended.status), ended.err
    training = json.loads(ended.out)["training"]
    assert {"at": 4, "no_better_since": 2} == training["stopped"]
    told = "at step 4 of 60, no better since step 2"
    assert f"stopped {told}" in ended.err
    assert told in (tmp_path / "run" / "adapter" / "README.md").read_text()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "step 4 of 60: stopped, no better on held-out rows since step 2" in page
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert 2 == json.loads(lines[-1])["no_better_since"]
