"""What tests of whole trainings share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tuning.training import trainer


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """`signal_at(step, batch)`: this process gets SIGTERM before that micro-batch, once."""
    original = trainer.Exact.training_step
    aim = [-1, -1]
    seen = {"step": -1, "batch": 0}

    def step(self: trainer.Exact, *args: Any, **kwargs: Any) -> Any:
        if seen["step"] != self.state.global_step:
            seen.update(step=self.state.global_step, batch=0)
        if [seen["step"], seen["batch"]] == aim:
            aim[:] = [-1, -1]
            os.kill(os.getpid(), signal.SIGTERM)
        seen["batch"] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer.Exact, "training_step", step)

    def put(at_step: int, batch: int) -> None:
        aim[:] = [at_step, batch]

    yield put
