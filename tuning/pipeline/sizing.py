"""The memory of a base model that no preset knows: looked up at the hub, and simulated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tuning import plan
from tuning.console import Console
from tuning.oci import model_image
from tuning.oci.access import Access
from tuning.pipeline.options import base_reference
from tuning.plan import simulation
from tuning.plan.device import Device
from tuning.sources import base
from tuning.spec import Spec


def draft(spec: Spec, *, here: Device, token: str | None, console: Console) -> plan.Plan:
    """The plan that the spec alone allows, for any model.

    Asks the hub for the config of a model that is not among the presets, and simulates its memory
    where torch is installed. Raises SpecError, RefusedError or TransientError.
    """
    device = plan.device_of(spec.instance) if spec.instance else here
    try:
        known = plan.known_base(spec)
    except plan.Unknown:
        name, revision = base_reference(spec)
        if model_image.is_image(name):
            console.say(f"Looking at {name} ...")
            config = model_image.config(name, access=Access())
            known = plan.base_from_config(plan.declared_name(spec, config), name, config)
        else:
            console.say(f"Asking the hub about {name} ...")
            found = base.resolve(name, revision=revision, token=token)
            config = base.check(found, token=token)
            known = plan.base_from_config(plan.declared_name(spec, config), found.revision, config)
    return plan.draft(spec, here=here, base=sized(spec, known, device, console=console))


def sized(
    spec: Spec,
    known: plan.Base,
    device: Device,
    *,
    console: Console,
    stop: Callable[[], bool] = lambda: False,
    keep_open: tuple[int, ...] = (),
) -> plan.Base:
    """`known`, with its memory simulated if nothing else tells it; or why that was not possible."""
    if not known.config or not plan.wants_simulation(known, device):
        return known
    try:
        found = simulation.coefficients(
            known.config,
            variants=plan.variants(spec, known, device),
            begin=lambda: console.say("Sizing the model, which is not among the presets ..."),
            stop=stop,
            keep_open=keep_open,
        )
    except simulation.Impossible as why:
        return replace(known, unsized=f"it could not be simulated, since {why}")
    return replace(known, simulated=found)
