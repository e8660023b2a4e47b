"""One training rank: tokenised rows, a base model and a recipe -> an adapter.

A child process of `tuning.process`: request and result are files. The same request resumes from the
newest checkpoint, and only a finished, finite adapter is put in place.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
import torch
import transformers
from peft import get_peft_model_state_dict

from tuning import adapter, files, process
from tuning.data.tokenizer import add_tokens
from tuning.errors import DataError, OutOfMemoryError, SpecError, TransientError, from_json
from tuning.models import generate, shards
from tuning.models.kernels import heap
from tuning.models.load import DTYPES, load_for_training, load_tokenizer
from tuning.plan import Placement, Recipe, placement_from_json, recipe_from_json
from tuning.plan.backends import BY_OFFSETS
from tuning.training import afterwards, calibration, checkpoint, distributed, finish
from tuning.training.arguments import sft_config
from tuning.training.interruption import Interruption
from tuning.training.memory_errors import is_out_of_memory
from tuning.training.preferences import Preferring, good_answers
from tuning.training.progress import Saves, peak_memory
from tuning.training.trainer import Exact

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """The request of the parent process."""

    run: Path  # run directory, for checkpoints/ and metrics.jsonl
    base: Path  # folder of base weights
    recipe: Recipe
    placement: Placement
    train: Path  # tokenised rows: input_ids, labels, and seq_lengths when packed
    adapter: Path  # where the finished adapter goes
    eval: Path | None = None  # rows of the evaluation split
    base_name: str = "local"
    base_revision: str | None = None
    questions: tuple[str, ...] = ()  # answered before and after, for the run directory only
    chat_template: str | None = None  # the user's, as text
    start: Path | None = None  # folder of the adapter to go on from
    packed: Path | None = None  # folder where packed weights are cached
    save_seconds: float = 600.0  # most work that a kill can lose
    save_steps: int | None = None
    kept: Path | None = None  # where the result is kept once the adapter is in place

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Request:
        """The request in a JSON file; keys that are null count as absent."""
        names = {field.name for field in fields(cls)}
        values = {k: v for k, v in record.items() if k in names and v is not None}
        paths = ("run", "base", "train", "adapter", "eval", "packed", "kept", "start")
        for name in paths:
            if name in values:
                values[name] = Path(values[name])
        values["recipe"] = recipe_from_json(record["recipe"])
        values["placement"] = placement_from_json(record["placement"])
        values["questions"] = tuple(record.get("questions") or ())
        return cls(**values)


def work(record: dict[str, Any], stop: Interruption | None = None) -> dict[str, Any]:
    """Train as requested and put the adapter in place; returns the result record.

    Raises DataError, SpecError, DivergedError, OutOfMemoryError or Stopped; after each of them the
    same request resumes from the newest checkpoint.
    """
    if stop is None:
        with Interruption() as own:
            return work(record, own)
    ranks = distributed.join(record.get("device") or record["placement"]["device"])
    request = _request(record, ranks)
    try:
        return _run(request, stop, ranks)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        placement, memory = request.placement, is_out_of_memory(error)
        if placement.nodes > 1 and not memory and distributed.is_lost(error):
            what = f"another machine of the {placement.nodes} is gone ({_first_line(error)})"
            change = "look at its log; training goes on from the last checkpoint when it is back"
            raise TransientError.at("TRAIN-141", "training", what, change) from error
        if not memory:
            raise
        raise OutOfMemoryError.at(
            "TRAIN-140",
            placement.device,
            f"out of memory with {placement.micro_batch} rows of at most "
            f"{request.recipe.max_length} tokens at once",
            "lower per_device_train_batch_size or max_length, or turn on checkpointing",
        ) from error
    finally:
        stop.deferred = True  # only the result is left to write


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _request(record: dict[str, Any], ranks: distributed.Ranks) -> Request:
    """The request in `record`; on a machine that follows, machine 0's with its rows and folders."""
    if ranks.count == 1 or ranks.machines == 1:
        return Request.from_json(record)
    for failed in ranks.gather(record.get("failed")):
        if failed is not None:  # on a machine that follows, when all met before
            raise from_json(failed)
    first = ranks.from_first(record)
    own = {key: record[key] for key in ("run", "base", "packed")}
    made = first | own if ranks.machine else record
    for name in ("train", "eval", "start"):
        if first.get(name):
            here = Path(own["run"]) / "data" / "from-machine-0" / name
            made[name] = str(ranks.spread(Path(first[name]), here))
    request = Request.from_json(made)
    if request.placement.ranks != ranks.count:
        what = f"{ranks.count} ranks have met, and {request.placement.ranks} are planned"
        change = "use machines with equal numbers of GPUs, or give each the same --ranks"
        raise SpecError.at("TRAIN-142", "training", what, change)
    return request


