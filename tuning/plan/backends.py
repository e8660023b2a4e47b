"""Which attention and which fused kernels run a recipe, and why: decided without torch.

An order of preference with the exclusions of each. `models.kernels.apart` checks on the loaded
model that packed documents stay apart, and falls back to sdpa if not.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from tuning.errors import Problem, SpecError
from tuning.plan.device import Device
from tuning.presets import Class, Facts
from tuning.spec import Settings

VARLEN = "torch_varlen"  # a name with "flash" in it would be taken for a kernel to download
VARLEN_TORCH = (2, 11)  # the first torch whose variable-length kernel has a window
# transformers' name -> package, and its widest head by the major compute capabilities that it has
# kernels for, the fastest first. torch's registry (`activate_flash_attention_impl`, FA3 and FA4)
# runs the same two packages and is not used: torch 2.13 takes two values from a private function
# of flash-attn-4 that gives more since 4.0.0b20.
FLASH: dict[str, tuple[str, dict[int, int]]] = {
    "flash_attention_4": ("flash-attn-4", {9: 256, 10: 128}),
    "flash_attention_3": ("flash-attn-3", {9: 256}),
    "flash_attention_2": ("flash-attn", dict.fromkeys(range(8, 13), 256)),
}
PLACEHOLDER = "0.0.0"  # flash-attn-3 on PyPI: a name without kernels
HOPPER = "flash_attention_4"  # for Hopper and Blackwell
BY_OFFSETS = frozenset({*FLASH, VARLEN})  # see where documents begin, and need no mask

LORA, MLP, NORM, ROTARY, HEAD, LIGER = "lora", "mlp", "norm", "rotary", "head", "liger"
COPIES = "copies"  # of LORA's adapters in 16 bits, for two bytes a number
FUSED = (LORA, COPIES, MLP, NORM, ROTARY, HEAD)  # what needs no other package
LIGER_PACKAGE = "liger-kernel"


@dataclass(frozen=True)
class Choice:
    """An attention implementation and the reason."""

    name: str
    reason: str


def installed() -> dict[str, str]:
    """Version of each installed package that matters here."""
    versions = {}
    for package in ("torch", LIGER_PACKAGE, *(package for package, _ in FLASH.values())):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {name: version for name, version in versions.items() if version != PLACEHOLDER}


def attention(
    facts: Facts | None,
    device: Device,
    *,
    precision: str,
    kind: Class | None = None,
    packages: Collection[str] | None = None,
    torch: str | None = None,
) -> Choice:
    """The fastest attention that is correct for the model on the device.

    Without `facts` what was measured of its class, `kind`, decides. `packages` (installed ones) and
    `torch` (its version) default to this environment's; without torch the run is elsewhere, with a
    new one.
    """
    here = installed()
    packages = here if packages is None else packages
    torch = torch or here.get("torch") or "99.0"
    if facts is None:
        return _of_class(kind, device, precision=precision, torch=torch)
    if facts.softcap or facts.sinks:
        feature = "capped scores" if facts.softcap else "attention sinks"
        return Choice("eager", f"{feature}, which no kernel here computes")
    if not facts.packing_safe:
        return Choice("sdpa", f"no other is verified for {facts.model_type}")
    varlen = _version(torch) >= VARLEN_TORCH
    if device.kind == "cpu":
        if varlen:
            return Choice(VARLEN, "each document separately, no mask of all pairs")
        return Choice("sdpa", f"torch {torch} has no variable-length attention")
    capability = device.capability or (0, 0)
    if precision == "float32" or capability < (8, 0):
        why = "float32" if precision == "float32" else "compute capability below 8.0"
        return Choice("sdpa", f"flash kernels need 16 bits on an Ampere or newer card: {why}")
    fitting = {
        name: package
        for name, (package, widths) in FLASH.items()
        if facts.head_dim <= widths.get(capability[0], 0)
    }
    for name, package in fitting.items():
        if package in packages:
            return Choice(name, f"{package} is installed and suits this card")
    if facts.head_dim > 256:
        return Choice("sdpa", f"heads of {facts.head_dim} are wider than flash kernels take")
    if varlen:
        why = "torch's own flash kernel, each document separately"
        if HOPPER in fitting:
            why += f"; {fitting[HOPPER]} has one written for this card, and is not installed"
        return Choice(VARLEN, why)
    return Choice("flex_attention", f"torch {torch} has no variable-length kernel with a window")


def _of_class(kind: Class | None, device: Device, *, precision: str, torch: str) -> Choice:
    """The attention of a class outside the families that are known by their shape."""
    if kind is not None and kind.attention == "eager":
        return Choice("eager", "its class has no other")
    if kind is None or not kind.architecture:
        return Choice("sdpa", "no other attention is verified for this family")
    halves = precision != "float32" and (device.capability or (0, 0)) >= (8, 0)
    fits = _version(torch) >= VARLEN_TORCH and (device.kind == "cpu" or halves)
    if kind.attention == VARLEN and fits:
        return Choice(VARLEN, "each document separately, measured on this class")
    return Choice("sdpa", f"no other is verified for {kind.architecture} here")


LEAVE_OUT = "leave it out: the fastest that suits model and machine is chosen"


def unsuited(
    attention: str | None, device: Device, facts: Facts | None, kind: Class | None
) -> Problem | None:
    """Why an attention of the config cannot train this model on such a device; None if it can.

    A run would take another, or fail once the weights are loaded.
    """
    fact = ""
    only_eager = (facts and (facts.softcap or facts.sinks)) or (kind and kind.attention == "eager")
    if attention in (None, "eager"):
        return None
    if only_eager:
        fact = f"{attention} cannot be used: this class of models has eager attention only"
    elif attention != "sdpa" and kind and kind.attention == "sdpa":
        fact = f"{attention} is not verified for {kind.architecture}, which has sdpa and eager"
    elif device.kind == "cpu" and (attention in FLASH or attention == "flex_attention"):
        fact = f"{attention} does not train on a CPU"
    return Problem("PLAN-112", "ModelConfig.attn_implementation", fact, LEAVE_OUT) if fact else None


def refuse_missing(attention: str | None) -> None:
    """Raise SpecError for an attention of the config whose package is not installed here."""
    if attention in FLASH and FLASH[attention][0] not in installed():
        fact = f"{attention} needs the package {FLASH[attention][0]}, which is not installed"
        raise SpecError.at("PLAN-112", "ModelConfig.attn_implementation", fact, LEAVE_OUT)


def kernels(
    device: Device, *, dropout: float, dora: bool, packages: Collection[str] | None = None
) -> tuple[tuple[str, ...], str]:
    """The fused kernels to use, of FUSED and LIGER, and why.

    Each computes what peft, trl and transformers compute, to rounding; modules that a kernel does
    not fit stay as they are.
    """
    packages = installed() if packages is None else packages
    chosen: tuple[str, ...] = FUSED
    reasons = ["one pass instead of many"]
    if dropout or dora:
        chosen = (NORM, ROTARY, HEAD)
        reasons.append(f"LoRA stays peft's own with {'dropout' if dropout else 'DoRA'}")
    if device.kind == "cuda" and LIGER_PACKAGE in packages:
        chosen = (*chosen, LIGER)
        reasons.append("liger is installed, for norms and rotary positions")
    return chosen, "; ".join(reasons)


def without_copies(kernels: Collection[str]) -> tuple[str, ...]:
    """`kernels` where memory is short: each use casts an adapter again."""
    return tuple(kernel for kernel in kernels if kernel != COPIES)


@dataclass(frozen=True)
class Backend:
    """How attention and the layers around it are computed."""

    attention: str
    kernels: tuple[str, ...]
    own_head: bool = False  # the loss is of the model's own logits, all of which are kept

    @property
    def sized_as(self) -> Literal["varlen", "sdpa"]:
        """The attention whose memory coefficients apply."""
        return "varlen" if self.attention in BY_OFFSETS else "sdpa"


def choose(
    settings: Settings,
    facts: Facts | None,
    device: Device,
    *,
    precision: str,
    dropout: float,
    dora: bool,
    reasons: dict[str, str],
    kind: Class | None = None,
) -> Backend:
    """The backend on `device`, by the settings first; adds to `reasons`."""
    chosen = attention(facts, device, precision=precision, kind=kind)
    name, reasons["attention"] = chosen.name, chosen.reason
    fused, reasons["kernels"] = kernels(device, dropout=dropout, dora=dora)
    if settings.attention is not None:
        name, reasons["attention"] = settings.attention, "set in the config"
    if settings.fused is not None:
        fused, reasons["kernels"] = fused if settings.fused else (), "set in the config"
    return Backend(name, fused)


def _version(text: str) -> tuple[int, int]:
    parts = text.split(".")
    return (int(parts[0]), int(parts[1])) if all(p.isdigit() for p in parts[:2]) else (0, 0)
