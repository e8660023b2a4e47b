"""Which hosts data may come from, and connections that keep to it.

A job fetches what its author names, from inside a network that trusts the job: metadata services,
databases, the API server. So a host is judged by what it resolves to, not by its name alone: it is
resolved once, every address is checked, and the connection goes to exactly a checked address, with
SNI and Host kept. Nothing from the environment (proxies, netrc) changes that.
"""

from __future__ import annotations

import functools
import http.client
import ipaddress
import logging
import os
import re
import socket
import ssl
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import certifi
import urllib3
from pydantic import BaseModel, ByteSize, ConfigDict, Field
from pydantic.alias_generators import to_camel
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from tuning.errors import Problem, SpecError
from tuning.spec import policy_file, urls

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Sequence[str]]  # host, port -> addresses, best first
Headers = Mapping[str, Mapping[str, str]]  # host (or host:port) -> headers that it alone gets

GIB = 1 << 30
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")  # all that was ever handed out to the public
_NOT_PUBLIC = (ipaddress.ip_network("3fff::/20"), ipaddress.ip_network("192.88.99.0/24"))
_OTHER_KEY = re.compile("[A-Z][A-Z0-9_]*")
# Cloud services that no allowed *name* opens; an administrator can still list the address itself.
_METADATA = ("168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254")


class NotAllowed(Exception):
    """`host` leads to `address`, which the policy closes. No connection was made."""

    def __init__(self, host: str, address: str) -> None:
        self.host, self.address = host, address
        super().__init__(f"{host} is at {address}")


@dataclass(frozen=True)
class Policy:
    """What an administrator (or, locally, the command line) allows for the fetching of data.

    `allow_hosts` holds hosts, `host:port`, `*.domain` or networks such as 10.0.0.0/8 that may be
    private. Sizes in bytes.
    """

    allow_hosts: Collection[str] = frozenset()
    plain_http: bool = True  # to public hosts, with a warning; allowed hosts may always use it
    proxy: str | None = None  # it resolves names itself, so that addresses are its business
    no_proxy: Collection[str] = frozenset()
    ca_bundle: Path | None = None  # beside the system's certificates
    max_file_bytes: int = 256 * GIB
    max_total_bytes: int = 1024 * GIB
    require_checksums: bool = False

    @classmethod
    def load(cls, path: Path) -> Policy:
        """The section `data` of the policy file at `path`. Raises SpecError with all problems.

        data:
          allowHosts: [minio.corp:9000, "*.data.corp", 10.20.0.0/16]
          plainHttp: false
          proxy: http://proxy.corp:3128
          noProxy: ["*.corp"]
          caBundle: corp.pem           # beside the policy file
          maxFileSize: 256GiB
          maxTotalSize: 1TiB
          requireChecksums: false
        """
        return policy_file.section(path, "data", _Data).policy(path.parent)

    def with_hosts(self, hosts: Iterable[str]) -> Policy:
        """This policy with more allowed hosts (`--allow-host`)."""
        return replace(self, allow_hosts=frozenset({*self.allow_hosts, *map(str.lower, hosts)}))

    def allows_name(self, host: str, port: int) -> bool:
        """True if somebody answers for `host` by its name."""
        return _listed(host, port, self.allow_hosts)

    def allows(self, host: str, port: int, address: str) -> bool:
        """True if a connection to `host` may go to `address`."""
        try:
            where = ipaddress.ip_address(address)
        except ValueError:
            return False
        if any(where in network for network in self._networks()):
            return True
        if self.allows_name(host, port) and not is_metadata(where):
            return True
        return is_public(where)

    def refusal(self, url: str) -> str | None:
        """What is wrong with the text of `url`, or None."""
        try:
            _, host, port = place(url)
        except ValueError:
            return urls.INVALID
        reachable = _is_address(host) and self.allows(host, port, host)
        opened = (host,) if reachable or self.allows_name(host, port) else ()
        refusal = urls.refusal(url, allow_hosts=opened)
        if refusal is None and _is_address(host) and not reachable:
            return urls.LOCAL_ADDRESS
        return refusal

    def uses_proxy(self, host: str, port: int) -> bool:
        """True if a request to `host` goes through the proxy."""
        return self.proxy is not None and not _listed(host, port, self.no_proxy)

    def _networks(self) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        return [network for entry in self.allow_hosts if (network := _network(entry))]


class _Data(BaseModel):
    """The section `data` of the policy file, as an administrator writes it."""

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel)

    allow_hosts: list[str] = Field(default_factory=list)
    plain_http: bool = True
    proxy: str | None = Field(None, pattern=r"^https?://[^\s@]+$")
    no_proxy: list[str] = Field(default_factory=list)
    ca_bundle: Path | None = None
    max_file_size: ByteSize = Field(default=ByteSize(256 * GIB), gt=0)
    max_total_size: ByteSize = Field(default=ByteSize(1024 * GIB), gt=0)
    require_checksums: bool = False

    def policy(self, folder: Path) -> Policy:
        return Policy(
            allow_hosts=frozenset(map(str.lower, self.allow_hosts)),
            plain_http=self.plain_http,
            proxy=self.proxy,
            no_proxy=frozenset(map(str.lower, self.no_proxy)),
            ca_bundle=folder / self.ca_bundle if self.ca_bundle else None,
            max_file_bytes=int(self.max_file_size),
            max_total_bytes=int(self.max_total_size),
            require_checksums=self.require_checksums,
        )


