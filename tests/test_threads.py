"""Work side by side: results in order, and a stop that waits for nobody."""

from __future__ import annotations

import threading

import pytest

from tuning import threads
from tuning.threads import side_by_side


def test_results_and_errors_come_in_the_order_of_the_jobs() -> None:
    def broken() -> int:
        raise KeyError("b")

    first, second, third = side_by_side([lambda: 1, broken, lambda: 3], at_once=2)

    assert (1, 3) == (first, third)
    assert isinstance(second, KeyError)


def test_jobs_run_side_by_side() -> None:
    """Each waits for the other."""
    meeting = threading.Barrier(2, timeout=30)

    assert {0, 1} == set(side_by_side([meeting.wait, meeting.wait], at_once=2))


def test_no_jobs_give_no_results() -> None:
    assert [] == side_by_side([], at_once=4)


def test_a_stop_does_not_wait_for_a_job_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "STOP_SECONDS", 0.01)
    started, end = threading.Event(), threading.Event()

    def hang() -> None:
        started.set()
        end.wait(30)

    (result,) = side_by_side([hang], at_once=1, stop=started.is_set)
    end.set()

    assert isinstance(result, InterruptedError)
