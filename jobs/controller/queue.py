"""A queue of keys: no key twice, none at two workers at once, failures later and later.

Two lanes: what is due at a time, in the order of those times, and before it what is wanted `first`,
with every group (a namespace) in its turn, so that nobody waits for another one's flood.
"""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

FIRST, LONGEST = 0.5, 60.0  # seconds of back-off after a failure


class Queue(Generic[T]):
    """What is to be looked at, and when. `group_of` says who waits for a key."""

    def __init__(
        self,
        group_of: Callable[[T], Hashable] = lambda key: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._group_of, self._clock = group_of, clock
        self._due: dict[T, float] = {}
        self._heap: list[tuple[float, int, T]] = []  # may hold outdated entries
        self._first: dict[Hashable, deque[T]] = {}  # group -> its keys; the next group comes first
        self._urgent: set[T] = set()  # all of those, and urgent ones that are busy
        self._busy: set[T] = set()
        self._failures: dict[T, int] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._count = 0

    def __len__(self) -> int:
        return len(self._due) + len(self._urgent)

    def add(self, key: T, *, after: float = 0.0, first: bool = False) -> None:
        """Look at `key` in `after` seconds, or sooner if it is due sooner; `first`: before all that
        was not added so."""
        with self._changed:
            if first:
                self._add_first(key)
            else:
                self._add(key, self._clock() + after)

    def take(self) -> T | None:
        """The next key that is due, waiting for it; None when the queue is closed.

        The caller owes a `done` or `failed` for it.
        """
        with self._changed:
            while not self._closed:
                key = self._next_first()
                key, wait = (key, 0.0) if key is not None else self._next_due()
                if key is not None:
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
        """Put back what was told of `key` while it was busy, and when it is to be looked at."""
        self._busy.discard(key)
        if key in self._urgent:
            self._urgent.discard(key)
            self._add_first(key)
        waiting = self._due.pop(key, None)
        for each in (waiting, due):
            if each is not None:
                self._add(key, each)

    def _add_first(self, key: T) -> None:
        if key in self._urgent:
            return
        self._urgent.add(key)
        if key not in self._busy:
            self._first.setdefault(self._group_of(key), deque()).append(key)
            self._changed.notify()

    def _next_first(self) -> T | None:
        """A key of the group whose turn it is; that group goes to the end of the line."""
        for group, keys in self._first.items():
            key = keys.popleft()
            del self._first[group]
            if keys:
                self._first[group] = keys
            self._urgent.discard(key)
            self._due.pop(key, None)
            return key
        return None

    def _next_due(self) -> tuple[T | None, float | None]:
        """(the key whose time has come, None), or (None, seconds until there is one)."""
        while self._heap:
            due, _, key = self._heap[0]
            if self._due.get(key) != due or key in self._busy:  # outdated, or its worker's to add
                heapq.heappop(self._heap)
                continue
            wait = due - self._clock()
            if wait > 0:
                return None, wait
            heapq.heappop(self._heap)
            del self._due[key]
            return key, None
        return None, None

    def _add(self, key: T, due: float) -> None:
        known = self._due.get(key)
        if known is not None and known <= due:
            return
        self._due[key] = due
        if key not in self._busy:
            self._count += 1
            heapq.heappush(self._heap, (due, self._count, key))
            self._changed.notify()
