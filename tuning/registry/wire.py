"""HTTP to one repository of one registry: login, retries, and where credentials may go."""

from __future__ import annotations

import email.utils
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import oras.auth.utils
import requests

from tuning.credentials import Login
from tuning.errors import Problem, RefusedError, TransientError
from tuning.reference import Reference

log = logging.getLogger(__name__)

Result = TypeVar("Result")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
AGAIN = frozenset({408, 425, 429, 502, 503, 504})  # 500 too, but once
LONGEST_WAIT = 120.0  # seconds that a Retry-After may ask for
TIMEOUT = (10.0, 300.0)  # seconds to connect, and of silence


class Again(Exception):
    """A request failed in a way that another try may mend."""

    def __init__(self, problem: Problem, *, wait: float | None = None, status: int = 0) -> None:
        self.problem, self.wait, self.status = problem, wait, status
        super().__init__(str(problem))


@dataclass(frozen=True)
class Patience:
    """For how long, in seconds, a failing operation is tried again, and from which wait on."""

    total: float = 900.0
    first: float = 0.5
    sleep: Callable[[float], None] = time.sleep


@dataclass
class Remote:
    """One repository, as this machine reaches it."""

    reference: Reference
    login: Login | None = None
    ca: Path | None = None
    insecure: bool = False  # plain http, also beyond loopback
    patience: Patience = field(default_factory=Patience)
    _authorization: str = ""

    def __post_init__(self) -> None:
        host = self.reference.registry
        self.host = "registry-1.docker.io" if host == "docker.io" else host
        name = self.host.rpartition(":")[0] if ":" in self.host.rpartition("]")[2] else self.host
        plain = self.insecure or (name in LOOPBACK and self.ca is None)
        self.origin = f"{'http' if plain else 'https'}://{self.host}"
        self.base = f"{self.origin}/v2/{self.reference.repository}"
        self.session = requests.Session()
        self.session.trust_env = False  # no .netrc: a login is only what we were given
        bundle = os.environ.get("REQUESTS_CA_BUNDLE")
        self.session.verify = str(self.ca) if self.ca else bundle or True
        self.session.proxies = requests.utils.get_environ_proxies(self.origin)

    def request(
        self,
        method: str,
        url: str,
        *,
        expect: Iterable[int],
        body: Callable[[], Any] | None = None,
        headers: Mapping[str, str] | None = None,
        stream: bool = False,
    ) -> requests.Response:
        """One request, with the login that the registry asks for; a status of `expect`.

        `url` is absolute or starts below the repository. `body` makes the body anew for each send.
        Raises RefusedError for a final no, Again for what may pass.
        """
        where = f"{self.base}{url}" if url.startswith("/") else url
        answer = self._send(method, where, body, headers, stream)
        if answer.status_code == 401 and self._ours(where):
            self._authorization = self._answer_to(answer)  # 401: one new token a request
            answer = self._send(method, where, body, headers, stream)
        if answer.status_code in expect:
            return answer
        raise self._judge(method, answer)

    def _send(
        self,
        method: str,
        url: str,
        body: Callable[[], Any] | None,
        headers: Mapping[str, str] | None,
        stream: bool,
    ) -> requests.Response:
        sent = dict(headers or {}) | {"Accept-Encoding": "identity"}
        if self._authorization and self._ours(url):
            sent["Authorization"] = self._authorization
        try:
            return self.session.request(
                method,
                url,
                data=body() if body else None,
                headers=sent,
                stream=stream,
                timeout=TIMEOUT,
                allow_redirects=method in ("GET", "HEAD"),
            )
        except requests.exceptions.SSLError as error:
            what = f"failed at TLS: {_reason(error)}"
            raise self.refusal("REG-126", what, self._tls_hint()) from None
        except (requests.exceptions.RequestException, OSError) as error:
            what = f"cannot be reached ({_reason(error)})"
            change = "check that the registry is up, its name, and the network"
            raise Again(self._problem("REG-131", what, change)) from None

    def _ours(self, url: str) -> bool:
        """Credentials go to the registry's own origin only."""
        return f"{url}/".startswith((f"{self.origin}/", f"{self.origin}?"))

    def absolute(self, location: str) -> str:
        """The URL that a Location header names."""
        return urljoin(f"{self.base}/", location)

    def _answer_to(self, answer: requests.Response) -> str:
        """The Authorization header that a 401 asks for. Raises RefusedError where we have none."""
        challenge = answer.headers.get("WWW-Authenticate", "")
        kind = challenge.partition(" ")[0].lower()
        if kind == "basic" and self.login and not self.login.identity_token:
            if self._authorization == self.login.basic:
                raise self._unwelcome()
            return self.login.basic
        if kind == "bearer":
            return f"Bearer {self._token(challenge)}"
        raise self._unwelcome()

    def _token(self, challenge: str) -> str:
        asked = oras.auth.utils.parse_auth_header(challenge)
        realm = urlsplit(asked.realm or "")
        if realm.scheme not in ("https", urlsplit(self.origin).scheme) or not realm.netloc:
            raise self.refusal(
                "REG-127", "names no token server that may be asked", "ask its administrator"
            )
        details = {"service": asked.service, "scope": asked.scope}
        query = {name: value for name, value in details.items() if value}
        login, url = self.login, realm.geturl()
        try:
            if login and login.identity_token:
                form = query | {"grant_type": "refresh_token", "client_id": "tuning"}
                form["refresh_token"] = login.identity_token
                answer = self.session.post(url, data=form, timeout=TIMEOUT, allow_redirects=False)
            else:
                headers = {"Authorization": login.basic} if login else {}
                answer = self.session.get(
                    url, params=query, headers=headers, timeout=TIMEOUT, allow_redirects=False
                )
        except (requests.exceptions.RequestException, OSError) as error:
            what = f"has a token server that cannot be reached ({_reason(error)})"
            raise Again(self._problem("REG-132", what, "check the network")) from None
        if answer.status_code in (401, 403):
            raise self._unwelcome()
        if answer.status_code != 200:
            what = f"has a token server that answered {answer.status_code}"
            raise Again(
                self._problem("REG-132", what, "try again later"),
                wait=_retry_after(answer),
                status=answer.status_code,
            )
        try:
            record = answer.json()
            token = record.get("token") or record["access_token"]
        except (ValueError, KeyError, AttributeError):
            what = "has a token server that gave no token"
            raise Again(self._problem("REG-132", what, "try again later")) from None
        return str(token)

    def _judge(self, method: str, answer: requests.Response) -> RefusedError | Again:
        """What a status that nobody wanted means."""
        status = answer.status_code
        said = f"answered {status} to {method}{_detail(answer)}"
        if status in AGAIN or status >= 500:
            problem = self._problem("REG-130", said, "try again later")
            return Again(problem, wait=_retry_after(answer), status=status)
        if status == 401:
            return self._unwelcome()
        if status == 403:
            change = f"give {self._who()} the right to do that in {self.reference.repository}"
            return self.refusal("REG-122", said, change)
        if status == 404:
            change = "check the name; some registries want a repository to be made first"
            return self.refusal("REG-123", said, change)
        if status == 413:
            return self.refusal("REG-124", said, "raise the limit on uploads, or use a lower rank")
        return self.refusal("REG-125", said, "check the reference and the registry's settings")

    def _unwelcome(self) -> RefusedError:
        if self.login is None:
            what, change = "wants a login, and there is none", "name a Secret (--push-secret FILE)"
        else:
            what = f"refuses the login from {self.login.origin}"
            change = "renew that Secret's user and password"
        return self.refusal("REG-121", what, change)

    def _who(self) -> str:
        return f"the login from {self.login.origin}" if self.login else "everybody"

    def _tls_hint(self) -> str:
        return "trust its certificate with --ca FILE, or say --insecure if it talks plain http"

    def _problem(self, code: str, what: str, change: str) -> Problem:
        return Problem(code, str(self.reference), what, change)

    def refusal(self, code: str, what: str, change: str) -> RefusedError:
        """The error for a final no of this repository."""
        return RefusedError([self._problem(code, what, change)])

    def persist(self, work: Callable[[], Result]) -> Result:
        """`work`, done again while it raises Again: full jitter, Retry-After honoured.

        `work` must be safe to repeat from its start. Raises TransientError when patience is over.
        """
        started, wait, broken = time.monotonic(), self.patience.first, 0
        while True:
            try:
                return work()
            except Again as again:
                broken += again.status == 500
                spent = time.monotonic() - started
                pause = min(again.wait, LONGEST_WAIT) if again.wait else random.uniform(0, wait)  # noqa: S311
                if broken > 1 or spent + pause > self.patience.total:
                    raise TransientError([again.problem]) from None
                log.info("trying again in %.1f s: %s", pause, again.problem)
                self.patience.sleep(pause)
                wait = min(wait * 2, 30.0)


def _retry_after(answer: requests.Response) -> float | None:
    """Seconds that the answer asks to wait: a number, or until a date."""
    text = answer.headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _detail(answer: requests.Response) -> str:
    """The registry's own words, if it has some: the first error's code and message."""
    try:
        first = answer.json()["errors"][0]
        text = ": ".join(str(first[name]) for name in ("code", "message") if first.get(name))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return ""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return f" ({printable[:160]})" if printable else ""


def _reason(error: BaseException) -> str:
    """The innermost cause of a transport error, in few words."""
    text = str(error)
    for words in ("Connection refused", "timed out", "Name or service not known", "reset by peer"):
        if words in text:
            return words.lower()
    if "resolve" in text or "name resolution" in text:
        return "the name does not resolve"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "its certificate is not trusted" + text.partition("FAILED]")[2].partition("(")[0]
    if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER" in text:
        return "it does not talk TLS"
    return type(error).__name__
