"""The child process that compares a checkpoint's headers with its model class: no weights read.

   {"config": {...},                      the model's parsed config.json
    "name": "...",                        of the model, for messages
    "tensors": {"...": ["BF16", [2, 3]]}} names, types and shapes of all its tensors
-> {"compared": true}                     or false, where transformers cannot load without values
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from tuning import process
from tuning.errors import SpecError
from tuning.models import reading
from tuning.models.survey import plain_linears
from tuning.presets import quantised
from tuning.safetensors import Tensor

log = logging.getLogger(__name__)


def work(request: dict[str, Any]) -> dict[str, Any]:
    """Load the checkpoint that `request` describes, on no memory. Raises what a run would."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    given = request["tensors"].items()
    tensors = {name: Tensor(kind, tuple(shape)) for name, (kind, shape) in given}
    return {"compared": compare(request["name"], request["config"], tensors)}


def compare(name: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint of `tensors` could be compared with the class of its config `record`.

    Raises SpecError if no model can be made of the config, if the checkpoint lacks weights of the
    class, or has some of another shape.
    """
    plain_linears()
    try:
        config = reading.config_of(record)
        with torch.device("meta"):
            reading.auto_class(config).from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever a config or a class may raise for a value
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        fact = f"is refused by transformers {transformers.__version__}: {words}"
        change = "repair it, or use the model's newest revision"
        raise SpecError.at("MODEL-103", f"{name}/config.json", fact, change) from None
    try:
        unpacked = quantised.weights(tensors, record)
        weights = {
            key: torch.empty(weight.shape if weight else tensors[key].shape, device="meta")
            for key, weight in unpacked.items()
        }
        with reading.converted(name):
            model, report = reading.model_class(config).from_pretrained(
                None,
                config=config,
                state_dict=weights,
                dtype=torch.float32,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except SpecError:
        raise
    except Exception:  # whatever a class does with values that are not there; loading says more
        log.info("%s: cannot be compared without its values", name, exc_info=True)
        return False
    reading.refuse_incomplete(name, model, report)
    return True


if __name__ == "__main__":
    sys.exit(process.serve(work))
