"""What a training step takes of a GPU's memory and time, by arithmetic: no torch, no weights.

Memory. A simulation (`training.simulate`) has run a step of the real model class once and kept the
few instants at which its memory can be highest. At each, the bytes of every kind are linear in the
sizes of the step (tokens, rank, ...), so that

    peak = what stays + max over moments of (sum over sizes of coefficient x size)

What stays (weights, adapters, optimizer) is counted exactly. `predict` says each term at the peak.

Time is `seconds_per_token`, of `tuning.plan.speed`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

from tuning.plan.speed import operations_per_token, seconds_per_token
from tuning.presets import CONFIGS

__all__ = [
    "KINDS",
    "SIZES",
    "Attention",
    "Coefficients",
    "Ledger",
    "Method",
    "Moment",
    "Precision",
    "Unknown",
    "Variant",
    "from_json",
    "held",
    "load",
    "measures",
    "operations_per_token",
    "predict",
    "repacked",
    "seconds_per_token",
    "to_json",
]

Method = Literal["lora", "qlora"]
Precision = Literal["bfloat16", "float16", "float32"]
Attention = Literal["varlen", "sdpa", "eager"]

KINDS = ("activations", "loss", "dequantisation", "gradients")
SIZES = ("constant", "tokens", "tile", "rows", "pairs", "square", "rank", "rank_tokens")

TILE_ROWS = 4096  # tokens that trl 1.16 scores at once
FUSED_TILE_ROWS = {"cuda": 512, "cpu": 128}  # that ours does: a full product; what a cache holds
BLOCK = 512  # bytes that the allocator rounds up to
QUANT_BLOCK, QUANT_GROUP = 64, 256  # weights a constant, constants a constant of the second level

# Outside of the tensors that the simulation sees. Estimates; nobody has measured them for this
# project yet (`benchmarks/gpu_plan.py` does).
CONTEXT_BYTES = 640 << 20  # CUDA context, kernels loaded, as nvidia-smi sees it
WORKSPACE_BYTES = 32 << 20  # cuBLAS, inside torch's allocator: its default on Hopper
SLACK = 0.03  # of what comes and goes in a step: fragmentation is reported as 1 to 3 %
PROCESS_BYTES = 1 << 30  # on a CPU: the interpreter with torch, transformers and trl imported


@dataclass(frozen=True)
class Variant:
    """A way to train that allocates otherwise than another: not its sizes."""

    method: Method = "lora"
    precision: Precision = "bfloat16"
    attention: Attention = "varlen"
    checkpointing: bool = True
    dropout: bool = False
    device: Literal["cuda", "cpu"] = "cuda"
    single_row: bool = False  # some models run other operators on a batch of one row
    fused: bool = False  # one-pass head, and fused LoRA unless there is dropout

    @property
    def adapters(self) -> Precision:
        """Type of the LoRA weights: trl makes QLoRA's bfloat16, unless losses must be scaled."""
        return "bfloat16" if (self.method, self.precision) == ("qlora", "bfloat16") else "float32"

    @property
    def tile(self) -> int:
        """Tokens whose logits are there at once."""
        return FUSED_TILE_ROWS[self.device] if self.fused else TILE_ROWS

    @property
    def stored(self) -> Variant:
        """The variant whose coefficients hold for this one: LoRA in float16 is LoRA in bfloat16."""
        if (self.method, self.precision) == ("lora", "float16"):
            return replace(self, precision="bfloat16")
        return self


@dataclass(frozen=True)
class Moment:
    """An instant of a step at which its memory may be highest."""

    name: str  # such as "backward of the last layer"
    bytes: dict[str, tuple[float, ...]]  # kind -> one coefficient for each of SIZES

    def at(self, sizes: tuple[float, ...]) -> dict[str, int]:
        """Bytes of each kind for these sizes."""
        return {
            kind: round(max(0.0, _product(self.bytes.get(kind, _NONE), sizes))) for kind in KINDS
        }


