"""HTTP to one repository of one registry: retries, redirects, and where credentials may go."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

import requests

from tuning.errors import RefusedError, TransientError
from tuning.network import session
from tuning.network.docker_config import Login
from tuning.oci.registry.answers import Again, Judge
from tuning.oci.registry.auth import READS, Tokens
from tuning.spec.reference import DOCKER_HUB, Reference

log = logging.getLogger(__name__)

Result = TypeVar("Result")
LONGEST_RETRY_AFTER = 120.0  # seconds
LONGEST_WAIT = 30.0  # seconds, where the registry asks for none
MOST_REDIRECTS = 5
TIMEOUT = (10.0, 300.0)  # seconds to connect, and of silence


@dataclass(frozen=True)
class Patience:
    """For how long, in seconds, a failing operation is tried again, and from which wait on."""

    total: float = 900.0
    first: float = 1.0
    sleep: Callable[[float], None] = time.sleep


@dataclass
class Remote:
    """One repository, as this machine reaches it."""

    reference: Reference
    login: Login | None = None
    ca: Path | None = None  # trusted beside the usual ones
    client: tuple[Path, Path] | None = None  # certificate and key that prove who we are, for mTLS
    identity: Callable[[], Login] | None = None  # makes a login, and a new one when it is stale
    mount_from: str = ""  # a repository of this registry that may hold blobs of ours already
    insecure: bool = False  # plain http, also beyond loopback
    patience: Patience = field(default_factory=Patience)
    chunk: int = 32 << 20  # bytes; larger blobs are uploaded in pieces of this size
    in_pieces: int = 3  # how many uploads in pieces may fail before blobs are sent whole

    def __post_init__(self) -> None:
        registry = self.reference.registry
        self.host = "registry-1.docker.io" if registry == DOCKER_HUB else registry
        plain = self.insecure or (session.is_loopback(f"//{self.host}") and self.ca is None)
        self.origin = f"{'http' if plain else 'https'}://{self.host}"
        self.base = f"{self.origin}/v2/{self.reference.repository}"
        self.judge = Judge(self.reference, self.login)
        self.session = session.session(self.ca, self.client)
        self.lock = threading.Lock()  # of `in_pieces`, which uploads side by side share
        self._tokens = Tokens(self.judge, plain, self._ask, identity=self.identity)

    def request(
        self,
        method: str,
        url: str,
        *,
        expect: Container[int],
        body: Callable[[], Any] | None = None,
        headers: Mapping[str, str] | None = None,
        stream: bool = False,
        also: str = "",
    ) -> requests.Response:
        """One request, with the login that the registry asks for; a status of `expect`.

        `url` is absolute or starts below the repository. `body` makes the body anew for each send.
        `also` is another repository that the request reads. Raises RefusedError for a final no,
        Again for what may pass.
        """
        where = f"{self.base}{url}" if url.startswith("/") else self.absolute(url)
        renewed, redirects = False, 0
        while True:
            ours = self._ours(where)
            sent = {**(headers or {}), "Accept-Encoding": "identity"}
            if ours and (login := self._tokens.header(method, also)):
                sent["Authorization"] = login
            data = body() if body else None
            answer = self._ask(method, where, headers=sent, data=data, stream=stream)
            if answer.status_code == 401 and ours and not renewed:
                renewed = True  # one new token for each request
                with answer:
                    self._tokens.challenged(answer, sent.get("Authorization", ""))
                continue
            self._tokens.proven |= ours
            if answer.status_code in (301, 302, 303, 307, 308) and redirects < MOST_REDIRECTS:
                redirects += 1
                where = self._redirected(method, where, answer)
            elif answer.status_code in expect:
                return answer
            else:
                raise self.judge.status(method, answer)
            answer.close()

    def _ask(self, method: str, url: str, **more: Any) -> requests.Response:
        try:
            return self.session.request(
                method,
                url,
                timeout=TIMEOUT,
                allow_redirects=False,
                proxies=session.proxies(url),
                **more,
            )
        except (requests.exceptions.RequestException, OSError) as error:
            raise self.judge.unreachable(error) from None

    def absolute(self, location: str) -> str:
        """The URL that a Location header names.

        A registry behind a proxy that ends TLS may name itself with http: it is asked by https.
        """
        url = urlsplit(urljoin(f"{self.base}/", location))
        origin = urlsplit(self.origin)
        if url.scheme == "http" and origin.scheme == "https" and url.netloc == origin.netloc:
            url = url._replace(scheme="https")
        return url.geturl()

    def _redirected(self, method: str, url: str, answer: requests.Response) -> str:
        """Where a redirect leads, if it may be followed with this method."""
        location = answer.headers.get("Location", "")
        target = urlsplit(self.absolute(urljoin(url, location)))
        if not location or (method not in READS and answer.status_code < 307):
            raise self.judge.status(method, answer)
        if target.scheme != "https" and urlsplit(url).scheme == "https":
            what = "redirects from https to plain http"
            raise self.judge.refusal("REG-127", what, "tell the registry's administrator")
        return target.geturl()

    def _ours(self, url: str) -> bool:
        """Credentials go to the registry's own origin only."""
        return _place(urlsplit(url)) == _place(urlsplit(self.origin))

    def persist(
        self, work: Callable[[], Result], *, unless: Callable[[], bool] = lambda: False
    ) -> Result:
        """`work`, done again while it raises Again: full jitter, Retry-After honoured.

        `work` must be safe to repeat from its start. Raises TransientError when patience is over,
        or once `unless` is true.
        """
        failing_since, wait = None, self.patience.first
        limited: dict[str, int] = {}
        while True:
            try:
                return work()
            except Again as again:
                problem, now = again.problem, time.monotonic()
                failing_since = now if failing_since is None else failing_since
                limited[problem.what] = limited.get(problem.what, 0) + 1
                if again.wait is None:
                    pause = random.uniform(0, wait)  # noqa: S311
                else:
                    pause = min(again.wait, LONGEST_RETRY_AFTER)
                over = now - failing_since + pause > self.patience.total or unless()
                if over or limited[problem.what] >= (again.tries or limited[problem.what] + 1):
                    raise TransientError([problem]) from None
                log.info("trying again in %.1f s: %s", pause, problem)
                self.patience.sleep(pause)
                wait = min(wait * 2, LONGEST_WAIT)

    def forget(self, also: str) -> None:
        """Ask for no more rights to read the repository `also`."""
        self._tokens.forget(also)

    def refusal(self, code: str, what: str, change: str) -> RefusedError:
        """The error for a final no of this repository."""
        return self.judge.refusal(code, what, change)


def _place(url: SplitResult) -> tuple[str, str | None, int]:
    return url.scheme, url.hostname, url.port or (443 if url.scheme == "https" else 80)
