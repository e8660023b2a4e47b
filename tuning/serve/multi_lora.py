"""Multi-LoRA batching: several adapters on one model, selected per token.

All adapters of a linear layer are concatenated along the rank, as one A and one B. A token has a
weight per adapter, and its row of A x is multiplied with the weights of the ranks' adapters, so

    y = W x + sum over adapters of weight * scaling * B A x

holds exactly for one adapter, for none (the base), and for any weighted sum, which is what PEFT's
`add_weighted_adapter(..., combination_type="cat")` computes. Requests for different models share
one forward pass.

PEFT's mixed batches (`adapter_names`) select adapters per row, but continuous batching packs all
requests into one row; weighted sums would also need an extra adapter each. Otherwise the arithmetic
is PEFT's: adapters are float32, and the sum is rounded to the layer's type.
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
from tuning.models.kernels import experts
from tuning.models.survey import survey

PREFIX = "base_model.model."
FLOATS = frozenset({"F16", "BF16", "F32"})


@dataclass(frozen=True)
class LayerWeights:
    """One adapter's weights of one linear layer. Float32, on the model's device."""

    a: torch.Tensor  # [rank, inputs]
    b: torch.Tensor  # [outputs, rank], times the scaling (and DoRA's norm)
    dora_scale: torch.Tensor | None  # [outputs]: multiple of the layer's own output that DoRA adds


def load(adapter: adapters.Adapter, model: Any) -> dict[str, LayerWeights]:
    """The adapter's weights by the full name of the layer of `model`.

    Raises SpecError for a layer that the model lacks, a wrong shape or type, and a number that is
    not finite.
    """
    path = adapter.folder / adapters.WEIGHTS
    found = survey(model)
    layers = {name: model.get_submodule(name) for name in found.linears}
    stored, missing = adapters.places(adapter, found.linears, found.experts)
    problems = [*_misfits(adapter, model, layers, stored, missing)]
    if problems:
        raise SpecError(problems)
    is_dora = bool(adapter.config.get("use_dora"))
    weights = {}
    with safetensors.safe_open(path, framework="pt") as file:
        for name, place in stored.items():
            tensors = {key: file.get_tensor(key) for key in _tensors(adapter, place)}
            problems += [
                Problem("MODEL-208", f"{path} {key}", "is not finite", "fetch or train it again")
                for key, tensor in tensors.items()
                if not tensor.isfinite().all()
            ]
            if not problems:
                by_kind = {_kind(key): tensor.float() for key, tensor in tensors.items()}
                layer = layers.get(name) or model.get_submodule(name.rpartition(".")[0])
                weights[name] = _weights(layer, by_kind, scaling(adapter), is_dora)
    if problems:
        raise SpecError(problems)
    return weights


def scaling(adapter: adapters.Adapter) -> float:
    """The factor of B A: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    alpha = float(adapter.config["lora_alpha"])
    return alpha / (math.sqrt(adapter.rank) if adapter.config.get("use_rslora") else adapter.rank)


def _tensors(adapter: adapters.Adapter, module: str) -> list[str]:
    return [key for key in adapter.tensors if key.startswith(f"{PREFIX}{module}.lora_")]


