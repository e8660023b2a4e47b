"""The smallest machines that hold what a training needs."""

from __future__ import annotations

import itertools
from dataclasses import replace

from tuning import presets
from tuning.plan import memory, sizing
from tuning.plan.coefficients import Precision
from tuning.plan.sizing import Demand, Model

MOST_MACHINES, ENDLESS = 16, 4096  # of a set that is suggested, and more than any has


def smallest_machines(
    base: Model, demand: Demand, *, cloud: str | None = None
) -> tuple[presets.Instance, int] | None:
    """The machine type, and how many, with the least GPU memory that fits the demand.

    One machine where that does, else as few of them; of `cloud` if it has any. Their GPUs hold the
    model whole or all together, and nothing lies in host memory unless the user said so.
    """
    demand = replace(demand, offloads=demand.offloads or False)
    offered = [m for m in presets.instances() if not m.retired]
    offered = [m for m in offered if presets.gpu_support(m.gpu, demand.method).supported]
    offered = sorted(offered, key=lambda m: (m.memory_bytes * m.gpus, m.gpus, m.vcpus or 0, m.name))
    hopeful = [m for m in offered if _fits_machines(base, demand, m, ENDLESS)]
    for clouds in ((cloud,), {m.cloud for m in hopeful}):
        of_them = [machine for machine in hopeful if machine.cloud in clouds]
        for count, machine in itertools.product(range(1, MOST_MACHINES + 1), of_them):
            if _fits_machines(base, demand, machine, count):
                return machine, count
    return None


def _fits_machines(base: Model, demand: Demand, machine: presets.Instance, count: int) -> bool:
    """Whether `count` machines hold the demand's model: whole on each GPU, or on all together.

    Cards without bfloat16 are sized with float16, as a run on them would be.
    """
    gpu, host = machine.gpu, machine.ram_bytes
    half: Precision = "bfloat16" if gpu.bf16 else "float16"
    there = replace(
        demand,
        precision=half if demand.precision != "float32" else "float32",
        attention=demand.attention if gpu.bf16 else "sdpa",
        micro_batch=demand.micro_batch or 1,
    )
    every = demand.layouts(machine.gpus * count, count)
    try:
        least = sizing.smallest(base, there, None, (every[0], every[-1]), host_bytes=host)
    except memory.Unknown:
        return False
    return least.fits(gpu.memory_bytes, host)
