"""A run in progress: what each of its phases needs."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tuning import files, process, threads
from tuning.console import Console
from tuning.pipeline import endings, memory_kills, outcome
from tuning.pipeline.journal import Journal
from tuning.pipeline.options import Options
from tuning.plan import device
from tuning.sources.hub import read_token
from tuning.sources.hub_dataset import Pinned
from tuning.spec import Spec
from tuning.spec.writer import plain

Value = dict[str, Any]
TRAIN = "training.train"  # the module of the training child
PARENT_SECONDS = 5.0  # of the grace period, for the parent's own shutdown


@dataclass(frozen=True)
class Start:
    """A fetched adapter to go on from."""

    folder: Path
    sha256: str  # of its weights


@dataclass
class Run:
    """One spec, executed in one run directory by one process."""

    spec: Spec
    options: Options
    console: Console
    journal: Journal
    stop: threading.Event
    phase: str = "start"
    prewarmed: process.Prewarmed | None = None  # the training child, while it loads its libraries
    steps: outcome.Follower | None = None  # what the caller's on_step has got
    raised: Exception | None = None  # by that on_step, which stops the run
    start: Start | None = None  # the adapter to go on from
    datasets: tuple[Pinned, ...] = ()  # of the hub, among the data
    found: device.Device | None = None  # on this machine

    def __post_init__(self) -> None:
        destination, own = self.spec.destination, self.folder.absolute() / "image"
        if destination.layout and destination.layout.absolute() == own:
            here = replace(destination, layout=None)  # nothing to deliver: it is made there
            self.spec = replace(self.spec, destination=here)
        elif not destination.named:
            document = copy.deepcopy(self.spec.document)
            document["tuning"]["output"]["image"] = f"oci:{own}"
            self.spec = replace(self.spec, document=document)

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.options.run_dir

    def begin(self, phase: str, title: str = "") -> None:
        """Enter a phase; raises Stopped if a signal came since the last one."""
        if self.stop.is_set():
            raise endings.stopped(self.phase)
        self.phase = phase
        if title:
            self.console.say(title)

    def child(
        self,
        room: str,
        request: Value,
        *,
        tick: Callable[[], None] = lambda: None,
        group: process.Group | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Value:
        """The result of a child process; request, result and output are kept in `log/`."""
        logs = self.folder / "log"
        logs.mkdir(exist_ok=True)
        output = logs / f"{self.phase}.log"
        kills = memory_kills.count()
        try:
            return process.run(
                room,
                logs / f"{self.phase}.json",
                request,
                log=output,
                keep_open=(self.journal.lock,),
                stop_asked=self.stop.is_set,
                tick=tick,
                grace=max(1.0, self.options.grace - PARENT_SECONDS),
                prewarmed=self.prewarmed if room == TRAIN else None,
                environment=self._allocator() if room == TRAIN else environment,
                group=group,
            )
        except process.Apart as apart:
            raise endings.apart(apart, self.phase) from None
        except process.Hung as hung:
            raise endings.hang(hung, self.phase, output) from None
        except process.ChildDied as died:
            if self.stop.is_set():
                raise endings.stopped(self.phase) from None
            for_memory = memory_kills.count() > kills
            raise endings.death(died, self.phase, output, for_memory=for_memory) from None

    def prewarm_training(self) -> AbstractContextManager[process.Prewarmed | None]:
        """A training child that loads its libraries, unless the adapter exists already."""
        if (self.folder / "adapter").exists():
            return nullcontext()
        logs = self.folder / "log"
        logs.mkdir(exist_ok=True)
        return process.Prewarmed(
            TRAIN,
            log=logs / "train.log",
            keep_open=(self.journal.lock,),
            environment=self._allocator(),
        )

    def _allocator(self) -> dict[str, str]:
        """Plain segments of GPU memory where growing ones fail: vGPU, WSL."""
        if process.ALLOCATOR in os.environ or self.device().virtual_memory:
            return {}
        return {process.ALLOCATOR: "expandable_segments:False"}

    def interruptible(self, work: Callable[[], Value]) -> Value:
        """The result of blocking `work`; raises Stopped soon after a signal."""
        (result,) = threads.side_by_side([work], at_once=1, stop=self.stop.is_set)
        if isinstance(result, InterruptedError):
            raise endings.stopped(self.phase)
        if isinstance(result, BaseException):
            raise result
        return result

    def require_space(self, need: int) -> None:
        """Raise SpecError if the disk has fewer than `need` bytes free."""
        instead = "name a larger disk with --run-dir"
        files.require_space(self.folder, need, code="RUN-121", where=self.phase, instead=instead)

    def device(self, *, again: bool = False) -> device.Device:
        """The device to train on, with as many GPUs (or processes on the CPU) as --ranks says.

        The driver is asked once, and `again` for the memory that is free by then.
        """
        ranks, nodes = self.options.ranks, self.options.machines.nodes
        found = self.found
        if found is None or (again and found.kind == "cuda"):
            found = device.detect(
                ranks, waits=lambda: self.console.say("Waiting for the GPU's driver ...")
            )
        elif found.kind == "cpu":
            found = replace(found, memory_bytes=device.cpu().memory_bytes)
        self.found = found
        here = replace(found, nodes=nodes)
        return here if ranks is None or here.kind == "cuda" else replace(here, count=ranks)

    def group(self, ranks: int, nodes: int) -> process.Group:
        """`ranks` processes on each of `nodes` machines."""
        of = self.options.machines
        if nodes == 1:
            return process.Group(ranks)
        return process.Group(ranks, nodes, of.node, of.meet)

    def token(self) -> str | None:
        """The hub token, read each time since a Secret may be rotated."""
        return read_token(self.options.access.hub_token_file)

    def own_digests(self) -> tuple[str, ...]:
        """Digests of the images and adapter weights that this run directory has made."""
        images = (value["digest"] for value in self.journal.values("package"))
        weights = (value.get("adapter_sha256", "") for value in self.journal.values("train"))
        return (*images, *weights)

    def note(self, notes: Iterable[str]) -> None:
        """Print `notes`, dimmed, and record each once for the report."""
        for note in notes:
            self.console.say(f"  {note}", style="dim")
            told = any((r["event"], r.get("text")) == ("note", note) for r in self.journal.records)
            with suppress(OSError):  # a full disk fails where a result is lost
                if not told:
                    self.journal.append(self.phase, "note", text=note)


def key_of(*parts: Any) -> str:
    """A short hash of plain values; paths count as their text."""
    return files.digest(files.canonical(plain(parts)))[:16]
