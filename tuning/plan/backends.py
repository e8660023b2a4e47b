"""Which attention and which fused kernels carry a recipe out, and why: decided without torch.

An order of preference, and what rules each way out. `tuning.model` asks the model itself whether
packed documents stay apart on the chosen way, and takes the next one if not.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from tuning.errors import SpecError
from tuning.plan.device import Device
from tuning.presets import Facts
from tuning.spec import Settings

VARLEN = "torch_varlen"  # a name with "flash" in it would be taken for a kernel to download
VARLEN_TORCH = (2, 11)  # the first torch whose variable-length kernel has a window
# transformers' name -> package, lowest and highest major compute capability, widest head
FLASH = {
    "flash_attention_4": ("flash-attn-4", 9, 10, 128),
    "flash_attention_3": ("flash-attn-3", 9, 9, 256),
    "flash_attention_2": ("flash-attn", 8, 99, 256),
}
BY_OFFSETS = frozenset({*FLASH, VARLEN})  # see where documents begin, and need no mask

LORA, MLP, NORM, HEAD, LIGER = "lora", "mlp", "norm", "head", "liger"
FUSED = (LORA, MLP, NORM, HEAD)  # what needs no other package
LIGER_PACKAGE = "liger-kernel"


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why."""

    name: str
    reason: str


def installed() -> dict[str, str]:
    """Version of each package that decides anything here, where it is installed."""
    found = {}
    for package in ("torch", LIGER_PACKAGE, *(package for package, *_ in FLASH.values())):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def attention(
    facts: Facts | None,
    device: Device,
    *,
    precision: str,
    packages: Collection[str] | None = None,
    torch: str | None = None,
) -> Choice:
    """The fastest attention that is right for the model on the device.

    `packages` are those installed, by default the ones here; `torch` is its version, by default
    the one here, or a new one where there is none (the run is elsewhere).
    """
    here = installed()
    packages = here if packages is None else packages
    torch = torch or here.get("torch") or "99.0"
    if facts is None:
        return Choice("sdpa", "nobody has checked another attention with this family")
    if facts.softcap or facts.sinks:
        what = "capped scores" if facts.softcap else "attention sinks"
        return Choice("eager", f"{what}, which no kernel here computes")
    if not facts.packing_safe:
        return Choice("sdpa", f"{facts.model_type} has no other that is known to be right")
    varlen = _version(torch) >= VARLEN_TORCH
    if device.kind == "cpu":
        if varlen:
            return Choice(VARLEN, "each document by itself, no mask of all pairs")
        return Choice("sdpa", f"torch {torch} has no variable-length attention")
    capability = device.capability or (0, 0)
    if precision == "float32" or capability < (8, 0):
        why = "float32" if precision == "float32" else "compute capability below 8.0"
        return Choice("sdpa", f"flash kernels need 16 bits on an Ampere or newer card: {why}")
    for name, (package, lowest, highest, width) in FLASH.items():
        if package in packages and lowest <= capability[0] <= highest and facts.head_dim <= width:
            return Choice(name, f"{package} is installed and suits this card")
    if facts.head_dim > 256:
        return Choice("sdpa", f"heads of {facts.head_dim} are wider than flash kernels take")
    if varlen:
        return Choice(VARLEN, "torch's own flash kernel, each document by itself")
    return Choice("flex_attention", f"torch {torch} has no variable-length kernel with a window")


def judge(asked: str | None, device: Device) -> None:
    """Raise SpecError for an attention of the config that cannot be had on this very machine."""
    if asked is None:
        return
    what = ""
    if asked in FLASH and FLASH[asked][0] not in installed():
        what = f"{asked} needs the package {FLASH[asked][0]}, which is not installed"
    elif device.kind == "cpu" and (asked in FLASH or asked == "flex_attention"):
        what = f"{asked} does not train on a processor"
    if what:
        change = "leave it out: the fastest that suits model and machine is chosen"
        raise SpecError.at("PLAN-112", "ModelConfig.attn_implementation", what, change)


def kernels(
    device: Device, *, dropout: float, dora: bool, packages: Collection[str] | None = None
) -> tuple[tuple[str, ...], str]:
    """The fused kernels to use, of FUSED and LIGER, and why.

    Each computes what peft, trl and transformers compute, to rounding, and is left out of modules
    that it does not fit.
    """
    packages = installed() if packages is None else packages
    chosen: tuple[str, ...] = FUSED
    reasons = ["one pass instead of many"]
    if dropout or dora:
        chosen = (NORM, HEAD)
        reasons.append(f"LoRA stays peft's own with {'dropout' if dropout else 'DoRA'}")
    if device.kind == "cuda" and LIGER_PACKAGE in packages:
        chosen = (*chosen, LIGER)
        reasons.append("liger is installed, for norms and rotary positions")
    return chosen, "; ".join(reasons)


@dataclass(frozen=True)
class Ways:
    """How attention and the layers around it are computed."""

    attention: str
    kernels: tuple[str, ...]

    @property
    def sized_as(self) -> Literal["varlen", "sdpa"]:
        """The attention whose memory the ledger knows."""
        if self.attention in BY_OFFSETS:
            return "varlen"
        return "sdpa"


def choose(
    settings: Settings,
    facts: Facts | None,
    device: Device,
    *,
    precision: str,
    dropout: float,
    dora: bool,
    reasons: dict[str, str],
) -> Ways:
    """The ways on `device`, where the settings leave them open; `reasons` gets why."""
    chosen = attention(facts, device, precision=precision)
    name, reasons["attention"] = chosen.name, chosen.reason
    fused, reasons["kernels"] = kernels(device, dropout=dropout, dora=dora)
    if settings.attention is not None:
        name, reasons["attention"] = settings.attention, "set in the config"
    if settings.fused is not None:
        fused, reasons["kernels"] = fused if settings.fused else (), "set in the config"
    return Ways(name, fused)


def _version(text: str) -> tuple[int, int]:
    parts = text.split(".")
    return (int(parts[0]), int(parts[1])) if all(p.isdigit() for p in parts[:2]) else (0, 0)
