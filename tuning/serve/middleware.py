"""ASGI middleware: API key or own host name, request size, content type, a log line per request.

With keys, every path but the probes' requires one, as `Authorization: Bearer KEY` or as the
password of HTTP Basic (any user), for which browsers prompt.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tuning.network import own_host
from tuning.serve import responses
from tuning.serve.schema import ApiError

logger = logging.getLogger(__name__)

PROBES = frozenset({"/health", "/healthz", "/readyz"})  # no key, no log line
MAX_HEADER_BYTES = 16 << 10
# A body that is too large is read to its end up to here: a client that is still sending when its
# connection is closed sees a reset and not the answer.
MAX_DISCARDED_BYTES = 64 << 20
RESPONSE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
)


class Middleware:
    """An ASGI application that wraps another."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[bytes],
        any_host: bool,
        max_body_bytes: Callable[[], int],
        is_draining: Callable[[], bool],
        count: Callable[[str, int], None],
    ) -> None:
        """`count` is called with the path and status of each request."""
        self._app, self._keys = app, tuple(keys)
        self._judges_host = not (keys or any_host)
        self._max_body_bytes, self._is_draining, self._count = max_body_bytes, is_draining, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reject the request, or pass it on with its complete body."""
        if scope["type"] != "http":
            return
        start, status = time.monotonic(), 0
        scope.setdefault("state", {})["note"] = {}

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), *RESPONSE_HEADERS]
                if self._is_draining():
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            await send(message)

        try:
            self._admit(scope)
            body = await self._body(scope, receive)
            if body is not None:
                await self._app(scope, _replay(body, receive), answer)
        except ApiError as error:
            await _reject(error, answer)
        finally:
            self._count(scope["path"], status)
            if scope["path"] not in PROBES:
                note = " ".join(f"{k}={v}" for k, v in scope["state"]["note"].items())
                seconds = time.monotonic() - start
                logger.info("%s %d %.3fs %s", scope["method"], status, seconds, note)

    def _admit(self, scope: Scope) -> None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise ApiError(431, f"the header may have {MAX_HEADER_BYTES:,} bytes")
        headers = dict(scope["headers"])
        host = headers.get(b"host")
        if self._judges_host and not own_host.is_own(host and host.decode("latin-1")):
            message = "this server answers to its address or a private name; with a key, to any"
            raise ApiError(421, message, code="unknown_host")
        if self._keys and scope["path"] not in PROBES and not self._is_authorized(headers):
            raise ApiError(401, "this server requires its API key", code="invalid_api_key")
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":  # another site's page cannot send it without CORS
                raise ApiError(415, "send JSON, with Content-Type: application/json")
            if headers.get(b"content-encoding", b"identity").lower() != b"identity":
                raise ApiError(415, "send the body uncompressed")

    def _is_authorized(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, credential = headers.get(b"authorization", b"").partition(b" ")
        credential = credential.strip()
        if scheme.lower() == b"basic":
            try:
                credential = base64.b64decode(credential, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return False
        elif scheme.lower() != b"bearer":
            return False
        # compares with every key, each in constant time
        return sum(hmac.compare_digest(credential, key) for key in self._keys) > 0

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The complete body; None if the client disconnected."""
        limit = self._max_body_bytes()
        too_large = ApiError(413, f"the body may have {limit:,} bytes")
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        if b"expect" in headers and not _is_at_most(declared, limit):
            raise too_large  # the client waits for an answer before it sends
        body, size, more = bytearray(), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            piece = message.get("body", b"")
            size += len(piece)
            if size <= limit:
                body += piece
            elif size > limit + MAX_DISCARDED_BYTES:
                break
            more = message.get("more_body", False)
        if size > limit:
            raise too_large
        return bytes(body)


def _is_at_most(number: bytes, limit: int) -> bool:
    return number.isdigit() and len(number) < 20 and int(number) <= limit


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns `body` first."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _reject(error: ApiError, send: Send) -> None:
    body = json.dumps(responses.error(error)).encode()
    headers: list[tuple[bytes, bytes]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if error.status == 401:
        headers.append((b"www-authenticate", b'Basic realm="tuning", charset="UTF-8"'))
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def note(scope: Scope, **facts: Any) -> None:
    """Add facts to the request's log line; never text of a prompt or an answer."""
    scope["state"]["note"].update(facts)
