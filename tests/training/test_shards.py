"""Ranks that share one copy of a model train what one process does, whatever happens to them."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import pytest
import tiny_runs
import torch
import transformers
from ranks import at_step, close, kill, train

from tuning import process
from tuning.models import load, shards
from tuning.plan import backends

Base = Callable[..., Path]
RECIPE = tiny_runs.recipe(
    precision="float32", learning_rate=1e-3, dropout=0.0, eval_steps=4, packing=True
)
NF4 = tiny_runs.recipe(method="qlora", learning_rate=1e-3, dropout=0.0, eval_steps=4)
ALONE = tiny_runs.placement(micro_batch=1, accumulation=4, kernels=backends.FUSED)
SHARED = replace(ALONE, ranks=2, accumulation=2, shards=2)
REPLICAS = replace(SHARED, shards=1)
FOUR = replace(ALONE, ranks=4, accumulation=1, shards=2)  # two copies, each of two


@pytest.fixture(scope="module")
def base(tiny_base: Base) -> Path:
    return tiny_base("llama")


def norms(run: Path) -> list[float | None]:
    """The gradient's norm of each step; None of one whose scaled gradients overflowed."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["grad_norm"] for line in lines if "grad_norm" in line]


def same(run: Path, base: Path, placement: Any, recipe: Any, *, relative: float = 1e-5) -> None:
    """Assert that this placement gives the losses and norms of one process."""
    one = replace(ALONE, attention=placement.attention, kernels=placement.kernels)
    alone = train(run / "a", base, one, recipe=recipe)
    shared = train(run / "b", base, placement, recipe=recipe)

    assert alone["loss_by_step"] == pytest.approx(shared["loss_by_step"], rel=relative)
    pairs = list(zip(norms(run / "a"), norms(run / "b"), strict=True))
    both = [pair for pair in pairs if None not in pair]
    assert len(both) > len(pairs) / 2
    for mine, other in both:
        assert mine == pytest.approx(other, rel=100 * relative)
    for name in ("eval_loss_before", "eval_loss_after"):
        assert alone[name] == pytest.approx(shared[name], rel=relative)
    assert (alone["tokens"], alone["trainable"]) == (shared["tokens"], shared["trainable"])
    assert alone["covered"] == shared["covered"]


def held(run: Path) -> float:
    """The share of the weights' bytes that a rank holds, as the log says."""
    found = re.findall(r"share (\d+) bytes of weights: holds (\d+)", _log(run))
    return max(int(own) / int(whole) for whole, own in found)


def _log(run: Path) -> str:
    return (run / "log" / "train.log").read_text()


def test_two_shares_train_packed_rows_as_one_process(base: Path, tmp_path: Path) -> None:
    """With our kernels and checkpointing; and each rank holds half of the layers."""
    same(tmp_path, base, replace(SHARED, checkpointing=True), RECIPE)

    assert held(tmp_path / "b") < 0.6
    assert "14 lora, 2 mlp" in _log(tmp_path / "b")


