"""Refuses base weights that hold NaN or infinity, before anything is computed from them.

Packing in 4 bits would hide such a number, and training would fail later with another explanation.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open

from tuning.errors import Problem, SpecError
from tuning.sources import verify

CHECKED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def require(base: Path, precision: torch.dtype) -> None:
    """Check every floating-point tensor of the model in `base` (some GiB a second and core).

    Raises SpecError that names each tensor with NaN, with infinity, or with a number that the type
    `precision`, in which it is loaded, cannot hold.
    """
    names, _ = verify.needed(path.name for path in base.iterdir())
    paths = [base / name for name in names if name.endswith(".safetensors")]
    with ThreadPoolExecutor(max_workers=4) as pool:  # reductions release the GIL
        found = pool.map(lambda path: list(_problems(path, torch.finfo(precision).max)), paths)
        problems = [problem for each in found for problem in each]
    if problems:
        raise SpecError(problems)


def _problems(path: Path, largest: float) -> Iterator[Problem]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            tensor = file.get_tensor(name)
            if tensor.dtype not in CHECKED or not tensor.numel():
                continue
            low, high = (float(bound) for bound in torch.aminmax(tensor))
            if -largest <= low and high <= largest:
                continue
            fact, change = "holds NaN or infinity", "download the weights again, or name others"
            if abs(low) < float("inf") and abs(high) < float("inf"):
                number = low if -low > high else high
                fact = f"holds {number:.4g}, more than the precision of this run can"
                change = "set bf16: true on a GPU that has it, or name other weights"
            yield Problem("MODEL-117", f"{path} {name}", fact, change)
