"""16-bit copies of the float32 adapters, made once a micro-batch instead of at each use.

A training step uses each adapter two to four times, in 16 bits. A hook before the model's forward
makes all copies at once. A use takes the copy only if the parameter is still what it was: no
optimizer has made a step, of which some leave no trace in the parameter, and torch's own count of
changes is the same, so that whatever else changes a parameter (a merge, a comparison with peft) is
seen, by a cast. Where adapters are shared out over ranks there are no copies: their numbers come
and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from tuning.models import shards

Tensor = torch.Tensor
NAME = "shadow"  # attribute of a parameter: its `Shadow`


@dataclass(eq=False)
class Shadow:
    """The copy of one parameter, and of what it is one."""

    copy: Tensor  # like the parameter, in 16 bits
    together: Tensor  # of several parameters, stacked by rows
    made_of: tuple[int, ...] = ()  # steps of optimizers so far, the parameter's version and address

    @classmethod
    def valid(cls, parameter: Tensor, dtype: torch.dtype) -> Shadow | None:
        """That of `parameter` in `dtype`, if it holds its numbers of now."""
        own: Shadow | None = getattr(parameter, NAME, None)
        if own is None or own.copy.dtype != dtype or own.made_of != _now(parameter):
            return None
        return own


_steps = [0]  # of any optimizer


def _stepped(*_: Any) -> None:
    _steps[0] += 1


register_optimizer_step_post_hook(_stepped)  # fused AdamW is no change to torch's count


def _now(parameter: Tensor) -> tuple[int, ...]:
    return _steps[0], parameter._version, parameter.data_ptr()


def of(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """`parameter` in `dtype`: itself, its copy or a cast."""
    own = None if parameter.dtype == dtype else Shadow.valid(parameter, dtype)
    return parameter.to(dtype) if own is None else own.copy


def stacked(parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The rows of all `parameters` in `dtype`, below each other."""
    if len(parameters) == 1:
        return of(parameters[0], dtype)
    owns = [Shadow.valid(parameter, dtype) for parameter in parameters]
    first = owns[0]
    if first is not None and all(own and own.together is first.together for own in owns):
        return first.together
    return torch.cat([parameter.to(dtype) for parameter in parameters])


def keep(tuned: Any, groups: Sequence[tuple[Sequence[Tensor], torch.dtype]]) -> None:
    """Let the peft model `tuned` make copies of `groups` of parameters before each forward.

    Those of a group are as wide as each other, and lie below each other in this order.
    """
    kept: list[tuple[Tensor, Shadow]] = []
    for parameters, dtype in groups:
        if dtype == torch.float32 or any(
            p.dtype != torch.float32 or p.is_meta or not shards.is_whole(p) for p in parameters
        ):
            continue
        rows = [len(parameter) for parameter in parameters]
        together = parameters[0].new_empty(sum(rows), parameters[0].shape[1], dtype=dtype)
        for parameter, copy in zip(parameters, torch.split(together, rows), strict=True):
            own = Shadow(copy, together)
            setattr(parameter, NAME, own)
            kept.append((parameter, own))
    base = tuned.get_base_model()
    # peft calls the base past its hooks; in some classes the backbone is the base
    caller = tuned if base.base_model is base else base.base_model
    if kept:
        caller.register_forward_pre_hook(lambda *_: _renew(kept))


def _renew(kept: Sequence[tuple[Tensor, Shadow]]) -> None:
    """Make the copies that are stale."""
    stale = [(p, own) for p, own in kept if own.made_of != _now(p) and p.device == own.copy.device]
    if not stale:
        return
    with torch.no_grad():
        torch._foreach_copy_([own.copy for _, own in stale], [p for p, _ in stale])
    for parameter, own in stale:
        own.made_of = _now(parameter)
