"""Statistics of the rows read so far. Statistics of parts add up in the order of the parts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from tuning.data.encode import Encoded

MAX_SAMPLES = 20


@dataclass
class Statistics:
    """Counts, and the first rows."""

    seen: int = 0  # rows read, including those that are left out
    rows: int = 0  # rows kept
    tokens: int = 0
    trained: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)  # columns and keys that look intentional
    samples: list[tuple[str, Encoded]] = field(default_factory=list)  # (place, row)

    def count(
        self, rows: Sequence[Encoded], place: Callable[[int], str], *, width: int = 1
    ) -> None:
        """Count what is trained on; `place` names the n-th of `rows`, of which `width` are one."""
        self.rows += len(rows) // width
        sizes = [len(row.ids) for row in rows]
        self.lengths.update(sizes)
        self.tokens += sum(sizes)
        for row in rows:
            bounds = row.trained
            self.trained += sum(bounds[1::2]) - sum(bounds[::2]) - (bounds[0] == 0)
        sampled = rows[: MAX_SAMPLES - len(self.samples)]
        self.samples += [(place(number), row) for number, row in enumerate(sampled)]

    def add(self, other: Statistics) -> None:
        """Add the statistics of the following rows."""
        for each in ("seen", "rows", "tokens", "trained"):
            setattr(self, each, getattr(self, each) + getattr(other, each))
        for each in ("lengths", "dropped", "notes", "unread"):
            getattr(self, each).update(getattr(other, each))
        self.samples += other.samples[: MAX_SAMPLES - len(self.samples)]

    def length_distribution(self) -> dict[str, Any]:
        """Lengths in tokens of rows (of a pair, each answer): mean, quantiles, exact counts."""
        lengths = sorted(self.lengths)
        ends = np.cumsum([self.lengths[length] for length in lengths])

        def quantile(share: float) -> int:
            row = math.ceil(share * (int(ends[-1]) - 1))
            return lengths[int(np.searchsorted(ends, row, side="right"))]

        return {
            "mean": round(self.tokens / int(ends[-1]), 1),
            "p50": quantile(0.5),
            "p95": quantile(0.95),
            "max": lengths[-1],
            "counts": [[length, self.lengths[length]] for length in lengths],
        }

    def to_json(self) -> dict[str, Any]:
        """For the result of a child process; `from_json` is the inverse."""
        return {each.name: getattr(self, each.name) for each in fields(self)} | {
            "lengths": sorted(self.lengths.items()),
            "samples": [[place, row.ids, row.trained] for place, row in self.samples],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Statistics:
        """The statistics that `to_json` wrote."""
        return cls(
            **record
            | {
                "lengths": Counter(dict(record["lengths"])),
                "dropped": Counter(record["dropped"]),
                "notes": Counter(record["notes"]),
                "unread": Counter(record["unread"]),
                "samples": [
                    (place, Encoded(ids, trained)) for place, ids, trained in record["samples"]
                ],
            }
        )