def _misfits(
    adapter: adapters.Adapter,
    model: Any,
    layers: dict[str, Any],
    stored: dict[str, str],
    missing: list[str],
) -> Iterable[Problem]:
    base_name = f", {adapter.base_model}" if adapter.base_model else ""
    change = f"use it with its own base model{base_name}"
    if missing:  # another family: the same holds for all other layers
        what = f"does not fit the base model, which has no {missing[0]}"
        yield Problem("MODEL-210", str(adapter.folder), what, change)
        return
    for name, place in stored.items():
        rank = adapter.rank
        if name in layers:
            inputs, outputs = layers[name].in_features, layers[name].out_features
        else:
            mixture = model.get_submodule(name.rpartition(".")[0])
            if not experts.suits(mixture):
                what = f"adapts {type(mixture).__name__}, which no server here batches"
                merged = "merge it with its base (python -m tuning merge) and serve that"
                yield Problem("MODEL-210", str(adapter.folder), what, merged)
                return
            count, inputs, outputs = experts.shape(mixture, name.rpartition(".")[2])
            rank *= count
        expected = {
            "lora_A": (rank, inputs),
            "lora_B": (outputs, rank),
            "lora_magnitude_vector": (outputs,),
        }
        for key in _tensors(adapter, place):
            tensor, kind = adapter.tensors[key], _kind(key)
            if tensor.shape != expected[kind]:
                what = f"has shape {tensor.shape}; the base model needs {expected[kind]}"
                yield Problem("MODEL-210", key, what, change)
            if tensor.dtype not in FLOATS:
                what = f"is of type {tensor.dtype}"
                yield Problem("MODEL-209", key, what, "save the adapter in BF16, F16 or F32")


def _kind(key: str) -> str:
    return next(part for part in key.split(".") if part.startswith("lora_"))


def _weights(
    layer: Any, tensors: dict[str, torch.Tensor], scale: float, is_dora: bool
) -> LayerWeights:
    device = next(layer.parameters()).device
    a, b = tensors["lora_A"].to(device), tensors["lora_B"].to(device) * scale
    if not is_dora:
        return LayerWeights(a, b, None)
    adapted = dequantize_module_weight(layer).float() + b @ a
    ratio = tensors["lora_magnitude_vector"].to(device) / torch.linalg.norm(adapted, dim=1)
    return LayerWeights(a, b * ratio[:, None], ratio - 1)


class MultiLora:
    """The adapters on a model, and which of them the next forward pass uses for each token."""

    def __init__(self, model: Any, loaded: Sequence[dict[str, LayerWeights]]) -> None:
        """Attach the adapters of `loaded` to `model`; an adapter is known by its index."""
        self.count = len(loaded)
        self.weights: torch.Tensor | None = None  # [tokens, adapters]; None: the base alone
        self.active: tuple[int, ...] = ()  # adapters with a weight other than 0 for some token
        self._rank_weights: dict[tuple[int, ...], torch.Tensor | None] = {}  # shared by layers
        self._hooks = []
        self._mixtures: dict[str, _Mixture] = {}
        linears = set(survey(model).linears)
        for name in sorted({name for weights in loaded for name in weights}):
            here = {i: weights[name] for i, weights in enumerate(loaded) if name in weights}
            if name in linears:
                layer = model.get_submodule(name)
                self._hooks.append(layer.register_forward_hook(_LayerHook(self, here)))
                continue
            path, _, parameter = name.rpartition(".")
            if path not in self._mixtures:
                self._mixtures[path] = _Mixture(self, model.get_submodule(path))
            self._mixtures[path].add(parameter, here)

    def remove(self) -> None:
        """Detach the adapters from the model."""
        for hook in self._hooks:
            hook.remove()
        for mixture in self._mixtures.values():
            mixture.remove()

    def use(self, rows: Iterable[tuple[Sequence[float], int]], device: Any) -> None:
        """Set the adapters of the next forward pass: (adapters' weights, number of tokens)."""
        rows = list(rows)
        self.active = tuple(i for i in range(self.count) if any(row[i] for row, _ in rows))
        self._rank_weights.clear()
        if not self.active:
            self.weights = None
            return
        table = torch.tensor([row for row, _ in rows], dtype=torch.float32)
        counts = torch.tensor([count for _, count in rows])
        self.weights = table.repeat_interleave(counts, dim=0).to(device)

    def rank_weights(self, owners: tuple[int, ...]) -> torch.Tensor | None:
        """Weights [tokens, ranks] of ranks that belong to `owners`; None if all are 1."""
        if owners not in self._rank_weights:
            assert self.weights is not None, "called only while adapters are active"
            weights = self.weights[:, list(owners)]
            self._rank_weights[owners] = None if bool((weights == 1).all()) else weights
        return self._rank_weights[owners]


