"""Rotary positions in three passes give what transformers gives, forward and backward."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning.models.kernels import rotary

# By the way that their function goes: halves of the whole, halves of a part, neighbours
WHOLE = ("llama", "qwen3", "gemma3", "smollm3")
PART = ("phi3", "qwen3_5")
OTHER = ("cohere", "ernie4_5", "gpt_oss")  # the last with half as many cosines
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def theirs(family: str) -> Any:
    """transformers' function."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return module.apply_rotary_pos_emb


def results(function: Any, inputs: list[torch.Tensor], dim: int, seed: int) -> list[torch.Tensor]:
    """Outputs and gradients, in the type of the inputs."""
    q, k, cos, sin = inputs
    q, k = (t.detach().clone().requires_grad_() for t in (q, k))
    draw = torch.Generator().manual_seed(seed)
    made = function(q, k, cos, sin, unsqueeze_dim=dim)
    grads = [torch.randn(out.shape, generator=draw).to(out.dtype) for out in made]
    return [*made, *torch.autograd.grad(made, [q, k], grads)]


@settings(deadline=None, max_examples=60)
@given(
    family=st.sampled_from(WHOLE + PART),
    dtype=st.sampled_from(sorted(ROUNDING, key=str)),
    rows=st.integers(1, 3),
    length=st.integers(1, 9),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    width=st.sampled_from([4, 8, 12, 64]),
    part=st.sampled_from([0.5, 1.0]),
    laid_out=st.sampled_from(["by head", "by token", "within one"]),
    seed=st.integers(0, 1 << 16),
)
def test_any_heads_are_turned_as_by_transformers(
    family: str,
    dtype: torch.dtype,
    rows: int,
    length: int,
    heads: tuple[int, int],
    width: int,
    part: float,
    laid_out: str,
    seed: int,
) -> None:
    """Of any shape; in 16 bits to a rounding, laid out alike but where theirs is a copy."""
    draw = torch.Generator().manual_seed(seed)
    turned = width if family in WHOLE else int(width * part) // 2 * 2
    dim = 2 if laid_out == "by token" else 1

    def made(count: int) -> torch.Tensor:
        x = torch.randn(rows, length, count, width + (4 if laid_out == "within one" else 0),
                        generator=draw)[..., :width].to(dtype)  # fmt: skip
        return x if dim == 2 else x.transpose(1, 2)

    cos, sin = torch.randn(2, rows, length, turned, generator=draw).to(dtype)
    inputs = [made(heads[0]), made(heads[1]), cos, sin]

    expected = results(theirs(family), inputs, dim, seed)
    found = results(rotary.rotate, inputs, dim, seed)

    wide = [t.double() for t in inputs]
    truth = results(theirs(family), wide, dim, seed) if dtype != torch.float32 else expected
    for ours, own, exact in zip(found, expected, truth, strict=True):
        assert ours.dtype == own.dtype and ours.shape == own.shape
        assert family in PART or min(own.shape) == 1 or ours.stride() == own.stride()
        size = exact.double().norm()
        assert (ours.double() - own.double()).norm() <= ROUNDING[dtype] * size + 1e-12


@pytest.mark.parametrize("family", WHOLE + PART)
def test_functions_that_turn_halves_are_known(family: str) -> None:
    """By their results."""
    assert rotary.same(theirs(family), 16)


@pytest.mark.parametrize("family", OTHER)
def test_functions_that_turn_neighbours_are_left_alone(family: str) -> None:
    """They have the same name and parameters, and other results or none."""
    assert not rotary.same(theirs(family), 16)
