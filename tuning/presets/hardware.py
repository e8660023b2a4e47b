"""GPUs, cloud machine types, and the builds of torch that run on the GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from tuning.errors import SpecError
from tuning.presets.load import CONFIGS, record, table
from tuning.presets.models import nearest

MIB = 1 << 20
GIB = 1 << 30
Capability = tuple[int, int]


@dataclass(frozen=True)
class Gpu:
    """One kind of accelerator. Rates are the datasheet's, dense (without sparsity)."""

    name: str
    nominal_gib: float  # as advertised
    memory_bytes: int  # as CUDA reports it
    capability: Capability | None  # compute capability; None: no CUDA
    bf16: bool  # native bfloat16 arithmetic
    fp16_flops: float | None  # operations a second, float16 with float32 sums
    bf16_flops: float | None  # in bfloat16; None without native support
    bandwidth: float | None  # bytes a second of its memory
    note: str  # for docs, or ""
    products: tuple[str, ...] = ()  # further names that the driver gives it
    link: float | None = None  # bytes a second to the other GPUs of its machine, one way


@dataclass(frozen=True)
class Instance:
    """One machine type of a cloud. A vGPU slice is a GPU of its own kind."""

    name: str
    cloud: str  # "azure", "aws", "gcp" or "arc"
    gpu: Gpu
    gpus: int
    vcpus: int | None
    ram_bytes: int | None
    retired: bool  # the cloud no longer starts new ones
    aliases: tuple[str, ...]
    network: float | None = None  # bytes a second between two such machines

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory of each GPU."""
        return self.gpu.memory_bytes


@dataclass(frozen=True)
class Engine:
    """One CUDA build of torch that the image is offered with."""

    name: str  # "cu126": also the last part of torch's package index
    driver: str  # lowest driver version
    compiled: tuple[Capability, ...]  # compute capabilities that its kernels are compiled for
    four_bit: Capability  # lowest one on which bitsandbytes' 4-bit kernels run

    @property
    def cuda(self) -> int:
        """Its major version of CUDA; a driver runs every CUDA of its own major version."""
        return int(self.name[2:4])

    def runs_on(self, capability: Capability) -> bool:
        """Whether it has code for a GPU of this compute capability."""
        return runs(self.compiled, capability)


@cache
def gpus() -> tuple[Gpu, ...]:
    """Every kind of GPU, oldest first."""
    return tuple(_gpu(name, value) for name, value in table(CONFIGS / "gpus.yaml").items())


@cache
def instances() -> tuple[Instance, ...]:
    """Every machine type, by cloud and then as its file orders them."""
    return tuple(
        _instance(name, value, cloud=path.stem)
        for path in sorted((CONFIGS / "instances").glob("*.yaml"))
        for name, value in table(path).items()
    )


def runs(compiled: Iterable[Capability], capability: Capability) -> bool:
    """CUDA's rule: code for X.y runs on every X.z with z >= y, and on no other X."""
    major, minor = capability
    return any(major == have[0] and minor >= have[1] for have in compiled)


@cache
def engines() -> tuple[Engine, ...]:
    """Every supported build of torch, oldest CUDA first."""
    rows = table(CONFIGS / "engines.yaml").items()
    return tuple(_engine(name, value) for name, value in rows if "driver" in value)


def kernels(cuda: tuple[int, int]) -> tuple[Capability, ...] | None:
    """Compute capabilities with kernels in torch's build for this CUDA; None if not known.

    Of a build that no table lists, what the next newer one of its major version has: each drops
    old cards and no later one takes them up again.
    """
    rows = table(CONFIGS / "engines.yaml").items()
    known = {(int(name[2:4]), int(name[4:])): row["compiled"] for name, row in rows}
    newer = sorted(each for each in known if each[0] == cuda[0] and each >= cuda)
    return tuple(map(_capability, known[newer[0]])) if newer else None


def gpu(name: str) -> Gpu:
    """The GPU of this name, ours or the driver's ("NVIDIA H200", "Tesla-T4"), in any case.

    A MIG slice ("NVIDIA A100-SXM4-80GB MIG 1g.10gb") has its share of the card's memory and rates.
    Raises SpecError for one that is not in the table.
    """
    whole, _, profile = _product(name).partition("-mig-")
    card = _products().get(whole)
    if card and not profile:
        return card
    if card and (sizes := _MIG_PROFILE.fullmatch(profile)):
        return _slice(card, sizes[0], sevenths=int(sizes[1]), gib=int(sizes[2]))
    raise SpecError.at(
        "SPEC-306",
        "gpu",
        f'"{name}" is not in the table',
        f"{nearest(name, (g.name for g in gpus()))}use one of {', '.join(g.name for g in gpus())}",
    )


def instance(name: str, *, where: str = "resource.instanceType") -> Instance:
    """The machine type of this name, in any case, Azure's with or without `Standard_`.

    Raises SpecError for one that is not in the table, with the nearest name, or with the machines
    that have the GPU of that name.
    """
    key = name.strip().lower()
    if machine := _by_name().get(key):
        return machine
    near = _machines_with(name.strip()) or nearest(key, _spellings())
    raise SpecError.at(
        "SPEC-304",
        where,
        f'Unsupported instance type "{name}"',
        f"{near}use one that `python -m tuning presets --instances` lists",
    )


