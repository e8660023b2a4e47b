"""Every architecture of the presets is tuned whole: each projection adapted, each packed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file

from tuning import adapter, files
from tuning.errors import SpecError
from tuning.models import finite, four_bit, load
from tuning.models.load import (
    device_for,
    load_base,
    load_for_training,
    load_tokenizer,
    read_config,
)
from tuning.models.lora import select
from tuning.plan.device import Device
from tuning.plan.torch_build import TorchBuild
from tuning.training import train

Build = Callable[..., Path]

LLAMA = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
PHI3 = ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
FALCON = ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
PROJECTIONS = {
    "phi3": PHI3,
    "phi3-longrope": PHI3,
    "phi4-mini": PHI3,
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral3": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma3": LLAMA,
    "falcon": FALCON,
    "falcon-new": FALCON,
    "phi2": ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"],
    "gemma3-vision": LLAMA,
    "mistral3-vision": LLAMA,
}
EAGER = tiny_runs.placement(attention="eager")
LEAKY = {"falcon", "falcon-new"}


@pytest.mark.parametrize("kind", ["llama", "qwen3moe"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_constants_in_float32_are_the_same_numbers(
    kind: str, precision: str, tiny_base: Build
) -> None:
    """Of linear layers and of experts: every logit keeps its bits, and nothing is in 8 bits."""
    packing = tiny_runs.NF4 | {"compute": precision}
    recipe = tiny_runs.recipe(method="qlora", quantisation=packing, precision=precision)
    logits, nested = [], []
    for wide in (False, True):
        placement = tiny_runs.placement(float_constants=wide)
        tuned, _, _ = load_for_training(tiny_base(kind), recipe=recipe, placement=placement)
        modules = list(tuned.modules())
        held = [m.weight.quant_state for m in modules if isinstance(m, Linear4bit)]
        held += [state for m in modules for state in four_bit.states(m).values()]
        nested.append({state.nested for state in held})
        assert len(held) > 10 and (wide or all(state.state2 for state in held))
        with torch.no_grad():
            logits.append(tuned.eval()(input_ids=torch.arange(4, 20)[None]).logits)
    assert [{True}, {False}] == nested
    assert torch.equal(*logits)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("family", PROJECTIONS)
def test_every_architecture_trains_whole(
    family: str, method: str, tiny_base: Build, tmp_path: Path
) -> None:
    """Loss falls; each attention and MLP projection has LoRA, and 4 bits in qlora; nothing else."""
    packing = family not in LEAKY
    recipe = tiny_runs.recipe(method=method, packing=packing, steps=4, dropout=0.0)
    placement = tiny_runs.placement(checkpointing=True)

    result = train.work(tiny_runs.request(tmp_path, tiny_base(family), recipe, placement))

    names = PROJECTIONS[family]
    quantised = 1.0 if method == "qlora" else None
    whole = {"expected": 2 * len(names), "adapted": 2 * len(names), "names": names, "matrices": 0}
    assert whole | {"quantised": quantised} == result["covered"]

    made = adapter.inspect(tmp_path / "adapter")
    assert names == sorted({module.rpartition(".")[2] for module in made.modules})
    assert names == made.config["target_modules"]
    assert result["trainable"] == made.parameters
    assert result["loss_last"] < result["loss_first"]


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("family", ["gptoss", "qwen3moe"])
def test_experts_are_covered(family: str, method: str, tiny_base: Build) -> None:
    """Every expert matrix has LoRA, and 4 bits in qlora; the router has neither."""
    recipe = tiny_runs.recipe(method=method)

    tuned, _, coverage = load_for_training(tiny_base(family), recipe=recipe, placement=EAGER)

    names = ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    assert names == coverage.to_json()["names"]
    assert 12 == len(coverage.adapted)
    assert (1.0 if method == "qlora" else None) == coverage.quantised
    routers = [m for m in tuned.modules() if "Router" in type(m).__name__]
    assert 2 == len(routers)
    assert all(p.dtype == torch.bfloat16 for router in routers for p in router.parameters())


def test_who_names_attention_gets_attention(tiny_base: Build) -> None:
    """Named targets are honoured on a model with fused experts, in 16 bits."""
    recipe = tiny_runs.recipe(targets=("q_proj", "v_proj"))

    _, _, coverage = load_for_training(tiny_base("gptoss"), recipe=recipe, placement=EAGER)

    assert ["q_proj", "v_proj"] == coverage.to_json()["names"]
    assert 4 == len(coverage.adapted)


def test_every_unknown_target_is_named(tiny_base: Build) -> None:
    """Targets, exclusions and layers that match nothing are all named, with what there is."""
    recipe = tiny_runs.recipe(
        targets=("q_proj", "lm_head", "query"), exclude=("gate",), layers=(0, 7)
    )

    with pytest.raises(SpecError) as error:
        load_for_training(tiny_base("llama"), recipe=recipe, placement=tiny_runs.placement())

    wrong = [(p.code, p.where, p.what.split("'")[1:2]) for p in error.value.problems]
    assert [
        ("MODEL-110", "target_modules", ["lm_head"]),
        ("MODEL-110", "target_modules", ["query"]),
        ("MODEL-110", "exclude_modules", ["gate"]),
        ("MODEL-111", "layers_to_transform", []),
    ] == wrong
    assert "q_proj, up_proj, v_proj" in str(error.value)


def test_chosen_layers_and_exclusions_are_kept(tiny_base: Build) -> None:
    """Only the asked layer, without the excluded names; the config says so in short names."""
    recipe = tiny_runs.recipe(exclude=("up_proj", "down_proj"), layers=(1,))

    tuned, _, coverage = load_for_training(
        tiny_base("llama"), recipe=recipe, placement=tiny_runs.placement()
    )

    assert {"model.layers.1"} == {".".join(n.split(".")[:3]) for n in coverage.adapted}
    config = tuned.peft_config["default"]
    assert ["gate_proj", "k_proj", "o_proj", "q_proj", "v_proj"] == config.target_modules
    assert [1] == config.layers_to_transform


def test_all_linear_means_every_projection() -> None:
    """PEFT's word for all is understood, and means what no targets mean."""
    found = ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"]

    assert select(found, targets=None) == select(found, targets=("all-linear",))


