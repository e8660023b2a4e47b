"""The workqueue: each key once, at one worker at a time, with exponential back-off on failures.

Two lanes: keys that are due at a time, ordered by it, and before them keys added as `first`,
round-robin over groups (namespaces), so that one namespace's many keys do not delay another's. One
key in `_TURNS` is one that has been due for long, so that a namespace whose Workspaces are edited
without a pause stops nobody's progress.
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

_TURNS, _OVERDUE = 8, 5.0  # seconds
MIN_BACKOFF, MAX_BACKOFF = 0.5, 60.0  # seconds


class Queue(Generic[T]):
    """Keys to reconcile, and when. `group_of` is the group that waits for a key; `on_wait` is given
    the seconds between the time when a key was due and its turn."""

    def __init__(
        self,
        group_of: Callable[[T], Hashable] = lambda key: None,
        clock: Callable[[], float] = time.monotonic,
        on_wait: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        self._group_of, self._clock, self._on_wait = group_of, clock, on_wait
        self._due: dict[T, float] = {}
        self._heap: list[tuple[float, int, T]] = []  # may contain outdated entries
        self._first: dict[Hashable, deque[T]] = {}  # group -> its keys; in the order of turns
        # The keys of `_first`, and those added as first while busy; since when.
        self._urgent: dict[T, float] = {}
        self._busy: set[T] = set()
        self._failures: dict[T, int] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._count = self._turn = 0

    def __len__(self) -> int:
        return len(self._due) + len(self._urgent)

    def add(self, key: T, *, after: float = 0.0, first: bool = False) -> None:
        """Reconcile `key` in `after` seconds, or sooner if it is due sooner; `first`: before all
        keys that were not added as first."""
        with self._changed:
            if first:
                self._add_first(key)
            else:
                self._add(key, self._clock() + after)

    def take(self) -> T | None:
        """Wait for the next key that is due; None when the queue is closed.

        The caller must call `done` or `failed` for it.
        """
        with self._changed:
            while not self._closed:
                self._turn = (self._turn + 1) % _TURNS
                key, wait = self._next_due(_OVERDUE) if self._turn == 0 else (None, None)
                if key is None:
                    key = self._next_first()
                if key is None:
                    key, wait = self._next_due()
                if key is not None:
                    self._busy.add(key)
                    return key
                self._changed.wait(wait)
            return None

    def done(self, key: T, *, requeue_after: float | None = None) -> None:
        """`key` was reconciled; `requeue_after`: seconds until the next time, without an event."""
        with self._changed:
            self._failures.pop(key, None)
            due = None if requeue_after is None else self._clock() + requeue_after
            self._release(key, due)

    def failed(self, key: T) -> float:
        """Reconciling `key` failed; returns the seconds until the retry."""
        with self._changed:
            number = self._failures[key] = self._failures.get(key, 0) + 1
            longest = min(MAX_BACKOFF, MIN_BACKOFF * 2.0 ** min(number - 1, 10))
            delay = longest * random.uniform(0.5, 1)  # noqa: S311 jitter, no secret
            self._release(key, self._clock() + delay)
            return delay

    def close(self) -> None:
        """Every `take` returns None from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _release(self, key: T, due: float | None) -> None:
        """Add `key` again if it was added while it was busy, or is due at a time."""
        self._busy.discard(key)
        if key in self._urgent:
            since = self._urgent.pop(key)
            self._add_first(key)
            self._urgent[key] = since
        waiting = self._due.pop(key, None)
        for each in (waiting, due):
            if each is not None:
                self._add(key, each)

    def _add_first(self, key: T) -> None:
        if key in self._urgent:
            return
        self._urgent[key] = self._clock()
        if key not in self._busy:
            self._first.setdefault(self._group_of(key), deque()).append(key)
            self._changed.notify()

    def _next_first(self) -> T | None:
        """A key of the group whose turn it is; the group moves to the end."""
        for group, keys in self._first.items():
            key = keys.popleft()
            del self._first[group]
            if keys:
                self._first[group] = keys
            since = self._urgent.pop(key)
            self._due.pop(key, None)
            self._on_wait(self._clock() - since)
            return key
        return None

    def _next_due(self, since: float = 0.0) -> tuple[T | None, float | None]:
        """(the key that has been due for `since` seconds, None), or (None, seconds until then)."""
        while self._heap:
            due, _, key = self._heap[0]
            if self._due.get(key) != due or key in self._busy or key in self._urgent:
                # outdated, or added by `_release`, or in the other lane
                heapq.heappop(self._heap)
                continue
            wait = due + since - self._clock()
            if wait > 0:
                return None, wait
            heapq.heappop(self._heap)
            del self._due[key]
            self._on_wait(self._clock() - due)
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
