"""Pods that answer badly: real sockets, one behaviour each."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jobs.api.kinds import Object

Behaviour = Callable[[socket.socket], None]


def _head(length: str = "", *more: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", "Content-Type: application/json", *more]
    lines += [f"Content-Length: {length}"] if length else []
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n"


def _slowly(connection: socket.socket, parts: Iterator[bytes]) -> None:
    for part in parts:
        connection.sendall(part)
        time.sleep(0.2)


def _endlessly(connection: socket.socket, head: bytes, part: bytes) -> None:
    connection.sendall(head)
    while True:
        connection.sendall(part)


def document(body: bytes, *more: str) -> Behaviour:
    """Answers with this body, and closes."""
    return lambda connection: connection.sendall(_head(str(len(body)), *more) + body)


def _deep(opening: bytes, closing: bytes, count: int) -> Behaviour:
    return document(b'{"step": ' + opening * count + b"1" + closing * count + b"}")


GOOD = document(b'{"step": 3, "steps": 9}')
HOSTILE: dict[str, Behaviour] = {
    "a byte at a time": lambda c: _slowly(c, (b"x" for _ in itertools.count())),
    "a status line, then a header at a time": lambda c: _slowly(
        c, itertools.chain([b"HTTP/1.1 200 OK\r\n"], (b"a: b\r\n" for _ in itertools.count()))
    ),
    "a body, a byte at a time": lambda c: _slowly(
        c, itertools.chain([_head("60000")], (b"[" for _ in itertools.count()))
    ),
    "endless headers": lambda c: _endlessly(c, b"HTTP/1.1 200 OK\r\n", b"x-header: value\r\n" * 99),
    "a header without end": lambda c: _endlessly(c, b"HTTP/1.1 200 OK\r\nx: ", b"y" * 9999),
    "endless informational answers": lambda c: _endlessly(c, b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "endless chunks": lambda c: _endlessly(
        c, _head("", "Transfer-Encoding: chunked"), b"5\r\n[[[[[\r\n"
    ),
    "a chunk of 16 EiB": document(b"ffffffffffffffff\r\n[", "Transfer-Encoding: chunked"),
    "no chunk at all": lambda c: _slowly(
        c, itertools.chain([_head("", "Transfer-Encoding: chunked")], (b"" for _ in range(99)))
    ),
    "a body without end": lambda c: _endlessly(c, _head(), b"[" * 4096),
    "a body that is promised": lambda c: (c.sendall(_head("9" * 30) + b"{}"), time.sleep(9))[0],
    "a length that is no number": document(b"{", f"Content-Length: {'9' * 5000}"),
    "a length below zero": lambda c: c.sendall(_head("-1") + b"[" * 60_000),
    "accepts and says nothing": lambda c: time.sleep(9),
    "closes at once": lambda c: None,
    "60 kB of brackets": document(b"[" * 60_000),
    "60 kB of objects": document(b'{"a":' * 12_000),
    "balanced brackets": document(b"[" * 30_000 + b"]" * 30_000),
    "a list in a field": _deep(b"[", b"]", 900),
    "objects in a field": _deep(b'{"a":', b"}", 5_000),
    "quotes without end": document(b'"\\' * 30_000),
    "a number of 60,000 digits": document(b'{"step": ' + b"9" * 60_000 + b"}"),
    "not a number": document(b'{"step": NaN, "loss": -Infinity, "steps": 1e999}'),
    "gzip that grows": document(gzip.compress(b" " * (64 << 20)), "Content-Encoding: gzip"),
    "no UTF-8": document(b'{"step": "\xff\xfe"}'),
    "a lone surrogate": document(b'{"step": "\\ud800", "reason": "\\udfff"}'),
    "a list": document(b"[1, 2]"),
    "another protocol": lambda c: c.sendall(b"SSH-2.0-OpenSSH_9\r\n"),
    "a status that is none": lambda c: c.sendall(b"HTTP/1.1 999999 \r\n\r\n{}"),
    "elsewhere": lambda c: c.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/\r\n\r\n"),
    "an error with a body without end": lambda c: _endlessly(
        c, b"HTTP/1.1 500 Oh\r\n\r\n", b"x" * 4096
    ),
}  # fmt: skip


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[int]:
    """The port of a server on loopback that treats every connection so."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    kept: list[socket.socket] = []

    def treat(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.recv(4096)
            behaviour(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                kept.append(connection)
                threading.Thread(target=treat, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        listener.close()
        for connection in kept:
            connection.close()


def pod(name: str = "a", namespace: str = "team") -> Object:
    """A pod on loopback."""
    meta = {"name": name, "namespace": namespace, "uid": f"uid-{namespace}-{name}"}
    return {"metadata": meta, "status": {"podIP": "127.0.0.1"}}
