"""What there is to compute with: the GPUs of this machine, or its processor and memory.

The GPUs are those that CUDA sees: `probe.py` asks it, in a process of its own and without torch, so
that planning stays light. Memory is what is actually free now, and on a CPU never more than the
control group allows.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tuning import presets
from tuning.errors import SpecError
from tuning.plan import torch_build
from tuning.plan.probe import MISSING, NO_DEVICE
from tuning.plan.torch_build import TorchBuild, how_to_install
from tuning.presets import Gpu
from tuning.presets.hardware import Capability

PATIENCE = 60.0  # seconds; without its persistence daemon a driver starts eight cards in twenty
SOON = 3.0  # seconds after which the user is told what is waited for
ROOMY = 4 << 30  # bytes of a GPU with which training is worth while
LITTLE = 0.05  # share of a GPU's free memory that others may hold without a word


@dataclass(frozen=True)
class Device:
    """The GPUs of one machine, as many as its weakest, or one CPU; of each of several machines."""

    kind: Literal["cuda", "cpu"]
    name: str
    count: int  # GPUs; 1 for a CPU
    memory_bytes: int  # free, for each GPU; for a CPU, memory this process may still take
    bf16: bool  # native bfloat16 arithmetic
    capability: Capability | None = None  # the lowest
    origin: str = "found on this machine"
    gpu: Gpu | None = None  # its row in the table of GPUs, or what the driver says of another card
    kinds: tuple[Capability, ...] = ()  # all of them, where GPUs of several kinds may be met
    cuda: tuple[int, int] | None = None  # newest CUDA that the driver runs, where it is known
    driver: str = ""  # its version
    torch: TorchBuild | None = None  # installed beside these GPUs
    virtual_memory: bool = True  # whether torch can grow its segments of GPU memory
    total_bytes: int | None = None  # of each GPU, free or not
    odd: str = ""  # GPUs without which the others could do more
    without: str = ""  # what to set to leave them out
    no_gpu: str = ""  # of a CPU: why a GPU is not used, where there may be one
    remedy: str = ""  # what to do about it
    nodes: int = 1  # machines of this kind that train together; all other fields are of one
    host_bytes: int | None = None  # RAM that training may take on a machine with GPUs
    network: float | None = None  # bytes a second between two machines

    def __str__(self) -> str:
        size = f"{self.memory_bytes / 2**30:.1f} GiB free"
        if self.taken_bytes:
            size += f" of {(self.total_bytes or 0) / 2**30:.1f}"
        many = f"{self.count} x " if self.count > 1 else ""
        many = f"{self.nodes} machines, each {many}" if self.nodes > 1 else many
        notes = [self.origin, self.driver and f"driver {self.driver}"]
        notes += [self.no_gpu and f"no GPU: {self.no_gpu}"]
        return f"{many}{self.name} ({size}; {', '.join(filter(None, notes))})"

    @property
    def ranks(self) -> int:
        """Training processes on all machines: one for each GPU."""
        return self.count * self.nodes

    @property
    def rank_bytes(self) -> int:
        """Free memory for each training process: a GPU's, or its part of the CPU's."""
        return self.memory_bytes if self.kind == "cuda" else self.memory_bytes // self.count

    @property
    def taken_bytes(self) -> int:
        """What other processes hold of the fullest GPU, if it is more than a little."""
        taken = (self.total_bytes or self.memory_bytes) - self.memory_bytes
        return taken if taken > LITTLE * self.memory_bytes else 0

    @property
    def engine(self) -> str | None:
        """The newest build of torch with kernels for its GPUs that the driver runs, if any."""
        kinds = self.capabilities
        return presets.engine_build(*kinds, cuda=self.cuda) if kinds else None

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """The compute capability of each kind of its GPUs; empty for a CPU."""
        return self.kinds or ((self.capability,) if self.capability else ())


def detect(most: int | None = None, *, waits: Callable[[], None] = lambda: None) -> Device:
    """The GPUs here, else the CPU. GPUs of several kinds count as the weakest, and as many.

    No more GPUs than the first `most`. `waits` is called if the driver takes its time.
    """
    return of_answer(_ask(waits), torch_build.installed(), most)


def cpu() -> Device:
    """This machine's processor, with the memory that it may still use."""
    flags = _read("/proc/cpuinfo")
    return Device(
        kind="cpu",
        name=f"CPU, {os.cpu_count()} cores, {platform.machine()}",
        count=1,
        memory_bytes=_free_memory(),
        bf16="avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags,
    )


