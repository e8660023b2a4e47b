"""Strikes a real run at an exact point of its life: a file, a journal line, a request.

    aim = kills.Aim("os.rename", "MANIFEST.json", room="tuning.training.train")
    kills.Run(command, aim=aim).end()

starts the command and gives how it ended. The product has no hook for this: a `sitecustomize` on
the path of the run and its children (`faults/site`) listens to Python's audit events. `act` is what
happens there: "kill" ends the parent by SIGKILL, and the child has to die with it; "term" sends the
parent SIGTERM; the name of a signal, "memory" (a MemoryError) and "exhaust" (memory, until the
kernel kills) strike the process itself; "fill" fills the disk with the file `marker`; "hang" stands
still.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from faults.proxy import Fault, Proxy, Turn

SITE = Path(__file__).parent / "site"


@dataclass(frozen=True)
class Aim:
    """The `nth` audit event of a kind whose arguments match `text`, in the process of a room."""

    event: str
    text: str  # a regular expression
    room: str = ""  # "tuning" is the parent, "tuning.training.train" a child; any if empty
    nth: int = 1
    after: bool = False  # strike when it has happened, not before
    seconds: float = 0.0  # strike so much later
    act: str = "kill"


@dataclass(frozen=True)
class Ended:
    """How a run ended: its status (negative: by that signal), and what it said."""

    status: int
    out: str
    err: str


class Run:
    """A `python -m tuning ...` that is under way."""

    def __init__(
        self,
        command: Sequence[object],
        *,
        aim: Aim | None = None,
        marker: Path | None = None,
        start: Sequence[str] = ("-m", "tuning"),
        more: Sequence[str] = (),
    ) -> None:
        variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if aim:
            variables |= {"AIM": json.dumps(asdict(aim)), "PYTHONPATH": str(SITE)}
        if marker:
            variables |= {"AIM_MARKER": str(marker)}
        self.process = subprocess.Popen(
            [sys.executable, *start, *map(str, command), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | variables,
        )

    def send(self, number: int) -> None:
        """Send the parent a signal."""
        self.process.send_signal(number)

    def end(self, seconds: float = 250) -> Ended:
        """Wait for the end, also of what the parent left behind."""
        try:
            # stderr of children is their log, so this ends with the parent
            out, err = self.process.communicate(timeout=seconds)
        finally:
            self.process.kill()
        return Ended(self.process.returncode, out, err)


def killing(proxy: Proxy, run: list[Run], *, method: str, path: str, before: bool = False) -> None:
    """Have `proxy` kill the last of `run` at a request: before upstream sees it, or after."""

    def fault(turn: Turn) -> None:
        if not before:
            turn.forward().content()
        run[-1].send(signal.SIGKILL)
        turn.reset()

    strike: Fault = fault
    proxy.spoil(strike, method=method, path=path)


def released(folder: Path, seconds: float = 20) -> None:
    """Wait until nobody holds the lock of a run directory: all its processes are gone."""
    if not (folder / ".lock").exists():
        return
    deadline = time.monotonic() + seconds
    with (folder / ".lock").open() as lock:
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, "a child has outlived its parent"
                time.sleep(0.01)
