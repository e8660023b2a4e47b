"""Connections that keep to a policy: the host is resolved once, and each address is checked.

The connection goes to exactly a checked address, with SNI and Host kept.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from tuning.network.answer import StrictResponse
from tuning.network.policy import NotAllowed, Policy
from tuning.network.tls import tls

Manager = TypeVar("Manager", bound=urllib3.PoolManager)
Resolver = Callable[[str, int], Sequence[str]]  # host, port -> addresses, best first


def lookup(host: str, port: int) -> list[str]:
    """The addresses of `host` as the system resolves them, without repetitions."""
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


class _UntilClosed(StrictResponse):
    """A response whose end is where the server closes, if it promised to close.

    http.client stops at the announced length and never sees that the server sent more.
    """

    def begin(self) -> None:
        super().begin()
        if self.will_close and self.length:
            self.length = None


class _Plain(HTTPConnection):
    response_class = StrictResponse


class _Secure(HTTPSConnection):
    response_class = StrictResponse


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Plain


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Secure


def strict(manager: Manager) -> Manager:
    """`manager`, which from now on reads answers strictly."""
    manager.pool_classes_by_scheme = {"http": _PlainPool, "https": _SecurePool}
    return manager


def opener(policy: Policy, *, resolve: Resolver = lookup) -> urllib3.PoolManager:
    """A pool manager whose connections keep to `policy`.

    A request raises NotAllowed before anything is sent.
    """

    class Plain(HTTPConnection):
        response_class = _UntilClosed

        def _new_conn(self) -> socket.socket:
            return _connect(self, policy, resolve)

    class Secure(HTTPSConnection):
        response_class = _UntilClosed

        def _new_conn(self) -> socket.socket:
            return _connect(self, policy, resolve)

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Secure

    manager = urllib3.PoolManager(num_pools=32, ssl_context=tls(policy.ca_bundle))
    manager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}
    return manager


def _connect(connection: HTTPConnection, policy: Policy, resolve: Resolver) -> socket.socket:
    """A socket to the first checked address of the connection's host that answers."""
    host, port = connection.host.strip("[]"), connection.port
    try:
        addresses = resolve(host, port)
    except socket.gaierror as error:
        raise NameResolutionError(host, connection, error) from error
    for address in addresses:  # all of them, before the first is used
        if not policy.allows(host, port, address):
            raise NotAllowed(host, address)
    failure: OSError = OSError("it has no address")
    for address in addresses:
        try:
            sock = socket.create_connection((address, port), connection.timeout)
        except OSError as error:
            failure = error
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    if isinstance(failure, TimeoutError):
        raise ConnectTimeoutError(connection, "no answer") from failure
    raise NewConnectionError(connection, failure.strerror or str(failure)) from failure
