"""The child process that simulates a model outside the presets.

    {"config": {...}, "variants": [{...}]}    the model's config.json, fields of `Variant`
 -> {"coefficients": {...}}                   as `coefficients.to_json` writes them

Raises SpecError for a model whose steps follow no formula.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import transformers

from tuning import process
from tuning.errors import SpecError
from tuning.plan.coefficients import Variant, to_json
from tuning.training.simulate.fit import coefficients


def work(request: dict[str, Any]) -> dict[str, Any]:
    """Simulate what `request` asks for."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    variants = [Variant(**variant) for variant in request["variants"]]
    try:
        found = coefficients(request["config"], variants=variants)
    except (ValueError, KeyError, AttributeError, RuntimeError) as error:  # whatever a class may do
        what = f"cannot be simulated ({type(error).__name__}: {str(error)[:200]})"
        change = "nothing has to be changed: it is placed with care instead"
        raise SpecError.at(
            "PLAN-110", str(request["config"].get("model_type")), what, change
        ) from error
    return {"coefficients": to_json(found)}


if __name__ == "__main__":
    sys.exit(process.serve(work))
