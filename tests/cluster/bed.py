"""A real API server for tests: started on free ports, stopped and removed at the end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuning-kubernetes"
BINARIES = CACHE / "bin"
RUNNING = CACHE / "running"  # a file for each cluster that is up: its folder
_started = dict[Path, list[subprocess.Popen[bytes]]]()  # down.sh ends the last one of each


@dataclass(frozen=True)
class Bed:
    """A running API server."""

    kubeconfig: Path
    folder: Path
    ports: dict[str, str]  # environment of the scripts

    def script(self, name: str, *arguments: str) -> str:
        """Run one of the scripts against this server; gives its output."""
        return _run(name, *arguments, ports=self.ports)

    @contextmanager
    def without(self, controller: str) -> Iterator[None]:
        """The controller manager without one of its controllers, for the block."""
        note = self.folder / "run" / "kcm.pid"
        process = Path(f"/proc/{note.read_text().strip()}")
        command = process.joinpath("cmdline").read_bytes().decode().rstrip("\0").split("\0")
        less = [f"{a},-{controller}" if a.startswith("--controllers=") else a for a in command]
        os.kill(int(process.name), signal.SIGKILL)
        with self._manager(less, note):
            yield
        # started anew: its parent is this process now, and down.sh stops it by its note
        self._start(command, note)

    @contextmanager
    def _manager(self, command: list[str], note: Path) -> Iterator[None]:
        process = self._start(command, note)
        try:
            yield
        finally:
            process.kill()
            process.wait()

    def _start(self, command: list[str], note: Path) -> subprocess.Popen[bytes]:
        port = next(int(a.partition("=")[2]) for a in command if a.startswith("--secure-port="))
        end = time.monotonic() + 60
        while _listens(port) and time.monotonic() < end:
            time.sleep(0.05)
        with (self.folder / "logs" / "kcm.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        note.write_text(str(process.pid))
        _started.setdefault(self.folder, []).append(process)
        while not _listens(port) and time.monotonic() < end:
            time.sleep(0.05)
        return process


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def missing(*programs: str) -> str | None:
    """One line that says what the test bed lacks, or None."""
    absent = [name for name in programs if not (BINARIES / name).exists()]
    if not absent:
        return None
    return f"the Kubernetes test bed lacks {', '.join(absent)} in {BINARIES}: run `make test-bed`"


@contextmanager
def up(folder: Path, mode: str = "control-plane") -> Iterator[Bed]:
    """A cluster in `folder`, for as long as the block lasts."""
    if gap := missing("kube-apiserver", "kube-controller-manager"):
        raise RuntimeError(gap)
    sweep()
    note = RUNNING / f"{os.getpid()}-{folder.name}"
    note.parent.mkdir(exist_ok=True)
    note.write_text(str(folder))
    ports = dict(zip(("APISERVER_PORT", "ETCD_PORT", "KCM_PORT", "EXT_PORT"), _free(), strict=True))
    try:
        told = _run("up.sh", mode, str(folder), ports=ports)
        found = re.search(r"^export KUBECONFIG=(.*)$", told, re.M)
        assert found, told
        yield Bed(Path(found[1]), folder, ports)
    finally:
        _down(folder)
        for process in _started.pop(folder, []):
            process.wait(10)
        note.unlink()


def sweep() -> None:
    """Stop the clusters of test processes that were killed before they could do it."""
    for note in RUNNING.glob("*-*"):
        pid = int(note.name.partition("-")[0])
        if not Path(f"/proc/{pid}").exists():
            _down(Path(note.read_text()))
            note.unlink(missing_ok=True)


def _down(folder: Path) -> None:
    subprocess.run([SCRIPTS / "down.sh", str(folder), "--purge"], check=False, timeout=280)


def _run(name: str, *arguments: str, ports: dict[str, str]) -> str:
    done = subprocess.run(
        [SCRIPTS / name, *arguments],
        env=os.environ | ports,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def _free() -> list[str]:
    """Four free ports; etcd takes the one above its own, too."""
    while True:
        with ExitStack() as held:
            sockets = [held.enter_context(socket.socket()) for _ in range(5)]
            for each in sockets[:4]:
                each.bind(("127.0.0.1", 0))
            numbers = [each.getsockname()[1] for each in sockets[:4]]
            try:
                sockets[4].bind(("127.0.0.1", numbers[1] + 1))
            except OSError:
                continue
        return [str(number) for number in numbers]
