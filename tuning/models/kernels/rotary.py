"""Rotary positions in three passes each for queries and keys, where transformers takes five.

    y1 = x1 * cos1 - x2 * sin1,  y2 = x2 * cos2 + x1 * sin2

of the two halves of a head's width (RoPE as GPT-NeoX and Llama lay it out, arXiv 2104.09864).
transformers makes a copy of both halves first; here each half of x * cos gets the other half of x
added in place, forward and backward. Nothing is kept but cosines and sines.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tuning.models.kernels import parity

Tensor = torch.Tensor
NAME = "apply_rotary_pos_emb"  # transformers' function, in each model's module
PARAMETERS = ["q", "k", "cos", "sin", "unsqueeze_dim"]


def _turned(x: Tensor, cos: Tensor, one: Tensor, other: Tensor, sign: float) -> Tensor:
    """x * cos + sign * (-x2 * one, x1 * other); what is wider than the cosines stays as it is."""
    width = cos.shape[-1]
    half = width // 2
    if x.shape[-1] == width:
        out = x * cos
    else:
        out = x.clone()
        out[..., :width].mul_(cos)
    out[..., :half].addcmul_(x[..., half:width], one, value=-sign)
    out[..., half:width].addcmul_(x[..., :half], other, value=sign)
    return out


class _Rotate(torch.autograd.Function):
    """Of queries and keys [..., width], by cosines and sines that broadcast to them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, dim=-1)
        return _turned(q, cos, first, second, 1.0), _turned(k, cos, first, second, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        into_q, into_k = (_turned(grad, cos, second, first, -1.0) for grad in grads)
        return into_q, into_k, None, None


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """What transformers' `apply_rotary_pos_emb` gives for tensors of one type.

    `q` and `k` are [rows, heads, length, width], or with heads and length in the other order and
    an `unsqueeze_dim` of 2; `cos` and `sin` [rows, length, even width, as wide or less].
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    made: tuple[Tensor, Tensor] = _Rotate.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return made


def function_of(module: torch.nn.Module) -> Callable[..., Any] | None:
    """The rotary function that the forward of this module's class calls by its usual name.

    None where there is none, or one of other parameters.
    """
    forward = type(module).forward
    code = getattr(forward, "__code__", None)  # of a wrapped one, the wrapper's
    if code is None or NAME not in code.co_names:
        return None
    own: Callable[..., Any] | None = forward.__globals__.get(NAME)
    return own if own is not None and list(signature(own).parameters) == PARAMETERS else None


@cache
def same(own: Callable[..., Any], width: int) -> bool:
    """Whether `own` gives what `rotate` gives for heads of that even width.

    Turned as a whole, and by half, which is an error in most.
    """
    return _takes(own, width, width) and all(
        parity.agrees(
            partial(_both, own, turned), partial(_both, rotate, turned), (), like=torch.empty(width)
        )
        for turned in (width, width // 4 * 2)
        if _takes(own, turned, width)
    )


def _both(function: Callable[..., Any], turned: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of `x` [1, tokens, width] as queries of one head, and as keys of another order."""
    draw = torch.Generator().manual_seed(0)
    cos, sin = torch.randn(2, *x.shape[:-1], turned, generator=draw)
    made: tuple[Tensor, Tensor] = function(x[None], x[None].flip(-1), cos, sin)
    return made


def _takes(function: Callable[..., Any], turned: int, width: int) -> bool:
    try:
        _both(function, turned, torch.zeros(1, 2, width))
    except RuntimeError:
        return False
    return True


@cache
def forward_of(kind: type[torch.nn.Module]) -> Callable[..., Any]:
    """The forward of the class `kind`, calling `rotate` in the place of its rotary function."""
    own = kind.forward
    theirs = own.__globals__[NAME]

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        chosen = rotate if q.dtype == k.dtype == cos.dtype == sin.dtype else theirs
        return chosen(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    known = own.__globals__ | {NAME: rotary}
    made = types.FunctionType(own.__code__, known, own.__name__, own.__defaults__, own.__closure__)
    made.__kwdefaults__ = own.__kwdefaults__
    made.fused = True  # type: ignore[attr-defined]  # for `fuse.undo`
    return made
