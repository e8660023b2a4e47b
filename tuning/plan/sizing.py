"""Candidate placements: how ranks hold the model, micro-batch, checkpointing; the smallest machine.

Of the candidates whose memory estimate fits, the fastest by the roofline is taken. A share of the
GPU is kept free, since memory is a hard limit; speed only ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tuning import presets
from tuning.plan import communication, memory, sharding
from tuning.plan.coefficients import (
    TILE_ROWS,
    Attention,
    Coefficients,
    Method,
    Precision,
    preset_coefficients,
)
from tuning.plan.memory import MemoryEstimate
from tuning.plan.sharding import ALONE, Layout, layouts
from tuning.plan.speed import seconds_per_token
from tuning.spec import Sharding

HEADROOM = 0.04  # share of a GPU's memory kept free for what the estimate does not count
MOST_MACHINES, ENDLESS = 16, 4096  # of a set that is suggested, and more than any has
HOST_SHARE = 0.8  # of host memory, for shares that lie there
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
    layout: Layout = ALONE  # how the GPUs hold the model
    network: float | None = None  # bytes a second between two machines
    sharding: Sharding | None = None  # set by the user
    whole: str = ""  # what trains only with the whole model on each rank
    new_tokens: bool = False  # rows of the embeddings are trained
    answers: int = 1  # sequences of a row: the two of a pair pass through the model together
    compares: bool = False  # answers, whose log-probabilities trl's head computes
    own_head: bool = False  # logits of all tokens are kept

    def layouts(self, ranks: int, nodes: int) -> list[Layout]:
        """How `ranks` on `nodes` machines may hold the model."""
        return layouts(ranks, nodes, "no_shard" if self.whole else self.sharding)

    fused: bool = False  # with the kernels of `tuning.models.kernels`
    repacks: bool = False  # a CPU whose library copies 16-bit weights into its own layout


@dataclass(frozen=True)
class Fit:
    """A candidate placement with its memory and speed."""

    micro_batch: int
    checkpointing: bool
    memory: MemoryEstimate
    seconds_per_token: float | None
    layout: Layout = ALONE

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the ranks of a machine take for their shares."""
        return self.memory.host * self.layout.each

    def fits(self, free_bytes: int, host_bytes: int | None = None) -> bool:
        """Whether it fits a GPU with `free_bytes`, on a machine with `host_bytes` if known."""
        return self.memory.total <= free_bytes * (1 - HEADROOM) and self.fits_host(host_bytes)

    def fits_host(self, host_bytes: int | None) -> bool:
        """Whether its shares fit `host_bytes` of a machine; None: not known, so yes."""
        return host_bytes is None or self.host_bytes <= host_bytes * HOST_SHARE


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
    sizes = [n for n in sizes if n == 1 or n * demand.answers * demand.length <= MAX_TOKENS]
    for micro_batch in [demand.micro_batch] if demand.micro_batch else sizes:
        for checkpointing in (False, True):
            if demand.checkpointing in (None, checkpointing):
                yield _place(base, demand, gpu, micro_batch, checkpointing)


def _place(
    base: Model, demand: Demand, gpu: presets.Gpu | None, micro_batch: int, checkpointing: bool
) -> Fit:
    tokens = micro_batch * demand.answers * demand.length
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
        layout=demand.layout,
        facts=base.facts,
        repacks=demand.repacks,
        new_tokens=demand.new_tokens,
        tile=tokens if demand.own_head else TILE_ROWS if demand.compares else None,
    )
    seconds = _seconds(base, demand, gpu, micro_batch, checkpointing)
    return Fit(micro_batch, checkpointing, estimate, seconds, demand.layout)


