"""RMSNorm of a frozen weight in few passes, keeping its input and one number a token.

transformers writes it as six operators in float32 and autograd keeps a float32 copy of the input.
On a GPU torch's own fused kernel does it; elsewhere, and for Gemma's weight (1 + w, in float32),
this autograd function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

Tensor = torch.Tensor


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) * w for x [..., width]; with `lifted`, w is 1 + weight and all is float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, lifted: bool) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale)
        ctx.weight, ctx.lifted = weight, lifted
        out: Tensor = x.float() * scale
        if lifted:
            return out.mul_(1.0 + weight.float()).to(x.dtype)
        return out.to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        weight = 1.0 + ctx.weight.float() if ctx.lifted else ctx.weight
        inner = (grads[0] * weight).float()
        wide = x.float()
        along = (inner * wide).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(x.shape[-1])
        return inner.mul_(scale).addcmul_(wide, along, value=-1.0).to(x.dtype), None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, lifted: bool = False) -> Tensor:
    """RMSNorm of `x` [..., width] by the frozen `weight` [width], in the type of `x`."""
    kind = x.device.type
    with torch.autocast(kind, enabled=False):
        if kind == "cuda" and not lifted and x.dtype == weight.dtype:
            return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
        out: Tensor = _RmsNorm.apply(x, weight, eps, lifted)  # type: ignore[no-untyped-call]
        return out
