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
from tuning.oci.registry.answers import Errors
from tuning.oci.registry.auth import READS, Tokens
from tuning.spec.reference import DOCKER_HUB, Reference

Result = TypeVar("Result")
MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
TIMEOUT = (10.0, 300.0)  # seconds to connect, and of silence


@dataclass
class Remote:
    """The client of one repository."""

    reference: Reference
    login: Login | None = None
    ca: Path | None = None  # trusted beside the usual authorities
    client: tuple[Path, Path] | None = None  # certificate and key for mutual TLS
    identity: Callable[[], Login] | None = None  # makes a login, and renews it
    mount_from: str = ""  # a repository of this registry that may have our blobs
    insecure: bool = False  # plain http, also beyond loopback
    patience: Patience = field(default_factory=Patience)
    chunk: int = 32 << 20  # bytes; larger blobs are uploaded in pieces of this size
    in_pieces: int = 3  # uploads in pieces that may fail before blobs are sent whole

    def __post_init__(self) -> None:
        registry = self.reference.registry
        self.host = "registry-1.docker.io" if registry == DOCKER_HUB else registry
        plain = self.insecure or (is_loopback(f"//{self.host}") and self.ca is None)
        self.origin = f"{'http' if plain else 'https'}://{self.host}"
        self.base = f"{self.origin}/v2/{self.reference.repository}"
        self.errors = Errors(self.reference, self.login)
        self._session = Session(self.ca, self.client)
        self.lock = threading.Lock()  # of `in_pieces`, shared by concurrent uploads
        self.tokens = Tokens(self.errors, plain, self._ask, identity=self.identity)

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

        `url` is absolute or starts below the repository. `body` makes the body for each send.
        `also` is another repository that the request reads. Raises RefusedError for a final
        refusal, Again for a failure that may pass.
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
                    self.tokens.challenged(answer, sent.get("Authorization", ""))
                continue
            self.tokens.proven |= ours
            if answer.status in _REDIRECTS and redirects < MOST_REDIRECTS:
                redirects += 1
                with closing(answer):
                    where = self._redirected(method, where, answer)
                continue
            if answer.status in expect:
                return answer
            with closing(answer):
                raise self.errors.status(method, answer)

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
            raise self.errors.unreachable(error) from None

    def absolute(self, location: str) -> str:
        """The URL that a Location header names.

        A registry behind a proxy that terminates TLS may name itself with http: https is used.
        """
        try:
            url = urlsplit(urljoin(f"{self.base}/", location))
            place(url.geturl())
        except ValueError:
            raise self.errors.not_http("names an invalid URL") from None
        origin = urlsplit(self.origin)
        if url.scheme == "http" and origin.scheme == "https" and url.netloc == origin.netloc:
            url = url._replace(scheme="https")
        return url.geturl()

    def _redirected(self, method: str, url: str, answer: Response) -> str:
        """The target of a redirect, if `method` may follow it."""
        location = answer.headers.get("Location", "")
        try:
            location = location and urljoin(url, location)
        except ValueError:
            raise self.errors.not_http("redirects to an invalid URL") from None
        target = urlsplit(self.absolute(location))
        if not location or (method not in READS and answer.status < 307):
            raise self.errors.status(method, answer)
        if target.scheme != "https" and urlsplit(url).scheme == "https":
            what = "redirects from https to plain http"
            raise self.errors.refusal("REG-127", what, "tell the registry's administrator")
        return target.geturl()

    def _ours(self, url: str) -> bool:
        """Whether `url` has the registry's origin, which alone gets credentials."""
        return place(url) == place(self.origin)

    def persist(
        self, work: Callable[[], Result], *, unless: Callable[[], bool] = lambda: False
    ) -> Result:
        """`work`, done again while it raises Again: see `retry.persist`."""
        return retry.persist(work, self.patience, unless=unless)