def _seconds(
    base: Model, demand: Demand, gpu: presets.Gpu | None, micro_batch: int, checkpointing: bool
) -> float | None:
    """Seconds of a GPU for each token, with what it waits for others; None where not known."""
    if base.facts is None:
        return None
    tokens = micro_batch * demand.answers * demand.length
    alone = seconds_per_token(
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
    if alone is None or gpu is None or gpu.bandwidth is None or demand.layout.ranks == 1:
        return alone
    together = communication.seconds(
        alone * tokens,
        shared(base, demand),
        communication.Links.of(gpu, demand.network),
        checkpointing=checkpointing,
        accumulation=max(1, demand.rows // micro_batch),
        bandwidth=gpu.bandwidth,
    )
    return together / tokens


def shared(base: Model, demand: Demand) -> sharding.Shared:
    """What the ranks of the demand's layout share."""
    return sharding.share(
        base.coefficients,
        base.facts,
        demand.layout,
        method=demand.method,
        precision=demand.precision,
        lora=memory.lora_bytes(base.coefficients, demand.rank, demand.targets),
        new_tokens=demand.new_tokens,
    )


def _documents(demand: Demand, micro_batch: int) -> int:
    """`rows` of a memory estimate: documents where packed rows are attended to by document."""
    if not demand.packed:
        return micro_batch * demand.answers
    if demand.attention != "varlen":
        return 1
    return max(1, round(micro_batch * demand.length / max(1.0, demand.span)))


def best(
    base: Model,
    demand: Demand,
    gpu: presets.Gpu | None,
    *,
    free_bytes: int,
    host_bytes: int | None = None,
    layouts: Sequence[Layout] = (),
) -> Fit | None:
    """The fastest placement that fits `free_bytes` of one GPU, or None.

    Of the demand's layout, or of any of `layouts`: with shares in host memory only as a last
    resort.
    """
    every = layouts or (demand.layout,)
    for offload in (False, True):
        fitting = [
            fit
            for layout in every
            if layout.shards > 1 or not offload
            for fit in placements(
                base, replace(demand, layout=replace(layout, offload=offload)), gpu
            )
            if fit.fits(free_bytes, host_bytes)
        ]
        if fitting:
            return min(fitting, key=_slowness)
    return None


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


def smallest(
    base: Model, demand: Demand, gpu: presets.Gpu | None, layouts: Sequence[Layout] = ()
) -> Fit:
    """The placement that takes the least memory, of the demand's layout or any of `layouts`."""
    every = [replace(demand, layout=layout) for layout in layouts or (demand.layout,)]
    return min(
        (fit for each in every for fit in placements(base, each, gpu)),
        key=lambda fit: fit.memory.total,
    )


def longest(base: Model, demand: Demand, gpu: presets.Gpu | None, *, free_bytes: int) -> int:
    """The longest row in tokens, of up to the demand's, that fits the demand's layout.

    A multiple of 64, or 0.
    """
    demand = replace(demand, micro_batch=demand.micro_batch or 1)

    def fits(blocks: int) -> bool:
        shorter = replace(demand, length=64 * blocks, span=min(demand.span, 64.0 * blocks))
        return smallest(base, shorter, gpu).fits(free_bytes)

    low, high = 0, demand.length // 64 + 1  # fits, does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return 64 * low


def _slowness(fit: Fit) -> tuple[float, int, bool, int]:
    """Sort key: slowest last; of unknown speed, shares and checkpointing last, small batches."""
    speed = fit.seconds_per_token or 0.0
    return speed, fit.layout.shards, fit.checkpointing, -fit.micro_batch


def smallest_machines(
    base: Model, demand: Demand, *, cloud: str | None = None
) -> tuple[presets.Instance, int] | None:
    """The machine type, and how many, with the least GPU memory that fits the demand.

    One machine where that does, else as few of them; of `cloud` if it has any. Their GPUs hold the
    model whole or all together, without host memory.
    """
    offered = [m for m in presets.instances() if not m.retired]
    offered = [m for m in offered if presets.gpu_support(m.gpu, demand.method).supported]
    offered = sorted(offered, key=lambda m: (m.memory_bytes * m.gpus, m.gpus, m.vcpus or 0, m.name))
    hopeful = [m for m in offered if _fits_machines(base, demand, m.gpu, m.gpus, ENDLESS)]
    for clouds in ((cloud,), {m.cloud for m in hopeful}):
        of_them = [machine for machine in hopeful if machine.cloud in clouds]
        for count, machine in itertools.product(range(1, MOST_MACHINES + 1), of_them):
            if _fits_machines(base, demand, machine.gpu, machine.gpus, count):
                return machine, count
    return None


def _fits_machines(base: Model, demand: Demand, gpu: presets.Gpu, gpus: int, count: int) -> bool:
    """Whether `count` machines hold the demand's model: whole on each GPU, or on all together.

    Cards without bfloat16 are sized with float16, as a run on them would be.
    """
    there = replace(
        demand,
        precision="bfloat16" if gpu.bf16 else "float16",
        attention=demand.attention if gpu.bf16 else "sdpa",
        micro_batch=demand.micro_batch or 1,
    )
    every = demand.layouts(gpus * count, count)
    try:
        least = smallest(base, there, None, (every[0], every[-1]))
    except memory.Unknown:
        return False
    return least.fits(gpu.memory_bytes)
