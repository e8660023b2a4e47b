"""A hub on loopback for the tests of this room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_hub import FakeHub


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub that HF_ENDPOINT names."""
    with FakeHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
