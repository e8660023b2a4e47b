"""Which hosts data may come from.

A job fetches what its author names, from inside a network that trusts the job: metadata services,
databases, the API server. So a host is checked by the addresses it resolves to, not by its name
alone (see `connect`). Nothing from the environment (proxies, netrc) changes that.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ByteSize, ConfigDict, Field
from pydantic.alias_generators import to_camel

from tuning.errors import Problem, SpecError
from tuning.spec import policy_file, urls

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Headers = Mapping[str, Mapping[str, str]]  # host (or host:port) -> headers for it alone

GIB = 1 << 30
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")  # all that is allocated for public use
_NOT_PUBLIC = (ipaddress.ip_network("3fff::/20"), ipaddress.ip_network("192.88.99.0/24"))
_OTHER_KEY = re.compile("[A-Z][A-Z0-9_]*")
# Cloud services that no allowed *name* reaches; the address itself can be allowed.
_METADATA = ("168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254")


class NotAllowed(Exception):
    """`host` resolves to `address`, which the policy forbids. No connection was made."""

    def __init__(self, host: str, address: str) -> None:
        self.host, self.address = host, address
        super().__init__(f"{host} is at {address}")


@dataclass(frozen=True)
class Policy:
    """What an administrator (or, locally, the command line) allows for data.

    `allow_hosts` holds hosts, `host:port`, `*.domain` or networks such as 10.0.0.0/8 that may be
    private. Sizes in bytes.
    """

    allow_hosts: Collection[str] = frozenset()
    plain_http: bool = True  # to public hosts, with a warning; allowed hosts may always use it
    proxy: str | None = None  # it resolves names, so addresses are not checked here
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
        """True if `host` is allowed by its name."""
        return _listed(host, port, self.allow_hosts)

    def allows(self, host: str, port: int, address: str) -> bool:
        """True if a connection to `host` may go to `address`."""
        try:
            where = ipaddress.ip_address(address)
        except ValueError:
            return False
        if any(where in each for entry in self.allow_hosts if (each := network(entry))):
            return True
        if self.allows_name(host, port) and not is_metadata(where):
            return True
        return is_public(where)

    def refusal(self, url: str) -> str | None:
        """Why `url` is refused by its text, or None."""
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

    def proxy_for(self, url: str) -> str | None:
        """The proxy that a request to `url` goes through, if any."""
        _, host, port = place(url)
        return None if _listed(host, port, self.no_proxy) else self.proxy


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


def network(entry: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """The network that an entry such as 10.0.0.0/8 names, or None."""
    if "/" not in entry:  # an address alone allows URLs that spell it, not names
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
    """True for the metadata addresses, where clouds keep a machine's credentials."""
    inner = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (inner or address).is_link_local or str(inner or address) in _METADATA


def load_headers(folder: Path) -> dict[str, dict[str, str]]:
    """Headers for private hosts, from a mounted Secret: each key a host, each line `Name: value`.

    `host_8443` means `host:8443`, since a Secret's keys have no colon. A key all in capitals is not
    a host but a setting of an object store. Raises SpecError that names file and line, never a
    value.
    """
    headers: dict[str, dict[str, str]] = {}
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
                problems.append(Problem("FETCH-107", where, "is not a header", change))
                continue
            headers.setdefault(f"{host}:{port}" if port else host, {})[name] = value
    if problems:
        raise SpecError(problems)
    return headers


def hush() -> None:
    """Keep libraries from logging URLs: a query may hold a key."""
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings contain them, too
    for name in ("httpx", "httpx2", "httpcore", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)


def place(url: str) -> tuple[str, str, int]:
    """Scheme, host (lower case, no brackets) and port of `url`."""
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    return scheme, parts.hostname or "", parts.port or (443 if scheme == "https" else 80)
