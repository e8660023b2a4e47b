"""Models, GPUs and machines: the tables are right, and a name finds its row or a clear answer."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tuning import presets
from tuning.errors import SpecError
from tuning.presets import config as reader
from tuning.presets import load

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30

NAMES = [preset.name for preset in presets.all()]
CONFIGS = {entry["name"]: entry["config"] for entry in load.entries()}
FAMILIES = sorted(reader.families())
COUNTED = {c["model_type"] for c in CONFIGS.values()} - {*FAMILIES, *reader._WRAPPERS}

IN_LAYER = re.compile(
    r"(model|transformer)(\.language_model)?\.(layers|h)\.(?P<layer>\d+)\.(?P<name>.+)"
)
ROUTERS = ("mlp.gate", "mlp.shared_expert_gate", "router.proj")


# The names that a YAML written for KAITO may hold: none may go.
KAITO = frozenset(
    [
        "llama-3.1-8b-instruct",
        "llama-3.3-70b-instruct",
        "falcon-7b",
        "falcon-7b-instruct",
        "falcon-40b",
        "falcon-40b-instruct",
        "mistral-7b",
        "mistral-7b-instruct",
        "ministral-3-3b-instruct",
        "ministral-3-8b-instruct",
        "ministral-3-14b-instruct",
        "phi-2",
        "phi-3-mini-4k-instruct",
        "phi-3-mini-128k-instruct",
        "phi-3-medium-4k-instruct",
        "phi-3-medium-128k-instruct",
        "phi-3.5-mini-instruct",
        "phi-4-mini-instruct",
        "phi-4",
        "qwen2.5-coder-7b-instruct",
        "qwen2.5-coder-32b-instruct",
        "deepseek-r1-distill-qwen-14b",
        "deepseek-r1-distill-llama-8b",
        "gemma-3-4b-instruct",
        "gemma-3-27b-instruct",
        "gpt-oss-20b",
        "gpt-oss-120b",
    ]
)


def on_meta(config: dict[str, Any]) -> torch.nn.Module:
    """The model that transformers builds from a config.json, without memory."""
    config = {k: v for k, v in copy.deepcopy(config).items() if k != "quantization_config"}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = AutoConfig.for_model(**config)
        causal = type(read) in AutoModelForCausalLM._model_mapping
        kind = AutoModelForCausalLM if causal else AutoModelForImageTextToText
        model: torch.nn.Module = kind.from_config(read)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_shape_is_the_one_transformers_builds(name: str) -> None:
    """Exactly the parameters of the real class are counted, and its linear layers named."""
    facts = presets.find(name).facts
    model = on_meta(CONFIGS[name])

    assert facts.parameters + facts.tower == sum(p.numel() for p in model.parameters())

    layers: dict[tuple[str, int, int, bool], set[str]] = {}
    for path, module in model.named_modules():
        place = IN_LAYER.fullmatch(path)
        if place and isinstance(module, torch.nn.Linear) and place["name"] not in ROUTERS:
            shape = (place["name"], module.in_features, module.out_features)
            layers.setdefault((*shape, module.bias is not None), set()).add(place["layer"])
    found = {presets.Matrix(*key, layers=len(numbers)) for key, numbers in layers.items()}
    assert set(facts.linears) == found


@pytest.mark.parametrize("preset", presets.all(), ids=NAMES)
def test_parameters_match_the_hubs_count(preset: presets.Preset) -> None:
    """The text model and its tower have as many parameters as the published files hold."""
    facts = preset.facts

    if preset.published is None:
        assert preset.name in KAITO  # which were listed before anybody compared
    else:
        assert facts.parameters + facts.tower + preset.unread == preset.published
        assert preset.unread < 0.25 * preset.published


@pytest.mark.parametrize("preset", [p for p in presets.all() if p.facts.experts], ids=str)
def test_of_a_mixture_the_active_part_is_known(preset: presets.Preset) -> None:
    """Experts hold most of it, and a token passes through few: what memory and speed go by."""
    facts = preset.facts
    experts = sum(matrix.elements for matrix in facts.experts)
    idle = sum(matrix.elements - matrix.active for matrix in facts.experts)

    assert 0.7 * facts.parameters < experts < facts.parameters
    assert facts.parameters - idle == pytest.approx(facts.active, rel=0.01)  # biases apart
    assert facts.multiplied < facts.active < 0.35 * facts.parameters
    if billions := re.search(r"-a(\d+)b", preset.name):  # as its makers round it
        assert facts.active / 1e9 == pytest.approx(int(billions[1]), rel=0.2)


@pytest.mark.parametrize("name", [n for n in NAMES if CONFIGS[n]["model_type"] in COUNTED])
def test_a_saved_mixture_or_hybrid_is_still_its_preset(name: str, tmp_path: Path) -> None:
    """What `save_pretrained` writes, defaults and all, has the facts of the preset; resized not."""
    config = {k: v for k, v in CONFIGS[name].items() if k != "quantization_config"}
    AutoConfig.for_model(**copy.deepcopy(config)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    facts = presets.find(name).facts

    assert presets.facts(saved) == dataclasses.replace(facts, stored="16-bit")
    text = saved.get("text_config", saved)
    text["max_position_embeddings"] = 999
    assert presets.facts(saved).context == 999
    pruned = next((key for key in ("num_experts", "num_local_experts") if text.get(key)), "")
    text[pruned or "hidden_size"] //= 2
    assert presets.facts(saved) is None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_keys_read_as_transformers_reads_them(model_type: str) -> None:
    """An empty config.json means the class's defaults, since saving leaves defaults out."""
    default = AutoConfig.for_model(model_type)
    whole = default.to_dict() | {"model_type": model_type}

    actual = presets.facts({"model_type": model_type})

    assert presets.facts(whole) == actual
    assert actual.hidden == default.hidden_size
    assert actual.heads == default.num_attention_heads
    by_division = default.hidden_size // default.num_attention_heads
    assert actual.head_dim == (getattr(default, "head_dim", None) or by_division)
    assert actual.context == default.max_position_embeddings
    types = getattr(default, "layer_types", None)
    if types is not None:
        assert actual.windowed_layers == types.count("sliding_attention")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_saved_small_models_are_read(model_type: str, tmp_path: Path) -> None:
    """What `save_pretrained` writes gives the shape of what it saved."""
    config = AutoConfig.for_model(model_type, num_hidden_layers=3)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)

    actual = presets.facts(yaml.safe_load((tmp_path / "config.json").read_text()))

    assert actual.parameters == sum(p.numel() for p in model.parameters())
    assert actual.architecture == type(model).__name__


