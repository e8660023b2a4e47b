"""DPO and KTO on the trainer of SFT: trl's losses, with rows, order, resume and metrics as there.

A row holds the two answers of a pair, or one rated answer; each is a sequence of the batch. They
are compared with what the model as it starts gives them: these log-probabilities are computed
once, before the first step, and kept with their sha256 in the run directory.

DPO (Rafailov et al. 2023): -log sigmoid(beta * (chosen ratio - rejected ratio)), where a ratio is
log p(answer) minus its reference. KTO (Ethayarajh et al. 2024): 1 - sigmoid(beta * (ratio - KL))
for a good answer, 1 - sigmoid(beta * (KL - ratio)) for a bad one; KL is the mean ratio of answers
to other prompts, at least 0, over all rows of a step: over those of a micro-batch, as trl has it,
it would depend on the placement.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch.nn import functional

from tuning.errors import SpecError
from tuning.plan import Recipe
from tuning.training import checkpoint
from tuning.training.batches import FILLER, IGNORED, NOTED, ROW, Numbered
from tuning.training.checkpoint import Checkpoint
from tuning.training.progress import finite
from tuning.training.trainer import Exact

REFERENCE, GOOD = "reference", "good"  # columns of rows
FILE = "log_probabilities.json"
NOTES = ("sizes", "real", REFERENCE, GOOD, "mismatched")  # what a batch holds beside the model's
Example = dict[str, Any]


class Answers(Numbered):
    """A collator of rows with one answer or two, each of which becomes a sequence of the batch."""

    rows: Any = None  # training and held-out rows, by number; None unless answers are rated
    before: Any = None  # the number of the row before each, the last one before the first
    longest: int | None = None  # tokens of a sequence

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """The batch of `examples`, and NOTES."""
        answers = [answer for example in examples for answer in _answers(example)]
        made = self._collated(answers)
        made["rows"] = made["rows"][:: len(answers) // len(examples)]
        made["real"] = torch.tensor([e[ROW] != FILLER and _is_trained(e) for e in examples])
        if REFERENCE in examples[0]:
            made[REFERENCE] = torch.tensor(np.array([example[REFERENCE] for example in examples]))
        if self.rows is not None:
            made[GOOD] = torch.tensor([bool(example[GOOD]) for example in examples])
            made["mismatched"] = self._collated([self._mismatched(each) for each in examples])
        return made

    def _collated(self, answers: Sequence[Example]) -> dict[str, Any]:
        made = super().__call__([dict(answer) for answer in answers])
        return made | {"sizes": [len(answer["input_ids"]) for answer in answers]}

    def _mismatched(self, example: Example) -> Example:
        """The prompt of `example` with the answer of the row before it."""
        other = self.rows[int(self.before[example[ROW]])]
        own, theirs = (np.flatnonzero(e["labels"] != IGNORED) for e in (example, other))
        prompt = example["input_ids"][: own[0] if len(own) else 1]
        answer = other["input_ids"][theirs[0] : theirs[-1] + 1] if len(theirs) else prompt[:0]
        ids, labels = (
            np.concatenate([first, answer])[: self.longest]
            for first in (prompt, np.full_like(prompt, IGNORED))
        )
        return {"input_ids": ids, "labels": labels, ROW: example[ROW]}


def _answers(example: Example) -> Iterator[Example]:
    """The sequences of a row, each with the row's number."""
    ends = np.cumsum(example["seq_lengths"])[:-1]
    parts = (np.split(example[name], ends) for name in ("input_ids", "labels"))
    for ids, labels in zip(*parts, strict=True):
        yield {"input_ids": ids, "labels": labels, ROW: example[ROW]}


def good_answers(rows: Iterable[Example]) -> Iterator[Example]:
    """The chosen or good answers in `rows`, as rows of SFT."""
    for row in rows:
        if row.get(GOOD, True):
            parts = {name: row[name][: row["seq_lengths"][0]] for name in ("input_ids", "labels")}
            yield parts | {"seq_lengths": row["seq_lengths"][:1]}


def _is_trained(example: Example) -> bool:
    return bool((example["labels"] != IGNORED).any())


