"""New tokens: rows of a model's embedding and output layer for them, and how peft trains these.

peft trains single rows (`trainable_token_indices`): the forward replaces them by the adapter's own,
so an adapter holds only those. Where embedding and output layer share one matrix, peft shares the
rows, too; else both have rows of their own, since a token that the output layer cannot tell from
others is never said.

A new row begins as the mean of those of the pieces that the text was before. Its logit is then the
mean of theirs: a base model never prefers a new token to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper

from tuning import adapter as adapters
from tuning.data.tokenizer import add_tokens, added_by, append
from tuning.errors import SpecError

Indices = list[int] | dict[str, list[int]]


def extend(model: Any, tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Add `tokens` to `tokenizer` and rows for them to `model`; returns their numbers.

    Raises SpecError for a token that exists, and for a model whose rows peft cannot train.
    """
    if not tokens:
        return []
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    add_tokens(tokenizer, tokens)
    ids = [int(id) for id in tokenizer.convert_tokens_to_ids(list(tokens))]
    _fill(model, dict(zip(ids, pieces, strict=True)))
    return ids


def extend_for(model: Any, tokenizer: Any, adapter: adapters.Adapter) -> None:
    """Give `tokenizer` and `model` the tokens of `adapter` that they lack.

    Raises SpecError for an adapter whose numbers mean other tokens here.
    """
    added = missing(tokenizer, adapter)
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in added]
    append(tokenizer, added)
    ids = tokenizer.convert_tokens_to_ids(list(added))
    _fill(model, dict(zip(ids, pieces, strict=True)))


def missing(tokenizer: Any, adapter: adapters.Adapter) -> dict[str, bool]:
    """The tokens of `adapter` that `tokenizer` lacks, each with whether it is special.

    Raises SpecError if they would get other numbers than in the adapter.
    """
    known = {id: text for text, id in tokenizer.get_vocab().items()} if adapter.token_ids else {}
    named = added_by(adapter)
    after = max(known, default=-1) + 1
    added: dict[str, bool] = {}
    for id in adapter.token_ids:
        text, special = named.get(id, (known.get(id, ""), False))
        fits = known.get(id, text) == text if id < after else id == after + len(added) and text
        if not fits:
            what = f"trains token {id:,}, {text!r}, which is another or none in the base model"
            change = "use it with its own base model, and with its tokenizer.json beside it"
            raise SpecError.at("MODEL-214", str(adapter.folder), what, change)
        if id >= after:
            added[text] = special
    return added


def widen(model: Any, rows: int) -> None:
    """Give embedding and output layer at least `rows` rows; a new one is the mean of all.

    A mean is never the likeliest, so that a token without a meaning is not said.
    """
    before = model.get_input_embeddings().weight.shape[0]
    if rows <= before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for weight in _matrices(model):
            weight[before:] = weight[:before].float().mean(dim=0).to(weight.dtype)


def _fill(model: Any, pieces: Mapping[int, Sequence[int]]) -> None:
    """The row of each token: the mean of those of the pieces of its text."""
    if not pieces:
        return
    before = model.get_input_embeddings().weight.shape[0]
    widen(model, max(pieces) + 1)
    with torch.no_grad():
        for weight in _matrices(model):
            for id, parts in pieces.items():
                if known := [part for part in parts if part < before]:
                    weight[id] = weight[known].float().mean(dim=0).to(weight.dtype)


def _matrices(model: Any) -> list[torch.Tensor]:
    """The weights of embedding and output layer: one where they are shared."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return list({id(layer.weight): layer.weight for layer in layers if layer is not None}.values())


def is_tied(model: Any) -> bool:
    """Whether embedding and output layer share their weights."""
    return len(_matrices(model)) == 1


def indices(model: Any, ids: Sequence[int]) -> Indices | None:
    """peft's `trainable_token_indices` for the tokens `ids`; None if there are none.

    Raises SpecError for an output layer that peft computes otherwise than the model.
    """
    if not ids:
        return None
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or getattr(head, "bias", None) is not None:
        fact = "has an output layer with a bias, or of its own kind, whose rows peft cannot train"
        change = "leave new_special_tokens out, or choose another base model"
        raise SpecError.at("MODEL-140", model.config.model_type, fact, change)
    if is_tied(model):
        return list(ids)
    names = {id(module): name for name, module in model.named_modules()}
    layers = (model.get_input_embeddings(), head)
    return {names[id(layer)]: list(ids) for layer in layers}


def settle(tuned: Any) -> None:
    """Complete peft's layers of trained rows for trl, which asks an output layer for its bias.

    Raises SpecError unless rows of both layers are trained, shared where the weights are, and peft
    computes what the layers do: some embeddings also scale or normalise.
    """
    base = tuned.get_base_model()
    layers = [base.get_input_embeddings(), base.get_output_embeddings()]
    wrapped = all(isinstance(layer, TrainableTokensWrapper) for layer in layers)
    if wrapped:
        weights = [layer.token_adapter.base_layer.weight for layer in layers]
        rows = [layer.token_adapter.trainable_tokens_delta for layer in layers]
        wrapped = (weights[0] is weights[1]) == (rows[0] is rows[1]) and _agrees(*layers)
    if not wrapped:
        fact = "has an embedding or output layer that peft left out or computes otherwise"
        change = "leave new_special_tokens out, or choose another base model"
        raise SpecError.at("MODEL-140", base.config.model_type, fact, change)
    layers[1].bias = None


@torch.no_grad()
def _agrees(embedding: Any, head: Any) -> bool:
    """Whether both give what their own code gives, while the rows are still those of the base."""
    weight = head.token_adapter.base_layer.weight
    ids = torch.tensor([list(range(4)) + embedding.token_adapter.token_indices["default"]])
    hidden = torch.randn(1, 4, weight.shape[1], generator=torch.Generator().manual_seed(0))
    inputs = ((embedding, ids.to(weight.device)), (head, hidden.to(weight.device, weight.dtype)))
    return all(
        torch.allclose(layer(x), layer.token_adapter.base_layer(x), rtol=1e-3, atol=1e-5)
        for layer, x in inputs
    )
