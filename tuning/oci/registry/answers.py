"""What a registry's answer means, or its silence: a final no, or worth another try."""

from __future__ import annotations

import email.utils
import socket
import ssl
import time
from dataclasses import dataclass

import requests
import urllib3.exceptions

from tuning.errors import Problem, RefusedError
from tuning.network.docker_config import Login
from tuning.spec.reference import Reference

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})  # and what CDNs put above 507
_CERTIFICATE = "trust its certificate with --ca FILE"


class Again(Exception):
    """A request failed in a way that another try may mend.

    `wait` is what the registry asked for, in seconds; `tries` is how often this kind of failure may
    come up in one operation, as often as patience lasts if None.
    """

    def __init__(
        self, problem: Problem, *, wait: float | None = None, tries: int | None = None
    ) -> None:
        self.problem, self.wait, self.tries = problem, wait, tries
        super().__init__(str(problem))


@dataclass
class Judge:
    """Puts what one repository says, or does not say, into words for the person who must act."""

    reference: Reference
    login: Login | None  # the one that is in use

    def refusal(self, code: str, what: str, change: str) -> RefusedError:
        """The error for a final no."""
        return RefusedError([self.problem(code, what, change)])

    def again(
        self,
        code: str,
        what: str,
        change: str,
        *,
        wait: float | None = None,
        tries: int | None = None,
    ) -> Again:
        """What is raised for something that may pass."""
        return Again(self.problem(code, what, change), wait=wait, tries=tries)

    def problem(self, code: str, what: str, change: str) -> Problem:
        """A problem with this repository."""
        return Problem(code, str(self.reference), what, change)

    def status(self, method: str, answer: requests.Response) -> RefusedError | Again:
        """What a status means that nobody wanted."""
        status, said = answer.status_code, _said(answer)
        what = f"answered {status} to {method}{f' ({said})' if said else ''}"
        if status in AGAIN or status > 507:
            change = "run the same command again later"
            tries = 2 if status == 500 else None
            return self.again("REG-130", what, change, wait=retry_after(answer), tries=tries)
        full = any(word in said.lower() for word in ("quota", "storage limit", "insufficient"))
        if status == 507 or (full and status in (400, 403, 413)):
            change = "free some space in the registry, or raise its quota"
            return self.refusal("REG-128", what, change)
        match status:
            case 401:
                return self.unwelcome()
            case 403:
                change = f"give {self._who()} the right to do that in {self.reference.repository}"
                return self.refusal("REG-122", what, change)
            case 404:
                change = "check the name; some registries want a repository to be made first"
                return self.refusal("REG-123", what, change)
            case 405:
                change = "push to a registry that takes images: this one looks like a read-only one"
                return self.refusal("REG-129", what, change)
            case 413:
                change = "raise the limit on uploads of the registry, or of the proxy before it"
                return self.refusal("REG-124", what, change)
        if "HTTP request to an HTTPS server" in answer.text[:200]:
            return self.refusal("REG-126", "talks TLS, but was asked in plain http", _CERTIFICATE)
        return self.refusal("REG-125", what, "check the reference and the registry's settings")

    def unwelcome(self) -> RefusedError:
        """The error for a 401 that no login of ours mends."""
        if self.login is None:
            what = "wants a login, and there is none"
            change = f"name a Secret for {self.reference.registry} (--push-secret FILE)"
        else:
            what = f"refuses the login from {self.login.origin}"
            change = "renew that Secret's user and password"
        return self.refusal("REG-121", what, change)

    def _who(self) -> str:
        return f"the login from {self.login.origin}" if self.login else "everybody"

    def unreachable(self, error: Exception) -> RefusedError | Again:
        """What a request that got no answer means."""
        inner = error.args[0] if error.args else None
        reason = getattr(inner, "reason", None) or inner
        if isinstance(error, requests.exceptions.SSLError):
            return self._tls(_tls_cause(error))
        if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.InvalidSchema):
            change = "check the reference and the registry's settings"
            return self.refusal("REG-125", "sent us to an address that is none", change)
        change = "check the registry's name: it is wrong, or the registry is down"
        if isinstance(reason, urllib3.exceptions.NameResolutionError):
            what = f"there is no host {self.reference.registry.partition(':')[0]}"
            if _errno(reason) not in (None, socket.EAI_NONAME):
                what, change = "its name cannot be looked up", "check the network's DNS"
            return self.again("REG-131", what, change)
        if isinstance(error, requests.exceptions.Timeout):
            what = f"{self.reference.registry} does not answer"
            return self.again("REG-131", what, "check the network, then run it again")
        if isinstance(reason, urllib3.exceptions.NewConnectionError):
            cause = reason.__cause__
            words = cause.strerror if isinstance(cause, OSError) and cause.strerror else "no route"
            return self.again("REG-131", f"cannot connect: {words}", change)
        what = "the connection to the registry broke"
        return self.again("REG-132", what, "run the same command again")

    def _tls(self, cause: Exception) -> RefusedError | Again:
        if isinstance(cause, ssl.SSLCertVerificationError):
            what = f"its certificate is not trusted: {cause.verify_message}"
            return self.refusal("REG-126", what, _CERTIFICATE)
        if isinstance(cause, ssl.SSLEOFError):
            what = "the connection to the registry broke"
            return self.again("REG-132", what, "run the same command again")
        reason = (getattr(cause, "reason", None) or "handshake failed").replace("_", " ").lower()
        change = "say --insecure if it talks plain http"
        return self.refusal("REG-126", f"TLS failed: {reason}", change)


def _tls_cause(error: BaseException) -> Exception:
    """The innermost error of Python's ssl module."""
    found: Exception = ssl.SSLError()
    seen: BaseException | None = error
    for _ in range(8):
        if isinstance(seen, ssl.SSLError):
            found = seen
        args = [a for a in getattr(seen, "args", ()) if isinstance(a, BaseException)]
        seen = getattr(seen, "reason", None) if not args else args[0]
        if not isinstance(seen, BaseException):
            break
    return found


def _errno(error: Exception) -> int | None:
    cause = error.__cause__ or error.__context__
    return cause.errno if isinstance(cause, socket.gaierror) else None


def retry_after(answer: requests.Response) -> float | None:
    """Seconds that the answer asks to wait: a number, or until a date."""
    text = answer.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def code(answer: requests.Response) -> str:
    """The code of the first error in the answer: BLOB_UPLOAD_UNKNOWN and the like; or nothing."""
    return str(_first(answer).get("code", ""))


def _said(answer: requests.Response) -> str:
    """The registry's own words, if it has some."""
    first = _first(answer)
    text = ": ".join(str(first[name]) for name in ("code", "message") if first.get(name))
    return "".join(c if c.isprintable() else " " for c in text)[:160]


def _first(answer: requests.Response) -> dict[str, object]:
    try:
        first = answer.json()["errors"][0]
    except (ValueError, KeyError, IndexError, TypeError, requests.exceptions.RequestException):
        return {}
    return first if isinstance(first, dict) else {}
