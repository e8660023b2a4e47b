"""HTTP requests to our pods: a run's progress and a server's readiness report.

A pod runs what a tenant named, so its responses are untrusted: one deadline bounds a whole
exchange, and size, headers and nesting have limits. Failed exchanges cost their namespace a debt,
so that a tenant's slow pods take `_SHARE` of one worker's time at most.
"""

from __future__ import annotations

import http.client
import io
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from jobs.api import nesting
from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import Object
from jobs.manifests import server as server_manifests
from jobs.manifests.pod import PORT

log = logging.getLogger(__name__)

DEADLINE = 1.5  # seconds for a whole exchange: enough for one lost packet
MAX_BYTES = 64 * 1024  # of a response, headers included
_MAX_PARTS = 100
_BACKOFF = 60.0  # seconds without requests to a pod that did not answer
_SHARE = 0.1  # of a worker's time, for one namespace's failed exchanges
_CREDIT = 150.0  # seconds of a namespace's debt until its pods have to wait
_SLOW, _MAX_SLOW = 0.25, 2  # seconds, and exchanges of one namespace that last longer
_FAILURES = (ApiError, OSError, http.client.HTTPException, ValueError)


class Poll:
    """GETs a JSON object from pods. `fetch` replaces the direct connection to `port`."""

    def __init__(
        self,
        *,
        port: int = PORT,
        path: str = "/progress",
        fetch: Callable[[Object], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch or (lambda pod: nesting.loads_untrusted(get(pod, port, path)))
        self._clock = clock
        self._paused_until: dict[str, float] = {}  # by pod UID
        self._paid_at: dict[str, float] = {}  # namespace -> when its debt is paid
        self._running: dict[str, list[float]] = {}  # namespace -> starts of its exchanges
        self._lock = threading.Lock()

    def __call__(self, pod: Object) -> dict[str, Any] | None:
        """The object that `pod` returns; None if it fails, or must not be asked now."""
        meta, start = pod["metadata"], self._clock()
        uid, namespace = meta["uid"], meta.get("namespace", "")
        with self._lock:
            running = self._running.get(namespace, [])
            if (
                start < self._paused_until.get(uid, 0.0)
                or start + _CREDIT < self._paid_at.get(namespace, 0.0)
                or sum(start - each > _SLOW for each in running) >= _MAX_SLOW
            ):
                return None
            self._running[namespace] = [*running, start]
        document = None
        try:
            found = self._fetch(pod)
            document = found if isinstance(found, dict) else None
        except _FAILURES as error:
            log.debug("no answer from the pod %s: %s", meta.get("name"), type(error).__name__)
        finally:
            self._end(uid, namespace, start, failed=document is None)
        return document

    def _end(self, uid: str, namespace: str, start: float, *, failed: bool) -> None:
        now = self._clock()
        with self._lock:
            self._running[namespace].remove(start)
            if not self._running[namespace]:
                del self._running[namespace]
            if failed:
                debt = max(now, self._paid_at.get(namespace, 0.0)) + (now - start) / _SHARE
                self._paid_at = _later(self._paid_at, now) | {namespace: debt}
                self._paused_until = _later(self._paused_until, now) | {uid: now + _BACKOFF}


def _later(times: dict[str, float], now: float) -> dict[str, float]:
    return {key: until for key, until in times.items() if until > now}


class PollServer:
    """GETs a server's /readyz from its pod, or, if that fails, through the API server's proxy."""

    def __init__(self, cluster: Cluster) -> None:
        port, path = server_manifests.PORT, "/readyz"
        self._direct = Poll(port=port, path=path)
        self._proxied = Poll(
            fetch=lambda pod: cluster.proxy_get(
                pod, port, path, seconds=DEADLINE, max_bytes=MAX_BYTES
            )
        )

    def __call__(self, pod: Object) -> dict[str, Any] | None:
        """The report, or None."""
        return self._direct(pod) or self._proxied(pod)


def get(pod: Object, port: int, path: str, *, seconds: float = DEADLINE) -> bytes:
    """The body of a pod's response with the status 200. Raises OSError, HTTPException, ValueError.

    No library for HTTP bounds a whole exchange: their time-outs are those of each `recv`.
    """
    until = time.monotonic() + seconds
    address = (pod.get("status") or {}).get("podIP")
    if not address:
        raise ValueError("the pod has no address")
    host = f"[{address}]" if ":" in address else address
    request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
    with socket.create_connection((address, port), timeout=seconds) as connection:
        connection.sendall(request.encode("ascii"))
        stream = _Bounded(connection, until, MAX_BYTES)
        response = http.client.HTTPResponse(stream)  # type: ignore[arg-type]  # makefile is enough
        response.begin()
        if response.status != http.HTTPStatus.OK:
            raise ValueError(f"status {response.status}")
        parts = []
        while part := response.read1(MAX_BYTES):
            parts.append(part)
            if len(parts) > _MAX_PARTS:  # thousands of tiny ones would cost only us
                raise ValueError("the response comes in too many parts")
        return b"".join(parts)


class _Bounded(io.RawIOBase):
    """What a connection receives until a moment, and not more than some bytes."""

    def __init__(self, connection: socket.socket, until: float, left: int) -> None:
        self._connection, self._until, self._left = connection, until, left

    def makefile(self, mode: str) -> io.BufferedReader:
        """As of a socket, for http.client."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As of any raw stream; TimeoutError and ValueError beyond the bounds."""
        seconds = self._until - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the deadline of the exchange")
        if self._left <= 0:
            raise ValueError("the response is too long")
        self._connection.settimeout(seconds)
        count = self._connection.recv_into(memoryview(buffer)[: self._left])
        self._left -= count
        return count