def _run(request: Request, stop: Interruption, ranks: distributed.Ranks) -> dict[str, Any]:
    began = time.monotonic()
    recipe, placement = request.recipe, request.placement
    _configure(placement)
    rows = read_rows(request.train)
    refuse_unlearnable(rows)
    resumed = _resumed(request, ranks)
    tuned, tokenizer, coverage = load_for_training(
        request.base,
        recipe=recipe,
        placement=placement,
        chat_template=request.chat_template,
        packed_root=request.packed,
        start=request.start,
        split=ranks.split(placement),
    )
    loaded = time.monotonic()
    calibrated = None
    if placement.device == "cuda" and ranks.first:
        calibrated = calibration.calibrate(
            tuned, recipe, placement, rows, base=request.base, run=request.run
        )
    loop = _trainer(request, stop, ranks, tuned, tokenizer, rows)
    with stop.held():
        loop.fit(resumed)
        if recipe.keep_best:
            loop.keep_best()
    tensors = round_adapter(tuned, DTYPES[recipe.precision])
    lost: list[str] = []
    result: dict[str, Any] = {}
    if ranks.first:
        with stop.held():
            finished = _finish(request, tuned, tensors, loop)
        result = {
            **_measured(loop, recipe),
            "eval_loss_after": None,
            **_rewards(loop.progress.rewards_before, "before"),
            "load_seconds": loaded - began,
            "first_step_seconds": loop.first_step_at and loop.first_step_at - began,
            "attention": tuned.get_base_model().config._attn_implementation,
            "trainable": coverage.trainable,
            "total": coverage.total,
            "unread_layers": tuned.get_base_model().unread_layers,
            "covered": coverage.to_json(),
            "adapter_sha256": finished.sha256,
            "peak_memory_bytes": peak_memory(placement.device),
            "answers": [],
            "ends": _other_ends(tuned, tokenizer),
            "resumed_from": resumed.step if resumed else None,
            "calibrated": calibrated,
        }
        _write_trained(request, result)
    what = "the loss on the held-out rows was not measured after training"
    loss_after = afterwards.attempt(what, loop.held_out_loss, lost)
    peak = max(ranks.gather(peak_memory(placement.device)))
    after: dict[str, Any] = {"eval_loss_after": loss_after, "peak_memory_bytes": peak}
    after |= _rewards(loop.held_out, "after")
    if ranks.first or placement.shards > 1:  # a shared model answers on all ranks together
        after["answers"] = _answers(request, tuned, tokenizer, lost, write=ranks.first)
    distributed.leave(ranks)
    return result | after | {"lost": lost} if ranks.first else {}


def _answers(
    request: Request, tuned: Any, tokenizer: Any, lost: list[str], *, write: bool
) -> list[dict[str, str]]:
    """The answers to the request's questions; makes the samples, too, and may `write` them."""
    asked = partial(afterwards.ask, tuned, tokenizer, request.questions)
    answers = afterwards.attempt("the questions were not answered", asked, lost)

    def samples() -> None:
        rows: Any = read_rows(request.eval) if request.eval else None
        if rows is not None and request.recipe.objective:
            rows = good_answers(rows)
        made = afterwards.samples(tuned, tokenizer, rows)
        if write:
            files.write(request.run / "samples.jsonl", made)

    afterwards.attempt("no samples were written", samples, lost)
    return answers or []


def _other_ends(tuned: Any, tokenizer: Any) -> list[str]:
    """The tokens that end an answer, if they are others than the tokenizer's one."""
    ends = generate.ends_of(tuned, tokenizer).certain
    if ends <= {tokenizer.eos_token_id}:
        return []
    return [str(word) for word in tokenizer.convert_ids_to_tokens(sorted(ends))]


def _write_trained(request: Request, result: dict[str, Any]) -> None:
    """Keep the result for the parent, in case that this process ends before it can answer."""
    if request.kept is not None:
        files.write_json(request.kept, result)


