"""The Authorization header that one repository wants: Basic, or a Bearer token, kept fresh.

A token is asked for with the scope that the registry names and with what is about to be done here:
some registries answer a token of too small a scope with 403, where no second question helps.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import requests

from tuning.registry.answers import AGAIN, Judge, retry_after

if TYPE_CHECKING:
    import oras.auth.utils

RENEWED_BEFORE = 60.0  # seconds before a token runs out
LIFETIME = 60.0  # seconds, where the token server does not say
READS = ("GET", "HEAD")


@dataclass
class Tokens:
    """What proves to one repository who we are."""

    judge: Judge
    plain: bool  # the registry is reached by plain http
    ask: Callable[..., requests.Response]  # (method, url, **more): one request, as it comes
    proven: bool = False  # the header was good for a request before
    _header: str = ""
    _challenge: oras.auth.utils.authHeader | None = None  # of a registry that wants tokens
    _actions: set[str] = field(default_factory=lambda: {"pull"})
    _renew_at: float = 0.0

    def header(self, method: str) -> str:
        """The header for a request with `method`; empty while none was asked for."""
        before = len(self._actions)
        if method not in READS:
            self._actions.add("push")
        if self._challenge and (len(self._actions) > before or time.monotonic() >= self._renew_at):
            self._fetch(self._challenge)
        return self._header

    def challenged(self, answer: requests.Response) -> None:
        """Be ready for the next try after a 401. Raises RefusedError where there is no way."""
        wanted = challenges(answer.headers.get("WWW-Authenticate", ""))
        login = self.judge.login
        if "bearer" in wanted:
            self._challenge = wanted["bearer"]
            self._fetch(self._challenge)
        elif "basic" in wanted and login and not login.identity_token:
            if self._header == login.basic and not self.proven:
                raise self.judge.unwelcome()
            self._header, self.proven = login.basic, False
        else:
            raise self.judge.unwelcome()

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
        login, url = self.judge.login, realm.geturl()
        if login and login.identity_token:
            form = query | {"scope": " ".join(scopes), "grant_type": "refresh_token"}
            form |= {"client_id": "tuning", "refresh_token": login.identity_token}
            return self.ask("POST", url, data=form)
        headers = {"Authorization": login.basic} if login else {}
        return self.ask("GET", url, params=query | {"scope": scopes}, headers=headers)

    def _scopes(self, asked: str) -> list[str]:
        """What the registry asks for, and what will be done: one scope for each resource."""
        own = f"repository:{self.judge.reference.repository}:{','.join(self._actions)}"
        found: dict[str, set[str]] = {}
        for scope in (*asked.split(), own):
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
