"""A small web server on loopback whose every path misbehaves in its own way.

    with Origin() as origin:
        origin.serve("/a.jsonl", body)                      # a good file: ETag, Range, If-Range
        origin.serve("/b.jsonl", body, cut_at=1000)         # resets at byte 1000, once
        origin.answer("/c", 404)
        origin.route("/d", lambda request: ...)             # anything else

`origin.requests` lists what was asked, in order.
"""

from __future__ import annotations

import hashlib
import io
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Behaviour = Callable[["Request"], None]


@dataclass
class Request:
    """One GET as the server sees it, and the ways to answer it."""

    handler: BaseHTTPRequestHandler
    count: int  # 1 for the first request of this path
    released: threading.Event  # set when the server closes: end of every stall

    @property
    def headers(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.handler.headers.items()}

    def head(self, status: int, **headers: str | int) -> None:
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), str(value))
        self.handler.send_header("Connection", "close")
        self.handler.end_headers()
        self.handler.close_connection = True

    def body(self, data: bytes) -> None:
        self.handler.wfile.write(data)
        self.handler.wfile.flush()

    def stall(self) -> None:
        self.released.wait(30)

    def reset(self) -> None:
        """End with a RST instead of a FIN."""
        linger = struct.pack("ii", 1, 0)
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.handler.connection.close()
        self.handler.wfile = io.BytesIO()  # the handler flushes it


@dataclass
class Origin:
    """The server; a context manager. `tls` is a context with its certificate."""

    tls: ssl.SSLContext | None = None
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._routes: dict[str, Behaviour] = {}
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        if self.tls:
            self._server.socket = self.tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = self._server.server_address[1]

    def __enter__(self) -> Self:
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def url(self, path: str, *, host: str = "127.0.0.1") -> str:
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{path}"

    def asked(self, path: str) -> list[dict[str, str]]:
        """The headers of each request of `path`."""
        return [headers for asked, headers in self.requests if asked.partition("?")[0] == path]

    def route(self, path: str, behaviour: Behaviour) -> str:
        self._routes[path] = behaviour
        return self.url(path)

    def answer(self, path: str, status: int, body: bytes = b"", **headers: str | int) -> str:
        def behave(request: Request) -> None:
            request.head(status, Content_Length=len(body), **headers)
            request.body(body)

        return self.route(path, behave)

    def serve(
        self,
        path: str,
        body: bytes,
        *,
        cut_at: int | None = None,  # how many bytes of a body until it breaks off
        cuts: int = 1,  # how often
        reset: bool = True,  # with a RST, which may lose bytes on the way; else with a FIN
        ranges: bool = True,
        etag: str | None = None,
        **headers: str | int,
    ) -> str:
        """A file as good servers serve it, but for what the arguments say."""
        tag = f'"{etag or hashlib.md5(body).hexdigest()}"'

        def behave(request: Request) -> None:
            start = 0
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
            if match and ranges and request.headers.get("if-range", tag) == tag:
                start = int(match[1])
            end = int(match[2]) + 1 if match and match[2] and ranges else len(body)
            rest = body[start : min(end, len(body))]
            common: dict[str, Any] = {"Content_Length": len(rest), "ETag": tag, **headers}
            if match and ranges and request.headers.get("if-range", tag) == tag:
                stop = start + len(rest) - 1
                request.head(206, Content_Range=f"bytes {start}-{stop}/{len(body)}", **common)
            else:
                request.head(200, **common)
            if cut_at is not None and request.count <= cuts and len(rest) > cut_at:
                request.body(rest[:cut_at])
                if reset:
                    request.reset()
            else:
                request.body(rest)

        return self.route(path, behave)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        origin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                with origin._lock:
                    origin.requests.append(
                        (self.path, {k.lower(): v for k, v in self.headers.items()})
                    )
                    count = origin._counts[path] = origin._counts.get(path, 0) + 1
                request = Request(self, count, origin._released)
                behaviour = origin._routes.get(path)
                try:
                    if behaviour is None:
                        request.head(404, Content_Length=0)
                    else:
                        behaviour(request)
                except (ConnectionError, ssl.SSLError):
                    pass  # the client had enough

            def log_message(self, *_: object) -> None:
                pass

        return Handler