def _ask(waits: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The answer of `probe.py`. A driver that does not answer is left behind, not waited for."""
    script = Path(__file__).with_name("probe.py")
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", str(script)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        try:
            output, _ = child.communicate(timeout=SOON)
        except subprocess.TimeoutExpired:
            waits()
            output, _ = child.communicate(timeout=PATIENCE - SOON)
        answer: dict[str, Any] = json.loads(output)
        return answer
    except subprocess.TimeoutExpired:
        child.kill()
        with suppress(subprocess.TimeoutExpired):  # inside a call of the driver it may never die
            child.communicate(timeout=1)
        return {"devices": [], "error": [0, f"the driver did not answer in {PATIENCE:.0f} s"]}
    except ValueError:
        return {"devices": [], "error": [0, f"asking the driver ended with {child.returncode}"]}


def of_answer(answer: dict[str, Any], build: TorchBuild | None, most: int | None = None) -> Device:
    """The device that an answer of `probe.py` describes, with this build of torch installed.

    No more GPUs than the first `most`. Without a GPU, with one that does not work, or with a build
    of torch for processors, the CPU, with the reason.
    """
    rows = answer["devices"][:most]
    if not rows or answer.get("error"):
        what, change = _why_none(answer)
        return replace(cpu(), no_gpu=what, remedy=change)
    cards = [_card(row) for row in rows]
    weakest = min(cards, key=lambda card: (card.capability or (0, 0), card.bandwidth or 0.0))
    kinds = tuple(sorted({card.capability for card in cards if card.capability}))
    shared = any(row["integrated"] for row in rows)
    fullest = min(rows, key=_free)
    odd, without = _odd(rows, cards)
    gpus = Device(
        kind="cuda",
        name=" + ".join(sorted({card.name for card in cards})),
        count=len(rows),
        memory_bytes=min([_free(fullest)] + ([_free_memory()] if shared else [])),
        total_bytes=None if shared else int(fullest["total"]),
        odd=odd,
        without=without,
        bf16=weakest.bf16,
        capability=kinds[0],
        gpu=weakest,
        kinds=kinds,
        cuda=tuple(answer["cuda"]),
        driver=answer["driver"],
        torch=build,
        virtual_memory=all(row["virtual_memory"] for row in rows),
        host_bytes=0 if shared else _free_memory(),  # unified memory is counted once
    )
    if build is None or build.cuda:
        return gpus
    what = f"{gpus.name} is not used, since torch {build.version} is the build for processors"
    change = how_to_install(gpus.engine) if gpus.engine else "use a newer GPU, or a newer driver"
    return replace(cpu(), no_gpu=what, remedy=change)


def _odd(rows: list[dict[str, Any]], cards: list[Gpu]) -> tuple[str, str]:
    """GPUs without which the others have more memory together, since all count as the fullest.

    And what to set to leave them out; both empty if there are none.
    """
    free = [_free(row) for row in rows]
    best = max(sorted(set(free)), key=lambda least: least * sum(one >= least for one in free))
    if best == min(free) or best < ROOMY:
        return "", ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",")] if visible else list(map(str, range(64)))
    out = ", ".join(
        f"{names[n]} ({cards[n].name}, {free[n] / 2**30:.1f} GiB free)"
        for n in range(len(rows))
        if free[n] < best
    )
    keep = ",".join(names[n] for n in range(len(rows)) if free[n] >= best)
    return f"all count as the fullest GPU; in the way: {out}", f"CUDA_VISIBLE_DEVICES={keep}"


def _card(row: dict[str, Any]) -> Gpu:
    """The card's row in the table of GPUs, or what the driver says of a card that has none."""
    capability = (int(row["capability"][0]), int(row["capability"][1]))
    try:
        return presets.gpu(row["name"])
    except SpecError:
        size, bf16 = row["total"], capability >= (8, 0)
        return Gpu(row["name"], size / 2**30, size, capability, bf16, None, None, None, "")


def _free(row: dict[str, Any]) -> int:
    """Free bytes. NVML counts on a card with reserved memory more than CUDA can have."""
    return int(row["total"] if row["free"] is None else min(row["free"], row["total"]))


# CUDA's error -> what to do about it here.
_REMEDIES = {
    46: "end the process that holds it, or allow several: nvidia-smi -c DEFAULT",
    214: "look at nvidia-smi -q -d ECC: the card may be damaged; use another",
    999: "load the module nvidia-uvm on the machine (nvidia-modprobe -u -c 0), or restart it",
    802: "start the service nvidia-fabricmanager, of the driver's version, on the machine",
    803: "restart the machine, or the container if the machine's driver was updated",
    804: "remove cuda-compat's folder from LD_LIBRARY_PATH: it does not run on this card",
}
_GIVE = "install the driver, or give it to the container (--gpus all, a GPU in the pod's limits, "
_GIVE += "NVIDIA_DRIVER_CAPABILITIES=compute,utility)"


def _why_none(answer: dict[str, Any]) -> tuple[str, str]:
    """Why CUDA shows no GPU, and what to do; both empty where nothing hints at one."""
    code, text = answer["error"] or (NO_DEVICE, "")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if code == MISSING and (place := answer.get("elsewhere")):
        what = f"the driver's libcuda.so.1 is in {place}, where it is not looked for"
        return what, f"set LD_LIBRARY_PATH={place}"
    if code == MISSING:
        there = answer["nodes"]
        return ("a GPU is there, but not its driver's libcuda.so.1", _GIVE) if there else ("", "")
    if code == NO_DEVICE and visible is not None:
        what, named = f"CUDA_VISIBLE_DEVICES={visible!r} shows none", visible.split(",")
        if len(set(named)) < len(named):
            return f"{what}, since it names a GPU twice", "name each once"
        return what, "unset it, or name GPUs that `nvidia-smi -L` lists"
    if code in (NO_DEVICE, 304, 999) and (closed := answer.get("denied")):
        what = f"this user may not open {closed[0]}"
        change = f"add the user to the group that owns {closed[0]} (ls -l shows it), or run as root"
        return what, change
    if code == NO_DEVICE and answer.get("nodes"):
        what = "NVIDIA's driver finds none, though a GPU is there"
        change = "look at nvidia-smi: with MIG on, make an instance (nvidia-smi mig -cgi ID -C)"
        return what, f"{change}, else restart the machine"
    if code == NO_DEVICE:
        return "NVIDIA's driver finds none", _GIVE
    change = "look at the driver with nvidia-smi and dmesg, and restart the machine"
    what = f"CUDA cannot use it: {text}" + (f" (error {code})" if code else "")
    return what, _REMEDIES.get(code, change)


def _free_memory() -> int:
    """Bytes this process may still take: free memory, within its control group's limit."""
    meminfo = dict(
        line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line
    )
    if "MemAvailable" in meminfo:
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
    else:  # not Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        ceiling, taken = _read(limit).strip(), _read(used).strip()
        if ceiling.isdigit() and taken.isdigit():
            free = min(free, max(0, int(ceiling) - int(taken)))
    return free


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