class Preferring(Exact):
    """Trains a model to prefer answers, by the recipe's objective."""

    train_dataset: Any
    eval_dataset: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        objective = self.recipe.objective
        if self.own_head:
            raise SpecError.at(
                "MODEL-121",
                self.recipe.base_model,
                f"has an output layer of its own kind, which {objective} does not score",
                "choose another base model, or train on the good answers: objective: sft",
            )
        count = len(self.train_dataset) - (self.ranks.count > 1)  # the filler
        parts, self.counts = [self.train_dataset.select(range(count))], [count]
        if self.eval_dataset is not None:
            self.counts.append(len(self.eval_dataset))
            numbers = list(range(count, sum(self.counts)))
            self.eval_dataset = self.eval_dataset.add_column(ROW, numbers)
            parts.append(self.eval_dataset)
        self.answered = datasets.concatenate_datasets(parts).with_format("numpy")
        numbered = self.data_collator
        self.data_collator = Answers(numbered.collate, by_document=numbered.by_document)
        self.rated = self.recipe.objective == "kto"
        if self.rated:
            before = np.arange(sum(self.counts))
            held_out = options["held_out"]  # without the fillers behind it
            for start, rows in ((0, count), (count, len(held_out or ()))):
                before[start : start + rows] = np.roll(before[start : start + rows], 1)
            self.data_collator.before = before
            self.data_collator.rows = self.answered
            self.data_collator.longest = self.recipe.max_length
        self.divergence = 0.0  # KTO's KL, of the current step or evaluation

    def fit(self, resumed: Checkpoint | None) -> None:
        """Train to the last step, once the reference is known."""
        known = self._reference()
        ends = self.counts[0], sum(self.counts)  # with fewer ranks than before there is more
        train, held_out = known[: ends[0]], known[ends[0] : ends[1]]
        if self.ranks.count > 1:
            train.append(train[0])
        self.train_dataset = self.train_dataset.add_column(REFERENCE, train)
        if self.eval_dataset is not None:
            self.eval_dataset = self.eval_dataset.add_column(REFERENCE, held_out)
        super().fit(resumed)

    # The reference: log-probabilities by the model as it starts.

    def _reference(self) -> list[list[float]]:
        """Of each training row, then of each held-out one; made, or from the run directory.

        For a pair those of its answers; for a rated answer its own and that of the answer of the
        row before it to the same prompt. What is made is saved as often as a checkpoint is.
        """
        root, run_id = self.metrics.parent / "data" / "reference", self.recipe.run_id
        kept = checkpoint.newest(root, run_id=run_id) if self.ranks.first else None
        known: list[list[float]] = json.loads(kept.read(FILE)) if kept else []
        known = self.ranks.from_first(known)
        at_once = self.args.per_device_eval_batch_size
        total, saved = len(self.answered), time.monotonic()

        def save() -> None:
            if self.ranks.first:
                contents = [(FILE, checkpoint.pack_json(known))]
                checkpoint.save(root, run_id=run_id, step=len(known), contents=contents, keep=1)

        while len(known) < total:
            first = len(known) + self.ranks.number * at_once
            rows = [min(row, total - 1) for row in range(first, first + at_once)]
            made = self._start_log_probabilities([self.answered[row] for row in rows])
            gathered = [row for rank in self.ranks.gather(made) for row in rank]
            known += gathered[: total - len(known)]
            self._heartbeat()
            stopped = self.saves.asked()
            late = self.ranks.from_first(time.monotonic() - saved >= self.saves.seconds)
            if stopped or late or len(known) == total:
                save()
                saved = time.monotonic()
            if stopped:
                self.saves.check()
        return known

    def _start_log_probabilities(self, examples: list[Example]) -> list[list[float]]:
        """Those of each of `examples`: by the base, or with an adapter to go on from."""
        own = self.recipe.start_adapter or self.recipe.new_tokens
        batch = self._prepare_inputs(self.data_collator(examples))
        with self._scoring(), contextlib.nullcontext() if own else self.model.disable_adapter():
            sums = log_probabilities(self.model, batch)
            if self.rated:
                sums = torch.stack([sums, log_probabilities(self.model, batch["mismatched"])], 1)
        made: list[list[float]] = sums.float().view(len(examples), -1).tolist()
        return made

    @contextlib.contextmanager
    def _scoring(self) -> Iterator[None]:
        """Without gradients and dropout, in the precision of the training."""
        training = self.model.training
        self.model.eval()
        try:
            with (
                torch.no_grad(),
                self.accelerator.autocast(),
                self.compute_loss_context_manager(),
            ):
                yield
        finally:
            self.model.train(training)

    # The loss.

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective's loss, summed over rows and divided by those of the step, or its mean."""
        self.filler = False  # fillers are not real: their loss is 0, through the model all the same
        real, good = inputs["real"], inputs.get(GOOD)
        ratios = log_probabilities(model, inputs).view(len(real), -1)
        ratios = ratios - inputs[REFERENCE].to(ratios)[:, : ratios.shape[1]]
        losses = loss(self.recipe, ratios, good=good, divergence=self.divergence)
        total = (losses * real).sum()
        sums = _sums(self.recipe, losses.detach(), ratios.detach(), real=real, good=good)
        if model.training:
            self.step_sums = self.step_sums + sums
        else:
            self._eval_sums.append(sums)
        divisor = real.sum().clamp(min=1)
        if num_items_in_batch is not None:  # of the whole step, on all ranks
            divisor = torch.as_tensor(num_items_in_batch) / self.accelerator.num_processes
        result = total / divisor
        return (result, {}) if return_outputs else result

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """The rows of the step, fillers left out; of rated answers measures the KL before it."""
        count = sum(int(batch["real"].sum()) for batch in batch_samples)
        if self.rated:
            self.divergence = self._divergence(batch_samples)
        return torch.tensor(self.ranks.sum(count)[0], device=device)

    def _divergence(self, batches: Iterable[Any]) -> float:
        """KTO's KL: the mean log ratio of answers to other prompts, or 0 if that is less."""
        total = count = 0.0
        with self._scoring():
            for batch in map(self._prepare_inputs, batches):
                self._heartbeat()
                ratios = log_probabilities(self.model, batch["mismatched"])
                ratios = (ratios - batch[REFERENCE].to(ratios)[:, 1]) * batch["real"]
                total += float(ratios.double().sum())
                count += int(batch["real"].sum())
        total, count = self.ranks.sum(total, count)
        return max(0.0, total / max(count, 1))

    # What is measured.

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Mean loss of a row, and how well good answers are told from bad ones."""
        if self.rated:
            self.divergence = self._divergence(dataloader)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def summary(self, sums: Sequence[float]) -> dict[str, float]:
        """Loss, accuracy and margin of the rows that `sums` adds up."""
        loss, count, right, good, goods, bad, bads = sums
        return {
            "loss": loss / max(count, 1),
            "reward_accuracy": right / max(count, 1),
            "reward_margin": good / goods - bad / bads if goods and bads else math.nan,
        }

    def step_summary(self) -> dict[str, Any]:
        """Accuracy and margin of the rows of this step."""
        if not torch.is_tensor(self.step_sums):
            return {}
        made = self.summary(self.ranks.sum(*self.step_sums.tolist()))
        return {name: finite(value) for name, value in made.items() if name != "loss"}


def log_probabilities(model: Any, batch: Any) -> torch.Tensor:
    """The log-probability of the labelled tokens of each sequence of `batch`, by trl's own head."""
    inputs = {k: v for k, v in batch.items() if k not in (*NOTES, *NOTED)}
    tokens = model(**inputs, fused_lm_head=True).log_probs.float()
    if len(tokens) == len(batch["sizes"]):
        return tokens.sum(dim=1)  # type: ignore[no-any-return]
    whole = functional.pad(tokens[0], (1, 0))  # laid end to end; nothing predicts the first token
    return torch.stack([part.sum() for part in torch.split(whole, batch["sizes"])])


