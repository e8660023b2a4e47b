"""`docs/presets.md`: models, GPUs and machines, written from `configs/`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tuning.presets.hardware import Gpu, Instance, engines, gpus, instances
from tuning.presets.models import Preset
from tuning.presets.models import all as presets
from tuning.presets.support import gpu_support, support

GIB = 1 << 30
CLOUDS = {"azure": "Azure", "arc": "Azure Local (Arc)", "aws": "AWS", "gcp": "Google Cloud"}

_INTRODUCTION = """\
# Base models, GPUs and machines

Written from `configs/` by `make docs`; do not edit.
Any other `org/model` of the hub, and any local folder (`--base-model`), works too, if its
architecture does.

| weights are published in | with method lora | with method qlora |
| --- | --- | --- |
| 16 or 32 bits | as they are | packed in 4 bits as they are loaded |
| fp8 (`quant_method: fp8`), mxfp4 | unpacked as they are loaded | unpacked, then packed in 4 bits |
| bitsandbytes 4-bit | refused | as they are |
| GPTQ, AWQ, bitsandbytes 8-bit, ... | refused | refused |

Unpacking is done tensor by tensor, needs no disk, and takes the memory of 16 bits (or 4). An
adapter is trained on the unpacked weights, which `chat`, `serve` and `merge` load the same way.

## Base models

GiB: 16-bit weights of the text model.
Packing puts several rows into one sequence; where it is not safe it is off.
"""


def markdown() -> str:
    """The page, with a final newline."""
    models = _table(
        (
            "preset",
            "hub id @ revision",
            "licence",
            "architecture",
            "billion (active)",
            "GiB",
            "context",
            "packing",
        ),
        [_model(p) for p in presets()],
    )
    refused = [_refusal(p) for p in presets() if not support(p, "lora").supported]
    sections = [
        _INTRODUCTION + "\n" + models,
        "## Listed, but refused\n\n" + "\n".join(refused),
        "## GPUs\n\n"
        "Memory: what a CUDA program finds. Rates: the datasheet's, dense; 16-bit floats.\n\n"
        + _table(
            ("GPU", "GiB", "compute capability", "TFLOP/s", "GB/s", "LoRA", "QLoRA"),
            [_gpu(g) for g in gpus()],
        ),
        _builds(),
        "## Machines\n\nA name works in any case, and Azure's without `Standard_`.",
        *(_machines(cloud) for cloud in CLOUDS),
    ]
    return "\n\n".join(sections) + "\n"


def _model(preset: Preset) -> Sequence[str]:
    gated = ", gated" if preset.gated else ""
    return (
        preset.name,
        f"{preset.hub_id} @ {preset.revision[:12]}",
        preset.licence + gated,
        preset.facts.wrapper or preset.facts.architecture,
        _billions(preset),
        f"{preset.facts.weight_bytes / GIB:.2f}",
        str(preset.facts.context),
        "yes" if preset.facts.packing_safe else "no",
    )


def _billions(preset: Preset) -> str:
    total, active = preset.facts.parameters / 1e9, preset.facts.active / 1e9
    return f"{total:.2f}" if total == active else f"{total:.2f} ({active:.2f})"


def _refusal(preset: Preset) -> str:
    lora, qlora = support(preset, "lora"), support(preset, "qlora")
    if lora == qlora:
        return f"* {preset.name}: {lora.reason}. Instead: {lora.change}."
    return f"* {preset.name}: lora: {lora.reason}; qlora: {qlora.reason}. Instead: {lora.change}."


def _gpu(gpu: Gpu) -> Sequence[str]:
    rate = gpu.bf16_flops or gpu.fp16_flops
    capability = ".".join(map(str, gpu.capability)) if gpu.capability else "no CUDA"
    return (
        f"{gpu.name} ({gpu.note})" if gpu.note else gpu.name,
        f"{gpu.memory_bytes / GIB:.1f} of {gpu.nominal_gib:g}",
        capability,
        f"{rate / 1e12:g}" if rate else "-",
        f"{gpu.bandwidth / 1e9:g}" if gpu.bandwidth else "-",
        _verdict(gpu_support(gpu, "lora").supported, gpu),
        _verdict(gpu_support(gpu, "qlora").supported, gpu),
    )


def _verdict(supported: bool, gpu: Gpu) -> str:
    if not supported:
        return "no"
    return "bfloat16" if gpu.bf16 else "float16"


def _builds() -> str:
    rows = [
        (
            engine.name,
            engine.driver,
            ", ".join(f"{major}.{minor}" for major, minor in engine.compiled),
            ".".join(map(str, engine.four_bit)),
        )
        for engine in engines()
    ]
    heads = ("build", "lowest driver", "compiled for compute capability", "QLoRA from")
    return (
        "## Builds of torch\n\n"
        "A card takes the newest build that has kernels for it: code for X.y runs on X.z, z >= y.\n"
        "\n" + _table(heads, rows)
    )


def _machines(cloud: str) -> str:
    rows = [_machine(machine) for machine in instances() if machine.cloud == cloud]
    heads = ("machine", "GPUs", "GiB each", "vCPUs", "RAM GiB", "")
    return f"### {CLOUDS[cloud]}\n\n" + _table(heads, rows)


def _machine(machine: Instance) -> Sequence[str]:
    names = " or ".join((machine.name, *machine.aliases))
    remarks = ["retired"] * machine.retired + ["refused"] * (
        not gpu_support(machine.gpu, "lora").supported
    )
    return (
        names,
        f"{machine.gpus} x {machine.gpu.name}",
        f"{machine.gpu.nominal_gib:g}",
        str(machine.vcpus or "-"),
        f"{machine.ram_bytes // GIB}" if machine.ram_bytes else "-",
        ", ".join(remarks),
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
