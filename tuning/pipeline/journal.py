"""The run directory: its lock, the journal of finished phases, and what may be relied on.

    spec.yaml plan.json journal.jsonl metrics.jsonl data/ checkpoints/ adapter/ image/ report.html

`journal.jsonl` holds one JSON object a line: `{"at", "phase", "event", "key", ...}` with event
`start`, `end` (with the phase's `value` and the sha256 of its `outputs`), `damaged` or `fail`; for
people `begin` (a command), `note`, `oom`, `killed` and `lost`. Each line is fsynced. Invariants:

1. One writer. The lock is a flock that the children inherit, so it is held while any may write.
2. A phase is done when the last of its `start`, `end` and `damaged` lines is an `end` under its
   key, a hash of everything it depends on: a changed spec repeats exactly what it changes.
3. A line counts only if its own `check` is right. What is cut or altered is dropped, and the phase
   that it told of is repeated. Lines of versions before the first `check` count as they are.
4. Outputs are taken up only as their phase left them: the phase that works with them compares their
   sha256 first (`verify`), and so does a run that finds itself finished. One that differs, is cut
   or missing makes its phase `damaged`: it is repeated, from outputs that are compared in turn.
   An `end` of an older version has no digests; its outputs are accepted if they are there.
5. The rest proves itself: checkpoints by their manifests, blobs by their names, base weights by the
   cache that holds them. `spec.yaml` and `plan.json` are written at each start, and `log/`,
   `metrics.jsonl` and what trackers get of it are for people: no result depends on them.
6. Nothing in the run directory is a link or a device; the run directory itself may be a link.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuning import files
from tuning.errors import SpecError, TransientError

Value = dict[str, Any]
FILES = (
    *(".lock", "journal.jsonl", "spec.yaml", "plan.json", "metrics.jsonl"),
    *("samples.jsonl", "report.html", "provenance.json", "evaluation.json", "traceback.txt"),
)
FOLDERS = ("data", "checkpoints", "adapter", "image", "log", "trackers", "tensorboard")
STORES = ("wandb", "trackio")  # of clients, which may put links into them


class Damaged(Exception):
    """The output `path` of `phase` is not what the phase left: repeat it."""

    def __init__(self, phase: str, path: Path) -> None:
        self.phase, self.path = phase, path
        super().__init__(f"{path} is not as the phase {phase} left it")


class Journal:
    """The journal of an open, locked run directory; made by `opened`."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self.lock = lock
        self.path = folder / "journal.jsonl"
        self.records, self.dropped = _read(self.path)  # dropped: lines that were no records

    def append(self, phase: str, event: str, key: str = "", **more: Any) -> None:
        """Add one durable line."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        record = {"at": now, "phase": phase, "event": event, "key": key} | more
        record["check"] = _check(record)
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
        that began since, or lost an output, counts too.
        """
        for record in reversed(self.records):
            if record["phase"] in unless and record["event"] in ("start", "damaged"):
                return None
            if record["phase"] == phase and record["event"] in _STATES:
                same = (record["event"], record["key"]) == ("end", key)
                return record["value"] if same else None
        return None

    def do(
        self,
        phase: str,
        key: str,
        work: Callable[[], Value],
        *,
        outputs: Callable[[Value], Iterable[Path]] = lambda _: (),
        needs: Iterable[str] = (),
        unless: Collection[str] = (),
    ) -> Value:
        """The current value of `phase` under `key`, or else the value of `work`, recorded.

        `outputs` are the files that belong to the value: the phase is repeated if one is missing
        of them or of those that it left, and their digests are recorded. Raises Damaged before
        work for an output of a phase that it `needs`. `unless` is that of `current`.
        """
        value = self.current(phase, key, unless=unless)
        made = [self.folder / name for name in self.outputs(phase) or ()]
        if value is None or not all(path.exists() for path in (*made, *outputs(value))):
            self.verify(*needs)
            self.append(phase, "start", key)
            value = work()
            digests = {self._name(path): files.digest_file(path) for path in outputs(value)}
            self.append(phase, "end", key, value=value, outputs=digests)
        return value

    def verify(self, *phases: str) -> None:
        """Raise Damaged if an output of one of `phases` is not what its `end` says."""
        for phase in phases:
            for name, digest in (self.outputs(phase) or {}).items():
                path = self.folder / name
                if not path.is_file() or files.digest_file(path) != digest:
                    raise self.damaged(phase, path)

    def outputs(self, phase: str) -> dict[str, str] | None:
        """The sha256 of each output of `phase`, if it is done; None where they are not known."""
        for record in reversed(self.records):
            if record["phase"] == phase and record["event"] in _STATES:
                found: dict[str, str] | None = record.get("outputs")
                return found if record["event"] == "end" else {}
        return {}

    def damaged(self, phase: str, path: Path) -> Damaged:
        """Record that `phase` has to be repeated; returns the error to raise."""
        self.append(phase, "damaged", path=self._name(path))
        return Damaged(phase, path)

    def _name(self, path: Path) -> str:
        """`path` as journaled: relative within the run directory, which may be moved."""
        inside = path.is_relative_to(self.folder)
        return str(path.relative_to(self.folder) if inside else path.absolute())

    def values(self, phase: str) -> list[Value]:
        """Everything `phase` has returned, under any key, oldest first."""
        return [r["value"] for r in self.records if (r["phase"], r["event"]) == (phase, "end")]


