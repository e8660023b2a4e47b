"""Work that goes on in a thread while a block runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def repeated(step: Callable[[], None], *, pause: float = 0.0) -> Iterator[None]:
    """`step` again and again, `pause` seconds before each, until the block has ended."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(pause):
            step()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
