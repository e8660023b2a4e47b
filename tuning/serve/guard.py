"""What every request passes before a route sees it: key, size, kind, and a line in the log.

With a key, every path but `/healthz` and `/readyz` wants it, as `Authorization: Bearer KEY`, or as
the password of HTTP's Basic (any user), which is what a browser asks its person for.
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

from tuning.serve import replies
from tuning.serve.schema import Refusal

logger = logging.getLogger(__name__)

OPEN = frozenset({"/healthz", "/readyz"})
HEADERS = 16 << 10  # bytes
COMMON = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
)


class Guard:
    """An ASGI application in front of another."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[bytes],
        largest: Callable[[], int],
        draining: Callable[[], bool],
        done: Callable[[str, int], None],
    ) -> None:
        """`largest`: bytes of a body; `done` gets the path and status of each request."""
        self._app, self._keys = app, tuple(keys)
        self._largest, self._draining, self._done = largest, draining, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on with the whole body read."""
        if scope["type"] != "http":
            return
        start, status = time.monotonic(), 0
        scope.setdefault("state", {})["note"] = {}

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), *COMMON]
                if self._draining():
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            await send(message)

        try:
            self._admit(scope)
            body = await self._body(scope, receive)
            if body is not None:
                await self._app(scope, _again(body, receive), answer)
        except Refusal as refusal:
            await _refuse(refusal, answer)
        finally:
            self._done(scope["path"], status)
            if scope["path"] not in OPEN:
                note = " ".join(f"{k}={v}" for k, v in scope["state"]["note"].items())
                seconds = time.monotonic() - start
                logger.info("%s %d %.3fs %s", scope["method"], status, seconds, note)

    def _admit(self, scope: Scope) -> None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADERS:
            raise Refusal(431, f"the header may have {HEADERS:,} bytes")
        headers = dict(scope["headers"])
        if self._keys and scope["path"] not in OPEN and not self._known(headers):
            raise Refusal(401, "this server wants its API key", code="invalid_api_key")
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":  # what a foreign web page may send is another kind
                raise Refusal(415, "send JSON, with Content-Type: application/json")
            if headers.get(b"content-encoding", b"identity").lower() != b"identity":
                raise Refusal(415, "send the body uncompressed")

    def _known(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        given = given.strip()
        if kind.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return False
        elif kind.lower() != b"bearer":
            return False
        # each in constant time, and all of them
        return sum(hmac.compare_digest(given, key) for key in self._keys) > 0

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client went away."""
        largest = self._largest()
        too_large = Refusal(413, f"the body may have {largest:,} bytes")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > largest:
            raise too_large
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > largest:
                raise too_large
            more = message.get("more_body", False)
        return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """`receive` with the body that was read, once; then what the client does next."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(refusal: Refusal, send: Send) -> None:
    body = json.dumps(replies.error(refusal)).encode()
    headers: list[tuple[bytes, bytes]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b'Basic realm="tuning", charset="UTF-8"'))
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def note(scope: Scope, **facts: Any) -> None:
    """Facts for the request's line in the log: never words of a prompt or an answer."""
    scope["state"]["note"].update(facts)
