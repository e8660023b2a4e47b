"""Puts the kernel of `experts` into a mixture with LoRA layers, where it does what peft does."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper

from tuning.models.kernels import experts, parity


def fuse(parent: torch.nn.Module, adapter: str, plain: Callable[[Any], bool]) -> int | None:
    """Fuse the LoRA layers `adapter` of a mixture's experts directly under `parent`.

    `plain` says whether a kernel computes all that a layer does. Returns how many were replaced, or
    None where the kernel computes something else.
    """
    if isinstance(parent, ParamWrapper):
        return 0
    outers = [child for child in parent.children() if isinstance(child, ParamWrapper)]
    replaced = [_fuse_mixture(outer, adapter, plain) for outer in outers]
    return None if None in replaced else sum(filter(None, replaced))


def _fuse_mixture(outer: Any, adapter: str, plain: Callable[[Any], bool]) -> int | None:
    """Fuse the LoRA layers around a mixture's experts, of which `outer` is the outermost."""
    base, layers = outer.get_base_layer(), list(experts.nested(outer))
    if not experts.suits(base) or not all(plain(layer) for layer in layers):
        return None
    routed = partial(_routed, base.num_experts, outer.lora_A[adapter].weight.device)
    own = vars(outer).get("forward", partial(type(outer).forward, outer))
    forward = _forward(layers, adapter, own)
    _, width, _ = experts.shape(base, "gate_up_proj" if base.has_gate else "up_proj")
    like = outer.lora_A[adapter].weight.new_empty(
        width, dtype=experts.dtype_of(base, outer.parameter_name)
    )
    pairs = [(part.lora_A[adapter].weight, part.lora_B[adapter].weight) for part in layers]
    if not parity.agrees(
        lambda x: [own(x[0], *routed(x))],
        lambda x: [forward(outer, x[0], *routed(x))],
        pairs,
        like=like,
        scales=(1.0,),  # the activation is the module's own
    ):
        return None
    forward.fused = True  # type: ignore[attr-defined]  # for `undo`
    outer.forward = types.MethodType(forward, outer)
    return len(layers)


def _routed(count: int, device: torch.device, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two experts of each token of `x` [1, tokens, width], and their shares."""
    token = torch.arange(x.shape[1], device=device)
    chosen = torch.stack([token % count, (3 * token + 1) % count], dim=1)
    return chosen, torch.tensor([0.75, 0.25], device=device, dtype=x.dtype).expand(len(token), 2)


def _forward(layers: list[Any], adapter: str, own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor, *routing: Any, **kwargs: Any) -> Any:
        active = not any(
            layer.disable_adapters or layer.merged or layer.active_adapters != [adapter]
            for layer in layers
        )
        if kwargs or len(routing) != 2 or not active:
            return own(x, *routing, **kwargs)
        low = {
            layer.parameter_name: experts.low_rank(
                layer.lora_A[adapter].weight,
                layer.lora_B[adapter].weight,
                layer.num_experts,
                layer.scaling[adapter],
            )
            for layer in layers
        }
        return experts.forward(self.get_base_layer(), x, *routing, low)

    return forward