@pytest.mark.parametrize(
    "shape",
    [
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        {"multi_query": False},
        {"multi_query": True, "parallel_attn": False, "bias": True},
    ],
)
def test_every_falcon_decoder_is_read(shape: dict[str, Any]) -> None:
    """Old and new decoder, one or many key heads, one or two norms."""
    config = {"model_type": "falcon", "hidden_size": 64, "num_attention_heads": 4, **shape}

    actual = presets.facts(config)

    assert actual.parameters == sum(p.numel() for p in on_meta(config).parameters())


@pytest.mark.parametrize("model_type", ["gemma3", "mistral3"])
def test_a_model_with_a_vision_tower_is_its_text_model(model_type: str) -> None:
    """Text and tower are counted apart, and the wrapping class is named."""
    default = AutoConfig.for_model(model_type).to_dict() | {"model_type": model_type}
    default["text_config"] |= {"num_hidden_layers": 1, "layer_types": None}
    default["vision_config"] |= {"num_hidden_layers": 1}

    actual = presets.facts(default)

    count = sum(p.numel() for p in on_meta(default).parameters())
    assert actual.parameters + actual.tower == count
    assert actual.wrapper == model_type
    assert presets.support(actual, "qlora").supported


def test_an_unknown_architecture_is_none_and_a_broken_config_is_an_error() -> None:
    """None means: simulate. A file without model_type, or with impossible sizes, is refused."""
    assert presets.facts({"model_type": "hyena"}) is None
    assert presets.facts({"model_type": "llava", "text_config": {"model_type": "llama"}}) is None
    with pytest.raises(SpecError, match=r"SPEC-305 config\.json: has no model_type"):
        presets.facts({})
    with pytest.raises(SpecError, match="is not a mapping"):
        presets.facts({"model_type": "gemma3", "text_config": "x"})
    with pytest.raises(SpecError) as caught:
        presets.facts({"model_type": "llama", "hidden_size": 0, "vocab_size": "many"})
    assert ["config.json: hidden_size", "config.json: vocab_size"] == [
        p.where for p in caught.value.problems
    ]


