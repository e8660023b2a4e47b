"""The placements that are tried after one has run out of memory."""

from __future__ import annotations

from dataclasses import replace

from tuning.plan.backends import without_copies
from tuning.plan.values import Placement


def fallbacks(
    placement: Placement, *, offload: bool = False, looks_up: bool = False
) -> list[Placement]:
    """`placement`, then those of less memory.

    4-bit weights unpacked each time, constants as they are stored and all layers recomputed if some
    were, half the rows each time, checkpointing, on a GPU layer inputs in host memory if there is
    enough for an `offload`, MLPs in tiles, and input embeddings in host memory if those are only
    `looks_up`. The global batch, and so the run id, stays the same.
    """
    placements = [placement]
    least = replace(placement, recomputed_layers=None, unpacked_layer=False, float_constants=False)
    if least != placement:
        placements.append(least)
    rows = placement.micro_batch * placement.accumulation
    while (last := placements[-1]).micro_batch > 1:
        fewer = divisor(rows, last.micro_batch // 2)
        placements.append(replace(last, micro_batch=fewer, accumulation=rows // fewer))
    if not placement.checkpointing:
        placements.append(replace(placements[-1], checkpointing=True))
    if offload and not placement.activation_offloading:
        kernels = without_copies(placement.kernels)
        placements.append(replace(placements[-1], activation_offloading=True, kernels=kernels))
    if placement.device == "cuda" and not placement.tiled_mlp:
        placements.append(replace(placements[-1], tiled_mlp=True))
    if looks_up and placement.device == "cuda" and not placement.host_embeddings:
        placements.append(replace(placements[-1], host_embeddings=True))
    return placements


def divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` up to `at_most`."""
    return next(n for n in range(min(number, max(1, at_most)), 0, -1) if number % n == 0)
