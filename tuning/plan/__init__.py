"""spec + model + device + lengths -> Plan: recipe, placement, reasons.

The recipe decides the adapter's bytes and is frozen once complete; the placement says how one
machine carries it out and is derived again at each start. Each number carries its reason.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from tuning.plan.base import (
    Base,
    Unknown,
    base_of,
    device_of,
    known_base,
    planned_device,
    refuse_unsupported,
)
from tuning.plan.choices import Packing, packing
from tuning.plan.fallbacks import fallbacks
from tuning.plan.make import draft, freeze, is_enough, make, resume, split_seed
from tuning.plan.placing import (
    SMALL_ON_CPU,
    disk_bytes,
    place,
    variants,
    wants_simulation,
)
from tuning.plan.values import (
    Lengths,
    Placement,
    Plan,
    Recipe,
    placement_from_json,
    recipe_from_json,
)

__all__ = [
    "SMALL_ON_CPU",
    "Base",
    "Lengths",
    "Packing",
    "Placement",
    "Plan",
    "Recipe",
    "Unknown",
    "base_of",
    "device_of",
    "disk_bytes",
    "draft",
    "fallbacks",
    "freeze",
    "is_enough",
    "known_base",
    "make",
    "packing",
    "place",
    "placement_from_json",
    "planned_device",
    "recipe_from_json",
    "refuse_unsupported",
    "resume",
    "split_seed",
    "variants",
    "wants_simulation",
]


class _Room(ModuleType):
    """This package, which is also the function `tuning.plan` of the Python API."""

    def __call__(self, *args: Any, **options: Any) -> Plan:
        """`tuning.api.plan`."""
        made: Plan = import_module("tuning.api").plan(*args, **options)
        return made


sys.modules[__name__].__class__ = _Room