def loss(
    recipe: Recipe, ratios: torch.Tensor, *, good: torch.Tensor | None, divergence: float
) -> torch.Tensor:
    """The loss of each row: of the `ratios` [rows, 2] of pairs, or [rows, 1] of rated answers."""
    assert recipe.beta is not None
    if good is None:
        return -functional.logsigmoid(recipe.beta * (ratios[:, 0] - ratios[:, 1]))
    above = ratios[:, 0] - divergence
    return 1 - torch.sigmoid(recipe.beta * torch.where(good, above, -above))


def _sums(
    recipe: Recipe,
    losses: torch.Tensor,
    ratios: torch.Tensor,
    *,
    real: torch.Tensor,
    good: torch.Tensor | None,
) -> torch.Tensor:
    """What `Preferring.summary` reads, summed over real rows; a reward is beta times a ratio.

    A pair counts as right if the chosen answer has the higher reward, a rated answer if its reward
    is above 0 and it is good, or below and it is bad; equal ones count half.
    """
    rewards = ratios.double() * (recipe.beta or 0.0)
    if good is None:
        chosen, rejected = rewards[:, 0] * real, rewards[:, 1] * real
        ahead, goods, bads = rewards[:, 0] - rewards[:, 1], real, real
    else:
        goods, bads = real & good, real & ~good
        chosen, rejected = rewards[:, 0] * goods, rewards[:, 0] * bads
        ahead = torch.where(good, rewards[:, 0], -rewards[:, 0])
    right = ((ahead.sign() + 1) / 2) * real
    parts = (losses * real, real, right, chosen, goods, rejected, bads)
    return torch.stack([part.double().sum() for part in parts])
