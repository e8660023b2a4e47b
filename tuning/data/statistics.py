"""What was found in the rows so far. Tallies of parts add up in the order of the parts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tuning.data.encode import Encoded

SAMPLES = 20


@dataclass
class Tally:
    """Counts, and the first rows."""

    seen: int = 0  # rows that were read, whatever became of them
    rows: int = 0  # that are kept
    tokens: int = 0
    trained: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[str, Encoded]] = field(default_factory=list)  # where, row

    def keep(self, rows: Sequence[Encoded], where: Callable[[int], str]) -> None:
        """Count rows that are trained on; `where` names the place of the n-th of them."""
        self.rows += len(rows)
        sizes = [len(row.ids) for row in rows]
        self.lengths.update(sizes)
        self.tokens += sum(sizes)
        for row in rows:
            marks = row.trained
            self.trained += sum(marks[1::2]) - sum(marks[::2]) - (marks[0] == 0)
        wanted = rows[: SAMPLES - len(self.samples)]
        self.samples += [(where(number), row) for number, row in enumerate(wanted)]

    def add(self, other: Tally) -> None:
        """Count what came after."""
        self.seen += other.seen
        self.rows += other.rows
        self.tokens += other.tokens
        self.trained += other.trained
        self.lengths.update(other.lengths)
        self.dropped.update(other.dropped)
        self.notes.update(other.notes)
        self.samples += other.samples[: SAMPLES - len(self.samples)]

    def spread(self) -> dict[str, Any]:
        """How long the rows are, in tokens: mean, quantiles, and the exact counts."""
        lengths = sorted(self.lengths)
        ends = np.cumsum([self.lengths[length] for length in lengths])

        def quantile(share: float) -> int:
            row = math.ceil(share * (self.rows - 1))
            return lengths[int(np.searchsorted(ends, row, side="right"))]

        return {
            "mean": round(self.tokens / self.rows, 1),
            "p50": quantile(0.5),
            "p95": quantile(0.95),
            "max": lengths[-1],
            "counts": [[length, self.lengths[length]] for length in lengths],
        }

    def to_json(self) -> dict[str, Any]:
        """For the answer of a child; `from_json` is the way back."""
        return {
            "seen": self.seen,
            "rows": self.rows,
            "tokens": self.tokens,
            "trained": self.trained,
            "lengths": sorted(self.lengths.items()),
            "dropped": dict(self.dropped),
            "notes": dict(self.notes),
            "samples": [[where, row.ids, row.trained] for where, row in self.samples],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Tally:
        """The tally that `to_json` wrote down."""
        return cls(
            record["seen"],
            record["rows"],
            record["tokens"],
            record["trained"],
            Counter(dict(record["lengths"])),
            Counter(record["dropped"]),
            Counter(record["notes"]),
            [(where, Encoded(ids, trained)) for where, ids, trained in record["samples"]],
        )
