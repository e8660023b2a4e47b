"""What the data becomes, as one JSON value: shape, lengths, what is cut, sample rows by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tuning.pipeline.story import Prepared

Value = dict[str, Any]

ROWS = 3
BINS = 12  # lines of the histogram at most


def summarise(prepared: Prepared, *, rows: int = ROWS) -> Value:
    """Everything the page shows, with up to `rows` sample rows; lengths are in tokens."""
    tokenised, packed, chosen = prepared.tokenised, prepared.packed, prepared.packing
    counts = tokenised["lengths"]["counts"]
    return {
        "shape": tokenised["shape"],
        "rendering": tokenised["rendering"],
        "files": tokenised["files"],
        **_mixture(tokenised, packed),
        "rows": tokenised["rows"],
        "tokens": tokenised["tokens"],
        "trained_tokens": tokenised["trained_tokens"],
        "trained_share": tokenised["trained_tokens"] / tokenised["tokens"],
        "lengths": tokenised["lengths"] | {"histogram": histogram(counts)},
        "max_length": chosen.max_length,
        "max_length_reason": chosen.reasons["max_length"],
        "longer_rows": sum(n for length, n in counts if length > chosen.max_length),
        "over_length": packed["over_length"],
        "packing": chosen.packing,
        "train": _part(packed["train"]),
        "eval": _part(packed["eval"]),
        "dropped": _sum(tokenised["dropped"], packed["dropped"]),
        "notes": list(dict.fromkeys([*tokenised["notes"], *packed["notes"]])),
        "objective": tokenised.get("objective", "sft"),
        "samples": prepared.samples[: rows * (2 if tokenised.get("objective") == "dpo" else 1)],
    }


def _mixture(tokenised: Value, packed: Value) -> Value:
    """The parts of a mixture with their shares of the trained tokens, if there is one."""
    if "sources" not in tokenised:
        return {}
    whole = tokenised["trained_tokens"]
    return {
        "sources": [
            each | {"trained_share": each["trained_tokens"] / whole, "held_out": held}
            for each, held in zip(tokenised["sources"], packed["held_out"], strict=True)
        ]
    }


def _part(part: Value | None) -> Value | None:
    return {name: value for name, value in part.items() if name != "path"} if part else None


def _sum(*counts: dict[str, int]) -> dict[str, int]:
    names = dict.fromkeys(name for count in counts for name in count)
    sums = {name: sum(count.get(name, 0) for count in counts) for name in names}
    return {name: count for name, count in sums.items() if count}


def histogram(counts: Sequence[Sequence[int]]) -> list[list[int]]:
    """[[first, last, rows], ...]: bins of one round width that cover every length.

    `counts` are [length, rows] pairs.
    """
    low, high = min(n for n, _ in counts), max(n for n, _ in counts)
    width = next(w for w in _round_numbers() if high // w - low // w < BINS)
    bins = dict.fromkeys(range(low // width, high // width + 1), 0)
    for length, rows in counts:
        bins[length // width] += rows
    return [[i * width, (i + 1) * width - 1, rows] for i, rows in bins.items()]


def _round_numbers() -> Iterator[int]:
    scale = 1
    while True:
        yield from (scale, 2 * scale, 5 * scale)
        scale *= 10
