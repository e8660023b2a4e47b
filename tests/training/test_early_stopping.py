"""Early stopping: transformers' rule on our evaluations, told, and the same after any kill."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_runs
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning import files
from tuning.errors import Stopped, TuningError
from tuning.training import finish, train, trainer
from tuning.training.evaluation import Best

Base = Callable[..., Path]
STOPS = tiny_runs.recipe(
    eval_steps=2, keep_best=True, patience=2, learning_rate=0.05, schedule="constant", steps=20
)
# Losses after steps 2, 4, 6, ...: the best is that of step 4, and step 8 the second no better.
LOSSES = {2: 3.0, 4: 1.0, 6: 1.5, 7: 9.0, 8: 1.25, 10: 0.5}


@pytest.fixture(autouse=True)
def prescribed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out loss after each step, whatever the weights are."""
    original = trainer.Exact.evaluation_loop

    def evaluated(self: trainer.Exact, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if self.is_in_train:
            output.metrics["eval_loss"] = LOSSES[self.state.global_step]
        return output

    monkeypatch.setattr(trainer.Exact, "evaluation_loop", evaluated)


def request(run: Path, base: Base, recipe: Any = STOPS) -> dict[str, Any]:
    return tiny_runs.request(
        run, base("llama"), recipe, tiny_runs.placement(), count=9, held_out=3, save_steps=3
    )


@pytest.fixture(scope="module")
def clean() -> dict[str, Any]:
    """The result of the first undisturbed run, for all tests."""
    return {}


def undisturbed(clean: dict[str, Any], base: Base, tmp_path: Path) -> dict[str, Any]:
    if not clean:
        clean |= train.work(request(tmp_path / "clean", base))
        clean["records"] = records(tmp_path / "clean")
    return clean


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_gets_no_better_stops_with_its_best_adapter(
    clean: dict[str, Any], tiny_base: Base, tmp_path: Path
) -> None:
    """It ends well at step 8 of 20, says since when nothing was better, and delivers step 4."""
    result = undisturbed(clean, tiny_base, tmp_path)
    shorter = replace(STOPS, steps=4, patience=None)
    of_step_4 = train.work(request(tmp_path / "short", tiny_base, shorter))

    assert {"at": 8, "no_better_since": 4} == result["stopped"]
    assert 20 == result["steps"]
    assert 8 == len(result["loss_by_step"])
    assert 4 == result["best_step"]
    assert of_step_4["adapter_sha256"] == result["adapter_sha256"]
    last = clean["records"][-1]
    assert (8, 20, 4) == (last["step"], last["steps"], last["no_better_since"])


def test_a_threshold_asks_for_more_than_any_improvement(tiny_base: Base, tmp_path: Path) -> None:
    """With 5 no later loss is enough better than the first: the run stops after two more."""
    asked = replace(STOPS, patience_threshold=5.0)

    result = train.work(request(tmp_path / "run", tiny_base, asked))

    assert {"at": 6, "no_better_since": 2} == result["stopped"]
    assert 4 == result["best_step"]  # the lowest is kept all the same


def test_patience_that_is_not_used_up_changes_nothing(tiny_base: Base, tmp_path: Path) -> None:
    """All steps are done, though the last evaluation used it up: nothing says "stopped"."""
    asked = replace(STOPS, steps=7)

    result = train.work(request(tmp_path / "run", tiny_base, asked))

    assert result["stopped"] is None
    assert 7 == len(result["loss_by_step"])


STRIKES = ("before the last evaluation", "in the last evaluation", "after it", "in a step before")


@pytest.fixture
def strike(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A stop request or an exception of the process at a moment, once."""
    moment = [""]

    def struck(now: str) -> bool:
        if moment[0] != now:
            return False
        moment[0] = ""
        return True

    prediction, step = trainer.Exact.prediction_step, trainer.Exact.training_step
    save = trainer.Exact._save_checkpoint

    def predicted(self: trainer.Exact, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 8 and self.is_in_train:
            if struck("before the last evaluation"):
                raise KeyboardInterrupt  # as a kill: nothing is saved
            if struck("in the last evaluation"):
                os.kill(os.getpid(), signal.SIGTERM)
        return prediction(self, *args, **kwargs)

    def stepped(self: trainer.Exact, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5 and struck("in a step before"):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    def saved(self: trainer.Exact, *args: Any, **kwargs: Any) -> Any:
        made = save(self, *args, **kwargs)
        if self.state.global_step == 8 and struck("after it"):
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(trainer.Exact, "prediction_step", predicted)
    monkeypatch.setattr(trainer.Exact, "training_step", stepped)
    monkeypatch.setattr(trainer.Exact, "_save_checkpoint", saved)

    def put(at: str) -> None:
        moment[0] = at

    yield put


@pytest.mark.parametrize("moment", STRIKES)
def test_a_run_struck_around_its_early_stop_ends_in_the_same_bytes(
    moment: str, clean: dict[str, Any], tiny_base: Base, tmp_path: Path, strike: Any
) -> None:
    """The counter is in the checkpoint: adapter, steps and losses are those of a calm run."""
    expected = undisturbed(clean, tiny_base, tmp_path)
    asked = request(tmp_path / "run", tiny_base)

    strike(moment)
    with pytest.raises((Stopped, KeyboardInterrupt)):
        train.work(asked)
    result = train.work(asked)

    for name in ("adapter_sha256", "stopped", "loss_by_step", "best_step", "eval_loss_after"):
        assert expected[name] == result[name], name
    assert result["resumed_from"] > 0


def test_a_training_that_ends_early_for_any_other_reason_is_no_success(tmp_path: Path) -> None:
    """The finish gate makes its one exception for early stopping alone."""
    with pytest.raises(TuningError, match="TRAIN-150"):
        nothing: dict[str, Any] = {"tensors": {}, "config": {}, "save_tokenizer": files.digest}
        finish.finish(tmp_path / "adapter", **nothing, step=3, steps=4)


LOSS = st.one_of(st.none(), st.sampled_from([0.5, 1.0, 1.0 + 1e-9, 1.25, 2.0]))


@settings(max_examples=300, deadline=None)
@given(st.lists(LOSS, min_size=1, max_size=12), st.integers(1, 4), st.sampled_from([None, 0.3]))
def test_the_rule_is_that_of_transformers_callback(
    losses: list[float | None], patience: int, threshold: float | None
) -> None:
    """Whatever the losses, both stop after the same evaluation, NaN among them."""
    theirs = transformers.EarlyStoppingCallback(patience, threshold or 0.0)
    arguments = SimpleNamespace(greater_is_better=False, metric_for_best_model="eval_loss")
    state, control = SimpleNamespace(best_metric=None), transformers.TrainerControl()
    ours = SimpleNamespace(
        recipe=replace(STOPS, patience=patience, patience_threshold=threshold),
        progress=trainer.Progress(),
        best=Best(),
        state=SimpleNamespace(global_step=0),
        trained=dict,
    )
    for step, loss in enumerate(losses, 1):
        value = float("nan") if loss is None else loss
        theirs.on_evaluate(arguments, state, control, {"eval_loss": value})
        if loss is not None and (state.best_metric is None or loss < state.best_metric):
            state.best_metric = loss  # as the Trainer does afterwards
        ours.state.global_step = step
        trainer.Exact.record_evaluation(ours, loss)  # type: ignore[arg-type]
        over = trainer.Exact.is_over.fget(ours)  # type: ignore[attr-defined]
        assert control.should_training_stop == over, step
        if over:
            return