def _machines_with(gpu_name: str) -> str:
    """In words, the machine with the fewest such GPUs of each cloud; empty if it is no GPU's name.

    "H100" is every kind of H100.
    """
    asked = set(_product(gpu_name).split("-"))
    named = (m for m in instances() if asked <= set(_product(m.gpu.name).split("-")))
    found = [machine for machine in named if not machine.retired]
    fewest: dict[str, str] = {}
    for machine in sorted(found, key=lambda m: m.gpus):
        fewest.setdefault(machine.cloud, machine.name)
    return f"{gpu_name} is a GPU, of {', '.join(fewest.values())}: " if fewest else ""


def engine_build(*capabilities: Capability, cuda: tuple[int, int] | None = None) -> str | None:
    """The newest of `engine_builds`; None where no build has kernels."""
    return next(reversed(engine_builds(*capabilities, cuda=cuda)), None)


def engine_builds(*capabilities: Capability, cuda: tuple[int, int] | None = None) -> list[str]:
    """The builds of torch that have kernels for all `capabilities`, oldest CUDA first.

    `cuda`: the newest CUDA that the machine's driver runs, where it is known.
    """
    return [
        engine.name
        for engine in engines()
        if all(map(engine.runs_on, capabilities)) and (cuda is None or engine.cuda <= cuda[0])
    ]


_MIG_PROFILE = re.compile(r"(?:\d+c\.)?(\d)g\.(\d+)gb.*")  # 1g.10gb, 1c.3g.40gb, 1g.10gb+me


def _slice(card: Gpu, profile: str, *, sevenths: int, gib: int) -> Gpu:
    """A MIG slice: so many of seven parts of the card's cores, and its share of the memory."""
    compute, memory = sevenths / 7, min(1.0, gib / card.nominal_gib)
    return replace(
        card,
        name=f"{card.name} MIG {profile}",
        nominal_gib=float(gib),
        memory_bytes=int(card.memory_bytes * memory),
        fp16_flops=_scaled(card.fp16_flops, compute),
        bf16_flops=_scaled(card.bf16_flops, compute),
        bandwidth=_scaled(card.bandwidth, memory),
        products=(),
        link=None,
    )


def _product(name: str) -> str:
    """A product's name in one spelling; "-SHARED" is a label of time-sliced cards."""
    plain = "-".join(name.lower().replace("_", " ").replace("-", " ").split())
    return plain.removeprefix("nvidia-").removeprefix("tesla-").removesuffix("-shared")


@cache
def _products() -> Mapping[str, Gpu]:
    return {_product(name): g for g in gpus() for name in (g.name, *g.products)}


def _spellings() -> list[str]:
    """Every name, Azure's with and without its prefix."""
    names = [name for machine in instances() for name in (machine.name, *machine.aliases)]
    return [*names, *(name.removeprefix("Standard_") for name in names)]


@cache
def _by_name() -> Mapping[str, Instance]:
    names = {
        key.lower(): machine for machine in instances() for key in (machine.name, *machine.aliases)
    }
    short = {key.removeprefix("standard_"): machine for key, machine in names.items()}
    return {**short, **names}


def _gpu(name: str, value: Any) -> Gpu:
    fields = record(
        value,
        where=f"gpus.yaml: {name}",
        required={"gib": float, "mib": int},
        optional={
            "capability": str,
            "fp16_tflops": float,
            "bf16_tflops": float,
            "bandwidth_gb": float,
            "link_gb": float,
            "note": str,
            "products": list,
        },
    )
    capability = _capability(fields["capability"]) if fields["capability"] else None
    return Gpu(
        name=name,
        nominal_gib=fields["gib"],
        memory_bytes=fields["mib"] * MIB,
        capability=capability,
        bf16=capability is not None and capability >= (8, 0),
        fp16_flops=_scaled(fields["fp16_tflops"], 1e12),
        bf16_flops=_scaled(fields["bf16_tflops"], 1e12),
        bandwidth=_scaled(fields["bandwidth_gb"], 1e9),
        note=fields["note"] or "",
        products=tuple(fields["products"] or ()),
        link=_scaled(fields["link_gb"], 1e9),
    )


def _instance(name: str, value: Any, *, cloud: str) -> Instance:
    fields = record(
        value,
        where=f"{cloud}.yaml: {name}",
        required={"gpu": str, "gpus": int},
        optional={
            "vcpus": int,
            "ram": int,
            "network_gbit": float,
            "retired": bool,
            "aliases": list,
        },
    )
    return Instance(
        name=name,
        cloud=cloud,
        gpu=gpu(fields["gpu"]),
        gpus=fields["gpus"],
        vcpus=fields["vcpus"],
        ram_bytes=fields["ram"] * GIB if fields["ram"] else None,
        retired=bool(fields["retired"]),
        aliases=tuple(fields["aliases"] or ()),
        network=_scaled(fields["network_gbit"], 1e9 / 8),
    )


def _engine(name: str, value: Any) -> Engine:
    fields = record(
        value,
        where=f"engines.yaml: {name}",
        required={"driver": str, "compiled": list, "four_bit": str},
    )
    return Engine(
        name=name,
        driver=fields["driver"],
        compiled=tuple(_capability(text) for text in fields["compiled"]),
        four_bit=_capability(fields["four_bit"]),
    )


def _capability(text: str) -> Capability:
    major, minor = text.split(".")
    return int(major), int(minor)


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit
