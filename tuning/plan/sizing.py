"""What fits: the micro-batch and checkpointing for one GPU, and the smallest machine for a job.

Every candidate is sized by the ledger; of those that fit, the fastest by the roofline is taken.
Memory is a promise, so a share of the GPU is kept free; speed only ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from tuning import presets
from tuning.plan import memory as ledger
from tuning.plan.memory import Coefficients, Ledger

HEADROOM = 0.04  # of a GPU's memory, kept free for what no ledger sees
METHODS: tuple[ledger.Method, ...] = ("lora", "qlora")
MOST_TOKENS = 16_384  # of a micro-batch; matrix products gain nothing beyond


@dataclass(frozen=True)
class Demand:
    """What is to be trained, as far as memory and speed depend on it."""

    method: ledger.Method
    precision: ledger.Precision
    rank: int
    dropout: float
    optimizer: str
    attention: ledger.Attention
    double_quant: bool
    targets: tuple[str, ...] | None
    length: int  # tokens of a row
    rows: int  # rows an optimizer step, of each GPU
    packed: bool
    device: Literal["cuda", "cpu"]
    span: float  # tokens that a token's attention spans
    micro_batch: int | None = None  # fixed by the user
    checkpointing: bool | None = None  # fixed by the user
    ranks: int = 1  # GPUs that add up their gradients
    fused: bool = False  # with the kernels of `tuning.models.kernels`
    repacks: bool = False  # a CPU whose library copies 16-bit weights into its own layout


@dataclass(frozen=True)
class Fit:
    """One way to place the demand on a GPU."""

    micro_batch: int
    checkpointing: bool
    ledger: Ledger
    seconds_per_token: float | None

    def fits(self, memory: int) -> bool:
        """Whether a GPU with `memory` free bytes holds it."""
        return self.ledger.total <= memory * (1 - HEADROOM)


@dataclass(frozen=True)
class Model:
    """A base model as sizing sees it."""

    facts: presets.Facts | None  # None: nobody knows its speed
    coefficients: Coefficients


def model(facts: presets.Facts | None) -> Model | None:
    """The preset of exactly this shape, if its coefficients are known."""
    for preset in presets.all() if facts else ():
        if preset.facts == facts and (found := ledger.load(preset.name)):
            return Model(preset.facts, found)
    return None


def placements(base: Model, demand: Demand, gpu: presets.Gpu | None) -> Iterator[Fit]:
    """Every way to place the demand, whether it fits or not. Raises ledger.Unknown."""
    sizes = [n for n in range(1, demand.rows + 1) if demand.rows % n == 0]
    sizes = [n for n in sizes if n == 1 or n * demand.length <= MOST_TOKENS]
    for micro_batch in [demand.micro_batch] if demand.micro_batch else sizes:
        for checkpointing in (False, True):
            if demand.checkpointing in (None, checkpointing):
                yield _place(base, demand, gpu, micro_batch, checkpointing)


def _place(
    base: Model, demand: Demand, gpu: presets.Gpu | None, micro_batch: int, checkpointing: bool
) -> Fit:
    tokens = micro_batch * demand.length
    found = ledger.predict(
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
        else ledger.seconds_per_token(
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
    return Fit(micro_batch, checkpointing, found, seconds)


def _documents(demand: Demand, micro_batch: int) -> int:
    """What the ledger counts as rows: packed rows are laid end to end, and seen by document."""
    if not demand.packed:
        return micro_batch
    if demand.attention != "varlen":
        return 1
    return max(1, round(micro_batch * demand.length / max(1.0, demand.span)))


def best(base: Model, demand: Demand, gpu: presets.Gpu | None, *, memory: int) -> Fit | None:
    """The fastest placement that fits `memory` free bytes of one GPU, or None."""
    fitting = [fit for fit in placements(base, demand, gpu) if fit.fits(memory)]
    return min(fitting, key=_slowness) if fitting else None


def first(base: Model, demand: Demand, micro_batch: int, *, memory: int) -> Fit | None:
    """The usual `micro_batch`, or the next smaller that fits `memory` bytes; None if none does.

    For a CPU, where nothing is won by filling the memory, and the same placement gives the same
    bits.
    """
    sizes = [n for n in range(micro_batch, 0, -1) if demand.rows % n == 0]
    for size in [demand.micro_batch] if demand.micro_batch else sizes:
        for checkpointing in (False, True):
            if demand.checkpointing in (None, checkpointing):
                fit = _place(base, demand, None, size, checkpointing)
                if fit.fits(memory):
                    return fit
    return None


def smallest(base: Model, demand: Demand, gpu: presets.Gpu | None) -> Fit:
    """The placement that takes the least memory."""
    return min(placements(base, demand, gpu), key=lambda fit: fit.ledger.total)


def _slowness(fit: Fit) -> tuple[float, bool, int]:
    """Slowest last; where nobody knows the speed, checkpointing last, then small batches."""
    return fit.seconds_per_token or 0.0, fit.checkpointing, -fit.micro_batch


def smallest_machine(
    base: Model, demand: Demand, *, cloud: str | None = None
) -> presets.Instance | None:
    """The machine type with the least GPU memory that holds the demand, of `cloud` if it has one.

    Cards without bfloat16 are asked with float16, as a run on them would.
    """
    found = []
    for machine in presets.instances():
        if machine.retired or not presets.gpu_support(machine.gpu, demand.method).supported:
            continue
        precision: ledger.Precision = "bfloat16" if machine.gpu.bf16 else "float16"
        attention = demand.attention if machine.gpu.bf16 else "sdpa"
        asked = replace(demand, precision=precision, attention=attention)
        try:
            fits = smallest(base, asked, machine.gpu).fits(machine.memory_bytes)
        except ledger.Unknown:
            continue
        if fits:
            found.append(machine)
    here = [machine for machine in found if machine.cloud == cloud] or found
    return min(
        here, key=lambda m: (m.memory_bytes * m.gpus, m.gpus, m.vcpus or 0, m.name), default=None
    )


CLASSES = ("V100-PCIE-16GB", "A10", "A100-SXM4-40GB", "A100-PCIE-80GB", "H100-NVL", "H200-SXM5")
PAGE = """# What fits on which GPU

