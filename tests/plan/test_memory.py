"""The ledger: memory and time of a step by arithmetic over committed coefficients."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from tuning import presets
from tuning.plan import memory
from tuning.plan.coefficients import (
    SIZES,
    Coefficients,
    Moment,
    Variant,
    from_json,
    preset_coefficients,
    to_json,
)
from tuning.plan.memory import MemoryEstimate
from tuning.plan.sharding import Layout
from tuning.plan.speed import operations_per_token, seconds_per_token

GIB = 2**30
SIMULATED = [preset for preset in presets.all() if preset_coefficients(preset.name)]
MISTRAL = "mistral-7b"


def known(name: str) -> Coefficients:
    coefficients = preset_coefficients(name)
    assert coefficients is not None
    return coefficients


def predict(name: str, **options: Any) -> MemoryEstimate:
    chosen = {"method": "lora", "rank": 16, "tokens": 2048, "checkpointing": True} | options
    return memory.predict(known(name), **chosen)


def form(**sizes: float) -> tuple[float, ...]:
    return tuple(sizes.get(size, 0.0) for size in SIZES)


# What another program, with stand-ins of its own, found for these shapes: GiB of frozen weights, of
# adapters with optimizer, of the step, and the peak without CUDA's own and cuBLAS's.
@pytest.mark.parametrize(
    ("name", "method", "rank", "tokens", "checkpointing", "frozen", "trained", "step", "peak"),
    [
        ("phi-3-mini-4k-instruct", "lora", 16, 2048, True, 7.12, 0.28, 0.81, 8.21),
        ("phi-3-mini-4k-instruct", "lora", 16, 2048, False, 7.12, 0.28, 9.10, 16.50),
        ("phi-3-mini-4k-instruct", "qlora", 16, 2048, True, 2.11, 0.28, 0.81, 3.20),
        ("phi-3-mini-4k-instruct", "qlora", 16, 2048, False, 2.11, 0.28, 9.10, 11.49),
        ("phi-3-mini-4k-instruct", "qlora", 16, 8192, True, 2.11, 0.28, 3.23, 5.62),
        ("phi-3-mini-4k-instruct", "qlora", 16, 16384, True, 2.11, 0.28, 6.45, 8.84),
        ("mistral-7b", "lora", 16, 2048, True, 13.50, 0.47, 1.16, 15.12),
        ("mistral-7b", "lora", 16, 2048, False, 13.50, 0.47, 13.59, 27.55),
        ("mistral-7b", "qlora", 16, 2048, True, 3.84, 0.47, 1.16, 5.47),
        ("mistral-7b", "qlora", 16, 2048, False, 3.84, 0.47, 13.59, 17.90),
        ("llama-3.1-8b-instruct", "lora", 16, 2048, True, 14.96, 0.47, 1.16, 16.59),
        ("llama-3.1-8b-instruct", "lora", 16, 2048, False, 14.96, 0.47, 13.59, 29.02),
        ("llama-3.1-8b-instruct", "lora", 16, 8192, True, 14.96, 0.47, 4.63, 20.06),
        ("llama-3.1-8b-instruct", "lora", 16, 8192, False, 14.96, 0.47, 54.14, 69.56),
        ("llama-3.1-8b-instruct", "qlora", 16, 2048, True, 5.31, 0.47, 1.16, 6.94),
        ("llama-3.1-8b-instruct", "qlora", 64, 8192, True, 5.31, 1.88, 4.65, 11.83),
        ("llama-3.1-8b-instruct", "qlora", 16, 32768, True, 5.31, 0.47, 18.53, 24.31),
        ("llama-3.3-70b-instruct", "qlora", 16, 2048, True, 36.80, 2.31, 3.92, 43.04),
        ("llama-3.3-70b-instruct", "qlora", 16, 2048, False, 36.80, 2.31, 66.62, 105.73),
    ],
)
def test_agrees_with_an_independent_simulation(
    name: str,
    method: str,
    rank: int,
    tokens: int,
    checkpointing: bool,
    frozen: float,
    trained: float,
    step: float,
    peak: float,
) -> None:
    """Each share within 0.02 GiB or 0.2 %, of a table made by other code than ours."""
    found = predict(name, method=method, rank=rank, tokens=tokens, checkpointing=checkpointing)
    without = memory.WORKSPACE_BYTES
    expected = pytest.approx([frozen, trained, step, peak], rel=0.002, abs=0.02)
    assert [
        (found.weights + found.constants) / GIB,
        (found.adapters + found.optimizer) / GIB,
        (found.step - without) / GIB,
        (found.allocated - without) / GIB,
    ] == expected


ALL_BUT_K = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("method", "checkpointing", "targets", "published"),
    [("qlora", True, None, 7.4), ("lora", True, ALL_BUT_K, 16.2), ("lora", False, ALL_BUT_K, 30.3)],
)
def test_agrees_with_published_peaks(
    method: memory.Method, checkpointing: bool, targets: tuple[str, ...] | None, published: float
) -> None:
    """torchtune 0.6.1's README, Llama-3.1-8B at 2 x 2,048 tokens, rank 8: within 5 %.

    Its adapters have no 16-bit copies beside them.
    """
    found = memory.predict(
        known("llama-3.1-8b-instruct"),
        method=method,
        rank=8,
        tokens=4096,
        rows=2,
        fused=True,
        checkpointing=checkpointing,
        targets=targets,
    )
    copies = found.adapters / 3
    assert (found.allocated - copies) / GIB == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize("preset", SIMULATED, ids=lambda preset: preset.name)
def test_the_coefficients_of_a_preset_hold_its_weights(preset: presets.Preset) -> None:
    """All that were simulated, both methods; frozen bytes are those of the facts and the tower."""
    facts, packed = preset.facts, preset.facts.packed
    lora, qlora = (
        predict(preset.name, method=method, attention="sdpa", rows=2)
        for method in ("lora", "qlora")
    )
    assert lora.weights == pytest.approx(2 * (facts.parameters + facts.tower), rel=5e-4)
    assert known(preset.name).packed == packed
    assert qlora.weights + qlora.constants == pytest.approx(
        lora.weights - 2 * packed + 0.516 * packed, rel=5e-3
    )
    assert lora.adapters == qlora.adapters == 4 * 16 * facts.adapter()
    if preset.facts.packing_safe:
        assert predict(preset.name).total < predict(preset.name, checkpointing=False).total


def test_terms_add_up_and_have_names() -> None:
    """The total is the sum of its terms; torch counts all but CUDA's own and the slack."""
    found = predict(MISTRAL, method="qlora", tokens=8192)
    assert sum(found.terms.values()) == found.total
    assert found.allocated == found.total - found.context - found.slack
    assert list(found.terms) == [
        "frozen weights",
        "quantisation constants",
        "LoRA weights",
        "gradients",
        "optimizer",
        "activations",
        "loss head",
        "dequantisation buffers",
        "gathered weights",
        "gather and reduce buffers",
        "CUDA context and libraries",
        "allocator slack",
    ]
    assert found.moment == "backward of the loss and the last layer (3)"


