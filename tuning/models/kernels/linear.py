"""LoRA layers and MLPs as single autograd functions over cuBLAS, for 16-bit and 4-bit bases.

peft computes base, A, B, scale and sum one after the other and lets autograd keep what each needs.
Here the low-rank part is added into the base's output by `addmm`, projections of the same input
share its reads and its one saved copy, and an MLP keeps the outputs of its first projections only:
the activation is computed again in the backward. Frozen weights get no gradient, packed ones are
unpacked for a product and forgotten. In layers that are computed again they can be saved for the
backward: what their first forward saves is forgotten. Without dropout that is peft's result, with
fewer roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from tuning.models.kernels import shadows

Tensor = torch.Tensor
KEEPS = "keeps_unpacked"  # attribute of 4-bit layers whose unpacked weight is saved


@dataclass(frozen=True)
class Projection:
    """One frozen linear layer and its adapter: y = x W^T + b + scale * (x A^T) B^T."""

    base: torch.nn.Linear  # may be bitsandbytes' Linear4bit
    a: Tensor  # [rank, inputs]
    b: Tensor  # [outputs, rank]
    scale: float

    @property
    def keeps(self) -> bool:
        """Whether the unpacked weight is saved for the backward."""
        return bool(getattr(self.base, KEEPS, False))


@dataclass(frozen=True)
class Activation:
    """An elementwise function, and its gradient: from that of its output, and in its place."""

    forward: Callable[[Tensor], Tensor]
    backward_: Callable[[Tensor, Tensor], Tensor]  # gradient of the output, input


def _silu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    made: Tensor = torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)
    return made


_SILU = Activation(F.silu, _silu_backward_)


def _gelu(approximate: str) -> Activation:
    def backward_(grad: Tensor, x: Tensor) -> Tensor:
        made: Tensor = torch.ops.aten.gelu_backward.grad_input(
            grad, x, approximate=approximate, grad_input=grad
        )
        return made

    return Activation(lambda x: F.gelu(x, approximate=approximate), backward_)


ACTIVATIONS = {  # by the class that transformers uses for them
    "SiLU": _SILU,
    "SiLUActivation": _SILU,
    "GELUTanh": _gelu("tanh"),
    "NewGELUActivation": _gelu("tanh"),
    "GELUActivation": _gelu("none"),
    "GELU": _gelu("none"),
}


def weight(base: torch.nn.Linear, dtype: torch.dtype) -> Tensor:
    """The frozen weight [outputs, inputs] in `dtype`; a packed one is unpacked for this call."""
    if not isinstance(base, bnb.nn.Linear4bit):
        return base.weight.to(dtype)
    unpack: Callable[[], Tensor] = getattr(base, "unpacked", None) or partial(
        bnb.functional.dequantize_4bit, base.weight.data, state(base)
    )
    return unpack().to(dtype)


def state(base: Any) -> Any:
    """How the weight of a 4-bit layer is packed; a weight that ranks share does not know it."""
    return getattr(base.weight, "quant_state", None) or base.quant_state


def _product(a: Tensor, b: Tensor, scale: float, *, out: Tensor | None = None) -> Tensor:
    """scale * a b in one pass, for matrices."""
    out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    return out.addmm_(a, b, beta=0, alpha=scale)


def _summed(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`: on a GPU in float32 right from the sums of 16-bit factors."""
    if a.dtype == dtype or a.device.type != "cuda" or dtype != torch.float32:
        return (a @ b).to(dtype)
    out = a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
    return torch.mm(a, b, out_dtype=dtype, out=out)


def _down(x: Tensor, parts: Sequence[Projection]) -> Tensor:
    """scale * x A^T of all parts side by side: [tokens, sum of ranks]. Reads x once."""
    low = _product(x, _all_a(parts, x.dtype).t(), parts[0].scale)
    ranks = [len(part.a) for part in parts]
    for part, piece in zip(parts, torch.split(low, ranks, dim=1), strict=True):
        if part.scale != parts[0].scale:
            piece.mul_(part.scale / parts[0].scale)
    return low