@torch.no_grad()
def overflowing(model: Any, loras: MultiLora) -> list[int]:
    """Adapters with which the model's logits are not finite, though their own numbers are."""
    ids = torch.tensor([[1, 2, 3, 4]], device=model.device)
    indices = []
    for i in range(loras.count):
        weights = [float(i == j) for j in range(loras.count)]
        loras.use([(weights, ids.shape[1])], model.device)
        if not model(input_ids=ids, use_cache=False).logits.isfinite().all():
            indices.append(i)
    loras.use([], model.device)
    return indices


def _spans(weights: dict[int, LayerWeights], ranks: Iterable[int]) -> dict[int, tuple[int, int]]:
    """The ranks of each adapter, where those of all lie side by side."""
    spans, end = {}, 0
    for i, rank in zip(weights, ranks, strict=True):
        spans[i] = end, end + rank
        end += rank
    return spans


class _Mixture:
    """The experts of one mixture, computed with the adapters' low-rank parts beside them."""

    def __init__(self, loras: MultiLora, module: Any) -> None:
        self._loras, self._module = loras, module
        self._own, self._put = module.forward, vars(module).get("forward")
        self._low: dict[str, experts.LowRank] = {}
        self._owners: dict[str, tuple[int, ...]] = {}
        module.forward = self

    def add(self, parameter: str, weights: dict[int, LayerWeights]) -> None:
        """Put the adapters of one expert parameter beside it."""
        count = self._module.num_experts
        parts = [experts.low_rank(each.a, each.b, count, 1.0) for each in weights.values()]
        self._low[parameter] = experts.LowRank(
            torch.cat([part.a for part in parts], dim=1),
            torch.cat([part.b for part in parts], dim=2),
            1.0,
        )
        spans = _spans(weights, (part.a.shape[1] for part in parts))
        self._owners[parameter] = tuple(i for i, (a, b) in spans.items() for _ in range(a, b))

    def remove(self) -> None:
        """Let the module compute as before."""
        del self._module.forward
        if self._put is not None:  # packed experts have a forward of their own
            self._module.forward = self._put

    def __call__(self, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> Any:
        """The mixture's output, with the active adapters."""
        if self._loras.weights is None:
            return self._own(hidden, chosen, shares)
        scaled = {name: self._loras.rank_weights(owners) for name, owners in self._owners.items()}
        weights = {name: found for name, found in scaled.items() if found is not None}
        return experts.forward(self._module, hidden, chosen, shares, self._low, weights)


class _LayerHook:
    """A forward hook on one linear layer that adds the adapters' outputs."""

    def __init__(self, loras: MultiLora, weights: dict[int, LayerWeights]) -> None:
        self._loras = loras
        self._a = torch.cat([each.a for each in weights.values()])
        self._b = torch.cat([each.b for each in weights.values()], dim=1)
        self._spans = _spans(weights, (each.a.shape[0] for each in weights.values()))
        self._owners = tuple(i for i, (a, b) in self._spans.items() for _ in range(a, b))
        self._dora_scales = {
            i: each.dora_scale for i, each in weights.items() if each.dora_scale is not None
        }

    def __call__(self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
        """The layer's output plus the adapters'; None (unchanged) if no adapter is active."""
        weights = self._loras.weights
        spans = [self._spans[i] for i in self._loras.active if i in self._spans]
        if weights is None or not spans:
            return None
        first, last = spans[0][0], spans[-1][1]  # skips ranks of inactive adapters at both ends
        hidden = torch.nn.functional.linear(inputs[0].float(), self._a[first:last])
        rank_weights = self._loras.rank_weights(self._owners[first:last])
        if rank_weights is not None:
            hidden = hidden * rank_weights
        delta = torch.nn.functional.linear(hidden, self._b[:, first:last])
        for i in self._loras.active:
            if i in self._dora_scales:
                own = output if layer.bias is None else output - layer.bias
                delta = delta + weights[:, i, None] * self._dora_scales[i] * own.float()
        return delta.add_(output).to(output.dtype)
