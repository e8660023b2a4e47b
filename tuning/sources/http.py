"""Asking a server for a URL, under a policy: each hop is judged, each answer is given a meaning.

An answer is a body to read, an error that ends the matter, or `Again`: worth another try.
"""

from __future__ import annotations

import email.utils
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import urllib3
from urllib3 import exceptions as web_errors

import tuning
from tuning import files
from tuning.errors import (
    DataError,
    Problem,
    RefusedError,
    SpecError,
    TransientError,
    TuningError,
)
from tuning.network.policy import Headers, NotAllowed, Policy, Resolver, hush, lookup, opener, place
from tuning.network.policy import through_proxy as proxied
from tuning.sources.stores import Signed, Store

MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_STORED_AS_SENT = ("", "identity", "gzip", "x-gzip", "zstd")  # known again by their content
_SAYS_WHY = (*_REDIRECTS, 400, 401, 403, 404, 409)  # answers whose body a store fills with a reason
_ERROR_BYTES = 8192  # of such a body
_SURELY_THERE = ("storage.googleapis.com", "huggingface.co")  # or there is no DNS
_UNKNOWN_HOST = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


@dataclass(frozen=True)
class Patience:
    """How long to wait and how often to try; seconds unless the name says otherwise."""

    connect: float = 15
    stall: float = 60  # without a byte
    slow_window: float = 60
    slow_bytes: int = 60 * 1024  # fewer in a window is too slow
    tries: int = 8  # in a row without a new byte
    retrying: float = 15 * 60  # in a row without a new byte
    backoff: float = 1  # upper bound of the first wait; it doubles
    backoff_cap: float = 60
    retry_after_cap: float = 120
    total: float = 24 * 3600


@dataclass(frozen=True)
class Item:
    """One URL of a source, its checksum taken off."""

    index: int
    url: str  # without fragment; may hold a signature: never shown, never stored
    sha256: str | None = None
    store: Store | None = None  # where the file is, if `url` names a bucket

    @property
    def address(self) -> str:
        """Where to ask."""
        return self.store.address if self.store else self.url

    @property
    def shown(self) -> str:
        """The URL as it may be shown."""
        return self.url.partition("?")[0] + ("?<redacted>" if "?" in self.url else "")

    @property
    def where(self) -> str:
        """The place that errors name."""
        return f"input.urls[{self.index}] {self.shown}"

    @property
    def key(self) -> str:
        """What stands for the URL on the disk: another store's file of the same URL is another."""
        told = f"{self.store.identity} {self.url}" if self.store else self.url
        return files.digest(told.encode())


class Again(Exception):
    """Something that another try may mend."""

    def __init__(
        self,
        problem: Problem,
        *,
        after: float | None = None,
        tries: int | None = None,
        final: type[RefusedError | DataError | TransientError] = TransientError,
    ) -> None:
        self.problem, self.after, self.tries, self.final = problem, after, tries, final
        super().__init__(str(problem))


