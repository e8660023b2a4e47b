"""Child processes that answer by a file.

The parent process owns signals, journal and exit code and never imports torch; the heavy phases run
as `python -m tuning.process ROOM REQUEST`, a JSON file, and leave `<REQUEST stem>.result.json`
beside it. A launcher may lose an exit code and a log may be cut, so the file alone is the answer:
either `{"ok": value}` or `{"error": {...}}`. No file means that the child was killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import queue
import runpy
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tuning import files
from tuning.errors import TransientError, TuningError, from_json


class ChildDied(Exception):
    """The child left no answer: killed from outside (negative `status`) or broken by a bug."""

    def __init__(self, room: str, status: int) -> None:
        self.room, self.status = room, status
        super().__init__(f"tuning.{room} ended with status {status} and left no answer")


class Hung(Exception):
    """The child has been silent for `seconds`, which is too long. Raised by a `tick`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"silent for {seconds:.0f} s")


def result_path(request: Path, rank: int = 0) -> Path:
    """Where the child that was given `request` leaves its answer; the ranks beside it, theirs."""
    which = f".{rank}" if rank else ""
    return request.with_name(request.name.removesuffix(".json") + f"{which}.result.json")


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """The child's whole life: read the request named on the command line, work, answer.

    Returns the exit status. An error that a person can act on travels as it is; anything else is a
    bug of ours: its traceback goes to stderr and into the answer.
    """
    request = Path(sys.argv[1])
    answer = result_path(request, int(os.environ.get("RANK", "0")))
    try:
        files.write_json(answer, {"ok": work(files.read_json(request))})
        return 0
    except TuningError as error:
        files.write_json(answer, {"error": error.to_json()})
        return error.exit_code
    except Exception as error:
        full = disk_full(error)
        if full is not None:
            with contextlib.suppress(OSError):  # there may be no room for the answer, either
                files.write_json(answer, {"error": full.to_json()})
            return full.exit_code
        traceback.print_exc()
        files.write_json(answer, {"bug": traceback.format_exc()})
        return 1


def disk_full(error: BaseException) -> TransientError | None:
    """`error` as the disk-full error, if the operating system said so."""
    if isinstance(error, OSError) and error.errno in (28, 122):  # ENOSPC, EDQUOT
        return _no_space(str(error.filename or "disk"))
    return None


def _no_space(where: str) -> TransientError:
    return TransientError.at(
        "RUN-120",
        where,
        "no space left on the device",
        "free some space and run the same command again; it goes on where it stopped",
    )


def run(
    room: str,
    request: Path,
    value: dict[str, Any],
    *,
    log: Path,
    keep_open: tuple[int, ...] = (),
    stop_asked: Callable[[], bool] = lambda: False,
    tick: Callable[[], None] = lambda: None,
    environment: Mapping[str, str] = MappingProxyType({}),
    grace: float = 25.0,
    ahead: Ahead | None = None,
    ranks: int = 1,
) -> dict[str, Any]:
    """Run `tuning.<room>` on `value` as a child process and return its answer.

    `ranks` above 1 starts so many with the same request, told apart by the environment (RANK,
    WORLD_SIZE and LOCAL_RANK); the first one's answer counts, and when one fails all are ended.

    `log` takes what the child prints. `keep_open` are file descriptors it inherits: the run
    directory's lock, so that the lock holds as long as any process may write. `tick` is called
    about ten times a second; it may raise Hung, and then the child leaves its stacks in `log` and
    is killed. A child that was started `ahead` answers, if it still lives. When `stop_asked` turns
    true the child gets SIGTERM, once, and `grace` seconds to end. Raises the child's own error,
    ChildDied, or what `tick` raises.
    """
    for rank in range(ranks):
        result_path(request, rank).unlink(missing_ok=True)
    files.write_json(request, value)
    first = ahead.take(request) if ahead is not None and ranks == 1 else None
    children = [first] if first is not None else []
    try:
        for rank in range(len(children), ranks):
            told = {**environment, **_rank(rank, ranks)}
            children.append(_start(room, str(request), log, keep_open, told))
        ended = _wait(children, stop_asked=stop_asked, tick=tick, grace=grace)
    except Hung:
        for child in children:
            _dump_stacks(child, log)
        raise
    finally:
        for child in children:
            _end(child)
    tick()
    return _answer(room, request, [None if c in ended else c.returncode for c in children])


def _rank(rank: int, ranks: int) -> dict[str, str]:
    """The environment of one of several ranks, as torch's own launcher sets it."""
    if ranks == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }


def _wait(
    children: Sequence[subprocess.Popen[bytes]],
    *,
    stop_asked: Callable[[], bool],
    tick: Callable[[], None],
    grace: float,
) -> list[subprocess.Popen[bytes]]:
    """Wait for all `children`; once one has failed, its peers are ended: they are returned.

    Asked to stop, all get `grace` seconds.
    """
    deadline: float | None = None
    stopping = False
    ended: list[subprocess.Popen[bytes]] = []
    while alive := [child for child in children if child.poll() is None]:
        now = time.monotonic()
        if stop_asked() and not stopping:
            stopping, deadline = True, now + grace
            for child in alive:
                child.terminate()
        if deadline is None and any(child.returncode for child in children):
            deadline = now + LONELY
        if deadline is not None and now > deadline:
            for child in alive:
                child.kill()  # its last checkpoint holds
            if not stopping:
                ended += alive
        tick()
        time.sleep(0.1)
    return ended


