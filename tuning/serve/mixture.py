"""Several adapters on one model, so that every token can go through other ones.

All adapters of a linear layer lie side by side: the ranks of one after the ranks of the next, as
one A and one B. A token carries a weight for each adapter, and its row of A x is multiplied with
the weights of the ranks' owners, so that

    y = W x + sum over adapters of weight * scaling * B A x

holds exactly for one adapter, for none (the base), and for any weighted sum, which is what PEFT's
`add_weighted_adapter(..., combination_type="cat")` computes. Requests for different models share
one forward pass.

PEFT's own way to mix adapters in a batch (`adapter_names`) goes by rows, and continuous batching
lays all requests in one row; it also knows no weighted sums without one more adapter for each.
Arithmetic is PEFT's otherwise: adapters are float32, the sum is rounded to the layer's type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors
import torch
from peft.utils.integrations import dequantize_module_weight

from tuning import adapter as adapters
from tuning.errors import Problem, SpecError
from tuning.models.lora import projections

PREFIX = "base_model.model."
FLOATS = frozenset({"F16", "BF16", "F32"})


@dataclass(frozen=True)
class Part:
    """What one adapter does to one linear layer. Float32, on the model's device."""

    a: torch.Tensor  # [rank, inputs]
    b: torch.Tensor  # [outputs, rank], times the scaling (and DoRA's norm)
    turn: torch.Tensor | None  # [outputs]: what DoRA adds of the layer's own output


def load(found: adapters.Adapter, model: Any) -> dict[str, Part]:
    """The adapter's parts by the full name of the layer of `model` that they belong to.

    Raises SpecError naming what does not fit: a layer that the model lacks, a shape, a type, a
    number that is not finite.
    """
    path = found.folder / adapters.WEIGHTS
    layers = {name: model.get_submodule(name) for name in projections(model)}
    problems = [*_misfits(found, layers)]
    if problems:
        raise SpecError(problems)
    dora = bool(found.config.get("use_dora"))
    parts = {}
    with safetensors.safe_open(path, framework="pt") as file:
        for name in found.modules:
            tensors = {key: file.get_tensor(key) for key in _tensors(found, name)}
            problems += [
                Problem("MODEL-208", f"{path} {key}", "is not finite", "fetch or train it again")
                for key, tensor in tensors.items()
                if not tensor.isfinite().all()
            ]
            if not problems:
                parts[name] = _part(layers[name], _by_kind(tensors), scaling(found), dora)
    if problems:
        raise SpecError(problems)
    return parts


