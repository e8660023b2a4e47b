"""Retries: how often, after how long, and what is worth one."""

import pytest

from tuning.errors import DataError, Problem, TransientError
from tuning.network.retry import Again, Attempts, Patience, is_retryable, persist, retry_after

PROBLEM = Problem("REG-130", "here", "failed", "wait")


def failing(times: int, **more: object) -> object:
    """What fails so many times, then succeeds."""
    left = [times]

    def work() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise Again(PROBLEM, **more)  # type: ignore[arg-type]
        return "done"

    return work


def test_waits_grow_and_retry_after_is_capped() -> None:
    waits: list[float] = []
    patience = Patience(total=1e9, first=1.0, longest=4.0, sleep=waits.append)

    assert "done" == persist(failing(50), patience)  # type: ignore[arg-type]

    assert all(wait <= min(4.0, 2.0**n) for n, wait in enumerate(waits))
    waits.clear()
    persist(failing(1, after=86400.0), patience)  # type: ignore[arg-type]
    assert [120.0] == waits


def test_a_kind_of_failure_may_have_fewer_tries() -> None:
    patience = Patience(total=1e9, first=0.0, tries=5)

    with pytest.raises(DataError):
        persist(failing(2, tries=2, final=DataError), patience)  # type: ignore[arg-type]
    with pytest.raises(TransientError):
        persist(failing(5), patience)  # type: ignore[arg-type]
    assert "done" == persist(failing(4), patience)  # type: ignore[arg-type]


def test_progress_begins_the_count_again() -> None:
    attempts = Attempts(Patience(total=1e9, first=0.0, tries=3))
    for _ in range(10):
        attempts.wait(Again(PROBLEM))
        attempts.wait(Again(PROBLEM))
        attempts.reset()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7", 7.0), ("", None), ("soon", None), ("²", None), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0)],
)
def test_retry_after(text: str, seconds: float | None) -> None:
    assert seconds == retry_after({"retry-after": text})


def test_one_list_of_statuses() -> None:
    assert [408, 425, 429, 500, 502, 503, 504, 520] == [
        status
        for status in (400, 404, 408, 425, 429, 500, 501, 502, 503, 504, 507, 520)
        if is_retryable(status)
    ]
