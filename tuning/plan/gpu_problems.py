"""Why the GPUs of a device cannot train: the cards, their driver, or the build of torch."""

from __future__ import annotations

from collections.abc import Iterator

from tuning import presets
from tuning.errors import Problem, SpecError
from tuning.plan.device import Device
from tuning.plan.torch_build import how_to_install
from tuning.spec import Method


def refuse(device: Device, method: Method = "lora") -> None:
    """Raise SpecError, before any weights move, for GPUs that cannot be used."""
    if found := list(problems(device, method)):
        raise SpecError(found)


def problems(device: Device, method: Method) -> Iterator[Problem]:
    """Each reason, with the build of torch that fits, if one does."""
    if device.gpu and not (answer := presets.gpu_support(device.gpu, method)).supported:
        where = device.name if device.cuda else device.origin
        yield Problem("PLAN-106", where, answer.reason, _without(device, str(answer.change)))
    elif (reason := _too_old(device) or _no_kernels(device)) is not None:
        yield reason


def _too_old(device: Device) -> Problem | None:
    """The driver runs no CUDA of the build's major version."""
    build, runs = device.torch, device.cuda
    if build is None or build.cuda is None or runs is None or runs[0] >= build.cuda[0]:
        return None
    driver = f"driver {device.driver}" if device.driver else "driver"
    newest, needed = (".".join(map(str, version)) for version in (runs, build.cuda))
    what = f"its {driver} runs CUDA {newest}, and torch {build.version} needs CUDA {needed}"
    lowest = {engine.cuda: engine.driver for engine in presets.engines()}.get(build.cuda[0])
    change = f"update the driver to {lowest} or newer" if lowest else "update the driver"
    if device.engine:
        change = f"{how_to_install(device.engine)}, or {change}"
    return Problem("PLAN-115", device.name, what, change)


def _no_kernels(device: Device) -> Problem | None:
    """The build has no code for one of the cards."""
    if device.torch is None or device.torch.cuda is None:
        return None
    compiled = presets.kernels(device.torch.cuda)
    if compiled is None:
        return None
    lacking = [each for each in device.capabilities if not presets.runs(compiled, each)]
    if not lacking:
        return None
    lowest = ".".join(map(str, lacking[0]))
    what = f"torch {device.torch.version} has no kernels for its compute capability {lowest}"
    newest = presets.engine_build(*device.capabilities)
    change = (
        "show it GPUs of one kind with CUDA_VISIBLE_DEVICES: no build of torch has kernels for all"
    )
    if device.engine:
        change = how_to_install(device.engine)
    elif newest:
        driver = next(each.driver for each in presets.engines() if each.name == newest)
        change = f"update the driver to {driver} or newer, and {how_to_install(newest)}"
    return Problem("PLAN-116", device.name, what, _without(device, change))


def _without(device: Device, change: str) -> str:
    """`change`, or that GPUs which are in the way are left out."""
    return (
        f"set {device.without} to leave out the other GPUs, or {change}" if device.odd else change
    )
