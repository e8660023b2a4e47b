"""Which URLs may be fetched, decided by their text alone.

The first gate, the same at admission, on update and on the command line. The fetcher checks again
what the name resolves to, on every redirect.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

INVALID = "invalid data source URL"
NOT_HTTP = "data source URL must use HTTP or HTTPS"
LOCAL_NAME = "data source URL must not target a local or metadata endpoint"
LOCAL_ADDRESS = "data source URL must not target a loopback, private, or link-local address"
NOT_ONE_FILE = "data source URL must name one file of a store, not a folder or a pattern"
NOT_IN_STORE = "invalid URL of an object store"

MAX_LENGTH = 8192
STORES = ("s3", "gs", "az")
_METADATA_NAMES = ("metadata.google.internal", "metadata.google", "instance-data.ec2.internal")
# Cloud metadata addresses outside the private ranges.
_METADATA_ADDRESSES = ("168.63.129.16", "100.100.100.200", "192.0.0.192")
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
_HOST = re.compile(
    r"(?:[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?\.?"
)

_REPOSITORY = r"(?P<repository>(?!(?:datasets|spaces)/)[\w-][\w.-]*/[\w-][\w.-]*)"
_REVISION = r"(?:@(?P<revision>refs/(?:convert|pr)/[\w-]+|[\w.%-]+))?"
_ON_HUB = re.compile(
    rf"hf://(?P<kind>datasets/)?{_REPOSITORY}{_REVISION}/(?P<file>[^?#]+)(#.*)?",
    re.ASCII | re.IGNORECASE,
)
_DATASET = re.compile(
    rf"hf://datasets/{_REPOSITORY}{_REVISION}/?(?:\?(?P<query>[^#]*))?", re.ASCII | re.IGNORECASE
)
_MODEL = re.compile(rf"hf://{_REPOSITORY}{_REVISION}", re.ASCII)
# What a browser shows at the hub.
_PAGE = re.compile(
    rf"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/{_REPOSITORY}"
    r"(?:/?|/(?P<kind>tree|viewer|blob)(?:/[^?#]*)?)(?:[?#].*)?",
    re.ASCII | re.IGNORECASE,
)
_SPLITS = re.compile(r"\w[\w.-]*(\+\w[\w.-]*)*")
# Endings of what --data takes for a file, even if there is none.
_DATA_ENDING = re.compile(
    r"\.(jsonl?|ndjson|csv|tsv|parquet|pq|arrow|feather|txt|gz|gzip|zstd?|zip|xlsx|ya?ml|md)", re.I
)

# Names of buckets and containers, not of hosts: no dot at an end, nothing that means a port.
_BUCKET = r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]"
_IN_STORE = re.compile(
    rf"(?P<scheme>STORES)://(?P<bucket>{_BUCKET})/(?P<key>.+)".replace("STORES", "|".join(STORES))
)


def refusal(url: str, *, allow_hosts: Collection[str] = ()) -> str | None:
    """KAITO's message if `url` must not be fetched, else None.

    `allow_hosts` are allowed private hosts: host, host:port, *.domain, or 10.0.0.0/8.
    """
    if not url or len(url) > MAX_LENGTH or not url.isascii() or not url.isprintable():
        return INVALID
    if " " in url or "\\" in url:
        return INVALID
    if url.lower().startswith("hf://"):
        return None if on_hub(url, "https://hub") or dataset(url) else INVALID
    if url.partition("://")[0].lower() in STORES:
        return _store_refusal(url)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return INVALID
    if parts.scheme.lower() not in ("http", "https"):
        return NOT_HTTP if parts.scheme else INVALID
    if not host or "@" in parts.netloc or port == 0 or _climbs(parts.path):
        return INVALID
    default = 443 if parts.scheme.lower() == "https" else 80
    return None if is_listed(host, port or default, allow_hosts) else _host_refusal(host)


def on_hub(url: str, endpoint: str) -> str | None:
    """The address of hf://datasets/ORG/NAME[@REVISION]/FILE at `endpoint`; None if malformed.

    Without datasets/ it is a model's repository, as in huggingface_hub.
    """
    match = _ON_HUB.fullmatch(url)
    if match is None or _climbs(match["file"]) or _climbs(match["revision"] or ""):
        return None
    kind, revision = match["kind"] or "", quote(unquote(match["revision"] or "main"), safe="")
    return f"{endpoint}/{kind}{match['repository']}/resolve/{revision}/{match['file']}"


@dataclass(frozen=True)
class Dataset:
    """A dataset of the hub, as its URL names it."""

    name: str  # ORG/NAME
    revision: str | None = None
    config: str | None = None
    splits: tuple[str, ...] = ()


def dataset(url: str) -> Dataset | None:
    """What hf://datasets/ORG/NAME[@REVISION][?config=NAME&split=NAME] names; None for another URL.

    `split=train+validation` are two.
    """
    match = _DATASET.fullmatch(url)
    revision = unquote(match["revision"] or "") if match else ""
    if match is None or _climbs(revision) or ".." in match["repository"]:
        return None
    chosen: dict[str, str] = {}
    for pair in filter(None, (match["query"] or "").split("&")):
        key, _, value = pair.partition("=")
        value = unquote(value)
        if key not in ("config", "split") or key in chosen or not value or not value.isprintable():
            return None
        chosen[key] = value
    splits = chosen.get("split", "")
    if splits and not _SPLITS.fullmatch(splits):
        return None
    parts = tuple(dict.fromkeys(splits.split("+"))) if splits else ()
    return Dataset(match["repository"], revision or None, chosen.get("config"), parts)


def page(url: str) -> str | None:
    """What to write in place of the address of a dataset's page at the hub; None for no page."""
    if (match := _PAGE.fullmatch(url)) is None:
        return None
    if (match["kind"] or "").lower() == "blob":
        return "/resolve/ in place of /blob/"
    return f"hf://datasets/{match['repository']}"