def test_16_bit_copies_of_adapters_are_counted() -> None:
    """Where fused kernels train in 16 bits and each rank has the whole model."""
    assert predict(MISTRAL, fused=True).adapters == 1.5 * predict(MISTRAL).adapters
    dropout = predict(MISTRAL, fused=True, dropout=0.05)
    assert dropout.adapters == predict(MISTRAL).adapters


def test_the_highest_moment_wins() -> None:
    """A peak is at the moment that is highest for these sizes, which may be the optimizer's."""
    early = Moment("early", {"activations": form(tokens=10.0), "gradients": form(rank=4.0)})
    late = Moment("late", {"loss": form(tile=20.0, constant=7.0), "gradients": form(rank=8.0)})
    coefficients = Coefficients(
        layers=2,
        kept=100,
        packed=1000,
        packed_modules=1,
        buffers=0,
        adapters={"up": 30, "down": 20},
        moments={Variant(): (early, late)},
    )

    def at(tokens: int, **options: Any) -> MemoryEstimate:
        return memory.predict(
            coefficients, method="lora", rank=2, checkpointing=True, tokens=tokens, **options
        )

    few, many, none = at(100), at(100_000), at(1)
    assert (few.moment, few.loss, few.gradients) == ("late", 2007, 16)
    assert (many.moment, many.gradients) == ("early", 8)
    assert many.activations == 1_000_000 + memory.WORKSPACE_BYTES
    assert (none.moment, none.gradients) == ("optimizer step", 4 * 2 * 50)
    assert at(100, accumulating=True).gradients == 4 * 2 * 50
    assert at(100, layout=Layout(ranks=2)).gradients == 16 + 4 * 2 * 50
    assert at(100, targets=("mlp.up",)).adapters == 4 * 2 * 30
    assert few.weights == 2 * 1100


