"""Merge: the full model answers as base and adapter do together, and nothing else is in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
import torch

from tuning import safetensors
from tuning.errors import SpecError
from tuning.models import generate, merge
from tuning.models.load import load_tokenizer
from tuning.sources import verify
from tuning.training import train

Base = Callable[..., Path]
WORDS = [{"role": "user", "content": "cat dog one two"}]


def tuned(folder: Path, base: Path, method: str) -> Path:
    """A tiny adapter that was trained with `method`, and the recipe beside it."""
    recipe = tiny_runs.recipe(method=method, dropout=0.0, learning_rate=2e-2, steps=24, epochs=6.0)
    train.work(tiny_runs.request(folder, base, recipe, tiny_runs.placement()))
    record = {"recipe": json.loads(json.dumps(vars(recipe), default=list))}
    (folder / "adapter" / "tuning.json").write_text(json.dumps(record))
    return folder / "adapter"


@pytest.fixture(scope="module", params=["lora", "qlora"])
def pair(
    request: pytest.FixtureRequest, tiny_base: Base, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """A method, a base and its adapter."""
    base = tiny_base("phi3")
    return request.param, base, tuned(tmp_path_factory.mktemp(request.param), base, request.param)


def logits(loaded: object, tokenizer: object) -> torch.Tensor:
    prompt = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        WORDS, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        return loaded(input_ids=prompt["input_ids"]).logits.float()  # type: ignore[operator]


def test_the_merged_model_answers_as_the_pair_does(pair, tmp_path):
    """Far nearer to base and adapter than the base alone; of QLoRA nearer than another way."""
    method, base, adapter = pair
    done = merge.merge(base, adapter, tmp_path / "merged")

    packing = tiny_runs.NF4 if method == "qlora" else None
    together = generate.Session(base, adapter, quantisation=packing)
    merged = generate.Session(tmp_path / "merged")
    expected = logits(together.model, together.tokenizer)
    apart = (logits(merged.model, merged.tokenizer) - expected).abs().max().item()
    with together.model.disable_adapter():
        moved = (logits(together.model, together.tokenizer) - expected).abs().max().item()
    assert method == done["method"] and done["modules"] > 0
    assert apart < 0.1 * moved
    if method == "qlora":  # added to the published weights it would be another model
        wrong = generate.Session(base, adapter)
        assert apart < (logits(wrong.model, wrong.tokenizer) - expected).abs().max().item()


def test_what_is_written_is_a_plain_model(pair, tmp_path):
    """A folder that any server, and another run, takes for a base: 16 bits, no pickle."""
    _, base, adapter = pair
    merge.merge(base, adapter, tmp_path / "merged")

    config = verify.verify(tmp_path / "merged")
    held = safetensors.read_header(tmp_path / "merged" / "model.safetensors")
    published = safetensors.read_header(base / "model.safetensors")
    assert "quantization_config" not in config
    assert {"BF16"} == {tensor.dtype for tensor in held.values()}
    assert set(published) == set(held)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert all(Path(name).suffix in {".json", ".safetensors", ".jinja"} for name in names)
    load_tokenizer(tmp_path / "merged")


def test_a_merged_model_names_every_end_that_training_taught(pair, tmp_path):
    """The template's marker beside the tokenizer's end, so that any server stops there."""
    _, base, adapter = pair
    merge.merge(base, adapter, tmp_path / "merged")

    named = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    tokenizer = load_tokenizer(tmp_path / "merged")
    words = tokenizer.convert_ids_to_tokens(named["eos_token_id"])
    assert {"<|end|>", "<|endoftext|>"} == set(words)
    merged = generate.Session(tmp_path / "merged")
    assert named["eos_token_id"] == generate.stops(merged.model, merged.tokenizer)


def test_merging_twice_gives_the_same_bytes(pair, tmp_path):
    """So that two pushes are one image."""
    _, base, adapter = pair
    for name in ("one", "two"):
        merge.merge(base, adapter, tmp_path / name)
    content = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    ]

    assert content[0] == content[1]


def test_an_adapter_that_does_not_say_how_it_was_trained(pair, tmp_path):
    """Asked for; told, it works; told wrong, it is refused. Nothing is left."""
    method, base, adapter = pair
    silent = tmp_path / "silent"
    shutil.copytree(adapter, silent)
    (silent / "tuning.json").unlink()

    with pytest.raises(SpecError, match=r"MODEL-302.*say --method lora or qlora"):
        merge.merge(base, silent, tmp_path / "merged")
    other = {"lora": "qlora", "qlora": "lora"}[method]
    with pytest.raises(SpecError, match=f"MODEL-305.*was trained with {method}, not with {other}"):
        merge.merge(base, adapter, tmp_path / "merged", method=other)
    assert not (tmp_path / "merged").exists()
    assert method == merge.merge(base, silent, tmp_path / "merged", method=method)["method"]


def test_a_pair_that_does_not_fit_or_a_full_folder(pair, tiny_base, tmp_path):
    """Refused before weights are loaded; the folder stays as it is."""
    _, base, adapter = pair
    with pytest.raises(SpecError, match="MODEL-2"):
        merge.merge(tiny_base("qwen3"), adapter, tmp_path / "merged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(SpecError, match="IMAGE-103"):
        merge.merge(base, adapter, tmp_path / "full")

    assert ["full"] == [path.name for path in tmp_path.iterdir()]
    assert "x" == (tmp_path / "full" / "mine").read_text()
