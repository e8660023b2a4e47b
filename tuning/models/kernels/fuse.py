"""Puts the fused kernels into a model with LoRA layers, where they compute what peft would.

Only the `forward` of single modules is replaced, so that names, weights, hooks, checkpoints and
merging stay peft's. What a kernel does not cover (an adapter switched off, dropout, DoRA, another
type than the one computed in) takes the module's own way, at each call.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import types
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer

from tuning.models.kernels import linear, norm
from tuning.models.kernels.linear import Projection
from tuning.plan.backends import LIGER, LORA, MLP, NORM

ADAPTER = "default"
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Names of an MLP's wide and last projections; a gate is the first of two, or the first half of one
WIDE = {
    ("gate_proj", "up_proj"): ("down_proj", True),
    ("gate_up_proj",): ("down_proj", True),
    ("fc1",): ("fc2", False),
    ("dense_h_to_4h",): ("dense_4h_to_h", False),
}
# Classes of transformers that norm.rms_norm computes, and whether their weight is 1 + w
NORMS = {
    "LlamaRMSNorm": False,
    "MistralRMSNorm": False,
    "Ministral3RMSNorm": False,
    "Phi3RMSNorm": False,
    "Qwen2RMSNorm": False,
    "Qwen3RMSNorm": False,
    "SmolLM3RMSNorm": False,
    "GraniteRMSNorm": False,
    "GemmaRMSNorm": True,
    "Gemma3RMSNorm": True,
}
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act")


@dataclass
class Fused:
    """How many modules each kernel was put into, by its name."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys((LORA, MLP, NORM), 0))

    def __str__(self) -> str:
        """What was replaced, for the log; empty if nothing was."""
        return ", ".join(f"{count} {name}" for name, count in self.counts.items() if count)


def fuse(tuned: torch.nn.Module, kernels: Collection[str]) -> Fused:
    """Put those of `kernels` into the peft model `tuned` that suit its modules."""
    found = Fused()
    if LIGER in kernels:
        found.counts[LIGER] = _liger(tuned)
    for module in list(tuned.modules()):
        if MLP in kernels:
            found.counts[MLP] += _fuse_mlp(module)
        if LORA in kernels:
            found.counts[LORA] += _fuse_children(module)
        if NORM in kernels:
            found.counts[NORM] += _fuse_norm(module)
    return found


def _liger(tuned: Any) -> int:
    """liger's norms and rotary positions; its loss would replace trl's forward."""
    if importlib.util.find_spec("liger_kernel") is None:
        return 0
    monkey_patch = importlib.import_module("liger_kernel.transformers.monkey_patch")
    base = tuned.get_base_model()
    apply = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(base.config.model_type)
    if apply is None:
        return 0
    known = inspect.signature(apply).parameters
    off = {name: False for name in ("swiglu", "geglu", "cross_entropy") if name in known}
    apply(model=base, fused_linear_cross_entropy=False, **off)
    return 1


def _fuse_norm(module: Any) -> int:
    """Fuse `module` if it is a norm of a class we know that nobody else has replaced."""
    lifted = NORMS.get(type(module).__name__)
    if lifted is None or "forward" in vars(module) or module.weight.requires_grad:
        return 0
    epsilon = module.eps if lifted else module.variance_epsilon
    _replace(module, _norm_forward(float(epsilon), lifted))
    return 1


def _norm_forward(epsilon: float, lifted: bool) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor) -> Any:
        if x.dtype != self.weight.dtype:
            return type(self).forward(self, x)
        return norm.rms_norm(x, self.weight, epsilon, lifted=lifted)

    return forward


def _suits(layer: Any) -> bool:
    """Whether a fused kernel computes what this LoRA layer does."""
    if not isinstance(layer, LoraLayer) or ADAPTER not in layer.lora_A:
        return False
    base = layer.get_base_layer()
    return (isinstance(base, bnb.nn.Linear4bit) or type(base) is torch.nn.Linear) and _plain(layer)


def _plain(layer: Any) -> bool:
    dropout = layer.lora_dropout[ADAPTER]
    return (
        isinstance(dropout, torch.nn.Identity)
        and not layer.lora_variant
        and not layer.lora_bias.get(ADAPTER)
        and not getattr(layer, "fan_in_fan_out", False)
        and list(layer.lora_A) == [ADAPTER]
    )


