"""New tokens of adapters in a server: each adapter's get numbers and rows of their own.

In their adapters the new tokens of all begin at the same number, behind the base's last one. Here
they follow each other, so that one pass of the model computes them all, and a model is shown the
logits of its own tokens only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors
import torch

from tuning import adapter as adapters
from tuning.data.tokenizer import append
from tuning.errors import SpecError
from tuning.models import new_tokens


@dataclass(frozen=True)
class Tokens:
    """The new tokens of one adapter."""

    own: int  # number of the first, in the adapter
    first: int  # its number in this server
    texts: tuple[tuple[str, bool], ...]  # each with whether it is special

    @property
    def after(self) -> int:
        """The number behind the last one, in this server."""
        return self.first + len(self.texts)

    def here(self, ids: Sequence[int]) -> list[int]:
        """Numbers of the adapter's tokenizer as those of this server."""
        last, moved = self.own + len(self.texts), self.first - self.own
        return [id + moved if self.own <= id < last else id for id in ids]

    def tokenizer(self, base: Any) -> Any:
        """A copy of the base's tokenizer with these tokens, at their numbers in this server."""
        copied = copy.deepcopy(base)
        unused = {f"<|unused {number}|>": True for number in range(self.own, self.first)}
        append(copied, unused)
        append(copied, dict(self.texts))
        return copied


def place(
    adapter: adapters.Adapter, tokenizer: Any, model: Any, *, first: int | None
) -> Tokens | None:
    """Put the rows of the adapter's new tokens into `model`, from the number `first` on.

    None where there are no such tokens; `first` None is the number in the adapter. Raises SpecError
    for tokens or rows that do not fit.
    """
    if not adapter.token_ids:
        return None
    texts = new_tokens.missing(tokenizer, adapter)
    if len(texts) != len(adapter.token_ids):
        what = "trains rows of tokens that the base has, which other models here use as they are"
        change = "merge it with its base, and serve that model"
        raise SpecError.at("MODEL-215", str(adapter.folder), what, change)
    tokens = Tokens(own := adapter.token_ids[0], first or own, tuple(texts.items()))
    with safetensors.safe_open(adapter.folder / adapters.WEIGHTS, framework="pt") as file:
        rows = {name: file.get_tensor(name) for name in adapter.tensors if adapters.rows_of(name)}
    new_tokens.widen(model, tokens.after)
    names = dict(model.named_modules())
    for name, values in rows.items():
        layer = names.get(adapters.rows_of(name) or "")
        if layer not in (model.get_input_embeddings(), model.get_output_embeddings()):
            what, change = "is no embedding or output layer here", "use its own base model"
            raise SpecError.at("MODEL-210", f"{adapter.folder} {name}", what, change)
        if not values.isfinite().all():
            what, change = "is not finite", "fetch or train it again"
            raise SpecError.at("MODEL-208", f"{adapter.folder} {name}", what, change)
        with torch.no_grad():
            layer.weight[tokens.first : tokens.after] = values.to(layer.weight)
    return tokens


def hidden(own: Tokens | None, all_: Sequence[Tokens]) -> tuple[slice, ...]:
    """The numbers of the tokens that a model with the tokens `own` does not have."""

    def parts() -> Iterator[slice]:
        start = min(tokens.first for tokens in all_)
        end = max(tokens.after for tokens in all_)
        yield slice(start, own.first if own else end)
        if own:
            yield slice(own.after, end)

    return tuple(part for part in parts() if part.start < part.stop) if all_ else ()
