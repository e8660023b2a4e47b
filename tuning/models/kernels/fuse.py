"""Puts the fused kernels into a model with LoRA layers, where they compute what peft would.

Only the `forward` of single modules is replaced, so that names, weights, hooks, checkpoints and
merging stay peft's, and only where `parity` finds the same outputs and gradients. At each call the
module's own forward runs for what a kernel lacks (an adapter switched off, dropout, DoRA, another
type than the one computed in).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer

from tuning.models import shards
from tuning.models.kernels import experts, linear, mixtures, norm, parity, rotary, shadows
from tuning.models.kernels.linear import Projection
from tuning.plan.backends import COPIES, LIGER, LORA, MLP, NORM, ROTARY

ADAPTER = "default"
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Names of an MLP's wide and last projections; a gate is the first of two, or the first half of one
WIDE = {
    ("gate_proj", "up_proj"): ("down_proj", True),
    ("gate_up_proj",): ("down_proj", True),
    ("fc1",): ("fc2", False),
    ("dense_h_to_4h",): ("dense_4h_to_h", False),
}
# Classes of transformers that norm.rms_norm computes, and whether their weight is 1 + w.
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
OURS = (LORA, MLP, NORM, ROTARY)  # those that are put into modules here
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act")


@dataclass
class Fused:
    """How many modules each kernel was put into, by its name."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OURS, 0))
    refused: dict[str, int] = field(default_factory=dict)  # by kernel and class of the module

    def __str__(self) -> str:
        """The replaced modules and those left alone, for the log; empty if there are none."""
        parts = [f"{count} {name}" for name, count in self.counts.items() if count]
        parts += [
            f"{count} {name} left out (another computation)" for name, count in self.refused.items()
        ]
        return ", ".join(parts)

    def note(self, kernel: str, module: torch.nn.Module, replaced: int | None) -> None:
        """Count a module that was replaced, or (None) that computes something else."""
        if replaced is None:
            key = f"{kernel} of {type(module).__name__}"
            self.refused[key] = self.refused.get(key, 0) + 1
        self.counts[kernel] += replaced or 0


def fuse(tuned: torch.nn.Module, kernels: Collection[str]) -> Fused:
    """Put those of `kernels` into the peft model `tuned` that compute what its modules compute."""
    fused = Fused()
    if LIGER in kernels:
        fused.counts[LIGER] = _liger(tuned)
    for module in shards.each(tuned):
        if MLP in kernels:
            fused.note(MLP, module, _fuse_mlp(module))
        if LORA in kernels:
            fused.note(LORA, module, _fuse_children(module))
            fused.note(LORA, module, mixtures.fuse(module, ADAPTER, _plain))
        if NORM in kernels:
            fused.note(NORM, module, _fuse_norm(module))
        if ROTARY in kernels and not fused.counts.get(LIGER):
            fused.note(ROTARY, module, _fuse_rotary(module))
    if LORA in kernels and COPIES in kernels:
        shadows.keep(tuned, list(_trained_together(tuned)))
    return fused


def undo(tuned: torch.nn.Module) -> None:
    """Give modules that `fuse` changed their own forward again; liger's stay."""
    for module in tuned.modules():
        if getattr(vars(module).get("forward"), "fused", False):
            del module.forward
    experts.read_packed(tuned)


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


def _fuse_norm(module: Any) -> int | None:
    """Fuse `module` if it is a known norm that is not replaced yet; None if parity fails."""
    lifted = NORMS.get(type(module).__name__)
    if lifted is None or "forward" in vars(module) or module.weight.requires_grad:
        return 0
    epsilon = module.eps if lifted else module.variance_epsilon
    return _replace_all([module], [_norm_forward(float(epsilon), lifted)], module.weight)


def _norm_forward(epsilon: float, lifted: bool) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor) -> Any:
        if x.dtype != self.weight.dtype:
            return type(self).forward(self, x)
        return norm.rms_norm(x, self.weight, epsilon, lifted=lifted)

    return forward


def _fuse_rotary(module: Any) -> int | None:
    """Fuse `module` if it calls a rotary function of the usual parameters; None if parity fails."""
    own, width = rotary.function_of(module), getattr(module, "head_dim", None)
    if own is None or "forward" in vars(module) or not isinstance(width, int) or width % 4:
        return 0
    if not rotary.same(own, width):
        return None
    kind: Any = type(module)
    module.forward = types.MethodType(rotary.forward_of(kind), module)
    return 1


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
    return bool(getattr(linear.state(base), "packing_format_for_cpu", False))


