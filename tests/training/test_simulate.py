"""The simulation against real steps, and the closed formula against the simulation."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from tuning import files
from tuning.models.kernels import fuse, head
from tuning.models.load import load_base
from tuning.models.survey import survey
from tuning.plan import memory
from tuning.plan.backends import FUSED
from tuning.plan.coefficients import (
    SIZES,
    Variant,
    from_json,
    measures,
    preset_coefficients,
)
from tuning.presets import CONFIGS
from tuning.training.simulate import Point, Stage, child, coefficients, moments
from tuning.training.simulate.__main__ import configs, main
from tuning.training.simulate.count import count
from tuning.training.simulate.fit import uniform
from tuning.training.simulate.step import DTYPES, build

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "vocab_size": 512,
}
WIDE = SHAPE | {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 2}
LLAMA = transformers.LlamaConfig(num_key_value_heads=4, **SHAPE)
PHI3 = transformers.Phi3Config(num_key_value_heads=8, pad_token_id=0, **SHAPE)
QWEN2 = transformers.Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **SHAPE)
FALCON = transformers.FalconConfig(
    **{k: v for k, v in SHAPE.items() if k != "intermediate_size"},
    multi_query=True,
    new_decoder_architecture=False,
    parallel_attn=True,
    bias=False,
    alibi=False,
)
GEMMA3 = transformers.Gemma3TextConfig(
    num_key_value_heads=4, head_dim=64, query_pre_attn_scalar=64, sliding_window=64, **SHAPE
)
CPU = Variant(attention="sdpa", device="cpu")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """One thread, no garbage collection of an earlier test's tensors in the middle of a trace."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Reality.


