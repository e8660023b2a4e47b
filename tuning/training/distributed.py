"""The ranks of one training: processes that train the same weights on different rows.

One process is the usual case, and everything here is then free. Several are started together by
`training.launch`, one a GPU, or on a CPU with gloo. They meet at the launcher's store, and agree on
what all must do alike: to stop, to save, to go on from. What is agreed on is numbers and JSON;
nothing is pickled.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tuning.models.shards import Split
from tuning.plan import Placement
from tuning.process import NODE

PIECE = 1 << 24  # bytes that are sent at once
PATIENCE = datetime.timedelta(minutes=60)  # a rank that loads weights or saves is waited for


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    number: int = 0
    count: int = 1
    group: Any = field(default=None, repr=False)  # over gloo, so that agreeing waits for no GPU

    @property
    def first(self) -> bool:
        """Whether this one writes, logs and answers."""
        return self.number == 0

    def sum(self, *values: float) -> list[float]:
        """Each of `values`, added up over all ranks. All of them must call it."""
        if self.count == 1:
            return list(values)
        made = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(made, group=self.group)
        return [float(value) for value in made]

    def any(self, here: bool) -> bool:
        """Whether it is true on any rank. All of them must ask."""
        return self.sum(float(here))[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every rank, in their order. All of them must call it."""
        if self.count == 1:
            return [value]
        data = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self.group)
        longest = max(int(size) for size in sizes)
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.count)]
        dist.all_gather(parts, mine, group=self.group)
        texts = [part[: int(n)].numpy().tobytes() for part, n in zip(parts, sizes, strict=True)]
        return [json.loads(text) for text in texts]

    def split(self, placement: Placement) -> Split | None:
        """How the ranks share copies of the model; None if each has its own."""
        if placement.shards == 1:
            return None
        sizes: tuple[int, ...] = (placement.shards,)
        if self.count > placement.shards:
            sizes = (self.count // placement.shards, placement.shards)
        names = ("replicas", "shards")[-len(sizes) :]
        mesh = init_device_mesh(placement.device, sizes, mesh_dim_names=names)
        return Split(mesh, placement.offload)

    @property
    def machines(self) -> int:
        """How many machines the ranks are on."""
        return self.count // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    @property
    def machine(self) -> int:
        """The number of this rank's machine; 0 holds the run directory."""
        return int(os.environ.get(NODE, "0"))

    def spread(self, source: Path, target: Path) -> Path:
        """Copy the file or folder `source` of machine 0 to `target` on the others.

        All ranks must call it. Returns where it is on this one: `source` or `target`.
        """
        found = sorted(path for path in source.rglob("*") if path.is_file()) or [source]
        listed = (
            [(str(path.relative_to(source)), path.stat().st_size) for path in found]
            if (self.first)
            else None
        )
        writes = self.machine > 0 and os.environ["LOCAL_RANK"] == "0"
        for name, size in self.from_first(listed):
            with ExitStack() as stack:
                if self.first:
                    read = stack.enter_context((source / name).open("rb"))
                elif writes:
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    written = stack.enter_context((target / name).open("wb"))
                for start in range(0, size, PIECE):
                    piece = torch.zeros(min(PIECE, size - start), dtype=torch.uint8)
                    if self.first:
                        piece = torch.frombuffer(bytearray(read.read(PIECE)), dtype=torch.uint8)
                    dist.broadcast(piece, 0, group=self.group)
                    if writes:
                        written.write(piece.numpy())
        self.sum(0.0)  # all is written
        return target if self.machine else source

    def from_first(self, value: Any) -> Any:
        """The first rank's JSON value. All of them must call it."""
        return self.gather(value if self.first else None)[0]


def join(device: str) -> Ranks:
    """Become the rank that the environment names, and meet the others.

    A single rank meets nobody; its parent shows it one GPU only.
    """
    count, number = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if count == 1:
        return Ranks()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",  # gloo for what lies in host memory
        init_method="env://",
        rank=number,
        world_size=count,
        timeout=PATIENCE,
    )
    group = dist.new_group(backend="gloo", timeout=PATIENCE) if device == "cuda" else None
    return Ranks(number, count, group)


def is_lost(error: BaseException) -> bool:
    """Whether `error` says that a rank of another machine is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None
    )


_GONE = re.compile(r"gloo|NCCL|[Cc]onnection (?:closed|reset|refused)|Broken pipe|TCPStore")


def leave(ranks: Ranks) -> None:
    """Part from the others, once all have come to this point."""
    if ranks.count > 1 and dist.is_initialized():
        ranks.sum(0.0)
        dist.destroy_process_group()
