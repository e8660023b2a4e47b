"""A forward and a backward of a tiny model with LoRA layers, and how far two of them are apart."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import tiny_runs
import torch

from tuning.models.load import DTYPES, load_base
from tuning.models.lora import adapt

Step = tuple[torch.Tensor, dict[str, torch.Tensor]]


def adapted(folder: Path, *, method: str, precision: str, **changes: Any) -> Any:
    """A tiny model with LoRA layers that do something, in training."""
    packing = tiny_runs.NF4 | {"compute": precision} if method == "qlora" else None
    recipe = tiny_runs.recipe(
        **{"method": method, "precision": precision, "dropout": 0.0, "quantisation": packing}
        | changes
    )
    base = load_base(folder, precision=precision, quantisation=packing, device="cpu")
    tuned, _ = adapt(base, recipe)
    draw = torch.Generator().manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05, generator=draw)
    tuned.enable_input_require_grads()
    return tuned.train()


def step(tuned: Any, precision: str) -> Step:
    """Logits, and gradients by name, of a forward and a backward."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 200, (2, 40), generator=draw)
    vocabulary = tuned.config.get_text_config().vocab_size
    weights = torch.randn(2, 40, vocabulary, generator=draw)
    tuned.zero_grad()
    dtype = DTYPES[precision]
    plain = dtype == torch.float32
    with contextlib.nullcontext() if plain else torch.autocast("cpu", dtype):
        logits = tuned(input_ids=ids, use_cache=False).logits.float()
    (logits * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def away(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative distance."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def furthest(found: Step, expected: Step) -> float:
    """The largest of logits and all gradients."""
    assert found[1].keys() == expected[1].keys()
    return max(away(found[0], expected[0]), *(away(found[1][n], g) for n, g in expected[1].items()))