def scaling(found: adapters.Adapter) -> float:
    """What B A is multiplied with: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    alpha = float(found.config["lora_alpha"])
    return alpha / (math.sqrt(found.rank) if found.config.get("use_rslora") else found.rank)


def _tensors(found: adapters.Adapter, module: str) -> list[str]:
    return [key for key in found.tensors if key.startswith(f"{PREFIX}{module}.lora_")]


def _misfits(found: adapters.Adapter, layers: dict[str, Any]) -> Iterable[Problem]:
    named = f", {found.base_model}" if found.base_model else ""
    change = f"use it with its own base model{named}"
    for name in found.modules:
        if name not in layers:
            what = f"does not fit the base model, which has no {name}"
            yield Problem("MODEL-210", str(found.folder), what, change)
            return  # another family: all the others would say the same
        inputs, outputs = layers[name].in_features, layers[name].out_features
        wanted = {
            "lora_A": (found.rank, inputs),
            "lora_B": (outputs, found.rank),
            "lora_magnitude_vector": (outputs,),
        }
        for key in _tensors(found, name):
            tensor, kind = found.tensors[key], _kind(key)
            if tensor.shape != wanted[kind]:
                what = f"has shape {tensor.shape}; the base model needs {wanted[kind]}"
                yield Problem("MODEL-210", key, what, change)
            if tensor.dtype not in FLOATS:
                what = f"is of type {tensor.dtype}"
                yield Problem("MODEL-209", key, what, "save the adapter in BF16, F16 or F32")


def _kind(key: str) -> str:
    return next(part for part in key.split(".") if part.startswith("lora_"))


def _by_kind(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {_kind(key): tensor.float() for key, tensor in tensors.items()}


def _part(layer: Any, tensors: dict[str, torch.Tensor], scale: float, dora: bool) -> Part:
    device = layer.weight.device
    a, b = tensors["lora_A"].to(device), tensors["lora_B"].to(device) * scale
    if not dora:
        return Part(a, b, None)
    whole = dequantize_module_weight(layer).float() + b @ a
    ratio = tensors["lora_magnitude_vector"].to(device) / torch.linalg.norm(whole, dim=1)
    return Part(a, b * ratio[:, None], ratio - 1)


class Mixture:
    """The adapters on a model, and which of them the tokens of the coming forward pass use."""

    def __init__(self, model: Any, loaded: Sequence[dict[str, Part]]) -> None:
        """Put the adapters of `loaded` on `model`; an adapter's number is its place in the list."""
        self.count = len(loaded)
        self.weights: torch.Tensor | None = None  # [tokens, adapters]; None: the base alone
        self.present: tuple[int, ...] = ()  # adapters with a weight other than 0 in some token
        self._rows: dict[tuple[int, ...], torch.Tensor | None] = {}  # layers alike share them
        self._hooks = []
        for name in sorted({name for parts in loaded for name in parts}):
            here = {i: parts[name] for i, parts in enumerate(loaded) if name in parts}
            layer = model.get_submodule(name)
            self._hooks.append(layer.register_forward_hook(_Layer(self, here)))

    def remove(self) -> None:
        """Take the adapters off the model."""
        for hook in self._hooks:
            hook.remove()

    def use(self, rows: Iterable[tuple[Sequence[float], int]], device: Any) -> None:
        """Say what the coming tokens use: weights of the adapters, and for how many tokens."""
        rows = list(rows)
        present = [i for i in range(self.count) if any(row[i] for row, _ in rows)]
        self.present = tuple(present)
        self._rows.clear()
        if not present:
            self.weights = None
            return
        table = torch.tensor([row for row, _ in rows], dtype=torch.float32)
        counts = torch.tensor([count for _, count in rows])
        self.weights = table.repeat_interleave(counts, dim=0).to(device)

    def rows(self, owners: tuple[int, ...]) -> torch.Tensor | None:
        """Weights [tokens, ranks] of ranks that belong to `owners`; None if all of them are 1."""
        if owners not in self._rows:
            assert self.weights is not None, "asked only while adapters are in use"
            found = self.weights[:, list(owners)]
            self._rows[owners] = None if bool((found == 1).all()) else found
        return self._rows[owners]


@torch.no_grad()
def silent(model: Any, mixture: Mixture) -> list[int]:
    """Adapters with which the model says nothing: they overflow, though each number is finite."""
    ids = torch.tensor([[1, 2, 3, 4]], device=model.device)
    found = []
    for i in range(mixture.count):
        weights = [float(i == j) for j in range(mixture.count)]
        mixture.use([(weights, ids.shape[1])], model.device)
        if not model(input_ids=ids, use_cache=False).logits.isfinite().all():
            found.append(i)
    mixture.use([], model.device)
    return found


class _Layer:
    """A hook on one linear layer that adds what the adapters say."""

    def __init__(self, mixture: Mixture, parts: dict[int, Part]) -> None:
        self._mixture = mixture
        self._a = torch.cat([part.a for part in parts.values()])
        self._b = torch.cat([part.b for part in parts.values()], dim=1)
        ranks = [part.a.shape[0] for part in parts.values()]
        ends = [sum(ranks[: i + 1]) for i in range(len(ranks))]
        self._spans = {
            i: (end - rank, end) for i, end, rank in zip(parts, ends, ranks, strict=True)
        }
        self._owners = tuple(i for i, rank in zip(parts, ranks, strict=True) for _ in range(rank))
        self._turns = {i: part.turn for i, part in parts.items() if part.turn is not None}

    def __call__(self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
        """The layer's output with the adapters' share; None (leave it) if none is in use."""
        weights = self._mixture.weights
        spans = [self._spans[i] for i in self._mixture.present if i in self._spans]
        if weights is None or not spans:
            return None
        first, last = spans[0][0], spans[-1][1]  # ranks of unused adapters outside are skipped
        hidden = torch.nn.functional.linear(inputs[0].float(), self._a[first:last])
        rows = self._mixture.rows(self._owners[first:last])
        share = torch.nn.functional.linear(
            hidden if rows is None else hidden * rows, self._b[:, first:last]
        )
        for i in self._mixture.present:
            if i in self._turns:
                own = output if layer.bias is None else output - layer.bias
                share = share + weights[:, i, None] * self._turns[i] * own.float()
        return share.add_(output).to(output.dtype)
