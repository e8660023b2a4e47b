"""Whether and how a model is adapted: one value that plan, check, the operator and a run share.

`models.survey` finds it on the model itself; without torch it is read from a table of presets.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tuning.presets import Class
from tuning.presets.load import examined

CHANGE_MODEL = "choose a text model from `python -m tuning presets`"
ENOUGH = 0.98  # of the layers' weights within reach


@dataclass(frozen=True)
class Left:
    """Weights that are neither adapted nor packed, and why."""

    name: str  # with * for the number of a layer
    count: int
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What LoRA reaches in a model. Counts are of the whole model at its real size."""

    linears: int  # linear layers
    matrices: int  # of experts
    share: float  # of the weights in repeated layers, without routers and the like
    left: tuple[Left, ...] = ()
    attention: tuple[str, ...] = ("sdpa", "eager")  # implementations that its class has
    refused: str = ""  # why such a model cannot be trained at all

    def text(self) -> str:
        """For the plan: what is adapted and what is left."""
        parts = [f"{self.linears:,} projections"] if self.linears else []
        if self.matrices:
            parts.append(f"{self.matrices:,} expert matrices")
        reasons: dict[str, int] = {}
        for left in self.left:
            reasons[left.reason] = reasons.get(left.reason, 0) + left.count
        kept = "; ".join(f"{reason} ({count})" for reason, count in reasons.items())
        return ", ".join(parts) + (f"; leaves {kept}" if kept else "")

    def refusal(self, *, dora: bool, kind: Class | None = None) -> tuple[str, str] | None:
        """Why such a model is not trained and what to change; None if it is.

        Of a tiny model small parts are a large share: then that of its class's real size counts.
        """
        share = max(self.share, kind.share if kind and kind.reach else 0.0)
        if self.refused:
            return self.refused, CHANGE_MODEL
        out_of_reach = [left.name for left in self.left if left.reason in OUT_OF_REACH]
        if not self.linears + self.matrices:
            return "has no linear layer in repeated blocks, which LoRA would adapt", CHANGE_MODEL
        if share < ENOUGH:
            reason = f"keeps {1 - share:.0%} of its layers' weights out of LoRA's reach"
            return f"{reason} ({', '.join(out_of_reach[:3])})", CHANGE_MODEL
        if dora and self.matrices:
            return "is a mixture of experts, for which peft has no DoRA", "set use_dora: false"
        return None


SPECIAL = "computes in its own way, which LoRA does not follow"
TENSOR = "a tensor of its own, in no linear layer"
OUT_OF_REACH = frozenset({SPECIAL, TENSOR})


def of_preset(name: str) -> Verdict | None:
    """The verdict on the preset `name`, made when it was added; None for one without a file."""
    record = examined(name).get("verdict")
    return record and from_json(record)


def to_json(verdict: Verdict) -> dict[str, Any]:
    """JSON for `from_json`."""
    return asdict(verdict)


def from_json(record: dict[str, Any]) -> Verdict:
    """The verdict in a record of `to_json`."""
    left = tuple(Left(**one) for one in record["left"])
    return Verdict(**record | {"left": left, "attention": tuple(record["attention"])})