def test_presets_are_found_by_name_alias_and_hub_id() -> None:
    """In any case; another org/model is nobody's preset, and no error."""
    phi = presets.find("phi-4")

    assert phi is presets.find("PHI-4")
    assert phi is presets.find("microsoft/Phi-4")
    assert presets.find("mistral-7b") is presets.find("mistral-7b-v0.3")
    assert presets.find("acme/llama-of-mine") is None
    assert len(NAMES) == len(set(NAMES))
    assert set(NAMES) >= KAITO


@pytest.mark.parametrize("name", ["phi3-mini-4k", "nonsense", "../../etc", "a/b/c", "a/..", ""])
def test_an_unknown_preset_names_the_choices(name: str) -> None:
    """KAITO's words, the nearest names, and where all are listed."""
    with pytest.raises(SpecError, match=r"SPEC-302 tuning\.preset\.name: Unsupported") as caught:
        presets.find(name)
    assert "`python -m tuning presets` lists" in str(caught.value)
    assert len(str(caught.value)) < 300
    if name.startswith("phi"):
        assert 'did you mean "phi-3-mini-4k-instruct"' in str(caught.value)


def test_a_model_too_big_for_any_job_is_refused_by_name() -> None:
    """KAITO admits these names and then panics."""
    with pytest.raises(SpecError, match=r"SPEC-303 .* 671 billion parameters"):
        presets.find("deepseek-v3-0324")


@pytest.mark.parametrize("preset", presets.all(), ids=NAMES)
def test_each_preset_is_complete(preset: presets.Preset) -> None:
    """A pinned commit, a licence, and a yes or no with a reason for both methods."""
    assert re.fullmatch("[0-9a-f]{40}", preset.revision)
    assert preset.licence
    for method in ("lora", "qlora"):
        verdict = presets.support(preset, method)
        assert verdict.reason
        assert bool(verdict.change) != verdict.supported


@pytest.mark.parametrize(
    ("name", "lora", "qlora", "words"),
    [
        ("phi-4", True, True, "plain linear"),
        ("falcon-7b", True, True, ""),
        ("gemma-3-4b-instruct", True, True, "vision tower"),
        ("ministral-3-8b-instruct", True, True, "fp8"),
        ("gpt-oss-20b", True, True, "experts"),
    ],
)
def test_what_is_promised(name: str, lora: bool, qlora: bool, words: str) -> None:
    """Every preset by both methods, those published in fp8 or mxfp4 and mixtures too."""
    preset = presets.find(name)

    assert lora == presets.support(preset, "lora").supported
    assert qlora == presets.support(preset.facts, "qlora").supported
    assert words in presets.support(preset, "qlora").reason


def test_packing_is_off_where_rows_would_see_each_other() -> None:
    """Measured wrong for Falcon, not measured for what was only counted; all others pack."""
    unsafe = {p.facts.model_type for p in presets.all() if not p.facts.packing_safe}

    assert unsafe - set(FAMILIES)
    assert unsafe & set(FAMILIES) == {"falcon"}


# --- machines -------------------------------------------------------------------------------------


def test_quick_start_machine_is_a_volta_with_its_engine() -> None:
    """KAITO's quick start names a V100: 16 GiB, no bfloat16, and only the CUDA 12.6 build."""
    machine = presets.instance("Standard_NC6s_v3")

    assert ("azure", 1, (7, 0), False, True) == (
        machine.cloud,
        machine.gpus,
        machine.gpu.capability,
        machine.gpu.bf16,
        machine.retired,
    )
    assert 15 * GIB < machine.memory_bytes < 16 * GIB
    verdict = presets.gpu_support(machine.gpu, "qlora")
    assert verdict.supported
    assert "cu126" in verdict.reason
    assert "float16" in verdict.reason


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("standard_nc24ads_a100_v4", "Standard_NC24ads_A100_v4"),
        ("NC24ads_A100_v4", "Standard_NC24ads_A100_v4"),
        ("Standard_ND96asr_v4", "Standard_ND96asr_v4"),
        ("Standard_ND96asr_A100_v4", "Standard_ND96asr_v4"),
        ("P5.48XLARGE", "p5.48xlarge"),
        ("a3-highgpu-1g", "a3-highgpu-1g"),
    ],
)
def test_machines_are_found_in_any_spelling(name: str, expected: str) -> None:
    """Any case, Azure's prefix or not, both names of ND96asr."""
    assert expected == presets.instance(name).name


