"""Which model supports which method, which GPU supports which method, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuning.presets import stored
from tuning.presets.architecture import Facts
from tuning.presets.hardware import Gpu, engine_build, engines
from tuning.presets.models import Preset

if TYPE_CHECKING:  # the spec brings pydantic, which asking for a preset should not
    from tuning.spec import Method


@dataclass(frozen=True)
class Support:
    """Yes or no, why, and what to do instead."""

    supported: bool
    reason: str
    change: str = ""  # empty when supported


def support(model: Preset | Facts, method: Method) -> Support:
    """Whether `model` can be tuned by `method`, leaving memory aside."""
    facts = model.facts if isinstance(model, Preset) else model
    if reason := stored.refusal(facts.stored, method):
        name = model.hub_id if isinstance(model, Preset) else ""
        return Support(False, reason, stored.remedy(facts.stored, name))
    if facts.stored == stored.FOUR_BIT:
        return Support(True, "its projections are published in 4 bits, and stay as they are")
    then = "" if method == "lora" else ", then packed in 4 bits"
    unpacked = f"its {facts.stored} weights are unpacked as they are loaded{then}"
    if facts.experts:
        reason = f"projections and {facts.experts[0].copies} experts a layer are adapted"
        return Support(True, reason + (f"; {unpacked}" if facts.stored != stored.PLAIN else ""))
    if facts.stored != stored.PLAIN:
        return Support(True, unpacked)
    if facts.wrapper:
        tower = f"the vision tower ({facts.tower / 1e6:.0f} million parameters) stays as it is"
        return Support(True, f"its text model is adapted, {tower}")
    if facts.model_type == "falcon" and method == "qlora":
        return Support(
            True,
            "its linear layers are first replaced by plain ones, which 4-bit loading packs",
        )
    return Support(True, "every attention and MLP projection is a plain linear layer")


def gpu_support(gpu: Gpu, method: Method) -> Support:
    """Whether a build of torch runs `method` on `gpu`, leaving memory aside."""
    if gpu.capability is None:
        return Support(False, f"{gpu.name} has no CUDA", "use a machine with an NVIDIA GPU")
    major, minor = gpu.capability
    build = engine_build(gpu.capability)
    if build is None:
        return Support(
            False,
            f"no build of torch has kernels for {gpu.name} (compute capability {major}.{minor})",
            "use a GPU of compute capability 7.0 or newer",
        )
    lowest = next(engine.four_bit for engine in engines() if engine.name == build)
    if method == "qlora" and gpu.capability < lowest:
        return Support(
            False,
            f"bitsandbytes packs from compute capability {lowest[0]}.{lowest[1]} on, "
            f"{gpu.name} has {major}.{minor}",
            "use method lora, or a newer GPU",
        )
    precision = "bfloat16" if gpu.bf16 else "float16 with loss scaling (it has no bfloat16)"
    return Support(True, f"with the {build} build of torch, in {precision}")
