"""Child processes that return their result in a file.

The parent process owns signals, journal and exit code and never imports torch. Heavy phases run as
`python -m tuning.process ROOM REQUEST`, where REQUEST is a JSON file, and write
`<REQUEST stem>.result.json` beside it: `{"ok": value}` or `{"error": {...}}`. Only the file counts,
since a launcher may lose an exit code and a log may be cut. No file: the child was killed.
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
from tuning.files import no_space, system_error


class ChildDied(Exception):
    """The child left no result: killed from outside (negative `status`) or broken by a bug."""

    def __init__(self, room: str, status: int) -> None:
        self.room, self.status = room, status
        super().__init__(f"tuning.{room} ended with status {status} and left no result")


class Hung(Exception):
    """The child showed no progress for `seconds`. Raised by a `tick`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"no progress for {seconds:.0f} s")


def result_path(request: Path, rank: int = 0) -> Path:
    """The result file of `request`; each rank above 0 has its own beside it."""
    suffix = f".{rank}" if rank else ""
    return request.with_name(request.name.removesuffix(".json") + f"{suffix}.result.json")


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Run `work` on the request that argv names and write its result; returns the exit status.

    A TuningError is passed on as it is. Any other exception is a bug: its traceback goes to stderr
    and into the result file.
    """
    request = Path(sys.argv[1])
    result = result_path(request, int(os.environ.get("RANK", "0")))
    try:
        files.write_json(result, {"ok": work(files.read_json(request))})
        return 0
    except TuningError as error:
        files.write_json(result, {"error": error.to_json()})
        return _leave(error.exit_code)
    except Exception as error:
        failed = system_error(error)
        if failed is not None:
            traceback.print_exc()
            with contextlib.suppress(OSError):  # the result may not fit, either
                files.write_json(result, {"error": failed.to_json()})
            return _leave(failed.exit_code)
        traceback.print_exc()
        files.write_json(result, {"bug": traceback.format_exc()})
        return _leave(1)


def _leave(status: int) -> int:
    """`status`; one of several ranks ends here and now.

    The threads of a communicator whose peers wait for it would keep the interpreter from ending.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


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
    prewarmed: Prewarmed | None = None,
    ranks: int = 1,
) -> dict[str, Any]:
    """Run `tuning.<room>` on `value` in a child process and return its result.

    `ranks` above 1 starts that many children with the same request and the environment of their
    rank (RANK, WORLD_SIZE, LOCAL_RANK). Rank 0's result counts; when one fails all are ended.

    `log` takes what the child prints. `keep_open` are file descriptors it inherits, such as the run
    directory's lock, which then holds as long as any process may write. `tick` is called about ten
    times a second; if it raises Hung, the child dumps its stacks to `log` and is killed. A live
    `prewarmed` child is used in place of a new one. When `stop_asked` turns true the child gets
    SIGTERM, once, and `grace` seconds to end. Raises the child's own error, ChildDied, or what
    `tick` raises.
    """
    for rank in range(ranks):
        result_path(request, rank).unlink(missing_ok=True)
    files.write_json(request, value)
    first = prewarmed.take(request) if prewarmed is not None and ranks == 1 else None
    children = [first] if first is not None else []
    try:
        for rank in range(len(children), ranks):
            variables = {**environment, **_rank(rank, ranks)}
            children.append(_start(room, str(request), log, keep_open, variables))
        abandoned = _wait(children, stop_asked=stop_asked, tick=tick, grace=grace)
    except Hung:
        for child in children:
            _dump_stacks(child, log)
        raise
    finally:
        for child in children:
            _kill(child)
    tick()
    return _result(room, request, [None if c in abandoned else c.returncode for c in children])


def _rank(rank: int, ranks: int) -> dict[str, str]:
    """The variables that torch's launcher sets for a rank.

    A single child sees the first GPU only: trl refuses a process with several. It must be so before
    Python starts, since the first import that initialises CUDA fixes what is visible.
    """
    if ranks == 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")  # indices, UUIDs, or none at all
        return {"CUDA_VISIBLE_DEVICES": visible.partition(",")[0].strip()}
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
    """Wait for all `children`; returns those that were killed because another one had failed.

    After a stop request all get `grace` seconds.
    """
    deadline: float | None = None
    stopping = False
    abandoned: list[subprocess.Popen[bytes]] = []
    while alive := [child for child in children if child.poll() is None]:
        now = time.monotonic()
        if stop_asked() and not stopping:
            stopping, deadline = True, now + grace
            for child in alive:
                child.terminate()
        if deadline is None and any(child.returncode for child in children):
            deadline = now + PEER_SECONDS
        if deadline is not None and now > deadline:
            for child in alive:
                child.kill()  # the last checkpoint stays valid
            if not stopping:
                abandoned += alive
        tick()
        time.sleep(0.1)
    return abandoned