@dataclass
class Real:
    """A real model with real tensors and real bitsandbytes layers, and its steps."""

    tuned: Any
    variant: Variant

    def step(self, inputs: dict[str, torch.Tensor]) -> None:
        dtype = DTYPES[self.variant.precision]
        plain = dtype == torch.float32
        rest = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        with contextlib.nullcontext() if plain else torch.autocast("cpu", dtype):
            if self.variant.fused:
                loss = self.tuned(**rest, scored=inputs["labels"])
            else:
                loss = self.tuned(**inputs, fused_lm_head=True).loss
        loss.backward()

    def forget(self) -> None:
        for parameter in self.tuned.parameters():
            parameter.grad = None

    def peak(self, point: Point) -> int:
        """Highest sum of torch's own allocator events over a step, in bytes above its start.

        On a busy machine the profiler may lose events of a step: the highest of three counts.
        """
        ids = torch.randint(0, 500, (point.rows, point.length))
        mask = torch.ones_like(ids)
        mask[-1, -3:] = 0
        inputs = {"input_ids": ids, "labels": ids.clone(), "attention_mask": mask}
        self.step(inputs)  # the first step makes caches that stay
        self.forget()
        return max(self.traced(inputs) for _ in range(3))

    def traced(self, inputs: dict[str, torch.Tensor]) -> int:
        """The highest sum that one trace of a step shows."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            self.step(inputs)
        self.forget()
        events = profile.profiler.kineto_results.events()
        now = highest = 0
        for _, change in sorted(
            (e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"
        ):
            now += change
            highest = max(highest, now)
        return highest


def real(config: Any, variant: Variant, folder: Path, *, rank: int) -> Real:
    """The model of `config` as training loads it: saved, loaded (and packed), adapted."""
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    auto.from_config(config, dtype=DTYPES[variant.precision]).save_pretrained(folder)
    packing = {"type": "nf4", "double": True, "compute": variant.precision}
    base = load_base(
        folder,
        precision=variant.precision,
        quantisation=packing if variant.method == "qlora" else None,
        device="cpu",
        attention=variant.attention,
    )
    base.requires_grad_(False)
    options = LoraConfig(
        r=rank,
        lora_dropout=0.05 if variant.dropout else 0.0,
        target_modules=list(survey(base).linears),
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(base, options)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if variant.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        tuned.enable_input_require_grads()
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    head.install(base)
    if variant.fused:
        fuse.fuse(tuned, FUSED)
    return Real(tuned.train(), variant)


REALITIES = (
    [
        (config, replace(CPU, method=method, checkpointing=checkpointing))
        for config in (LLAMA, PHI3, QWEN2)
        for method in ("lora", "qlora")
        for checkpointing in (True, False)
    ]
    + [
        (FALCON, replace(CPU, checkpointing=False)),
        (FALCON, replace(CPU, method="qlora", checkpointing=False)),
        (GEMMA3, replace(CPU, method="qlora", checkpointing=False)),
        (LLAMA, replace(CPU, checkpointing=False, attention="eager")),
    ]
    + [
        (config, replace(CPU, method=method, checkpointing=checkpointing, fused=True))
        for config in (LLAMA, PHI3, GEMMA3)
        for method in ("lora", "qlora")
        for checkpointing in (True, False)
    ]
    + [
        (PHI3, replace(CPU, checkpointing=False, dropout=True, fused=True)),
        (LLAMA, replace(CPU, checkpointing=False, precision="float32")),
        (LLAMA, replace(CPU, method="qlora", checkpointing=False, precision="float16")),
        (PHI3, replace(CPU, checkpointing=False, dropout=True)),
        (transformers.LlamaConfig(num_key_value_heads=4, **WIDE), CPU),
        (transformers.LlamaConfig(num_key_value_heads=4, **WIDE), replace(CPU, method="qlora")),
    ]
)


def repacked(model: torch.nn.Module, variant: Variant) -> int:
    """Bytes of the largest weight in 16 bits, in whole AMX tiles: what oneDNN copies for a call."""
    shapes = [
        (module.in_features, module.out_features)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    tiles = [-(-inputs // 64) * 64 * (-(-outputs // 64) * 64) for inputs, outputs in shapes]
    return 0 if variant.precision == "float32" else 2 * max(tiles)


def reality(config: Any, variant: Variant) -> Any:
    """One case; those that others nearly repeat take minutes and are slow tests."""
    v = variant
    name = (
        f"{config.model_type}-{config.hidden_size}-{v.method}-{v.precision}-{v.attention}"
        f"-{'checkpointing' if v.checkpointing else 'plain'}{'-dropout' * v.dropout}"
        f"{'-fused' * v.fused}"
    )
    return pytest.param(config, variant, id=name, marks=() if name in QUICK_STEPS else SLOW)


SLOW = pytest.mark.slow
QUICK_STEPS = (
    "phi3-512-qlora-bfloat16-sdpa-checkpointing-fused",
    "gemma3_text-512-qlora-bfloat16-sdpa-plain",
)


@pytest.mark.parametrize(("config", "variant"), [reality(*each) for each in REALITIES])
def test_a_real_step_takes_what_was_simulated(
    config: Any, variant: Variant, tmp_path: Path
) -> None:
    """Within 3 % of torch's own record of a step with real tensors, loss and 4-bit layers.

    On a processor with AMX the CPU library may hold one weight in a layout of its own besides.
    """
    short = variant.precision != "float32"  # 16 bits are slow on many processors
    point = Point(rows=2, length=48 if short else 128, rank=16)
    loaded = real(config, variant, tmp_path, rank=16)
    taken = loaded.peak(point)
    simulated = Stage(config, variant=variant, rank=16).run(point).peak
    assert 0.97 * simulated <= taken <= 1.03 * simulated + repacked(loaded.tuned, variant)


# Formula against simulation.


def deep(name: str, layers: int | None) -> dict[str, Any]:
    """The config of a preset, if asked for cut to a depth that a test can run whole."""
    config: dict[str, Any] = json.loads(json.dumps(configs()[name]))
    if layers is not None:
        config.get("text_config", config)["num_hidden_layers"] = layers
    return config


def assert_agrees(
    config: dict[str, Any], variant: Variant, *, points: int, seed: int, within: float = 0.02
) -> None:
    """At random points of `variant`, what the formula says of a step is that close."""
    found = coefficients(config, variants=[variant])
    draw = random.Random(seed)
    stages = {rank: Stage(config, variant=variant, rank=rank) for rank in (8, 64)}
    longest = 4096 if variant.device == "cuda" else 1024
    for _ in range(points):
        rank = draw.choice(sorted(stages))
        point = Point(draw.choice((1, 2, 3, 8)), draw.randint(128, longest), rank)
        if variant.device == "cpu":  # beyond one tile an upper bound, by design
            point = replace(point, rows=min(point.rows, 4))
        step = stages[rank].run(point).peak
        options: dict[str, Any] = {
            "method": variant.method,
            "precision": variant.precision,
            "checkpointing": variant.checkpointing,
            "attention": variant.attention,
            "device": variant.device,
            "dropout": 0.05 if variant.dropout else 0.0,
            "fused": variant.fused,
        }
        predicted = memory.predict(
            found, tokens=point.tokens, rows=point.rows, rank=rank, **options
        )
        said = predicted.step - (memory.WORKSPACE_BYTES if variant.device == "cuda" else 0)
        assert said == pytest.approx(step, rel=within), (variant, point)


QUICK = [
    ("mistral-7b", Variant(fused=True)),
    ("phi-3-mini-4k-instruct", Variant(method="qlora", checkpointing=False, fused=True)),
    ("phi-2", Variant(method="qlora", checkpointing=False)),
    ("gemma-3-4b-instruct", Variant(method="qlora", dropout=True)),
    ("phi-4-mini-instruct", Variant(method="qlora", precision="float16", attention="sdpa")),
    ("falcon-7b", Variant(attention="sdpa", checkpointing=False)),
    ("phi-3-mini-4k-instruct", Variant(attention="sdpa", device="cpu")),
    ("mistral-7b", Variant()),
]


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(n, v, id=f"{n}-{v.method}{'-fused' * v.fused}", marks=SLOW if k > 2 else ())
        for k, (n, v) in enumerate(QUICK)
    ],
)
def test_formula_agrees_with_simulation(name: str, variant: Variant) -> None:
    """The closed formula, from two and three layers, foretells four, at sizes it has not seen."""
    assert_agrees(deep(name, 4), variant, points=3, seed=1)


SHAPES = ("mistral-7b", "phi-3-mini-4k-instruct", "gemma-3-4b-instruct", "falcon-7b", "phi-2")


@pytest.mark.slow
def test_layers_are_foretold_to_any_depth() -> None:
    """Two and three layers foretell 32: what is off by a little a layer would show here."""
    variant = Variant(method="qlora", checkpointing=False)
    assert_agrees(deep("phi-2", None), variant, points=2, seed=3, within=0.002)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-3.3-70b-instruct", "gemma-3-27b-instruct", "falcon-40b"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_deepest_models_agree_too(name: str, checkpointing: bool) -> None:
    """Sixty to eighty layers, run whole."""
    variant = Variant(method="qlora", attention="sdpa", checkpointing=checkpointing)
    assert_agrees(deep(name, None), variant, points=3, seed=4, within=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(
    ("method", "precision", "attention"),
    [
        ("lora", "bfloat16", "varlen"),
        ("qlora", "bfloat16", "varlen"),
        ("lora", "bfloat16", "sdpa"),
        ("qlora", "float16", "sdpa"),
    ],
)
def test_formula_agrees_with_simulation_everywhere(
    name: str, method: Any, precision: Any, attention: Any, dropout: bool, checkpointing: bool
) -> None:
    """The same over 400 points less Falcon's packed ones: every variant, five families."""
    if name == "falcon-7b" and attention == "varlen":
        pytest.skip("Falcon cannot be packed")
    variant = Variant(method, precision, attention, checkpointing, dropout)
    assert_agrees(deep(name, 5), variant, points=5, seed=2)