@pytest.mark.parametrize("family", sorted(set(PROJECTIONS) - LEAKY))
def test_packed_documents_do_not_see_each_other(family: str, tiny_base: Build) -> None:
    """A packed row gives each document the logits that it has alone."""
    base = load_base(
        tiny_base(family), precision="float32", quantisation=None, device="cpu", attention="sdpa"
    ).eval()
    first, second = torch.arange(5, 25)[None], torch.arange(40, 70)[None]
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]

    with torch.no_grad():
        packed = base(
            input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False
        ).logits
        alone = torch.cat([base(input_ids=ids).logits for ids in (first, second)], 1)

    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", sorted(LEAKY))
def test_a_family_that_leaks_is_not_packed(family: str, tiny_base: Build) -> None:
    """Where documents would see each other, packing is refused rather than trained."""
    recipe = tiny_runs.recipe(packing=True)

    with pytest.raises(SpecError, match=r"MODEL-116 packing: .*falcon packed documents see"):
        load_for_training(tiny_base(family), recipe=recipe, placement=tiny_runs.placement())


def test_answering_first_does_not_break_training_in_4_bits(tiny_base: Build) -> None:
    """A 4-bit layer passes gradients on after it has answered without them."""
    base = load_base(
        tiny_base("llama"), precision="bfloat16", quantisation=tiny_runs.NF4, device="cpu"
    )
    layer = base.model.layers[0].mlp.up_proj
    base.eval()
    with torch.no_grad():
        base(input_ids=torch.arange(8)[None])
    base.train()

    x = torch.ones(1, 3, 64, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()

    assert x.grad is not None and bool(x.grad.any())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "nobody_knows"}, "MODEL-101"),
        ({"quantization_config": {"quant_method": "gptq"}}, "MODEL-102"),
        (None, "MODEL-100"),
    ],
)
def test_bad_bases_are_refused(
    change: dict[str, Any] | None, expected: str, tiny_base: Build, tmp_path: Path
) -> None:
    """One clear line for a base that cannot be used."""
    if change is not None:
        record = json.loads((tiny_base("llama") / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(record | change))

    with pytest.raises(SpecError, match=expected):
        read_config(tmp_path)


def test_a_base_without_safetensors_is_refused(tiny_base: Build, tmp_path: Path) -> None:
    """Pickled weights are never loaded."""
    (tmp_path / "config.json").write_bytes((tiny_base("llama") / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even looked at")

    with pytest.raises(SpecError, match=r"MODEL-105 .*no .*safetensors"):
        load_base(tmp_path, precision="bfloat16", quantisation=None, device="cpu")


@pytest.mark.parametrize("packing", [None, tiny_runs.NF4], ids=["lora", "qlora"])
@pytest.mark.parametrize("harm", ["a weight gone", "another shape", "a layer more in the config"])
def test_a_base_that_is_not_whole_is_refused(
    harm: str, packing: dict[str, Any] | None, tiny_base: Build, tmp_path: Path
) -> None:
    """transformers would fill the rest with random numbers, and training would go on from them."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base("llama"), base)
    tensors = load_file(base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    if harm == "a weight gone":
        del tensors[name]
    elif harm == "another shape":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        config["num_hidden_layers"], name = 3, "model.layers.2"
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps(config))

    with pytest.raises(SpecError, match=f"MODEL-119 .*such as {name}"):
        load_base(base, precision="bfloat16", quantisation=packing, device="cpu")


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(
    ("name", "number", "precision", "fact"),
    [
        ("model.layers.0.mlp.down_proj.weight", float("nan"), "bfloat16", "NaN or infinity"),
        ("model.norm.weight", float("-inf"), "float32", "NaN or infinity"),
        ("model.embed_tokens.weight", -7e4, "float16", "holds -7e+04, more than"),
    ],
)
def test_a_base_weight_that_is_no_number_is_named(
    name: str,
    number: float,
    precision: str,
    fact: str,
    method: str,
    tiny_base: Build,
    tmp_path: Path,
) -> None:
    """Before a step is made of it, or 4-bit packing hides it."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base("llama"), base)
    tensors = load_file(base / "model.safetensors")
    tensors[name] = tensors[name].float()
    tensors[name].view(-1)[3] = number
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(SpecError, match="MODEL-117") as caught:
        load_for_training(
            base,
            recipe=tiny_runs.recipe(method=method, precision=precision),
            placement=tiny_runs.placement(),
        )

    (problem,) = caught.value.problems
    assert problem.where.endswith(f"model.safetensors {name}")
    assert fact in problem.what


def test_large_weights_fit_a_type_that_holds_them(tiny_base: Build, tmp_path: Path) -> None:
    """What float16 cannot hold is no problem in bfloat16."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base("llama"), base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = torch.full((64,), 7e4)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    finite.require(base, torch.bfloat16)
    with pytest.raises(SpecError, match="MODEL-117"):
        finite.require(base, torch.float16)


@pytest.mark.parametrize(("free", "device"), [(1 << 30, "cpu"), (8 << 30, "cuda")])
def test_weights_go_to_the_gpu_only_if_they_fit(
    free: int,
    device: str,
    tiny_base: Build,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To answer and to merge: what the card has free is asked first, and the reason told."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 16 << 30))

    assert device == device_for(tiny_base("llama"))
    assert ("on the CPU" in caplog.text) is (device == "cpu")


def test_a_gpu_without_kernels_is_refused_before_weights_are_loaded(
    tiny_base: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To answer and to merge as to train: with the build of torch that has them."""
    build = TorchBuild("2.13.0+cu130", (13, 0))
    card = Device("cuda", "V100", 1, 16 << 30, False, (7, 0), torch=build, kinds=((7, 0),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(load, "detect", lambda most: card)

    with pytest.raises(SpecError, match=r"PLAN-116 .*cu126"):
        device_for(tiny_base("llama"))


def test_a_tokenizer_without_end_and_padding_trains(tiny_base: Any, tmp_path: Path) -> None:
    """trl wants the name of a token for what it masks; the image's tokenizer stays as it is."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base("llama"), base)
    names = ("eos_token", "pad_token", "bos_token")
    path = base / "tokenizer_config.json"
    files.write_json(path, {k: v for k, v in files.read_json(path).items() if k not in names})
    (base / "special_tokens_map.json").unlink(missing_ok=True)

    recipe = tiny_runs.recipe(precision="float32", steps=2)
    run = tmp_path / "run"
    found = train.work(tiny_runs.request(run, base, recipe, tiny_runs.placement(), count=8))

    assert 2 == found["steps"]
    for kept in (load_tokenizer(base), load_tokenizer(run / "adapter")):
        assert kept.eos_token is None and kept.pad_token is None


def test_a_padding_token_beyond_the_vocabulary_is_the_folders_fault(
    tiny_base: Any, tmp_path: Path
) -> None:
    """transformers asserts it while the model is built."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base("llama"), base)
    path = base / "config.json"
    files.write_json(path, files.read_json(path) | {"pad_token_id": 9999, "eos_token_id": 9999})
    with pytest.raises(SpecError, match=r"MODEL-106 .*Padding_idx"):
        load_base(base, precision="float32", quantisation=None, device="cpu")


def test_layers_that_the_config_does_not_have_are_told(tiny_base: Any, tmp_path: Path) -> None:
    """transformers leaves them out: half of the model would be trained, and nobody told."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base("llama"), base)
    path = base / "config.json"
    assert [] == load_base(base, precision="float32", quantisation=None, device="cpu").unread_layers
    files.write_json(path, files.read_json(path) | {"num_hidden_layers": 1})
    cut = load_base(base, precision="float32", quantisation=None, device="cpu")
    assert [1] == cut.unread_layers
    recipe = tiny_runs.recipe(precision="float32", steps=2)
    run = tmp_path / "run"
    found = train.work(tiny_runs.request(run, base, recipe, tiny_runs.placement(), count=4))
    assert [1] == found["unread_layers"]


@pytest.mark.parametrize("same", [True, False])
def test_a_second_output_layer_beside_a_tied_config_is_refused(
    same: bool, tiny_base: Build, tmp_path: Path
) -> None:
    """What loads the adapter by config.json would use the embedding. An equal copy does no harm."""
    base = Path(shutil.copytree(tiny_base("qwen2"), tmp_path / "base"))
    held = load_file(base / "model.safetensors")
    head = held["model.embed_tokens.weight"].clone()
    held["lm_head.weight"] = head if same else torch.randn_like(head)
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    if same:
        assert load_base(base, precision="float32", quantisation=None, device="cpu")
        return
    with pytest.raises(SpecError, match=r"MODEL-119 .*tie_word_embeddings: true"):
        load_base(base, precision="float32", quantisation=None, device="cpu")
