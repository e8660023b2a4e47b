"""What goes into an optimizer step: the order of the rows, and how they become a micro-batch.

Several ranks take the micro-batches of a step in turn, so that each step trains the same rows as it
would on one. Where an epoch's last rows do not go round, the others' turn is filled with rows of no
weight: they pass through the model, since ranks add up their gradients, and count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import torch

from tuning.models.kernels import head
from tuning.models.kernels.attention import without_mask

ROW = "row"
FILLER = -1  # in the place of a row's number
IGNORED = -100
PLACES = "places"  # of the labelled tokens, found before they are on a GPU
NOTED = (
    "weight",
    "rows",
    "tokens",
    "filler",
    PLACES,
)  # what a micro-batch holds beside the model's inputs


def numbered(rows: datasets.Dataset, *, ranks: int) -> datasets.Dataset:
    """`rows` with their numbers in the column ROW; for several ranks one FILLER behind them."""
    made = rows.add_column(ROW, list(range(len(rows))))
    if ranks == 1:
        return made
    return datasets.concatenate_datasets([made, rows.select([0]).add_column(ROW, [FILLER])])


def filled(rows: datasets.Dataset, *, at_once: int) -> datasets.Dataset:
    """`rows` and as many without a label that `at_once` divides them, for an evaluation by ranks.

    accelerate would fill up with the first rows, and they would count twice.
    """
    missing = -len(rows) % at_once
    if not missing:
        return rows
    first = rows[0]
    nothing = first | {"labels": [IGNORED] * len(first["labels"])}
    more = datasets.Dataset.from_list([nothing] * missing, features=rows.features)
    return datasets.concatenate_datasets([rows, more])


class Order(torch.utils.data.Sampler[int]):
    """The rows of an epoch as accelerate's seeded sampler draws them, then fillers.

    So many that `at_once` divides them: the rows that all ranks take together.
    """

    def __init__(self, rows: int, *, at_once: int, seed: int | None) -> None:
        """`rows` are the real ones, `seed` None takes them as they are."""
        self.rows, self.at_once, self.seed, self.epoch = rows, at_once, seed, 0

    def __len__(self) -> int:
        return self.rows + -self.rows % self.at_once

    def __iter__(self) -> Iterator[int]:
        if self.seed is None:
            yield from range(self.rows)
        else:
            generator = torch.Generator().manual_seed(self.epoch + self.seed)
            yield from torch.randperm(self.rows, generator=generator).tolist()
        yield from [self.rows] * (-self.rows % self.at_once)
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Accelerate tells it after a resume."""
        self.epoch = epoch


class Numbered:
    """A collator that also says which rows and how many tokens a batch has.

    A filler beside real rows is masked. A batch of fillers alone keeps its labels, so that there is
    a loss to take times nothing, and says so.
    """

    def __init__(
        self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], *, by_document: bool
    ) -> None:
        self.collate, self.by_document = collate, by_document

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of `examples`, and NOTED."""
        numbers = [int(example.pop(ROW, 0)) for example in examples]
        real = [n for n, number in enumerate(numbers) if number != FILLER]
        tokens = sum(len(examples[n]["input_ids"]) for n in real)
        if real:
            for n in set(range(len(examples))) - set(real):
                examples[n]["labels"] = np.full_like(examples[n]["labels"], IGNORED)
        made = self.collate(examples)
        made |= {name: made[name].long() for name in ("input_ids", "labels")}
        if self.by_document:
            made = without_mask(made)
        rows = [numbers[n] for n in real]
        # first, for the Trainer takes the first tensor's length for the number of rows
        weight = {"weight": torch.ones(len(examples))}
        made[PLACES] = head.labelled(made["labels"])
        return {**weight, **made, "rows": rows, "tokens": tokens, "filler": not real}
