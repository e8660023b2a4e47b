"""A proxy on loopback that passes HTTP on, but for the requests that it is told to spoil.

    with Proxy(("127.0.0.1", port)) as proxy:
        proxy.spoil(drop_reply, method="PATCH")                    # handled, but nobody hears of it
        proxy.spoil(status(429, retry_after=1), method="PUT", nth=2)
        proxy.spoil(reset_after(1000), path=r"/blobs/", times=3)   # RST at byte 1000 of the body
        ... talk to proxy.port ...

A fault is a function of a `Turn`, so a test may bring its own. `proxy.seen` lists what was asked.
Bodies of requests are read into memory; those of replies are streamed, so that a watch works too.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

PIECE = 1 << 16
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "proxy-connection"}


@dataclass
class Reply:
    """An answer: from upstream (its body still to be read) or made up."""

    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: Any = b""  # bytes, or an http.client.HTTPResponse

    def header(self, name: str) -> str:
        return next((v for k, v in self.headers if k.lower() == name.lower()), "")

    def replace(self, name: str, value: str) -> None:
        kept = [(k, v) for k, v in self.headers if k.lower() != name.lower()]
        self.headers = [*kept, (name, value)]

    def pieces(self) -> Iterator[bytes]:
        if isinstance(self.body, bytes):
            yield self.body
            return
        while piece := self.body.read1(PIECE):
            yield piece

    def content(self) -> bytes:
        return b"".join(self.pieces())


@dataclass
class Seen:
    """One request, as the proxy saw it."""

    method: str
    path: str
    headers: dict[str, str]
    received: int = 0  # bytes of its body
    status: int | None = None  # what the client was told; None if nothing

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.status}"


class Turn:
    """One request on its way: what a fault has in its hands."""

    def __init__(self, proxy: Proxy, handler: BaseHTTPRequestHandler, seen: Seen) -> None:
        self.proxy, self.handler, self.seen = proxy, handler, seen
        self._body: bytes | None = None

    @property
    def body(self) -> bytes:
        """The whole body of the request."""
        if self._body is None:
            self._body = b"".join(self.read())
        return self._body

    def read(self) -> Iterator[bytes]:
        """The body in pieces, as they come."""
        source, left = self.handler.rfile, int(self.seen.headers.get("content-length", 0))
        if "chunked" in self.seen.headers.get("transfer-encoding", ""):
            while size := int(source.readline().partition(b";")[0] or b"0", 16):
                piece = source.read(size)
                source.readline()
                self.seen.received += len(piece)
                yield piece
            source.readline()
        while left > 0 and (piece := source.read1(min(left, PIECE))):
            left -= len(piece)
            self.seen.received += len(piece)
            yield piece

    def forward(self) -> Reply:
        """Let upstream handle the request; its answer."""
        host, port = self.proxy.upstream
        connection = http.client.HTTPConnection(host, port, timeout=60)
        try:
            connection.putrequest(
                self.seen.method, self.seen.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.handler.headers.items():
                if name.lower() not in HOP_BY_HOP | {"content-length"}:
                    connection.putheader(name, value)
            if self.body or self.seen.method in ("POST", "PUT", "PATCH"):
                connection.putheader("Content-Length", str(len(self.body)))
            connection.putheader("Connection", "close")
            connection.endheaders(self.body or None)
            response = connection.getresponse()
        except BaseException:  # upstream is gone: do not leave the socket to the collector
            connection.close()
            raise
        headers = [(k, v) for k, v in response.getheaders() if k.lower() not in HOP_BY_HOP]
        return Reply(response.status, headers, response)

    def answer(self, reply: Reply, *, cut: int | None = None, reset: bool = True) -> None:
        """Tell the client; with `cut`, break off after so many bytes of the body."""
        self.seen.status = reply.status
        handler = self.handler
        if self._body is None and self.seen.headers.get("content-length", "0") != "0":
            handler.close_connection = True  # the rest of the body is still on its way
        bodiless = self.seen.method == "HEAD" or reply.status in (204, 304)
        sized = reply.header("content-length") or bodiless
        if isinstance(reply.body, bytes) and not bodiless:
            reply.replace("Content-Length", str(len(reply.body)))
            sized = True
        handler.send_response_only(reply.status)
        for name, value in reply.headers:
            handler.send_header(name, value)
        if not sized:
            handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for piece in () if bodiless else reply.pieces():
            if cut is not None and len(piece) >= cut:
                handler.wfile.write(piece[:cut])
                handler.close_connection = True
                return self.reset() if reset else None
            cut = None if cut is None else cut - len(piece)
            handler.wfile.write(piece if sized else b"%x\r\n%b\r\n" % (len(piece), piece))
            handler.wfile.flush()
        if not sized:
            handler.wfile.write(b"0\r\n\r\n")
        if cut is not None:
            self.reset()

    def reset(self) -> None:
        """End with a RST instead of an answer."""
        linger = struct.pack("ii", 1, 0)
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.handler.close_connection = True
        with contextlib.suppress(OSError):
            # closes at once, although the handler's files still hold the socket
            self.handler.connection.shutdown(socket.SHUT_RD)
        self.handler.rfile.close()
        self.handler.connection.close()
        self.handler.wfile = io.BytesIO()  # the handler flushes it


Fault = Callable[[Turn], None]


def drop_reply(turn: Turn) -> None:
    """Upstream has done it, but the answer is lost."""
    turn.forward().content()
    turn.reset()


def refuse(turn: Turn) -> None:
    """The connection breaks before anything was handled."""
    turn.reset()


def reset_after(size: int) -> Fault:
    """The connection breaks when `size` bytes of the body have come; upstream saw none."""

    def fault(turn: Turn) -> None:
        for _ in turn.read() if size else ():
            if turn.seen.received >= size:
                break
        turn.reset()

    return fault


def cut_reply(size: int, *, reset: bool = True) -> Fault:
    """The connection ends after `size` bytes of the answer; a RST may lose some of them."""
    return lambda turn: turn.answer(turn.forward(), cut=size, reset=reset)


def status(code: int, body: bytes = b"", **headers: str | int) -> Fault:
    """Answer with `code` in upstream's place."""
    lines = [(name.replace("_", "-"), str(value)) for name, value in headers.items()]

    def fault(turn: Turn) -> None:
        _ = turn.body
        turn.answer(Reply(code, list(lines), body))

    return fault


