"""A cloud's token service: the token of this pod, or of a person, for one that opens something.

Kubernetes projects a short-lived token into a file; Azure, AWS and Google each take it for one of
their own, so that nobody keeps a password. What that opens is for others to know: registries
(`identity`), object stores (`stores`). Files are read anew each time, since kubelets renew them.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from tuning.errors import RefusedError, SpecError, TransientError
from tuning.network import session as https

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
LIFETIME = 600.0  # seconds, where a cloud does not say
LARGEST_TOKEN = 1 << 16  # bytes
GOOGLE_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
Value = dict[str, Any]
Ask = Callable[..., requests.Response]  # (method, url, **more): one request, as it comes


@dataclass(frozen=True)
class Token:
    """What a token service gives. Never shown."""

    text: str = field(repr=False)
    until: float = 0.0  # on the monotonic clock


@dataclass(frozen=True)
class Session:
    """Temporary keys of a role of IAM. Never shown."""

    key: str = field(repr=False)
    secret: str = field(repr=False)
    token: str = field(repr=False)
    until: float = 0.0  # on the monotonic clock


@dataclass(frozen=True)
class Azure:
    """A federated credential of Microsoft Entra."""

    tenant: str
    client: str
    token_file: Path
    authority: str = "https://login.microsoftonline.com"

    def token(self, scope: str, ask: Ask) -> Token:
        """The pod's token for one of Entra that opens `scope`.

        Raises SpecError for what is not set up, RefusedError for a no, TransientError for trouble,
        as the others do.
        """
        form = {
            "grant_type": "client_credentials",
            "client_id": self.client,
            "scope": scope,
            "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
            "client_assertion": pod_token(self.token_file),
        }
        url = f"{self.authority.rstrip('/')}/{self.tenant}/oauth2/v2.0/token"
        found = answer("Entra", ask, "POST", url, data=form)
        return Token(text(found, "access_token", "Entra"), until(found.get("expires_in")))


@dataclass(frozen=True)
class Aws:
    """A role of IAM that the pod's token may assume."""

    role: str
    region: str
    token_file: Path
    sts: str = ""  # another address than the region's

    @property
    def domain(self) -> str:
        """Where the region's services are."""
        return "amazonaws.com" + (".cn" if self.region.startswith("cn-") else "")

    def session(self, ask: Ask) -> Session:
        """The pod's token for temporary keys of the role."""
        query = {
            "Action": "AssumeRoleWithWebIdentity",
            "Version": "2011-06-15",
            "RoleArn": self.role,
            "RoleSessionName": "tuning",
            "WebIdentityToken": pod_token(self.token_file),
        }
        url = self.sts or f"https://sts.{self.region}.{self.domain}/"
        accept = {"Accept": "application/json"}
        told = answer("AWS STS", ask, "POST", url, data=query, headers=accept)
        try:
            keys = told["AssumeRoleWithWebIdentityResponse"]["AssumeRoleWithWebIdentityResult"]
            keys = keys["Credentials"]
            names = ("AccessKeyId", "SecretAccessKey", "SessionToken")
            key, secret, session = (str(keys[name]) for name in names)
        except (KeyError, TypeError):
            raise odd("AWS STS") from None
        return Session(key, secret, session, until(_left(keys.get("Expiration"))))


@dataclass(frozen=True)
class Google:
    """A workload identity federation of Google Cloud."""

    audience: str  # //iam.googleapis.com/projects/.../providers/...
    token_file: Path
    account: str = ""  # a service account to act as, by its address
    sts: str = "https://sts.googleapis.com/v1/token"
    iam: str = "https://iamcredentials.googleapis.com"

    def token(self, ask: Ask) -> Token:
        """The pod's token for one of Google's, that for one of the service account, if any."""
        form = {
            "grantType": "urn:ietf:params:oauth:grant-type:token-exchange",
            "audience": self.audience,
            "scope": GOOGLE_SCOPE,
            "requestedTokenType": "urn:ietf:params:oauth:token-type:access_token",
            "subjectTokenType": "urn:ietf:params:oauth:token-type:jwt",
            "subjectToken": pod_token(self.token_file),
        }
        found = answer("Google STS", ask, "POST", self.sts, json=form)
        token, ends = text(found, "access_token", "Google STS"), until(found.get("expires_in"))
        if self.account:
            name = f"{self.iam}/v1/projects/-/serviceAccounts/{self.account}:generateAccessToken"
            headers = {"Authorization": f"Bearer {token}"}
            wish = {"scope": [GOOGLE_SCOPE]}
            acted = answer("Google IAM", ask, "POST", name, json=wish, headers=headers)
            token = text(acted, "accessToken", "Google IAM")
        return Token(token, ends)


