"""A server's start and end: keys, what is refused, who waits, and SIGTERM under load."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import servers
import serving
from fake_hub import FakeHub
from servers import Server

from tuning.serve import api
from tuning.serve.options import Limits
from tuning.serve.service import Service

KEY = "0123456789abcdef-key"
OTHER = "fedcba9876543210-key"
TRIALS = int(os.environ.get("SOAK", "4"))
ASKED = {"messages": [{"role": "user", "content": "cat"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good adapter, one that does not fit, two keys."""
    folder = tmp_path_factory.mktemp("process")
    serving.random_adapter(serving.TINY, folder / "good")
    other = json.loads((folder / "good" / "adapter_config.json").read_text())
    (folder / "bad").mkdir()
    (folder / "bad" / "adapter_config.json").write_text(
        json.dumps(other | {"auto_mapping": {"a": 1}})
    )
    (folder / "bad" / "adapter_model.safetensors").write_bytes(
        (folder / "good" / "adapter_model.safetensors").read_bytes()
    )
    (folder / "keys").write_text(f"{KEY}\n{OTHER}\n")
    return folder


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[Server]:
    """A server with two keys, a good adapter, one that is refused, and one that is not there."""
    arguments = [
        *("--base", str(serving.TINY), "--api-key-file", str(folder / "keys")),
        *("--adapter", f"good={folder / 'good'}", "--adapter", f"bad={folder / 'bad'}"),
        *("--adapter", f"gone=oci:{folder / 'gone'}"),
    ]
    with servers.serving(folder, *arguments) as running:
        yield running


