"""Errors for what a registry answers, or does not answer: a final refusal, or worth another try.

Every refusal shows the registry's own words: they alone say which right is missing, which password
has expired, or that a second factor is wanted.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

from urllib3.exceptions import HTTPError

from tuning.errors import Problem, RefusedError, TransientError, TuningError, printable
from tuning.network.answer import NotHttp, whole
from tuning.network.docker_config import Login
from tuning.network.retry import Again, is_retryable, retry_after
from tuning.network.session import Response, Unreachable, unreachable
from tuning.oci.registry.challenges import Challenge, parse
from tuning.spec.reference import Reference

LARGEST_REASON = 1 << 16  # bytes of an error's body that are read
LONGEST_WORDS = 300  # characters of it that are shown
READS = ("GET", "HEAD")
HUB_HOST = "registry-1.docker.io"  # of docker.io
_TEXT = 1 << 12  # characters of a body without JSON that are read
_MARKUP = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", re.DOTALL | re.IGNORECASE)
_SAYS = (
    *("errors", "code", "error", "message", "error_description", "errorMessage"),
    *("title", "detail", "details", "reason"),
)
_FULL = re.compile(
    r"quota|storage (limit|resource)|insufficient (storage|space|disk)|no space left", re.I
)
_NO_RIGHT = re.compile(r"insufficient|\bscopes?\b", re.I)
_MAY_NOT = re.compile(r"authori[sz]ed to|not authori[sz]ed|denied|permission|forbidden", re.I)
_NO_LOGIN = re.compile(
    r"expired|re-?authenticat|password|credential|two.factor|\b(2fa|mfa|otp)\b|invalid.token|"
    r"access token|unknown user|log.?in again|deactivated|suspended|disabled|locked",
    re.I,
)
_WANTS_TLS = re.compile(r"HTTP request (was sent )?to (an )?HTTPS|plain HTTP to an SSL", re.I)
_CERTIFICATE = "trust its certificate with --ca FILE"


@dataclass(frozen=True)
class Reply:
    """What an answer says: its status, its words, its challenges."""

    status: int
    code: str = ""  # of the first error, such as BLOB_UPLOAD_UNKNOWN
    words: str = ""  # one line without markup and control characters, bounded
    challenges: Mapping[str, Challenge] = field(default_factory=dict)
    after: float | None = None  # seconds until another try

    @classmethod
    def of(cls, answer: Response) -> Self:
        """The reply of an answer, whose body is read."""
        text, asked = _text(answer), parse(answer.headers.getlist("WWW-Authenticate"))
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            record = None
        words = ": ".join(dict.fromkeys(_phrases(record))) if record is not None else _plain(text)
        if not words:  # RFC 6750 has them in the challenge
            bearer = asked.get("bearer", {})
            known = (bearer.get(name) for name in ("error", "error_description"))
            words = ": ".join(filter(None, known))
        return cls(answer.status, _code(record), _line(words), asked, retry_after(answer.headers))

    @property
    def quoted(self) -> str:
        """The words in brackets, after a space; nothing if there are none."""
        return f" ({self.words})" if self.words else ""

    @property
    def is_about_rights(self) -> bool:
        """Whether it says that the login is good but may not do this."""
        bearer = self.challenges.get("bearer", {}).get("error", "")
        if bearer == "insufficient_scope" or _NO_RIGHT.search(self.words):
            return True
        denied = self.status == 403 or self.code == "DENIED"
        return denied and not self.is_about_login

    @property
    def is_about_login(self) -> bool:
        """Whether it says that a login has expired, is wrong or is not enough."""
        bearer = self.challenges.get("bearer", {}).get("error", "")
        return bearer == "invalid_token" or _NO_LOGIN.search(self.words) is not None


def _text(answer: Response) -> str:
    """The beginning of the answer's body."""
    try:
        data = answer.read(LARGEST_REASON) or answer.data
        return data[:LARGEST_REASON].decode("utf-8", "replace")
    except (HTTPError, OSError):
        return ""


