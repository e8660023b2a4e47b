"""The ways to train a family on a card, and a few of them that cover every pair of choices."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass

import tiny_models

FAMILIES = (
    *tiny_models.FAMILIES,
    *tiny_models.MORE_FAMILIES,
    *tiny_models.VISION_FAMILIES,
)
# Of these the default run takes the usual plan only: their classes, or all but one, are others' too
BESIDE = ("falcon-new", "phi3-longrope", "phi4-mini", *tiny_models.MORE_FAMILIES)
EXPERTS = ("qwen3moe", "gptoss")  # whose routers have a softmax
CARDS = {"T4": (7, 5), "H100": (9, 0)}
SETTINGS = (("T4", "float16"), ("H100", "bfloat16"), ("H100", "float16"))
ATTENTIONS = ("planned", "sdpa", "eager")


@dataclass(frozen=True)
class Way:
    """A way to train a family."""

    family: str
    method: str
    card: str
    precision: str
    attention: str  # "planned", or one that the config asks for
    checkpointing: bool
    fused: bool

    @property
    def name(self) -> str:
        """For people, and the file of counts."""
        flags = [name for name in ("checkpointing", "fused") if getattr(self, name)]
        parts = (self.family, self.method, self.card, self.precision, self.attention, *flags)
        return " ".join(parts)


def every() -> Iterator[Way]:
    """All that a plan or a config can choose."""
    both = (True, False)
    for family, method, (card, precision), attention, checkpointing, fused in itertools.product(
        FAMILIES, ("lora", "qlora"), SETTINGS, ATTENTIONS, both, both
    ):
        if family in ("gptoss", "gemma2") and attention == "sdpa":  # sinks, capped scores
            continue
        yield Way(family, method, card, precision, attention, checkpointing, fused)


def usual(family: str) -> Way:
    """What is planned for a card of these years, where no key says otherwise."""
    return Way(family, "qlora", "H100", "bfloat16", "planned", checkpointing=True, fused=True)


def covering(ways: Iterable[Way]) -> list[Way]:
    """Some of `ways`, such that every pair of two choices that any of them has is in one.

    Each family's usual plan is among them; of those BESIDE nothing else.
    """
    ways = tuple(ways)
    chosen = [way for way in ways if way == usual(way.family)]
    pairs = {way: _pairs(way) for way in ways if way.family not in BESIDE}
    missing = set().union(*pairs.values()).difference(*map(_pairs, chosen))
    while missing:
        best = max(pairs, key=lambda way: len(pairs[way] & missing))  # the first of equals
        missing -= pairs[best]
        chosen.append(best)
    return sorted(chosen, key=lambda way: way.name)


def _pairs(way: Way) -> set[tuple[object, ...]]:
    values = astuple(way)
    singles = [*enumerate(values), ("setting", (way.card, way.precision))]
    return set(itertools.combinations(singles, 2))
