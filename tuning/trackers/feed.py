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


class Feed:
    """The points of one run on their way to one tracker."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request, self.path = request, Path(request["state"])
        run = request["run"]
        self.run = Identity(**run | {"run_dir": Path(run["run_dir"])})
        self.metrics = Metrics(Path(request["metrics"]), request["before"])
        self.state = replace(State.read(self.path, self.run.identity), done=False, problem="")
        self.tracker: Tracker | None = None
        self.pause = 0.0  # seconds before another try

    def turn(self, ended: dict[str, Any] | None) -> bool:
        """Send what there is, and how the run `ended`; whether there may be more at once."""
        try:
            return self._turn(ended)
        except Exception as error:
            self.tracker = None
            self._keep(problem=_told(error))
            logging.warning("%s", self.state.problem, exc_info=not isinstance(error, Failed))
            self.pause = 1.0 if ended else min(LONGEST_PAUSE, 2 * self.pause or 1.0)
            return False

    def _turn(self, ended: dict[str, Any] | None) -> bool:
        points = self.metrics.after(self.state.sent)
        if not points and not ended:
            return False
        if self.tracker is None:
            self.tracker = tracker = _opened(self.request, self.run, self.state)
            self._keep(id=tracker.id, link=tracker.link, sent=_last(tracker, self.state.sent))
            self.metrics.rewind()
        elif points:
            self.tracker.send(points)
            self._keep(sent=points[-1].key, problem="")
        elif ended:
            self.tracker.close(ended["ending"], ended["facts"])
            self._keep(done=True, problem="")
        self.pause = 0.0
        return not self.state.done

    def _keep(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)
        files.write_json(self.path, asdict(self.state))


def _last(tracker: Tracker, known: Key) -> Key:
    """The last point that the tracker has; `known` is what it was sent before."""
    sent = known if tracker.sent is None else tracker.sent
    if isinstance(sent, int):
        return max((sent, 0), known) if sent == known[0] else (sent, 0)
    return sent


def work(request: dict[str, Any]) -> dict[str, Any]:
    """Feed the tracker until the run is over; returns the last state."""
    feed, end = Feed(request), Path(request["end"])
    again, ended = 0.0, None
    while not feed.state.done:
        failing = bool(feed.state.problem)
        if ended is None and end.exists():
            ended, again = files.read_json(end), 0.0
        if time.monotonic() < again:
            time.sleep(POLL)
            continue
        more = feed.turn(ended)
        if ended and failing and feed.state.problem:  # it had its time
            break
        again = time.monotonic() + (0.0 if more else POLL + feed.pause)
    return asdict(feed.state)


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
