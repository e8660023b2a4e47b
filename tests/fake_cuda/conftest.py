"""The process with the fake CUDA device; without a compiler its tests are skipped, aloud."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_cuda.device import Unavailable, library
from fake_cuda.worker import Worker


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    """Calls functions of this folder in a process that has the device."""
    try:
        library()
    except Unavailable as reason:
        pytest.skip(str(reason))
    running = Worker()
    yield running
    running.close()
