"""uvicorn's HTTP protocol with timeouts for slow clients.

uvicorn waits for ever for a request that does not arrive, and for a client that does not read.
Here both connections are aborted after a timeout, which cancels their requests as if the client
had disconnected. h11 limits header lines (see `server`).
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

TIMEOUT_SECONDS = 30.0


class TimeoutProtocol(H11Protocol):
    """One connection."""

    timeout_seconds = TIMEOUT_SECONDS  # to receive a request, and to empty a full send buffer
    _receive_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _idle_since: float | None = None  # None during a request

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last response, or since the client connected."""
        return 0.0 if self._idle_since is None else self.loop.time() - self._idle_since

    def connection_made(self, transport: Any) -> None:
        """Start the receive timer."""
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._receive_timer = self.loop.call_later(self.timeout_seconds, self._abort)

    def data_received(self, data: bytes) -> None:
        """Stop the receive timer when the request is complete."""
        self._idle_since = None
        super().data_received(data)
        incomplete = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if incomplete and self._receive_timer is None and not self.transport.is_closing():
            self._receive_timer = self.loop.call_later(self.timeout_seconds, self._abort)
        elif not incomplete:
            _cancel(self._receive_timer)
            self._receive_timer = None

    def on_response_complete(self) -> None:
        """Note that the connection is idle."""
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Start the send timer: the send buffer is full."""
        super().pause_writing()
        self._send_timer = self.loop.call_later(self.timeout_seconds, self._abort)

    def resume_writing(self) -> None:
        """Stop the send timer."""
        super().resume_writing()
        _cancel(self._send_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop both timers."""
        _cancel(self._receive_timer)
        _cancel(self._send_timer)
        super().connection_lost(exc)

    def _abort(self) -> None:
        self.transport.abort()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