Start = Callable[..., Server]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """`start(**settings)`: a server more, child of one process that has imported everything."""
    folder = tmp_path_factory.mktemp("trials")
    environment = os.environ | {"PYTHONPATH": str(servers.ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(Path(servers.__file__).parent / "serve_trials.py"), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=servers.ROOT,
        env=environment,
    ) as parent:
        assert parent.stdin and parent.stdout
        given, told = parent.stdin, parent.stdout

        def more(*, ready: bool = True, **settings: Any) -> Server:
            given.write(json.dumps(settings) + "\n")
            given.flush()
            pid, log = json.loads(told.readline())
            process: Any = Child(pid, parent)
            port = int(servers.waited(process, Path(log), r"Listening on http://\S+:(\d+)"))
            if ready:
                servers.waited(process, Path(log), r"Ready: (.*)")
            return Server(process, port, Path(log))

        yield more
        given.close()
        parent.wait(60)


WITH_KEY = {"Authorization": f"Bearer {KEY}"}


# The key


def routes() -> list[tuple[str, str]]:
    inner: Any = api.app(Service("base", "base", Limits()))._app
    return [
        (method, route.path.replace("{name:path}", "tiny-model"))
        for route in inner.routes
        for method in sorted(route.methods)
    ]


def test_every_route_but_health_wants_the_key(locked: Server) -> None:
    """The whole route table, and paths that are on no route."""
    others = [("GET", "/docs"), ("GET", "/openapi.json"), ("POST", "/v1/load"), ("GET", "//")]
    table = [*routes(), *others, ("OPTIONS", "/v1/models"), ("GET", "/healthz/../v1/models")]
    assert 15 < len(table)
    for method, path in table:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Token {KEY}"}):
            status = ask(locked, method, path, header)
            assert (path in ("/health", "/healthz", "/readyz")) == (status != 401), (
                method,
                path,
                status,
            )


def ask(running: Server, method: str, path: str, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    connection.request(method, path, b"{}", servers.JSON | headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_either_key_opens_and_a_browser_may_ask_for_it(locked: Server) -> None:
    """As a bearer token from the client, or as a password with any user; never in the log."""
    for key in (KEY, OTHER):
        with servers.client(locked, key) as client:
            assert 2 == len(client.models.list().data)
    with servers.client(locked, KEY[:-1]) as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    command = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-u", f"anybody:{KEY}"]
    page = subprocess.run([*command, f"{locked.url}/"], capture_output=True, text=True, check=True)
    assert "200" == page.stdout
    _, _, reply = locked.ask("/")
    assert any("Basic" in value for value in reply.headers.get_all("WWW-Authenticate") or ())
    assert KEY not in locked.log.read_text()


# What is refused


def test_a_refused_adapter_is_named_and_the_others_are_served(locked: Server) -> None:
    """Ready, with the reason for whoever looks; all together would be another model."""
    status, state, _ = locked.ask("/readyz")
    assert (200, "ready") == (status, state["status"])
    assert [("bad", "MODEL-203"), ("gone", "IMAGE-110")] == [
        (one["name"], one["code"]) for one in state["refused"]
    ]
    _, listed, _ = locked.ask("/v1/models", headers=WITH_KEY)
    assert ["tiny-model", "good"] == [one["id"] for one in listed["data"]]
    for model, status in (("good", 200), ("bad", 404), ("tuned", 404), (None, 404)):
        body = ASKED | {"model": model, "max_tokens": 1}
        found, answer, _ = locked.ask("/v1/chat/completions", body, headers=WITH_KEY)
        assert status == found
        assert status == 200 or "adapter bad, gone was refused" in answer["error"]["message"]
    assert 2.0 == locked.metric("tuning_serve_adapters_refused", WITH_KEY)
    assert "MODEL-203" in locked.log.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--precision", "8bit"], 2, "SERVE-106 --precision"),
        (["--adapter", "x"], 2, "SERVE-101 --adapter x"),
        (["--api-key-file", "README"], 11, "SERVE-103 README"),
        (["--host", "192.0.2.1"], 11, "SERVE-104 --port"),
    ],
)
def test_a_wrong_command_line_is_told_before_anything_is_loaded(
    arguments: list[str], code: int, said: str
) -> None:
    """One line and an exit code, before torch is imported."""
    environment = os.environ | {"PYTHONPATH": str(servers.ROOT)}
    command = [sys.executable, "-X", "importtime", "-m", "tuning", "serve", "--port", "0"]
    command += ["--base", "examples/tiny-model", *arguments]
    found = subprocess.run(
        command, capture_output=True, text=True, cwd=servers.ROOT, env=environment, timeout=60
    )

    assert code == found.returncode
    assert said in found.stderr
    assert "| torch\n" not in found.stderr


def test_a_base_that_cannot_be_loaded_ends_the_server(start: Start) -> None:
    """Probes were answered until then; the reason is its last line, and its exit code."""
    running = start(ready=False, base="examples/data", delay=0.5)
    assert (503, "loading") == ready(running)
    assert 200 == running.ask("/healthz")[0]

    assert 11 == running.process.wait()
    assert "config.json" in running.log.read_text().splitlines()[-1]


def ready(running: Server) -> tuple[int, str]:
    status, state, _ = running.ask("/readyz")
    return status, state["status"]


# Who waits


def test_who_sends_or_reads_slowly_is_cut_off(start: Start) -> None:
    """With a timeout of one second: half a header, half a body, an answer that nobody reads."""
    running = start(timeout=1.0)
    halves = (
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n",
        b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{",
    )
    for half in halves:
        with running.connect() as connection:
            connection.sendall(half)
            assert b"" == connection.recv(100)
    asked = {"max_tokens": 1900, "min_tokens": 1900, "stream": True, "n": 4}
    body = json.dumps(ASKED | asked | {"logprobs": True, "top_logprobs": 20}).encode()
    head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with running.connect() as connection:
        path = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
        connection.sendall(path + head.encode() + body)
        end = time.monotonic() + 60
        while not running.metric("tuning_serve_cancelled_total"):
            assert time.monotonic() < end
            time.sleep(0.1)
        assert running.idle(5)


def test_time_is_limited(start: Start) -> None:
    """An answer that takes too long ends as it is, and makes room; one that never began is told."""
    running = start(seconds=1.0)
    body = ASKED | {"max_tokens": 1900, "min_tokens": 1900}

    for _ in range(20):  # on a busy machine the first token may take more than the second
        status, answer, _ = running.ask("/v1/chat/completions", body)
        if status == 200:
            break
        assert (503, "timeout") == (status, answer["error"]["code"])

    assert (200, "length") == (status, answer["choices"][0]["finish_reason"])
    assert 0 < answer["usage"]["completion_tokens"] < 1900
    assert running.idle(5)


# SIGTERM


class Clients:
    """Eight clients behind a Service: they ask as long as the server is ready, as a probe finds it.

    What became of every request is kept.
    """

    def __init__(self, running: Server) -> None:
        self.running, self.stop = running, threading.Event()
        self.dropped: list[str] = []
        self.answered = 0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, args=(n,)) for n in range(8)]
        for thread in [*self._threads, threading.Thread(target=self._probe)]:
            thread.start()

    def _probe(self) -> None:
        while self.running.ask("/readyz")[0] == 200:
            time.sleep(0.05)
        self.stop.set()

    def _work(self, number: int) -> None:
        body = ASKED | {"max_tokens": 24, "min_tokens": 24, "stream": bool(number % 2)}
        data = json.dumps(body).encode()
        connection: http.client.HTTPConnection | None = None
        while not self.stop.is_set():
            connection = connection or http.client.HTTPConnection("127.0.0.1", self.running.port)
            connection = self._ask(connection, data, streamed=bool(number % 2))
        if connection is not None:
            connection.close()

    def _ask(self, connection: Any, data: bytes, *, streamed: bool) -> Any:
        """One request on this connection; gives it back if another may follow."""
        try:
            connection.request("POST", "/v1/chat/completions", data, servers.JSON)
            reply = connection.getresponse()
            text = reply.read()
        except (OSError, http.client.HTTPException) as error:
            with self._lock:
                self.dropped.append(repr(error))
            connection.close()
            return None
        whole = text.endswith(b"data: [DONE]\n\n") if streamed else text.startswith(b'{"id"')
        with self._lock:
            if reply.status == 200 and whole:
                self.answered += 1
            else:
                self.dropped.append(f"{reply.status} {text[-80:]!r}")
        if reply.will_close:
            connection.close()
            return None
        return connection

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


