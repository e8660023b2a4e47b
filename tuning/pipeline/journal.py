"""The run directory: its lock and the journal of finished phases.

    spec.yaml plan.json journal.jsonl metrics.jsonl data/ checkpoints/ adapter/ image/ report.html

`journal.jsonl` holds one JSON object a line: `{"at", "phase", "event", "key", ...}` with event
`start`, `end` (with the phase's `value`) or `fail`. A phase is done when it has an `end` with its
key, a hash of everything it depends on: a changed spec repeats exactly the phases that it changes.
Each line is fsynced. A last line cut by a crash is dropped when the journal is opened.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuning import files
from tuning.errors import SpecError, TransientError

Value = dict[str, Any]


class Journal:
    """The journal of an open, locked run directory; made by `opened`."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self.lock = lock
        self.path = folder / "journal.jsonl"
        self.records = _read(self.path)

    def append(self, phase: str, event: str, key: str = "", **more: Any) -> None:
        """Add one durable line."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        record = {"at": now, "phase": phase, "event": event, "key": key} | more
        with self.path.open("ab") as file:
            file.write(files.canonical(record) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)

    def done(self, phase: str, key: str) -> Value | None:
        """What `phase` returned when it ended under `key`, or None."""
        for record in reversed(self.records):
            if (record["phase"], record["event"], record["key"]) == (phase, "end", key):
                value: Value = record["value"]
                return value
        return None

    def current(self, phase: str, key: str, *, unless: Collection[str] = ()) -> Value | None:
        """What `phase` returned under `key`, or None if it began again since, under any key.

        For phases that write files: those of one key replace those of another. A phase in `unless`
        that began since counts too.
        """
        for record in reversed(self.records):
            if record["phase"] in unless and record["event"] == "start":
                return None
            if record["phase"] == phase and record["event"] in ("start", "end"):
                same = (record["event"], record["key"]) == ("end", key)
                return record["value"] if same else None
        return None

    def do(
        self, phase: str, key: str, work: Callable[[], Value], *, outputs: Iterable[Path] = ()
    ) -> Value:
        """The current value of `phase` under `key`, or else the value of `work`, recorded.

        The phase is repeated if one of its `outputs` is missing.
        """
        value = self.current(phase, key)
        if value is None or not all(path.exists() for path in outputs):
            self.append(phase, "start", key)
            value = work()
            self.append(phase, "end", key, value=value)
        return value

    def values(self, phase: str) -> list[Value]:
        """Everything `phase` has returned, under any key, oldest first."""
        return [r["value"] for r in self.records if (r["phase"], r["event"]) == (phase, "end")]


@contextmanager
def opened(folder: Path) -> Iterator[Journal]:
    """Open the run directory at `folder`, made if absent, and hold its lock.

    The lock is a flock, which the kernel releases when its holders are gone. Raises TransientError
    with the holder's name when it is taken, SpecError when the folder is no run directory.
    """
    try:
        _refuse_foreign(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # reported as a full disk
        what = f"cannot be written ({error.strerror or type(error).__name__})"
        change = "name a writable folder with --run-dir"
        raise SpecError.at("RUN-103", str(folder), what, change) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
            raise TransientError.at(
                "RUN-101",
                str(folder),
                f"another run is using this run directory ({owner})",
                "wait for it, stop it, or name another folder with --run-dir",
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield Journal(folder, lock)
    finally:
        os.close(lock)


def _refuse_foreign(folder: Path) -> None:
    ours = {".lock", "journal.jsonl", "spec.yaml"}
    if folder.exists() and not folder.is_dir():
        what = "is a file, not a folder"
    elif folder.is_dir() and (names := {p.name for p in folder.iterdir()}) and not names & ours:
        if names <= {"lost+found"}:  # a fresh volume
            return
        what = f"is neither empty nor a run directory (it holds {sorted(names)[0]})"
    else:
        return
    raise SpecError.at("RUN-102", str(folder), what, "name a new or empty folder with --run-dir")


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    records, good = [], 0
    for line in lines[:-1]:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
        good += len(line) + 1
    if good < len(whole):
        with path.open("r+b") as file:
            file.truncate(good)
            os.fsync(file.fileno())
    return records
