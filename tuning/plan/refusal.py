"""What does not fit a machine, in numbers, and what would do: PLAN-120."""

from __future__ import annotations

from dataclasses import replace

from tuning import presets
from tuning.errors import SpecError
from tuning.plan import machines, memory, sizing
from tuning.plan.base import Base
from tuning.plan.device import Device
from tuning.plan.sharding import SHARE_LAYERS
from tuning.plan.sizing import HEADROOM, Demand, Fit, Model

SHORTEST = 128  # tokens of a row that is worth a suggestion
GIB, MIB = 2**30, 2**20


def of(model: Model, demand: Demand, base: Base, device: Device) -> SpecError:
    """The refusal of `demand`, which fits `device` in no layout."""
    least = _least(model, demand, device)
    largest = sorted(least.memory.terms.items(), key=lambda term: -term[1])[:2]
    terms = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    layout = least.layout
    things = "GPUs" if device.kind == "cuda" else "processes"
    all_of = f", shared by {layout.shards} {things}" if layout.shards > 1 else ""
    what = (
        f"does not fit {device.name}: {demand.method} with rows of {demand.length} tokens takes "
        f"at least {least.memory.total / GIB:.1f} GiB{all_of} ({terms}), "
        f"and {device.rank_bytes / GIB:.1f} GiB are there"
    )
    if short := _host_short(model, demand, device):
        what += short
    left_out = {
        "per_device_train_batch_size": replace(demand, micro_batch=None),
        "gradient_checkpointing": replace(demand, checkpointing=None),
        "activation_offloading": replace(demand, offloads=None),
        "fsdp": replace(demand, sharding=None),
    }
    changes = [
        f"leave out TrainingArguments.{key}"
        for key, other in left_out.items()
        if other != demand and _fits(model, other, device)
    ]
    if device.without:
        changes.append(f"set {device.without} ({device.odd})")
    if device.taken_bytes and device.total_bytes:
        empty = replace(device, memory_bytes=device.total_bytes)
        which = "fullest GPU" if device.count > 1 else "GPU"
        held = f"{device.taken_bytes / GIB:.1f} GiB of the {which}"
        what += f" ({held} are held by other processes)"
        if _fits(model, demand, empty):
            changes.append(f"end what holds {held}: nvidia-smi shows it")
    divides = model.facts is None or model.facts.model_type not in SHARE_LAYERS
    if demand.whole and divides and _fits(model, replace(demand, whole=""), device):
        changes.append(f"go without {demand.whole}: then its GPUs share the model")
    if row := _longest(model, demand, device):
        words, change = row
        what += words
        changes.append(change)
    packs = device.gpu is None or presets.gpu_support(device.gpu, "qlora").supported
    packed = replace(demand, method="qlora")
    if demand.method == "lora" and packs and _fits(model, packed, device):
        changes.append("use method qlora, which fits here")
    cloud = next((m.cloud for m in presets.instances() if m.name == device.origin), None)
    if enough := machines.smallest_machines(model, demand, cloud=cloud):
        changes.append(_use(*enough))
    change = ", or ".join(changes)
    if not change:
        change = "choose a smaller model: no known machines hold this one on their GPUs"
    return SpecError.at("PLAN-120", base.name, what, change)


def _use(machine: presets.Instance, count: int) -> str:
    if count > 1:
        return f"use {count} x {machine.name} (resource.count: {count})"
    return f"use {machine.name} ({machine.gpus} x {machine.gpu.name}) or larger"


def _longest(model: Model, demand: Demand, device: Device) -> tuple[str, str] | None:
    """What a token of a row costs and which rows fit, and what to change; None where none does."""
    least = _least(model, demand, device)
    shared = replace(demand, layout=least.layout)
    row = sizing.longest(
        model, shared, device.gpu, free_bytes=device.rank_bytes, host_bytes=device.host_bytes
    )
    if not SHORTEST <= row < demand.length:
        return None
    one, fitting = (
        _least(model, replace(demand, length=length, span=float(length)), device).memory.total
        for length in (64, row)
    )
    token = (fitting - one) / (row - 64)
    left = device.rank_bytes * (1 - HEADROOM) - one
    words = (
        f"; a token of a row takes {token / MIB:.2f} MiB, and beside {one / GIB:.1f} GiB for all "
        f"else {left / GIB:.1f} GiB are left: rows of up to {row} tokens"
    )
    return words, f"set TrainingArguments.max_length to {row} or less"


def _host_short(model: Model, demand: Demand, device: Device) -> str:
    """That host memory is too small for what the GPUs cannot hold, if so."""
    least = min(_smallest(model, demand, device, None), key=lambda fit: fit.memory.total)
    if device.host_bytes is None or least.fits_host(device.host_bytes):
        return ""
    return (
        f"; with a part in host memory it takes {least.memory.total / GIB:.1f} GiB, and of a "
        f"machine's host memory {least.host_bytes / GIB:.1f} of {device.host_bytes / GIB:.1f} GiB"
    )


def _least(model: Model, demand: Demand, device: Device) -> Fit:
    """The placement of the least memory on a GPU of `device`, with enough host memory if any."""
    every = _smallest(model, demand, device, device.host_bytes)
    return next((fit for fit in every if fit.fits_host(device.host_bytes)), every[0])


def _smallest(model: Model, demand: Demand, device: Device, host: int | None) -> list[Fit]:
    """The smallest placement of each layout, that of the least memory on a GPU first.

    One for which `host` bytes of host memory are enough, if there is any.
    """
    layout = demand.layout
    every = demand.layouts(layout.ranks, layout.nodes)
    if device.kind == "cuda":
        every += [replace(each, offload=True) for each in every if each.shards > 1]
    fits = [sizing.smallest(model, demand, device.gpu, [each], host_bytes=host) for each in every]
    return sorted(fits, key=lambda fit: fit.memory.total)


def _fits(model: Model, demand: Demand, device: Device) -> bool:
    try:
        return _least(model, demand, device).fits(device.rank_bytes, device.host_bytes)
    except memory.Unknown:  # only the requested variants were simulated
        return False
