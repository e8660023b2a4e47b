"""The address a server listens on. No torch: a port that is taken is told at once."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from collections.abc import Iterator

from tuning.errors import SpecError
from tuning.serve.options import Options

CONNECTIONS = 1024
BUFFER = 128 << 10  # bytes that the system keeps for a client that does not read


@contextlib.contextmanager
def socket_for(options: Options) -> Iterator[socket.socket]:
    """A listening socket for as long as the block runs. Raises SpecError.

    From here on SIGTERM ends the process with 0; the server has more to say of it later. (The first
    process of a container does not end by a signal that it has not asked for.)
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    host, port = options.host, options.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except OSError as error:
        what = f"{host}:{port} cannot be used ({error.strerror})"
        change = "name another --port, or another --host"
        raise SpecError.at("SERVE-104", "--port", what, change) from None
    with listener:
        # Inherited by what is accepted. asyncio turns Nagle's delay off only where it sees TCP's
        # number, which create_server does not set.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        yield listener
