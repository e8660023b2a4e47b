"""What the GPU suite lets two packings of the same weight differ in, and what it does not."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from gpu.checks import FOUR_BIT_DIFFERENCES, four_bit_differences


def packings(dtype: torch.dtype, change: str) -> list[list[torch.Tensor]]:
    """Codes, scales, their mean and unpacked numbers: as packed here, and with a `change`."""
    torch.manual_seed(0)
    weight = (torch.randn(1024, 3072) * 0.02).to(dtype)
    found = []
    for changed in (False, True):
        values, state = bnb.functional.quantize_4bit(
            weight, compress_statistics=True, quant_type="nf4"
        )
        if changed and change == "order of a sum":
            state.offset = torch.nextafter(state.offset, torch.tensor(1.0))
        elif changed and change == "codes":
            values[::100] ^= 1
        elif changed and change == "scales":
            state.absmax[::100] ^= 1
        elif changed and change == "mean":
            state.offset = state.offset * 1.01
        unpacked = bnb.functional.dequantize_4bit(values, state)
        found.append([values, state.absmax, state.offset, unpacked])
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("change", ["none", "order of a sum", "codes", "scales", "mean"])
def test_only_roundings_may_differ(dtype: torch.dtype, change: str) -> None:
    """CUDA sums scales in another order than a processor; every other difference is a fault."""
    found = four_bit_differences(*packings(dtype, change))
    passes = all(found[name] <= most for name, most in FOUR_BIT_DIFFERENCES.items())

    assert passes == (change in ("none", "order of a sum")), found
    assert (change == "none") == (not any(found.values()))
