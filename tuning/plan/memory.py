"""Memory estimate of a training step, by arithmetic: no torch, no weights.

A simulation (`training.simulate`) has run a step of the real model class and kept the moments at
which its memory can be highest. At each, the bytes of every kind are linear in the sizes of the
step (tokens, rank, ...), so that

    peak = resident bytes + max over moments of (sum over sizes of coefficient x size)

Resident bytes (weights, adapters, optimizer) are counted exactly. Ranks that share one copy hold a
part of each, and at a moment the whole of what is computed with (`sharding`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Literal

from tuning.plan.activations import off_device, on_host
from tuning.plan.coefficients import (
    KINDS,
    SIZES,
    Attention,
    Coefficients,
    Method,
    Precision,
    Variant,
    measures,
)
from tuning.plan.sharding import ALONE, Layout, share
from tuning.presets import Facts

BLOCK = 512  # bytes that the allocator rounds up to
QUANT_BLOCK, QUANT_GROUP = 64, 256  # weights a constant, constants a constant of the second level

# Outside of the tensors that the simulation sees. Estimates; not measured for this project yet
# (`benchmarks/gpu_plan.py` does).
CONTEXT_BYTES = 640 << 20  # CUDA context and loaded kernels, as nvidia-smi sees them
# cuBLAS, inside torch's allocator: Hopper's default, once for the forward's thread and once for the
# backward's
WORKSPACE_BYTES = 2 * 32 << 20
NCCL_BYTES = 512 << 20  # channels and buffers of a group of several GPUs, on each of them
SLACK = 0.03  # of a step's allocations: fragmentation is reported as 1 to 3 %
PROCESS_BYTES = 1 << 30  # on a CPU: the interpreter with torch, transformers and trl imported


class Unknown(LookupError):
    """There are no coefficients for the requested variant."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the highest moment of a step, by purpose."""

    weights: int
    constants: int  # of the 4-bit blocks
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    dequantisation: int
    context: int
    slack: int
    moment: str  # of the peak
    gathered: int = 0  # whole layers, and the output layer, of a shared copy
    buffers: int = 0  # what FSDP2 gathers and reduces in
    host: int = 0  # of this rank in host memory: its shares, and layer inputs

    @property
    def terms(self) -> dict[str, int]:
        """Label for people -> bytes, in the order of the fields."""
        return {label: getattr(self, name) for name, label in _LABELS.items()}

    @property
    def total(self) -> int:
        """Bytes of the GPU, or of RAM, that the process takes at its peak."""
        return sum(self.terms.values())

    @property
    def allocated(self) -> int:
        """Bytes as `torch.cuda.max_memory_allocated` counts them."""
        return self.total - self.context - self.slack

    def towards(self, other: MemoryEstimate, share: float) -> MemoryEstimate:
        """What lies that `share` of the way to `other`, at its moment."""
        names = (field.name for field in fields(self) if field.name != "moment")
        ends = {name: (getattr(self, name), getattr(other, name)) for name in names}
        between = {name: math.ceil(a + share * (b - a)) for name, (a, b) in ends.items()}
        return MemoryEstimate(**between, moment=other.moment)

    @property
    def step(self) -> int:
        """Bytes allocated and freed within a step."""
        return self.gradients + self.activations + self.loss + self.dequantisation


_LABELS = {
    "weights": "frozen weights",
    "constants": "quantisation constants",
    "adapters": "LoRA weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "loss": "loss head",
    "dequantisation": "dequantisation buffers",
    "gathered": "gathered weights",
    "buffers": "gather and reduce buffers",
    "context": "CUDA context and libraries",
    "slack": "allocator slack",
}


