"""16-bit copies of adapters are taken only while they are those of the parameters' numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_steps import adapted, furthest, step

from tuning.models.kernels import fuse, shadows
from tuning.plan import backends

Build = Callable[..., Path]
HALVES = [torch.bfloat16, torch.float16]


def fused(folder: Path) -> Any:
    """A small Llama with kernels and copies, and copies made."""
    tuned = adapted(folder, method="lora", precision="bfloat16")
    fuse.fuse(tuned, backends.FUSED)
    step(tuned, "bfloat16")
    return tuned


def trained(tuned: Any) -> list[torch.Tensor]:
    """The adapters' parameters."""
    return [parameter for parameter in tuned.parameters() if parameter.requires_grad]


def optimizers(parameters: list[torch.Tensor]) -> list[torch.optim.Optimizer]:
    """Fused AdamW leaves no trace in torch's count of changes, others do."""
    return [
        torch.optim.AdamW(parameters, lr=0.1, fused=True),
        torch.optim.AdamW(parameters, lr=0.1, foreach=True),
        torch.optim.SGD(parameters, lr=0.1),
    ]


@pytest.mark.parametrize("which", range(3))
def test_every_step_of_an_optimizer_is_seen(which: int, tiny_base: Build) -> None:
    """Copies are the parameters' numbers, bit for bit, at each use of every step."""
    tuned = fused(tiny_base("llama"))
    optimizer = optimizers(trained(tuned))[which]
    for _ in range(2):
        made = [shadows.of(p, torch.bfloat16) for p in trained(tuned)]
        assert [m.data_ptr() for m in made] == [p.shadow.copy.data_ptr() for p in trained(tuned)]
        step(tuned, "bfloat16")
        optimizer.step()
        for parameter in trained(tuned):  # before the next forward: casts
            assert torch.equal(shadows.of(parameter, torch.bfloat16), parameter.bfloat16())
        step(tuned, "bfloat16")
        for parameter in trained(tuned):
            assert torch.equal(shadows.of(parameter, torch.bfloat16), parameter.bfloat16())


def test_a_change_by_anything_else_is_seen(tiny_base: Build) -> None:
    """Numbers put into a parameter, and another tensor in its place."""
    tuned = fused(tiny_base("llama"))
    changed, replaced, *_ = trained(tuned)
    with torch.no_grad():
        changed.add_(1.0)
    replaced.data = replaced.data + 1.0

    for parameter in (changed, replaced):
        assert torch.equal(shadows.of(parameter, torch.bfloat16), parameter.bfloat16())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_results_with_copies_are_those_of_casts(precision: str, tiny_base: Build) -> None:
    """Bit for bit, forward and backward, stacked or not, with checkpointing or without."""
    tuned = adapted(tiny_base("llama"), method="lora", precision=precision)
    fuse.fuse(tuned, backends.FUSED)
    with_copies = step(tuned, precision)
    tuned.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    again = step(tuned, precision)
    assert all(hasattr(parameter, "shadow") for parameter in trained(tuned))
    for parameter in trained(tuned):
        del parameter.shadow
    tuned.get_base_model().base_model._forward_pre_hooks.clear()
    with_casts = step(tuned, precision)

    assert 0.0 == furthest(with_copies, with_casts) == furthest(again, with_casts)


def test_nothing_is_copied_in_vain(tiny_base: Build) -> None:
    """There are no copies of what trains in float32 all through; stale ones alone are renewed."""
    plain = adapted(tiny_base("llama"), method="lora", precision="float32")
    fuse.fuse(plain, backends.FUSED)
    assert not any(hasattr(parameter, "shadow") for parameter in trained(plain))

    tuned = fused(tiny_base("llama"))
    first, *rest = trained(tuned)
    versions = [parameter.shadow.copy._version for parameter in trained(tuned)]
    with torch.no_grad():
        first.add_(1.0)
    step(tuned, "bfloat16")
    now = [parameter.shadow.copy._version for parameter in trained(tuned)]
    # copies that are stacked have one count
    group = [p.shadow.together is first.shadow.together for p in trained(tuned)]
    assert [before != after for before, after in zip(versions, now, strict=True)] == group
    assert any(group) and not all(group) and rest
