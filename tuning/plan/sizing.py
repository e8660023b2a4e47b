"""Candidate placements: layout of ranks, micro-batch, activations kept.

Of the candidates whose memory estimate fits, the fastest by the roofline is taken. A share of the
GPU is kept free, since memory is a hard limit; speed only ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tuning import presets
from tuning.plan import communication, memory, sharding
from tuning.plan.activations import ALL, INPUTS, LOOKED_UP, OFFLOADED, TILED, Activations, on_host
from tuning.plan.coefficients import (
    TILE_ROWS,
    Attention,
    Coefficients,
    Method,
    Precision,
    Variant,
    preset_coefficients,
)
from tuning.plan.memory import MemoryEstimate
from tuning.plan.sharding import ALONE, Layout, layouts
from tuning.plan.speed import seconds_per_token
from tuning.spec import Sharding

HEADROOM = 0.04  # share of a GPU's memory kept free for what the estimate does not count
HOST_SHARE = 0.8  # of host memory, for shares that lie there
SCALED = "gemma"  # families whose embeddings are multiplied as they are looked up
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
    offloads: bool | None = None  # set by the user: layer inputs in host memory
    layout: Layout = ALONE  # how the GPUs hold the model
    network: float | None = None  # bytes a second between two machines
    sharding: Sharding | None = None  # set by the user
    whole: str = ""  # what trains only with the whole model on each rank
    new_tokens: bool = False  # rows of the embeddings are trained
    answers: int = 1  # sequences of a row: the two of a pair pass through the model together
    compares: bool = False  # answers, whose log-probabilities trl's head computes
    own_head: bool = False  # logits of all tokens are kept

    fused: bool = False  # with the kernels of `tuning.models.kernels`
    repacks: bool = False  # a CPU whose library copies 16-bit weights into its own layout

    def layouts(self, ranks: int, nodes: int) -> list[Layout]:
        """How `ranks` on `nodes` machines may hold the model."""
        return layouts(ranks, nodes, "no_shard" if self.whole else self.sharding)

    @property
    def levels(self) -> list[tuple[Activations, ...]]:
        """What may be kept of the activations: each level only where nothing before it fits."""
        plain = tuple(k for k in (ALL, INPUTS) if self.checkpointing in (None, k.checkpointing))
        if self.device == "cpu" or self.offloads is False or self.checkpointing is False:
            return [plain]
        return [*([plain] if self.offloads is None else []), (OFFLOADED,), (TILED,), (LOOKED_UP,)]


@dataclass(frozen=True)
class Fit:
    """A candidate placement with its memory and speed."""

    micro_batch: int
    activations: Activations
    memory: MemoryEstimate
    seconds_per_token: float | None
    layout: Layout = ALONE
    inputs_bytes: int | None = None  # of one row: host memory of a rank that offloads them
    embedding_bytes: int | None = None  # of host memory that input embeddings could lie in

    @property
    def checkpointing(self) -> bool:
        """Whether activations of layers are computed again."""
        return self.activations.checkpointing

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the ranks of a machine take for shares and layer inputs."""
        return self.memory.host * self.layout.each

    def fits(self, free_bytes: int, host_bytes: int | None = None) -> bool:
        """Whether it fits a GPU with `free_bytes`, on a machine with `host_bytes` if known."""
        return self.memory.total <= free_bytes * (1 - HEADROOM) and self.fits_host(host_bytes)

    def fits_host(self, host_bytes: int | None) -> bool:
        """Whether what lies there fits `host_bytes` of a machine; None: not known, so yes."""
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


def placements(
    base: Model,
    demand: Demand,
    gpu: presets.Gpu | None,
    level: Sequence[Activations] | None = None,
    *,
    free_bytes: int | None = None,
) -> Iterator[Fit]:
    """The candidate placements that keep what a `level` says, whether they fit or not.

    The first of the demand's levels if not given.
    With `free_bytes` of a GPU, also those that recompute only so many layers that they fit. Raises
    memory.Unknown.
    """
    sizes = [n for n in range(1, demand.rows + 1) if demand.rows % n == 0]
    sizes = [n for n in sizes if n == 1 or n * demand.answers * demand.length <= MAX_TOKENS]
    for micro_batch in [demand.micro_batch] if demand.micro_batch else sizes:
        fits = [_place(base, demand, gpu, micro_batch, kept) for kept in level or demand.levels[0]]
        yield from fits
        if free_bytes is not None and len(fits) == 2 and even(base.facts):
            yield from _between(base, *fits, free_bytes=free_bytes)


