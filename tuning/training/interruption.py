"""SIGTERM and SIGINT of a training rank."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tuning.errors import Stopped
from tuning.training.distributed import Ranks


class Interruption:
    """Stops at once, or at the next safe point while there is state to save."""

    def __init__(self) -> None:
        self.requested = False
        self.deferred = False
        self._handlers_before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers_before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if not again and not self.deferred:
            self.check()

    def on_any(self, ranks: Ranks) -> bool:
        """Whether a signal came to this rank or another. All ranks must call it."""
        self.requested = ranks.any(self.requested)
        return self.requested

    def check(self) -> None:
        """Raise Stopped if a signal came."""
        if self.requested:
            fact = "stopped by a signal; finished steps are saved"
            raise Stopped.at("RUN-130", "training", fact, "run the same command again to go on")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Defer signals inside, and raise Stopped for them at the end."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False
        self.check()
