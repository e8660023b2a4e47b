"""The child process that examines a model outside the presets: no weights, no memory.

   {"config": {...}, "variants": [{...}],    the model's config.json, fields of `Variant`
    "chosen": {...} or null}                 targets, exclude and layers of the recipe
-> {"verdict": {...},                        as `verdict.to_json` writes it
    "coefficients": {...} or null,           as `coefficients.to_json` writes them
    "unsized": "..."}                        why there are none
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import transformers

from tuning import process
from tuning.models.lora import select
from tuning.models.survey import survey
from tuning.plan import verdict
from tuning.plan.coefficients import Coefficients, Variant, to_json
from tuning.plan.placing import SMALL_ON_CPU
from tuning.plan.verdict import Verdict
from tuning.training.simulate.fit import coefficients
from tuning.training.simulate.step import build


def work(request: dict[str, Any]) -> dict[str, Any]:
    """Examine and simulate what `request` asks for."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    config = request["config"]
    found, numbers, names = judge(config)
    answer: dict[str, Any] = {"verdict": verdict.to_json(found), "coefficients": None}
    if found.refused:
        return answer | {"unsized": found.refused}
    if chosen := request.get("chosen"):  # raises SpecError for what a run would not find
        select(names, **{key: value and tuple(value) for key, value in chosen.items()})
    variants = [Variant(**variant) for variant in request["variants"]]
    if numbers < SMALL_ON_CPU and all(variant.device == "cpu" for variant in variants):
        return answer | {"unsized": "is so small that any machine holds it"}
    try:
        sized = simulate(config, variants, found)
    except Exception as error:  # whatever a model class may raise
        return answer | {"unsized": f"fails there ({type(error).__name__}: {str(error)[:200]})"}
    return answer | {"coefficients": to_json(sized), "unsized": ""}


def simulate(config: dict[str, Any], variants: Iterable[Variant], found: Verdict) -> Coefficients:
    """The coefficients of `variants`: with eager attention, where the class has no other.

    They go by the name of what was asked for.
    """
    if "sdpa" in found.attention:
        return coefficients(config, variants=variants)
    sized = coefficients(config, variants=[replace(v, attention="eager") for v in variants])
    moments = {replace(v, attention="sdpa"): m for v, m in sized.moments.items()}
    return replace(sized, moments=moments)


def judge(config: dict[str, Any]) -> tuple[verdict.Verdict, int, tuple[str, ...]]:
    """How the model of `config` is adapted, its size in numbers, and what LoRA can adapt in it.

    With transformers' own words if it builds no model of it.
    """
    try:
        model = build(config, variant=Variant(attention="eager"))
    except Exception as error:  # whatever a config or a model class may raise
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        reason = f"cannot be built by transformers {transformers.__version__} ({words})"
        return verdict.Verdict(0, 0, 0.0, refused=reason), 0, ()
    offers = [name for name in ("sdpa", "eager") if name == "eager" or model._supports_sdpa]
    numbers = sum(parameter.numel() for parameter in model.parameters())
    found = survey(model)
    return found.verdict(tuple(offers)), numbers, tuple(found.adaptable)


if __name__ == "__main__":
    sys.exit(process.serve(work))
