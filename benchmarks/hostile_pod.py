"""Ten Workspaces beside one tenant whose pods answer badly: what their reconciles wait for.

    .venv/bin/python benchmarks/hostile_pod.py --seconds 4

Real sockets, the operator's queue, its four workers and its polls; the API server is a pause. The
bad pods are new ones each time, so that only the share of their namespace bounds what they take.
Each kind is measured with and without the tenant by turns: the ratio of the two is what counts.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hostile_pods import GOOD, HOSTILE, Behaviour, pod, serving  # noqa: E402

from jobs.controller.queue import Queue  # noqa: E402
from jobs.observed.poll import Poll  # noqa: E402

WORKERS, GOOD_ONES = 4, 10
EVERY, API = 0.1, 0.01  # seconds between reconciles of a Workspace, and of the API server in each
KINDS = ("a byte at a time", "endless headers", "60 kB of brackets", "accepts and says nothing",
         "endless chunks", "a body that is promised", "gzip that grows")  # fmt: skip


def _serve(behaviour: Behaviour, pipe: Connection) -> None:
    with serving(behaviour) as port:
        pipe.send(port)
        pipe.recv()


@contextmanager
def apart(behaviour: Behaviour) -> Iterator[int]:
    """The port of a pod in a process of its own: an endless answer costs the operator nothing."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(behaviour, theirs))
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def waits(seconds: float, port: int, hostile_port: int | None) -> list[float]:
    """Seconds from when each reconcile of a good Workspace was due until it was done."""
    queue: Queue[tuple[str, int]] = Queue(group_of=lambda key: key[0])
    good, bad = Poll(port=port), Poll(port=hostile_port or 1)
    due: dict[tuple[str, int], float] = {}
    found: list[float] = []
    numbers = itertools.count()
    end = time.monotonic() + seconds

    def work() -> None:
        while (key := queue.take()) is not None:
            time.sleep(API)
            if key[0] == "hostile":
                bad(pod(f"p{next(numbers)}", "hostile"))
            else:
                assert good(pod("a", key[0])) == {"step": 3, "steps": 9}
                found.append(time.monotonic() - due[key])
            due[key] = time.monotonic() + EVERY
            queue.done(key, requeue_after=EVERY)

    keys = [(f"team-{i}", 0) for i in range(GOOD_ONES)]
    keys += [("hostile", 0)] if hostile_port else []
    for key in keys:
        due[key] = time.monotonic()
        queue.add(key)
    threads = [threading.Thread(target=work) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    time.sleep(max(0.0, end - time.monotonic()))
    queue.close()
    for thread in threads:
        thread.join()
    return found


def p99(times: list[float]) -> float:
    """Milliseconds."""
    return 1000 * sorted(times)[int(0.99 * (len(times) - 1))]


def measured(kind: str, seconds: float) -> dict[str, Any]:
    """p99 with and without the tenant, in four turns each."""
    alone: list[float] = []
    beside: list[float] = []
    with apart(GOOD) as port, apart(HOSTILE[kind]) as hostile_port:
        for _ in range(4):
            alone += waits(seconds / 8, port, None)
            beside += waits(seconds / 8, port, hostile_port)
    before, after = p99(alone), p99(beside)
    return {
        "kind": kind,
        "alone_p99_ms": round(before, 2),
        "beside_p99_ms": round(after, 2),
        "ratio": round(after / before, 3),
        "reconciles": len(beside),
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=8, help="of each kind, in all")
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results")
    asked = parser.parse_args()
    found = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "python": platform.python_version(),
        "kinds": [measured(kind, asked.seconds) for kind in KINDS],
    }
    print(json.dumps(found, indent=2))
    if asked.write:
        with (ROOT / "benchmarks" / "results" / "hostile_pod.jsonl").open("a") as results:
            results.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
