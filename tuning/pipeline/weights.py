"""The base model's weights, downloaded in the background while the data is read.

Checking the data needs only the tokenizer, so neither waits for the other.
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


class PendingDownload:
    """Weights that a thread is downloading."""

    def __init__(self, run: Run, model: base.Base, tokenizer: Path) -> None:
        self.tokenizer = tokenizer  # a folder with all but the weights
        self._run, self._model = run, model
        self._progress: tuple[float, float | None, str] = (0, None, "")
        self._abandoned = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._folder: Future[Path] = self._pool.submit(self._fetch)

    def _fetch(self) -> Path:
        def report(done: float, total: float | None, note: str) -> None:
            self._progress = (done, total, note)

        return base.fetch(
            self._model,
            cache=self._run.options.cache,
            token=self._run.token(),
            progress=report,
            stop=lambda: self._run.stop.is_set() or self._abandoned.is_set(),
        )

    def folder(self) -> Path:
        """Wait for the download; the folder of the verified base. Raises as base.fetch does."""
        self._run.begin("weights")
        if not self._folder.done():
            with self._run.console.work(f"Fetching {self._model.name}", unit="bytes") as report:
                while not self._folder.done() and not self._run.stop.wait(0.1):
                    report(*self._progress)
        if self._run.stop.is_set():
            raise endings.stopped(self._run.phase)
        return self._folder.result()

    def close(self) -> None:
        """Abandon the download if it still runs; the part on disk is kept for the next run."""
        self._abandoned.set()
        self._pool.shutdown()


@contextmanager
def background_download(run: Run, model: base.Base) -> Iterator[PendingDownload]:
    """Fetch tokenizer and configs, then the weights in the background while the block runs."""
    run.begin("tokenizer")
    cache = run.options.cache
    base.check_room(model, cache)
    tokenizer = base.fetch_tokenizer(model, cache=cache, token=run.token(), stop=run.stop.is_set)
    download = PendingDownload(run, model, tokenizer)
    try:
        yield download
    finally:
        download.close()
