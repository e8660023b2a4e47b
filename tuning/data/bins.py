"""Best-fit-decreasing bin packing over lengths, not rows.

Bins with the same lengths are one pattern with a count, so that the work depends on the number of
different lengths and not on the number of rows: ten million rows take as long as a thousand.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable


def pack(counts: Iterable[tuple[int, int]], *, size: int) -> list[tuple[tuple[int, ...], int]]:
    """Patterns (lengths in a bin, longest first), each with its number of bins.

    `counts` holds (length, rows) with lengths in 1..size. No bin exceeds `size` tokens, and every
    row is in a bin.
    """
    by_space: dict[int, list[tuple[tuple[int, ...], int]]] = {}  # free space -> patterns
    spaces: list[int] = []  # the keys, sorted
    pattern: tuple[int, ...]
    for length, rows in sorted(counts, reverse=True):
        assert 0 < length <= size
        while rows:
            at = bisect_left(spaces, length)
            if at == len(spaces):
                space, pattern, bins = size, (), rows
            else:
                space = spaces[at]
                pattern, bins = by_space[space].pop()
                if not by_space[space]:
                    del by_space[space], spaces[at]
            per_bin = space // length
            filled = min(bins, rows // per_bin)
            rows -= filled * per_bin
            parts = [(per_bin, filled)]
            if filled < bins and rows:  # one bin takes the remaining rows
                parts.append((rows, 1))
                filled, rows = filled + 1, 0
            if pattern:  # other bins stay unchanged; without a pattern they do not exist
                parts.append((0, bins - filled))
            for added, number in parts:
                if number:
                    rest = space - added * length
                    if rest not in by_space:
                        insort(spaces, rest)
                        by_space[rest] = []
                    by_space[rest].append((pattern + (length,) * added, number))
    return [entry for patterns in by_space.values() for entry in patterns]
