"""HTTP to one repository of one registry: retries, redirects, and where credentials may go."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Container, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from tuning.network import retry
from tuning.network.docker_config import Login
from tuning.network.policy import place
from tuning.network.retry import Patience
from tuning.network.session import Response, Session, Unreachable, is_loopback
from tuning.oci.registry.answers import HUB_HOST, READS, Errors, Reply
from tuning.oci.registry.auth import Tokens
from tuning.spec.reference import DOCKER_HUB, Reference

Result = TypeVar("Result")
MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_REFUSED_BY_STORE = (400, 401, 403, 404, 410)  # to an address that is signed for a while
OVERWRITE = "set the annotation tuning.kaito.sh/on-tag-exists: overwrite"
TIMEOUT = (10.0, 300.0)  # seconds to connect, and of silence


@dataclass
class Remote:
    """The client of one repository."""

    reference: Reference
    login: Login | None = None
    ca: Path | None = None  # trusted beside the usual authorities
    client: tuple[Path, Path] | None = None  # certificate and key for mutual TLS
    identity: Callable[[], Login] | None = None  # makes a login, and renews it
    option: str = "--pull-secret FILE"  # of the command, for a login
    no_login: str = ""  # why there is none, if that is known
    replace: str = OVERWRITE  # how the command replaces what a tag holds
    mount_from: str = ""  # a repository of this registry that may have our blobs
    insecure: bool = False  # plain http, also beyond loopback
    patience: Patience = field(default_factory=Patience)
    chunk: int = 32 << 20  # bytes; larger blobs are uploaded in pieces of this size
    in_pieces: int = 3  # uploads in pieces that may fail before blobs are sent whole
    head: bool = True  # the registry answers HEAD for blobs

    def __post_init__(self) -> None:
        registry = self.reference.registry
        self.host = HUB_HOST if registry == DOCKER_HUB else registry
        plain = self.insecure or (is_loopback(f"//{self.host}") and self.ca is None)
        self.origin = f"{'http' if plain else 'https'}://{self.host}"
        self.base = f"{self.origin}/v2/{self.reference.repository}"
        self.errors = Errors(self.reference, self.login, self.option, self.no_login)
        self._session = Session(self.ca, self.client)
        self.lock = threading.Lock()  # of `in_pieces`, shared by concurrent uploads
        self.tokens = Tokens(self.errors, self.origin, self._ask, identity=self.identity)

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
    ) -> Response:
        """One request with the credentials that the registry wants; a status in `expect`.

        `url` is absolute or starts below the repository; the answer's `url` is where it came from.
        `body` makes the body for each send. `also` is another repository that the request reads.
        Raises RefusedError for a final refusal, Again for a failure that may pass.
        """
        where = f"{self.base}{url}" if url.startswith("/") else self.absolute(url)
        renewed, redirects = False, 0
        while True:
            ours = self._ours(where)
            sent = {**(headers or {}), "Accept-Encoding": "identity"}
            if ours and (login := self.tokens.header(method, also)):
                sent["Authorization"] = login
            data = body() if body else None
            answer = self._ask(method, where, headers=sent, body=data, stream=stream)
            if answer.status == 401 and ours and not renewed:
                renewed = True  # one new token for each request
                with closing(answer):
                    reply = Reply.of(answer)
                self.tokens.challenged(method, reply, sent.get("Authorization", ""))
                continue
            self.tokens.proven |= ours
            if answer.status in _REDIRECTS and redirects < MOST_REDIRECTS:
                redirects += 1
                with closing(answer):
                    where = self._redirected(method, where, answer)
                continue
            if answer.status in expect:
                answer.url = where
                return answer
            with closing(answer):
                reply = Reply.of(answer)
            if not ours and reply.status in _REFUSED_BY_STORE:
                raise self.errors.elsewhere(method, where, reply)
            raise self.errors.status(method, reply)

    def check_json(self, data: bytes) -> None:
        """Raise Again for bytes that are not JSON and have no digest to be checked against."""
        try:
            json.loads(data)
        except (ValueError, RecursionError):
            raise self.errors.not_http("sends a document that is not JSON") from None

    def _ask(self, method: str, url: str, **more: Any) -> Response:
        try:
            return self._session.request(method, url, timeout=TIMEOUT, **more)
        except Unreachable as error:
            raise self.errors.unreachable(error, url) from None

    def absolute(self, location: str, base: str = "") -> str:
        """The URL that a Location header names in the answer from `base`, or from the registry.

        A registry behind a proxy that terminates TLS may name itself with http: https is used.
        """
        try:
            origin = urlsplit(base or f"{self.base}/")
            url = urlsplit(urljoin(origin.geturl(), location))
            place(url.geturl())
        except ValueError:
            raise self.errors.not_http("names an invalid URL") from None
        if url.scheme == "http" and origin.scheme == "https":
            if url.netloc not in (origin.netloc, urlsplit(self.origin).netloc):
                what = "redirects from https to plain http"
                raise self.errors.refusal("REG-127", what, "tell the registry's administrator")
            url = url._replace(scheme="https")
        return url.geturl()

    def _redirected(self, method: str, url: str, answer: Response) -> str:
        """The target of a redirect, if `method` may follow it."""
        location = answer.headers.get("Location", "")
        if not location or (method not in READS and answer.status < 307):
            raise self.errors.status(method, Reply.of(answer))
        return self.absolute(location, url)

    def _ours(self, url: str) -> bool:
        """Whether `url` has the registry's origin, which alone gets credentials."""
        return place(url) == place(self.origin)

    def persist(
        self, work: Callable[[], Result], *, unless: Callable[[], bool] = lambda: False
    ) -> Result:
        """`work`, done again while it raises Again: see `retry.persist`."""
        return retry.persist(work, self.patience, unless=unless)
