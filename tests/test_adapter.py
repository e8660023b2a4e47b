"""Adapters are read strictly."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file

from tuning import adapter
from tuning.data.tokenizer import added_by
from tuning.errors import SpecError
from tuning.models import generate
from tuning.models.load import load_base
from tuning.training import train

Base = Callable[..., Path]

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


def test_peft_s_own_config_is_accepted() -> None:
    """What PEFT writes for a plain LoRA passes, with its defaults left out."""
    record = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"]).to_dict()
    record = json.loads(json.dumps(record | {"target_modules": ["q_proj"]}))

    config = adapter.parse(json.dumps(record).encode())

    assert {"r": 8, "lora_alpha": 16.0, "target_modules": ["q_proj"]}.items() <= config.items()
    assert "megatron_core" not in config or config["megatron_core"] == "megatron.core"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}, "auto_mapping"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil.module"}, "megatron_core"),
        ({"megatron_core": "evil.module"}, "megatron_core"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"never_heard_of": 1}, "never_heard_of"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type"),
        ({"r": 0}, "r"),
        ({"r": "8"}, "r"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices"),
        ({"trainable_token_indices": ["a"]}, "trainable_token_indices"),
        ({"trainable_token_indices": {"lm_head": []}}, "trainable_token_indices"),
        ({"trainable_token_indices": {"lm_head": [True]}}, "trainable_token_indices"),
    ],
)
def test_a_config_that_asks_for_more_is_refused(change: dict[str, Any], key: str) -> None:
    """Keys that import code, that we do not support, or that are wrong: each is named."""
    with pytest.raises(SpecError) as error:
        adapter.parse(json.dumps(CONFIG | change).encode())

    assert f"{adapter.CONFIG} {key}" in {problem.where for problem in error.value.problems}


def test_all_that_is_wrong_with_a_config_is_told_at_once() -> None:
    """Three problems, three lines."""
    record = {"peft_type": "LORA", "r": -1, "nonsense": True, "lora_alpha": 1}

    with pytest.raises(SpecError) as error:
        adapter.parse(json.dumps(record).encode())

    assert ["nonsense", "r", "target_modules"] == sorted(
        problem.where.split()[-1] for problem in error.value.problems
    )


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'"x"'])
def test_what_is_no_config_is_refused(data: bytes) -> None:
    with pytest.raises(SpecError, match="MODEL-202"):
        adapter.parse(data)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    """Cut files, absurd headers and headers that lie are found without reading weights."""
    path = tmp_path / "w.safetensors"
    save_file(tensors(), path)
    whole = path.read_bytes()
    cases = [whole[:-1], whole[:5], b"", struct.pack("<Q", 1 << 60) + b"{}", whole + b"x"]
    for data in cases:
        path.write_bytes(data)
        with pytest.raises(SpecError, match="MODEL-204"):
            adapter.header(path)


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    """Both missing files are named; a pickled adapter is none."""
    (tmp_path / "adapter_model.bin").write_bytes(b"not even looked at")

    with pytest.raises(SpecError) as error:
        adapter.inspect(tmp_path)

    assert 2 == len(error.value.problems)


def test_an_adapter_of_another_base_is_told_apart(tmp_path: Path) -> None:
    """Width and number of layers are compared with the base's config."""
    save_file(tensors(), tmp_path / adapter.WEIGHTS)
    (tmp_path / adapter.CONFIG).write_text(json.dumps(CONFIG))
    made = adapter.inspect(tmp_path)

    assert [] == adapter.misfits(made, {"hidden_size": 64, "num_hidden_layers": 4})
    wrong = adapter.misfits(made, {"text_config": {"hidden_size": 96, "num_hidden_layers": 3}})

    text = "\n".join(map(str, wrong))
    assert "is in layer 3; the base model has 3" in text
    assert "is made for width 64; the base model has 96" in text
    assert "use the adapter with its own base model, org/base" in text


@pytest.mark.parametrize("changes", [{}, {"dora": True}, {"rslora": True, "layers": (1,)}])
def test_what_was_trained_is_what_peft_loads(
    changes: dict[str, Any], tiny_base: Base, tmp_path: Path
) -> None:
    """PEFT itself and our own loader give the answers of the model that was trained."""
    base = tiny_base("llama")
    recipe = tiny_runs.recipe(dropout=0.0, **changes)
    asked = tiny_runs.request(tmp_path, base, recipe, tiny_runs.placement())
    train.work(asked)
    ids = torch.arange(5, 25)[None]

    def logits(load: Callable[[Any], Any]) -> torch.Tensor:
        loaded = load_base(base, precision="bfloat16", quantisation=None, device="cpu")
        with torch.no_grad():
            result: torch.Tensor = load(loaded).eval()(input_ids=ids).logits
        return result

    folder = tmp_path / "adapter"
    theirs = logits(lambda loaded: PeftModel.from_pretrained(loaded, str(folder)))
    ours = logits(lambda loaded: generate.attach(loaded, adapter.inspect(folder)))

    assert torch.equal(theirs, ours)
    assert not torch.equal(ours, logits(lambda loaded: loaded))


ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("indices", "rows", "fits"),
    [
        ([7, 9], torch.ones(2, 64), True),
        ({"model.embed_tokens": [7, 9]}, torch.ones(2, 64), True),
        ([7, 9], torch.ones(3, 64), False),
        ([7, 9], torch.ones(2), False),
        ([7, 7], torch.ones(2, 64), False),
        ([7, 9], None, False),
        (None, torch.ones(2, 64), False),
    ],
)
def test_trained_rows_are_those_of_the_config(
    indices: Any, rows: torch.Tensor | None, fits: bool, tmp_path: Path
) -> None:
    """As many as it names tokens, in a matrix; they are no projections of the base."""
    (tmp_path / adapter.CONFIG).write_text(
        json.dumps(CONFIG | {"trainable_token_indices": indices})
    )
    save_file(tensors(**{ROWS: rows}), tmp_path / adapter.WEIGHTS)

    if not fits:
        with pytest.raises(SpecError, match=r"MODEL-205 "):
            adapter.inspect(tmp_path)
        return
    found = adapter.inspect(tmp_path)

    assert (7, 9) == found.token_ids
    assert 2 == len(found.modules)
    base = {"num_hidden_layers": 4, "hidden_size": 64}
    assert not adapter.misfits(found, base)
    wrong = adapter.misfits(found, base | {"hidden_size": 32})
    assert "model.embed_tokens.token_adapter" in " ".join(problem.where for problem in wrong)


@pytest.mark.parametrize("words", ["[", '{"added_tokens": 3}', '{"added_tokens": [{"id": 7}]}'])
def test_a_damaged_tokenizer_is_named(words: str, tmp_path: Path) -> None:
    """The tokens of an adapter come from a file that others wrote."""
    config = CONFIG | {"trainable_token_indices": [7]}
    (tmp_path / adapter.CONFIG).write_text(json.dumps(config))
    save_file(tensors(**{ROWS: torch.ones(1, 64)}), tmp_path / adapter.WEIGHTS)
    (tmp_path / "tokenizer.json").write_text(words)

    with pytest.raises(SpecError, match=r"MODEL-202 .*tokenizer.json: cannot be read"):
        added_by(adapter.inspect(tmp_path))