@pytest.mark.parametrize(
    ("optimizer", "share"),
    [("adamw_torch_fused", 2.0), ("sgd", 0.0), ("lion_32bit", 1.0), ("adamw_8bit", 0.507812)],
)
def test_optimizer_states(optimizer: str, share: float) -> None:
    """Bytes of state for each byte of fp32 adapters."""
    found = predict(MISTRAL, optimizer=optimizer)
    assert found.optimizer / found.adapters == pytest.approx(share, rel=1e-4)


def test_single_quantisation_takes_more() -> None:
    """Without a second level the constants are 4 bytes for 64 weights."""
    single = predict(MISTRAL, method="qlora", double_quant=False)
    double = predict(MISTRAL, method="qlora")
    packed = known(MISTRAL).packed
    assert single.constants == pytest.approx(packed / 16, rel=1e-3)
    assert double.constants == pytest.approx(packed * (1 / 64 + 4 / 16384), rel=2e-2)
    assert single.weights == double.weights


@pytest.mark.parametrize("preset", SIMULATED, ids=lambda preset: preset.name)
def test_a_repacked_weight_is_bounded(preset: presets.Preset) -> None:
    """The largest matrix of any preset, head included, is within the bound, in 16 bits."""
    facts = preset.facts
    matrices = [x.inputs * x.outputs for x in facts.linears] + [facts.vocab * facts.hidden]

    assert 2 * max(matrices) <= memory.repacked(known(preset.name))


def test_only_a_processor_that_repacks_takes_more() -> None:
    """The copy is counted with the libraries, and with nothing else."""
    plain = predict(MISTRAL)
    with_copy = predict(MISTRAL, repacks=True)

    assert memory.repacked(known(MISTRAL)) == with_copy.context - plain.context
    assert plain == replace(with_copy, context=plain.context)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_half_precision_takes_what_bfloat16_takes(method: memory.Method) -> None:
    """Adapters are float32 in both, and products 16 bits wide."""
    half = predict(MISTRAL, method=method, precision="float16")
    assert half == predict(MISTRAL, method=method)


def test_what_was_not_simulated_is_unknown() -> None:
    """No guess for a variant without coefficients, and None for a preset without a file."""
    with pytest.raises(memory.Unknown, match="attention='eager'"):
        predict(MISTRAL, attention="eager")
    assert preset_coefficients("qwen3.5-122b-a10b") is None  # whose file holds its facts only
    assert preset_coefficients("no-such-preset") is None


def test_coefficients_survive_json() -> None:
    """to_json and from_json are each other's inverse, through text."""
    coefficients = known(MISTRAL)
    text = json.dumps(to_json(coefficients))
    assert from_json(json.loads(text)) == coefficients


