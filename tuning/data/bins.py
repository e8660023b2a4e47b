"""Best-fit-decreasing bin packing over lengths, not rows.

Bins that hold the same lengths are kept as one pattern with a count, so the work depends on the
number of different lengths and not on the number of rows: ten million rows take as long as a
thousand. Pure Python: the parent process uses it to plan.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable


def pack(counts: Iterable[tuple[int, int]], *, size: int) -> list[tuple[tuple[int, ...], int]]:
    """Patterns (lengths in a bin, longest first) and how many bins look like it.

    `counts` holds (length, rows); every length lies in 1..size. No bin exceeds `size` tokens, and
    all rows are in a bin.
    """
    room: dict[int, list[tuple[tuple[int, ...], int]]] = {}  # room left -> open patterns
    rooms: list[int] = []
    pattern: tuple[int, ...]
    for length, rows in sorted(counts, reverse=True):
        assert 0 < length <= size
        while rows:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                left, pattern, bins = size, (), rows
            else:
                left = rooms[at]
                pattern, bins = room[left].pop()
                if not room[left]:
                    del room[left], rooms[at]
            each = left // length
            filled = min(bins, rows // each)
            rows -= filled * each
            parts = [(each, filled)]
            if filled < bins and rows:  # one bin takes what remains
                parts.append((rows, 1))
                filled, rows = filled + 1, 0
            if pattern:  # untouched bins stay as they are; new ones are made only for rows
                parts.append((0, bins - filled))
            for taken, number in parts:
                if number:
                    rest = left - taken * length
                    if rest not in room:
                        insort(rooms, rest)
                        room[rest] = []
                    room[rest].append((pattern + (length,) * taken, number))
    return [found for patterns in room.values() for found in patterns]


def packed_rows(counts: Iterable[tuple[int, int]], *, max_length: int) -> int:
    """How many packed rows of at most `max_length` tokens there will be.

    Longer rows count as cut to `max_length`.
    """
    short: dict[int, int] = {}
    for length, rows in counts:
        kept = min(length, max_length)
        short[kept] = short.get(kept, 0) + rows
    return sum(number for _, number in pack(short.items(), size=max_length))
