"""Two ranks train what one does: the same rows a step, the same loss; and all end if one does."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from ranks import at_step, close, kill, train

from tuning import files, process
from tuning.errors import Stopped
from tuning.training.batches import FILLER, Order
from tuning.training.distributed import Ranks

Base = Callable[..., Path]
# 17 rows and steps of four make epochs of five steps, the last of a single row: one of two ranks
# then has a filler
RECIPE = tiny_runs.recipe(precision="float32", learning_rate=1e-3, dropout=0.0, eval_steps=4)
WITH_DROPOUT = replace(RECIPE, dropout=0.1)  # each rank draws its own random numbers
ALONE = tiny_runs.placement(micro_batch=1, accumulation=4)
TWO = tiny_runs.placement(ranks=2, micro_batch=1, accumulation=2)


@pytest.fixture(scope="module")
def base(tiny_base: Base) -> Path:
    return tiny_base("llama")


@pytest.fixture(scope="module")
def clean(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks give when nobody disturbs them."""
    return train(tmp_path_factory.mktemp("clean"), base, TWO, recipe=RECIPE)


def test_two_ranks_have_the_loss_of_one_process(
    base: Path, clean: dict[str, Any], tmp_path: Path
) -> None:
    """Step by step: the rows of a step are the same, and fillers weigh nothing."""
    alone = train(tmp_path, base, ALONE, recipe=RECIPE)

    assert 8 == len(clean["loss_by_step"])
    assert close(alone["loss_by_step"], clean["loss_by_step"])
    assert alone["eval_loss_after"] == pytest.approx(clean["eval_loss_after"], rel=1e-5)
    assert alone["eval_loss_before"] == pytest.approx(clean["eval_loss_before"], rel=1e-5)
    assert alone["tokens"] == clean["tokens"]


def test_a_killed_rank_ends_all_and_the_same_request_goes_on(base: Path, tmp_path: Path) -> None:
    """The parent hears of the kill, not of what it broke; the rerun ends in the same adapter."""
    run = tmp_path / "run"
    clean = train(tmp_path / "clean", base, TWO, recipe=WITH_DROPOUT)
    with pytest.raises(process.ChildDied) as died:
        stop = at_step(run, 3, lambda: kill(run, rank=1))
        train(run, base, TWO, recipe=WITH_DROPOUT, tick=stop, save_steps=1)

    again = train(run, base, TWO, recipe=WITH_DROPOUT)

    assert again["resumed_from"] >= 2
    assert -signal.SIGKILL == died.value.status
    assert clean["adapter_sha256"] == again["adapter_sha256"]
    assert clean["loss_by_step"] == again["loss_by_step"]


# no loss is lower by 5 than the first, that of step 2: the patience is used up at step 6 of 8
EARLY = replace(
    WITH_DROPOUT, eval_steps=2, keep_best=True, patience=2, patience_threshold=5.0, steps=8
)


def test_early_stopping_ends_all_ranks_at_one_step_and_after_kills_too(
    base: Path, tmp_path: Path
) -> None:
    """A rank that counted otherwise would wait for the other in vain. A kill of either, before and
    after the first evaluation that was no better, loses no count: the same stop and adapter."""
    calm, run = tmp_path / "calm", tmp_path / "struck"
    clean = train(calm, base, TWO, recipe=EARLY)
    for step, rank in ((3, 1), (5, 0)):
        strike = at_step(run, step, partial(kill, run, rank=rank))
        with pytest.raises(process.ChildDied):
            train(run, base, TWO, recipe=EARLY, tick=strike, save_steps=1)

    again = train(run, base, TWO, recipe=EARLY, save_steps=1)

    assert {"at": 6, "no_better_since": 2} == clean["stopped"] == again["stopped"]
    for folder in (calm, run):
        assert "ok" in files.read_json(process.result_path(folder / "log" / "train.json", rank=1))
    assert again["resumed_from"] >= 4
    for name in ("adapter_sha256", "loss_by_step", "best_step", "eval_loss_after"):
        assert clean[name] == again[name], name


def test_a_stop_is_agreed_on_and_another_number_of_ranks_goes_on(
    base: Path, clean: dict[str, Any], tmp_path: Path
) -> None:
    """SIGTERM stops both after the same step, with one checkpoint; one process takes it up."""
    asked = False

    def ask() -> None:
        nonlocal asked
        asked = True

    with pytest.raises(Stopped):
        train(
            tmp_path, base, TWO, recipe=RECIPE, tick=at_step(tmp_path, 3, ask), stop=lambda: asked
        )
    assert 1 == len(list((tmp_path / "checkpoints").glob("*-*")))

    alone = train(tmp_path, base, ALONE, recipe=RECIPE)

    assert alone["resumed_from"] >= 3
    assert close(clean["loss_by_step"], alone["loss_by_step"])


def test_an_epoch_s_order_is_filled_up_for_all_ranks() -> None:
    """The rows as they are drawn on one process, then fillers' index until they go round."""
    order = Order(5, at_once=4, seed=7)
    first, second = list(order), list(order)

    assert 8 == len(order) == len(first)
    assert [0, 1, 2, 3, 4] == sorted(first[:5])
    assert [5, 5, 5] == first[5:]
    assert first != second
    order.set_epoch(0)
    assert first == list(order)
    assert [0, 1, 2, 3, 4, 5] == list(Order(5, at_once=3, seed=None))
    assert FILLER < 0


def test_a_single_rank_agrees_with_itself() -> None:
    """Nothing is waited for, and numbers stay what they are."""
    alone = Ranks()

    assert alone.first
    assert [2.5, 3.0] == alone.sum(2.5, 3.0)
    assert [{"a": 1}] == alone.gather({"a": 1})
    assert (True, False) == (alone.any(True), alone.any(False))