Rows of 2,048 packed tokens, rank 16 on every projection, one GPU of the class, {headroom:.0%}
of its memory kept free; made by `make docs` from the coefficients in `configs/memory/`. A cell says
how many rows are trained at once without checkpointing, or with it (`c`), and the planned peak in
GiB; a dash means that nothing fits. Planned, not measured: `benchmarks/gpu_plan.py` compares with a
GPU.

| preset | method | {heads} |
|---|---|{lines}
{rows}
"""


def markdown() -> str:
    """The page `docs/fit.md`."""
    gpus = [presets.gpu(name) for name in CLASSES]
    rows = [
        f"| {preset.name} | {method} | "
        + " | ".join(_cell(preset, found, method, gpu) for gpu in gpus)
        + " |"
        for preset in presets.all()
        if (found := ledger.load(preset.name))
        for method in METHODS
        if presets.support(preset, method).supported
    ]
    return PAGE.format(
        headroom=HEADROOM,
        heads=" | ".join(f"{gpu.name}" for gpu in gpus),
        lines="---|" * len(gpus),
        rows="\n".join(rows),
    )


def _cell(
    preset: presets.Preset, found: Coefficients, method: ledger.Method, gpu: presets.Gpu
) -> str:
    demand = Demand(
        method=method,
        precision="bfloat16" if gpu.bf16 else "float16",
        rank=16,
        dropout=0.0,
        optimizer="adamw_torch_fused",
        attention="sdpa",
        double_quant=True,
        targets=None,
        length=2048,
        rows=8,
        packed=preset.facts.packing_safe,
        device="cuda",
        span=2048.0,
    )
    fit = best(Model(preset.facts, found), demand, gpu, memory=gpu.memory_bytes)
    if fit is None:
        return "–"
    mark = "c" if fit.checkpointing else ""
    return f"{fit.micro_batch}{mark}, {fit.ledger.total / 2**30:.1f}"