class Child:
    """A server that another process waits for."""

    def __init__(self, pid: int, parent: subprocess.Popen[str]) -> None:
        self.pid, self._parent = pid, parent

    def poll(self) -> int | None:
        return self._parent.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        assert self._parent.stdout
        pid, code = json.loads(self._parent.stdout.readline())
        assert pid == self.pid
        return int(code)


def test_sigterm_under_load_drops_nothing(start: Start) -> None:
    """Not ready at once, then everything that was asked is answered, and the exit code is 0.

    Fifty times: make soak.
    """
    answered = 0
    for trial in range(TRIALS):
        running = start(linger=1.5, grace=60.0)
        assert (200, "ready") == ready(running)
        clients = Clients(running)
        while clients.answered < 8 + trial % 8:
            assert [] == clients.dropped
            time.sleep(0.01)
        running.terminate()
        assert servers.waited(running.process, running.log, "(Stopping)")
        assert (503, "draining") == ready(running)
        code = running.process.wait()
        clients.join()
        assert (0, []) == (code, clients.dropped)
        answered += clients.answered

    assert answered > TRIALS * 16


def test_sigterm_while_loading_ends_at_once(start: Start) -> None:
    """Being told to stop is obeyed before the model is there."""
    running = start(ready=False, delay=60.0)
    assert (503, "loading") == ready(running)
    assert 503 == running.ask("/v1/models")[0]
    running.terminate()

    assert 0 == running.process.wait()


def test_the_base_may_be_another_commit_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is named answers; one that the hub does not have is refused by name."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with FakeHub() as hub:
        commit = hub.add("org/model", serving.TINY)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        with servers.serving(tmp_path, "--base", "org/model", "--base-revision", commit) as running:
            _, told, _ = running.ask("/v1/models")
            assert ["org/model"] == [model["id"] for model in told["data"]]
        command = [sys.executable, "-m", "tuning", "serve", "--base", "org/model", "--port", "0"]
        done = subprocess.run(
            [*command, "--base-revision", "0" * 40], cwd=servers.ROOT, capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip

    assert 12 == done.returncode
    assert f"HUB-103 org/model: has no revision {'0' * 40}" in done.stderr
