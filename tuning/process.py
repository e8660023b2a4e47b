"""Child processes that return their result in a file.

The parent process owns signals, journal and exit code and never imports torch. Heavy phases run as
`python -m tuning.process ROOM REQUEST`, where REQUEST is a JSON file, and write
`<REQUEST stem>.result.json` beside it: `{"ok": value}` or `{"error": {...}}`. Only the file counts,
since a launcher may lose an exit code and a log may be cut. No file: the child was killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tuning import files, gpu_errors
from tuning.errors import TransientError, TuningError, from_json
from tuning.files import no_space, system_error


class ChildDied(Exception):
    """The child left no result: killed from outside (negative `status`) or broken by a bug."""

    def __init__(self, room: str, status: int) -> None:
        self.room, self.status = room, status
        super().__init__(f"tuning.{room} ended with status {status} and left no result")


class Apart(Exception):
    """The machines of a job did not meet."""


@dataclass(frozen=True)
class Group:
    """The ranks of one piece of work: on this machine, and its place among others."""

    ranks: int = 1  # of this machine
    nodes: int = 1  # machines
    node: int = 0  # this one's number
    meet: str = ""  # HOST:PORT of node 0, where several machines meet
    name: str = "tuning"  # equal on all machines
    patience: float = 600.0  # seconds that a machine waits for the others
    grace: float = 25.0  # seconds between SIGTERM and SIGKILL


class Hung(Exception):
    """The child showed no progress for `seconds`. Raised by a `tick`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"no progress for {seconds:.0f} s")


def result_path(request: Path, rank: int = 0) -> Path:
    """The result file of `request`; each rank above 0 has its own beside it."""
    suffix = f".{rank}" if rank else ""
    return request.with_name(request.name.removesuffix(".json") + f"{suffix}.result.json")


def statuses_path(request: Path) -> Path:
    """Where the launcher of several ranks says how they ended."""
    return request.with_name(request.name.removesuffix(".json") + ".ranks.json")


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Run `work` on the request that argv names and write its result; returns the exit status.

    A TuningError is passed on as it is. Any other exception is a bug: its traceback goes to stderr
    and into the result file.
    """
    request = Path(sys.argv[1])
    result = result_path(request, int(os.environ.get("RANK", "0")))
    result.unlink(missing_ok=True)  # a launcher may start a rank again
    try:
        files.write_json(result, {"ok": work(files.read_json(request))})
        return 0
    except TuningError as error:
        files.write_json(result, {"error": error.to_json()})
        return _leave(error.exit_code)
    except Exception as error:
        failed = system_error(error) or gpu_errors.known(error)
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
    group: Group | None = None,
) -> dict[str, Any]:
    """Run `tuning.<room>` on `value` in a child process and return its result.

    A `group` of several ranks is started by LAUNCHER, with the same request and torchrun's
    environment (RANK, WORLD_SIZE, ...). Rank 0's result counts; when one fails all are ended.

    `log` takes what the child prints. `keep_open` are file descriptors it inherits, such as the run
    directory's lock, which then holds as long as any process may write (ranks of a group end
    with their launcher, whose standard input they share). `tick` is called about ten
    times a second; if it raises Hung, the child dumps its stacks to `log` and is killed. A live
    `prewarmed` child is used in place of a new one. When `stop_asked` turns true the child gets
    SIGTERM, once, and `grace` seconds to end. Raises the child's own error, ChildDied, or what
    `tick` raises.
    """
    group = group or Group()
    several = group.ranks * group.nodes > 1
    mine = range(group.node * group.ranks, (group.node + 1) * group.ranks)
    for path in (statuses_path(request), *(result_path(request, rank) for rank in mine)):
        path.unlink(missing_ok=True)
    files.write_json(request, value)
    child = prewarmed.take(request) if prewarmed is not None and not several else None
    if child is None and several:
        options = [str(request), room, json.dumps(asdict(replace(group, grace=grace)))]
        variables = {**environment, NODE: str(group.node)}
        child = _start(LAUNCHER, options, log, keep_open, variables)
    elif child is None:
        child = _start(room, [str(request)], log, keep_open, {**environment, **_only_gpu()})
    try:
        _wait(child, stop_asked=stop_asked, tick=tick, grace=grace)
    except Hung:
        _dump_stacks(child, log)
        raise
    finally:
        _kill(child)
    tick()
    statuses = _statuses(request, child.returncode) if several else {0: child.returncode}
    return _result(room, request, {rank: statuses.get(rank) for rank in mine})


def _only_gpu() -> dict[str, str]:
    """A single child sees the first GPU only: trl refuses a process with several.

    It must be so before Python starts, since the first import that initialises CUDA fixes what is
    visible.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")  # indices, UUIDs, or none at all
    return {"CUDA_VISIBLE_DEVICES": visible.partition(",")[0].strip()}