_NONE = (0.0,) * len(SIZES)


def _product(left: tuple[float, ...], right: tuple[float, ...]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


@dataclass(frozen=True)
class Coefficients:
    """All that is needed to size the training of one model."""

    layers: int
    kept: int  # numbers that are never packed: embeddings, head, norms, biases, towers
    packed: int  # numbers that 4-bit loading packs
    packed_modules: int  # in so many linear layers
    buffers: int  # bytes of tensors that are no weights
    adapters: dict[str, int]  # by projection: numbers for each unit of rank, in all layers
    moments: dict[Variant, tuple[Moment, ...]]


class Unknown(LookupError):
    """These coefficients do not hold the variant that was asked for."""


@dataclass(frozen=True)
class Ledger:
    """Bytes at the highest moment of a step, by what they are for."""

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
    moment: str  # when the peak is

    @property
    def terms(self) -> dict[str, int]:
        """What each share is, for people, in the order of the fields -> bytes."""
        return {label: getattr(self, name) for name, label in _LABELS.items()}

    @property
    def total(self) -> int:
        """Bytes of the GPU, or of RAM, that the process takes at its peak."""
        return sum(self.terms.values())

    @property
    def allocated(self) -> int:
        """Bytes as `torch.cuda.max_memory_allocated` counts them."""
        return self.total - self.context - self.slack

    @property
    def step(self) -> int:
        """Bytes that come and go within a step."""
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
    ranks: int = 1,
    targets: Iterable[str] | None = None,
    double_quant: bool = True,
    device: Literal["cuda", "cpu"] = "cuda",
    fused: bool = False,
    repacks: bool = False,
) -> Ledger:
    """The memory of one process that trains micro-batches of `tokens` tokens.

    `rows` is how many documents are packed into them with varlen attention, and else how many rows
    of `tokens / rows` they are, padding included. `accumulating`: gradients of an earlier
    micro-batch are still there. `fused`: with `tuning.models.kernels`. `ranks` above 1 adds
    the buffers of DDP. `repacks`: the CPU library copies 16-bit weights, see `repacked`. Fewer `targets` (names of projections) take fewer adapters; what their
    absence saves of activations is left out, so that the result is then an upper bound. Raises
    Unknown.
    """
    variant = Variant(
        method, precision, attention, checkpointing, dropout > 0, device, fused=fused
    ).stored
    if variant not in coefficients.moments:  # made before there were kernels, which take less
        variant = replace(variant, fused=False)
    if rows == 1 and replace(variant, single_row=True) in coefficients.moments:
        variant = replace(variant, single_row=True)
    if variant not in coefficients.moments:
        raise Unknown(f"no coefficients for {variant}")
    count = rank * sum(_chosen(coefficients.adapters, targets).values())
    adapters = count * (2 if variant.adapters == "bfloat16" else 4)
    weights, constants = held(
        coefficients, method=method, precision=precision, double_quant=double_quant
    )
    resident = {
        "weights": weights,
        "constants": constants,
        "adapters": adapters,
        "optimizer": round(adapters * _states(optimizer, variant.adapters)),
    }
    sizes = measures(tokens=tokens, rows=rows, rank=rank, tile=variant.tile)
    candidates = {
        moment.name: _settled(moment.at(sizes), adapters, accumulating)
        for moment in coefficients.moments[variant]
    }
    candidates["optimizer step"] = dict.fromkeys(KINDS, 0) | {"gradients": adapters}
    name = max(candidates, key=lambda name: sum(candidates[name].values()))
    shares = candidates[name]
    if ranks > 1:  # DDP's buckets hold every gradient a second time
        shares["gradients"] += adapters
    if device == "cuda":
        shares["activations"] += WORKSPACE_BYTES
    outside = CONTEXT_BYTES if device == "cuda" else PROCESS_BYTES
    return Ledger(
        **resident,
        **shares,
        context=outside + (repacked(coefficients) if repacks else 0),
        slack=round(SLACK * sum(shares.values())),
        moment=name,
    )


