"""The evaluation split: the best weights so far, and sample answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch

from tuning.models import generate, shards

IGNORED = -100


@dataclass
class Best:
    """The trained weights with the lowest evaluation loss, kept in main memory."""

    step: int | None = None
    loss: float | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def update(self, step: int, loss: float | None, weights: Mapping[str, torch.Tensor]) -> None:
        """Keep `weights` if their loss is the lowest so far; the first of equals stays."""
        if loss is None or (self.loss is not None and loss >= self.loss):
            return
        self.step, self.loss = step, loss
        self.weights = {
            name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()
        }

    def restore(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy the kept values into `weights`."""
        with torch.no_grad():
            for name, tensor in weights.items():
                shards.assign(tensor, self.weights[name])


@dataclass(frozen=True)
class Prompt:
    """Tokens before an answer, and of the expected answer."""

    ids: list[int]
    answer: list[int]


def prompts(rows: datasets.Dataset) -> Iterator[Prompt]:
    """The first answer of each document in `rows`, with its prompt; documents without one are
    skipped."""
    for row in rows:
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            ids = row["input_ids"][start : start + length]
            labels = row["labels"][start : start + length]
            start += length
            first = next((n for n, label in enumerate(labels) if label != IGNORED), 0)
            if first > 1:  # else it is plain text without a prompt
                end = next((n for n in range(first, length) if labels[n] == IGNORED), length)
                yield Prompt(ids[:first], ids[first:end])


def samples(
    tuned: Any, tokenizer: Any, rows: datasets.Dataset, *, number: int, tokens: int
) -> list[dict[str, str]]:
    """The first `number` prompts with the expected answer, the base's and the tuned model's.

    Answers are greedy and at most `tokens` tokens long.
    """
    answered = []
    for prompt, _ in zip(prompts(rows), range(number), strict=False):
        with tuned.disable_adapter():
            base = generate.continued(tuned, tokenizer, prompt.ids, max_new_tokens=tokens)
        answer = generate.continued(tuned, tokenizer, prompt.ids, max_new_tokens=tokens)
        answered.append(
            {
                "prompt": tokenizer.decode(prompt.ids),
                "expected": tokenizer.decode(prompt.answer, skip_special_tokens=True).strip(),
                "base": base,
                "tuned": answer,
            }
        )
    return answered