def of_data(text: str, beside: Path = Path()) -> str | None:
    """The URL that --data means: one as it is, ORG/NAME as a dataset of the hub; None for a path.

    ORG/NAME is a path if it, or a folder ORG, is in `beside`, or if it ends as data files do.
    """
    if "://" in text:
        return text
    url = f"hf://datasets/{text}"
    named = dataset(url)
    if named is None or _DATA_ENDING.fullmatch(PurePosixPath(named.name).suffix):
        return None
    try:
        here = (beside / text).exists() or (beside / named.name).parent.is_dir()
    except OSError:  # too long for a name
        return None
    return None if here else url


def model(text: str) -> tuple[str, str] | None:
    """The model's repository and branch that hf://ORG/NAME[@BRANCH] names; None for other text."""
    match = _MODEL.fullmatch(text)
    branch = unquote(match["revision"] or "main") if match else ""
    if match is None or _climbs(branch) or ".." in match["repository"]:
        return None
    return match["repository"], branch


def in_store(url: str) -> tuple[str, str, str] | None:
    """Scheme, bucket (or container) and key of an object store's URL; None for an invalid one.

    The key is percent-encoded in one canonical way.
    """
    match = _IN_STORE.fullmatch(url.partition("#")[0])
    if match is None or not _plain_key(match["key"]):
        return None
    return match["scheme"], match["bucket"], quote(unquote(match["key"]), safe="/-._~")


def _store_refusal(url: str) -> str | None:
    text = url.partition("#")[0]
    if text.endswith("/") or "*" in text or text.count("/") == 2:
        return NOT_ONE_FILE
    return None if in_store(url) else NOT_IN_STORE


def _plain_key(key: str) -> bool:
    """Whether `key` is unambiguous: no .. or . segments, query or control characters."""
    segments = unquote(key).split("/")
    return (
        "?" not in key and not _climbs(key) and "." not in segments and unquote(key).isprintable()
    )


def is_listed(host: str, port: int, entries: Collection[str]) -> bool:
    """Whether one of `entries` matches `host`: as host, host:port, *.domain, or network."""
    host = host.lower().rstrip(".").strip("[]")
    spelled = f"[{host}]" if ":" in host else host
    for entry in map(str.lower, entries):
        if entry in (host, spelled, f"{spelled}:{port}"):
            return True
        if entry.startswith("*.") and host.endswith(entry[1:]):
            return True
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
        except ValueError:
            continue
    return False


def _climbs(path: str) -> bool:
    plain = re.sub("%2e", ".", path, flags=re.IGNORECASE)
    plain = re.sub("%(2f|5c)", "/", plain, flags=re.IGNORECASE)
    return ".." in plain.split("/") or "%00" in plain


def _host_refusal(host: str) -> str | None:
    try:
        return None if is_public(ipaddress.ip_address(host)) else LOCAL_ADDRESS
    except ValueError:
        pass
    if not _HOST.fullmatch(host) or len(host) > 254:
        return INVALID
    name = host.rstrip(".")
    if name == "localhost" or name.endswith(".localhost") or name in _METADATA_NAMES:
        return LOCAL_NAME
    if _is_number(name.rpartition(".")[2]):  # 2130706433, 0x7f.1, 127.1: addresses in disguise
        try:
            address = ipaddress.ip_address(socket.inet_aton(name))
        except OSError:
            return INVALID
        return INVALID if is_public(address) else LOCAL_ADDRESS
    return None


def _is_number(label: str) -> bool:
    return label.isdigit() or re.fullmatch("0x[0-9a-f]*", label) is not None


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is public; those that embed an IPv4 address (4-in-6, NAT64) are not."""
    if str(address) in _METADATA_ADDRESSES or address.is_multicast:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped or address.sixtofour or address.teredo or address.scope_id:
            return False
        if any(address in network for network in _NAT64) or int(address) >> 32 == 0:
            return False
    return address.is_global
