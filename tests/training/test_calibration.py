"""What a card sustains is measured before the first step, once, and changes nothing."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_runs
import torch

from tuning import files, presets
from tuning.models.load import load_base
from tuning.models.lora import adapt
from tuning.plan import Placement, Recipe
from tuning.plan.backends import VARLEN
from tuning.plan.speed import Rates, seconds_per_token
from tuning.training import calibration

Build = Callable[..., Path]
RECIPE = tiny_runs.recipe(precision="bfloat16", packing=True)
PLACEMENT = tiny_runs.placement(attention=VARLEN)


@pytest.fixture
def calibrate(tiny_base: Build, tmp_path: Path) -> Callable[..., Any]:
    """`calibrate(family, placement, recipe)` in one run directory."""

    def run(
        family: str = "llama", placement: Placement = PLACEMENT, recipe: Recipe = RECIPE
    ) -> Any:
        folder = tiny_base(family)
        base = load_base(
            folder, precision="bfloat16", quantisation=None, device="cpu", attention=VARLEN
        )
        tuned, _ = adapt(base, recipe)
        rows = datasets.Dataset.from_list(tiny_runs.rows(folder, 12, packing=True))
        before = torch.get_rng_state()
        made = calibration.calibrate(tuned, recipe, placement, rows, base=folder, run=tmp_path)
        assert torch.equal(torch.get_rng_state(), before)  # as a resumed run draws
        return made

    return run


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_rates_of_the_models_own_shapes(family: str, calibrate: Any, tmp_path: Path) -> None:
    """Products, attention and copy, and the speed that the plan's roofline has with them."""
    made = calibrate(family)

    assert files.read_json(tmp_path / calibration.NAME) == made
    assert all(1e5 < rate < 1e15 for rate in made["rates"].values())
    assert 0 < made["tokens_per_second"] < 1e9
    assert made["seconds"] < calibration.SECONDS


def test_measured_once(calibrate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run takes up what is kept; another placement is measured anew."""
    first = calibrate()
    calls: list[int] = []
    own = calibration.product_rate
    monkeypatch.setattr(
        calibration,
        "product_rate",
        lambda *a: calls.append(1) or own(*a),  # type: ignore[func-returns-value]
    )

    assert calibrate() == first and not calls
    assert calibrate(placement=replace(PLACEMENT, micro_batch=1)) != first and calls


def test_a_failure_is_a_line_of_the_log(
    calibrate: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any
) -> None:
    """Whatever goes wrong, the training begins; nothing is kept."""

    def out_of_memory(*arguments: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(calibration, "attention_rate", out_of_memory)
    with caplog.at_level(logging.WARNING):
        assert calibrate() is None

    assert "not calibrated: OutOfMemoryError" in caplog.text
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_said(calibrate: Any) -> None:
    """Nothing of ranks that share a model, or of float32, whose products have other rates."""
    assert calibrate(placement=replace(PLACEMENT, ranks=2, shards=2)) is None
    assert calibrate(recipe=replace(RECIPE, precision="float32")) is None


def test_a_broken_file_is_measured_again(calibrate: Any, tmp_path: Path) -> None:
    """Half a file of an earlier kill is no answer."""
    (tmp_path / calibration.NAME).write_text('{"device": "c')

    assert calibrate()["tokens_per_second"] > 0


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_datasheets_rates_give_the_plans_speed(method: Any, checkpointing: bool) -> None:
    """The roofline is one: of a card, and of the rates that are assumed of it; twice is half."""
    card = presets.gpu("H200-SXM5")
    assumed = Rates.of(card, "bfloat16")
    assert assumed is not None
    faster = Rates(**{name: 2 * rate for name, rate in asdict(assumed).items()})
    preset = presets.find("llama-3.1-8b-instruct")
    assert preset is not None

    planned, same, half = (
        seconds_per_token(
            preset.facts, rates, method=method, checkpointing=checkpointing,
            tokens=8192, effective_length=700,
        )
        for rates in (card, assumed, faster)
    )  # fmt: skip

    assert planned == same and same is not None and half is not None
    assert math.isclose(half, same / 2)
