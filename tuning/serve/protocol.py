"""uvicorn's HTTP, with an end to patience.

uvicorn waits for ever for a request whose bytes do not come, and for a client that does not read.
Here both connections are cut after a while; what runs for them is then cancelled as for any client
that went away. Header lines are bounded by h11 (see `server`).
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 30.0


class Patient(H11Protocol):
    """One connection."""

    seconds = SECONDS  # for a whole request to come, and for a full send buffer to empty
    _arriving: asyncio.TimerHandle | None = None
    _leaving: asyncio.TimerHandle | None = None
    _since: float | None = None  # when it fell silent; None while something is asked or answered

    @property
    def silent(self) -> float:
        """Seconds since the last answer, or since the client connected and said nothing."""
        return 0.0 if self._since is None else self.loop.time() - self._since

    def connection_made(self, transport: Any) -> None:
        """A client is there, and should say something."""
        super().connection_made(transport)
        self._since = self.loop.time()
        self._arriving = self.loop.call_later(self.seconds, self._cut)

    def data_received(self, data: bytes) -> None:
        """Some bytes of a request, or the rest of it."""
        self._since = None
        super().data_received(data)
        incomplete = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if incomplete and self._arriving is None and not self.transport.is_closing():
            self._arriving = self.loop.call_later(self.seconds, self._cut)
        elif not incomplete:
            _stop(self._arriving)
            self._arriving = None

    def on_response_complete(self) -> None:
        """An answer is out."""
        self._since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is answered."""
        super().pause_writing()
        self._leaving = self.loop.call_later(self.seconds, self._cut)

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        _stop(self._leaving)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        _stop(self._arriving)
        _stop(self._leaving)
        super().connection_lost(exc)

    def _cut(self) -> None:
        self.transport.abort()


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