def test_no_two_machines_share_a_name() -> None:
    """Not even without Azure's prefix, and in any case."""
    names = [
        name.lower().removeprefix("standard_")
        for machine in presets.instances()
        for name in (machine.name, *machine.aliases)
    ]

    assert len(names) == len(set(names))


def test_an_unknown_machine_names_the_nearest() -> None:
    """KAITO's words, at the place that was asked about."""
    with pytest.raises(SpecError, match=r'SPEC-304 --instance: Unsupported .* "Standard_NC6s_v3"'):
        presets.instance("Standard_NC6s_v9", where="--instance")
    with pytest.raises(SpecError, match='did you mean "NC6s_v3"'):
        presets.instance("nc6s_v4")


@pytest.mark.parametrize("name", ["H100", "NVIDIA A100 80GB", "t4", "L40S"])
def test_a_gpu_in_the_place_of_a_machine_names_machines_with_it(name: str) -> None:
    """The smallest of each cloud that still sells one."""
    with pytest.raises(SpecError) as refused:
        presets.instance(name)
    told = refused.value.problems[0].change
    offered = told.removeprefix(f"{name} is a GPU, of ").partition(":")[0].split(", ")
    machines = [presets.instance(each) for each in offered]

    assert machines and not any(machine.retired for machine in machines)
    assert len(machines) == len({machine.cloud for machine in machines})
    assert all(name.split()[-2 if "80GB" in name else -1].upper() in m.gpu.name for m in machines)


@pytest.mark.parametrize("name", ["4", "GPU", "RTX-4090", "Standard_NC25"])
def test_what_is_no_clouds_gpu_names_none(name: str) -> None:
    """A part of a name is none."""
    with pytest.raises(SpecError) as refused:
        presets.instance(name)
    assert "is a GPU" not in refused.value.problems[0].change


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "H200-SXM5"),
        ("Tesla T4", "T4"),
        ("NVIDIA-A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM5-80GB"),
        ("Tesla V100-PCIE-16GB", "V100-PCIE-16GB"),
        ("l40s", "L40S"),
    ],
)
def test_gpus_are_found_by_the_drivers_name(name: str, expected: str) -> None:
    """`nvidia-smi` and node labels spell them in their own way."""
    assert expected == presets.gpu(name).name


def test_an_unknown_gpu_names_the_choices() -> None:
    """A card that is in no table is no guess."""
    with pytest.raises(SpecError, match=r"SPEC-306 .*H200-SXM5"):
        presets.gpu("GeForce 256")


@pytest.mark.parametrize("gpu", presets.gpus(), ids=[g.name for g in presets.gpus()])
def test_each_gpu_is_plausible(gpu: presets.Gpu) -> None:
    """A job never has more memory than was sold; rates are there wherever CUDA is."""
    assert 0.85 * gpu.nominal_gib * GIB < gpu.memory_bytes <= gpu.nominal_gib * 1.003 * GIB
    if gpu.capability is None:
        assert not presets.gpu_support(gpu, "lora").supported
        return
    assert gpu.fp16_flops and 1e12 < gpu.fp16_flops < 1e16
    assert gpu.bandwidth and 1e11 <= gpu.bandwidth < 1e13
    assert gpu.bf16 == (gpu.capability >= (8, 0)) == (gpu.bf16_flops is not None)


@pytest.mark.parametrize(
    ("capability", "build"),
    [
        ((3, 7), None),
        ((5, 2), "cu126"),
        ((6, 1), "cu126"),
        ((7, 0), "cu126"),
        ((7, 5), "cu130"),
        ((8, 0), "cu130"),
        ((8, 9), "cu130"),
        ((9, 0), "cu130"),
        ((10, 0), "cu130"),
        ((12, 0), "cu130"),
        ((13, 0), None),
    ],
)
def test_each_capability_takes_the_newest_build_that_fits(
    capability: tuple[int, int], build: str | None
) -> None:
    """And none is promised where no build has kernels."""
    assert build == presets.engine_build(capability)