def _result(room: str, request: Path, statuses: Sequence[int | None]) -> dict[str, Any]:
    """Rank 0's result. Raises the first error in a result file, or ChildDied.

    `statuses` are the exit statuses, None for a child that was killed because another had failed.
    """
    replies: list[dict[str, Any]] = []
    for rank in range(len(statuses)):
        try:
            replies.append(files.read_json(result_path(request, rank)))
        except (FileNotFoundError, ValueError):  # absent, or not what the child wrote
            replies.append({})
    for reply in replies:
        if "error" in reply:
            raise from_json(reply["error"])
    broken = [
        status
        for status, reply in zip(statuses, replies, strict=True)
        if "ok" not in reply and status is not None
    ]
    if TransientError.exit_code in broken:  # there was no space for the result
        raise no_space(str(request.parent))
    if broken:  # a killed rank makes its peers fail: its signal is the cause
        raise ChildDied(room, min(1 if status > 0 else status for status in broken))
    result: dict[str, Any] = replies[0]["ok"]
    return result


class Prewarmed:
    """A child of `room` that loads its libraries before its request exists.

    It reads the name of its request from stdin. It ends with this process, or with the block.
    """

    def __init__(
        self,
        room: str,
        *,
        log: Path,
        keep_open: tuple[int, ...] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        variables = {**environment, **_rank(0, 1)}
        self._child: subprocess.Popen[bytes] | None = _start(
            room, ON_STDIN, log, keep_open, variables
        )

    def __enter__(self) -> Prewarmed:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            _kill(self._child)
            self._child = None

    def take(self, request: Path) -> subprocess.Popen[bytes] | None:
        """Hand `request` to the child and return it; None if it is gone or was taken before."""
        child, self._child = self._child, None
        if child is None or child.stdin is None:
            return None
        try:
            os.write(child.stdin.fileno(), f"{request}\n".encode())
        except OSError:  # it died
            _kill(child)
            return None
        return child


# torch's settings of its allocator of GPU memory; ignored on a CPU. Rows of changing length waste
# less of it in segments that grow.
ALLOCATOR = "PYTORCH_ALLOC_CONF"
PEER_SECONDS = 5.0  # that the other ranks get to end when one has failed
ON_STDIN = "-"  # in place of a request that will be named on stdin


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


def _kill(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.kill()
    child.wait()
    if child.stdin:
        child.stdin.close()


def _dump_stacks(child: subprocess.Popen[bytes], log: Path) -> None:
    """Have the child write its stacks to `log`, and wait up to 5 s; a SIGSTOPped one cannot."""
    size = log.stat().st_size
    child.send_signal(signal.SIGUSR1)
    for _ in range(50):
        time.sleep(0.1)
        before, size = size, log.stat().st_size
        if child.poll() is not None or size == before > 0:
            return


def clean_environment() -> dict[str, str]:
    """The environment of a child: ours without secrets, offline, with a fixed hash seed.

    A child reads local files only: the parent fetches everything and keeps the credentials. What
    the user set for torch's allocator stays.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not any(word in name.upper() for word in ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL"))
        and name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    }
    allocator = {} if "PYTORCH_CUDA_ALLOC_CONF" in kept else {ALLOCATOR: "expandable_segments:True"}
    return {**allocator, **kept} | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONUNBUFFERED": "1",
        # bitsandbytes compiles when it is imported: two seconds of inductor, for functions whose
        # results would differ from machine to machine. Remove it to compile on purpose.
        "TORCHDYNAMO_DISABLE": "1",
    }


def launch() -> None:
    """Run the module that the command line names, `ROOM REQUEST`.

    Before the module's imports, which take seconds, the child is tied to its parent: it ends when
    the parent is gone, and dumps the stacks of its threads to its log on SIGUSR1.
    """
    room = sys.argv.pop(1)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        follow_parent(requests)
    if sys.argv[1] == ON_STDIN:
        importlib.import_module(f"tuning.{room}")
        del sys.modules[f"tuning.{room}"]  # it runs below as __main__; its imports stay loaded
        sys.argv[1] = requests.get()
    runpy.run_module(f"tuning.{room}", run_name="__main__", alter_sys=True)


def follow_parent(requests: queue.SimpleQueue[str] | None = None) -> None:
    """End this child when its parent is gone: an orphan would hold GPU and lock.

    Lines that the parent writes meanwhile (`Prewarmed.take`) go to `requests`.
    """

    def watch() -> None:
        text = b""
        with contextlib.suppress(OSError, ValueError):
            while piece := os.read(0, 4096):
                *lines, text = (text + piece).split(b"\n")
                for line in lines:
                    if requests is not None:
                        requests.put(line.decode())
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    from tuning import process  # the module that others import, not this copy of it

    process.launch()