def even(facts: presets.Facts | None) -> bool:
    """Whether each layer has the same matrices, so that its activations are as large as others'."""
    return facts is not None and all(
        matrix.layers == facts.layers for matrix in (*facts.linears, *facts.experts)
    )


def _between(base: Model, keeping: Fit, recomputing: Fit, *, free_bytes: int) -> Iterator[Fit]:
    """The placement that keeps the activations of as many layers as fit, if not of none or all."""
    layers, free = base.coefficients.layers, free_bytes * (1 - HEADROOM)
    most, least = keeping.memory.total, recomputing.memory.total
    if least > free or most <= free:
        return
    for kept in range(int(layers * (free - least) / (most - least)), 0, -1):
        share = kept / layers
        fit = Fit(
            keeping.micro_batch,
            Activations(True, layers - kept),
            recomputing.memory.towards(keeping.memory, share),
            _along(recomputing.seconds_per_token, keeping.seconds_per_token, share),
            keeping.layout,
            keeping.inputs_bytes,
            keeping.embedding_bytes,
        )
        if fit.memory.total <= free:  # terms are rounded up
            yield fit
            return


def _along(start: float | None, end: float | None, share: float) -> float | None:
    return None if start is None or end is None else start + share * (end - start)


def _place(
    base: Model, demand: Demand, gpu: presets.Gpu | None, micro_batch: int, kept: Activations
) -> Fit:
    tokens = micro_batch * demand.answers * demand.length
    estimate = memory.predict(
        base.coefficients,
        method=demand.method,
        rank=demand.rank,
        tokens=tokens,
        checkpointing=kept.checkpointing,
        offload=kept.offload,
        tiled=kept.tiled,
        host_embeddings=kept.host_embeddings,
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
        tile=TILE_ROWS if demand.compares else None,
        own_head=demand.own_head,
    )
    seconds = _seconds(base, demand, gpu, micro_batch, kept)
    inputs = None
    if base.facts is not None and demand.offloads is not False:
        width = 4 if demand.precision == "float32" else 2
        inputs = on_host(base.coefficients.layers, tokens // micro_batch, base.facts.hidden, width)
    looked_up = None
    if demand.layout.ranks == 1 and _looks_up(base, demand):
        looked_up = memory.embedding_bytes(base.facts, demand.precision)
    return Fit(micro_batch, kept, estimate, seconds, demand.layout, inputs, looked_up)


def _looks_up(base: Model, demand: Demand) -> bool:
    """Whether the input embeddings are frozen, unscaled, and not the output layer's weights."""
    facts = base.facts
    if facts is None or facts.model_type.startswith(SCALED):
        return False
    return not (facts.tied or demand.new_tokens)


def knows(base: Model, demand: Demand) -> bool:
    """Whether there are coefficients for the demand's steps."""
    try:
        for kept in demand.levels[0]:
            _place(base, demand, None, 1, kept)
    except memory.Unknown:
        return False
    return True


def _seconds(
    base: Model, demand: Demand, gpu: presets.Gpu | None, micro_batch: int, kept: Activations
) -> float | None:
    """Seconds of a GPU for each token, with what it waits for others; None where not known."""
    if base.facts is None:
        return None
    tokens = micro_batch * demand.answers * demand.length
    alone = seconds_per_token(
        base.facts,
        gpu,
        method=demand.method,
        checkpointing=kept.checkpointing,
        offload=kept.offload,
        tiled=kept.tiled,
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
        checkpointing=kept.checkpointing,
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

    Of the demand's layout, or of any of `layouts`: in each with layer inputs in host memory only
    where nothing else fits, and with shares there as a last resort. Where the speed is not known,
    the layout that keeps the most on the GPU.
    """
    every = [replace(demand, layout=layout) for layout in layouts or (demand.layout,)]
    for offload in (False, True):
        ways = [
            replace(each, layout=replace(each.layout, offload=offload))
            for each in every
            if each.layout.shards > 1 or not offload
        ]
        fits = (_first_level(base, each, gpu, free_bytes, host_bytes) for each in ways)
        if found := [fit for fit in fits if fit]:
            return min(found, key=lambda each: (each[1].seconds_per_token or 0.0, each[0]))[1]
    return None


def _first_level(
    base: Model, demand: Demand, gpu: presets.Gpu | None, free_bytes: int, host_bytes: int | None
) -> tuple[tuple[int, tuple[float, int, bool, int, bool]], Fit] | None:
    """The fastest placement of the demand's layout at the first level that fits.

    With its sort key where speeds are unknown: the level's number first.
    """
    for number, level in enumerate(_levels(base, demand)):
        every = placements(base, demand, gpu, level, free_bytes=free_bytes)
        if fitting := [fit for fit in every if fit.fits(free_bytes, host_bytes)]:
            fit = min(fitting, key=_slowness)
            return (number, _slowness(fit)), fit
    return None


def _levels(base: Model, demand: Demand) -> list[tuple[Activations, ...]]:
    """Those of the demand's levels that the model can have and whose memory is known."""
    wanted = Variant(demand.method, demand.precision, demand.attention, fused=True, tiled=True)
    usual = demand.fused and not demand.dropout and demand.device == "cuda"
    tiled = usual and wanted.stored in base.coefficients.moments
    levels = [level for level in demand.levels if base.facts or not level[0].offload]
    apart = demand.layout.ranks == 1 and _looks_up(base, demand)  # DDP holds on to parameters
    levels = [level for level in levels if apart or not level[0].host_embeddings]
    if not tiled:
        levels = [(replace(level[0], tiled=False), *level[1:]) for level in levels]
    return list(dict.fromkeys(levels)) or [(INPUTS,)]


def first(base: Model, demand: Demand, micro_batch: int, *, free_bytes: int) -> Fit | None:
    """`micro_batch`, or the next smaller that fits `free_bytes`; None if none does.

    For a CPU, where filling the memory gains nothing, and an equal placement gives equal bits.
    """
    sizes = [n for n in range(micro_batch, 0, -1) if demand.rows % n == 0]
    for size in [demand.micro_batch] if demand.micro_batch else sizes:
        for kept in demand.levels[0]:
            fit = _place(base, demand, None, size, kept)
            if fit.fits(free_bytes):
                return fit
    return None


def smallest(
    base: Model,
    demand: Demand,
    gpu: presets.Gpu | None,
    layouts: Sequence[Layout] = (),
    *,
    host_bytes: int | None = None,
) -> Fit:
    """The placement that takes the least memory, of the demand's layout or any of `layouts`.

    One for which `host_bytes` of the machine are enough, if there is any.
    """
    every = [replace(demand, layout=layout) for layout in layouts or (demand.layout,)]
    return min(
        (
            fit
            for each in every
            for level in _levels(base, each)
            for fit in placements(base, each, gpu, level)
        ),
        key=lambda fit: (not fit.fits_host(host_bytes), fit.memory.total),
    )


def longest(
    base: Model,
    demand: Demand,
    gpu: presets.Gpu | None,
    *,
    free_bytes: int,
    host_bytes: int | None = None,
) -> int:
    """The longest row in tokens, of up to the demand's, that fits the demand's layout.

    A multiple of 64, or 0. Of packed rows that are shorter, a step has more.
    """
    more = max(2, demand.rows) if demand.packed and not demand.micro_batch else demand.rows
    demand = replace(demand, micro_batch=demand.micro_batch or 1, rows=more)

    def fits(blocks: int) -> bool:
        shorter = replace(demand, length=64 * blocks, span=min(demand.span, 64.0 * blocks))
        return smallest(base, shorter, gpu, host_bytes=host_bytes).fits(free_bytes, host_bytes)

    low, high = 0, demand.length // 64 + 1  # fits, does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return 64 * low


def _slowness(fit: Fit) -> tuple[float, int, bool, int, bool]:
    """Sort key: slowest last; of unknown speed, shares and checkpointing last, small batches."""
    speed = fit.seconds_per_token or 0.0
    kept = fit.activations
    return speed, fit.layout.shards, kept.checkpointing, -fit.micro_batch, kept.recomputed is None
