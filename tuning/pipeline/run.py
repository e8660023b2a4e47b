"""A run under way: what every phase of it needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuning import files, process, threads
from tuning.console import Console
from tuning.pipeline import endings, journal
from tuning.pipeline.options import Options, read_token
from tuning.plan import device
from tuning.spec import Spec

Value = dict[str, Any]
TRAIN = "training.train"  # the module of the training child
LAST_SECONDS = 5.0  # of the grace period, for the parent's own last words


@dataclass
class Run:
    """One spec, lived in one run directory by one process."""

    spec: Spec
    options: Options
    console: Console
    book: journal.Journal
    stop: threading.Event
    phase: str = "start"
    ahead: process.Ahead | None = None  # the training child, while it only loads its libraries

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.options.run_dir

    def begin(self, phase: str, title: str = "") -> None:
        """Enter a phase; a stop that was asked for since the last one takes effect here."""
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
        ranks: int = 1,
    ) -> Value:
        """The answer of a child process; its request, answer and output are kept in `log/`."""
        logs = self.folder / "log"
        logs.mkdir(exist_ok=True)
        output = logs / f"{self.phase}.log"
        try:
            return process.run(
                room,
                logs / f"{self.phase}.json",
                request,
                log=output,
                keep_open=(self.book.lock,),
                stop_asked=self.stop.is_set,
                tick=tick,
                grace=max(1.0, self.options.grace - LAST_SECONDS),
                ahead=self.ahead if room == TRAIN else None,
                ranks=ranks,
            )
        except process.Hung as hung:
            raise endings.hang(hung, self.phase, output) from None
        except process.ChildDied as died:
            if self.stop.is_set():
                raise endings.stopped(self.phase) from None
            raise endings.death(died, self.phase, output) from None

    def training_ahead(self) -> AbstractContextManager[process.Ahead | None]:
        """A training child that loads its libraries meanwhile, where there is training to do."""
        if (self.folder / "adapter").exists():
            return nullcontext()
        logs = self.folder / "log"
        logs.mkdir(exist_ok=True)
        return process.Ahead(TRAIN, log=logs / "train.log", keep_open=(self.book.lock,))

    def unless_stopped(self, work: Callable[[], Value]) -> Value:
        """What blocking `work` gives, or Stopped soon after a signal, whatever it waits for."""
        (done,) = threads.side_by_side([work], at_once=1, stop=self.stop.is_set)
        if isinstance(done, InterruptedError):
            raise endings.stopped(self.phase)
        if isinstance(done, BaseException):
            raise done
        return done

    def room(self, need: int) -> None:
        """Refuse to begin what the disk is known to be too small for."""
        instead = "name a larger disk with --run-dir"
        files.require_space(self.folder, need, code="RUN-121", where=self.phase, instead=instead)

    def device(self) -> device.Device:
        """What is here to train on: as many GPUs as asked for, or processes on the CPU."""
        found, ranks = device.detect(), self.options.ranks
        if ranks is None or (found.kind == "cuda" and ranks >= found.count):
            return found
        return replace(found, count=ranks)

    def token(self) -> str | None:
        """The hub token, read anew each time: a Secret may be rotated."""
        return read_token(self.options.hub_token_file)

    def own(self) -> tuple[str, ...]:
        """Digests of images, and of adapters' weights, that this run directory made before."""
        images = (value["digest"] for value in self.book.values("package"))
        weights = (value.get("adapter_sha256", "") for value in self.book.values("train"))
        return (*images, *weights)

    def dim(self, notes: Iterable[str]) -> None:
        """Say what is worth knowing and asks for nothing."""
        for note in notes:
            self.console.say(f"  {note}", style="dim")


def key_of(*parts: Any) -> str:
    """A short hash of plain values; paths count as their text."""
    return files.digest(files.canonical(_plain(parts)))[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
