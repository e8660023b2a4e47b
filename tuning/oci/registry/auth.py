"""The Authorization header that one repository wants: Basic, or a Bearer token, kept fresh.

A token is asked for with the scope that the registry names and with what is about to be done here:
some registries answer a token of too small a scope with 403, where no second question helps.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import requests

from tuning.errors import TransientError
from tuning.network.docker_config import Login
from tuning.oci.registry.answers import AGAIN, Again, Judge, retry_after

if TYPE_CHECKING:
    import oras.auth.utils

RENEWED_BEFORE = 60.0  # seconds before a token runs out
LIFETIME = 60.0  # seconds, where the token server does not say
READS = ("GET", "HEAD")


@dataclass
class Tokens:
    """What proves to one repository who we are; uploads side by side share it."""

    judge: Judge
    plain: bool  # the registry is reached by plain http
    ask: Callable[..., requests.Response]  # (method, url, **more): one request, as it comes
    identity: Callable[[], Login] | None = None  # makes a login where none was given
    proven: bool = False  # the header was good for a request before
    _header: str = ""
    _challenge: oras.auth.utils.authHeader | None = None  # of a registry that wants tokens
    _actions: set[str] = field(default_factory=lambda: {"pull"})
    _also: set[str] = field(default_factory=set)  # other repositories that are read
    _renew_at: float = 0.0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def header(self, method: str, also: str = "") -> str:
        """The header for a request with `method`; empty while none was asked for.

        `also` is another repository that the request reads.
        """
        with self._lock:
            before = len(self._actions) + len(self._also)
            if method not in READS:
                self._actions.add("push")
            if also:
                self._also.add(also)
            more = len(self._actions) + len(self._also) > before
            if self._challenge and (more or time.monotonic() >= self._renew_at):
                self._fetch(self._challenge)
            elif self._header.startswith("Basic") and (login := self._login()):
                self._header = login.basic
            return self._header

    def forget(self, also: str) -> None:
        """Ask for no more rights to the other repository `also`."""
        with self._lock:
            self._also.discard(also)
            self._renew_at = 0.0

    def challenged(self, answer: requests.Response, sent: str) -> None:
        """Be ready for the next try after a 401 to a request with the header `sent`.

        Raises RefusedError where there is no way.
        """
        with self._lock:
            if sent and sent != self._header:
                return  # another request has renewed it meanwhile
            self._renew(challenges(answer.headers.get("WWW-Authenticate", "")))

    def _renew(self, wanted: dict[str, oras.auth.utils.authHeader]) -> None:
        if "bearer" in wanted:
            self._challenge = wanted["bearer"]
            self._fetch(self._challenge)
            return
        login = self._login() if "basic" in wanted else None
        if login and self.proven and self._header == login.basic and self.identity:
            login = self._login(afresh=True)  # the cloud took it back before its time
        if not login or login.identity_token or (self._header == login.basic and not self.proven):
            raise self.judge.unwelcome()
        self._header, self.proven = login.basic, False

    def _login(self, *, afresh: bool = False) -> Login | None:
        """The login to use now: the one that was given, or one that the identity makes."""
        login = self.judge.login
        if self.identity and (login is None or login.stale or afresh):
            try:
                self.judge.login = login = self.identity()
            except TransientError as error:
                raise Again(error.problems[0]) from None
        return login

    def _fetch(self, challenge: oras.auth.utils.authHeader) -> None:
        answer = self._from_server(challenge)
        status = answer.status_code
        if status in AGAIN or status > 500:
            what = f"has a token server that answered {status}"
            tries = 2 if status == 500 else None
            raise self.judge.again(
                "REG-133",
                what,
                "run the same command again later",
                wait=retry_after(answer),
                tries=tries,
            )
        if status != 200:
            raise self.judge.unwelcome()
        try:
            record = answer.json()
            token = record.get("token") or record["access_token"]
            lifetime = float(record.get("expires_in") or LIFETIME)
        except (ValueError, KeyError, TypeError, AttributeError):
            what = "has a token server that gave no token"
            raise self.judge.again(
                "REG-133", what, "tell the registry's administrator", tries=2
            ) from None
        self._header = f"Bearer {token}"
        self._renew_at = time.monotonic() + lifetime - min(RENEWED_BEFORE, lifetime / 2)

    def _from_server(self, challenge: oras.auth.utils.authHeader) -> requests.Response:
        realm = urlsplit(challenge.realm or "")
        if realm.scheme not in (("https", "http") if self.plain else ("https",)):
            what = "names a token server that is not reached by https"
            raise self.judge.refusal("REG-127", what, "tell the registry's administrator")
        scopes = self._scopes(challenge.scope or "")
        query: dict[str, Any] = {"service": challenge.service} if challenge.service else {}
        login, url = self._login(), realm.geturl()
        if login and login.identity_token:
            form = query | {"scope": " ".join(scopes), "grant_type": "refresh_token"}
            form |= {"client_id": "tuning", "refresh_token": login.identity_token}
            return self.ask("POST", url, data=form)
        headers = {"Authorization": login.basic} if login else {}
        return self.ask("GET", url, params=query | {"scope": scopes}, headers=headers)

    def _scopes(self, asked: str) -> list[str]:
        """What the registry asks for, and what will be done: one scope for each resource."""
        own = f"repository:{self.judge.reference.repository}:{','.join(self._actions)}"
        others = (f"repository:{name}:pull" for name in sorted(self._also))
        found: dict[str, set[str]] = {}
        for scope in (*asked.split(), own, *others):
            resource, _, actions = scope.rpartition(":")
            found.setdefault(resource, set()).update(actions.split(","))
        return [f"{resource}:{','.join(sorted(actions))}" for resource, actions in found.items()]


def challenges(header: str) -> dict[str, oras.auth.utils.authHeader]:
    """The parts of a WWW-Authenticate header by scheme, in lower case; it may hold several."""
    import oras.auth.utils  # late: it brings half a second of imports with it

    starts = list(re.finditer(r"(?:^|,)\s*(basic|bearer)(?:\s+|$)", header, re.IGNORECASE))
    ends = [match.start() for match in starts[1:]] + [len(header)]
    return {
        match[1].lower(): oras.auth.utils.parse_auth_header(header[match.end() : end])
        for match, end in zip(starts, ends, strict=True)
    }