def _projection(layer: Any) -> Projection:
    return Projection(
        layer.get_base_layer(),
        layer.lora_A[ADAPTER].weight,
        layer.lora_B[ADAPTER].weight,
        layer.scaling[ADAPTER],
    )


def _replace_all(
    modules: Sequence[Any],
    forwards: Sequence[Callable[..., Any]],
    like: torch.Tensor,
    scales: Sequence[float] = parity.SCALES,
) -> int | None:
    """Replace the forwards of `modules`, which read the same input, if all compute the same.

    Inputs of the test are as wide as the last dimension of `like`, of its type and device. Returns
    how many were replaced, or None.
    """
    adapters = [
        (part.lora_A[ADAPTER].weight, part.lora_B[ADAPTER].weight)
        for module in modules
        for part in module.modules()
        if isinstance(part, LoraLayer)
    ]
    same = parity.agrees(
        lambda x: [type(module).forward(module, x) for module in modules],
        lambda x: [forward(module, x) for module, forward in zip(modules, forwards, strict=True)],
        adapters,
        like=like,
        scales=scales,
    )
    if not same:
        return None
    for module, forward in zip(modules, forwards, strict=True):
        forward.fused = True  # type: ignore[attr-defined]  # for `undo`
        module.forward = types.MethodType(forward, module)
    return len(modules)


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


def _fuse_children(parent: torch.nn.Module) -> int | None:
    """Fuse the LoRA layers directly under `parent`, those of the same input together."""
    suited = {name: layer for name, layer in parent.named_children() if _suits(layer)}
    replaced = []
    for group in _groups(suited):
        layers = {name: suited[name] for name in group}
        siblings = _Siblings(layers)
        forwards = [_lora_forward(siblings, name) for name in group]
        like = _input_of(layers[group[0]])
        replaced.append(_replace_all(list(layers.values()), forwards, like, scales=(1.0,)))
    return None if None in replaced else sum(filter(None, replaced))


def _input_of(layer: Any) -> torch.Tensor:
    """A tensor as wide as the input of the LoRA layer, of the type that it is computed in."""
    base, a = layer.get_base_layer(), layer.lora_A[ADAPTER].weight
    dtype = base.compute_dtype if isinstance(base, bnb.nn.Linear4bit) else base.weight.dtype
    empty: torch.Tensor = a.new_empty(base.in_features, dtype=dtype or a.dtype)
    return empty


def _trained_together(
    tuned: torch.nn.Module,
) -> Iterator[tuple[list[torch.Tensor], torch.dtype]]:
    """Each A of the layers that kernels compute, those of the same input together, and each B."""
    for parent in tuned.modules():
        suited: dict[str, Any] = {n: layer for n, layer in parent.named_children() if _suits(layer)}
        for group in _groups(suited):
            layers = [suited[name] for name in group]
            dtype = _input_of(layers[0]).dtype
            yield [layer.lora_A[ADAPTER].weight for layer in layers], dtype
            for layer in layers:
                yield [layer.lora_B[ADAPTER].weight], dtype


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


def _fuse_mlp(module: torch.nn.Module) -> int | None:
    """Fuse `module` if it is an MLP with an adapter on each projection; None if it is another."""
    for wide, (last, gated) in WIDE.items():
        layers = [getattr(module, name, None) for name in (*wide, last)]
        if all(_suits(layer) for layer in layers):
            activation = _activation(module)
            if activation is None or not parity.same_code(type(module).forward, MLPS):
                return None
            forward = _mlp_forward(layers, activation, gated)
            return _replace_all([module], [forward], _input_of(layers[0]))
    return 0


# The forwards that `linear.mlp` computes, as transformers writes them. Compared as compiled code.


def _gated(self: Any, x: Any) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _gated_at_once(self: Any, x: Any) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _gated_in_two(self: Any, x: Any) -> Any:
    inner = self.activation_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(inner)


def _halves(self: Any, x: Any) -> Any:
    up = self.gate_up_proj(x)
    gate, up = up.chunk(2, dim=-1)
    up = up * self.activation_fn(gate)
    return self.down_proj(up)


def _plain_mlp(self: Any, x: Any) -> Any:
    x = self.fc1(x)
    x = self.activation_fn(x)
    x = self.fc2(x)
    return x


def _neox(self: Any, x: Any) -> Any:
    x = self.dense_h_to_4h(x)
    x = self.act(x)
    x = self.dense_4h_to_h(x)
    return x


def _falcon(self: Any, x: Any) -> Any:
    x = self.act(self.dense_h_to_4h(x))
    x = self.dense_4h_to_h(x)
    return x


MLPS = (_gated, _gated_at_once, _gated_in_two, _halves, _plain_mlp, _neox, _falcon)


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
