"""The model as it will train has the loss and gradients of peft's, or is mended."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tuning.errors import SpecError
from tuning.models.kernels import attention, fuse, head, whole
from tuning.models.load import load_base
from tuning.models.lora import adapt
from tuning.plan import backends

Build = Callable[..., Path]


def adapted(folder: Path, precision: str = "float32") -> Any:
    """A tiny model with LoRA layers."""
    recipe = tiny_runs.recipe(method="lora", precision=precision)
    base = load_base(folder, precision=precision, quantisation=None, device="cpu")
    return adapt(base, recipe)[0]


def replace(tuned: Any, name: str = backends.VARLEN, *, packing: bool = True) -> Any:
    """Everything that is ours, into the model; returns the base model."""
    whole.replace(tuned, backends.FUSED, name, precision=torch.float32, packing=packing)
    return tuned.get_base_model()


def replaced(tuned: Any) -> int:
    """How many modules compute with one of our kernels."""
    return sum("forward" in vars(module) for module in tuned.modules())


def test_what_computes_the_same_stays(tiny_base: Build, caplog: pytest.LogCaptureFixture) -> None:
    """Kernels, attention and the one-pass head; weights and random numbers are as before."""
    tuned = adapted(tiny_base("llama"))
    before = {name: p.clone() for name, p in tuned.named_parameters()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)

    base = replace(tuned)

    assert base.one_pass and base.config._attn_implementation == backends.VARLEN
    assert replaced(tuned) and not caplog.records
    assert torch.equal(expected, torch.rand(2))
    assert all(torch.equal(before[name], p) for name, p in tuned.named_parameters())
    assert "forward" not in vars(base) and tuned.training


@pytest.mark.parametrize("packing", [True, False])
def test_kernels_that_are_wrong_together_are_taken_out(
    packing: bool, tiny_base: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each passes its own comparison; what they make of the model does not."""
    fused = fuse.fuse

    def and_more(tuned: Any, kernels: Any) -> fuse.Fused:
        done = fused(tuned, kernels)
        for layer in tuned.get_base_model().model.layers:
            own = layer.mlp.forward
            layer.mlp.forward = lambda x, own=own: own(x) * 1.5
            layer.mlp.forward.fused = True
        return done

    monkeypatch.setattr(fuse, "fuse", and_more)
    tuned = adapted(tiny_base("llama"))

    base = replace(tuned, packing=packing)

    assert (False, 0) == (base.one_pass, replaced(tuned))
    assert base.config._attn_implementation == backends.VARLEN


def test_a_head_with_a_scale_of_an_unknown_name_is_not_scored_in_one_pass(
    tiny_base: Build,
) -> None:
    """What the model does to its logits after the head is seen, whatever its config calls it."""
    tuned = adapted(tiny_base("llama"))
    tuned.get_base_model().lm_head.register_forward_hook(lambda _, args, out: out / 3)

    assert not replace(tuned).one_pass
    assert replaced(tuned)  # the kernels stay


@pytest.mark.parametrize(
    "changed",
    [
        lambda out: out * 1.3,
        lambda out: out.clamp(-0.05, 0.05),
        lambda out: out.detach(),  # the same loss, other gradients
    ],
)
def test_attention_that_computes_something_else_is_not_used(
    changed: Callable[[torch.Tensor], torch.Tensor], tiny_base: Build
) -> None:
    """Documents stay apart in it, and the loss or a gradient is another one: sdpa takes over."""

    def other(*arguments: Any, **options: Any) -> Any:
        out, weights = attention.attention(*arguments, **options)
        return changed(out), weights

    ALL_ATTENTION_FUNCTIONS.register("other", other)
    tuned = adapted(tiny_base("llama"))

    assert replace(tuned, "other", packing=False).config._attn_implementation == "sdpa"


def test_a_model_that_never_gives_its_own_loss_is_refused(
    tiny_base: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Say, a package that patched the classes: before a step is trained, with what to set."""
    tuned = adapted(tiny_base("llama"))
    fused = fuse.fuse

    def patched(tuned: Any, kernels: Any) -> fuse.Fused:
        tuned.get_base_model().model.norm.register_forward_hook(lambda _, args, out: out * 2)
        return fused(tuned, kernels)

    monkeypatch.setattr(fuse, "fuse", patched)

    with pytest.raises(SpecError, match=r"MODEL-118 .*fused_kernels: false"):
        replace(tuned)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_rounding_is_not_another_computation(
    family: str, precision: str, tiny_base: Build, caplog: pytest.LogCaptureFixture
) -> None:
    """In 16 bits nothing is taken out."""
    tuned = adapted(tiny_base(family), precision)
    dtype = getattr(torch, precision)

    with caplog.at_level(logging.WARNING):
        whole.replace(tuned, backends.FUSED, backends.VARLEN, precision=dtype, packing=True)

    assert tuned.get_base_model().one_pass and replaced(tuned) and not caplog.records


def test_the_head_is_as_it_was_after_a_comparison(tiny_base: Build) -> None:
    """Its own forward, or that which somebody had put there."""
    base = load_base(tiny_base("llama"), precision="float32", quantisation=None, device="cpu")
    with head.installed(base):
        assert "forward" in vars(base)
    assert "forward" not in vars(base)
    base.forward = own = base.forward
    with head.installed(base):
        assert base.forward is not own
    assert base.forward is own
