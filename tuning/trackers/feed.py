"""The child that feeds one tracker from a run's metrics.jsonl.

It ends when the parent has written how the run ended, and all was sent or the tracker does not
answer. What it cannot send stays in metrics.jsonl: the same command again sends the rest. The
parent ends it when its time is over.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tuning import files, process
from tuning.errors import printable, redact
from tuning.network.policy import Policy
from tuning.network.session import Session
from tuning.trackers import clients, mlflow, tensorboard
from tuning.trackers.values import BEFORE, Failed, Identity, Key, Point, Tracker

POLL = 0.3  # seconds between two looks at metrics.jsonl
CHUNK = 1 << 20  # bytes of metrics.jsonl that are sent at once
LONGEST_PAUSE = 30.0  # seconds before another try


@dataclass(frozen=True)
class State:
    """What a tracker was sent, in the run directory: `trackers/<name>.json`."""

    identity: str = ""
    id: str | None = None  # the tracker's own name of the run
    link: str | None = None
    sent: Key = BEFORE
    done: bool = False  # all was sent, and how the run ended
    problem: str = ""  # why the last try failed

    @classmethod
    def read(cls, path: Path, identity: str | None = None) -> State:
        """The state in `path`; a new one if it is of another run, or no longer readable."""
        try:
            record = files.read_json(path)
            known = {each.name for each in fields(cls)}
            state = cls(**{k: v for k, v in record.items() if k in known})
            state = replace(state, sent=(int(state.sent[0]), int(state.sent[1])))
        except (OSError, ValueError, TypeError, AttributeError, IndexError, KeyError):
            return cls(identity or "")
        return state if identity in (None, state.identity) else cls(identity or "")


@dataclass
class Metrics:
    """New records of metrics.jsonl, which a resumed run cuts off and writes again."""

    path: Path
    before: list[int] | None  # its state at the start, if a training is still to come
    _inode: int = 0
    _offset: int = 0
    _points: list[Point] = field(default_factory=list)

    def after(self, key: Key) -> list[Point]:
        """The next points after `key`, in order; no more than CHUNK bytes of the file hold."""
        points = [point for point in self._points if point.key > key] or self._read()
        self._points = [point for point in points if point.key > key]
        return self._points

    def rewind(self) -> None:
        """Begin at the first record again."""
        self._offset, self._points = 0, []

    def _read(self) -> list[Point]:
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if self.before == [stat.st_size, stat.st_mtime_ns]:
                    return []  # of an earlier start: the training cuts off what it does again
                self.before = None
                if stat.st_ino != self._inode or stat.st_size < self._offset:
                    self._inode, self._offset = stat.st_ino, 0
                file.seek(self._offset)
                whole, newline, _ = file.read(CHUNK).rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(whole) + len(newline)
        return list(_points(whole))


def _points(lines: bytes) -> Iterator[Point]:
    for line in lines.split(b"\n"):
        try:
            record = files.parse_json(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            yield Point.of(record)


def work(request: dict[str, Any]) -> dict[str, Any]:
    """Feed the tracker until the run is over; returns the last state."""
    path, end = Path(request["state"]), Path(request["end"])
    run = Identity(**request["run"] | {"run_dir": Path(request["run"]["run_dir"])})
    state = replace(State.read(path, run.identity), done=False, problem="")
    metrics = Metrics(Path(request["metrics"]), request["before"])
    tracker: Tracker | None = None
    ended: dict[str, Any] | None = None
    pause, again = 0.0, 0.0  # seconds before another try, and when it is
    while not state.done:
        if ended is None and end.exists():
            ended, again = files.read_json(end), 0.0
        try:
            if time.monotonic() >= again:
                points = metrics.after(state.sent)
                if tracker is None and (points or ended):
                    tracker = _opened(request, run, state)
                    state = _met(state, tracker)
                    metrics.rewind()
                elif tracker is not None:
                    state = _sent(state, tracker, points, ended)
                    if points or ended or state.problem:
                        state = replace(state, problem="")
                        files.write_json(path, asdict(state))
                    if points:
                        continue
                pause = 0.0
        except Exception as error:
            tracker, known = None, state.problem
            state = replace(state, problem=_told(error))
            files.write_json(path, asdict(state))
            logging.warning("%s", state.problem, exc_info=not isinstance(error, Failed))
            if ended and known:  # it had its time
                break
            pause = 1.0 if ended else min(LONGEST_PAUSE, 2 * pause or 1.0)
            again = time.monotonic() + pause
        if not state.done:
            time.sleep(POLL)
    return asdict(state)


def _sent(
    state: State, tracker: Tracker, points: list[Point], ended: dict[str, Any] | None
) -> State:
    """The state after `points`, or after the end of the run once there are no more."""
    if points:
        tracker.send(points)
        return replace(state, sent=points[-1].key)
    if ended:
        tracker.close(ended["ending"], ended["facts"])
        return replace(state, done=True)
    return state


def _met(state: State, tracker: Tracker) -> State:
    """The state with what the opened tracker says of the run."""
    sent = state.sent if tracker.sent is None else tracker.sent
    if sent[0] == state.sent[0]:
        sent = max(sent, state.sent)
    return replace(state, id=tracker.id, link=tracker.link, sent=sent)


def _told(error: Exception) -> str:
    """One line about a failure, without credentials."""
    text = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
    return redact(printable(" ".join(text.split())))[:300]


def _opened(request: dict[str, Any], run: Identity, state: State) -> Tracker:
    """The run at the tracker that the request names, found again or created."""
    address, secrets = request["address"], request["secrets"]
    folder = Path(secrets) if secrets else None
    match request["tracker"]:
        case "mlflow":
            return mlflow.opened(_session(request), address, folder, run, state.id)
        case "wandb":
            return clients.Wandb(run, address=address, secrets=folder)
        case "trackio":
            return clients.Trackio(run)
        case _:
            return tensorboard.TensorBoard(run.run_dir / "tensorboard" / run.name, run)


def _session(request: dict[str, Any]) -> Session:
    """Connections to the tracker: to any address if the environment names it."""
    ca = Path(request["ca"]) if request["ca"] else None
    if request["trusted"]:
        return Session(ca)
    policy = Policy(
        allow_hosts=frozenset(request["allow_hosts"]),
        proxy=request["proxy"],
        no_proxy=frozenset(request["no_proxy"]),
        ca_bundle=Path(request["ca_bundle"]) if request["ca_bundle"] else ca,
    )
    return Session.guarded(policy)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    sys.exit(process.serve(work))
