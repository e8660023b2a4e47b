"""How long a token takes on a GPU: a roofline, from a model's shapes and two rates of the card.

A frozen weight of N numbers costs 2N operations forward and 2N backward, and no third pass for its
own gradient. Around the matrix products go attention, elementwise operators (bound by memory) and,
in QLoRA, unpacking. Each has one efficiency below. None of them has been measured by this project;
a run measures the rates of its card (`training.calibration`) and what it reaches in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tuning.plan.activations import TILES
from tuning.presets import Facts, Gpu

# Shares of the datasheet's rates. An H200 sustains about 790 of its 989 TFLOP/s in large bf16
# products, and the shapes of a model reach 0.9 of that: assumed alike for every card.
GEMM = 0.80 * 0.90
# FlashAttention 2 on Hopper is reported at 330 of 989 TFLOP/s; assumed alike for every card.
ATTENTION = 330 / 989
# Of bandwidth: large copies reach 0.9 (4.3 of an H200's 4.8 TB/s); eager operators 0.7 to 0.85 of
# that.
COPY = 0.90
HOST_LINK = 12e9  # bytes a second between a GPU and host memory by PCIe 3.0 x16, as copies reach it
ELEMENTWISE = 0.80  # of a copy's

# Bytes that eager transformers and peft move for each element and token, forward and backward:
# counted from their operators.
NORM_BYTES = 102  # RMSNorm in float32, an element of the hidden size
ROTARY_BYTES = 56  # an element of queries and keys
ACTIVATION_BYTES = 26  # gate, product and their gradients, an element of the MLP's width
ADAPTER_BYTES = 25  # scale, add and accumulate, an element of a projection's output
# The same with `tuning.models.kernels`: fewer passes, but the MLP's activation is computed again.
FUSED_NORM_BYTES, FUSED_ACTIVATION_BYTES, FUSED_ADAPTER_BYTES = 12, 38, 8
OFFLOAD_SHARE = (
    0.02  # of a step, for copies to host memory that share the bus; reported as 1 to 2 %
)
FORWARD_SHARE = 1 / 3  # of those bytes; checkpointing moves them again

UNPACK_BYTES = 2.56  # a packed weight and pass: half a byte and its constants in, two bytes out
# Below a few hundred tokens a card waits for the host: kernels of a layer, forward and backward,
# with or without its forward again; assumed seconds each.
KERNELS, KERNELS_AGAIN, LAUNCH = 250, 400, 6e-6
FUSED_KERNELS = 0.5  # of them


@dataclass(frozen=True)
class Rates:
    """What a card sustains, in a second."""

    products: float  # operations of matrix products of a model's shapes
    attention: float  # operations of attention, forward and backward, of what it must compute
    copied: float  # bytes read and written by a large copy

    @classmethod
    def of(cls, gpu: Gpu | None, precision: str) -> Rates | None:
        """Assumed from a card's datasheet; None for one without rates for `precision`."""
        flops = gpu and (gpu.bf16_flops if precision == "bfloat16" else gpu.fp16_flops)
        if gpu is None or not flops or gpu.bandwidth is None or precision == "float32":
            return None
        return cls(flops * GEMM, flops * ATTENTION, gpu.bandwidth * COPY)


