"""Refuses base weights that hold NaN or infinity, before anything is computed from them.

Packing in 4 bits would hide such a number, and training would fail later with another explanation.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from tuning import files
from tuning.errors import Problem, SpecError
from tuning.models import unpacked

CHECKED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def require(base: Path, precision: torch.dtype) -> None:
    """Check every floating-point tensor of the model in `base` (some GiB a second and core).

    Raises SpecError that names each tensor with NaN, with infinity, or with a number that the type
    `precision`, in which it is loaded, cannot hold.
    """
    # a product may be more than float16 holds, and should be told
    dtype = torch.float32 if precision == torch.float16 else precision
    tensors = unpacked.tensors(base, files.read_json(base / "config.json"), dtype)
    with ThreadPoolExecutor(max_workers=4) as pool:  # reductions release the GIL
        found = pool.map(partial(_problem, torch.finfo(precision).max), tensors.values())
        problems = [problem for problem in found if problem]
    if problems:
        raise SpecError(problems)


def _problem(largest: float, weight: unpacked.Lazy) -> Problem | None:
    tensor = weight[...]
    if tensor.dtype not in CHECKED or not tensor.numel():
        return None
    low, high = (float(bound) for bound in torch.aminmax(tensor))
    if -largest <= low and high <= largest:
        return None
    fact, change = "holds NaN or infinity", "download the weights again, or name others"
    if abs(low) < float("inf") and abs(high) < float("inf"):
        number = low if -low > high else high
        fact = f"holds {number:.4g}, more than the precision of this run can"
        change = "set bf16: true on a GPU that has it, or name other weights"
    return Problem("MODEL-117", weight.where, fact, change)