def _all_a(parts: Sequence[Projection], dtype: torch.dtype) -> Tensor:
    return shadows.stacked([part.a for part in parts], dtype)


def _up(x: Tensor, low: Tensor, part: Projection) -> tuple[Tensor, Tensor | None]:
    """The part's output for x [tokens, inputs], given low = scale * x A^T; its weight, if kept."""
    bias = None if part.base.bias is None else part.base.bias.to(x.dtype)
    whole = weight(part.base, x.dtype)
    out = F.linear(x, whole, bias).addmm_(low, shadows.of(part.b, x.dtype).t())
    return out, whole if part.keeps else None


def _forward(
    x: Tensor, parts: Sequence[Projection]
) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
    """Outputs of all parts for x [tokens, inputs], scale * x A^T of all, weights that are kept."""
    low = _down(x, parts)
    ranks = [len(part.a) for part in parts]
    pieces = zip(parts, torch.split(low, ranks, dim=1), strict=True)
    made = [_up(x, piece, part) for part, piece in pieces]
    return [out for out, _ in made], low, [whole for _, whole in made]


def _backward(
    grads: Sequence[Tensor],
    x: Tensor,
    low: Tensor,
    parts: Sequence[Projection],
    unpacked: Sequence[Tensor | None] | None = None,
    *,
    needed: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of x (if `needed`) and of each part's A and B, in their types.

    `unpacked`: the parts' weights, where they were kept.
    """
    ranks = [len(part.a) for part in parts]
    together = torch.empty_like(low)
    for grad, part, into in zip(grads, parts, torch.split(together, ranks, dim=1), strict=True):
        _product(grad, shadows.of(part.b, x.dtype), part.scale, out=into)
    of_a = torch.split(_summed(together.t(), x, parts[0].a.dtype), ranks)
    adapters: list[Tensor] = []
    for grad, part, piece, a in zip(
        grads, parts, torch.split(low, ranks, dim=1), of_a, strict=True
    ):
        adapters += [a.to(part.a.dtype), _summed(grad.t(), piece, part.b.dtype)]
    if not needed:
        return None, adapters
    kept = unpacked or [None] * len(parts)
    into_x = grads[0] @ _either(kept[0], parts[0].base, x.dtype)
    for grad, whole, part in zip(grads[1:], kept[1:], parts[1:], strict=True):
        into_x.addmm_(grad, _either(whole, part.base, x.dtype))
    return into_x.addmm_(together, _all_a(parts, x.dtype)), adapters


def _either(whole: Tensor | None, base: torch.nn.Linear, dtype: torch.dtype) -> Tensor:
    return weight(base, dtype) if whole is None else whole


class _Linears(torch.autograd.Function):
    """Several projections of one input. The adapters' tensors are arguments for autograd's sake."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Any, *adapters: Tensor) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            outs, low, unpacked = _forward(x, parts)
        ctx.save_for_backward(x, low, *unpacked)
        ctx.parts = parts
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, low, *unpacked = ctx.saved_tensors
        needed = ctx.needs_input_grad[0]
        into_x, adapters = _backward(grads, x, low, ctx.parts, unpacked, needed=needed)
        return into_x, None, *adapters


def linears(x: Tensor, parts: Sequence[Projection], *, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Outputs of several projections of `x` [..., inputs], computed in `dtype`."""
    adapters = [tensor for part in parts for tensor in (part.a, part.b)]
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    outs = _Linears.apply(flat, tuple(parts), *adapters)  # type: ignore[no-untyped-call]
    return tuple(out.view(*x.shape[:-1], -1) for out in outs)


@dataclass(frozen=True)
class Mlp:
    """down(act(gate(x)) * up(x)), gate and up being two projections or one; or down(act(x W))."""

    wide: tuple[Projection, ...]
    down: Projection
    activation: Activation
    gated: bool


class _Wide(torch.autograd.Function):
    """What goes into `down`. Keeps x, the outputs of the wide projections and x A^T.

    `called` gets the context, for the backward of `_Narrow`, which makes the gradients of those
    outputs while it has the activation, and leaves them in `context.grads`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: Mlp, called: list[Any], *adapters: Tensor) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            outs, low, unpacked = _forward(x, mlp.wide)
            active = mlp.activation.forward(_halves(mlp, outs)[0])
            inner = active.mul_(_halves(mlp, outs)[1]) if mlp.gated else active
        ctx.save_for_backward(x, low, *outs, *unpacked)
        ctx.mlp, ctx.grads = mlp, []
        called.append(ctx)
        return inner

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> Any:
        (x, low, grads, unpacked), ctx.grads = ctx.grads, []
        needed = ctx.needs_input_grad[0]
        into_x, adapters = _backward(grads, x, low, ctx.mlp.wide, unpacked, needed=needed)
        return into_x, None, None, *adapters


class _Narrow(torch.autograd.Function):
    """`down`, which keeps nothing: where layers are run again, that ends before its product."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, called: list[Any], *adapters: Tensor) -> Any:
        ctx.wide = called.pop()
        with torch.autocast(inner.device.type, enabled=False):
            (out,), *_ = _forward(inner, (ctx.wide.mlp.down,))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        mlp: Mlp = ctx.wide.mlp
        x, low, *saved = ctx.wide.saved_tensors
        outs, unpacked = saved[: len(mlp.wide)], saved[len(mlp.wide) :]
        del saved
        gate, up = _halves(mlp, outs)
        active = mlp.activation.forward(gate)
        inner = active * up if mlp.gated else active
        low_down = _down(inner, (mlp.down,))
        into_inner, of_down = _backward(grads, inner, low_down, (mlp.down,), needed=True)
        assert into_inner is not None
        del inner
        wide = _into_wide(mlp, outs, active, into_inner)
        ctx.wide.grads = [x, low, wide, unpacked]
        # of the shape that autograd expects; `_Wide` reads its own
        return wide[0][:, : gate.shape[1]], None, *of_down


def _halves(mlp: Mlp, outs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gate and up, from two projections or the halves of one; twice the same without a gate."""
    if not mlp.gated:
        return outs[0], outs[0]
    if len(mlp.wide) == 2:
        return outs[0], outs[1]
    gate, up = outs[0].chunk(2, dim=-1)
    return gate, up


def _into_wide(mlp: Mlp, outs: Sequence[Tensor], active: Tensor, grad: Tensor) -> list[Tensor]:
    """Gradients of the wide projections' outputs, from that of what goes into `down`.

    `active` is the activation of the gate; it and `grad` are overwritten.
    """
    gate, up = _halves(mlp, outs)
    if not mlp.gated:
        return [mlp.activation.backward_(grad, gate)]
    if len(mlp.wide) == 2:
        into_up = active.mul_(grad)
        return [mlp.activation.backward_(grad.mul_(up), gate), into_up]
    both = torch.empty_like(outs[0])
    into_gate, into_up = both.chunk(2, dim=-1)
    torch.mul(active, grad, out=into_up)
    del active
    mlp.activation.backward_(torch.mul(grad, up, out=into_gate), gate)
    return [both]


def mlp(x: Tensor, parts: Mlp, *, dtype: torch.dtype) -> Tensor:
    """The MLP's output for `x` [..., inputs], computed in `dtype`."""
    adapters = [t for part in parts.wide for t in (part.a, part.b)]
    flat, called = x.reshape(-1, x.shape[-1]).to(dtype), list[Any]()
    inner = _Wide.apply(flat, parts, called, *adapters)  # type: ignore[no-untyped-call]
    out: Tensor = _Narrow.apply(  # type: ignore[no-untyped-call]
        inner, called, parts.down.a, parts.down.b
    )
    return out.view(*x.shape[:-1], -1)
