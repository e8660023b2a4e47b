"""A queue of keys: no key twice, none at two workers at once, failures later and later."""

from __future__ import annotations

import heapq
import math
import random
import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

FIRST, LONGEST = 0.5, 60.0  # seconds of back-off after a failure
_FIRST_OF_ALL = -math.inf


class Queue(Generic[T]):
    """What is to be looked at, and when."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due: dict[T, float] = {}
        self._heap: list[tuple[float, int, T]] = []  # may hold outdated entries
        self._busy: set[T] = set()
        self._failures: dict[T, int] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._count = 0

    def __len__(self) -> int:
        return len(self._due)

    def add(self, key: T, *, after: float = 0.0, first: bool = False) -> None:
        """Look at `key` in `after` seconds, or sooner if it is due sooner; `first`: before all that
        is due already and was not added so."""
        with self._changed:
            self._add(key, _FIRST_OF_ALL if first else self._clock() + after)

    def take(self) -> T | None:
        """The next key that is due, waiting for it; None when the queue is closed.

        The caller owes a `done` or `failed` for it.
        """
        with self._changed:
            while not self._closed:
                wait = None
                while self._heap:
                    due, _, key = self._heap[0]
                    if self._due.get(key) != due:  # outdated
                        heapq.heappop(self._heap)
                        continue
                    wait = due - self._clock()
                    if wait > 0:
                        break
                    heapq.heappop(self._heap)
                    del self._due[key]
                    if key in self._busy:  # its worker puts it back
                        self._due[key] = due
                        wait = None
                        continue
                    self._busy.add(key)
                    return key
                self._changed.wait(wait)
            return None

    def done(self, key: T, *, again: float | None = None) -> None:
        """`key` was looked at; `again` is when to look next, if no event comes before."""
        with self._changed:
            self._failures.pop(key, None)
            self._release(key, None if again is None else self._clock() + again)

    def failed(self, key: T) -> float:
        """Looking at `key` failed; gives the seconds until the next try."""
        with self._changed:
            number = self._failures[key] = self._failures.get(key, 0) + 1
            full = min(LONGEST, FIRST * 2.0 ** min(number - 1, 10))
            delay = full * random.uniform(0.5, 1)  # noqa: S311 jitter, no secret
            self._release(key, self._clock() + delay)
            return delay

    def close(self) -> None:
        """Every `take` answers None from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _release(self, key: T, due: float | None) -> None:
        self._busy.discard(key)
        waiting = self._due.pop(key, None)  # told of while it was busy
        for each in (waiting, due):
            if each is not None:
                self._add(key, each)

    def _add(self, key: T, due: float) -> None:
        known = self._due.get(key)
        if known is not None and known <= due:
            return
        self._due[key] = due
        if key not in self._busy:
            self._count += 1
            heapq.heappush(self._heap, (due, self._count, key))
            self._changed.notify()