@dataclass
class Web:
    """Requests that keep to a policy: each hop is judged, and gets its own host's headers only."""

    policy: Policy
    credentials: Headers = field(default_factory=dict)
    patience: Patience = field(default_factory=Patience)
    resolve: Resolver = lookup

    def __post_init__(self) -> None:
        hush()
        self._direct = opener(self.policy, resolve=self.resolve)
        self._proxied = proxied(self.policy) if self.policy.proxy else self._direct

    def get(self, item: Item, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        """The answer to a GET of `item`, redirects followed, its body unread.

        Raises the error that ends the download, or Again.
        """
        url = item.address
        for hop in range(MAX_REDIRECTS + 1):
            response = self._ask(item, url, headers, hop)
            asked = item.store if item.store and url == item.store.address else None
            reason = asked is not None and response.status in _SAYS_WHY
            if asked and reason and (moved := self._elsewhere(item, asked, response)):
                url = moved
                continue
            if response.status not in _REDIRECTS:
                return response
            location = response.headers.get("location", "")
            response.close()
            url = self._follow(item, url, location)
        what = f"redirects more than {MAX_REDIRECTS} times"
        raise RefusedError.at("FETCH-113", item.where, what, "use the address of the file itself")

    def _elsewhere(
        self, item: Item, store: Store, response: urllib3.BaseHTTPResponse
    ) -> str | None:
        """Another address of the same file, or None for a plain redirect.

        Raises RefusedError that says what the store's answer means.
        """
        try:
            body = response.read(_ERROR_BYTES).decode("utf-8", "replace")
        except (web_errors.HTTPError, OSError):
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
        """Where a redirect leads, if it may be followed."""
        location = quote(location, safe="%/:=&?~#+!$,;'@()*[]", encoding="latin-1")
        target = urljoin(url, location).partition("#")[0]
        change = "use the address of the file itself"
        if not location or (refusal := self.policy.refusal(target)):
            what = f"redirects to where it must not: {refusal if location else 'nowhere'}"
            raise RefusedError.at("FETCH-115", item.where, what, change)
        if urlsplit(url).scheme.lower() == "https" and urlsplit(target).scheme.lower() == "http":
            what = "redirects from https to plain http"
            raise RefusedError.at("FETCH-114", item.where, what, change)
        return target

    def _ask(
        self, item: Item, url: str, headers: dict[str, str], hop: int
    ) -> urllib3.BaseHTTPResponse:
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
                what = f"the credentials for {host} would cross the network readably"
                raise SpecError.at("FETCH-106", item.where, what, "use https, or allow the host")
            if not self.policy.plain_http:
                raise SpecError.at(
                    "FETCH-108", item.where, "plain http is not allowed here", "use https"
                )
        manager = self._proxied if self.policy.uses_proxy(host, port) else self._direct
        try:
            return manager.request(
                "GET",
                target,
                headers={
                    "Accept": "*/*",
                    "Accept-Encoding": "identity",
                    "Connection": "close",  # its end shows whether the length was right
                    "User-Agent": f"tuning/{tuning.__version__}",
                    **headers,
                    **own,
                },
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
                enforce_content_length=False,  # checked in _receive, in both directions
                timeout=urllib3.Timeout(connect=self.patience.connect, read=self.patience.stall),
            )
        except NotAllowed as error:
            raise _closed(item, error, hop) from None
        except web_errors.HTTPError as error:  # some of them are ValueErrors, too
            raise _unreachable(item, host, error) from None
        except UnicodeError:  # a label of more than 63 characters, say
            raise _no_url(item) from None
        except ValueError:  # http.client's, of a header; it would show the value
            what = f"a header for {host} holds what no header can"
            raise SpecError.at("FETCH-107", item.where, what, "write it in one line") from None


def _signed(item: Item, store: Store, headers: Mapping[str, str]) -> Signed:
    """The store's proof. Raises Again, SpecError or RefusedError for a login that is not given."""
    try:
        return store.signed(headers)
    except TransientError as error:
        raise Again(_at(item, "FETCH-130", error)) from None
    except SpecError as error:
        raise SpecError([_at(item, "FETCH-107", error)]) from None
    except RefusedError as error:
        raise RefusedError([_at(item, "FETCH-111", error)]) from None


def _at(item: Item, code: str, error: TuningError) -> Problem:
    """What a token service said, as a problem of the file for which it was asked."""
    said = error.problems[0]
    return Problem(code, item.where, f"{said.where} {said.what}", said.change)


def _closed(item: Item, error: NotAllowed, hop: int) -> SpecError | RefusedError:
    what = f"{error.host} is at {error.address}, which is not on the public internet"
    if hop:
        change = "use the address of the file itself"
        return RefusedError.at("FETCH-115", item.where, f"redirects away: {what}", change)
    change = f"allow it with --allow-host {error.host}, or in the policy file's data.allowHosts"
    return SpecError.at("FETCH-104", item.where, what, change)


def _unreachable(item: Item, host: str, error: Exception) -> RefusedError | Again:
    """What a request that got no answer means."""

    def again(code: str, what: str, change: str, **more: Any) -> Again:
        return Again(Problem(code, item.where, what, change), **more)

    match error:
        case web_errors.NameResolutionError():
            cause = error.__cause__
            known = host in _SURELY_THERE
            if isinstance(cause, socket.gaierror) and cause.errno in _UNKNOWN_HOST and not known:
                change = "check its spelling (AWS_REGION, the account of az://), and the DNS"
                what = f"there is no host {host}"
                return again("FETCH-117", what, change, tries=3, final=RefusedError)
            return again("FETCH-131", f"cannot look up {host}", "check the network's DNS")
        case web_errors.NewConnectionError():  # it is a ConnectTimeoutError, too
            what = f"cannot connect to {host}: {_reason(error)}"
            return again("FETCH-131", what, "check host and port, then run it again")
        case web_errors.ConnectTimeoutError():
            what = f"{host} does not answer (time-out while connecting)"
            return again("FETCH-132", what, "check address and firewall, then run it again")
        case web_errors.ReadTimeoutError():
            return again("FETCH-133", f"{host} went silent", "run the same command again")
        case web_errors.SSLError() if not isinstance(error.args[0], ssl.SSLEOFError):
            change = "mend the server's certificate, or give its CA (caBundle in the policy file)"
            return RefusedError.at("FETCH-116", item.where, f"TLS: {_reason(error)}", change)
        case web_errors.LocationValueError():
            return _no_url(item)
    return again("FETCH-131", f"the connection to {host} broke", "run the same command again")


def _no_url(item: Item) -> RefusedError:
    change = "write an address such as https://example.com/data.jsonl"
    return RefusedError.at("FETCH-128", item.where, "is no valid URL", change)


def _reason(error: Exception) -> str:
    """What TLS or the system says, without urllib3's object names around it."""
    inner = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    if isinstance(inner, ssl.SSLCertVerificationError):
        return inner.verify_message
    if isinstance(inner, ssl.SSLError):
        return (inner.reason or "handshake failed").replace("_", " ").lower()
    cause = error.__cause__
    return cause.strerror or "no route" if isinstance(cause, OSError) else type(inner).__name__


def judge(item: Item, response: urllib3.BaseHTTPResponse) -> None:
    """Return if `response` has a body that belongs to `item`, or is a 416; else raise."""
    status = response.status
    if status in (200, 206, 416):
        encodings = response.headers.get("content-encoding", "").lower().replace(" ", "")
        if encodings not in _STORED_AS_SENT:
            what = f'answers with Content-Encoding "{encodings[:60]}", though asked for plain bytes'
            raise RefusedError.at("FETCH-118", item.where, what, "have the file served as it is")
        return
    if status in _AGAIN:
        problem = Problem(
            "FETCH-130",
            item.where,
            f"the server answers {status} {response.reason or ''}".rstrip(),
            "run the same command again later",
        )
        tries = 2 if status == 500 else None
        raise Again(problem, after=_retry_after(response), tries=tries)
    if status in (401, 403):
        what = f"the server refuses access ({status})"
        change = "make a new signed URL if it has expired, or give the host's credentials"
        raise RefusedError.at("FETCH-111", item.where, what, change)
    if status == 204:
        raise empty(item)
    known = {404: "there is no such file (404)", 410: "the file is gone (410)"}
    what = known.get(status, f"the server answers {status}")
    raise RefusedError.at("FETCH-110", item.where, what, "correct the URL")


def _retry_after(response: urllib3.BaseHTTPResponse) -> float | None:
    """Seconds that the server asks for, given as a number or as a date."""
    text = response.headers.get("retry-after", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def empty(item: Item) -> DataError:
    """The error of a file without a byte."""
    return DataError.at("FETCH-120", item.where, "is empty", "check what the link gives")
