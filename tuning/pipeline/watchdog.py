"""Is a child still getting on? What it writes tells; silence for too long means that it hangs.

Pure: told what was seen and when, it judges. Times are seconds of a clock that never goes back.
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
    _sign: object = None
    _heard: float | None = None
    _step: int | None = None
    _going: bool = False
    _stepped: float = 0.0
    _paces: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def hear(self, sign: object, *, step: int | None, now: float) -> None:
        """Take note of a sign of life, any value that changes as work goes on, and of the step."""
        fresh = self._heard is None
        if self._heard is None or sign != self._sign:
            self._sign, self._heard = sign, now
        if step is not None and step != self._step:
            if self._going and self._step is not None and step > self._step:
                self._paces.append((now - self._stepped) / (step - self._step))
            # the first thing heard may be of an earlier process, and a resumed one goes back
            self._going = self._going or (not fresh and step > (self._step or 0))
            self._step, self._stepped = step, now

    @property
    def patience(self) -> float:
        """How long a silence is borne now."""
        if not self._going:
            return self.start
        pace = statistics.median(self._paces) if self._paces else 0.0
        return max(self.floor, self.factor * pace)

    def silence(self, now: float) -> float | None:
        """For how long nothing has been heard, if that is too long; else None."""
        if self._heard is None or now - self._heard <= self.patience:
            return None
        return now - self._heard
