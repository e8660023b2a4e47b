"""How long ranks wait for each other: bytes over a link's speed, behind computing where it hides.

A shared copy gathers each layer twice in a micro-batch, before its forward and before its backward:
with checkpointing the second one also serves the forward that is computed again. The next layer is
gathered while one is computed, so the slower of both counts. Base weights have no gradients: those
of the adapters are reduced, in a shared copy layer by layer in the backward, between whole copies
once a step. Nothing here has been measured by this project; it ranks candidate placements.
"""

from __future__ import annotations

from dataclasses import dataclass

from tuning.plan.sharding import Shared
from tuning.plan.speed import COPY, HOST_LINK
from tuning.presets import Gpu

# Where the tables know no better: PCIe 3.0 x16, one way, and a usual machine's network.
LINK, NETWORK = 16e9, 10e9 / 8
# Shares of a datasheet's rate that NCCL's large collectives are reported to reach.
LINK_SHARE, NETWORK_SHARE = 0.75, 0.7
COPIES = 2  # a gathered byte is read from the buffer and written into its weight


@dataclass(frozen=True)
class Links:
    """Bytes a second, one way, as reached: of a GPU inside its machine, of a whole machine."""

    inside: float
    between: float

    @classmethod
    def of(cls, gpu: Gpu, network: float | None) -> Links:
        """Of `gpu`, on machines with a network of that many bytes a second."""
        return cls((gpu.link or LINK) * LINK_SHARE, (network or NETWORK) * NETWORK_SHARE)


def seconds(
    compute: float,
    shared: Shared,
    links: Links,
    *,
    checkpointing: bool,
    accumulation: int,
    bandwidth: float,
) -> float:
    """Seconds of a micro-batch that takes `compute` on its own.

    `bandwidth` is that of the GPU's memory, `accumulation` micro-batches make a step.
    """
    forward = compute * (1 / 3 if checkpointing else 1 / 2)
    backward = compute - forward
    if shared.layout.shards == 1:
        return compute + max(0.0, _all_reduce(shared, links) - backward) / accumulation
    layers = _gather(shared, links, shared.layers + shared.lora)
    reduced = _gather(shared, links, shared.lora) + _all_reduce(shared, links)
    alone = _gather(shared, links, shared.layer + shared.embedding + shared.head)  # not hidden
    gathered = 2 * (shared.layers + shared.lora) + shared.embedding + shared.head
    copied = COPIES * gathered / (bandwidth * COPY)
    return max(forward, layers) + max(backward, layers + reduced) + alone + copied


def _gather(shared: Shared, links: Links, size: int) -> float:
    """Seconds until each rank of a copy has `size` bytes whole; as many to reduce and scatter."""
    layout = shared.layout
    inside = size * (1 - 1 / layout.shards) / links.inside
    between = size * (1 - 1 / layout.spanned) / links.between
    host = shared.part(size) / HOST_LINK if layout.offload else 0.0
    return max(inside, between, host)


def _all_reduce(shared: Shared, links: Links) -> float:
    """Seconds until all copies have the sum of the adapters' gradients."""
    layout = shared.layout
    size = 2 * shared.part(shared.lora)  # of each rank, there and back
    apart = layout.nodes // layout.spanned  # machines that hold the same share
    between = size * min(layout.each, layout.shards) * (1 - 1 / apart) / links.between
    return max(size * (1 - 1 / layout.copies) / links.inside, between)
