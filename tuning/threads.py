"""A few pieces of blocking work side by side, which a stopped run does not wait for."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
LAST_WORDS = 2.0  # seconds that each thread gets to save its state when a run is stopped


def side_by_side(
    jobs: Sequence[Callable[[], T]], *, at_once: int, stop: Callable[[], bool] = lambda: False
) -> list[T | BaseException]:
    """What each job returns or raises, in the order of `jobs`.

    When `stop` turns true this returns soon, whatever the jobs do: they are expected to look at the
    same thing, and one that hangs on a silent socket is left to the end of the process (its result
    is then an InterruptedError).
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

    # Daemons, because the interpreter waits for all others before it ends.
    workers = [
        threading.Thread(target=work, name=f"side-by-side-{n}", daemon=True)
        for n in range(min(at_once, len(jobs)))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        while worker.is_alive() and not stop():
            worker.join(0.05)
        worker.join(LAST_WORDS)
    return list(results)