def edit(change: Callable[[Reply], None]) -> Fault:
    """Pass on, with the answer changed."""

    def fault(turn: Turn) -> None:
        reply = turn.forward()
        change(reply)
        turn.answer(reply)

    return fault


def run(action: Callable[[], object], then: Fault | None = None) -> Fault:
    """Do something (kill the server, say) when the request comes, then go on."""

    def fault(turn: Turn) -> None:
        _ = turn.body
        action()
        if then:
            then(turn)
        else:
            turn.answer(turn.forward())

    return fault


@dataclass
class _Rule:
    fault: Fault
    method: str | None
    path: re.Pattern[str]
    nth: int
    times: int | None
    met: int = 0

    def strikes(self, seen: Seen) -> bool:
        if self.method not in (None, seen.method) or not self.path.search(seen.path):
            return False
        self.met += 1
        return self.met >= self.nth and (self.times is None or self.met < self.nth + self.times)


class Proxy:
    """The proxy; a context manager. `tls` is a context with its certificate."""

    def __init__(self, upstream: tuple[str, int], *, tls: ssl.SSLContext | None = None) -> None:
        self.upstream = upstream
        self.seen: list[Seen] = []
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        if tls:
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> Self:
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def spoil(
        self,
        fault: Fault,
        *,
        method: str | None = None,
        path: str = "",
        nth: int = 1,
        times: int | None = 1,
    ) -> None:
        """Apply `fault` to the `nth` to `nth + times - 1` request that matches (None: for ever)."""
        self._rules.append(_Rule(fault, method, re.compile(path), nth, times))

    def mend(self) -> None:
        """No more faults."""
        with self._lock:
            self._rules.clear()

    def struck(self) -> bool:
        """Whether every fault has had its turn."""
        return all(rule.met >= rule.nth for rule in self._rules)

    def received(self) -> int:
        """Bytes of all requests' bodies."""
        return sum(seen.received for seen in self.seen)

    def _take(self, turn: Turn) -> None:
        with self._lock:
            self.seen.append(turn.seen)
            struck = [rule for rule in self._rules if rule.strikes(turn.seen)]
        if struck:
            struck[0].fault(turn)
        else:
            self.pass_on(turn)

    def pass_on(self, turn: Turn) -> None:
        """What happens to a request that no fault strikes."""
        turn.answer(turn.forward())

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60

            def take(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                turn = Turn(proxy, self, Seen(self.command, self.path, headers))
                try:
                    proxy._take(turn)
                except (OSError, http.client.HTTPException):
                    turn.reset()  # one of the two is gone

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = take

            def log_message(self, *_: object) -> None:
                pass

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        pass  # broken connections are the business here
