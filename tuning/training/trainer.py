"""trl's SFTTrainer, made to keep promises.

- State goes to `checkpoint.py` and comes back bit for bit; nothing is pickled.
- A signal stops between two micro-batches. What an unfinished optimizer step has done is dropped,
  and the state saved is that of the last finished one: random numbers are taken from before it.
- A loss or gradient that is not finite stops before the weights change.
- fp16 runs with loss scaling by the same code on a CPU and on a GPU, so that it is tested.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import resource
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from trl import SFTConfig, SFTTrainer

from tuning.errors import DivergedError
from tuning.models.kernels import head
from tuning.plan import Recipe
from tuning.plan.backends import HEAD, VARLEN
from tuning.training import checkpoint
from tuning.training.batches import IGNORED, NOTED, ROW, Numbered, Order, numbered
from tuning.training.checkpoint import Checkpoint
from tuning.training.distributed import Ranks
from tuning.training.evaluation import Best

SHOWN_ROWS = 16


@dataclass
class Progress:
    """What a run has done so far, over all its processes."""

    tokens: int = 0  # read by the model, padding left out
    seconds: float = 0.0  # of training
    held_out_before: float | None = None  # loss on the eval rows before the first step
    evaluated: int = 0  # the last step after which the eval rows were looked at
    best_step: int | None = None  # whose weights had the lowest loss on the eval rows
    best_loss: float | None = None


@dataclass(frozen=True)
class Saves:
    """Where checkpoints go, and when: every `steps`, every `seconds`, when `asked` to stop."""

    root: Path
    seconds: float = 600.0
    steps: int | None = None
    asked: Callable[[], bool] = lambda: False
    check: Callable[[], None] = lambda: None  # raises Stopped if asked


class Exact(SFTTrainer):  # type: ignore[misc]
    """Trains a model with LoRA layers on tokenised rows, and goes on after any kill."""

    def __init__(
        self,
        tuned: Any,
        tokenizer: Any,
        *,
        rows: datasets.Dataset,
        held_out: datasets.Dataset | None,
        recipe: Recipe,
        arguments: SFTConfig,
        metrics: Path,
        saves: Saves,
        kernels: Collection[str] = (),
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.recipe, self.saves, self.metrics = recipe, saves, metrics
        self.progress = Progress()
        self.rows: list[int] = []  # of the optimizer step under way
        self.loss_so_far: torch.Tensor | float = 0.0  # the same
        self.tokens_so_far = 0  # the same
        self.filler = False  # the micro-batch under way only fills a rank's turn
        self.random: dict[str, Any] = {}  # before the optimizer step under way
        self.saved_at = 0  # step
        self.best = Best()
        self.first_step_at: float | None = None  # end of this process's first one, time.monotonic
        super().__init__(
            model=tuned,
            args=arguments,
            train_dataset=numbered(rows, ranks=self.ranks.count).with_format("numpy"),
            eval_dataset=held_out.with_format("numpy") if held_out is not None else None,
            processing_class=tokenizer,
            callbacks=[Watch(self)],
        )
        self.remove_callback(transformers.PrinterCallback)
        base = tuned.get_base_model()
        self.one_pass = HEAD in kernels and head.suits(base)
        self._scored: torch.Tensor | None = None  # (loss, labelled tokens) of an evaluation
        if self.one_pass:
            head.install(base)
        by_document = base.config._attn_implementation == VARLEN
        self.data_collator: Any = Numbered(self.data_collator, by_document=by_document)
        # trl makes a quantised model's adapter bf16, which fp16 cards lack and fp32 does not want
        if recipe.precision != "bfloat16":
            for parameter in self.trained().values():
                parameter.data = parameter.data.float()
        self.half = recipe.precision == "float16"
        if self.half:
            self.accelerator.scaler = torch.amp.GradScaler(self.args.device.type)

    def fit(self, resumed: Checkpoint | None) -> None:
        """Train to the last step, from `resumed` if there is one."""
        if resumed is None:
            self.progress.held_out_before = self.held_out_loss()
            # evaluating marked the model as prepared; the ranks' gradients would never meet
            self.model._is_accelerate_prepared = False
            self.accelerator._models.clear()
            with _settled():
                self.train()
            return
        self.saved_at = resumed.step
        self.progress = Progress(**json.loads(resumed.read("state.json"))["progress"])
        if self.progress.best_step is not None:
            weights = checkpoint.unpack_tensors(resumed.read("best.safetensors"))
            self.best = Best(self.progress.best_step, self.progress.best_loss, weights)
        if resumed.step < self.recipe.steps:
            with _settled():
                self.train(resume_from_checkpoint=str(resumed.folder))
        else:
            self._load_from_checkpoint(str(resumed.folder))
            state = resumed.folder / "trainer_state.json"
            self.state = transformers.TrainerState.load_from_json(str(state))

    def held_out_loss(self) -> float | None:
        """Mean loss on the eval rows; None if there are none, or it is not finite."""
        if self.eval_dataset is None:
            return None
        return _finite(self.evaluate()["eval_loss"])

    def keep_best(self) -> None:
        """Put the weights with the lowest held-out loss in place of the last ones."""
        if self.progress.evaluated < self.state.global_step:
            self.see(self.held_out_loss())
        self.best.put(self.trained())

    def see(self, loss: float | None) -> None:
        """The eval rows were looked at after the step that is done."""
        self.progress.evaluated = self.state.global_step
        if self.recipe.keep_best:
            self.best.see(self.state.global_step, loss, self.trained())
            self.progress.best_step, self.progress.best_loss = self.best.step, self.best.loss

    def losses(self) -> list[float]:
        """The loss of each step, first to last."""
        return [float(entry["loss"]) for entry in self.state.log_history if "loss" in entry]

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    # Saving and going on: each method replaces one of the Trainer's that pickles.

    def save(self, random: Mapping[str, Any]) -> None:
        """Write a checkpoint of the last finished optimizer step with these random numbers."""
        step = self.state.global_step
        everyone = self.ranks.gather(random)
        if self.ranks.first:
            checkpoint.save(
                self.saves.root,
                run_id=self.recipe.run_id,
                step=step,
                contents=self._contents(everyone),
            )
        self.saved_at = step

    def save_last(self, random: Mapping[str, Any]) -> None:
        """Save as `save` does, unless that step is saved already or nothing is done yet."""
        if self.is_in_train and self.state.global_step > self.saved_at:
            self.save(random)

    def _contents(self, random: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bytes]]:
        weights = self.trained()
        broken = sorted(name for name, p in weights.items() if not p.isfinite().all())
        if broken:
            what = f"{len(broken)} of {len(weights)} weights"
            raise self._diverged("TRAIN-131", f"{what} are not finite, the first {broken[0]}")
        tensors, optimizer = checkpoint.split_optimizer(self.optimizer.state_dict())
        yield "weights.safetensors", checkpoint.pack_tensors(weights)
        yield "optimizer.safetensors", checkpoint.pack_tensors(tensors)
        if self.progress.best_step is not None:
            yield "best.safetensors", checkpoint.pack_tensors(self.best.weights)
        yield "trainer_state.json", checkpoint.pack_json(asdict(self.state))
        state = {
            "optimizer": optimizer,
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.half else None,
            "random": random,
            "progress": asdict(self.progress),
        }
        yield "state.json", checkpoint.pack_json(state)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.save(checkpoint.capture_random())

    def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
        stored = checkpoint.unpack_tensors(_read(folder, "weights.safetensors"))
        weights = self.trained()
        if stored.keys() != weights.keys():
            raise AssertionError("the checkpoint holds other weights than the recipe's")
        with torch.no_grad():
            for name, parameter in weights.items():
                # not peft's loader: it makes bf16 weights float32, and the run drifts
                parameter.data = stored[name].to(parameter.device)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is None:
            return
        state = json.loads(_read(folder, "state.json"))
        tensors = checkpoint.unpack_tensors(_read(folder, "optimizer.safetensors"))
        self.optimizer.load_state_dict(checkpoint.join_optimizer(tensors, state["optimizer"]))
        self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_scaler(self, folder: str | None) -> None:
        if folder is not None and self.half:
            self.accelerator.scaler.load_state_dict(
                json.loads(_read(folder, "state.json"))["scaler"]
            )

    def _load_rng_state(self, folder: str | None) -> None:
        if folder is not None:
            everyone = json.loads(_read(folder, "state.json"))["random"]
            self.random = everyone[self.ranks.number % len(everyone)]
            checkpoint.restore_random(self.random)

    # One step.

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Forward and backward of one micro-batch, with its rows, tokens and loss noted."""
        together = isinstance(model, torch.nn.parallel.DistributedDataParallel)
        assert together or self.ranks.count == 1, "the ranks' gradients do not meet"
        self._live()
        self.rows += inputs.pop("rows")
        self.tokens_so_far += inputs.pop("tokens")
        self.filler = inputs.pop("filler")
        del inputs["weight"]
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError:
            if self.ranks.count == 1:  # else the others would have to be here, too
                self.save_last(self.random)  # the weights are still those of the last step
            raise
        self.loss_so_far = self.loss_so_far + loss
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """trl's loss, or the same by the one-pass head: a sum over what is labelled, divided."""
        if self.filler:  # through the model all the same: the ranks add up their gradients
            self.filler = False
            return 0.0 * self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        held_out = num_items_in_batch is None and not model.training
        if not self.one_pass:
            count = (inputs["labels"][:, 1:] != IGNORED).sum()
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if held_out:
                self._count(found[0] if isinstance(found, tuple) else found, count)
            return found
        labels = inputs.pop("labels")
        if num_items_in_batch is None:
            count = (labels[:, 1:] != head.IGNORED).sum()
        else:  # of the whole step, on all ranks
            count = torch.as_tensor(num_items_in_batch) / self.accelerator.num_processes
        loss = model(**inputs, scored=labels) / count.clamp(min=1)
        if held_out:
            self._count(loss, count)
        return loss

    def _count(self, loss: torch.Tensor, count: torch.Tensor) -> None:
        """Remember the loss of held-out rows as a sum over their labelled tokens."""
        counted = torch.stack([loss.detach().double() * count, count.double()])
        self._scored = counted if self._scored is None else self._scored + counted

    def _taken(self) -> torch.Tensor | None:
        found, self._scored = self._scored, None
        return found

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loss is the mean of a token, however the rows were batched: batches are no unit."""
        self._taken()
        output = super().evaluation_loop(*args, **kwargs)
        if (scored := self._taken()) is not None:
            total, count = self.accelerator.reduce(scored, "sum").tolist()
            output.metrics["eval_loss"] = total / max(count, 1.0)
        return output

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """Labelled tokens of the step; those of fillers do not count."""
        counted = [
            {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
            if batch["filler"]
            else batch
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The usual order; with several ranks, filled up so that all have as many rows."""
        if self.ranks.count == 1:
            return super()._get_train_sampler(train_dataset)
        return Order(
            len(self.train_dataset) - 1,
            at_once=self.args.per_device_train_batch_size * self.ranks.count,
            seed=self.args.data_seed if self.recipe.shuffle else None,
        )

    def _live(self) -> None:
        """A sign of life at each micro-batch, for the watchdog in the parent."""
        if self.ranks.first:
            self.metrics.touch()

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Loss of one batch of held-out rows; an evaluation may be long, so a stop ends it."""
        self._live()
        if self.saves.asked():
            self.save_last(checkpoint.capture_random())
            self.saves.check()
        kept = {name: value for name, value in inputs.items() if name not in NOTED}
        return super().prediction_step(model, kept, *args, **kwargs)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """fp16 autocast for an fp16 recipe; accelerate, which does bf16, refuses fp16 on a CPU."""
        if self.half:
            return torch.autocast(self.args.device.type, dtype=torch.float16)
        return contextlib.nullcontext()

    def _clip_grad_norm(self, model: Any) -> Any:
        self._unscale()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The gradient's norm, and the last moment to stop before the weights change."""
        if grad_norm is None:
            self._unscale()
        norm = super()._get_grad_norm(model, grad_norm)
        loss = float(self.loss_so_far)
        if not math.isfinite(loss):
            raise self._diverged("TRAIN-130", f"the loss became {loss}")
        # a scaled gradient overflows now and then; the scaler skips the step and scales less
        skips = self.half and self.accelerator.scaler.get_scale() > 1
        if not math.isfinite(float(norm)) and not skips:
            raise self._diverged("TRAIN-130", f"the gradient's norm became {float(norm)}")
        return norm

    def _unscale(self) -> None:
        if self.half:
            self.accelerator.scaler.unscale_(self.optimizer.optimizer)

    def _diverged(self, code: str, what: str) -> DivergedError:
        rows = ", ".join(str(row) for row in self.rows[:SHOWN_ROWS])
        more = f" and {len(self.rows) - SHOWN_ROWS} more" if len(self.rows) > SHOWN_ROWS else ""
        packed = "packed " if self.recipe.packing else ""
        return DivergedError.at(
            code,
            f"step {self.state.global_step + 1}",
            f"{what} at learning rate {self._get_learning_rate():.3g}, "
            f"with {packed}training rows {rows}{more}",
            "lower learning_rate, or look at these rows",
        )

    # What the Trainer says.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep a log entry; a number that is not finite becomes None, so that JSON can hold it."""
        super().log({name: _finite(value) for name, value in logs.items()}, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "seq_lengths", ROW]

    def _send_telemetry(self) -> None:
        """We phone nobody."""


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Reports each step, saves in time, and stops when asked."""

    def __init__(self, trainer: Exact) -> None:
        self.trainer = trainer
        self.begun = self.saved = time.monotonic()
        self.seconds_before, self.tokens_before, self.step_before = 0.0, 0, 0
        self.epoch_step = 0  # at which the epoch began, or the resumed part of it

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clocks."""
        self.begun = self.saved = time.monotonic()
        progress = self.trainer.progress
        self.seconds_before, self.tokens_before = progress.seconds, progress.tokens
        self.step_before = state.global_step
        due = args.eval_steps and state.global_step and state.global_step % args.eval_steps == 0
        if due and progress.evaluated < state.global_step:  # stopped between a step and its look
            self.trainer.evaluate()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch draws a random number before its first step."""
        self.trainer.random = checkpoint.capture_random()
        self.epoch_step = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember where the random numbers stand, should this step not end."""
        trainer = self.trainer
        trainer.rows, trainer.loss_so_far, trainer.tokens_so_far = [], 0.0, 0
        if state.global_step > self.epoch_step:
            trainer.random = checkpoint.capture_random()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asked to stop in the middle of a step: save the one before."""
        if self.trainer.saves.asked():
            control.should_training_stop = True
            self.trainer.save_last(self.trainer.random)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what the step did; ask for a save when one is due."""
        trainer, saves, now = self.trainer, self.trainer.saves, time.monotonic()
        trainer.first_step_at = trainer.first_step_at or now
        trainer.progress.tokens += round(trainer.ranks.sum(trainer.tokens_so_far)[0])
        trainer.progress.seconds = self.seconds_before + now - self.begun
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
        """Say the step's record again, with the loss on the held-out rows."""
        if self.trainer.is_in_train:
            self.trainer.see(_finite(metrics["eval_loss"]))
        last = next((entry for entry in reversed(state.log_history) if "loss" in entry), None)
        if last is not None and self.trainer.is_in_train:
            self._write(self._record(state, last) | {"eval_loss": _finite(metrics["eval_loss"])})

    def _record(self, state: Any, logs: dict[str, Any]) -> dict[str, Any]:
        progress = self.trainer.progress
        seconds = max(progress.seconds - self.seconds_before, 1e-9)
        done = max(state.global_step - self.step_before, 1)
        return {
            "step": state.global_step,
            "steps": state.max_steps,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens": progress.tokens,
            "tokens_per_second": (progress.tokens - self.tokens_before) / seconds,
            "eta_seconds": (state.max_steps - state.global_step) * seconds / done,
            "memory_bytes": peak_memory(self.trainer.args.device.type),
        }

    def _write(self, record: dict[str, Any]) -> None:
        if not self.trainer.ranks.first:
            return
        with self.trainer.metrics.open("ab") as file:
            file.write(checkpoint.pack_json(record) + b"\n")


@contextlib.contextmanager
def _settled() -> Iterator[None]:
    """Inside, the cycle collector leaves alone what is there.

    Libraries and model are a million objects, walked for a quarter of a second each time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def peak_memory(device: str) -> int:
    """The most memory this process has held so far, in bytes: GPU allocations, or resident."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _read(folder: str, name: str) -> bytes:
    return (Path(folder) / name).read_bytes()
