"""Compares a fused kernel with the module it replaces, before it replaces it.

A kernel that computes something else trains something else, in silence. So an MLP is fused only if
its `forward` is one that the kernel was written for (`same_code`), and every module only if both
give the same outputs and gradients for random inputs (`agrees`): an activation may be sparse, a
product scaled, an output clamped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import unwrap
from typing import Any

import torch

from tuning.models import shards

Tensor = torch.Tensor
Forward = Callable[[Tensor], Sequence[Tensor]]

TOKENS = 8
SCALES = (0.1, 1.0, 30.0)  # of the inputs: a clamp or a threshold shows at one of them
HALVES = (torch.float16, torch.bfloat16)
# Relative, by the type computed in: rounding differs by a third of it, another function by tenths.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.03}


def same_code(forward: Callable[..., Any], known: Iterable[Callable[..., Any]]) -> bool:
    """Whether `forward` is compiled to the same code as one of `known`, whatever its variables."""
    code = _code(unwrap(forward))
    return code is not None and code in [_code(one) for one in known]


def _code(function: Any) -> tuple[Any, ...] | None:
    """Instructions, names and constants of a function; None if it is not written in Python."""
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    return code.co_code, code.co_names, code.co_consts[1:]  # without the docstring


def agrees(
    own: Forward,
    fused: Forward,
    adapters: Sequence[tuple[Tensor, Tensor]],
    *,
    like: Tensor,
    scales: Sequence[float] = SCALES,
) -> bool:
    """Whether both forwards give the same outputs and gradients for inputs [1, tokens, width].

    The inputs' width, device and type are those of `like` [..., width]. `adapters` are A and B of
    the LoRA layers: B, which is zero before training, is random meanwhile. Draws nothing from the
    global random generators. True on the meta device, where a simulation has no numbers to compare.
    """
    if like.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)

    trained = [parameter for pair in adapters for parameter in pair]
    with random_weights([b for _, b in adapters], generator):
        for scale in scales:
            if like.dtype == torch.float16 and scale > 1:  # products overflow
                continue
            x = (normal(1, TOKENS, like.shape[-1]) * scale).requires_grad_()
            with torch.autocast(like.device.type, like.dtype, enabled=like.dtype in HALVES):
                both = list(own(x)), list(fused(x))
            directions = [normal(*out.shape).to(out.dtype) for out in both[0]]
            results = []
            for outputs in both:
                grads = torch.autograd.grad(outputs, [x, *trained], directions, allow_unused=True)
                results.append([*outputs, *grads])
            if not all(map(partial(_close, tolerance=TOLERANCE[like.dtype]), *results)):
                return False
    return True


def _close(expected: Tensor | None, actual: Tensor | None, *, tolerance: float) -> bool:
    if expected is None or actual is None:
        return expected is actual
    if not expected.isfinite().all():  # out of range of this type: nothing to compare
        return True
    difference = (actual.double() - expected.double()).norm()
    return bool(difference <= tolerance * expected.double().norm())


@contextmanager
def random_weights(
    parameters: Sequence[Tensor], generator: torch.Generator, size: float = 0.05
) -> Iterator[None]:
    """Fill `parameters` with random numbers of that size, and put back what they held."""
    held = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                noise = torch.randn(parameter.shape, generator=generator) * size
                shards.assign(parameter, noise)
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, held, strict=True):
                parameter.copy_(before)
