"""Runs that report to trackers, by the command line: killed, resumed, and with a dead tracker."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import workspace
from fake_mlflow import Mlflow
from faults.kills import Aim, Ended, Run, released
from trackers.test_feed import events

TINY, ROWS = Path("examples/tiny-model").resolve(), Path("examples/data/demo.jsonl").resolve()
STEP = Aim("open", r"metrics\.jsonl a", "tuning.training.train", nth=3, after=True)
SETTINGS: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "eval_steps": 2}
SPLIT = {"DatasetConfig": {"train_test_split": 0.9}}


@pytest.fixture
def server() -> Iterator[Mlflow]:
    with Mlflow() as running:
        yield running


def run(folder: Path, name: str, *, aim: Aim | None = None, **settings: Any) -> Ended:
    """`tuning run` of four hundred rows, six steps, an evaluation after each second."""
    file = workspace(folder / "demo.yaml", settings=SETTINGS | settings, sections=SPLIT)
    command = [
        *("run", "-f", file, "--base-model", TINY, "--data", ROWS, "--run-dir", folder / name),
        *("--output", f"oci:{folder / name}-image", "--allow-host", "127.0.0.1", "--json"),
    ]
    ended = Run(command, aim=aim).end()
    released(folder / name)
    return ended


def digest(ended: Ended) -> str:
    assert 0 == ended.status, ended.err
    return str(json.loads(ended.out)["digest"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a run that reports to nobody."""
    return digest(run(tmp_path_factory.mktemp("alone"), "run"))


def test_a_run_that_was_killed_twice_is_one_curve(
    alone: str, server: Mlflow, tmp_path: Path
) -> None:
    """MLflow and TensorBoard have each step and evaluation once; the image is as without them."""
    where = {"report_to": ["mlflow", "tensorboard"], "mlflow_tracking_uri": server.url}
    killed = [run(tmp_path, "run", aim=STEP, **where).status for _ in range(2)]
    ended = run(tmp_path, "run", **where)

    assert [-9, -9] == killed
    assert alone == digest(ended)
    assert list(range(1, 7)) == [step for step, _ in server.curve("loss")]
    assert [2, 4, 6] == [step for step, _ in server.curve("eval_loss")]
    (shown,) = server.runs
    assert "FINISHED" == shown.status
    assert alone == shown.tags["image_digest"]
    assert "lora" == shown.params["method"]
    (folder,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert f"demo-{shown.params['run_id'][:8]}" == shown.name == folder.name
    in_order = sorted([*range(1, 7), 2, 4, 6])
    assert in_order == [step for step, _ in events(folder)]
    # the link is told, journalled and on the page; not in the image
    link = f"{server.url}/#/experiments/1/runs/{shown.id}"
    assert link in ended.err
    assert link in (tmp_path / "run" / "report.html").read_text()
    journal = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    told = [r for r in map(json.loads, journal) if r["phase"] == "track"]
    assert ("sent", link, 6) == next(
        (r["event"], r["link"], r["step"]) for r in told if r["tracker"] == "mlflow"
    )
    for path in (tmp_path / "run" / "image").rglob("*"):
        assert path.is_dir() or server.url.encode() not in path.read_bytes()


def test_a_tracker_that_never_answers_costs_a_warning(
    alone: str, server: Mlflow, tmp_path: Path
) -> None:
    """The run ends with the same image, soon after its end; the same command sends the rest."""
    where = {"report_to": "mlflow", "mlflow_tracking_uri": server.url}
    server.fault = "silent"
    ended = run(tmp_path, "run", **where)

    assert alone == digest(ended)
    assert ended.err.count("tracker mlflow") in (1, 2), ended.err
    last = ended.err.splitlines()[-1]
    assert "the same command again sends the rest" in last
    image = (tmp_path / "run-image" / "index.json").stat().st_mtime
    assert time.time() - image < 45

    server.fault = ""
    server.released.set()
    again = run(tmp_path, "run", **where)
    assert alone == digest(again)
    assert "nothing was done" in again.err
    assert list(range(1, 7)) == [step for step, _ in server.curve("loss")]


def test_early_stopping_ends_a_run_well_and_is_told_everywhere(tmp_path: Path) -> None:
    """No loss is lower by 50: it stops after the second evaluation, exit 0; killed before, too."""
    stops = {"early_stopping_patience": 1, "early_stopping_threshold": 50, "max_steps": 60}
    calm = run(tmp_path, "calm", **stops)
    struck = run(tmp_path, "struck", aim=STEP, **stops)
    resumed = run(tmp_path, "struck", **stops)

    assert -9 == struck.status
    assert digest(calm) == digest(resumed)
    training = json.loads(calm.out)["training"]
    assert {"at": 4, "no_better_since": 2} == training["stopped"]
    told = "at step 4 of 60, no better since step 2"
    assert f"stopped {told}" in calm.err
    assert told in (tmp_path / "calm" / "adapter" / "README.md").read_text()
    page = (tmp_path / "calm" / "report.html").read_text()
    assert "step 4 of 60: stopped, no better on held-out rows since step 2" in page
    lines = (tmp_path / "calm" / "metrics.jsonl").read_text().splitlines()
    assert 2 == json.loads(lines[-1])["no_better_since"]
