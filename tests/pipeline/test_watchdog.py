"""How long a child may go without a change depends on its median step."""

from __future__ import annotations

import pytest

from tuning.pipeline.watchdog import Watchdog


def fed(dog: Watchdog, *steps: tuple[float, int]) -> Watchdog:
    """`dog` after a child that begins at 0 s and does these steps."""
    dog.observe("begun", step=None, now=0.0)
    for now, step in steps:
        dog.observe(f"step {step}", step=step, now=now)
    return dog


def test_loading_may_take_long() -> None:
    """Before the first step only `start` counts."""
    dog = fed(Watchdog(start=100, floor=10, factor=2))

    assert dog.silence(100) is None
    assert 101 == dog.silence(101)


@pytest.mark.parametrize(("pace", "patience"), [(1.0, 10.0), (60.0, 120.0)])
def test_patience_is_a_multiple_of_the_usual_step(pace: float, patience: float) -> None:
    """Two median steps, but never less than the floor; one slow step changes nothing."""
    steps = [(pace * n, n) for n in range(1, 6)] + [(pace * 50, 6)]
    dog = fed(Watchdog(start=1000, floor=10, factor=2), *steps)

    assert patience == dog.patience
    assert dog.silence(pace * 50 + patience) is None
    assert dog.silence(pace * 50 + patience + 1) is not None


def test_any_sign_of_life_counts() -> None:
    """An evaluation does no step for long, but says that it goes on."""
    dog = fed(Watchdog(start=1000, floor=10, factor=2), (1.0, 1), (2.0, 2))

    dog.observe("evaluating", step=2, now=12.0)

    assert dog.silence(22.0) is None
    assert dog.silence(23.0) is not None


def test_a_resumed_run_loads_first() -> None:
    """What an earlier process has logged is no step of this one, and may be taken back."""
    dog = Watchdog(start=100, floor=10, factor=2)
    for now, step in [(0.0, 7), (1.0, 4)]:
        dog.observe(step, step=step, now=now)

    assert dog.silence(50) is None
    dog.observe(5, step=5, now=60.0)
    assert dog.silence(71) is not None
