"""Retries: which failures deserve another try, after how long, and how often.

One policy for data hosts, registries, token services and the hub: exponential backoff with full
jitter, and what a server asks for by Retry-After.
"""

from __future__ import annotations

import email.utils
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from tuning.errors import Problem, TransientError, TuningError

log = logging.getLogger(__name__)

Result = TypeVar("Result")
RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_RETRY_AFTER = 120.0  # seconds


@dataclass(frozen=True)
class Patience:
    """How long, in seconds, and how often a failing operation is tried again."""

    total: float = 900.0  # of failures in a row
    first: float = 1.0  # upper bound of the first wait; it doubles
    longest: float = 60.0  # upper bound of any wait that the server does not ask for
    tries: int | None = None  # in a row
    sleep: Callable[[float], None] = time.sleep


class Again(Exception):
    """A failure that another try may mend.

    `after`: seconds that the server asks to wait. `tries`: how often this kind of failure may occur
    in a row, if less often than others. `final`: what it becomes when patience is over.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        after: float | None = None,
        tries: int | None = None,
        final: type[TuningError] = TransientError,
    ) -> None:
        self.problem, self.after, self.tries, self.final = problem, after, tries, final
        super().__init__(str(problem))


class Attempts:
    """The failures in a row of one operation."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.reset()

    def reset(self) -> None:
        """Forget earlier failures: the operation got further than ever."""
        self._since: float | None = None
        self._told = ""
        self._failures: Counter[tuple[str, int | None]] = Counter()

    def wait(self, again: Again, *, give_up: bool = False) -> None:
        """Sleep before the next try. Raises `again.final` instead, once patience is over."""
        patience, now, kind = self.patience, time.monotonic(), (again.problem.code, again.tries)
        self._since = now if self._since is None else self._since
        count = self._failures.total()
        self._failures[kind] += 1
        if again.after is None:
            pause = random.uniform(0, min(patience.longest, patience.first * 2**count))  # noqa: S311
        else:
            pause = min(again.after, LONGEST_RETRY_AFTER)
        give_up |= now - self._since + pause > patience.total
        give_up |= count + 1 >= (patience.tries or math.inf)
        if give_up or self._failures[kind] >= (again.tries or math.inf):
            raise again.final([again.problem]) from None
        told, self._told = self._told, str(again.problem)
        same = told == self._told
        log.warning("%s Trying again in %.1f s.", "The same." if same else self._told, pause)
        patience.sleep(pause)


def persist(
    work: Callable[[], Result], patience: Patience, *, unless: Callable[[], bool] = lambda: False
) -> Result:
    """`work`, done again while it raises Again; it must be safe to repeat from its start.

    Raises TransientError when patience is over, or once `unless` is true.
    """
    attempts = Attempts(patience)
    while True:
        try:
            return work()
        except Again as again:
            attempts.wait(again, give_up=unless())


def is_retryable(status: int) -> bool:
    """Whether an HTTP status may pass; CDNs have their own above 507."""
    return status in RETRYABLE or status > 507


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, given as a number or as a date."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