def _configure(placement: Placement) -> None:
    """Threads, allocator and compiler of this process, before it loads a model."""
    if placement.threads:
        torch.set_num_threads(placement.threads)
    if placement.device == "cpu":
        heap.keep()
    if placement.attention == "flex_attention":  # the one thing here that is compiled
        os.environ.pop("TORCHDYNAMO_DISABLE", None)


def _trainer(
    request: Request,
    stop: Interruption,
    ranks: distributed.Ranks,
    tuned: Any,
    tokenizer: Any,
    rows: datasets.Dataset,
) -> Exact:
    recipe, placement = request.recipe, request.placement
    kind = Preferring if recipe.objective else Exact
    by_offsets = tuned.get_base_model().config._attn_implementation in BY_OFFSETS
    return kind(
        tuned,
        tokenizer,
        rows=rows,
        held_out=read_rows(request.eval) if request.eval else None,
        recipe=recipe,
        arguments=sft_config(recipe, placement, request.run, by_offsets=by_offsets),
        ranks=ranks,
        activations=placement.activations,
        metrics=request.run / "metrics.jsonl",
        saves=Saves(
            request.run / "checkpoints",
            seconds=request.save_seconds,
            steps=request.save_steps,
            asked=lambda: stop.on_any(ranks),
            check=stop.check,
        ),
    )


def _finish(
    request: Request, tuned: Any, tensors: dict[str, torch.Tensor], loop: Exact
) -> adapter.Adapter:
    """Put the adapter folder in place, if all steps are done or early stopping left some out."""
    config = finish.config_of(
        tuned.peft_config["default"].to_dict(),
        base_name=request.base_name,
        base_revision=request.base_revision,
    )
    tokenizer = load_tokenizer(request.base, chat_template=request.chat_template)
    add_tokens(tokenizer, request.recipe.new_tokens, request.chat_template)
    return finish.finish(
        request.adapter,
        tensors=tensors,
        config=config,
        save_tokenizer=tokenizer.save_pretrained,
        step=loop.state.global_step,
        steps=request.recipe.steps,
        skipped=loop.progress.skipped,
        stopped=loop.is_over,
    )


def _rewards(held_out: dict[str, float | None], when: str) -> dict[str, float | None]:
    """Accuracy and margin on the evaluation split; nothing of sft."""
    return {f"{name}_{when}": value for name, value in held_out.items()}


def _measured(loop: Exact, recipe: Recipe) -> dict[str, Any]:
    """Losses, tokens and speed of the training, for the result record."""
    losses = [float(entry["loss"]) for entry in loop.state.log_history if "loss" in entry]
    progress, step = loop.progress, loop.state.global_step
    stopped = {"at": step, "no_better_since": progress.better_step}
    return {
        "stopped": stopped if step < recipe.steps else None,
        "steps": recipe.steps,
        "skipped_steps": progress.skipped,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "loss_by_step": losses,
        "eval_loss_before": progress.held_out_before,
        "best_step": progress.best_step,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "seconds": progress.seconds,
    }


def _resumed(request: Request, ranks: distributed.Ranks) -> checkpoint.Checkpoint | None:
    """The newest checkpoint, chosen by the first rank; later progress records are discarded."""
    root, run_id = request.run / "checkpoints", request.recipe.run_id
    step = None
    if ranks.first:
        newest = checkpoint.newest(root, run_id=run_id)
        step = newest.step if newest else None
        checkpoint.truncate_lines(request.run / "metrics.jsonl", step=step or 0)
    step = ranks.from_first(step)
    if step is None:
        return None
    found = checkpoint.at(root, run_id=run_id, step=step)
    if ranks.machines > 1:
        ranks.spread(found.folder, found.folder)
    return found


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
        "check that the rows have assistant turns that max_length does not cut off",
    )


def round_adapter(tuned: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The adapter's tensors in `dtype`, by PEFT's names.

    The model gets the rounded values, too, so that later losses and answers are those of the file.
    """
    tuned.eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.to(dtype))
    return {
        name: shards.whole(tensor.detach()).to("cpu", dtype)
        for name, tensor in get_peft_model_state_dict(tuned, save_embedding_layers=False).items()
    }


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with Interruption() as stop:
        sys.exit(process.serve(partial(work, stop=stop)))
