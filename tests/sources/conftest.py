"""A hub on loopback for the tests of this room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_hub import FakeHub
from huggingface_hub import constants


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub that HF_ENDPOINT names."""
    with FakeHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # as tests of models set it
        yield server
