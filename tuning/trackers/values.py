"""What goes to a tracker: a run's identity, and points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Key = tuple[int, int]  # step, and 1 for the evaluation after it: the order of metrics.jsonl
Ending = Literal["finished", "failed", "stopped"]
BEFORE: Key = (0, -1)  # nothing was sent

# Of a record in metrics.jsonl -> its name in transformers' reports. The loss is the last of a step:
# a tracker that has it has the others.
NAMES = {
    "epoch": "epoch",
    "lr": "learning_rate",
    "grad_norm": "grad_norm",
    "tokens": "tokens",
    "tokens_per_second": "tokens_per_second",
    "memory_bytes": "memory_bytes",
    "loss": "loss",
}


_NUMBERS = (int, float)


class Failed(Exception):
    """A tracker took nothing, for the reason in the text; another try may succeed."""


@dataclass(frozen=True)
class Point:
    """Numbers of one step: of the training, or of the evaluation after it."""

    step: int
    values: dict[str, float]
    evaluation: bool = False

    @property
    def key(self) -> Key:
        """Its place in the order of metrics.jsonl."""
        return self.step, int(self.evaluation)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Point:
        """The point of a record in metrics.jsonl; numbers that are null are left out."""
        evaluation = "eval_loss" in record
        names = {"eval_loss": "eval_loss"} if evaluation else NAMES
        found: dict[str, Any] = {name: record.get(key) for key, name in names.items()}
        values = {name: float(value) for name, value in found.items() if type(value) in _NUMBERS}
        return cls(record["step"], values, evaluation)

    def grouped(self) -> dict[str, float]:
        """The values as W&B, Trackio and TensorBoard group them: train/loss, eval/loss."""
        return {
            f"eval/{name.removeprefix('eval_')}" if self.evaluation else f"train/{name}": value
            for name, value in self.values.items()
        }


@dataclass(frozen=True)
class Identity:
    """What names a run at a tracker."""

    identity: str  # equal at each start of the same run
    name: str  # for people
    project: str | None
    facts: dict[str, Any]  # the recipe
    run_dir: Path


class Tracker(Protocol):
    """An open run at a tracker. Each method raises Failed, or what its client raises."""

    id: str | None  # the tracker's own name of the run, if it gives one
    link: str | None  # page of the run
    sent: Key | int | None  # the last point that it has, or its step; None if it cannot say

    def send(self, points: Sequence[Point]) -> None:
        """Add points, which are in order and after `sent`."""

    def close(self, ending: Ending, facts: dict[str, Any]) -> None:
        """End the run with what is known at the end."""