def predict(
    coefficients: Coefficients,
    *,
    method: Method,
    rank: int,
    tokens: int,
    checkpointing: bool,
    precision: Precision = "bfloat16",
    optimizer: str = "adamw_torch_fused",
    dropout: float = 0.0,
    attention: Attention = "varlen",
    rows: int = 1,
    accumulating: bool = False,
    layout: Layout = ALONE,
    facts: Facts | None = None,
    targets: Iterable[str] | None = None,
    double_quant: bool = True,
    device: Literal["cuda", "cpu"] = "cuda",
    fused: bool = False,
    repacks: bool = False,
    new_tokens: bool = False,
    tile: int | None = None,
    own_head: bool = False,
    offload: bool = False,
    tiled: bool = False,
    host_embeddings: bool = False,
) -> MemoryEstimate:
    """Memory of one process that trains micro-batches of `tokens` tokens. Raises Unknown.

    `rows` is the number of packed documents with varlen attention, else of rows of `tokens / rows`,
    padding included. `accumulating`: gradients of an earlier micro-batch are in memory. `layout`:
    how several ranks hold the model; `facts` tell what of it they can share. `fused`: with
    `models.kernels`. `repacks`: the CPU library copies 16-bit weights (see `repacked`). `tile`:
    tokens scored at once, if not the usual number. `own_head`: the model's own logits are scored.
    `offload`, `tiled`, `host_embeddings`: see `activations`. Fewer `targets` (names of
    projections) take fewer adapters, and all activations: an upper bound.
    """
    variant = _stored(
        coefficients,
        Variant(
            method,
            precision,
            attention,
            checkpointing,
            dropout > 0,
            device,
            fused=fused,
            tiled=tiled,
        ),
        rows=rows,
    )
    adapters = lora_bytes(coefficients, rank, targets)
    weights, constants = weight_bytes(
        coefficients, method=method, precision=precision, double_quant=double_quant
    )
    shared = share(
        coefficients,
        facts,
        layout,
        method=method,
        precision=precision,
        lora=adapters,
        new_tokens=new_tokens,
    )
    sizes = measures(tokens=tokens, rows=rows, rank=rank, tile=tile or variant.tile)
    if own_head:  # of every token logits, in float32 as well, and their gradient: twice a tile's
        place = SIZES.index("tile")
        sizes = (*sizes[:place], 2.0 * tokens, *sizes[place + 1 :])
    earlier = {"gradients": adapters} if accumulating else {}
    moments = {m.name: m.at(sizes) | earlier for m in coefficients.moments[variant]}
    pinned = 0
    if offload:
        if facts is None:
            raise Unknown("the width of a layer's input is not known")
        inputs = (coefficients.layers, tokens, facts.hidden, 4 if precision == "float32" else 2)
        for name, kinds in moments.items():
            kinds["activations"] -= off_device(name, *inputs)
        pinned = on_host(*inputs)
    moments["optimizer step"] = dict.fromkeys(KINDS, 0) | {"gradients": adapters}
    for name, kinds in moments.items():
        kinds["gradients"] = shared.gradients(kinds["gradients"])
        kinds |= shared.gathered(name)
    peak = max(moments, key=lambda name: sum(moments[name].values()))
    step = moments[peak]
    if device == "cuda":
        step["activations"] += WORKSPACE_BYTES
    resident = shared.resident(weights, optimizer=adapters * _states(optimizer))
    if fused and precision != "float32" and not (dropout or offload) and layout.shards == 1:
        resident["adapters"] += adapters // 2  # their 16-bit copies: `models.kernels.shadows`
    resident["host"] += pinned
    if host_embeddings:
        looked_up = embedding_bytes(facts, precision)
        resident["weights"] -= looked_up
        resident["host"] += looked_up
    return MemoryEstimate(
        **step,
        **resident,
        constants=constants,
        context=_outside(device, layout) + (repacked(coefficients) if repacks else 0),
        slack=round(SLACK * sum(step.values())),
        moment=peak,
    )


def _outside(device: Literal["cuda", "cpu"], layout: Layout) -> int:
    """Bytes outside of the tensors and torch's allocator."""
    if device == "cpu":
        return PROCESS_BYTES
    return CONTEXT_BYTES + NCCL_BYTES * layout.process_groups