def test_two_shares_of_a_4_bit_mixture_train_as_one_process(tmp_path: Path) -> None:
    """Packed experts are cut as well."""
    same(tmp_path, architectures.write("qwen3_moe", tmp_path / "base"), SHARED, NF4, relative=1e-4)

    assert held(tmp_path / "b") < 0.75  # half of it is its embeddings'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe", "placement"),
    [
        ("llama", RECIPE, FOUR),
        ("llama", NF4, replace(SHARED, kernels=())),
        ("llama", RECIPE, replace(SHARED, offload=True)),
        ("llama", replace(RECIPE, precision="float16", packing=False), SHARED),
        ("llama", replace(RECIPE, keep_best=True, eval_steps=2), SHARED),
        ("gemma3_text", NF4, replace(SHARED, checkpointing=True)),  # tied embeddings
        ("deepseek_v3", replace(RECIPE, packing=False), SHARED),
        ("qwen3_next", replace(RECIPE, packing=False), SHARED),
        ("gpt_oss", NF4, replace(SHARED, attention="eager")),
        ("nemotron_h", NF4, SHARED),
        ("qwen2_moe", replace(NF4, new_tokens=("<now>",)), SHARED),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shares_of_many_kinds(name: str, recipe: Any, placement: Any, tmp_path: Path) -> None:
    """Copies of shares, other types, tied embeddings, mixtures, recurrences, new tokens."""
    base = architectures.write(name, tmp_path / "base")
    # a rank's scaled gradient in float16 is as many times larger, and overflows at another step;
    # roundings of bfloat16 turn a choice of an expert
    relative = {"float16": 5e-3, "bfloat16": 1e-3, "float32": 1e-5}[recipe.precision]

    same(tmp_path, base, placement, recipe, relative=relative)


def test_killed_ranks_change_nothing(base: Path, tmp_path: Path) -> None:
    """Killed twice, each time resumed from a checkpoint, both ranks end in the same bytes."""
    run, recipe = tmp_path / "run", replace(RECIPE, dropout=0.1)
    clean = train(tmp_path / "clean", base, SHARED, recipe=recipe)
    for step, rank in ((3, 1), (6, 0)):  # the second one after a checkpoint of a resumed run
        with pytest.raises(process.ChildDied) as died:
            stop = at_step(run, step, partial(kill, run, rank=rank))
            train(run, base, SHARED, recipe=recipe, tick=stop, save_steps=1)
        assert -signal.SIGKILL == died.value.status

    again = train(run, base, SHARED, recipe=recipe)

    assert again["resumed_from"] >= 5
    assert clean["adapter_sha256"] == again["adapter_sha256"]
    assert clean["loss_by_step"] == again["loss_by_step"]


@pytest.mark.slow
def test_any_placement_goes_on_from_any_other(base: Path, tmp_path: Path) -> None:
    """One process, replicas and shares take up each other's checkpoints."""
    expected = train(tmp_path / "clean", base, ALONE, recipe=RECIPE)["loss_by_step"]
    ways = {"alone": ALONE, "replicas": REPLICAS, "shares": SHARED, "four": FOUR}
    for first in ways:
        for second in ways.keys() - {first}:
            run = tmp_path / f"{first}-{second}"
            with pytest.raises(process.ChildDied):
                stop = at_step(run, 3, lambda run=run: kill(run, rank=0))
                train(run, base, ways[first], recipe=RECIPE, tick=stop, save_steps=1)

            again = train(run, base, ways[second], recipe=RECIPE)

            assert again["resumed_from"]
            assert close(expected, again["loss_by_step"])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", range(1, 8))
def test_a_kill_at_every_step(rank: int, step: int, base: Path, tmp_path: Path) -> None:
    """Of either rank, after each step: one adapter."""
    clean = train(tmp_path / "clean", base, SHARED, recipe=RECIPE)
    run = tmp_path / "run"
    with pytest.raises(process.ChildDied):
        stop = at_step(run, step, lambda: kill(run, rank=rank))
        train(run, base, SHARED, recipe=RECIPE, tick=stop, save_steps=1)
    again = train(run, base, SHARED, recipe=RECIPE)

    assert again["resumed_from"] or step == 1
    assert clean["adapter_sha256"] == again["adapter_sha256"]


class Part(shards.Split):
    """A rank's view of a copy, without a mesh."""

    def __init__(self, number: int, count: int) -> None:
        size = SimpleNamespace(ndim=1, size=lambda _: count, get_local_rank=lambda _: number)
        super().__init__(size)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("count", [2, 3])
def test_no_rank_ever_holds_more_than_a_layer(
    method: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of all ranks make the weights, and only one layer at a time was whole."""
    base = architectures.write("qwen3_moe", tmp_path / "base")
    recipe = NF4 if method == "qlora" else RECIPE
    options: dict[str, Any] = {"quantisation": recipe.quantisation, "device": "cpu"}
    most, keep = [], shards._keep_shares

    def counted(model: Any, split: Any) -> None:
        most.append(sum(any(_is_whole(p) for p in x.parameters()) for x in shards.layers(model)))
        keep(model, split)

    monkeypatch.setattr(shards, "_keep_shares", counted)
    parts = [
        load.load_base(base, precision="float32", split=Part(number, count), **options)
        for number in range(count)
    ]
    monkeypatch.undo()
    whole = load.load_base(base, precision="float32", **options)

    assert max(most) == 1
    for name, parameter in whole.named_parameters():
        mine = [dict(part.named_parameters())[name] for part in parts]
        if ".layers." in name:
            assert all(p.untyped_storage().nbytes() <= 8 for p in mine)
            mine = [torch.cat([getattr(p, shards.SHARE) for p in mine])]
        assert torch.equal(parameter.data, mine[0].data), name


def _is_whole(parameter: torch.Tensor) -> bool:
    size = parameter.numel() * parameter.element_size()
    return not parameter.is_meta and parameter.untyped_storage().nbytes() >= size > 8


def test_layers_are_the_language_model_s() -> None:
    """Not those of a vision tower, and no parts of layers."""
    config = transformers.CONFIG_MAPPING["gemma3"]()
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)

    found = shards.layers(model)

    assert config.text_config.num_hidden_layers == len(found)
    assert {"Gemma3DecoderLayer"} == {type(layer).__name__ for layer in found}
