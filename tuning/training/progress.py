"""Progress of a run: counters over all its processes, metrics.jsonl, and when to save and stop."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from tuning.errors import DivergedError
from tuning.models.activations import arrange
from tuning.training import checkpoint

if TYPE_CHECKING:
    from tuning.training.trainer import Exact


SHOWN_ROWS = 16  # of a step that went wrong


@dataclass
class Progress:
    """What a run has done so far, over all its processes. Stored in checkpoints."""

    tokens: int = 0  # read by the model, padding left out
    seconds: float = 0.0  # of training
    held_out_before: float | None = None  # loss on the evaluation split before the first step
    rewards_before: dict[str, float | None] = field(default_factory=dict)  # accuracy and margin
    evaluated: int = 0  # the last step after which the evaluation split was evaluated
    best_step: int | None = None  # whose weights had the lowest evaluation loss
    best_loss: float | None = None
    better_step: int | None = None  # whose loss was the last that counts for early stopping
    waited: int = 0  # evaluations since
    skipped: int = 0  # steps whose float16 gradient overflowed, after which no weight changed


class Over(Exception):
    """An evaluation that was made up for has ended the training."""


@dataclass(frozen=True)
class Saves:
    """Where checkpoints go, and when: every `steps`, every `seconds`, on a stop request."""

    root: Path
    seconds: float = 600.0
    steps: int | None = None
    asked: Callable[[], bool] = lambda: False  # whether to stop
    check: Callable[[], None] = lambda: None  # raises Stopped if so


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Reports each step, saves when due, and stops on request."""

    def __init__(self, trainer: Exact) -> None:
        self.trainer = trainer
        self.begun = self.saved = time.monotonic()
        self.seconds_before, self.tokens_before, self.step_before = 0.0, 0, 0
        self.epoch_step = 0  # at which the epoch began, or the resumed part of it

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Arrange activations, start the clocks, make up for an evaluation that was interrupted."""
        arrange(self.trainer.model, self.trainer.activations)  # now that checkpointing is enabled
        self.begun = self.saved = time.monotonic()
        progress = self.trainer.progress
        self.seconds_before, self.tokens_before = progress.seconds, progress.tokens
        self.step_before = state.global_step
        due = args.eval_steps and state.global_step and state.global_step % args.eval_steps == 0
        if due and progress.evaluated < state.global_step:
            self.trainer.evaluate()
            if self.trainer.is_over:  # before another step
                raise Over

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Capture random state: an epoch draws a number before its first step.

        accelerate 1.15 does not tell the order of several ranks in which epoch a resumed run is.
        """
        if self.trainer.order is not None:
            self.trainer.order.set_epoch(int(state.epoch + 1e-6))
        self.trainer.random = checkpoint.capture_random()
        self.epoch_step = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Capture random state, in case this step is not finished."""
        trainer = self.trainer
        trainer.rows, trainer.loss_so_far, trainer.tokens_so_far = [], 0.0, 0
        trainer.step_sums = 0.0
        if state.global_step > self.epoch_step:
            trainer.random = checkpoint.capture_random()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """On a stop request within a step, save the step before it."""
        if self.trainer.saves.asked():
            control.should_training_stop = True
            self.trainer.save_last(self.trainer.random)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let accelerate know of a step that overflowed: the learning rate waits for the next.

        It asks whether `step` was called, and a fused optimizer's is, which then does nothing.
        """
        if self.trainer.half:
            self.trainer.optimizer._is_overflow = self.trainer.overflowed

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what the step did; request a save when one is due."""
        trainer, saves, now = self.trainer, self.trainer.saves, time.monotonic()
        trainer.first_step_at = trainer.first_step_at or now
        trainer.progress.tokens += round(trainer.ranks.sum(trainer.tokens_so_far)[0])
        trainer.progress.seconds = self.seconds_before + now - self.begun
        trainer.progress.skipped += trainer.overflowed
        if saves.asked():
            control.should_training_stop = True
        late = trainer.ranks.from_first(now - self.saved >= saves.seconds)
        due = late or (saves.steps is not None and state.global_step % saves.steps == 0)
        if due or control.should_training_stop:
            control.should_save = True
            self.saved = now

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Append the step's record to metrics.jsonl."""
        if "loss" in logs:
            self._write(self._record(state, logs))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **kwargs: Any
    ) -> None:
        """Append the step's record again, with the evaluation loss."""
        if not self.trainer.is_in_train:
            return
        loss = self.trainer.ranks.from_first(finite(metrics["eval_loss"]))
        self.trainer.record_evaluation(loss)
        stopped = {}
        if self.trainer.is_over and state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True
            stopped = {"no_better_since": self.trainer.progress.better_step}
        last = next((entry for entry in reversed(state.log_history) if "loss" in entry), None)
        if last is not None:
            rewards = {k: finite(v) for k, v in metrics.items() if k.startswith("eval_reward")}
            self._write(self._record(state, last) | {"eval_loss": loss} | rewards | stopped)

    def _record(self, state: Any, logs: dict[str, Any]) -> dict[str, Any]:
        progress = self.trainer.progress
        seconds = max(progress.seconds - self.seconds_before, 1e-9)
        steps_done = max(state.global_step - self.step_before, 1)
        return {
            "step": state.global_step,
            "steps": state.max_steps,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens": progress.tokens,
            "tokens_per_second": (progress.tokens - self.tokens_before) / seconds,
            "eta_seconds": (state.max_steps - state.global_step) * seconds / steps_done,
            "memory_bytes": peak_memory(self.trainer.args.device.type),
            **self.trainer.step_summary(),
        }

    def _write(self, record: dict[str, Any]) -> None:
        if not self.trainer.ranks.first:
            return
        with self.trainer.metrics.open("ab") as file:
            file.write(checkpoint.pack_json(record) + b"\n")


def diverged(code: str, fact: str, trainer: Exact) -> DivergedError:
    """The error that the training went wrong in this step, with its rows."""
    shown = ", ".join(str(row) for row in trainer.rows[:SHOWN_ROWS])
    if (more := len(trainer.rows) - SHOWN_ROWS) > 0:
        shown += f" and {more} more"
    packed = "packed " if trainer.recipe.packing else ""
    change = "lower learning_rate, or look at these rows"
    if not trainer.state.global_step:
        change = "look at these rows or the base model: no weight had changed yet"
    return DivergedError.at(
        code,
        f"step {trainer.state.global_step + 1}",
        f"{fact} at learning rate {trainer._get_learning_rate():.3g}, "
        f"with {packed}training rows {shown}",
        change,
    )


def finite(value: float) -> float | None:
    """`value`, or None for NaN and infinity, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def peak_memory(device: str) -> int:
    """Peak memory of this process in bytes: GPU allocations on `cuda`, else resident size."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
