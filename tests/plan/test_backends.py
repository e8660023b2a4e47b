"""Which attention and kernels are chosen, and why."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import replace

import pytest

from tuning import presets
from tuning.plan import backends
from tuning.plan.device import Device
from tuning.presets import Facts
from tuning.spec import Settings

H200 = Device("cuda", "H200", 1, 140 << 30, bf16=True, capability=(9, 0))
A100 = replace(H200, name="A100", capability=(8, 0))
B200 = replace(H200, name="B200", capability=(10, 0))
V100 = replace(H200, name="V100", capability=(7, 0), bf16=False)
CPU = Device("cpu", "CPU", 1, 16 << 30, bf16=True)
ALL = ("flash-attn-4", "flash-attn-3", "flash-attn")


def facts(name: str) -> Facts:
    preset = presets.find(name)
    assert preset is not None
    return preset.facts


LLAMA = facts("llama-3.1-8b-instruct")


@pytest.mark.parametrize(
    ("shape", "device", "precision", "packages", "torch", "name", "why"),
    [
        (LLAMA, H200, "bfloat16", ALL, "2.13.0", "flash_attention_4", "flash-attn-4 is installed"),
        (LLAMA, H200, "bfloat16", ALL[1:], "2.13.0", "flash_attention_3", "flash-attn-3"),
        (LLAMA, A100, "bfloat16", ALL, "2.13.0", "flash_attention_2", "flash-attn is installed"),
        (LLAMA, H200, "bfloat16", (), "2.11.0+cu130", "torch_varlen", "torch's own flash kernel"),
        (LLAMA, H200, "bfloat16", (), "2.10.0", "flex_attention", "torch 2.10.0 has no variable"),
        (LLAMA, H200, "float32", ALL, "2.13.0", "sdpa", "16 bits .* float32"),
        (LLAMA, V100, "float16", ALL, "2.13.0", "sdpa", "capability below 8.0"),
        (LLAMA, CPU, "bfloat16", (), "2.13.0+cpu", "torch_varlen", "no mask of all pairs"),
        (
            facts("falcon-7b"),
            H200,
            "bfloat16",
            ALL,
            "2.13.0",
            "sdpa",
            "no other is verified for falcon",
        ),
        (None, H200, "bfloat16", ALL, "2.13.0", "sdpa", "no other attention is verified"),
        (replace(LLAMA, softcap=True), H200, "bfloat16", ALL, "2.13.0", "eager", "capped scores"),
        (replace(LLAMA, sinks=True), CPU, "bfloat16", ALL, "2.13.0", "eager", "attention sinks"),
        (replace(LLAMA, head_dim=512), H200, "bfloat16", ALL, "2.13.0", "sdpa", "heads of 512"),
        (replace(LLAMA, head_dim=256), H200, "bfloat16", ALL, "2.13.0", "flash_attention_4", ""),
        (replace(LLAMA, head_dim=256), B200, "bfloat16", ALL, "2.13.0", "flash_attention_2", ""),
        (LLAMA, B200, "bfloat16", ALL[1:], "2.13.0", "flash_attention_2", "suits this card"),
        (LLAMA, H200, "bfloat16", (), "2.13.0", "torch_varlen", "flash-attn-4 .* not installed"),
        (LLAMA, A100, "bfloat16", (), "2.13.0", "torch_varlen", "document separately$"),
    ],
)
def test_attention(
    shape: Facts | None,
    device: Device,
    precision: str,
    packages: tuple[str, ...],
    torch: str,
    name: str,
    why: str,
) -> None:
    """flash-attn 4, 3, 2, then torch's kernel, flex, sdpa; never what the family is wrong with."""
    found = backends.attention(shape, device, precision=precision, packages=packages, torch=torch)

    assert name == found.name
    assert re.search(why, found.reason)


def test_a_name_without_kernels_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's flash-attn-3 is version 0.0.0, and empty."""
    versions = {"torch": "2.13.0", "flash-attn-3": "0.0.0", "flash-attn": "2.8.3"}

    def version(package: str) -> str:
        if package in versions:
            return versions[package]
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)

    assert backends.installed() == {"torch": "2.13.0", "flash-attn": "2.8.3"}


def test_kernels() -> None:
    """All that need no other package; not LoRA's with dropout; liger's where it is installed."""
    plain, _ = backends.kernels(H200, dropout=0.0, dora=False, packages=())
    dropout, why = backends.kernels(CPU, dropout=0.1, dora=False, packages=("liger-kernel",))
    liger, _ = backends.kernels(H200, dropout=0.0, dora=False, packages=("liger-kernel",))

    assert plain == ("lora", "copies", "mlp", "norm", "rotary", "head")
    assert (dropout, "peft's own with dropout" in why) == (("norm", "rotary", "head"), True)
    assert liger == (*plain, "liger")


def test_the_user_decides() -> None:
    """What the ConfigMap names is taken, and the reason says so."""
    reasons: dict[str, str] = {}
    found = backends.choose(
        Settings(attention="eager", fused=False), LLAMA, H200,
        precision="bfloat16", dropout=0.0, dora=False, reasons=reasons,
    )  # fmt: skip

    assert found == backends.Backend("eager", ())
    assert reasons == {"attention": "set in the config", "kernels": "set in the config"}
