"""What follows the last step may fail in any way: the adapter is saved and pushed all the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_runs
import torch
import yaml
from commands import good, tuning, workspace
from faults import jobs
from faults.jobs import World
from faults.kills import Aim

from tuning import adapter
from tuning.errors import SpecError, Stopped
from tuning.models import generate
from tuning.pipeline import model_card
from tuning.training import afterwards, train, trainer

TRAIN = "tuning.training.train"


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Callable[..., Path]
) -> Iterator[World]:
    with jobs.world(tmp_path_factory.mktemp("after"), tiny_base("llama")) as made:
        yield made


@pytest.mark.timeout(600)
@pytest.mark.parametrize("act", ["SIGKILL", "memory"])
def test_a_child_that_ends_while_it_writes_samples_has_trained(world: World, act: str) -> None:
    """Killed, or out of memory: the run says so, pushes the adapter and ends with 0."""
    aim = Aim("os.rename", r"samples\.jsonl", TRAIN, act=act)

    name = act.lower()
    ended = world.run(name, aim=aim)

    sha256, _ = jobs.result(ended)
    assert sha256 == adapter.inspect(world.folder / name / "adapter").sha256
    assert "after training: " in ended.err
    assert ("RUN-111" if act == "SIGKILL" else "MemoryError") in ended.err
    log = (world.folder / name / "log" / "train.log").read_text()
    assert act == "SIGKILL" or "Traceback" in log
    jobs.result(world.run(name))  # the same command again: already finished


@pytest.mark.timeout(600)
def test_a_report_that_cannot_be_written_is_a_note(world: World) -> None:
    """The adapter is pushed before; the parent runs out of memory as it writes the page."""
    aim = Aim("os.rename", r"report\.html", "tuning", act="memory")

    ended = world.run("reported", aim=aim)

    jobs.result(ended)
    assert "the report was not written" in ended.err


FAILURES = [
    RuntimeError("device-side assert"),
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    SpecError.at("MODEL-299", "base", "is wrong", "mend it"),
    ValueError("no template"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_no_failure_after_the_last_step_loses_the_adapter(
    error: Exception,
    tiny_base: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers, samples and the last evaluation fail in every way; each is named with its cause."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(generate, "reply", fail)
    monkeypatch.setattr(generate, "continued", fail)
    evaluate = trainer.Exact.held_out_loss
    monkeypatch.setattr(
        trainer.Exact,
        "held_out_loss",
        lambda self: fail() if self.state.global_step == 8 else evaluate(self),
    )
    asked = tiny_runs.request(
        tmp_path, tiny_base("phi3"), tiny_runs.recipe(), tiny_runs.placement(), held_out=4
    )

    result = train.work(asked | {"questions": ["cat"]})

    assert result["adapter_sha256"] == adapter.inspect(tmp_path / "adapter").sha256
    assert 3 == len(result["lost"])
    assert all(type(error).__name__ in line for line in result["lost"])
    assert ([], None) == (result["answers"], result["eval_loss_after"])


def test_a_signal_is_no_failure() -> None:
    """It still stops the run."""

    def stop() -> None:
        raise Stopped.at("RUN-130", "training", "stopped", "run again")

    with pytest.raises(Stopped):
        afterwards.attempt("samples", stop, [])


def test_a_card_that_cannot_be_written_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tuning.json, which merges need, is there."""
    monkeypatch.setattr(model_card, "provenance", lambda *_, **__: {"schema": "x"})
    lost: list[str] = []

    model_card.write(tmp_path, recipe={}, run_id="x", facts=None, lost=lost.append)  # type: ignore[arg-type]

    assert ["tuning.json"] == [path.name for path in tmp_path.iterdir()]
    assert "KeyError" in lost[0]


@pytest.fixture
def bare(tiny_base: Callable[..., Path], tmp_path: Path) -> list[object]:
    """A base without a chat template, and rows of running text, some of them held out."""
    base = Path(shutil.copytree(tiny_base("llama"), tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    rows = tmp_path / "rows.jsonl"
    texts = [json.dumps({"text": text}) for text in tiny_models.sentences(40)]
    rows.write_text("\n".join(texts))
    spec = workspace(tmp_path / "job.yaml")
    documents = list(yaml.safe_load_all(spec.read_text()))
    sections = {
        "TrainingArguments": {"max_steps": 2, "learning_rate": 0.001},
        "DatasetConfig": {"train_test_split": 0.8},
    }
    documents[1]["data"]["training_config.yaml"] = yaml.safe_dump({"training_config": sections})
    spec.write_text(yaml.safe_dump_all(documents))
    return [
        *("run", "-f", spec, "--base-model", base, "--data", rows, "--run-dir", tmp_path / "run"),
        *("--output", f"oci:{tmp_path / 'image'}"),
    ]


def test_a_base_without_a_template_trains_running_text(bare: list[object], tmp_path: Path) -> None:
    """Held-out rows are tokens already: samples need no template."""
    good(tuning(*bare))

    assert (tmp_path / "run" / "adapter" / adapter.WEIGHTS).exists()
    assert (tmp_path / "run" / "samples.jsonl").exists()


@pytest.mark.parametrize("template", [None, "{{ raise_exception('users only speak German') }}"])
def test_a_question_that_no_template_shows_is_refused_before_training(
    template: str | None, bare: list[object], tmp_path: Path
) -> None:
    """With the code of its cause, and without a step."""
    if template:
        (tmp_path / "base" / "chat_template.jinja").write_text(template)

    done = tuning(*bare, "--ask", "cat?")

    assert 11 == done.returncode
    assert ("MODEL-212" if template else "MODEL-211") in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "data" / "packed").exists()