def _listed(host: str, port: int, entries: Collection[str]) -> bool:
    host = host.lower().rstrip(".").strip("[]")
    spelled = f"[{host}]" if ":" in host else host
    if entries and {host, spelled, f"{spelled}:{port}"} & set(entries):
        return True
    return any(entry.startswith("*.") and host.endswith(entry[1:]) for entry in entries)


def _network(entry: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    if "/" not in entry:  # an address alone opens URLs that spell it, not names that lead to it
        return None
    try:
        return ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return None


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def is_public(address: Address) -> bool:
    """True for an address of the public internet that is not this cluster's own API server."""
    if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL_IPV6:
        return False
    if any(address in network for network in _NOT_PUBLIC):
        return False
    return urls.is_public(address) and str(address) != os.environ.get("KUBERNETES_SERVICE_HOST")


def is_metadata(address: Address) -> bool:
    """True for the addresses where clouds keep the credentials of a machine."""
    inner = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (inner or address).is_link_local or str(inner or address) in _METADATA


def lookup(host: str, port: int) -> list[str]:
    """The addresses of `host` as the system knows them, without repetitions."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class _UntilClosed(http.client.HTTPResponse):
    """A response whose end is where the server closes, if it promised to close.

    http.client stops at the announced length and never sees that the server sent more.
    """

    def begin(self) -> None:
        super().begin()
        if self.will_close and self.length:
            self.length = None


def opener(policy: Policy, *, resolve: Resolver = lookup) -> urllib3.PoolManager:
    """Where requests start: every connection it makes keeps to `policy`.

    Raises NotAllowed out of a request, before anything is sent.
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


def through_proxy(policy: Policy) -> urllib3.PoolManager:
    """Where requests start that go through the policy's proxy."""
    context = tls(policy.ca_bundle)
    return urllib3.ProxyManager(str(policy.proxy), num_pools=32, ssl_context=context)


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


@functools.lru_cache(maxsize=8)
def tls(ca_bundle: Path | None, client: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    """TLS 1.2 or newer, verified with the system's certificates, certifi's and `ca_bundle`.

    `client` are the certificate and the key, as PEM files, that prove to the server who we are.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(certifi.where())  # slim images have no system certificates
    if ca_bundle:
        try:
            context.load_verify_locations(ca_bundle)
        except OSError as error:  # ssl.SSLError is one
            what = "cannot be read" if not isinstance(error, ssl.SSLError) else "holds no PEM"
            change = "name a file of PEM certificates"
            raise SpecError.at("FETCH-127", f"caBundle {ca_bundle}", what, change) from None
    if client:
        try:
            context.load_cert_chain(*client, password="")  # never asks a person
        except OSError as error:
            what = "cannot be read" if not isinstance(error, ssl.SSLError) else "is no PEM pair"
            change = "name a certificate and its key, as PEM files without a password"
            raise SpecError.at("FETCH-127", f"{client[0]}, {client[1]}", what, change) from None
    return context


def load_headers(folder: Path) -> dict[str, dict[str, str]]:
    """Headers for private hosts, from a mounted Secret: each key a host, each line `Name: value`.

    `host_8443` stands for `host:8443`, since a Secret's keys know no colon. A key all in capitals
    is no host: object stores have such (`stores`). Raises SpecError that names file and line, never
    a value.
    """
    found: dict[str, dict[str, str]] = {}
    problems: list[Problem] = []
    for path in sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.is_file()):
        if _OTHER_KEY.fullmatch(path.name):
            continue
        host, _, port = path.name.lower().partition("_")
        lines = path.read_bytes().decode("latin-1").splitlines()
        for number, line in enumerate(lines, 1):
            name, colon, value = (part.strip() for part in line.partition(":"))
            if not line.strip():
                continue
            if not colon or not name.isascii() or " " in name or not value.isprintable():
                where = f"{path} line {number}"
                change = "write lines such as Authorization: Bearer ..."
                problems.append(Problem("FETCH-107", where, "is no header", change))
                continue
            found.setdefault(f"{host}:{port}" if port else host, {})[name] = value
    if problems:
        raise SpecError(problems)
    return found


def hush() -> None:
    """Keep libraries from logging the URLs they ask for: a query may be a key."""
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings hold them, too
    for name in ("httpx", "httpx2", "httpcore", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)


def place(url: str) -> tuple[str, str, int]:
    """Scheme, host (lower case, no brackets) and port of `url`."""
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    return scheme, parts.hostname or "", parts.port or (443 if scheme == "https" else 80)
