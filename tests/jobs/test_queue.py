"""The operator's queue and watch: order, fairness, back-off. Time is a number here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import WORKSPACE
from jobs.api.options import Options
from jobs.controller import operator, watch
from jobs.controller.operator import Setup
from jobs.controller.queue import Queue
from jobs.controller.reconcile import Result
from jobs.controller.watch import Watch
from jobs.observed.observe import RateLimit


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def drained(queue: Queue[Any]) -> list[Any]:
    """What is due, in order; each looked at and done."""
    found = []
    while len(queue):
        key = queue.take()
        found.append(key)
        queue.done(key)
    return found


def test_what_is_due_comes_in_the_order_of_time() -> None:
    """No key twice: the sooner time of two counts."""
    clock = Clock()
    queue: Queue[str] = Queue(clock=clock)
    for key, after in (("a", 3.0), ("b", 1.0), ("a", 2.0), ("c", 2.5), ("b", 9.0)):
        queue.add(key, after=after)
    clock.now = 10.0

    assert ["b", "a", "c"] == drained(queue)


def test_who_is_first_takes_turns_by_namespace() -> None:
    """One floods with 500: the other's two come first and third, before all that is merely due."""
    queue: Queue[tuple[str, int]] = Queue(group_of=lambda key: key[0])
    queue.add(("due", 0))
    for i in range(500):
        queue.add(("flood", i), first=True)
    queue.add(("other", 0), first=True)
    queue.add(("other", 1), first=True)
    order = drained(queue)

    assert [("flood", 0), ("other", 0), ("flood", 1), ("other", 1)] == order[:4]
    assert ("due", 0) == order[-1]
    assert 503 == len(order)


def test_edits_without_a_pause_starve_nobody() -> None:
    """A namespace edits 50 Workspaces faster than they are reconciled; what is due elsewhere is
    reconciled all the same, each key at one worker at a time."""
    clock = Clock()
    queue: Queue[tuple[str, int]] = Queue(group_of=lambda key: key[0], clock=clock)
    for i in range(20):
        queue.add(("good", i))
    for i in range(50):
        queue.add(("flood", i), first=True)
        queue.add(("flood", i))
    taken = []
    for _ in range(1000):
        clock.now += 0.01
        key = queue.take()
        assert key is not None
        taken.append(key)
        queue.add(("flood", key[1]), first=True)
        queue.done(key)

    assert {("good", i) for i in range(20)} <= set(taken)


def test_a_key_in_both_lanes_is_taken_once() -> None:
    """Whatever the order in which it was added to them."""
    for first in (True, False):
        queue: Queue[int] = Queue()
        for lane in (first, not first):
            for key in range(30):
                queue.add(key, first=lane)
        assert list(range(30)) == sorted(drained(queue))


def test_a_key_that_is_worked_on_waits_for_its_worker() -> None:
    """Told of meanwhile, in whichever lane, it comes again after `done`; never at two at once."""
    clock = Clock()
    queue: Queue[str] = Queue(clock=clock)
    queue.add("a")
    assert "a" == queue.take()
    queue.add("a", first=True)
    queue.add("a")
    queue.add("b")
    assert "b" == queue.take()
    queue.done("a")
    assert "a" == queue.take()
    queue.done("a")
    queue.done("b", requeue_after=5.0)
    assert 1 == len(queue)


def test_failures_are_tried_later_and_later_until_one_succeeds() -> None:
    """Never after more than a minute; an event asks at once."""
    clock = Clock()
    queue: Queue[str] = Queue(clock=clock)
    queue.add("a")
    delays = []
    for _ in range(12):
        assert "a" == queue.take()
        delays.append(queue.failed("a"))
        clock.now += 60
    assert 0.25 <= delays[0] <= 0.5
    assert 30 <= delays[-1] <= 60

    queue.add("a", first=True)
    assert "a" == queue.take()
    queue.done("a")
    queue.add("a")
    assert "a" == queue.take()
    assert queue.failed("a") <= 0.5


def test_rarely_says_yes_once_a_minute_for_each() -> None:
    """And forgets those whose minute is over."""
    clock = Clock()
    rate_limit = RateLimit(60.0, clock)

    assert [True, True, False] == [rate_limit("a"), rate_limit("b"), rate_limit("a")]
    clock.now = 61
    assert all(rate_limit(i) for i in range(2000))
    assert rate_limit("a")
    assert len(rate_limit._until) <= 2001


class Down:
    """An API server that is away for ten minutes, told in the time that its client waits."""

    def __init__(self) -> None:
        self.now, self.tries, self.back = 0.0, 0, False

    def pages(self, *_: Any, **__: Any) -> Iterator[tuple[list[Any], str]]:
        self.tries += 1
        if self.now < 600:
            raise ApiError(0, "Unreachable", "refused")
        self.back = True
        yield [], "1"

    def watch(self, *_: Any, **__: Any) -> Iterator[Any]:
        raise ApiError(410, "Gone", "enough")
        yield


def test_an_api_server_that_is_away_for_ten_minutes_is_asked_gently() -> None:
    """A try in 20 seconds at most, and so a fresh list within 20 seconds of its return."""
    down, waits = Down(), []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            down.now += timeout or 0.0
            return False

        def is_set(self) -> bool:
            return down.back

    watching = Watch(
        down,  # type: ignore[arg-type]
        WORKSPACE,
        None,
        labels="",
        key_of=watch.key_of_workspace,
        on_event=lambda key, news: None,
    )
    watching.run(Stop())

    assert down.back and down.now < 620
    assert 20 < down.tries < 100
    assert max(waits) <= watch.LONGEST_PAUSE == 20


@pytest.mark.parametrize(("has_work", "soon"), [(True, True), (False, False)])
def test_what_has_ended_gives_its_machine_back_however_many_wait(
    monkeypatch: pytest.MonkeyPatch, has_work: bool, soon: bool
) -> None:
    """A look in passing waits its turn among ten thousand; one with something to do does not."""
    found = operator.Operator(Cluster.__new__(Cluster), Options(), Setup("one", elect=False))
    clock = Clock()
    found.queue = Queue(clock=clock)
    monkeypatch.setattr(
        operator, "reconcile", lambda *_, **__: Result(1.0, "Succeeded", has_work=has_work)
    )
    for i in range(10_000):
        found.queue.add(("others", str(i)), after=10_000.0)
    found.queue.add(("mine", "phi"))

    key = found.queue.take()
    assert key == ("mine", "phi")
    found._reconcile(key)

    clock.now = 2.0
    assert soon == (found.queue._next_due()[0] == key)
