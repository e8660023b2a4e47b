"""What the plan says of offload, some layers recomputed and tiled MLPs, against the real code.

The formula of offload comes from a step that keeps layer inputs on the GPU, that of some layers
from steps that recompute none and all of them; the simulation runs what a training runs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import transformers

from tuning.plan import memory
from tuning.plan.activations import HELD, INPUTS, OFFLOADED, TILED, Activations, on_host
from tuning.plan.coefficients import Coefficients, Variant
from tuning.presets import facts
from tuning.training.simulate import Point, Stage, coefficients
from tuning.training.simulate.step import Trace

LAYERS, HIDDEN, RANK = 5, 512, 16
SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 1792,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": LAYERS,
    "vocab_size": 512,
}
LLAMA = transformers.LlamaConfig(**SHAPE)
USUAL = Variant("qlora", fused=True)
WITHOUT = replace(USUAL, checkpointing=False)


@cache
def found() -> Coefficients:
    return coefficients(LLAMA, variants=(USUAL, WITHOUT, replace(USUAL, tiled=True)))


def said(tokens: int, kept: Activations) -> memory.MemoryEstimate:
    return memory.predict(
        found(),
        method="qlora",
        rank=RANK,
        tokens=tokens,
        checkpointing=kept.checkpointing,
        offload=kept.offload,
        tiled=kept.tiled,
        fused=True,
        facts=facts(LLAMA.to_dict() | {"architectures": ["LlamaForCausalLM"]}),
    )


def simulated(tokens: int, kept: Activations) -> Trace:
    return Stage(LLAMA, variant=USUAL, rank=RANK, kept=kept).run(Point(1, tokens, RANK))


@pytest.mark.parametrize("kept", [INPUTS, OFFLOADED, TILED], ids=lambda kept: kept.text)
def test_a_step_takes_what_is_said(kept: Activations) -> None:
    """Less by 1 % at most, where slack is 3 %; more by two inputs of a layer at most."""
    tokens = 6144
    trace, estimate = simulated(tokens, kept), said(tokens, kept)

    one = tokens * HIDDEN * 2
    step = estimate.step - memory.WORKSPACE_BYTES
    assert 0.99 * trace.peak <= step <= 1.02 * trace.peak + 2 * one * kept.offload
    assert trace.host == (one,) * ((LAYERS - 1) * kept.offload)  # embeddings stay
    assert estimate.host == kept.offload * on_host(LAYERS, tokens, HIDDEN, 2) >= sum(trace.host)


def test_offload_leaves_few_inputs_on_the_gpu() -> None:
    """As many as the formula says, where those of all layers would be highest."""
    tokens = 6144
    inputs, offloaded = (simulated(tokens, kept) for kept in (INPUTS, OFFLOADED))
    (most, less) = (int(trace.forward.bytes.sum(1).max()) for trace in (inputs, offloaded))
    gone = (most - less) / (tokens * HIDDEN * 2)

    assert LAYERS - HELD <= gone <= LAYERS


@pytest.mark.parametrize("recomputed", [1, 3])
def test_some_layers_recomputed_lie_between_none_and_all(recomputed: int) -> None:
    """Above what is simulated, by no more than the activations of one layer."""
    tokens = 6144
    most, least = (simulated(tokens, Activations(c)).peak for c in (False, True))
    between = simulated(tokens, Activations(True, recomputed)).peak
    estimate = said(tokens, INPUTS).towards(said(tokens, Activations()), 1 - recomputed / LAYERS)
    step = estimate.step - memory.WORKSPACE_BYTES

    assert least < between < most
    assert 0.998 * between <= step <= between + 1.05 * (most - least) / (LAYERS - 1)
