"""One training rank: tokenised rows, a base model and a recipe -> an adapter.

Run by `tuning.process`, as a child that answers by file. trl's SFTTrainer trains;
what is ours keeps its promises: state goes to our own checkpoints and comes back bit for bit, a
signal stops between two micro-batches with the state saved, a loss or gradient that is not finite
stops before the weights change, and only a finished, finite adapter is put in place.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import pyarrow.compute
import torch
import transformers
from peft import get_peft_model_state_dict
from trl import SFTConfig

from tuning import files, process
from tuning.errors import DataError, OutOfMemoryError, Stopped
from tuning.models import generate, load
from tuning.models.kernels import heap
from tuning.plan import Placement, Recipe, placement_from_json, recipe_from_json
from tuning.plan.backends import BY_OFFSETS
from tuning.training import checkpoint, distributed, evaluation, finish, trainer

logger = logging.getLogger(__name__)

ANSWER_TOKENS = 64
SAMPLES = 3


@dataclass(frozen=True)
class Request:
    """What the parent asks for."""

    run: Path  # run directory: checkpoints/ and metrics.jsonl are ours
    base: Path  # folder of base weights
    recipe: Recipe
    placement: Placement
    train: Path  # tokenised rows: input_ids, labels, and seq_lengths when packed
    adapter: Path  # where the finished adapter goes
    eval: Path | None = None  # held-out rows
    base_name: str = "local"
    base_revision: str | None = None
    questions: tuple[str, ...] = ()  # answered before and after, for the run directory only
    chat_template: str | None = None  # the user's, as text
    packed: Path | None = None  # folder where packed weights are remembered
    save_seconds: float = 600.0  # lost work stays under this
    save_steps: int | None = None
    meeting: Path | None = None  # of the ranks, if there are several

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Request:
        """The request in a JSON file; keys that are null count as absent."""
        known = {field.name for field in fields(cls)}
        given = {k: v for k, v in record.items() if k in known and v is not None}
        names = ("run", "base", "train", "adapter", "eval", "packed", "meeting")
        paths = {k: Path(given[k]) for k in names if k in given}
        made = {
            "recipe": recipe_from_json(record["recipe"]),
            "placement": placement_from_json(record["placement"]),
            "questions": tuple(record.get("questions") or ()),
        }
        return cls(**given | paths | made)


class Interruption:
    """SIGTERM and SIGINT: stop at once, or at the next safe point while there is state to save."""

    def __init__(self) -> None:
        self.asked = False
        self.patient = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if not again and not self.patient:
            self.check()

    def with_all(self, peers: distributed.Ranks) -> bool:
        """Whether a signal came, here or to another rank. All of them must ask."""
        self.asked = peers.any(self.asked)
        return self.asked

    def check(self) -> None:
        """Raise Stopped if a signal came."""
        if self.asked:
            what = "stopped by a signal; what was done is saved"
            raise Stopped.at("RUN-130", "training", what, "run the same command again to go on")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a signal wait, and raise Stopped for it at the end."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False
        self.check()


def work(record: dict[str, Any], stop: Interruption | None = None) -> dict[str, Any]:
    """Train what the request asks for and put the adapter in place; the child's whole work.

    Returns the result record. Raises DataError, SpecError, DivergedError, OutOfMemoryError or
    Stopped; after each of them the same request goes on from the newest checkpoint.
    """
    if stop is None:
        with Interruption() as own:
            return work(record, own)
    request = Request.from_json(record)
    try:
        return _run(request, stop)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        placement = request.placement
        raise OutOfMemoryError.at(
            "TRAIN-140",
            placement.device,
            f"out of memory with {placement.micro_batch} rows of at most "
            f"{request.recipe.max_length} tokens at once",
            "lower per_device_train_batch_size or max_length, or turn on checkpointing",
        ) from error
    finally:
        stop.patient = True  # what is left is to write the answer


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    signs = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(sign in text for sign in signs)


def _run(request: Request, stop: Interruption) -> dict[str, Any]:
    began = time.monotonic()
    recipe, placement = request.recipe, request.placement
    if placement.threads:
        torch.set_num_threads(placement.threads)
    if placement.device == "cpu":
        heap.keep()
    if placement.attention == "flex_attention":  # the one thing here that is compiled
        os.environ.pop("TORCHDYNAMO_DISABLE", None)
    peers = distributed.join(placement.device, request.meeting)
    rows = read_rows(request.train)
    refuse_unlearnable(rows)
    resumed = _resumed(request, peers)

    tuned, tokenizer, coverage = load.load(
        request.base,
        recipe=recipe,
        placement=placement,
        chat_template=request.chat_template,
        packed_root=request.packed,
    )
    loaded = time.monotonic()
    attention = tuned.get_base_model().config._attn_implementation
    loop = trainer.Exact(
        tuned,
        tokenizer,
        rows=rows,
        held_out=read_rows(request.eval) if request.eval else None,
        recipe=recipe,
        arguments=arguments(recipe, placement, request.run, by_offsets=attention in BY_OFFSETS),
        kernels=placement.kernels,
        ranks=peers,
        metrics=request.run / "metrics.jsonl",
        saves=trainer.Saves(
            request.run / "checkpoints",
            seconds=request.save_seconds,
            steps=request.save_steps,
            asked=lambda: stop.with_all(peers),
            check=stop.check,
        ),
    )
    with stop.held():
        loop.fit(resumed)
        if recipe.keep_best:
            loop.keep_best()
    disk = round_adapter(tuned, load.DTYPES[recipe.precision])
    loss_after = loop.held_out_loss()
    peak = max(peers.gather(trainer.peak_memory(placement.device)))
    if not peers.first:
        distributed.leave(peers)
        return {}
    answers = ask(tuned, tokenizer, request.questions)
    write_samples(request, tuned, tokenizer)
    with stop.held():
        done = finish.finish(
            request.adapter,
            tensors=disk,
            config=finish.config_of(
                tuned.peft_config["default"].to_dict(),
                base_name=request.base_name,
                base_revision=request.base_revision,
            ),
            save_tokenizer=load.load_tokenizer(
                request.base, chat_template=request.chat_template
            ).save_pretrained,
            step=loop.state.global_step,
            steps=recipe.steps,
        )
    distributed.leave(peers)
    losses = loop.losses()
    return {
        "steps": recipe.steps,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "loss_by_step": losses,
        "eval_loss_before": loop.progress.held_out_before,
        "eval_loss_after": loss_after,
        "best_step": loop.progress.best_step,
        "tokens": loop.progress.tokens,
        "tokens_per_second": loop.progress.tokens / max(loop.progress.seconds, 1e-9),
        "seconds": loop.progress.seconds,
        "load_seconds": loaded - began,
        "first_step_seconds": loop.first_step_at and loop.first_step_at - began,
        "attention": attention,
        "trainable": coverage.trainable,
        "total": coverage.total,
        "covered": coverage.to_json(),
        "adapter_sha256": done.sha256,
        "peak_memory_bytes": peak,
        "answers": answers,
        "resumed_from": resumed.step if resumed else None,
    }


def _resumed(request: Request, peers: distributed.Ranks) -> checkpoint.Checkpoint | None:
    """The newest checkpoint, chosen by the first rank; what was told after it is taken back."""
    root, run_id = request.run / "checkpoints", request.recipe.run_id
    step = None
    if peers.first:
        found = checkpoint.newest(root, run_id=run_id)
        step = found.step if found else None
        checkpoint.truncate_lines(request.run / "metrics.jsonl", step=step or 0)
    step = peers.from_first(step)
    return None if step is None else checkpoint.at(root, run_id=run_id, step=step)


def read_rows(path: Path) -> datasets.Dataset:
    """The tokenised rows in an Arrow stream file, or in a folder made by `save_to_disk`."""
    if path.is_dir():
        return datasets.load_from_disk(str(path))
    return datasets.Dataset.from_file(str(path))


def refuse_unlearnable(rows: datasets.Dataset) -> None:
    """Raise DataError if no row has a token to learn: training would change nothing."""
    for chunk in rows.data.column("labels").chunks:
        if pyarrow.compute.any(pyarrow.compute.not_equal(chunk.flatten(), -100)).as_py():
            return
    raise DataError.at(
        "TRAIN-101",
        "data",
        "every label of every row is masked, so there is nothing to learn",
        "check that the rows have assistant turns, and that max_length does not cut them off",
    )


def arguments(
    recipe: Recipe, placement: Placement, run: Path, *, by_offsets: bool = False
) -> SFTConfig:
    """trl's settings for this recipe and placement. Mixed fp16 is ours: see trainer.Exact.

    Attention that goes `by_offsets` needs no padding: rows of a micro-batch are laid end to end.
    Not with NEFTune, whose noise is measured by the length of a row.
    """
    end_to_end = recipe.packing or (by_offsets and recipe.neftune_alpha is None)
    known = {field.name for field in fields(SFTConfig)}
    checkpointing = "activation_checkpointing"
    if checkpointing not in known:  # transformers before 5.18
        checkpointing = "gradient_checkpointing"
    return SFTConfig(
        output_dir=str(run),
        use_cpu=placement.device == "cpu",
        bf16=recipe.precision == "bfloat16",
        fp16=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
        max_steps=recipe.steps,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=placement.micro_batch,
        per_device_eval_batch_size=placement.micro_batch,
        gradient_accumulation_steps=placement.accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        optim=recipe.optimizer,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        adam_epsilon=recipe.epsilon,
        max_grad_norm=recipe.max_grad_norm,
        neftune_noise_alpha=recipe.neftune_alpha,
        train_sampling_strategy="random" if recipe.shuffle else "sequential",
        packing=recipe.packing,
        packing_strategy="bfd",
        padding_free=end_to_end,
        max_length=recipe.max_length if recipe.packing else None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=placement.device == "cuda",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        eval_strategy="steps" if recipe.eval_steps else "no",
        eval_steps=recipe.eval_steps,
        **{checkpointing: placement.checkpointing},
    )


def round_adapter(tuned: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The adapter's tensors as they go to disk, in `dtype`, by PEFT's names.

    The model gets the rounded values, too: what is measured and asked afterwards is what ships.
    """
    tuned.eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.to(dtype))
    return {
        name: tensor.detach().to("cpu", dtype)
        for name, tensor in get_peft_model_state_dict(tuned).items()
    }


def write_samples(request: Request, tuned: Any, tokenizer: Any) -> None:
    """What base and tuned model answer to the first held-out rows; stays in the run directory."""
    path = request.run / "samples.jsonl"
    made = (
        evaluation.samples(
            tuned, tokenizer, read_rows(request.eval), number=SAMPLES, tokens=ANSWER_TOKENS
        )
        if request.eval
        else []
    )
    files.write(path, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in made))


def ask(tuned: Any, tokenizer: Any, questions: tuple[str, ...]) -> list[dict[str, str]]:
    """Each question, answered by the base and by the tuned model."""
    answers = []
    for question in questions:
        turns = [{"role": "user", "content": question}]
        with tuned.disable_adapter():
            base = generate.reply(tuned, tokenizer, turns, max_new_tokens=ANSWER_TOKENS)
        reply = generate.reply(tuned, tokenizer, turns, max_new_tokens=ANSWER_TOKENS)
        answers.append({"question": question, "base": base, "tuned": reply})
    return answers


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with Interruption() as stopping:
        sys.exit(process.serve(partial(work, stop=stopping)))
