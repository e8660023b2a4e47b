"""The weights of an adapter as the initial ones of a model with LoRA layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from tuning import adapter as adapters
from tuning.errors import SpecError
from tuning.models import lora


def load(tuned: Any, folder: Path, *, sha256: str | None) -> None:
    """Put the weights of the adapter in `folder` into the peft model `tuned`.

    Rows of tokens that the adapter does not know stay as they are. Raises SpecError for other
    weights than those of `sha256`, and for an adapter of other projections or another shape.
    """
    found = adapters.inspect(folder)
    if found.sha256 != sha256:
        what, change = "has changed since the run began", "run the same command again"
        raise SpecError.at("MODEL-141", str(folder), what, change)
    weights = safetensors.torch.load_file(folder / adapters.WEIGHTS)
    initial = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    if weights.keys() != initial.keys():
        other = sorted(weights.keys() ^ initial.keys())
        what = f"adapts other layers than the run ({len(other)} differ, the first {other[0]})"
        raise SpecError.at("MODEL-142", str(folder), what, CHANGE)
    for name, tensor in weights.items():
        now = initial[name]
        if adapters.rows_of(name):
            tensor = torch.cat([tensor.to(now), now[len(tensor) :]])
        if tensor.shape != now.shape:
            what = f"has {name} of shape {tuple(tensor.shape)}, and the run {tuple(now.shape)}"
            raise SpecError.at("MODEL-142", str(folder), what, CHANGE)
        if not tensor.isfinite().all():
            what, change = "is not finite", "fetch or train it again"
            raise SpecError.at("MODEL-208", f"{folder} {name}", what, change)
        weights[name] = tensor
    with lora.by_own_names():
        set_peft_model_state_dict(tuned, weights)


CHANGE = "leave LoraConfig out: rank, alpha and layers are those of start_adapter"
