"""trl's SFTTrainer with exact resume, stops between micro-batches and finite checks.

- State is saved by `checkpoint` and restored bit for bit; nothing is pickled.
- A signal stops between two micro-batches. The work of an unfinished optimizer step is dropped, and
  the state saved is that of the last finished one, with the random state from before the step.
- A loss or gradient that is not finite stops before the weights change.
- fp16 with loss scaling runs the same code on a CPU and on a GPU, so that it is tested.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from trl import SFTConfig, SFTTrainer

from tuning.models import shards
from tuning.models.kernels import head, heap
from tuning.plan import Recipe
from tuning.plan.activations import ALL, Activations
from tuning.plan.backends import VARLEN
from tuning.training import checkpoint, own_head
from tuning.training.batches import IGNORED, NOTED, PLACES, ROW, Numbered, Order, filled, numbered
from tuning.training.checkpoint import Checkpoint
from tuning.training.distributed import Ranks
from tuning.training.evaluation import Best
from tuning.training.memory_errors import is_out_of_memory, release
from tuning.training.progress import Over, Progress, Saves, Watch, diverged, finite


def name_backbone(model: Any) -> None:
    """Let `base_model`, whose hidden states trl makes the loss of, be the layers of `model`.

    transformers names another attribute for Llama 4, which is not there: then it is all of `model`.
    """
    own = getattr(model, "model", None)
    if model.base_model is model and isinstance(own, transformers.PreTrainedModel):
        model.base_model_prefix = "model"


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
        ranks: Ranks | None = None,
        activations: Activations = ALL,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.recipe, self.saves, self.metrics = recipe, saves, metrics
        self.activations = activations
        self.progress = Progress()
        self.rows: list[int] = []  # of the current optimizer step
        self.loss_so_far: torch.Tensor | float = 0.0  # of the current optimizer step
        self.step_sums: torch.Tensor | float = 0.0  # the same where answers are compared
        self.held_out: dict[str, float | None] = {}  # the last evaluation, beside its loss
        self.tokens_so_far = 0  # of the current optimizer step
        self.filler = False  # the current micro-batch only fills a rank's turn
        self.overflowed = False  # the last scaled gradient: its step changes no weight
        self.random: dict[str, Any] = {}  # random state before the current optimizer step
        self.saved_at = 0  # step of the last checkpoint
        self.best = Best()
        self.order: Order | None = None  # of the rows, of several ranks
        self.first_step_at: float | None = None  # when this process ended its first, monotonic
        if held_out is not None:
            at_once = arguments.per_device_eval_batch_size * self.ranks.count
            held_out = filled(held_out, at_once=at_once if self.ranks.count > 1 else 1)
        base = tuned.get_base_model()
        packed = getattr(base, "is_loaded_in_4bit", False)
        if packed:  # trl would make the adapter bfloat16
            base.is_loaded_in_4bit = False
        name_backbone(base)
        super().__init__(
            model=tuned,
            args=arguments,
            train_dataset=numbered(rows, ranks=self.ranks.count).with_format("numpy"),
            eval_dataset=held_out.with_format("numpy") if held_out is not None else None,
            processing_class=tokenizer,
            callbacks=[Watch(self)],
        )
        if packed:
            base.is_loaded_in_4bit = True
        self.split = shards.is_split(tuned)
        if self.split:  # FSDP reduces the gradients
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = partial(prepare, evaluation_mode=True)
        self.remove_callback(transformers.PrinterCallback)
        self.one_pass = getattr(base, "one_pass", False)  # as `models.kernels.whole` found
        self._eval_sums: list[torch.Tensor] = []  # (summed loss, labelled tokens) by batch
        if self.one_pass:
            head.install(base)
        precision = getattr(torch, recipe.precision)
        self.own_head = not self.one_pass and own_head.needed(self.model, precision)
        by_document = base.config._attn_implementation == VARLEN
        self.data_collator: Any = Numbered(self.data_collator, by_document=by_document)
        self.half = recipe.precision == "float16"
        if self.half:
            self.accelerator.scaler = torch.amp.GradScaler(self.args.device.type)

    def fit(self, resumed: Checkpoint | None) -> None:
        """Train to the last step, from `resumed` if there is one."""
        if resumed is None:
            self.progress.held_out_before = self.held_out_loss()
            self.progress.rewards_before = self.held_out
            # evaluating marked the model as prepared: gradients would not be reduced over ranks
            self.model._is_accelerate_prepared = False
            self.accelerator._models.clear()
        else:
            self.saved_at = resumed.step
            self.progress = Progress(**json.loads(resumed.read("state.json"))["progress"])
            if self.progress.best_step is not None:
                weights = checkpoint.unpack_tensors(resumed.read("best.safetensors"))
                self.best = Best(self.progress.best_step, self.progress.best_loss, weights)
        if self.saved_at < self.recipe.steps and not self.is_over:
            with heap.frozen(), contextlib.suppress(Over):
                self.train(resume_from_checkpoint=str(resumed.folder) if resumed else None)
            self.is_in_train = False
        else:
            assert resumed is not None
            self._load_from_checkpoint(str(resumed.folder))
            state = resumed.folder / "trainer_state.json"
            self.state = transformers.TrainerState.load_from_json(str(state))

    def held_out_loss(self) -> float | None:
        """Mean loss on the evaluation split; None if there is none, or it is not finite."""
        if self.eval_dataset is None:
            return None
        metrics = self.evaluate()
        self.held_out = {k: finite(v) for k, v in metrics.items() if k.startswith("eval_reward")}
        return finite(metrics["eval_loss"])

    def keep_best(self) -> None:
        """Replace the last weights by those with the lowest evaluation loss."""
        if self.progress.evaluated < self.state.global_step:
            self.record_evaluation(self.held_out_loss())
        self.best.restore(self.trained())

    @property
    def is_over(self) -> bool:
        """Whether the evaluations have ended the training: the patience is used up."""
        return self.progress.waited >= (self.recipe.patience or math.inf)

    def record_evaluation(self, loss: float | None) -> None:
        """Record the evaluation loss of the current weights; keep them if they are the best."""
        progress, lowest = self.progress, self.best.loss
        progress.evaluated = self.state.global_step
        if self.recipe.keep_best:
            least = self.recipe.patience_threshold or 0.0  # as transformers' EarlyStoppingCallback
            better = lowest is None or (loss is not None and lowest - loss > least)
            progress.waited = 0 if better else progress.waited + 1
            progress.better_step = progress.evaluated if better else progress.better_step
            weights = {name: shards.whole(p.detach()) for name, p in self.trained().items()}
            self.best.update(self.state.global_step, loss, weights)
            self.progress.best_step, self.progress.best_loss = self.best.step, self.best.loss

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    # Saving and resuming: each method replaces one of the Trainer's that pickles.

    def save(self, random: Mapping[str, Any]) -> None:
        """Write a checkpoint of the last finished optimizer step with this rank's random state."""
        step = self.state.global_step
        contents: Iterable[tuple[str, bytes]] = self._contents(self.ranks.gather(random))
        if self.split:  # all ranks give their shares
            contents = list(contents)
        if self.ranks.first:
            checkpoint.save(
                self.saves.root, run_id=self.recipe.run_id, step=step, contents=contents
            )
        self.saved_at = step

    def save_last(self, random: Mapping[str, Any]) -> None:
        """Save, unless that step is already saved or no step is finished."""
        if self.is_in_train and self.state.global_step > self.saved_at:
            self.save(random)

    def _contents(self, random: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bytes]]:
        weights = {name: shards.whole(p.detach()) for name, p in self.trained().items()}
        broken = sorted(name for name, p in weights.items() if not p.isfinite().all())
        if broken:
            fact = f"{len(broken)} of {len(weights)} weights are not finite, the first {broken[0]}"
            raise diverged("TRAIN-131", fact, self)
        tensors, optimizer = checkpoint.split_optimizer(self.optimizer.state_dict())
        tensors = {name: shards.whole(tensor) for name, tensor in tensors.items()}
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
        stored = checkpoint.unpack_tensors(Path(folder, "weights.safetensors").read_bytes())
        weights = self.trained()
        if stored.keys() != weights.keys():
            raise AssertionError("the checkpoint holds other weights than the recipe's")
        with torch.no_grad():
            for name, parameter in weights.items():
                # not peft's loader: it makes bf16 weights float32, and the run drifts
                shards.assign(parameter, stored[name])

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is None:
            return
        state = json.loads(Path(folder, "state.json").read_bytes())
        tensors = checkpoint.unpack_tensors(Path(folder, "optimizer.safetensors").read_bytes())
        joined = checkpoint.join_optimizer(tensors, state["optimizer"])
        groups = self.optimizer.param_groups
        for number, parameter in enumerate(p for group in groups for p in group["params"]):
            own = joined["state"].get(number, {})
            own |= {k: shards.like(v, parameter) for k, v in own.items() if torch.is_tensor(v)}
        self.optimizer.load_state_dict(joined)
        self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_scaler(self, folder: str | None) -> None:
        if folder is not None and self.half:
            state = json.loads(Path(folder, "state.json").read_bytes())
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _load_rng_state(self, folder: str | None) -> None:
        if folder is not None:
            states = json.loads(Path(folder, "state.json").read_bytes())["random"]
            self.random = states[self.ranks.number % len(states)]
            checkpoint.restore_random(self.random)

    # One step.

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Forward and backward of one micro-batch; records its rows, tokens and loss."""
        reduced = isinstance(model, torch.nn.parallel.DistributedDataParallel)
        alone = self.ranks.count == 1
        assert reduced or self.split or alone, "gradients are not reduced over ranks"
        self._heartbeat()
        self.rows += inputs.pop("rows")
        self.tokens_so_far += inputs.pop("tokens")
        self.filler = inputs.pop("filler")
        del inputs["weight"]
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except (RuntimeError, MemoryError) as error:
            if self.ranks.count == 1 and is_out_of_memory(error):  # saving needs all ranks
                release(error, model)
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
        """trl's loss, or the same by the one-pass head or the model's own: summed, divided."""
        if self.filler:  # through the model all the same: the ranks add up their gradients
            self.filler = False
            return 0.0 * self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        evaluating = num_items_in_batch is None and not model.training
        count, places = (inputs["labels"][:, 1:] != IGNORED).sum(), inputs.pop(PLACES, None)
        if not self.one_pass and not self.own_head:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = result[0] if isinstance(result, tuple) else result
        else:
            labels, divisor = inputs.pop("labels"), count
            if num_items_in_batch is not None:  # of the whole step, on all ranks
                divisor = torch.as_tensor(num_items_in_batch) / self.accelerator.num_processes
            if self.one_pass:
                summed = model(**inputs, scored=labels, places=places)
            else:
                summed = own_head.loss(model(**inputs, use_cache=False).logits, labels)
            result = loss = summed / divisor.clamp(min=1)
        if evaluating:
            summed = torch.where(count > 0, loss.detach().double() * count, 0.0)
            sums = torch.stack([summed, count.double()])
            self._eval_sums.append(sums)
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Mean loss of a labelled token, however the rows were batched."""
        self._eval_sums = []
        output = super().evaluation_loop(*args, **kwargs)
        if self._eval_sums:
            sums = sum(self._eval_sums, start=torch.zeros_like(self._eval_sums[0]))
            made = self.summary(self.accelerator.reduce(sums, "sum").tolist())
            output.metrics.update({f"eval_{name}": value for name, value in made.items()})
        return output

    def summary(self, sums: Sequence[float]) -> dict[str, float]:
        """The mean loss that `sums` adds up."""
        total, count = sums
        return {"loss": total / max(count, 1.0)}

    def step_summary(self) -> dict[str, Any]:
        """What a step's record holds beside its loss."""
        return {}

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """Labelled tokens of the step, fillers left out."""
        counted = [
            {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
            if batch["filler"]
            else batch
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The usual order; with several ranks, padded with fillers to equal numbers of rows."""
        if self.ranks.count == 1:
            return super()._get_train_sampler(train_dataset)
        self.order = Order(
            len(self.train_dataset) - 1,
            at_once=self.args.per_device_train_batch_size * self.ranks.count,
            seed=self.args.data_seed if self.recipe.shuffle else None,
        )
        return self.order

    def _heartbeat(self) -> None:
        """Touch metrics.jsonl at each micro-batch, for the parent's watchdog."""
        if self.ranks.first:
            self.metrics.touch()

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Loss of one evaluation batch; a stop request ends the evaluation, which may be long."""
        self._heartbeat()
        if self.saves.asked():
            self.save_last(checkpoint.capture_random())
            self.saves.check()
        noted = set(NOTED) - {PLACES}
        model_inputs = {name: value for name, value in inputs.items() if name not in noted}
        return super().prediction_step(model, model_inputs, *args, **kwargs)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """fp16 autocast for an fp16 recipe; accelerate, which does bf16, refuses fp16 on a CPU."""
        if self.half:
            return torch.autocast(self.args.device.type, dtype=torch.float16)
        return contextlib.nullcontext()

    def _clip_grad_norm(self, model: Any) -> Any:
        self._unscale()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The gradient's norm. Raises DivergedError, the last moment before the weights change."""
        if grad_norm is None:
            self._unscale()
        norm = super()._get_grad_norm(model, grad_norm)
        norm = shards.whole(norm) if torch.is_tensor(norm) else norm
        # the host waits for the step here: both numbers come in one copy
        both = [torch.as_tensor(n, device=self.args.device) for n in (self.loss_so_far, norm)]
        loss, norm = torch.stack([number.detach().double() for number in both]).tolist()
        if not math.isfinite(loss):
            raise diverged("TRAIN-130", f"the loss became {loss}", self)
        # a scaled gradient overflows now and then; the scaler skips the step and scales less
        skips = self.half and self.accelerator.scaler.get_scale() > 1
        self.overflowed = not math.isfinite(norm)
        if self.overflowed and not skips:
            raise diverged("TRAIN-130", f"the gradient's norm became {norm}", self)
        return norm

    def _unscale(self) -> None:
        """The gradient as it is, on all ranks alike."""
        if self.split:
            for parameter in self.trained().values():
                if shards.is_whole(parameter) and parameter.grad is not None:  # of new tokens
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= self.ranks.count
        if self.half:
            optimizer = self.optimizer.optimizer
            self.accelerator.scaler.unscale_(optimizer)
            if self.split:  # a share may overflow alone
                for found in self.accelerator.scaler._found_inf_per_device(optimizer).values():
                    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep a log entry, with None for numbers that are not finite."""
        super().log({name: finite(value) for name, value in logs.items()}, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "seq_lengths", ROW, "reference", "good"]

    def _send_telemetry(self) -> None:
        """Send nothing."""
