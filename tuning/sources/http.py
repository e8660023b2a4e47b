"""GET of a data URL under a policy: each redirect is checked, each answer or failure classified.

The result is a body to read, an error that ends the download, or `Again`: worth another try.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from urllib3.exceptions import HTTPError

from tuning import files
from tuning.errors import (
    DataError,
    Problem,
    RefusedError,
    SpecError,
    TransientError,
)
from tuning.network.answer import NotHttp
from tuning.network.connect import Resolver, lookup
from tuning.network.policy import Headers, NotAllowed, Policy, place
from tuning.network.retry import Again, Patience, is_retryable, retry_after
from tuning.network.session import Response, Session, Unreachable
from tuning.sources import hub
from tuning.sources.stores import Signed, Store

MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_STORED_AS_SENT = ("", "gzip", "zstd")  # detected later by content
_HAS_REASON = (*_REDIRECTS, 400, 401, 403, 404, 409)  # a store's body of these gives a reason
_ERROR_BYTES = 8192  # of such a body
_KNOWN_HOSTS = ("storage.googleapis.com", "huggingface.co")  # if unknown, DNS is broken


PATIENCE = Patience(tries=8)  # since the last new byte


@dataclass(frozen=True)
class Limits:
    """How long to wait for one file; seconds unless the name says otherwise."""

    connect: float = 15
    stall: float = 60  # without a byte
    slow_window: float = 60
    slow_bytes: int = 60 * 1024  # fewer in a window is too slow
    retry: Patience = PATIENCE
    total: float = 24 * 3600


@dataclass(frozen=True)
class Item:
    """One URL of a source, without its checksum."""

    index: int
    url: str  # without fragment; may contain a signature: never shown, never stored
    sha256: str | None = None
    store: Store | None = None  # the object store that `url` names, if any
    number: int | None = None  # of the spec's URL, where one names several files
    name: str | None = None  # what messages call it, if not by its URL
    size: int | None = None  # bytes, where they are known before

    @property
    def address(self) -> str:
        """The https URL to request."""
        return self.store.address if self.store else self.url

    @property
    def shown(self) -> str:
        """The URL as it may be shown."""
        return self.name or self.url.partition("?")[0] + ("?<redacted>" if "?" in self.url else "")

    @property
    def where(self) -> str:
        """How errors name it."""
        number = self.index if self.number is None else self.number
        return f"input.urls[{number}] {self.shown}"

    @property
    def key(self) -> str:
        """Identifies the file on disk: two stores may have different files of the same URL."""
        identity = f"{self.store.identity} {self.url}" if self.store else self.url
        return files.digest(identity.encode())


@dataclass
class Web:
    """Requests that keep to a policy; each host gets its own headers only."""

    policy: Policy
    credentials: Headers = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    resolve: Resolver = lookup

    def __post_init__(self) -> None:
        self._session = Session.guarded(self.policy, self.resolve)

    def get(self, item: Item, headers: dict[str, str]) -> Response:
        """The answer to a GET of `item`, redirects followed, its body unread.

        Raises the error that ends the download, or Again.
        """
        url = item.address
        for hop in range(MAX_REDIRECTS + 1):
            response = self._ask(item, url, headers, hop)
            store = item.store if item.store and url == item.store.address else None
            reason = store is not None and response.status in _HAS_REASON
            if store and reason and (moved := self._elsewhere(item, store, response)):
                url = moved
                continue
            if response.status not in _REDIRECTS:
                return response
            location = response.headers.get("location", "")
            response.close()
            url = self._follow(item, url, location)
        what = f"redirects more than {MAX_REDIRECTS} times"
        raise RefusedError.at("FETCH-113", item.where, what, "use the address of the file itself")

    def _elsewhere(self, item: Item, store: Store, response: Response) -> str | None:
        """Another address of the same file, or None for a plain redirect.

        Raises RefusedError with the meaning of the store's answer.
        """
        try:
            body = response.read(_ERROR_BYTES).decode("utf-8", "replace")
        except (HTTPError, OSError):
            body = ""
        response.close()
        if moved := store.moved(response.headers, body):
            if refusal := self.policy.refusal(moved):
                change = "name the region in the credentials"
                raise RefusedError.at("FETCH-115", item.where, f"redirects: {refusal}", change)
            return moved
        if response.status in _REDIRECTS and "location" in response.headers:
            return None
        code = "FETCH-110" if response.status == 404 else "FETCH-111"
        raise RefusedError.at(code, item.where, *store.meaning(response.status, body))

    def _follow(self, item: Item, url: str, location: str) -> str:
        """The target of a redirect, if it may be followed."""
        location = quote(
            location, safe="%/:=&?~#+!$,;'@()*[]", encoding="latin-1", errors="replace"
        )
        change = "use the address of the file itself"
        try:
            target = urljoin(url, location).partition("#")[0]
        except ValueError:
            raise not_http(item, NotHttp("redirects to an invalid URL")) from None
        if not location or (refusal := self.policy.refusal(target)):
            what = f"redirects to a forbidden URL: {refusal if location else 'empty'}"
            raise RefusedError.at("FETCH-115", item.where, what, change)
        if urlsplit(url).scheme.lower() == "https" and urlsplit(target).scheme.lower() == "http":
            what = "redirects from https to plain http"
            raise RefusedError.at("FETCH-114", item.where, what, change)
        return target

    def _ask(self, item: Item, url: str, headers: dict[str, str], hop: int) -> Response:
        scheme, host, port = place(url)
        own = self.credentials.get(f"{host}:{port}") or self.credentials.get(host) or {}
        target = url
        if item.store and url == item.store.address:  # nothing else gets the store's credentials
            signed = _signed(item, item.store, {**headers, **own})
            taken = {name.lower() for name in signed.headers}
            own = {name: value for name, value in own.items() if name.lower() not in taken}
            target, own = signed.url, {**own, **signed.headers}
        if scheme == "http" and not self.policy.allows_name(host, port):
            if own or target != url:
                what = f"the credentials for {host} would cross the network in clear text"
                raise SpecError.at("FETCH-106", item.where, what, "use https, or allow the host")
            if not self.policy.plain_http:
                what = "plain http is not allowed here"
                raise SpecError.at("FETCH-108", item.where, what, "use https")
        plain = {"Accept-Encoding": "identity", "Connection": "close"}  # its end shows its length
        try:
            return self._session.request(
                "GET",
                target,
                headers={**plain, **headers, **own},
                timeout=(self.limits.connect, self.limits.stall),
                stream=True,
                enforce_content_length=False,  # download compares lengths, in both directions
            )
        except NotAllowed as error:
            raise _forbidden(item, error, hop) from None
        except Unreachable as error:
            raise _no_answer(item, host, error) from None


def _signed(item: Item, store: Store, headers: Mapping[str, str]) -> Signed:
    """The signed request. Raises Again, SpecError or RefusedError for a login that failed."""
    try:
        return store.signed(headers)
    except (TransientError, SpecError, RefusedError) as error:
        code = {SpecError: "FETCH-107", RefusedError: "FETCH-111"}.get(type(error), "FETCH-130")
        first = error.problems[0]
        problem = Problem(code, item.where, f"{first.where} {first.what}", first.change)
        if isinstance(error, TransientError):
            raise Again(problem) from None
        raise type(error)([problem]) from None


def _forbidden(item: Item, error: NotAllowed, hop: int) -> SpecError | RefusedError:
    what = f"{error.host} is at {error.address}, which is not on the public internet"
    if hop:
        change = "use the address of the file itself"
        return RefusedError.at("FETCH-115", item.where, f"redirects away: {what}", change)
    change = f"allow it with --allow-host {error.host}, or in the policy file's data.allowHosts"
    return SpecError.at("FETCH-104", item.where, what, change)


def _no_answer(item: Item, host: str, error: Unreachable) -> Exception:
    """The error, or the Again, of a request without an answer."""

    def again(code: str, what: str, change: str, **more: Any) -> Again:
        return Again(Problem(code, item.where, what, change), **more)

    match error.kind:
        case "host" if host not in _KNOWN_HOSTS:
            change = "check its spelling (AWS_REGION, the account of az://), and the DNS"
            what = f"there is no host {host}"
            return again("FETCH-117", what, change, tries=3, final=RefusedError)
        case "host" | "dns":
            return again("FETCH-131", f"cannot look up {host}", "check the network's DNS")
        case "connect":
            what = f"cannot connect to {host}: {error.reason}"
            return again("FETCH-131", what, "check host and port, then run it again")
        case "timeout":
            what = f"{host} does not answer (time-out while connecting)"
            return again("FETCH-132", what, "check address and firewall, then run it again")
        case "silent":
            return again("FETCH-133", f"{host} went silent", "run the same command again")
        case "certificate" | "tls":
            change = "renew the server's certificate, or name its CA (caBundle in the policy file)"
            return RefusedError.at("FETCH-116", item.where, f"TLS: {error.reason}", change)
        case "url":
            change = "write a URL such as https://example.com/data.jsonl"
            return RefusedError.at("FETCH-128", item.where, "is an invalid URL", change)
        case "header":
            what = f"a header for {host} contains forbidden characters"
            return SpecError.at("FETCH-107", item.where, what, "write it in one line")
    return again("FETCH-131", f"the connection to {host} broke", "run the same command again")


def validate(item: Item, response: Response) -> None:
    """Raise unless `response` is a 416 or has a body that belongs to `item`."""
    status = response.status
    if status in (200, 206, 416):
        encodings = encoding_of(response.headers)
        if encodings not in _STORED_AS_SENT:
            what = f'answers with Content-Encoding "{encodings[:60]}", though asked for plain bytes'
            raise RefusedError.at("FETCH-118", item.where, what, "serve the file as it is")
        return
    if is_retryable(status):
        problem = Problem(
            "FETCH-130",
            item.where,
            f"the server answers {status} {response.reason or ''}".rstrip(),
            "run the same command again later",
        )
        tries = 2 if status == 500 else None
        raise Again(problem, after=retry_after(response.headers), tries=tries)
    if status in (401, 403):
        what = f"the server refuses access ({status})"
        change = "make a new signed URL if it has expired, or give the host's credentials"
        if item.url.startswith(f"{hub.endpoint()}/"):
            page = item.url.partition("/resolve/")[0]
            change = f"ask for access at {page}, then give a token of that account: "
            change += "--hub-token-file FILE, in a cluster presetOptions.modelAccessSecret"
        raise RefusedError.at("FETCH-111", item.where, what, change)
    if status == 204:
        raise empty(item)
    known = {404: "there is no such file (404)", 410: "the file is gone (410)"}
    what = known.get(status, f"the server answers {status}")
    raise RefusedError.at("FETCH-110", item.where, what, "correct the URL")


def encoding_of(headers: Mapping[str, str]) -> str:
    """The Content-Encoding, in lower case and by its usual name; empty for none."""
    encodings = headers.get("content-encoding", "").lower().replace(" ", "")
    return {"identity": "", "x-gzip": "gzip"}.get(encodings, encodings)


def not_http(item: Item, fault: NotHttp) -> Again:
    """The failure of an answer that HTTP does not allow: another server may give a better one."""
    change = "run the same command again; if that does not help, give the file's address elsewhere"
    return Again(Problem("FETCH-139", item.where, f"the server's answer {fault}", change), tries=3)


def broken(item: Item, size: int, announced: int | None) -> Again:
    """The failure of a transfer that ends after `size` bytes, of `announced` if known."""
    of = f" of {announced}" if announced is not None else ""
    what = f"the transfer ended after {size}{of} bytes"
    change = "run the same command again; it goes on"
    return Again(Problem("FETCH-135", item.where, what, change))


def empty(item: Item) -> DataError:
    """The error of an empty file."""
    return DataError.at("FETCH-120", item.where, "is empty", "check what the link gives")
