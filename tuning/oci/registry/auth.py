"""The Authorization header for one repository: Basic, or a Bearer token, kept fresh.

A token is requested with the scope that the registry names and with that of the next request: some
registries answer a token of too small a scope with a final 403.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlencode, urljoin, urlsplit

from tuning.errors import TransientError
from tuning.network.docker_config import Login
from tuning.network.policy import place
from tuning.network.retry import Again, is_retryable
from tuning.network.session import Response
from tuning.oci.registry.answers import READS, Errors, Reply
from tuning.oci.registry.challenges import Challenge

RENEWED_BEFORE = 60.0  # seconds before a token runs out
LIFETIME = 60.0  # seconds, by default
_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass
class Tokens:
    """The credentials for one repository, shared by concurrent uploads."""

    errors: Errors
    origin: str  # of the registry, such as https://ghcr.io
    ask: Callable[..., Response]  # Session.request
    identity: Callable[[], Login] | None = None  # makes a login if none was given
    proven: bool = False  # a request with the header succeeded before
    _header: str = ""
    _challenge: Challenge | None = None  # of a registry that wants tokens
    _actions: set[str] = field(default_factory=lambda: {"pull"})
    _also: set[str] = field(default_factory=set)  # other repositories to read
    _renew_at: float = 0.0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def header(self, method: str, also: str = "") -> str:
        """The header for a request with `method`; empty until the registry wants one.

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
        """Request no more rights to the other repository `also`."""
        with self._lock:
            self._also.discard(also)
            self._renew_at = 0.0

    def challenged(self, method: str, reply: Reply, sent: str) -> None:
        """Renew the header after a 401 to a request with the header `sent`.

        Raises RefusedError if that is impossible.
        """
        with self._lock:
            if sent and sent != self._header:
                return  # another request has renewed it
            self._renew(method, reply)

    def _renew(self, method: str, reply: Reply) -> None:
        known = reply.challenges
        if self._realm(known.get("bearer", {})):
            self._challenge = known["bearer"]
            self._fetch(self._challenge)
            return
        if "basic" not in known:
            raise self.errors.unknown_scheme(method, reply)
        login = self._login()
        if login and self.proven and self._header == login.basic and self.identity:
            login = self._login(afresh=True)  # revoked before its expiry
        if not login or login.identity_token or (self._header == login.basic and not self.proven):
            raise self.errors.denied(f"answered 401 to {method}{reply.quoted}", reply)
        self._header, self.proven = login.basic, False

    def _login(self, *, afresh: bool = False) -> Login | None:
        """The login to use now: the configured one, or one that the identity makes."""
        login = self.errors.login
        if self.identity and (login is None or login.stale or afresh):
            try:
                self.errors.login = login = self.identity()
            except TransientError as error:
                raise Again(error.problems[0]) from None
        return login

    def _fetch(self, challenge: Challenge) -> None:
        answer = self._from_server(challenge)
        status = answer.status
        if status != 200:
            reply = Reply.of(answer)
            what = f"has a token server that answered {status}{reply.quoted}"
            if is_retryable(status) or status > 500:
                change, tries = "run the same command again later", 2 if status == 500 else None
                raise self.errors.again("REG-133", what, change, after=reply.after, tries=tries)
            raise self.errors.denied(what, reply)
        try:
            record = answer.json()
            token = str(record.get("token") or record["access_token"])
            lifetime = float(record.get("expires_in") or LIFETIME)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            token = ""
        if not _TOKEN.fullmatch(token):
            what, change = "has a token server that gave no token", "tell its administrator"
            raise self.errors.again("REG-133", what, change, tries=2)
        self._header, self.errors.granted = f"Bearer {token}", self.errors.login is not None
        self._renew_at = time.monotonic() + lifetime - min(RENEWED_BEFORE, lifetime / 2)

    def _realm(self, challenge: Challenge) -> SplitResult | None:
        """The URL of the token server, None if the challenge names none that can be asked."""
        try:
            realm = urlsplit(urljoin(self.origin, challenge["realm"]))
            scheme, host, _ = place(realm.geturl())
        except (KeyError, ValueError):
            return None
        relative = "://" not in challenge["realm"] and not challenge["realm"].startswith("/")
        return None if relative or not host or scheme not in ("http", "https") else realm

    def _from_server(self, challenge: Challenge) -> Response:
        realm = self._realm(challenge)
        assert realm is not None
        if realm.scheme != "https" and self.origin.startswith("https:"):
            what = "names a token server that is not reached by https"
            raise self.errors.refusal("REG-127", what, "tell the registry's administrator")
        scopes = self._scopes(challenge.get("scope", ""))
        query = {name: challenge[name] for name in ("service",) if name in challenge}
        login, url = self._login(), realm.geturl()
        if login and login.identity_token:
            form = query | {"scope": " ".join(scopes), "grant_type": "refresh_token"}
            form |= {"client_id": "tuning", "refresh_token": login.identity_token}
            return self.ask("POST", url, form=form)
        headers = {"Authorization": login.basic} if login else {}
        pairs = [*query.items(), *(("scope", scope) for scope in scopes)]
        join = "&" if realm.query else "?"
        return self.ask("GET", f"{url}{join}{urlencode(pairs)}", headers=headers)

    def _scopes(self, requested: str) -> list[str]:
        """One scope a resource: what the registry requests, and what is needed here."""
        own = f"repository:{self.errors.reference.repository}:{','.join(self._actions)}"
        others = (f"repository:{name}:pull" for name in sorted(self._also))
        wanted: dict[str, set[str]] = {}
        for scope in (*requested.split(), own, *others):
            resource, _, actions = scope.rpartition(":")
            wanted.setdefault(resource, set()).update(actions.split(","))
        return [f"{resource}:{','.join(sorted(actions))}" for resource, actions in wanted.items()]