def _dtype(x: torch.Tensor, layers: Collection[Any]) -> torch.dtype | None:
    """The type that these layers compute in for `x`; None where the kernels do not apply now."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    for layer in layers:
        if layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER]:
            return None
        base = layer.get_base_layer()
        packed = isinstance(base, bnb.nn.Linear4bit)
        if packed and (base.compute_dtype != dtype or _repacked(base)):
            return None
        if not torch.is_autocast_enabled(kind) and dtype != layer.lora_A[ADAPTER].weight.dtype:
            return None
    return dtype


def _repacked(base: Any) -> bool:
    """Whether bitsandbytes laid the weight out anew for a kernel of this processor."""
    return bool(getattr(base.weight.quant_state, "packing_format_for_cpu", False))


def _projection(layer: Any) -> Projection:
    return Projection(
        layer.get_base_layer(),
        layer.lora_A[ADAPTER].weight,
        layer.lora_B[ADAPTER].weight,
        layer.scaling[ADAPTER],
    )


def _replace(module: torch.nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = types.MethodType(forward, module)


# LoRA layers.


class _Siblings:
    """Projections of the same input: the first one that is asked computes all, once."""

    def __init__(self, layers: dict[str, Any]) -> None:
        self.layers = layers
        self.x: torch.Tensor | None = None  # the input that `waiting` was computed from
        self.waiting: dict[str, torch.Tensor] = {}

    def forward(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        """The output of the projection `name` for `x`; None where the kernel does not apply."""
        if self.x is x and name in self.waiting:
            out = self.waiting.pop(name)
            if not self.waiting:
                self.x = None
            return out
        self.x, self.waiting = None, {}
        dtype = _dtype(x, self.layers.values())
        if dtype is None:
            return None
        parts = [_projection(layer) for layer in self.layers.values()]
        outs = dict(zip(self.layers, linear.linears(x, parts, dtype=dtype), strict=True))
        out = outs.pop(name)
        if outs:
            self.x, self.waiting = x, outs
        return out


def _fuse_children(parent: torch.nn.Module) -> int:
    """Fuse the LoRA layers directly under `parent`, those of the same input together."""
    suited = {name: layer for name, layer in parent.named_children() if _suits(layer)}
    for group in _groups(suited):
        siblings = _Siblings({name: suited[name] for name in group})
        for name in group:
            _replace(suited[name], _lora_forward(siblings, name))
    return len(suited)


def _groups(names: Collection[str]) -> Iterator[tuple[str, ...]]:
    left = list(names)
    for together in SIBLINGS:
        if all(name in left for name in together):
            yield together
            left = [name for name in left if name not in together]
    yield from ((name,) for name in left)


def _lora_forward(siblings: _Siblings, name: str) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = None if args or kwargs else siblings.forward(name, x)
        return type(self).forward(self, x, *args, **kwargs) if out is None else out

    return forward


# MLPs.


def _fuse_mlp(module: torch.nn.Module) -> int:
    """Fuse `module` if it is an MLP that the kernel knows, with an adapter on each projection."""
    for wide, (last, gated) in WIDE.items():
        layers = [getattr(module, name, None) for name in (*wide, last)]
        if all(_suits(layer) for layer in layers):
            activation = _activation(module)
            if activation is None:
                return 0
            _replace(module, _mlp_forward(layers, activation, gated))
            return 1
    return 0


def _activation(module: torch.nn.Module) -> linear.Activation | None:
    found = [part for name, part in module.named_children() if name in ACTIVATION_NAMES]
    return linear.ACTIVATIONS.get(type(found[0]).__name__) if len(found) == 1 else None


def _mlp_forward(
    layers: list[Any], activation: linear.Activation, gated: bool
) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor) -> Any:
        dtype = _dtype(x, layers)
        if dtype is None:
            return type(self).forward(self, x)
        *wide, down = [_projection(layer) for layer in layers]
        return linear.mlp(x, linear.Mlp(tuple(wide), down, activation, gated), dtype=dtype)

    return forward
