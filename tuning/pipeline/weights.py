"""The base's weights, on their way while the data is read.

What data is wrong is known in seconds from the tokenizer alone; nobody should wait for sixteen
gigabytes to hear it, nor wait for the data before the sixteen gigabytes come.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tuning.pipeline import endings
from tuning.pipeline.run import Run
from tuning.sources import base


class Coming:
    """Weights that are being fetched by a thread."""

    def __init__(self, run: Run, model: base.Base, tokenizer: Path) -> None:
        self.tokenizer = tokenizer  # a folder with all but the weights
        self._run, self._model = run, model
        self._said: tuple[float, float | None, str] = (0, None, "")
        self._abandoned = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._folder: Future[Path] = self._pool.submit(self._fetch)

    def _fetch(self) -> Path:
        def note(done: float, total: float | None, what: str) -> None:
            self._said = (done, total, what)

        return base.fetch(
            self._model,
            cache=self._run.options.cache,
            token=self._run.token(),
            progress=note,
            stop=lambda: self._run.stop.is_set() or self._abandoned.is_set(),
        )

    def folder(self) -> Path:
        """The folder of the verified base, once it is complete. Raises as base.fetch does."""
        self._run.begin("weights")
        if not self._folder.done():
            with self._run.console.work(f"Fetching {self._model.name}", unit="bytes") as report:
                while not self._folder.done() and not self._run.stop.wait(0.1):
                    report(*self._said)
        if self._run.stop.is_set():
            raise endings.stopped(self._run.phase)
        return self._folder.result()

    def close(self) -> None:
        """Leave a download that nobody waits for any more; what came of it is kept."""
        self._abandoned.set()
        self._pool.shutdown()


@contextmanager
def coming(run: Run, model: base.Base) -> Iterator[Coming]:
    """Fetch tokenizer and configs, then the weights for as long as the block runs."""
    run.begin("tokenizer")
    cache = run.options.cache
    base.check_room(model, cache)
    tokenizer = base.fetch_tokenizer(model, cache=cache, token=run.token(), stop=run.stop.is_set)
    weights = Coming(run, model, tokenizer)
    try:
        yield weights
    finally:
        weights.close()
