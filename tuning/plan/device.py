"""What there is to compute with: the GPUs of this machine, or its processor and memory.

Asks `nvidia-smi`, not torch, so that planning stays light. Memory is what is actually free now, and
on a CPU never more than the control group allows.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuning.presets import Gpu

FIELDS = "name,memory.total,memory.free,compute_cap"
MIB = 1 << 20


@dataclass(frozen=True)
class Device:
    """The GPUs of one kind in one machine, or one CPU."""

    kind: Literal["cuda", "cpu"]
    name: str
    count: int  # GPUs; 1 for a CPU
    memory_bytes: int  # free, for each GPU; for a CPU, memory this process may still take
    bf16: bool  # native bfloat16 arithmetic
    capability: tuple[int, int] | None = None
    origin: str = "found on this machine"
    gpu: Gpu | None = None  # its row in the table of GPUs, where it comes from there

    def __str__(self) -> str:
        size = f"{self.memory_bytes / 2**30:.1f} GiB free"
        many = f"{self.count} x " if self.count > 1 else ""
        return f"{many}{self.name} ({size}; {self.origin})"


def detect() -> Device:
    """The GPUs here, else the CPU. GPUs of several kinds count as the weakest, and as many."""
    return _gpus() or cpu()


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


def _gpus() -> Device | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        answer = subprocess.run(
            [program, f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_gpus(answer, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(table: str, *, visible: str | None = None) -> Device | None:
    """The answer of `nvidia-smi --query-gpu=FIELDS --format=csv,noheader,nounits` as a device.

    `visible` is CUDA_VISIBLE_DEVICES: as many GPUs as it names, none where it is empty or -1.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line]
    rows = [row for row in rows if len(row) == 4 and row[1].isdigit() and "." in row[3]]
    if visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        if "-1" in names:
            names = names[: names.index("-1")]
        chosen = [rows[int(n)] for n in names if n.isdigit() and int(n) < len(rows)]
        rows = chosen if all(n.isdigit() for n in names) else rows[: len(names)]
    if not rows:
        return None
    major, minor = min(tuple(int(part) for part in row[3].split(".")) for row in rows)
    return Device(
        kind="cuda",
        name=" + ".join(sorted({row[0] for row in rows})),
        count=len(rows),
        memory_bytes=min(int(row[2] if row[2].isdigit() else row[1]) for row in rows) * MIB,
        bf16=major >= 8,
        capability=(major, minor),
    )


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
