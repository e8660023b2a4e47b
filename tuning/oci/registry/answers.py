"""Errors for what a registry answers, or does not answer: a final refusal, or worth another try."""

from __future__ import annotations

import json
from dataclasses import dataclass

from urllib3.exceptions import HTTPError

from tuning.errors import Problem, RefusedError
from tuning.network.answer import NotHttp, whole
from tuning.network.docker_config import Login
from tuning.network.retry import Again, is_retryable, retry_after
from tuning.network.session import Response, Unreachable, unreachable
from tuning.spec.reference import Reference

LARGEST_REASON = 1 << 16  # bytes of an error's body that are read
_CERTIFICATE = "trust its certificate with --ca FILE"


@dataclass
class Errors:
    """The errors of one repository."""

    reference: Reference
    login: Login | None  # in use

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
    ) -> Again:
        """The error of a failure that may pass."""
        return Again(self._problem(code, what, change), after=after, tries=tries)

    def _problem(self, code: str, what: str, change: str) -> Problem:
        return Problem(code, str(self.reference), what, change)

    def status(self, method: str, answer: Response) -> RefusedError | Again:
        """The error of an unexpected status."""
        status, text = answer.status, _text(answer)
        message = _message(text)
        what = f"answered {status} to {method}{f' ({message})' if message else ''}"
        if is_retryable(status):
            after, tries = retry_after(answer.headers), 2 if status == 500 else None
            change = "run the same command again later"
            return self.again("REG-130", what, change, after=after, tries=tries)
        full = any(word in message.lower() for word in ("quota", "storage limit", "insufficient"))
        if status == 507 or (full and status in (400, 403, 413)):
            change = "free some space in the registry, or raise its quota"
            return self.refusal("REG-128", what, change)
        match status:
            case 401:
                return self.unauthorized()
            case 403:
                who = f"the login from {self.login.origin}" if self.login else "everybody"
                change = f"give {who} the right to do that in {self.reference.repository}"
                return self.refusal("REG-122", what, change)
            case 404:
                change = "check the name; some registries want a repository to be made first"
                return self.refusal("REG-123", what, change)
            case 405:
                change = "push to another registry: this one looks like a read-only mirror"
                return self.refusal("REG-129", what, change)
            case 413:
                change = "raise the limit on uploads of the registry, or of the proxy before it"
                return self.refusal("REG-124", what, change)
        if "HTTP request to an HTTPS server" in text[:200]:
            return self.refusal("REG-126", "talks TLS, but was asked in plain http", _CERTIFICATE)
        return self.refusal("REG-125", what, "check the reference and the registry's settings")

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

    def unauthorized(self) -> RefusedError:
        """The error of a 401 that no login of ours prevents."""
        if self.login is None:
            what = "wants a login, and there is none"
            change = f"name a Secret for {self.reference.registry} (--push-secret FILE)"
        else:
            what = f"refuses the login from {self.login.origin}"
            change = "renew that Secret's user and password"
        return self.refusal("REG-121", what, change)

    def unreachable(self, error: Exception) -> RefusedError | Again:
        """The error of a request without an answer, or of an answer that breaks off."""
        failure = error if isinstance(error, Unreachable) else unreachable(error)
        change = "check the registry's name: it is wrong, or the registry is down"
        match failure.kind:
            case "certificate":
                what = f"its certificate is not trusted: {failure.reason}"
                return self.refusal("REG-126", what, _CERTIFICATE)
            case "tls":
                change = "say --insecure if it talks plain http"
                return self.refusal("REG-126", f"TLS failed: {failure.reason}", change)
            case "url":
                change = "check the reference and the registry's settings"
                return self.refusal("REG-125", "redirected to an invalid URL", change)
            case "host":
                what = f"there is no host {self.reference.registry.partition(':')[0]}"
                return self.again("REG-131", what, change)
            case "dns":
                what, change = "its name cannot be looked up", "check the network's DNS"
                return self.again("REG-131", what, change)
            case "timeout" | "silent":
                what = f"{self.reference.registry} does not answer"
                return self.again("REG-131", what, "check the network, then run it again")
            case "connect":
                return self.again("REG-131", f"cannot connect: {failure.reason}", change)
        what = "the connection to the registry broke"
        return self.again("REG-132", what, "run the same command again")


def code(answer: Response) -> str:
    """The code of the first error in the answer, such as BLOB_UPLOAD_UNKNOWN; or nothing."""
    return str(_first(_text(answer)).get("code", ""))


def _message(text: str) -> str:
    """Code and message of the first error in the answer, if any."""
    first = _first(text)
    both = ": ".join(str(first[name]) for name in ("code", "message") if first.get(name))
    return "".join(c if c.isprintable() else " " for c in both)[:160]


def _first(text: str) -> dict[str, object]:
    try:
        first = json.loads(text)["errors"][0]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return {}
    return first if isinstance(first, dict) else {}


def _text(answer: Response) -> str:
    """The beginning of the answer's body."""
    try:
        data = answer.read(LARGEST_REASON) or answer.data
        return data[:LARGEST_REASON].decode("utf-8", "replace")
    except (HTTPError, OSError):
        return ""