def _phrases(value: Any, depth: int = 0) -> Iterator[str]:
    """The texts in an error's JSON, in whichever of the usual forms it is."""
    if isinstance(value, dict) and depth < 5:
        known = [value[name] for name in _SAYS if value.get(name)]
        for each in known or [each for each in value.values() if isinstance(each, str)]:
            yield from _phrases(each, depth + 1)
    elif isinstance(value, list) and depth < 5:
        for each in value[:5]:
            yield from _phrases(each, depth + 1)
    elif isinstance(value, str | int) and str(value).strip():
        yield str(value)


def _code(record: Any) -> str:
    try:
        return str(record["errors"][0]["code"])
    except (KeyError, IndexError, TypeError):
        return ""


def _plain(text: str) -> str:
    """The text of a page of HTML or XML, or of a plain answer; nothing of binary data."""
    text = text[:_TEXT]
    unreadable = sum((not c.isprintable() and not c.isspace()) or c == "\ufffd" for c in text)
    return "" if unreadable * 3 > len(text) else html.unescape(_MARKUP.sub(" ", text))


def _line(text: str) -> str:
    line = " ".join(text.split())
    return printable(line if len(line) <= LONGEST_WORDS else f"{line[: LONGEST_WORDS - 3]}...")


@dataclass
class Errors:
    """The errors of one repository."""

    reference: Reference
    login: Login | None  # in use
    option: str = "--pull-secret FILE"  # the command's option that names a login
    no_login: str = ""  # why there is none, if that is known
    granted: bool = False  # a token server has accepted the login

    def refusal(self, code: str, what: str, change: str) -> RefusedError:
        """The error of a final refusal."""
        return RefusedError([self._problem(code, what, change)])

    def again(
        self,
        code: str,
        what: str,
        change: str,
        *,
        after: float | None = None,
        tries: int | None = None,
        final: type[TuningError] = TransientError,
    ) -> Again:
        """The error of a failure that may pass."""
        return Again(self._problem(code, what, change), after=after, tries=tries, final=final)

    def _problem(self, code: str, what: str, change: str) -> Problem:
        return Problem(code, str(self.reference), self._without_secrets(what), change)

    def _without_secrets(self, text: str) -> str:
        """`text` without the login, which a registry may send back in its words."""
        login = self.login
        secrets = (login.password, login.identity_token, login.basic[6:]) if login else ()
        for secret in secrets:
            text = text.replace(secret, "<redacted>") if len(secret) > 3 else text
        return text

    def status(self, method: str, reply: Reply) -> RefusedError | Again:
        """The error of an unexpected status."""
        status, what = reply.status, f"answered {reply.status} to {method}{reply.quoted}"
        if is_retryable(status):
            tries, change = 2 if status == 500 else None, "run the same command again later"
            return self.again("REG-130", what, change, after=reply.after, tries=tries)
        if status == 507 or (_FULL.search(reply.words) and status in (400, 403, 412, 413)):
            change = "free some space in the registry, or raise its quota"
            return self.refusal("REG-128", what, change)
        if status in (401, 403):
            return self.denied(what, reply)
        if status == 404:
            change = "check the name; some registries want a repository to be made first"
            return self.refusal("REG-123", what, change)
        if status == 405 and method not in READS:
            change = "push to another registry: this one looks like a read-only mirror"
            return self.refusal("REG-129", what, change)
        if status == 413:
            change = "raise the limit on uploads of the registry, or of the proxy before it"
            return self.refusal("REG-124", what, change)
        if _WANTS_TLS.search(reply.words):
            what, change = "talks TLS, but was asked in plain http", f"{_CERTIFICATE}, "
            change += "without --insecure"
            return self.refusal("REG-126", what, change)
        return self.refusal("REG-125", what, "check the reference and the registry's settings")

    def denied(self, what: str, reply: Reply) -> RefusedError:
        """The error of a refusal for want of a login (REG-121), or of a right (REG-122).

        `what` was answered.
        """
        repository, login = self.reference.repository, self.login
        if login is None:
            why = f": {self.no_login}" if self.no_login else ""
            change = f"check the name, or name a login for it ({self.option}, or docker login)"
            if reply.status == 403:
                return self.refusal("REG-122", f"{what}; there is no login{why}", change)
            what = f"wants a login, and there is none{why}; it {what}"
            return self.refusal("REG-121", what, change)
        # With a token, a registry's "not authorized" is about what the token's login may do.
        accepted = self.granted and not reply.is_about_login
        if reply.is_about_rights or (accepted and _MAY_NOT.search(reply.words)):
            change = f"give the login from {login.origin} the right to do that in {repository}"
            return self.refusal("REG-122", what, change)
        what = f"refuses the login from {login.origin}; it {what}"
        change = f"renew the user and password there, or name another login ({self.option})"
        return self.refusal("REG-121", what, change)

    def unknown_scheme(self, method: str, reply: Reply) -> RefusedError:
        """The error of a 401 that offers neither a Basic nor a usable Bearer login."""
        offers = ", ".join(_line(name)[:40] for name in [*reply.challenges][:5])
        what = f"answered {reply.status} to {method}{reply.quoted} and offers "
        what += f"no login that is known here, only {offers}" if offers else "no way to log in"
        change = "make it, or the proxy before it, offer Basic or Bearer, as registries do"
        return self.refusal("REG-121", what, change)

    def elsewhere(self, method: str, url: str, reply: Reply) -> RefusedError | Again:
        """The error of another host, to which the registry sends a request."""
        host = urlsplit(url).netloc
        what = f"sends it to {host}, which answered {reply.status} to {method}{reply.quoted}"
        if reply.status == 401:
            what = f"{what}; no login is sent there"
            return self.refusal("REG-121", what, "tell the registry's administrator")
        change = "let this machine use that store (its policy, its network), and check the clock"
        return self.again("REG-138", what, change, tries=3, final=RefusedError)

    def not_http(self, what: str) -> Again:
        """The failure of an answer that HTTP does not allow."""
        change = "run the same command again; a proxy or the registry breaks its answers"
        return self.again("REG-136", what, change, tries=3)

    def body(self, answer: Response, largest: int) -> bytes:
        """The whole body of an answer, one byte more than `largest` if it is longer.

        Raises RefusedError or Again where it breaks off.
        """
        try:
            return whole(answer, largest)
        except NotHttp as fault:
            raise self.not_http(f"its answer {fault}") from None
        except HTTPError as error:
            raise self.unreachable(error) from None

    def unreachable(self, error: Exception, url: str = "") -> RefusedError | Again:
        """The error of a request without an answer, or of an answer that breaks off.

        `url` was asked: the registry's, or of a store or token server that it names.
        """
        failure = error if isinstance(error, Unreachable) else unreachable(error)
        host = urlsplit(url).netloc or self.reference.registry
        other = host not in (self.reference.registry, HUB_HOST)
        at, name = (
            (f" (at {host})" if other else ""),
            f"the name of {host}" if other else "its name",
        )
        change = "check the registry's name: it is wrong, or the registry is down"
        match failure.kind:
            case "certificate":
                what = f"its certificate is not trusted: {failure.reason}{at}"
                return self.refusal("REG-126", what, _CERTIFICATE)
            case "tls":
                change = "say --insecure if it talks plain http"
                return self.refusal("REG-126", f"TLS failed: {failure.reason}{at}", change)
            case "url":
                change = "check the reference and the registry's settings"
                return self.refusal("REG-125", "redirected to an invalid URL", change)
            case "host":
                what = f"there is no host {host.partition(':')[0]}"
                return self.again("REG-131", what, change)
            case "dns":
                what, change = f"{name} cannot be looked up", "check the network's DNS"
                return self.again("REG-131", what, change)
            case "timeout" | "silent":
                what = f"{host} does not answer"
                return self.again("REG-131", what, "check the network, then run it again")
            case "connect":
                what = f"cannot connect: {failure.reason}{at}"
                return self.again("REG-131", what, change)
        what = f"the connection to the registry broke{at}"
        return self.again("REG-132", what, "run the same command again")