def knows(coefficients: Coefficients, variant: Variant) -> bool:
    """Whether steps of `variant` are known."""
    try:
        _stored(coefficients, variant, rows=2)
    except Unknown:
        return False
    return True


def _stored(coefficients: Coefficients, variant: Variant, *, rows: int) -> Variant:
    """The variant with coefficients for a step of `variant`. Raises Unknown."""
    variant = variant.stored
    if (
        variant not in coefficients.moments and not variant.tiled
    ):  # simulated before there were kernels, which take less
        variant = replace(variant, fused=False)
    single = replace(variant, single_row=True)
    if rows == 1 and single in coefficients.moments:
        return single
    if variant not in coefficients.moments:
        raise Unknown(f"no coefficients for {variant}")
    return variant


def weight_bytes(
    coefficients: Coefficients,
    *,
    method: Method,
    precision: Precision = "bfloat16",
    double_quant: bool = True,
) -> tuple[int, int]:
    """Bytes of the base model's weights, and of the constants of its 4-bit blocks."""
    packed = coefficients.packed if method == "qlora" else 0
    width = 4 if precision == "float32" else 2
    unpacked = coefficients.kept + coefficients.packed - packed
    constants = _constants(packed, coefficients.packed_modules, double_quant) if packed else 0
    return unpacked * width + -(-packed // 2) + coefficients.buffers, constants


def unpacked_bytes(coefficients: Coefficients, precision: Precision) -> int:
    """Bytes of one layer's packed weights once they are unpacked, where layers are alike."""
    return coefficients.packed // coefficients.layers * (4 if precision == "float32" else 2)


def embedding_bytes(facts: Facts | None, precision: Precision) -> int:
    """Bytes of the input embeddings, which are never packed. Raises Unknown."""
    if facts is None:
        raise Unknown("the size of the embeddings is not known")
    return facts.vocab * facts.hidden * (4 if precision == "float32" else 2)


def lora_bytes(coefficients: Coefficients, rank: int, targets: Iterable[str] | None) -> int:
    """Bytes of the LoRA weights, in float32."""
    return 4 * rank * sum(_chosen(coefficients.adapters, targets).values())


def repacked(coefficients: Coefficients) -> int:
    """Bytes of the largest 16-bit weight: what oneDNN may take on a CPU beside the tensors.

    With AMX it computes a product from a copy of the weight in blocks of its own, made for each
    call, forward and backward, and freed after it. An upper bound: a projection has no more numbers
    than the squared mean of its inputs and outputs, and the head is among those never packed.
    """
    widest = max(coefficients.adapters.values(), default=0) / coefficients.layers
    return 2 * max(coefficients.kept, round((widest / 2) ** 2))


def _chosen(adapters: dict[str, int], targets: Iterable[str] | None) -> dict[str, int]:
    if targets is None:
        return adapters
    names = tuple(target.rpartition(".")[2] for target in targets)
    return {name: count for name, count in adapters.items() if name in names}


def _constants(packed: int, modules: int, double: bool) -> int:
    """Bytes of the scales: one for 64 weights, in 8 bits with a second level, or in 32."""
    scales = packed // QUANT_BLOCK
    if not double:
        return 4 * scales + modules * BLOCK
    tables = 1024 + 2 * BLOCK  # the 256 values of a scale, its offset, the 16 values of a weight
    return scales + 4 * (scales // QUANT_GROUP) + modules * tables


def _states(optimizer: str) -> float:
    """Bytes of optimizer state for each byte of LoRA weights; AdamW's for an unknown optimizer."""
    if "8bit" in optimizer:
        one = (1 + 4 / 256) / 4  # a byte a number, a scale for each 256
        return one if "lion" in optimizer else 2 * one
    if optimizer == "sgd":
        return 0.0
    return 1.0 if optimizer.startswith("lion") else 2.0