def test_the_builds_are_those_of_the_pinned_torch() -> None:
    """torch itself says which capabilities each of its builds was compiled for."""
    tables = torch.cuda.PYTORCH_RELEASES_CODE_CC
    for name, machines in tables.items():
        cuda = (int(name.split(".")[0]), int(name.split(".")[1]))
        found = presets.kernels(cuda) or ()
        assert machines["x86_64"] == {10 * major + minor for major, minor in found}
    for engine in presets.engines():
        key = f"{engine.name[2:4]}.{engine.name[4:]}"
        compiled = {10 * major + minor for major, minor in engine.compiled}

        assert tables[key]["x86_64"] == compiled
        assert presets.kernels((int(key[:2]), int(key[3:]))) == engine.compiled
        for gpu in presets.gpus():
            if gpu.capability is not None:
                number = 10 * gpu.capability[0] + gpu.capability[1]
                theirs = any(
                    torch.cuda._code_compatible_with_device(number, code) for code in compiled
                )
                assert theirs == engine.runs_on(gpu.capability)


@pytest.mark.parametrize(
    ("machine", "lora", "qlora", "words"),
    [
        ("Standard_NC6", False, False, "no build of torch"),  # K80
        ("Standard_NV6", True, False, "bitsandbytes"),  # M60
        ("Standard_NC6s_v2", True, True, "cu126"),  # P100
        ("Standard_NC4as_T4_v3", True, True, "float16"),
        ("p5.48xlarge", True, True, "bfloat16"),
        ("Standard_NG32ads_V620_v1", False, False, "no CUDA"),
        ("trn1.32xlarge", False, False, "no CUDA"),
    ],
)
def test_what_runs_where(machine: str, lora: bool, qlora: bool, words: str) -> None:
    """Cards without CUDA, without a build or without 4-bit kernels are refused with a reason."""
    gpu = presets.instance(machine).gpu

    assert lora == presets.gpu_support(gpu, "lora").supported
    assert qlora == presets.gpu_support(gpu, "qlora").supported
    assert words in presets.gpu_support(gpu, "qlora").reason


# --- tables and page ------------------------------------------------------------------------------


def test_a_slip_in_a_table_is_told_in_full() -> None:
    """Every unknown, missing and mistyped key of a record, with its place."""
    with pytest.raises(SpecError) as caught:
        load.record(
            {"gpu": 1, "gpuz": 2, "on": 1},
            where="x.yaml: a",
            required={"gpu": str, "gpus": int},
            optional={"on": bool},
        )

    assert {"x.yaml: a.gpu", "x.yaml: a.gpus", "x.yaml: a.gpuz", "x.yaml: a.on"} == {
        problem.where for problem in caught.value.problems
    }


def test_tables_are_found_in_a_wheel_and_in_a_checkout(tmp_path: Path) -> None:
    """A wheel has `configs` inside the package, a checkout beside it."""
    package = tmp_path / "tuning"
    package.mkdir()

    assert tmp_path / "configs" == load.configs_folder(package)
    (package / "configs").mkdir()
    assert package / "configs" == load.configs_folder(package)
    assert (presets.CONFIGS / "architectures.yaml").is_file()


def test_asking_for_a_preset_loads_no_heavy_library() -> None:
    """No torch, no transformers, no pydantic."""
    code = (
        "import sys; from tuning import presets;"
        "presets.find('phi-4'); presets.instance('p4d.24xlarge');"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "[]" == done.stdout.strip()


def test_values_are_frozen() -> None:
    """Cached rows are shared, so nobody may change one."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        presets.find("phi-4").name = "x"


def test_bitsandbytes_packs_from_the_capability_that_its_package_names() -> None:
    """Its own table of accelerators: 4-bit from compute capability 6.0 on."""
    text = str(importlib.metadata.metadata("bitsandbytes").get_payload())

    assert min(engine.four_bit for engine in presets.engines()) == (6, 0)
    assert "SM60+ minimum" in text
