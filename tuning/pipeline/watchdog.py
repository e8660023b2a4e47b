"""Detects a hung child by the time since it last wrote something.

Pure: it is given observations and their times, in seconds of a monotonic clock.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

REMEMBERED = 50  # steps


@dataclass
class Watchdog:
    """Allows silence for `factor` median steps, at least `floor`; `start` until a step is done."""

    start: float = 3600.0  # a large base may come from a slow disk
    floor: float = 600.0
    factor: float = 20.0
    _state: object = None
    _changed_at: float | None = None
    _step: int | None = None
    _stepping: bool = False  # this process has done a step
    _stepped_at: float = 0.0
    _step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def observe(self, state: object, *, step: int | None, now: float) -> None:
        """Record the child's state, any value that changes as it works, and its step."""
        first = self._changed_at is None
        if first or state != self._state:
            self._state, self._changed_at = state, now
        if step is not None and step != self._step:
            if self._stepping and self._step is not None and step > self._step:
                self._step_seconds.append((now - self._stepped_at) / (step - self._step))
            # the first step seen may be an earlier process's, and a resumed one starts lower
            self._stepping = self._stepping or (not first and step > (self._step or 0))
            self._step, self._stepped_at = step, now

    @property
    def patience(self) -> float:
        """Seconds without a change that are allowed now."""
        if not self._stepping:
            return self.start
        step = statistics.median(self._step_seconds) if self._step_seconds else 0.0
        return max(self.floor, self.factor * step)

    def silence(self, now: float) -> float | None:
        """Seconds since the last change if they exceed the patience, else None."""
        if self._changed_at is None or now - self._changed_at <= self.patience:
            return None
        return now - self._changed_at
