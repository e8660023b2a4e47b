"""An adapter is put in place only when it is complete and finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tuning import adapter
from tuning.errors import DivergedError, SpecError, TuningError
from tuning.training import finish

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/base",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "up_proj"],
}


def tensors(rank: int = 4, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor | None] = {}
    for module, width in (("self_attn.q_proj", 64), ("mlp.up_proj", 128)):
        name = f"base_model.model.model.layers.3.{module}"
        made[f"{name}.lora_A.weight"] = torch.ones(rank, 64)
        made[f"{name}.lora_B.weight"] = torch.ones(width, rank)
    return {k: v for k, v in (made | changes).items() if v is not None}


def put(target: Path, **changes: Any) -> adapter.Adapter:
    values: dict[str, Any] = {
        "tensors": tensors(),
        "config": CONFIG,
        "save_tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "step": 8,
        "steps": 8,
    }
    return finish.finish(target, **values | changes)


def test_a_finished_adapter_reads_back(tmp_path: Path) -> None:
    """What was put in place says what it is."""
    made = put(tmp_path / "adapter")

    assert 4 == made.rank
    assert "org/base" == made.base_model
    assert 2 * 4 * 64 + 64 * 4 + 128 * 4 == made.parameters
    assert ["adapter"] == [p.name for p in tmp_path.iterdir()]


def test_finishing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """The same tensors and config, the same digest; the older folder is replaced."""
    first = put(tmp_path / "adapter").sha256

    assert first == put(tmp_path / "adapter").sha256


NAN = torch.full((4, 64), float("nan"))
ODD = "base_model.model.model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "kind", "expected"),
    [
        ({"step": 7}, TuningError, "TRAIN-150 adapter: training ended at step 7 of 8"),
        (
            {"tensors": tensors(**{f"{ODD}.lora_A.weight": NAN})},
            DivergedError,
            "TRAIN-132 adapter: 1 of 4 tensors are not finite",
        ),
        (
            {"tensors": {k: v * ("lora_A" in k) for k, v in tensors().items()}},
            DivergedError,
            "TRAIN-133 adapter: every lora_B is zero",
        ),
        ({"tensors": tensors(rank=3)}, SpecError, "do not fit rank 4"),
        ({"tensors": tensors(**{f"{ODD}.lora_B.weight": None})}, SpecError, "MODEL-205"),
        (
            {"tensors": tensors(**{"lm_head.weight": torch.ones(1, 2)})},
            SpecError,
            "is not a LoRA tensor",
        ),
        ({"config": CONFIG | {"target_modules": ["q_proj"]}}, SpecError, "not among target_mod"),
    ],
)
def test_an_unfinished_adapter_is_not_put_in_place(
    changes: dict[str, Any], kind: type[TuningError], expected: str, tmp_path: Path
) -> None:
    """The finish gate: the reason is told, and nothing is there."""
    with pytest.raises(kind, match=expected):
        put(tmp_path / "adapter", **changes)

    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(("skipped", "code"), [(8, "TRAIN-134"), (7, "TRAIN-133")])
def test_steps_that_were_all_skipped_are_the_reason(
    skipped: int, code: str, tmp_path: Path
) -> None:
    """Of float16, whose scale was too high for all of them; otherwise the rows or the rate are."""
    zero = {name: torch.zeros_like(each) for name, each in tensors().items()}
    with pytest.raises(DivergedError, match=code):
        put(tmp_path / "adapter", tensors=zero, skipped=skipped)
