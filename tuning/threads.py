"""Blocking calls in daemon threads, which a stopped run does not wait for."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
STOP_SECONDS = 2.0  # that each thread gets to save its state after a stop


def side_by_side(
    jobs: Sequence[Callable[[], T]], *, at_once: int, stop: Callable[[], bool] = lambda: False
) -> list[T | BaseException]:
    """Run `jobs`, `at_once` at a time; the result or exception of each, in the order of `jobs`.

    When `stop` turns true this returns soon: jobs should poll the same `stop`, one that hangs on a
    silent socket is left behind with an InterruptedError as its result.
    """
    results: list[T | BaseException] = [InterruptedError() for _ in jobs]
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(jobs)):
        waiting.put(index)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                index = waiting.get_nowait()
                try:
                    results[index] = jobs[index]()
                except BaseException as error:
                    results[index] = error

    # Daemons, since the interpreter waits for all other threads before it ends.
    workers = [
        threading.Thread(target=work, name=f"side-by-side-{n}", daemon=True)
        for n in range(min(at_once, len(jobs)))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        while worker.is_alive() and not stop():
            worker.join(0.05)
        worker.join(STOP_SECONDS)
    return list(results)
