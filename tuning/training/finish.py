"""The finish gate: a trained adapter is written to its place only if it is complete and finite."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from tuning import adapter, files
from tuning.errors import DivergedError, TuningError

TOKENIZER_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".md"})


def finish(
    target: Path,
    *,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    save_tokenizer: Callable[[Path], object],
    step: int,
    steps: int,
    skipped: int = 0,
    stopped: bool = False,
) -> adapter.Adapter:
    """Write a trained adapter to `target` once it passes the finish gate.

    `skipped` steps changed no weight, since their float16 gradient overflowed.

    The gate: all steps are done, or early stopping has `stopped` the training; every tensor is
    finite, at least one `lora_B` is not zero, and the written files read back as the adapter of
    `config`. On failure `target` is unchanged. The same tensors and config always give the same
    bytes. Raises DivergedError, SpecError, or TuningError for an unfinished training.
    """
    _gate(tensors, step=step, steps=step if stopped else steps, skipped=skipped)
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        save_tokenizer(scratch)
        for path in scratch.rglob("*"):
            if path.suffix not in TOKENIZER_SUFFIXES:
                raise AssertionError(f"unexpected file {path.name} beside the tokenizer")
        files.write_json(scratch / adapter.CONFIG, dict(config))
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        files.write(
            scratch / adapter.WEIGHTS, safetensors.torch.save(ready, metadata={"format": "pt"})
        )
        adapter.inspect(scratch)
        if target.exists():
            shutil.rmtree(target)
        files.replace_folder(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return adapter.inspect(target)


def _gate(tensors: Mapping[str, torch.Tensor], *, step: int, steps: int, skipped: int) -> None:
    if step != steps:
        what = f"training ended at step {step} of {steps}"
        raise TuningError.at("TRAIN-150", "adapter", what, "run the same command again")
    broken = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if broken:
        raise DivergedError.at(
            "TRAIN-132",
            "adapter",
            f"{len(broken)} of {len(tensors)} tensors are not finite, the first {broken[0]}",
            "lower learning_rate, or inspect the rows of the last steps",
        )
    changed = any(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name)
    if steps > 0 and not changed and skipped == steps:
        raise DivergedError.at(
            "TRAIN-134",
            "adapter",
            f"the float16 gradients of all {steps} steps overflowed, so that no weight changed",
            "train more steps: the first few find the scale; or set ModelConfig.dtype to float32",
        )
    if steps > 0 and not changed:
        raise DivergedError.at(
            "TRAIN-133",
            "adapter",
            "every lora_B is zero: training changed nothing",
            "check that learning_rate is not 0 and that the rows have trainable tokens",
        )


def config_of(
    lora: Mapping[str, Any], *, base_name: str, base_revision: str | None
) -> dict[str, Any]:
    """The `adapter_config.json` of a LoRA config (PEFT's `to_dict`): the keys that readers need.

    `base_name` is a hub id, or the path of a local base; an image gets a name instead of a path.
    """
    alpha = float(lora["lora_alpha"])
    hub_revision = base_revision if base_revision and ":" not in base_revision else None
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": hub_revision,
        "r": lora["r"],
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,  # some readers want an int
        "lora_dropout": lora["lora_dropout"],
        "use_rslora": lora["use_rslora"],
        "use_dora": lora["use_dora"],
        "target_modules": sorted(lora["target_modules"]),
        "target_parameters": lora["target_parameters"],
        "layers_to_transform": lora["layers_to_transform"],
        "bias": "none",
        "inference_mode": True,
        "peft_version": lora["peft_version"],
        "trainable_token_indices": lora["trainable_token_indices"],
    }
    exclude = lora["exclude_modules"]
    if exclude:
        record["exclude_modules"] = exclude if isinstance(exclude, str) else sorted(exclude)
    return {name: value for name, value in record.items() if value is not None}