def held(
    coefficients: Coefficients,
    *,
    method: Method,
    precision: Precision = "bfloat16",
    double_quant: bool = True,
) -> tuple[int, int]:
    """Bytes of the base model's weights, and of the constants of its 4-bit blocks."""
    packed = coefficients.packed if method == "qlora" else 0
    width = 4 if precision == "float32" else 2
    whole = coefficients.kept + coefficients.packed - packed
    constants = _constants(packed, coefficients.packed_modules, double_quant) if packed else 0
    return whole * width + -(-packed // 2) + coefficients.buffers, constants


def repacked(coefficients: Coefficients) -> int:
    """Most bytes that oneDNN takes on a CPU with bfloat16 instructions, beside the tensors of a step.

    It computes a 16-bit product from a copy of the weight in a layout of its own (blocks of AMX
    tiles), made for each call of a linear layer, forward and backward, and freed after it. So one
    copy of the largest matrix is there at most: of a projection, whose inputs x outputs are no more
    than their mean squared, or of the head, which is among the numbers kept.
    """
    sums = [count / coefficients.layers for count in coefficients.adapters.values()]
    return 2 * max(coefficients.kept, round((max(sums, default=0.0) / 2) ** 2))


def measures(*, tokens: int, rows: int, rank: int, tile: int = TILE_ROWS) -> tuple[float, ...]:
    """The sizes of a step, as SIZES names them; `tile` is the most tokens scored at once."""
    return (
        1.0,
        float(tokens),
        float(min(tokens, tile)),
        float(rows),
        tokens * tokens / rows,
        tokens * tokens / rows / rows,
        float(rank),
        float(rank * tokens),
    )


def _settled(shares: dict[str, int], adapters: int, accumulating: bool) -> dict[str, int]:
    return shares | ({"gradients": adapters} if accumulating else {})


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


def _states(optimizer: str, adapters: Precision) -> float:
    """Bytes of optimizer state for each byte of LoRA weights; of AdamW if it is not known."""
    width = 2 if adapters == "bfloat16" else 4
    if "8bit" in optimizer:
        one = (1 + 4 / 256) / width  # a byte a number, a scale for each 256
        return one if "lion" in optimizer else 2 * one
    if optimizer == "sgd":
        return 0.0
    return 1.0 if optimizer.startswith("lion") else 2.0


@lru_cache(maxsize=64)  # read once: the operator plans by the hundred
def load(name: str) -> Coefficients | None:
    """The coefficients of the preset `name`; None for one without."""
    path = CONFIGS / "memory" / f"{name}.json"
    return from_json(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def to_json(coefficients: Coefficients) -> dict[str, Any]:
    """For a file; `from_json` is the way back. Coefficients of zero are left out."""
    record = {field.name: getattr(coefficients, field.name) for field in fields(coefficients)}
    moments = [
        asdict(variant) | {"moments": [_moment_to_json(moment) for moment in found]}
        for variant, found in coefficients.moments.items()
    ]
    return record | {"moments": moments}


def _moment_to_json(moment: Moment) -> dict[str, Any]:
    return {"name": moment.name} | {
        kind: {size: _short(value) for size, value in zip(SIZES, values, strict=True) if value}
        for kind, values in moment.bytes.items()
    }


def _short(value: float) -> float:
    return int(value) if value == int(value) else value


def from_json(record: dict[str, Any]) -> Coefficients:
    """The coefficients that `to_json` made a record of."""
    moments = {}
    for entry in record["moments"]:
        variant = Variant(**{k: v for k, v in entry.items() if k != "moments"})
        moments[variant] = tuple(_moment(value) for value in entry["moments"])
    return Coefficients(**(record | {"moments": moments}))


def _moment(record: dict[str, Any]) -> Moment:
    return Moment(
        record["name"],
        {
            kind: tuple(float(values.get(size, 0)) for size in SIZES)
            for kind, values in record.items()
            if kind != "name"
        },
    )
