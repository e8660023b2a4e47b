"""Memory coefficients of a model: what its training steps allocate, as linear forms of their sizes.

Made by `training.simulate`, one file for each preset in `configs/memory/`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any, Literal

from tuning.presets.load import examined

Method = Literal["lora", "qlora"]
Precision = Literal["bfloat16", "float16", "float32"]
Attention = Literal["varlen", "sdpa", "eager"]

KINDS = ("activations", "loss", "dequantisation", "gradients")
SIZES = ("constant", "tokens", "tile", "rows", "pairs", "square", "rank", "rank_tokens")

TILE_ROWS = 4096  # tokens whose logits trl 1.16 computes at once
FUSED_TILE_ROWS = {"cuda": 512, "cpu": 128}  # and our head: full products on a GPU, cache on a CPU


@dataclass(frozen=True)
class Variant:
    """Everything but sizes that decides which operators a step runs."""

    method: Method = "lora"
    precision: Precision = "bfloat16"
    attention: Attention = "varlen"
    checkpointing: bool = True
    dropout: bool = False
    device: Literal["cuda", "cpu"] = "cuda"
    single_row: bool = False  # some models run other operators on a batch of one row
    fused: bool = False  # one-pass head, and fused LoRA unless there is dropout
    tiled: bool = False  # MLPs compute a share of the tokens at a time

    @property
    def tile(self) -> int:
        """Tokens whose logits are in memory at once."""
        return FUSED_TILE_ROWS[self.device] if self.fused else TILE_ROWS

    @property
    def stored(self) -> Variant:
        """The variant whose coefficients apply: float16 allocates as bfloat16 does."""
        return replace(self, precision="bfloat16") if self.precision == "float16" else self


@dataclass(frozen=True)
class Moment:
    """An instant of a step at which its memory may be highest."""

    name: str  # such as "backward of the last layer"
    bytes: dict[str, tuple[float, ...]]  # kind -> one coefficient for each of SIZES

    def at(self, sizes: tuple[float, ...]) -> dict[str, int]:
        """Bytes of each kind for these sizes."""
        return {
            kind: round(max(0.0, sum(a * b for a, b in zip(form, sizes, strict=True))))
            for kind, form in ((kind, self.bytes.get(kind, _ZERO)) for kind in KINDS)
        }


_ZERO = (0.0,) * len(SIZES)


@dataclass(frozen=True)
class Coefficients:
    """What the memory of training a model depends on."""

    layers: int
    kept: int  # numbers that are never packed: embeddings, head, norms, biases, towers
    packed: int  # numbers that 4-bit loading packs
    packed_modules: int  # linear layers that hold them
    buffers: int  # bytes of tensors that are not weights
    adapters: dict[str, int]  # by projection: numbers for each unit of rank, in all layers
    moments: dict[Variant, tuple[Moment, ...]]


def measures(*, tokens: int, rows: int, rank: int, tile: int = TILE_ROWS) -> tuple[float, ...]:
    """The sizes of a step, in the order of SIZES; `tile` is the most tokens scored at once."""
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


@cache  # read once: the operator plans by the hundred
def preset_coefficients(name: str) -> Coefficients | None:
    """The coefficients of the preset `name`; None for one without."""
    record = examined(name)
    return from_json(record) if "moments" in record else None


def to_json(coefficients: Coefficients) -> dict[str, Any]:
    """JSON for `from_json`; coefficients of zero are left out."""
    record = {field.name: getattr(coefficients, field.name) for field in fields(coefficients)}
    entries = [
        {k: v for k, v in asdict(variant).items() if v or k != "tiled"}  # of a later version
        | {"moments": [_moment_to_json(moment) for moment in moments]}
        for variant, moments in coefficients.moments.items()
    ]
    return record | {"moments": entries}


def _moment_to_json(moment: Moment) -> dict[str, Any]:
    return {"name": moment.name} | {
        kind: {size: _short(value) for size, value in zip(SIZES, values, strict=True) if value}
        for kind, values in moment.bytes.items()
    }


def _short(value: float) -> float:
    return int(value) if value == int(value) else value


def from_json(record: dict[str, Any]) -> Coefficients:
    """The coefficients in a record of `to_json`."""
    moments = {}
    for entry in record["moments"]:
        variant = Variant(**{k: v for k, v in entry.items() if k != "moments"})
        moments[variant] = tuple(_moment(value) for value in entry["moments"])
    known = {field.name: record[field.name] for field in fields(Coefficients)}
    return Coefficients(**(known | {"moments": moments}))


def _moment(record: dict[str, Any]) -> Moment:
    return Moment(
        record["name"],
        {
            kind: tuple(float(values.get(size, 0)) for size in SIZES)
            for kind, values in record.items()
            if kind != "name"
        },
    )