def _wait(
    child: subprocess.Popen[bytes],
    *,
    stop_asked: Callable[[], bool],
    tick: Callable[[], None],
    grace: float,
) -> None:
    """Wait for `child`, which gets `grace` seconds after a stop request."""
    deadline: float | None = None
    while child.poll() is None:
        now = time.monotonic()
        if deadline is None and stop_asked():
            deadline = now + grace
            child.terminate()
        if deadline is not None and now > deadline:
            child.kill()  # the last checkpoint stays valid
        tick()
        time.sleep(0.1)


def _statuses(request: Path, launcher: int) -> dict[int, int]:
    """How those ranks ended that failed first, as the launcher says. Raises Apart.

    It ended with the status `launcher`.
    """
    try:
        said = files.read_json(statuses_path(request))
    except (FileNotFoundError, ValueError):  # it was killed, and its ranks end with it
        return {0: launcher or 1}
    if "apart" in said:
        raise Apart(said["apart"])
    return {int(rank): int(status) for rank, status in said["ranks"].items()}


def _result(room: str, request: Path, statuses: Mapping[int, int | None]) -> dict[str, Any]:
    """The first rank's result. Raises the first error in a result file, or ChildDied.

    `statuses` are the exit statuses, None for one that succeeded or ended because another failed.
    """
    replies: list[dict[str, Any]] = []
    for rank in statuses:
        try:
            replies.append(files.read_json(result_path(request, rank)))
        except (FileNotFoundError, ValueError):  # absent, or not what the child wrote
            replies.append({})
    for reply in replies:
        if "error" in reply:
            raise from_json(reply["error"])
    broken = [
        1 if status is None and "bug" in reply else status
        for status, reply in zip(statuses.values(), replies, strict=True)
        if "ok" not in reply
    ]
    known = [status for status in broken if status is not None]
    if TransientError.exit_code in known:  # there was no space for the result
        raise no_space(str(request.parent))
    if broken:  # a killed rank makes its peers fail: its signal is the cause
        raise ChildDied(room, min((1 if s > 0 else s for s in known), default=0))
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
        variables = {**environment, **_only_gpu()}
        self._child: subprocess.Popen[bytes] | None = _start(
            room, [ON_STDIN], log, keep_open, variables
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
LAUNCHER = "training.launch"  # starts several ranks
NODE = "TUNING_NODE"  # environment variable of ranks: their machine's number
_SECRET = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "_KEY")  # in names of variables
ON_STDIN = "-"  # in place of a request that will be named on stdin


def _start(
    room: str,
    arguments: Sequence[str],
    log: Path,
    keep_open: tuple[int, ...],
    environment: Mapping[str, str],
) -> subprocess.Popen[bytes]:
    with log.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "tuning.process", room, *arguments],
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
        if not any(word in name.upper() for word in _SECRET)
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
    if NODE in os.environ and "LOCAL_RANK" in os.environ:  # torch numbers machines as they come
        first = int(os.environ[NODE]) * int(os.environ["LOCAL_WORLD_SIZE"])
        os.environ["RANK"] = str(first + int(os.environ["LOCAL_RANK"]))
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        follow_parent(requests)
    if sys.argv[1] == ON_STDIN:
        gc.disable()  # what is imported stays: looking through it costs a seventh of the time
        importlib.import_module(f"tuning.{room}")
        gc.freeze()
        gc.enable()
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
