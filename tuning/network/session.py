"""HTTP: every request of our own, by one transport.

A session knows which authorities are trusted, which proxy leads to a URL and, for data, which
addresses may be connected to. It follows no redirect and retries nothing: callers decide. It reads
no .netrc and keeps no cookies.
"""

from __future__ import annotations

import io
import ipaddress
import json as json_text
import socket
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlencode, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import urllib3
from urllib3 import exceptions

import tuning
from tuning.network import connect
from tuning.network.answer import LARGEST_DOCUMENT, NotHttp, whole
from tuning.network.connect import Resolver, lookup
from tuning.network.policy import Policy, hush, network, place
from tuning.network.tls import tls

Response = urllib3.BaseHTTPResponse
Kind = Literal["host", "dns", "connect", "timeout", "silent", "certificate", "tls", "url", "header"]
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
TIMEOUT = (10.0, 60.0)  # seconds to connect, and of silence
POOLS, CONNECTIONS = 32, 8  # hosts, and connections to each, that are kept
_UNKNOWN_HOST = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


class Unreachable(Exception):
    """A request without an answer: the kind of failure, and the reason that the system gives."""

    def __init__(self, kind: Kind | Literal["broken"], reason: str = "") -> None:
        self.kind, self.reason = kind, reason
        super().__init__(f"{kind}: {reason}")


class Session:
    """Connections that are shared by requests, also from several threads."""

    def __init__(
        self,
        ca: Path | None = None,
        client: tuple[Path, Path] | None = None,
        *,
        proxy: Callable[[str], str | None] | None = None,
        direct: urllib3.PoolManager | None = None,
    ) -> None:
        """Trust `ca` beside the usual authorities, and show the certificate of `client`.

        `proxy` names the proxy for a URL, by default the environment's; `direct` makes the
        connections of all other requests.
        """
        hush()
        self._proxy = proxy or environment_proxy
        self._pool: dict[str, Any] = {
            "num_pools": POOLS,
            "maxsize": CONNECTIONS,
            "ssl_context": tls(ca, client),
        }
        self._direct = direct or connect.strict(urllib3.PoolManager(**self._pool))
        self._proxied: dict[str, urllib3.ProxyManager] = {}

    @classmethod
    def guarded(cls, policy: Policy, resolve: Resolver = lookup) -> Session:
        """A session for data: each address is checked by `policy`, which alone names proxies."""
        direct = connect.opener(policy, resolve=resolve)
        return cls(policy.ca_bundle, proxy=policy.proxy_for, direct=direct)

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        form: Mapping[str, str] | None = None,
        json: Any = None,
        timeout: tuple[float, float] = TIMEOUT,
        stream: bool = False,
        **options: Any,
    ) -> Response:
        """One request and its answer, whatever its status; with `stream` its body is unread.

        Without, the body is read to its end, LARGEST_DOCUMENT bytes at most. `body` is bytes, or
        an iterable whose length the headers name; `form` and `json` are encoded here.

        Raises Unreachable, or NotAllowed before anything is sent.
        """
        sent = {"Accept": "*/*", "User-Agent": f"tuning/{tuning.__version__}"}
        if form is not None:
            body = urlencode(form).encode()
            sent["Content-Type"] = "application/x-www-form-urlencoded"
        if json is not None:
            body, sent["Content-Type"] = json_text.dumps(json).encode(), "application/json"
        try:
            manager = self._manager(url)
        except ValueError:
            raise Unreachable("url") from None
        try:
            response = manager.request(
                method,
                url,
                body=body,
                headers={**sent, **(headers or {})},
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=not stream,
                timeout=urllib3.Timeout(connect=timeout[0], read=timeout[1]),
                **options,
            )
            return response if stream else _loaded(method, response)
        except NotHttp as fault:
            raise Unreachable("broken", f"its answer {fault}") from None
        except (exceptions.HTTPError, OSError, ValueError) as error:
            raise unreachable(error) from None

    def _manager(self, url: str) -> urllib3.PoolManager:
        proxy = self._proxy(url)
        if proxy is None:
            return self._direct
        if proxy not in self._proxied:
            parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            login = ":".join(map(unquote, (parts.username or "", parts.password or "")))
            headers = urllib3.make_headers(proxy_basic_auth=login if parts.username else None)
            address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
            manager = urllib3.ProxyManager(address, proxy_headers=headers, **self._pool)
            self._proxied[proxy] = connect.strict(manager)
        return self._proxied[proxy]


def _loaded(method: str, response: Response) -> Response:
    """`response` with its body in memory, its connection free for others."""
    bodyless = method == "HEAD" or response.status in (204, 304)
    try:
        body = b"" if bodyless else whole(response)
        if len(body) > LARGEST_DOCUMENT:
            raise NotHttp(f"has a body of more than {LARGEST_DOCUMENT:,} bytes")
    except BaseException:
        response.close()
        raise
    response.release_conn()
    return urllib3.HTTPResponse(
        io.BytesIO(body),
        response.headers,
        response.status,
        reason=response.reason,
        decode_content=False,
        enforce_content_length=False,
    )


def unreachable(error: Exception) -> Unreachable:
    """The kind of failure that an error of urllib3, ssl or the system stands for."""
    inner = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    cause = error.__cause__
    match error:
        case exceptions.NameResolutionError():
            known = isinstance(cause, socket.gaierror) and cause.errno not in _UNKNOWN_HOST
            return Unreachable("dns" if known else "host")
        case exceptions.NewConnectionError():  # it is a ConnectTimeoutError, too
            reason = cause.strerror if isinstance(cause, OSError) else None
            return Unreachable("connect", reason or "no route")
        case exceptions.ConnectTimeoutError():
            return Unreachable("timeout")
        case exceptions.ReadTimeoutError():
            return Unreachable("silent")
        case exceptions.SSLError() | ssl.SSLError() if not isinstance(inner, ssl.SSLEOFError):
            if isinstance(inner, ssl.SSLCertVerificationError):
                return Unreachable("certificate", inner.verify_message)
            reason = getattr(inner, "reason", None) or "handshake failed"
            return Unreachable("tls", reason.replace("_", " ").lower())
        case exceptions.LocationValueError() | UnicodeError():
            return Unreachable("url")
        case ValueError() if not isinstance(error, exceptions.HTTPError):
            return Unreachable("header")  # http.client's; its text holds the value
    return Unreachable("broken")


def environment_proxy(url: str) -> str | None:
    """The environment's proxy for `url`; none for this machine. NO_PROXY may name networks."""
    scheme, host, port = place(url)
    proxies = getproxies_environment()
    proxy = proxies.get(scheme) or proxies.get("all")
    if not proxy or is_loopback(url) or proxy_bypass(f"{host}:{port}"):
        return None
    networks = [network(entry.strip()) for entry in proxies.get("no", "").split(",")]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return proxy
    return None if any(each and address in each for each in networks) else proxy


def is_loopback(url: str) -> bool:
    """Whether `url` leads to this machine by its name."""
    return urlsplit(url).hostname in LOOPBACK
