"""The listening socket. No torch, so that a port in use is reported at once."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from collections.abc import Iterator

from tuning.errors import SpecError
from tuning.serve.options import Options

MAX_CONNECTIONS = 1024
SEND_BUFFER = 128 << 10  # bytes that the kernel buffers for a client that does not read


@contextlib.contextmanager
def socket_for(options: Options) -> Iterator[socket.socket]:
    """A listening socket, closed at the end of the block. Raises SpecError.

    From here on SIGTERM ends the process with 0, until the server sets its own handler. (The
    first process of a container ignores signals without a handler.)
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    host, port = options.host, options.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
    except OSError as error:
        what = f"{host}:{port} cannot be used ({error.strerror})"
        change = "choose another --port or --host"
        raise SpecError.at("SERVE-104", "--port", what, change) from None
    with listener:
        # Accepted connections inherit both. asyncio disables Nagle's algorithm only for sockets
        # whose protocol number is TCP's, which create_server does not set.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        yield listener
