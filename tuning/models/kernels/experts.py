"""LoRA on the experts of a mixture, without a copy of all experts.

peft adds B A to the whole stack of experts at each call and lets autograd keep the sum: the memory
of all experts, of which a token uses a few. Here the low-rank part is computed beside the product,
y = x W_e + scale * (x A_e) B_e with the tokens sorted by expert, as transformers' own grouped
product does, and packed experts are unpacked for a product and forgotten. A frozen weight gets no
gradient.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper
from torch.autograd.function import once_differentiable
from transformers.integrations import moe

from tuning.models import four_bit

Tensor = torch.Tensor
ALIGNED = 8  # numbers of 16 bits that a grouped product reads at once


@dataclass(frozen=True)
class LowRank:
    """An adapter of one expert parameter: scale * B A for each expert."""

    a: Tensor  # [experts, rank, inputs]
    b: Tensor  # [experts, outputs, rank]
    scale: float


def low_rank(a: Tensor, b: Tensor, experts: int, scale: float) -> LowRank:
    """Of peft's matrices: A [experts x rank, inputs] and B [outputs, rank x experts]."""
    whole_a = a.reshape(experts, -1, a.shape[-1])
    return LowRank(whole_a, b.reshape(b.shape[0], -1, experts).permute(2, 0, 1), scale)


def suits(module: Any) -> bool:
    """Whether `module` is computed as `forward` does: one of transformers' standard mixtures."""
    return all(
        hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate")
    ) and not (module.has_post_expert_norm or getattr(module, "_is_expert_parallel", False))


def dtype_of(module: Any, name: str) -> torch.dtype:
    """The type that an expert parameter is computed in; a packed one is not unpacked for it."""
    dtype: torch.dtype = four_bit.states(module).get(name, module.get_parameter(name)).dtype
    return dtype


def shape(module: Any, name: str) -> tuple[int, int, int]:
    """How many experts the parameter has, and the inputs and outputs of each."""
    size = four_bit.states(module).get(name, module.get_parameter(name)).shape
    count, first, second = (int(n) for n in size)
    return (count, first, second) if module.is_transposed else (count, second, first)


class _Frozen(torch.autograd.Function):
    """Rows of x, sorted by expert, times that expert's frozen matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, module: Any, name: str) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.of = module, name
        out: Tensor = moe._grouped_mm(x, _matrices(module, name), offs=offsets)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (offsets,) = ctx.saved_tensors
        matrices = _matrices(*ctx.of).transpose(-2, -1)
        return moe._grouped_mm(grads[0].contiguous(), matrices, offs=offsets), None, None, None


def _matrices(module: Any, name: str) -> Tensor:
    """[experts, inputs, outputs]"""
    weight = four_bit.read(module, name)
    return weight if module.is_transposed else weight.transpose(-2, -1)


def _linear(
    x: Tensor,
    offsets: Tensor,
    experts: Tensor,
    module: Any,
    name: str,
    adapter: LowRank | None,
    weights: Tensor | None,
) -> Tensor:
    """Rows [rows, inputs] -> [rows, outputs], each by its expert; `weights` [rows, rank] of A x."""
    out: Tensor = _Frozen.apply(x, offsets, module, name)  # type: ignore[no-untyped-call]
    if module.has_bias:
        out = out + getattr(module, f"{name}_bias")[experts]
    if adapter is None:
        return out
    rank = adapter.a.shape[1]
    missing = -rank % ALIGNED
    a, b = adapter.a.to(x.dtype), adapter.b.to(x.dtype)
    if missing:
        a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    low = moe._grouped_mm(x, a.transpose(-2, -1), offs=offsets)
    if weights is not None:
        low = low * F.pad(weights, (0, missing)).to(low.dtype)
    delta = moe._grouped_mm(low, b.transpose(-2, -1).contiguous(), offs=offsets)
    added: Tensor = out + adapter.scale * delta
    return added


def nested(outer: Any) -> Iterator[Any]:
    """peft's layers around one module's parameters, the outermost first."""
    while isinstance(outer, ParamWrapper):
        yield outer
        outer = outer.base_layer


def read_packed(tuned: torch.nn.Module) -> None:
    """Let peft's layers around packed experts add their adapters to the unpacked weights."""
    layers: list[Any] = [m for m in tuned.modules() if isinstance(m, ParamWrapper)]
    inner = {id(layer.base_layer) for layer in layers}
    for layer in layers:
        if id(layer) not in inner and four_bit.states(layer.get_base_layer()):
            layer.forward = types.MethodType(with_sums, layer)


def with_sums(self: Any, *args: Any, **kwargs: Any) -> Any:
    """peft's forward of a parameter's layer: the module computes with W + scale * B A."""
    base, sums = self.get_base_layer(), {}
    for layer in nested(self):
        if not (layer.disable_adapters or layer.merged):
            weight = four_bit.read(base, layer.parameter_name)
            for name in layer.active_adapters:
                left, right, scale = _factors(layer, name, weight)
                with torch.autocast(weight.device.type, enabled=False):
                    weight = torch.baddbmm(weight, left, right, alpha=scale)
            sums[layer.parameter_name] = weight
    return four_bit.compute(base, sums, *args, **kwargs)


def _factors(layer: Any, name: str, weight: Tensor) -> tuple[Tensor, Tensor, float]:
    part = low_rank(
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        layer.num_experts,
        layer.scaling[name],
    )
    left, right = part.b.to(weight.dtype), part.a.to(weight.dtype)
    if left.shape[1] != weight.shape[1] or not layer._did_swap_in_out_features:
        left, right = right.transpose(-2, -1), left.transpose(-2, -1)
    return left, right, part.scale


def forward(
    module: Any,
    hidden: Tensor,
    chosen: Tensor,
    shares: Tensor,
    adapters: Mapping[str, LowRank],
    rank_weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The mixture's output [tokens, width] for `hidden` [tokens, width].

    `chosen` [tokens, k] are the experts of a token and `shares` [tokens, k] their weights, as the
    router gives them. `rank_weights` [tokens, rank] scale each rank of A x, by parameter.
    """
    per_token = chosen.shape[-1]
    experts, order = torch.sort(chosen.reshape(-1))
    numbers = experts.float() if hidden.device.type == "cpu" else experts.int()  # as histc wants
    counts = torch.histc(numbers, bins=module.num_experts, min=0, max=module.num_experts - 1)
    offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
    token = order // per_token
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    weights = {} if rank_weights is None else rank_weights
    x = hidden[token].to(dtype_of(module, names[0]))

    def linear(x: Tensor, name: str) -> Tensor:
        scaled = weights[name][token] if name in weights else None
        return _linear(x, offsets, experts, module, name, adapters.get(name), scaled)

    wide = linear(x, names[0])
    inner = module._apply_gate(wide) if module.has_gate else module.act_fn(wide)
    out = linear(inner.to(x.dtype), names[1]) * shares.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    summed = out[back].view(*chosen.shape, -1).sum(dim=1)
    return summed.to(hidden.dtype)
