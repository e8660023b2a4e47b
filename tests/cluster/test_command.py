"""The operator as its image starts it: a process that is stopped, frozen, and cut off."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import bed
from cluster.world import SUCCESS, World, wait, workspace

from jobs.api import client
from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import LEASE, WORKSPACE, Object
from jobs.controller import watch

ROOT = Path(__file__).parents[2]


class Gate:
    """A way to the API server that can be shut: refused outside, cut inside."""

    def __init__(self, port: int) -> None:
        self._to, self._ways = port, list[socket.socket]()
        self.mute = False  # what comes in is taken, and nothing comes of it
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        self._threads = list[threading.Thread]()
        self._start(self._take, self._door)

    def open(self) -> None:
        self._door = socket.create_server(("127.0.0.1", self.port))
        self._start(self._take, self._door)

    def shut(self) -> None:
        for each in (self._door, *self._ways):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._ways, self._threads = [], []

    def _start(self, target: Any, *arguments: socket.socket) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _take(self, door: socket.socket) -> None:
        with door, contextlib.suppress(OSError):
            while True:
                inside, _ = door.accept()
                outside = socket.create_connection(("127.0.0.1", self._to))
                self._ways += [inside, outside]
                self._start(self._pass, inside, outside)

    def _pass(self, inside: socket.socket, outside: socket.socket) -> None:
        to = {inside: outside, outside: inside}
        with inside, outside, contextlib.suppress(OSError):
            while True:
                for ready in select.select([inside, outside], [], [])[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    if self.mute:
                        continue
                    to[ready].sendall(data)


class Process:
    """`python -m jobs run`, and what it logs."""

    def __init__(self, kubeconfig: Path, folder: Path, world: World, name: str) -> None:
        options = folder / "options.yaml"
        asked = {"namespaces": [world.namespace], "operatorNamespace": world.namespace}
        options.write_text(yaml.safe_dump(asked))
        self.log = folder / f"{name}.log"
        command = [sys.executable, "-m", "jobs", "run", "--port", "0"]
        command += ["--kubeconfig", str(kubeconfig), "--options", str(options)]
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stderr=file, env=os.environ | {"POD_NAME": name}
            )

    def lines(self) -> list[Object]:
        """The log: every line is a JSON object."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def leads(self) -> bool:
        return any("leading" in line["message"] for line in self.lines())

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def start(server: bed.Bed, world: World, tmp_path: Path) -> Iterator[Any]:
    """Starts operators; none is left behind."""
    made: list[Process] = []

    def one(name: str, kubeconfig: Path = server.kubeconfig) -> Process:
        made.append(Process(kubeconfig, tmp_path, world, name))
        return made[-1]

    try:
        yield one
    finally:
        for each in made:
            if each.process.poll() is None:
                each.process.kill()
                each.process.wait()


def test_a_watch_that_fell_silent_is_given_up(server: bed.Bed, world: World) -> None:
    """Open and dead, as behind a lost route: an error ten seconds after its time, not hours."""
    gate = Gate(int(server.ports["APISERVER_PORT"]))
    config = yaml.safe_load(server.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{gate.port}"
    proxied = server.folder / "cfg" / "silent.kubeconfig"
    proxied.write_text(yaml.safe_dump(config))
    with client.connect(str(proxied), threads=1) as behind:
        *_, (_, version) = behind.pages(WORKSPACE, world.namespace)
        gate.mute = True
        start = time.monotonic()
        with pytest.raises(ApiError) as silent:
            list(behind.watch(WORKSPACE, world.namespace, labels="", version=version, seconds=1))
        gate.shut()
    assert 0 == silent.value.status
    assert time.monotonic() - start < 20
    assert watch.WATCH + client.CONNECT <= 60


def holder(api: Cluster, world: World) -> str:
    lease = api.get(LEASE, world.namespace, "tuning-operator") or {"spec": {}}
    return str(lease["spec"].get("holderIdentity") or "")


def test_a_stopped_operator_hands_over(api: Cluster, world: World, start: Any) -> None:
    """SIGTERM gives the lease back: exit 0, and the other one leads within seconds."""
    first = start("first")
    wait(first.leads)
    second = start("second")
    world.apply(workspace("a", world.namespace))
    wait(world.jobs)
    assert not second.leads()
    assert 0 == first.end()
    stopped = time.monotonic()
    wait(second.leads, 10)
    assert time.monotonic() - stopped < 10
    assert holder(api, world).startswith("second")
    world.apply(workspace("b", world.namespace))
    wait(lambda: len(world.jobs()) == 2)
    assert 0 == second.end()
    assert "" == holder(api, world)


def test_a_frozen_operator_ends_when_it_wakes(api: Cluster, world: World, start: Any) -> None:
    """Stopped for longer than its lease: the other leads; it writes nothing and ends with 1."""
    frozen = start("frozen")
    wait(frozen.leads)
    os.kill(frozen.process.pid, signal.SIGSTOP)
    other = start("other")
    world.apply(workspace("a", world.namespace))
    wait(other.leads, 40)
    wait(world.jobs)
    pod = wait(world.pods)[0]
    world.end(pod, 0, SUCCESS)
    wait(lambda: world.status("a").get("state") == "Succeeded")
    before = world.get("a")["metadata"]["resourceVersion"]
    os.kill(frozen.process.pid, signal.SIGCONT)
    assert 1 == frozen.process.wait(40)
    assert any("lease lost" in line["message"] for line in frozen.lines())
    assert before == world.get("a")["metadata"]["resourceVersion"]
    assert holder(api, world).startswith("other")


def test_an_outage_is_sat_out(server: bed.Bed, world: World, start: Any, tmp_path: Path) -> None:
    """Connections cut, then refused for longer than the lease, while a run ends: the process stays
    alive without writing, and within 30 s of the server's return all is told."""
    gate = Gate(int(server.ports["APISERVER_PORT"]))
    config = yaml.safe_load(server.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{gate.port}"
    proxied = tmp_path / "through.kubeconfig"
    proxied.write_text(yaml.safe_dump(config))
    operator = start("cut-off", proxied)
    world.apply(workspace("a", world.namespace))
    pod = wait(world.pods)[0]
    world.run(pod)
    wait(lambda: world.status("a").get("state") == "Running")
    job = world.jobs()[0]["metadata"]
    gate.shut()
    world.end(pod, 0, SUCCESS)
    wait(lambda: any("lease lost" in line["message"] for line in operator.lines()), 40)
    assert not any("exception" in line for line in operator.lines())
    assert "Running" == world.status("a")["state"]
    assert job["uid"] == world.jobs()[0]["metadata"]["uid"]
    early = start("too-early", proxied)
    assert 20 == early.process.wait(40)
    assert "JOB-113" in early.log.read_text()
    gate.open()
    back = time.monotonic()
    wait(lambda: world.status("a").get("state") == "Succeeded", 40)
    assert time.monotonic() - back < 30
    assert operator.process.poll() is None
    assert 2 == sum("leading" in line["message"] for line in operator.lines())
    assert [job["uid"]] == [each["metadata"]["uid"] for each in world.jobs()]
    gate.shut()
