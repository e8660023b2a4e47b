"""A base model outside the presets: its config is read, and the model examined without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import tuning.plan as plan
from tuning import presets
from tuning.console import Console
from tuning.oci import model_image
from tuning.oci.access import Access
from tuning.pipeline import start
from tuning.pipeline.options import base_reference
from tuning.plan import simulation
from tuning.plan.device import Device
from tuning.sources import base
from tuning.spec import Spec


def draft(
    spec: Spec, *, here: Device, token: str | None, access: Access | None = None, console: Console
) -> plan.Plan:
    """The draft plan of `spec`, for any model.

    Reads the config of a model outside the presets from the hub or its image, and simulates its
    memory where torch is installed. Raises SpecError, RefusedError or TransientError.
    """
    device = plan.planned_device(spec, here)
    try:
        known = plan.known_base(spec)
    except plan.Unknown:
        console.say(f"Reading the config of {spec.base_model or spec.preset} ...")
        known = read_base(spec, access=access or Access(), token=token)
    spec = start.known(spec, known, access=access or Access())
    return plan.draft(spec, here=here, base=sized(spec, known, device, console=console))


def read_base(spec: Spec, *, access: Access, token: str | None) -> plan.Base:
    """The base model of `spec` by the config.json in its folder, its image or at the hub.

    Downloads no weights. Raises SpecError, RefusedError or TransientError.
    """
    name, revision = base_reference(spec)
    if model_image.is_image(name):
        return plan.base_of(spec, model_image.config(name, access=access), revision=name)
    resolved = base.resolve(name, revision=revision, token=token)
    config = base.check(resolved, token=token)
    return plan.base_of(spec, config, revision=resolved.revision)


def sized(
    spec: Spec,
    known: plan.Base,
    device: Device,
    *,
    console: Console,
    stop: Callable[[], bool] = lambda: False,
    keep_open: tuple[int, ...] = (),
) -> plan.Base:
    """`known` with what an examination finds if no preset holds it, or with the reason why not."""
    refused = known.facts and not presets.support(known.facts, spec.method).supported
    if not known.config or refused or not plan.wants_simulation(known, device, spec):
        return known
    try:
        found = simulation.examine(
            known.config,
            variants=plan.variants(spec, known, device),
            chosen={
                "targets": spec.settings.target_modules,
                "exclude": spec.settings.exclude_modules or (),
                "layers": spec.settings.layers,
            },
            begin=lambda: console.say("Examining the model, which no table holds ..."),
            stop=stop,
            keep_open=keep_open,
        )
    except simulation.Impossible as reason:
        return replace(known, unsized=f"it could not be simulated, since {reason}")
    unsized = (
        f"its memory could not be simulated, since it {found.unsized}" if found.unsized else ""
    )
    return replace(known, simulated=found.coefficients, verdict=found.verdict, unsized=unsized)
