"""A base model outside the presets: its config is read, and the model examined without weights."""

from __future__ import annotations

import logging
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
from tuning.presets import stored
from tuning.sources import base, headers
from tuning.spec import Spec

log = logging.getLogger(__name__)


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
        known, _ = read_base(spec, access=access or Access(), token=token)
    spec = start.known(spec, known, access=access or Access())
    return plan.draft(spec, here=here, base=sized(spec, known, device, console=console))


def read_base(
    spec: Spec, *, access: Access, token: str | None
) -> tuple[plan.Base, base.Base | None]:
    """The base model of `spec` by the config.json in its folder, its image or at the hub.

    With its files, but of an image's. Downloads no weights. Raises SpecError, RefusedError or
    TransientError.
    """
    name, revision = base_reference(spec)
    if model_image.is_image(name):
        return plan.base_of(spec, model_image.config(name, access=access), revision=name), None
    resolved = base.resolve(name, revision=revision, token=token)
    config = base.check(resolved, token=token)
    return plan.base_of(spec, config, revision=resolved.revision), resolved


def compared(known: plan.Base, model: base.Base, *, token: str | None, console: Console) -> int:
    """How many tensors the files of `model` have, which are all that its class has.

    0 where that cannot be said: without torch, and of weights that are stored in 4 bits. Raises
    SpecError, RefusedError or TransientError.
    """
    if stored.of(known.config) not in {stored.PLAIN, *stored.UNPACKED} or not simulation.possible():
        return 0
    tensors = headers.read(model, token=token)
    try:
        done = simulation.compare(
            model.name,
            known.config,
            tensors,
            begin=lambda: console.say("Comparing the headers of the weights with their class ..."),
        )
    except simulation.Impossible as reason:
        log.info("%s: not compared with its class, since %s", known.name, reason)
        return 0
    return len(tensors) if done else 0


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
