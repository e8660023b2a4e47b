"""Policies for rows longer than max_length.

split      into equal parts; no token is lost (running text)
truncate   keeps answers: drops whole turns at the end, else cuts the prompt from the left; only
           an answer that is too long by itself loses its end
drop       leaves the row out
refuse     raises an error
auto       split where every token is trained, truncate elsewhere
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Policy = Literal["auto", "split", "truncate", "drop", "refuse"]


@dataclass(frozen=True)
class Piece:
    """The tokens [start, end) of a row, after its first `lead` tokens.

    Trained ranges that begin before `start` are clipped in a split text, and not trained at all in
    a truncated conversation: half an answer without its question teaches nothing.
    """

    row: int
    start: int
    end: int
    lead: int = 0
    clip: bool = True


def pieces(
    row: int, trained: Sequence[int], *, length: int, max_length: int, policy: Policy, lead: int
) -> list[Piece]:
    """The pieces of a row of `length` > `max_length` tokens; none if it is dropped.

    `trained` holds flat [start, end) pairs; the first `lead` tokens begin every sequence (BOS).
    """
    whole = list(trained) == [0, length]
    if policy == "drop":
        return []
    if policy == "split" or (policy == "auto" and whole):
        return _split(row, length, max_length)
    return [_truncate(row, trained, max_length, lead)]


def _split(row: int, length: int, max_length: int) -> list[Piece]:
    number = -(-length // max_length)
    cuts = [length * part // number for part in range(number + 1)]
    return [Piece(row, a, b) for a, b in pairwise(cuts)]


def _truncate(row: int, trained: Sequence[int], max_length: int, lead: int) -> Piece:
    whole_turns = [end for end in trained[1::2] if end <= max_length]
    if whole_turns:
        return Piece(row, 0, whole_turns[-1])
    start, end = trained[-2:]
    capacity = max_length - lead
    prompt = min(start, max_length // 4)
    if end - start + prompt <= capacity:
        return Piece(row, end - capacity, end, lead, clip=False)
    first = start - prompt
    if first <= lead:
        return Piece(row, 0, max_length)
    return Piece(row, first, first + capacity, lead, clip=False)


def pair_pieces(
    row: int, trained: Sequence[Sequence[int]], lengths: Sequence[int], max_length: int, lead: int
) -> list[Piece]:
    """The pieces of the documents `row` and `row + 1`, two answers that keep the same prompt.

    What is left out is the beginning of the prompt, and the ends of answers that are too long.
    """
    capacity, begin = max_length - lead, min(ranges[0] for ranges in trained)
    kept = min(begin, max_length // 4)
    first = min(max(lengths) - capacity, begin - kept)
    if first <= lead:
        return [Piece(row + n, 0, min(length, max_length)) for n, length in enumerate(lengths)]
    ends = [min(length, first + capacity) for length in lengths]
    return [Piece(row + n, first, end, lead) for n, end in enumerate(ends)]


def losses(piece: Piece, trained: Sequence[int]) -> tuple[int, int]:
    """How many trained ranges of a row a single `piece` leaves out, and how many it shortens."""
    lost = shortened = 0
    for start, end in zip(trained[::2], trained[1::2], strict=True):
        unclipped = start < piece.start and not piece.clip
        is_lost = unclipped or start >= piece.end or end <= piece.start
        lost += is_lost
        shortened += not is_lost and (end > piece.end or start < piece.start)
    return lost, shortened