def test_a_class_with_eager_attention_only_is_simulated_with_it() -> None:
    """By the names that a plan asks for: as its scores of all pairs take memory, not as sdpa's."""
    text = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "num_local_experts": 4}
    config = configs()["gpt-oss-20b"] | text
    asked = Variant(attention="sdpa")

    found = child.simulate(config, [asked], child.judge(config)[0])

    assert {"sdpa"} == {variant.attention for variant in found.moments}
    pairs = SIZES.index("pairs")
    scores = [form[pairs] for m in found.moments[asked] for form in m.bytes.values()]
    assert max(scores) >= 2 * 2 * 64  # of 64 heads, before and after their softmax
    stored = preset_coefficients("gpt-oss-120b")
    assert stored and {"sdpa"} == {variant.attention for variant in stored.moments}


def test_layers_that_differ_are_all_run() -> None:
    """A model with one dense layer among layers of experts is not foretold from its first two."""
    shape = {
        **SHAPE,
        "head_dim": 64,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 128,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    mixed = transformers.Qwen3MoeConfig(**shape, mlp_only_layers=[3], decoder_sparse_step=1)
    assert not uniform(build(mixed, variant=Variant(attention="eager")))
    assert uniform(build(LLAMA, variant=Variant(attention="eager")))
    variant = Variant(checkpointing=False)
    whole = moments(LLAMA, variant=variant, uniform=False)
    foretold = moments(LLAMA, variant=variant, uniform=True)
    sizes = measures(tokens=3000, rows=1, rank=16)
    peaks = [max(sum(m.at(sizes).values()) for m in found) for found in (whole, foretold)]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


MIXTURES = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 256},
    "mixtral": {"num_local_experts": 8},
    "granitemoehybrid": {"num_local_experts": 8, "layer_types": ["attention"] * 4},
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_packed_and_adapted_like_linear_layers(kind: str) -> None:
    """Kept in 16 bits are embeddings, norms and routers; the counts are those of the facts."""
    config = {"model_type": kind, **SHAPE, "num_experts_per_tok": 2, **MIXTURES[kind]}
    facts = count(config)
    found = coefficients(config, variants=[])

    assert (found.packed, found.kept + found.packed) == (facts.packed, facts.parameters)
    assert sum(found.adapters.values()) == facts.adapter()
    assert found.kept < 1.1 * 2 * facts.vocab * facts.hidden
    weights, _ = memory.weight_bytes(found, method="qlora", precision="bfloat16")
    assert weights == pytest.approx(facts.packed / 2 + 2 * found.kept, rel=0.01)