def _answer(room: str, request: Path, statuses: Sequence[int | None]) -> dict[str, Any]:
    """What the children answered: the first error that a person can act on, else the result.

    `statuses` are how they ended, None for those that were ended because another had failed.
    """
    replies: list[dict[str, Any]] = []
    for rank in range(len(statuses)):
        try:
            replies.append(files.read_json(result_path(request, rank)))
        except FileNotFoundError:
            replies.append({})
    for reply in replies:
        if "error" in reply:
            raise from_json(reply["error"])
    broken = [
        status
        for status, reply in zip(statuses, replies, strict=True)
        if "ok" not in reply and status is not None
    ]
    if TransientError.exit_code in broken:  # it could not even write that
        raise _no_space(str(request.parent))
    if broken:  # one that was killed broke those that waited for it
        raise ChildDied(room, min(1 if status > 0 else status for status in broken))
    result: dict[str, Any] = replies[0]["ok"]
    return result


class Ahead:
    """A child of `room` that loads its libraries while there is nothing to ask it yet.

    It waits for the name of its request, or for the end: of this process, or of `with`.
    """

    def __init__(self, room: str, *, log: Path, keep_open: tuple[int, ...] = ()) -> None:
        self._child: subprocess.Popen[bytes] | None = _start(room, WAITING, log, keep_open, {})

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            _end(self._child)
            self._child = None

    def take(self, request: Path) -> subprocess.Popen[bytes] | None:
        """The child, told to answer `request`; None if it is gone or was taken before."""
        child, self._child = self._child, None
        if child is None or child.stdin is None:
            return None
        try:
            os.write(child.stdin.fileno(), f"{request}\n".encode())
        except OSError:  # it died
            _end(child)
            return None
        return child


LONELY = 5.0  # seconds that the other ranks get to end when one has failed
WAITING = "-"  # in the place of a request that will be named on stdin


def _start(
    room: str, request: str, log: Path, keep_open: tuple[int, ...], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    with log.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "tuning.process", room, request],
            stdin=subprocess.PIPE,  # closes when this process dies, see follow_parent
            stdout=sink,
            stderr=sink,
            env=clean_environment() | dict(environment),
            pass_fds=keep_open,
            start_new_session=True,  # Ctrl-C reaches the child once, through us
        )


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.kill()
    child.wait()
    if child.stdin:
        child.stdin.close()


def _dump_stacks(child: subprocess.Popen[bytes], log: Path) -> None:
    """Have the child write where its threads stand, and wait for that; a stopped one cannot."""
    size = log.stat().st_size
    child.send_signal(signal.SIGUSR1)
    for _ in range(50):
        time.sleep(0.1)
        before, size = size, log.stat().st_size
        if child.poll() is not None or size == before > 0:
            return


def clean_environment() -> dict[str, str]:
    """The environment of a child: ours without secrets, offline, with fixed hash seed.

    A child reads local files only; the parent has fetched everything and keeps every credential.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not any(word in name.upper() for word in ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL"))
        and name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    }
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONUNBUFFERED": "1",
        # bitsandbytes compiles when it is imported: two seconds of inductor, for functions whose
        # results would differ from machine to machine. Who compiles on purpose removes this.
        "TORCHDYNAMO_DISABLE": "1",
    }


def launch() -> None:
    """Become the room that the command line names, `ROOM REQUEST`.

    What ties a child to its parent is in place before its imports, which take seconds: it ends when
    the parent is gone, and on SIGUSR1 it writes where each of its threads stands to its log.
    """
    room = sys.argv.pop(1)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    named: queue.SimpleQueue[str] = queue.SimpleQueue()
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        follow_parent(named)
    if sys.argv[1] == WAITING:
        importlib.import_module(f"tuning.{room}")
        del sys.modules[f"tuning.{room}"]  # it is run below, as __main__; what it imported stays
        sys.argv[1] = named.get()
    runpy.run_module(f"tuning.{room}", run_name="__main__", alter_sys=True)


def follow_parent(named: queue.SimpleQueue[str] | None = None) -> None:
    """End this child when its parent is gone: an orphan would hold GPU and lock.

    What the parent writes meanwhile (`Ahead.take`) goes to `named`, line by line.
    """

    def watch() -> None:
        text = b""
        with contextlib.suppress(OSError, ValueError):
            while piece := os.read(0, 4096):
                *lines, text = (text + piece).split(b"\n")
                for line in lines:
                    if named is not None:
                        named.put(line.decode())
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    from tuning import process  # the module that rooms import, not this copy of it

    process.launch()