@dataclass(frozen=True)
class GoogleUser:
    """A person who said `gcloud auth application-default login`."""

    client: str
    secret: str = field(repr=False)
    refresh: str = field(repr=False)
    url: str = "https://oauth2.googleapis.com/token"

    def token(self, ask: Ask) -> Token:
        """The refresh token for an access token, good for an hour."""
        form = {
            "grant_type": "refresh_token",
            "client_id": self.client,
            "client_secret": self.secret,
            "refresh_token": self.refresh,
        }
        again = "say once more: gcloud auth application-default login"
        found = answer("Google", ask, "POST", self.url, renew=again, data=form)
        return Token(text(found, "access_token", "Google"), until(found.get("expires_in")))


def pod_token(path: Path) -> str:
    """The pod's own token. Raises SpecError."""
    try:
        with path.open("rb") as file:
            found = file.read(LARGEST_TOKEN).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read ({type(error).__name__})"
        change = "project a service account token there, with the audience that the cloud expects"
        raise SpecError.at("REG-150", str(path), what, change) from None
    if not found:
        raise SpecError.at("REG-150", str(path), "is empty", "project a token there")
    return found


def answer(who: str, ask: Ask, method: str, url: str, *, renew: str = "", **more: Any) -> Value:
    """The JSON object that a cloud answers; `renew` is what mends a refusal, if that is known.

    Raises RefusedError for a no, TransientError for trouble.
    """
    if urlsplit(url).scheme != "https" and not https.is_loopback(url):
        raise SpecError.at("REG-153", url, "is no https", "name an address that begins with https")
    try:
        told = ask(method, url, timeout=(10.0, 60.0), allow_redirects=False, **more)
    except requests.exceptions.RequestException as error:
        what = f"cannot be reached ({type(error).__name__})"
        raise TransientError.at("REG-151", who, what, "run the same command again later") from None
    if told.status_code in AGAIN:
        what = f"answered {told.status_code}"
        raise TransientError.at("REG-151", who, what, "run the same command again later")
    if told.status_code != 200:
        what = f"refuses the identity: it answered {told.status_code}{_said(told)}"
        change = "look at the identity's trust (issuer, subject, audience) and its rights"
        raise RefusedError.at("REG-152", who, what, renew or change)
    try:
        value = told.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise odd(who)
    return value


def _said(answer: requests.Response) -> str:
    """The name of the error, of those that clouds give: never a text, which may quote a token."""
    try:
        value = answer.json()
        found = value.get("error") or value.get("__type") or value["Error"]
        name = found if isinstance(found, str) else found.get("Code") or found.get("status")
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
    return f" ({name})" if isinstance(name, str) and name.isprintable() and len(name) < 60 else ""


def text(value: Mapping[str, Any], name: str, who: str) -> str:
    """The text `name` of an answer by `who`. Raises TransientError where there is none."""
    found = value.get(name)
    if not isinstance(found, str) or not found:
        raise odd(who)
    return found


def odd(who: str) -> TransientError:
    """The error of an answer without what was asked for."""
    what = "answers what it should not: there is no token in it"
    return TransientError.at("REG-151", who, what, "correct the address of the token service")


def until(seconds: Any) -> float:
    """When what lives for so many seconds runs out, on the monotonic clock."""
    try:
        left = float(seconds)
    except (TypeError, ValueError):
        left = LIFETIME
    return time.monotonic() + (left if left > 0 else LIFETIME)


def _left(ends: Any) -> float | None:
    """Seconds until a moment that AWS writes as seconds of the epoch or as ISO 8601."""
    try:
        if isinstance(ends, str):
            return datetime.datetime.fromisoformat(ends).timestamp() - time.time()
        return float(ends) - time.time()
    except (TypeError, ValueError):
        return None
