"""Quantised bases: fp8 and mxfp4 are the 16-bit model that they stand for, 4 bits stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import quantised_bases
import tiny_runs
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tuning import safetensors
from tuning.errors import SpecError
from tuning.models import generate, merge, unpacked
from tuning.models.load import device_for, load_base, load_for_training
from tuning.presets import quantised
from tuning.sources import verify
from tuning.training import train

Build = Callable[..., Path]
EDGES = {"hidden_size": 192, "intermediate_size": 320, "head_dim": 48}  # blocks are cut at both
CASES = [
    ("llama", "block", EDGES),
    ("qwen3", "block", {}),  # a matrix is smaller than its block
    ("qwen3moe", "block", {}),  # a file holds each expert by itself
    ("ministral3", "tensor", {}),
    ("mistral3-vision", "tensor", {}),
    ("gptoss", "mxfp4", {}),
]


def same(one: Any, other: Any) -> bool:
    """Whether two models hold the same numbers under the same names."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in right)


@pytest.mark.parametrize("packing", [None, tiny_runs.NF4], ids=["lora", "qlora"])
@pytest.mark.parametrize(("family", "form", "shape"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_it_is_loaded_as_the_16_bit_model_that_it_stands_for(
    family: str,
    form: str,
    shape: dict[str, Any],
    packing: dict[str, Any] | None,
    tiny_base: Build,
    tmp_path: Path,
) -> None:
    """Every number, packed in 4 bits or not; nothing in the config calls it quantised."""
    held, plain = quantised_bases.pair(tiny_base(family, **shape), tmp_path, form)

    one, other = (
        load_base(base, precision="bfloat16", quantisation=packing, device="cpu")
        for base in (held, plain)
    )

    kinds = {
        tensor.dtype for tensor in safetensors.read_header(held / "model.safetensors").values()
    }
    assert kinds & {"F8_E4M3", "U8"}
    assert same(one, other)
    assert type(one) is type(other)
    left, right = one.config.to_dict(), other.config.to_dict()
    assert left.get("quantization_config") == right.get("quantization_config")
    assert one.generation_config.to_dict() == other.generation_config.to_dict()
    verify.verify(held)


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize("form", ["block", "tensor"])
def test_a_weight_is_rounded_once(
    precision: str, form: str, tiny_base: Build, tmp_path: Path
) -> None:
    """To the precision of the run, not to bfloat16 on the way."""
    dtype = getattr(torch, precision)
    held, _ = quantised_bases.pair(tiny_base("llama", **EDGES), tmp_path, form)
    stored = load_file(held / "model.safetensors")
    expected = quantised_bases.FORMATS[form][1](stored, dtype)

    found = load_base(held, precision=precision, quantisation=None, device="cpu").state_dict()

    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(expected[name], found[name])
    assert not torch.equal(expected[name], expected[name].bfloat16().to(dtype))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    experts=st.sampled_from([None, 3]),
    scales=st.sampled_from(["block", "tensor", "row", "exponent"]),
    seed=st.integers(0, 9),
)
def test_any_shape_is_its_numbers_times_their_scales(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    experts: int | None,
    scales: str,
    seed: int,
) -> None:
    """A scale for a block, cut at the edges or not, a row, or the tensor; or an exponent of it."""
    source = torch.Generator().manual_seed(seed)
    size = (rows, columns) if experts is None else (experts, rows, columns)
    data = torch.randn(size, generator=source).to(torch.float8_e4m3fn)
    grid = {"tensor": (), "row": (*size[:-1], 1)}.get(
        scales, (*size[:-2], -(-rows // 128), -(-columns // 128))
    )
    scale = torch.rand(grid, generator=source) + 0.5
    spread = scale
    if scales == "exponent":
        scale = torch.randint(110, 140, grid, generator=source, dtype=torch.uint8)
        spread = torch.exp2(scale.float() - 127)
    if scales in ("block", "exponent"):
        spread = spread.repeat_interleave(128, -2)[..., :rows, :]
        spread = spread.repeat_interleave(128, -1)[..., :columns]
    folder = tmp_path_factory.mktemp("one")
    tensors = {"up.weight": data, "up.weight_scale_inv": scale}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}

    with mock.patch.object(unpacked, "CHUNK", 5000):  # of the numbers that are unpacked at a time
        (found,) = unpacked.tensors(folder, said, torch.bfloat16).values()
        whole = found[...]

    assert torch.equal((data.float() * spread).bfloat16(), whole)


def test_expert_weights_are_those_that_transformers_reads(tiny_base: Build, tmp_path: Path) -> None:
    """Of gpt-oss, by the library's own reader of the format."""
    held, _ = quantised_bases.pair(tiny_base("gptoss"), tmp_path, "mxfp4")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        held, dtype=torch.bfloat16, quantization_config=transformers.Mxfp4Config(dequantize=True)
    )

    assert same(load_base(held, precision="bfloat16", quantisation=None, device="cpu"), theirs)


def test_memory_is_asked_for_the_unpacked_weights(
    tiny_base: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card with room for the file alone is too small to answer on."""
    held, plain = quantised_bases.pair(tiny_base("llama", **EDGES), tmp_path, "block")
    config = json.loads((held / "config.json").read_text())
    size = quantised.loaded_bytes(unpacked.paths(held), config)
    stored = (held / "model.safetensors").stat().st_size
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (stored + (2 << 30), 16 << 30))

    assert size == sum(
        2 * tensor.count for tensor in safetensors.read_header(plain / "model.safetensors").values()
    )
    assert "cpu" == device_for(held)


@pytest.mark.parametrize(
    ("form", "tensor", "place", "byte"),
    [
        ("block", "model.layers.0.mlp.up_proj.weight", 5, 0x7F),  # NaN of F8_E4M3
        ("block", "model.layers.0.mlp.up_proj.weight_scale_inv", 0, None),
        ("mxfp4", "model.layers.0.mlp.experts.down_proj_scales", 3, 255),
    ],
)
def test_a_number_that_is_none_is_named(
    form: str, tensor: str, place: int, byte: int | None, tiny_base: Build, tmp_path: Path
) -> None:
    """Before a step is made of it: in the numbers, or in a scale."""
    family = "gptoss" if form == "mxfp4" else "llama"
    held, _ = quantised_bases.pair(tiny_base(family), tmp_path, form)
    tensors = load_file(held / "model.safetensors")
    if byte is None:
        tensors[tensor].view(-1)[place] = float("inf")
    else:
        tensors[tensor].view(torch.uint8).view(-1)[place] = byte
    save_file(tensors, held / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(SpecError, match="MODEL-117") as caught:
        load_base(held, precision="bfloat16", quantisation=None, device="cpu", finite_only=True)

    (problem,) = caught.value.problems
    assert tensor.removesuffix("_scale_inv").removesuffix("_scales") in problem.where


SCALE = "model.layers.0.mlp.up_proj.weight_scale_inv"
BROKEN: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = [
    ("no scale", lambda tensors: tensors.pop(SCALE)),
    ("other grid", lambda tensors: tensors.update({SCALE: torch.ones(7, 5)})),
    ("integers", lambda tensors: tensors.update({SCALE: torch.ones(3, 2).int()})),
]


@pytest.mark.parametrize("harm", [row[1] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_scales_that_do_not_belong_are_found_from_headers(
    harm: Callable[[dict[str, torch.Tensor]], Any], tiny_base: Build, tmp_path: Path
) -> None:
    """Before a GPU is paid for; else the weights would be off by a factor of hundreds."""
    held, _ = quantised_bases.pair(tiny_base("llama", **EDGES), tmp_path, "block")
    tensors = load_file(held / "model.safetensors")
    harm(tensors)
    save_file(tensors, held / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(SpecError, match=r"BASE-113 .*mlp\.up_proj\.weight") as caught:
        verify.verify(held)

    assert 1 == len(caught.value.problems)


@pytest.fixture(scope="module")
def four(tiny_base: Build, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and the same as transformers and bitsandbytes publish it in 4 bits."""
    base, folder = tiny_base("llama"), tmp_path_factory.mktemp("four") / "base"
    packing = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=packing, dtype=torch.bfloat16
    ).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return base, folder


def trained(run: Path, base: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """The tensors of a QLoRA adapter for `base`."""
    recipe = tiny_runs.recipe(method="qlora", steps=4, **changes)
    train.work(tiny_runs.request(run, base, recipe, tiny_runs.placement()))
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_training_on_published_4_bits_is_training_on_our_own(
    four: tuple[Path, Path], tmp_path: Path
) -> None:
    """The same numbers as from the 16-bit base, packed by us."""
    ours, theirs = (trained(tmp_path / base.name, base) for base in four)

    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("named", [True, False], ids=["listed", "not listed"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_what_its_makers_left_in_16_bits_stays_so(
    named: bool, precision: str, four: tuple[Path, Path], tmp_path: Path
) -> None:
    """Most of the layers even, and where the list names modules as an older transformers did."""
    base, packed = four
    folder = tmp_path / "base"
    shutil.copytree(packed, folder)
    plain, tensors = load_file(base / "model.safetensors"), load_file(packed / "model.safetensors")
    kept = [name for name in plain if ".mlp." in name]
    tensors = {n: t for n, t in tensors.items() if not n.startswith(tuple(kept))}
    tensors |= {name: plain[name] for name in kept}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    skipped = [f"model.layers.{n}.mlp" if named else f"layers_{n}.mlp" for n in range(2)]
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", *skipped]
    (folder / "config.json").write_text(json.dumps(config))

    compute = tiny_runs.NF4 | {"compute": precision}
    model, _, coverage = load_for_training(
        folder,
        recipe=tiny_runs.recipe(method="qlora", precision=precision, quantisation=compute),
        placement=tiny_runs.placement(),
    )

    held = dict(model.base_model.model.named_parameters())
    layer = held["model.layers.1.mlp.up_proj.base_layer.weight"]
    assert torch.equal(plain["model.layers.1.mlp.up_proj.weight"].to(layer.dtype), layer)
    assert torch.uint8 == held["model.layers.1.self_attn.q_proj.base_layer.weight"].dtype
    assert {getattr(torch, precision), torch.uint8} >= {
        each.dtype for name, each in held.items() if "lora_" not in name
    }
    assert 14 == len(coverage.adapted) and coverage.quantised is not None
    assert 0 < coverage.quantised < 0.9


@pytest.mark.parametrize("family", ["fp8", "4 bits"])
def test_the_merged_model_is_in_16_bits_and_answers_the_same(
    family: str, four: tuple[Path, Path], tiny_base: Build, tmp_path: Path
) -> None:
    """As base and adapter do; no word of quantisation is left in its config."""
    base = four[1]
    method = "qlora"
    if family == "fp8":
        base, _ = quantised_bases.pair(tiny_base("ministral3"), tmp_path, "tensor")
        method = "lora"
    recipe = tiny_runs.recipe(method=method, dropout=0.0, learning_rate=2e-2, steps=12, epochs=3.0)
    train.work(tiny_runs.request(tmp_path / "run", base, recipe, tiny_runs.placement()))
    record = {"recipe": json.loads(json.dumps(vars(recipe), default=list))}
    adapter = tmp_path / "run" / "adapter"
    (adapter / "tuning.json").write_text(json.dumps(record))

    merge.merge(base, adapter, tmp_path / "merged")

    together, merged = generate.Session(base, adapter), generate.Session(tmp_path / "merged")
    words = torch.arange(5, 40)[None]
    with torch.no_grad():
        expected, found = (each.model(input_ids=words).logits for each in (together, merged))
        with together.model.disable_adapter():
            moved = (together.model(input_ids=words).logits - expected).abs().max()
    assert (found - expected).abs().max() < 0.1 * moved
    assert "quantization_config" not in verify.verify(tmp_path / "merged")
    kinds = safetensors.read_header(tmp_path / "merged" / "model.safetensors").values()
    assert {"BF16"} == {tensor.dtype for tensor in kinds}
    ask = [each.ask("cat dog one", compare=False)[0] for each in (together, merged)]
    assert ask[0] == ask[1]