def seconds_per_token(
    facts: Facts,
    gpu: Gpu | Rates | None,
    *,
    method: Literal["lora", "qlora"],
    checkpointing: bool,
    tokens: int,
    effective_length: float,
    offload: bool = False,
    tiled: bool = False,
    rank: int = 16,
    precision: str = "bfloat16",
    attention: str = "varlen",
    fused: bool = False,
) -> float | None:
    """Seconds of one GPU for each token of a micro-batch of `tokens` tokens, padding counted.

    `effective_length` is what a token's attention spans: sum(len^2) / sum(len) over the documents
    of packed rows with varlen attention, and the row's length with any other. `fused`: with the
    kernels of `models.kernels`. `offload`, `tiled`: see `activations`. `gpu` may be the rates that
    were measured on it. None where there is nothing to go by: no GPU, a card without a rate for
    `precision`.
    """
    rates = gpu if isinstance(gpu, Rates) else Rates.of(gpu, precision)
    if rates is None:
        return None
    products = _products(facts, rank=rank, checkpointing=checkpointing, fused=fused)
    spans = _spans(facts, effective_length) * (
        1 if attention == "varlen" else 2
    )  # masked, not left
    scores = spans * facts.queries * (9 if checkpointing else 7)
    again = 1 + (FORWARD_SHARE if checkpointing else 0.0)
    moved = _moved(facts, fused=fused) * again / ELEMENTWISE
    unpacked = 0.0
    if method == "qlora":
        passes = 3 if checkpointing else 2
        read = UNPACK_BYTES * passes * facts.packed
        if tiled:
            read += UNPACK_BYTES * passes * (TILES - 1) * _wide(facts)
        unpacked = read / tokens
    computed = products / rates.products + scores / rates.attention
    kernels = (KERNELS_AGAIN if checkpointing else KERNELS) * (FUSED_KERNELS if fused else 1.0)
    launched = facts.layers * kernels * LAUNCH / tokens
    alone = max(computed + (moved + unpacked) / rates.copied, launched)
    return alone if not offload else _copied(alone, facts)


def _copied(alone: float, facts: Facts) -> float:
    """`alone`, with each layer's input of 16 bits copied out in the forward, back in the backward.

    Each goes on while a layer computes, so the slower of both counts.
    """
    copy, forward = 2 * facts.hidden * facts.layers / HOST_LINK, alone / 3  # and twice as long back
    return max(forward, copy) + max(alone - forward, copy) + OFFLOAD_SHARE * alone


def _wide(facts: Facts) -> int:
    """Numbers of the weights of dense MLPs, which are those as wide as one."""
    wide = (facts.intermediate, 2 * facts.intermediate)
    return sum(m.elements for m in facts.matrices if m.inputs in wide or m.outputs in wide)


def operations_per_token(facts: Facts, *, effective_length: float, rank: int = 16) -> float:
    """Operations that a token needs, whatever the implementation: for shares of a card's limit."""
    weights = facts.multiplied + facts.vocab * facts.hidden
    scores = _spans(facts, effective_length) * facts.queries
    return 4 * weights + 6 * rank * _adapters(facts) + 6 * scores


def _adapters(facts: Facts) -> int:
    """Numbers of the adapters that a token is multiplied with, for a unit of rank."""
    return sum((x.inputs + x.outputs) * x.layers * x.used for x in facts.matrices)


def _products(facts: Facts, *, rank: int, checkpointing: bool, fused: bool) -> float:
    """Operations of the matrix products; trl's loss makes its logits twice, so the head costs 6."""
    body, adapters = facts.multiplied, rank * _adapters(facts)
    head = facts.vocab * facts.hidden
    again = 2 * (body + adapters) if checkpointing else 0
    return 4 * body + 6 * adapters + (4 if fused else 6) * head + again


def _spans(facts: Facts, length: float) -> float:
    """Sum over the layers of the tokens that attention spans: a window where there is one."""
    windowed = min(length, facts.window or length) * facts.windowed_layers
    return windowed + length * (facts.attending - facts.windowed_layers)


def _moved(facts: Facts, *, fused: bool) -> float:
    """Bytes of the elementwise operators for each token."""
    norm, activation, adapter = (
        (FUSED_NORM_BYTES, FUSED_ACTIVATION_BYTES, FUSED_ADAPTER_BYTES)
        if fused
        else (NORM_BYTES, ACTIVATION_BYTES, ADAPTER_BYTES)
    )
    outputs = sum(x.outputs * x.layers * x.used for x in facts.matrices)
    layer = (
        norm * facts.norms * facts.hidden
        + ROTARY_BYTES * facts.rotary * (facts.queries + facts.keys)
        + activation * facts.intermediate
    )
    return facts.layers * layer + adapter * outputs
