"""Rows for new tokens: where they begin, which are trained, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import transformers
from commands import workspace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tuning.plan as plan
from tuning import adapter, spec
from tuning.errors import SpecError
from tuning.models import generate, merge, new_tokens
from tuning.models.kernels import head
from tuning.models.load import load_base, load_for_training, load_tokenizer
from tuning.plan import backends
from tuning.plan.device import detect
from tuning.training import train

Build = Callable[..., Path]
TOKENS = ("<|alpha|>", "<|beta two|>")
TIED = {"llama": False, "qwen2": True, "gemma3": True, "falcon": True, "gemma3-vision": False}


def loaded(base: Path) -> tuple[Any, Any]:
    model = load_base(base, precision="float32", quantisation=None, device="cpu")
    return model, load_tokenizer(base)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("family", TIED)
def test_rows_of_both_layers_are_trained_with_our_kernels(
    family: str, method: str, tiny_base: Build, caplog: pytest.LogCaptureFixture
) -> None:
    """Shared rows where the matrix is shared, else one for each; nothing else of them, and the
    one-pass head stays wherever it computes the same as peft and trl."""
    precision = "bfloat16" if method == "qlora" else "float32"
    recipe = tiny_runs.recipe(method=method, new_tokens=TOKENS, dropout=0.0, precision=precision)
    placement = tiny_runs.placement(kernels=backends.FUSED)

    with caplog.at_level(logging.WARNING):
        tuned, tokenizer, _ = load_for_training(
            tiny_base(family), recipe=recipe, placement=placement
        )

    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    rows = [name for name in trained if "lora_" not in name]
    assert len(rows) == (1 if TIED[family] else 2)
    assert all("trainable_tokens_delta" in name for name in rows)
    assert len(tokenizer) == tuned.get_base_model().get_input_embeddings().weight.shape[0]
    assert tuned.get_base_model().one_pass and not caplog.records


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_new_row_is_the_mean_of_its_pieces(family: str, tiny_base: Build) -> None:
    """In both layers, the same every time: a base model prefers it to no piece."""
    model, tokenizer = loaded(tiny_base(family))
    pieces = [tokenizer(token)["input_ids"] for token in TOKENS]
    before = model.get_input_embeddings().weight.shape[0]

    ids = new_tokens.extend(model, tokenizer, TOKENS)

    assert list(range(before, before + len(TOKENS))) == ids
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for id, parts in zip(ids, pieces, strict=True):
            assert torch.allclose(layer.weight[id], layer.weight[parts].mean(0), atol=1e-6)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 9, *ids, 3]])).logits
    assert (logits.argmax(-1) < before).all()
    again, other = loaded(tiny_base(family))
    new_tokens.extend(again, other, TOKENS)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_a_padded_vocabulary_has_room(tiny_base: Build, tmp_path: Path) -> None:
    """Embeddings of published models are padded: rows that no token has are taken, none added."""
    model, tokenizer = loaded(tiny_base("llama"))
    model.resize_token_embeddings(len(tokenizer) + 30, mean_resizing=False)

    ids = new_tokens.extend(model, tokenizer, TOKENS)

    assert [len(tokenizer) - 2, len(tokenizer) - 1] == ids
    assert len(tokenizer) + 28 == model.get_input_embeddings().weight.shape[0]


def test_a_tokenizer_with_more_tokens_than_rows_gets_all(tiny_base: Build) -> None:
    """A pad token without a row, say: the new ones come after it, and its row is the mean."""
    model, tokenizer = loaded(tiny_base("llama"))
    before = len(tokenizer)
    tokenizer.add_tokens(["<|gap|>"], special_tokens=True)

    ids = new_tokens.extend(model, tokenizer, TOKENS)

    assert [before + 1, before + 2] == ids
    weight = model.get_input_embeddings().weight
    assert before + 3 == weight.shape[0]
    assert torch.allclose(weight[before], weight[:before].mean(0), atol=1e-6)


def test_an_output_layer_with_a_bias_is_refused(tiny_base: Build, tmp_path: Path) -> None:
    """peft computes the layer of trained rows without it, in silence; a plan refuses it already."""
    recipe = tiny_runs.recipe(new_tokens=TOKENS)
    path = workspace(tmp_path / "a.yaml", sections={"ModelConfig": {"new_special_tokens": "<a>"}})
    asked = spec.load(path, overrides=spec.Overrides(base_model=str(tiny_base("phi2"))))

    with pytest.raises(SpecError, match=r"PLAN-118 .*output layer of .* has a bias"):
        plan.draft(asked, here=detect())

    with pytest.raises(SpecError, match=r"MODEL-140 phi: .*bias"):
        load_for_training(tiny_base("phi2"), recipe=recipe, placement=tiny_runs.placement())


def test_an_embedding_that_does_more_is_refused(
    tiny_base: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that normalises what it looks up, say: peft would look up alone."""

    class Normed(torch.nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(super().forward(input), dim=-1)

    def load(*_: Any, **__: Any) -> Any:
        model, _ = loaded(tiny_base("llama"))
        model.model.embed_tokens.__class__ = Normed
        return model

    monkeypatch.setattr("tuning.models.load.load_base", load)
    recipe = tiny_runs.recipe(new_tokens=TOKENS, precision="float32")

    with pytest.raises(SpecError, match=r"MODEL-140 llama: .*peft left out"):
        load_for_training(tiny_base("llama"), recipe=recipe, placement=tiny_runs.placement())


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_an_adapter_of_4_bits_merges_to_the_same(
    family: str, tiny_base: Build, tmp_path: Path
) -> None:
    """Embedding and output layer are never packed; merged and attached compute the same."""
    base = tiny_base(family)
    recipe = tiny_runs.recipe(method="qlora", new_tokens=TOKENS, steps=4, precision="float32")
    train.work(tiny_runs.request(tmp_path, base, recipe, tiny_runs.placement()))
    found, tokenizer = adapter.inspect(tmp_path / "adapter"), load_tokenizer(base)
    packed = load_base(base, precision="float32", quantisation=tiny_runs.NF4, device="cpu")
    whole = packed.dequantize(dtype=torch.float32)

    merge.merge(base, found.folder, tmp_path / "merged", method="qlora", device="cpu")

    new_tokens.extend_for(whole, tokenizer, found)
    attached = generate.attach(whole, found).eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    ids = tokenizer("cat <|alpha|> tree <|beta two|>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(
            attached(input_ids=ids).logits, merged(input_ids=ids).logits, atol=0.02
        )


def test_an_adapter_of_another_tokenizer_is_refused(tiny_base: Build, tmp_path: Path) -> None:
    """Its numbers mean other tokens here, so its rows would stand for other words."""
    base = tiny_base("llama")
    recipe = tiny_runs.recipe(new_tokens=TOKENS, steps=2)
    train.work(tiny_runs.request(tmp_path, base, recipe, tiny_runs.placement()))
    model, tokenizer = loaded(base)
    tokenizer.add_tokens(["<|another|>"])

    with pytest.raises(SpecError, match=r"MODEL-214 .*trains token \d+, '<.alpha.>'"):
        new_tokens.extend_for(model, tokenizer, adapter.inspect(tmp_path / "adapter"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    ids=st.lists(st.integers(0, 299), min_size=1, max_size=6, unique=True),
    tile=st.sampled_from([7, 64, 4096]),
)
def test_the_loss_with_trained_rows_is_cross_entropy(seed: int, ids: list[int], tile: int) -> None:
    """Loss, and gradients of hidden states and rows, as autograd has them of the whole matrix."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 40, 16, generator=draw)
    weight, rows = (torch.randn(n, 16, generator=draw) for n in (300, len(ids)))
    labels = torch.randint(0, 300, (2, 40), generator=draw)
    labels[0, :9] = head.IGNORED
    parts = [[part.clone().requires_grad_() for part in (hidden, rows)] for _ in range(2)]
    index = torch.tensor(ids)

    (x, r), (y, s) = parts
    before = head.FUSED_TILE_ROWS
    head.FUSED_TILE_ROWS = {"cpu": tile, "cuda": tile}
    try:
        ours = head.loss(x, weight, None, labels, ids=index, rows=r)
    finally:
        head.FUSED_TILE_ROWS = before
    (ours / 3).backward()
    logits = y[:, :-1] @ weight.index_copy(0, index, s).T
    theirs = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 300), labels[:, 1:].reshape(-1), reduction="sum"
    )
    (theirs / 3).backward()

    assert torch.allclose(ours, theirs, rtol=1e-5)
    for one, other in ((x, y), (r, s)):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5)