_STATES = ("start", "end", "damaged")


@contextmanager
def opened(folder: Path) -> Iterator[Journal]:
    """Open the run directory at `folder`, made if absent, and hold its lock.

    Raises TransientError with the holder's name when the lock is taken, or for a disk that fails,
    SpecError when the folder is no run directory.
    """
    lock = -1
    try:
        try:
            _refuse_foreign(folder)
            folder.mkdir(parents=True, exist_ok=True)
            refuse_links(folder)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            lock = os.open(folder / ".lock", flags, 0o644)
            _take(lock, folder)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
            journal = Journal(folder, lock)
        except OSError as error:
            raise files.system_error(error, folder) or error from None
        yield journal
    finally:
        if lock >= 0:
            os.close(lock)


def _take(lock: int, folder: Path) -> None:
    """Take the flock. Raises TransientError."""
    try:
        return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
        raise TransientError.at(
            "RUN-101",
            str(folder),
            f"another run is using this run directory ({owner})",
            "wait for it, stop it, or name another folder with --run-dir",
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        what = f"its file system gives no lock (flock: {error.strerror})"
        change = "mount it with locks (NFS: without nolock), or name another disk with --run-dir"
        raise TransientError.at("RUN-104", str(folder), what, change) from None


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


def refuse_links(folder: Path) -> None:
    """Raise SpecError for an entry of a run directory that would be written through or hang.

    Links to other places, pipes and devices; a folder for a file, or a file for a folder. What a
    run does not know in its directory is not looked at.
    """
    for name in STORES:
        _refuse_link(folder / name, stat.S_ISDIR)
    for name in (*FILES, *FOLDERS):
        _refuse_link(folder / name, stat.S_ISDIR if name in FOLDERS else stat.S_ISREG)
        for place, folders, others in os.walk(folder / name):
            for inside in folders:
                _refuse_link(Path(place, inside), stat.S_ISDIR)
            for inside in others:
                _refuse_link(Path(place, inside), stat.S_ISREG)


def _refuse_link(path: Path, expected: Callable[[int], bool]) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if expected(mode):
        return
    kind = "a symbolic link" if stat.S_ISLNK(mode) else "of another kind than a run makes it"
    what = f"is {kind}, and a run writes nothing through it"
    raise SpecError.at("RUN-105", str(path), what, "remove it, or name another --run-dir")


def _check(record: Value) -> str:
    """A short hash of a line without its own `check`."""
    return files.digest(
        files.canonical({name: value for name, value in record.items() if name != "check"})
    )[:16]


def _read(path: Path) -> tuple[list[Value], int]:
    """The records of a journal, and how many lines were none: the file is rewritten without them.

    A last line cut by a crash does not count as one.
    """
    if not path.exists():
        return [], 0
    records, good, tail, count = _parse(path)
    if tail or len(good) < count:
        files.write(path, b"".join(good))
    return records, count - len(good)


def records(folder: Path) -> list[Value]:
    """The sound records in the journal of the run directory `folder`, which may be in use."""
    try:
        return _parse(folder / "journal.jsonl")[0]
    except OSError:
        return []


def _parse(path: Path) -> tuple[list[Value], list[bytes], bytes, int]:
    """The records of a journal, their lines, what follows the last line, the number of lines."""
    *lines, tail = path.read_bytes().split(b"\n")
    records: list[Value] = []
    good: list[bytes] = []
    for line in lines:
        record = _record(line, checked=bool(records) and "check" in records[-1])
        if record is not None:
            records.append(record)
            good.append(line + b"\n")
    return records, good, tail, len(lines)


def _record(line: bytes, *, checked: bool) -> Value | None:
    """The record in a line, or None; `checked`: a line without a `check` is none."""
    try:
        record = files.parse_json(line)
        sound = all(isinstance(record[name], str) for name in ("at", "phase", "event", "key"))
        if record["event"] == "end":
            sound = sound and isinstance(record["value"], dict)
        if checked or "check" in record:
            sound = sound and record["check"] == _check(record)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if sound else None
