"""The page `docs/fit.md`: what fits on which GPU."""

from __future__ import annotations

import typing

from tuning import presets
from tuning.plan.coefficients import Coefficients, Method, preset_coefficients
from tuning.plan.sizing import HEADROOM, Demand, Model, best

CLASSES = ("V100-PCIE-16GB", "A10", "A100-SXM4-40GB", "A100-PCIE-80GB", "H100-NVL", "H200-SXM5")
PAGE = """# What fits on which GPU

Rows of 2,048 packed tokens, rank 16 on every projection, one GPU of the class, {headroom:.0%}
of its memory kept free; made by `make docs` from the coefficients in `configs/memory/`. A cell says
how many rows are trained at once without checkpointing, or with it (`c`), and the planned peak in
GiB; a dash means that nothing fits. Planned, not measured: `benchmarks/gpu_plan.py` compares with a
GPU.

| preset | method | {heads} |
|---|---|{lines}
{rows}
"""


def markdown() -> str:
    """The page `docs/fit.md`."""
    gpus = [presets.gpu(name) for name in CLASSES]
    rows = [
        f"| {preset.name} | {method} | "
        + " | ".join(_cell(preset, coefficients, method, gpu) for gpu in gpus)
        + " |"
        for preset in presets.all()
        if (coefficients := preset_coefficients(preset.name))
        for method in typing.get_args(Method)
        if presets.support(preset, method).supported
    ]
    return PAGE.format(
        headroom=HEADROOM,
        heads=" | ".join(gpu.name for gpu in gpus),
        lines="---|" * len(gpus),
        rows="\n".join(rows),
    )


def _cell(
    preset: presets.Preset, coefficients: Coefficients, method: Method, gpu: presets.Gpu
) -> str:
    demand = Demand(
        method=method,
        precision="bfloat16" if gpu.bf16 else "float16",
        rank=16,
        dropout=0.0,
        optimizer="adamw_torch_fused",
        attention="sdpa",
        double_quant=True,
        targets=None,
        length=2048,
        rows=8,
        packed=preset.facts.packing_safe,
        device="cuda",
        span=2048.0,
        offloads=False,  # how much host memory there is depends on the machine
    )
    fit = best(Model(preset.facts, coefficients), demand, gpu, free_bytes=gpu.memory_bytes)
    if fit is None:
        return "–"
    mark = "c" if fit.checkpointing else ""
    return f"{fit.micro_batch}{mark}, {fit.memory.total / 2**30:.1f}"
