"""Candidate placements: micro-batch and checkpointing on one GPU, and the smallest machine.

Of the candidates whose memory estimate fits, the fastest by the roofline is taken. A share of the
GPU is kept free, since memory is a hard limit; speed only ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from tuning import presets
from tuning.plan import memory
from tuning.plan.coefficients import (
    Attention,
    Coefficients,
    Method,
    Precision,
    preset_coefficients,
)
from tuning.plan.memory import MemoryEstimate
from tuning.plan.speed import seconds_per_token

HEADROOM = 0.04  # share of a GPU's memory kept free for what the estimate does not count
MAX_TOKENS = 16_384  # of a micro-batch; matrix products gain nothing beyond


@dataclass(frozen=True)
class Demand:
    """What memory and speed of a training depend on."""

    method: Method
    precision: Precision
    rank: int
    dropout: float
    optimizer: str
    attention: Attention
    double_quant: bool
    targets: tuple[str, ...] | None
    length: int  # tokens of a row
    rows: int  # rows an optimizer step, of each GPU
    packed: bool
    device: Literal["cuda", "cpu"]
    span: float  # tokens that a token's attention spans
    micro_batch: int | None = None  # set by the user
    checkpointing: bool | None = None  # set by the user
    ranks: int = 1  # GPUs of data-parallel training
    fused: bool = False  # with the kernels of `tuning.models.kernels`
    repacks: bool = False  # a CPU whose library copies 16-bit weights into its own layout


@dataclass(frozen=True)
class Fit:
    """A candidate placement with its memory and speed."""

    micro_batch: int
    checkpointing: bool
    memory: MemoryEstimate
    seconds_per_token: float | None

    def fits(self, free_bytes: int) -> bool:
        """Whether it fits a GPU with `free_bytes`."""
        return self.memory.total <= free_bytes * (1 - HEADROOM)


@dataclass(frozen=True)
class Model:
    """Shape and memory coefficients of a base model."""

    facts: presets.Facts | None  # None: its speed is unknown
    coefficients: Coefficients


def model(facts: presets.Facts | None) -> Model | None:
    """The preset of exactly this shape, if its coefficients are known."""
    if facts is None:
        return None
    for preset in presets.all():
        same = replace(preset.facts, stored=facts.stored) == facts  # unpacked it is as large
        if same and (coefficients := preset_coefficients(preset.name)):
            return Model(preset.facts, coefficients)
    return None


def placements(base: Model, demand: Demand, gpu: presets.Gpu | None) -> Iterator[Fit]:
    """All candidate placements, whether they fit or not. Raises memory.Unknown."""
    sizes = [n for n in range(1, demand.rows + 1) if demand.rows % n == 0]
    sizes = [n for n in sizes if n == 1 or n * demand.length <= MAX_TOKENS]
    for micro_batch in [demand.micro_batch] if demand.micro_batch else sizes:
        for checkpointing in (False, True):
            if demand.checkpointing in (None, checkpointing):
                yield _place(base, demand, gpu, micro_batch, checkpointing)


def _place(
    base: Model, demand: Demand, gpu: presets.Gpu | None, micro_batch: int, checkpointing: bool
) -> Fit:
    tokens = micro_batch * demand.length
    estimate = memory.predict(
        base.coefficients,
        method=demand.method,
        rank=demand.rank,
        tokens=tokens,
        checkpointing=checkpointing,
        precision=demand.precision,
        optimizer=demand.optimizer,
        dropout=demand.dropout,
        attention=demand.attention,
        rows=_documents(demand, micro_batch),
        fused=demand.fused,
        accumulating=micro_batch < demand.rows,
        targets=demand.targets,
        double_quant=demand.double_quant,
        device=demand.device,
        ranks=demand.ranks,
        repacks=demand.repacks,
    )
    seconds = (
        None
        if base.facts is None
        else seconds_per_token(
            base.facts,
            gpu,
            method=demand.method,
            checkpointing=checkpointing,
            tokens=tokens,
            effective_length=demand.span if demand.attention == "varlen" else tokens,
            rank=demand.rank,
            precision=demand.precision,
            attention=demand.attention,
            fused=demand.fused,
        )
    )
    return Fit(micro_batch, checkpointing, estimate, seconds)


def _documents(demand: Demand, micro_batch: int) -> int:
    """`rows` of a memory estimate: documents where packed rows are attended to by document."""
    if not demand.packed:
        return micro_batch
    if demand.attention != "varlen":
        return 1
    return max(1, round(micro_batch * demand.length / max(1.0, demand.span)))


def best(base: Model, demand: Demand, gpu: presets.Gpu | None, *, free_bytes: int) -> Fit | None:
    """The fastest placement that fits `free_bytes` of one GPU, or None."""
    fitting = [fit for fit in placements(base, demand, gpu) if fit.fits(free_bytes)]
    return min(fitting, key=_slowness) if fitting else None


def first(base: Model, demand: Demand, micro_batch: int, *, free_bytes: int) -> Fit | None:
    """`micro_batch`, or the next smaller that fits `free_bytes`; None if none does.

    For a CPU, where filling the memory gains nothing, and an equal placement gives equal bits.
    """
    sizes = [n for n in range(micro_batch, 0, -1) if demand.rows % n == 0]
    for size in [demand.micro_batch] if demand.micro_batch else sizes:
        for checkpointing in (False, True):
            if demand.checkpointing in (None, checkpointing):
                fit = _place(base, demand, None, size, checkpointing)
                if fit.fits(free_bytes):
                    return fit
    return None


def smallest(base: Model, demand: Demand, gpu: presets.Gpu | None) -> Fit:
    """The placement that takes the least memory."""
    return min(placements(base, demand, gpu), key=lambda fit: fit.memory.total)


def _slowness(fit: Fit) -> tuple[float, bool, int]:
    """Sort key: slowest last; of unknown speed, checkpointing last, then small batches."""
    return fit.seconds_per_token or 0.0, fit.checkpointing, -fit.micro_batch


def smallest_machine(
    base: Model, demand: Demand, *, cloud: str | None = None
) -> presets.Instance | None:
    """The machine type with the least GPU memory that fits the demand, of `cloud` if it has one.

    Cards without bfloat16 are sized with float16, as a run on them would be.
    """
    fitting = []
    for machine in presets.instances():
        if machine.retired or not presets.gpu_support(machine.gpu, demand.method).supported:
            continue
        precision: Precision = "bfloat16" if machine.gpu.bf16 else "float16"
        attention = demand.attention if machine.gpu.bf16 else "sdpa"
        there = replace(demand, precision=precision, attention=attention)
        try:
            if smallest(base, there, machine.gpu).fits(machine.memory_bytes):
                fitting.append(machine)
        except memory.Unknown:
            continue
    return min(
        [machine for machine in fitting if machine.cloud == cloud] or fitting,
        key=lambda m: (m.memory_bytes * m.gpus, m.gpus, m.vcpus or 0, m.name),
        default=None,
    )