def test_layers_that_a_base_leaves_in_16_bits_are_counted() -> None:
    """Of one that is published in 4 bits; what is packed is what transformers would pack."""
    shape = LLAMA.to_dict()
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    skipped = {"llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]}

    whole, mixed = (
        coefficients(shape | {"quantization_config": each}, variants=())
        for each in (said, said | skipped)
    )

    layer = 3 * LLAMA.hidden_size * LLAMA.intermediate_size
    assert (whole.packed - layer, whole.kept + layer) == (mixed.packed, mixed.kept)
    assert whole.packed_modules - 3 == mixed.packed_modules


def test_any_config_will_do() -> None:
    """A parsed config.json and a transformers config of the same model have equal coefficients."""
    variants = [Variant()]
    assert coefficients(LLAMA.to_dict(), variants=variants) == coefficients(
        LLAMA, variants=variants
    )


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param("mistral-7b", Variant(), marks=SLOW),
        ("mistral-7b", Variant(method="qlora", fused=True)),
        ("falcon-7b", Variant(method="qlora", attention="sdpa", checkpointing=False)),
    ],
)
def test_committed_coefficients_are_what_comes_out(name: str, variant: Variant) -> None:
    """`python -m tuning.training.simulate --write` would write these numbers again."""
    committed = preset_coefficients(name)
    assert committed is not None
    made = coefficients(configs()[name], variants=[variant])
    assert made == replace(committed, moments={v: committed.moments[v] for v in made.moments})


def test_files_match_the_presets() -> None:
    """One file for each preset, no other; those that were simulated with the sizes of today."""
    found = {path.stem for path in (CONFIGS / "memory").glob("*.json")}
    assert found == set(configs())
    simulated = {name: known for name in found if (known := preset_coefficients(name))}
    assert len(simulated) > 30
    for coefficients_ in simulated.values():
        for shares in coefficients_.moments.values():
            assert all(len(form) == len(SIZES) for m in shares for form in m.bytes.values())


def test_what_is_known_of_a_preset_is_what_its_class_says_today() -> None:
    """Verdict and facts, of one preset of each class: another transformers may say otherwise."""
    one_of_each = {config["model_type"]: name for name, config in configs().items()}

    assert main(["--check", "--quick", *one_of_each.values()]) == 0


def test_a_preset_of_yesterday_is_found_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that says otherwise is named, written again, and keeps its coefficients."""
    monkeypatch.setattr("tuning.training.simulate.__main__.FOLDER", tmp_path)
    path = tmp_path / "mixtral-8x7b-instruct.json"
    record = files.read_json(CONFIGS / "memory" / path.name)
    record["facts"]["parameters"] += 1
    files.write_json(path, record | {"moments": [{"as": "before"}]})

    assert main(["--check", "--quick", path.stem]) == 1
    assert main(["--write", "--quick", path.stem]) == 0
    assert main(["--check", "--quick", path.stem]) == 0
    written = files.read_json(path)
    assert written["facts"]["parameters"] == 46_702_792_704
    assert written["moments"] == [{"as": "before"}]


def test_a_folder_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tuning.training.simulate FOLDER` prints coefficients of any model's config.json."""
    monkeypatch.setattr("tuning.training.simulate.__main__.variants", lambda _: (Variant(),))
    small = transformers.LlamaConfig(**(SHAPE | {"num_hidden_layers": 2, "hidden_size": 64}))
    small.save_pretrained(tmp_path)
    assert main([str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert from_json(record).layers == 2
