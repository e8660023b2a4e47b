"""HTTP sessions for registries and clouds: what they trust, and what of the environment counts."""

from __future__ import annotations

from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import requests.adapters

from tuning.network import policy

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class _Adapter(requests.adapters.HTTPAdapter):
    """Connections that trust what `network.tls` trusts."""

    def __init__(self, ca: Path | None, client: tuple[Path, Path] | None) -> None:
        self._ca, self._client = ca, client
        super().__init__()

    def init_poolmanager(self, *positional: Any, **more: Any) -> None:
        context = policy.tls(self._ca, self._client)
        super().init_poolmanager(*positional, ssl_context=context, **more)

    def proxy_manager_for(self, proxy: str, **more: Any) -> Any:
        context = policy.tls(self._ca, self._client)
        return super().proxy_manager_for(proxy, ssl_context=context, **more)


def session(ca: Path | None = None, client: tuple[Path, Path] | None = None) -> requests.Session:
    """A session that trusts `ca` beside the usual authorities, and shows `client`'s certificate.

    It reads no .netrc: a login is only what we were given. It keeps no cookies: Harbor's lead to
    CSRF refusals.
    """
    made = requests.Session()
    made.trust_env = False
    made.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    made.mount("https://", _Adapter(ca, client))
    return made


def proxies(url: str) -> dict[str, str]:
    """The environment's proxies for `url`; none for this machine itself."""
    return {} if is_loopback(url) else dict(requests.utils.get_environ_proxies(url))


def is_loopback(url: str) -> bool:
    """Whether `url` leads to this machine by its name."""
    return urlsplit(url).hostname in LOOPBACK