def test_planning_loads_no_torch() -> None:
    """The closed formula needs no torch, no numpy, no transformers."""
    program = (
        "import sys; from tuning.plan import coefficients, memory;"
        "coefficients.preset_coefficients('mistral-7b');"
        "print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout == "set()\n"


# NVIDIA-like numbers of the roofline's source: tokens/s of one H200 at 2k, packed.
@pytest.mark.parametrize(
    ("name", "checkpointing", "length", "rate"),
    [
        ("llama-3.1-8b-instruct", False, 2048, 14_500),
        ("llama-3.1-8b-instruct", True, 2048, 10_300),
        ("phi-3-mini-128k-instruct", False, 2048, 24_600),
        ("phi-3-mini-128k-instruct", True, 2048, 17_500),
    ],
)
def test_time_is_near_the_model_it_is_made_after(
    name: str, checkpointing: bool, length: int, rate: int
) -> None:
    """Within 10 %, and below: ours also counts that eager operators miss the full bandwidth."""
    preset = presets.find(name)
    assert preset is not None
    seconds = seconds_per_token(
        preset.facts,
        presets.gpu("H200-SXM5"),
        method="lora",
        checkpointing=checkpointing,
        tokens=8192,
        effective_length=length,
    )
    assert seconds is not None
    assert 0.9 * rate < 1 / seconds < rate


def test_time_follows_the_card_and_the_work() -> None:
    """More work is slower, a faster card faster, a small micro-batch waits for the host."""
    preset = presets.find("llama-3.1-8b-instruct")
    assert preset is not None

    def at(gpu: str | None = "A100-SXM4-80GB", **options: Any) -> float | None:
        chosen: dict[str, Any] = {
            "method": "lora",
            "checkpointing": False,
            "tokens": 8192,
            "effective_length": 2048,
        }
        card = presets.gpu(gpu) if gpu else None
        return seconds_per_token(preset.facts, card, **(chosen | options))

    base = at()
    assert base is not None
    for slower in (
        at("L4"),
        at(method="qlora"),
        at(checkpointing=True),
        at(effective_length=8192),
        at(attention="sdpa"),
        at(tokens=64),
    ):
        assert slower is not None
        assert slower > base
    assert at("V100-PCIE-16GB") is None  # no bfloat16
    assert at("V100-PCIE-16GB", precision="float16") is not None
    assert at(None) is None
    assert at(precision="float32") is None


def test_operations_per_token() -> None:
    """4N + 6 N_lora + 6 S h L: 31.88 GFLOP for Llama 3.1 8B at 2k tokens, rank 16."""
    preset = presets.find("llama-3.1-8b-instruct")
    assert preset is not None
    found = operations_per_token(preset.facts, effective_length=2048)
    assert found / 1e9 == pytest.approx(31.88, abs=0.01)


@pytest.mark.parametrize(
    ("mixture", "less", "more"),
    [  # dense models of about as many numbers as a token of the mixture meets
        ("qwen3-30b-a3b", "qwen3-1.7b", "qwen3-4b"),
        ("qwen3-235b-a22b-instruct-2507", "qwen3-14b", "qwen3-32b"),
        ("mixtral-8x7b-instruct", "mistral-7b", "qwen3-32b"),
        ("gpt-oss-120b", "qwen3-4b", "qwen3-8b"),
    ],
)
def test_a_mixture_is_as_fast_as_the_part_that_a_token_passes_through(
    mixture: str, less: str, more: str
) -> None:
    """Not as slow as its size; but in 4 bits every expert is unpacked for a micro-batch."""
    facts = {name: presets.find(name).facts for name in (mixture, less, more)}
    operations = {n: operations_per_token(f, effective_length=2048) for n, f in facts.items()}
    assert operations[less] < operations[mixture] < operations[more]

    def unpacking(name: str) -> float:
        card, options = presets.gpu("H200-SXM5"), {"checkpointing": False, "tokens": 4096}
        both = [
            seconds_per_token(facts[name], card, method=m, effective_length=2048, **options)
            for m in ("lora", "qlora")
        ]
        return both[1] - both[0]

    size = facts[mixture].packed / facts[more].packed
    assert unpacking(mixture) == pytest.approx(size * unpacking(more), rel=0.01)
