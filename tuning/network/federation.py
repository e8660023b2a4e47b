"""Token services of the clouds: exchange a pod's token, or a user's, for an access token.

Kubernetes projects a short-lived token into a file; Azure, AWS and Google each exchange it for one
of their own, so that no password is stored. Registries (`workload_identity`) and object stores
(`stores`) use the result. Files are read again each time, since kubelets renew them.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tuning.errors import RefusedError, SpecError, TransientError
from tuning.network.retry import is_retryable
from tuning.network.session import Response, Unreachable, is_loopback

LIFETIME = 600.0  # seconds, by default
LARGEST_TOKEN = 1 << 16  # bytes
GOOGLE_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
Value = dict[str, Any]
Ask = Callable[..., Response]  # Session.request


@dataclass(frozen=True)
class Token:
    """An access token. Never shown."""

    text: str = field(repr=False)
    until: float = 0.0  # on the monotonic clock


@dataclass(frozen=True)
class TemporaryKeys:
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
        """Exchange the pod's token for one of Entra with `scope`.

        Like the other clouds' methods it raises SpecError for a missing token, RefusedError for a
        refusal and TransientError for a failure.
        """
        form = {
            "grant_type": "client_credentials",
            "client_id": self.client,
            "scope": scope,
            "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
            "client_assertion": pod_token(self.token_file),
        }
        url = f"{self.authority.rstrip('/')}/{self.tenant}/oauth2/v2.0/token"
        reply = answer("Entra", ask, "POST", url, form=form)
        return Token(text(reply, "access_token", "Entra"), until(reply.get("expires_in")))


@dataclass(frozen=True)
class Aws:
    """A role of IAM that the pod's token may assume."""

    role: str
    region: str
    token_file: Path
    sts: str = ""  # instead of the region's address

    @property
    def domain(self) -> str:
        """The domain of the region's services."""
        return "amazonaws.com" + (".cn" if self.region.startswith("cn-") else "")

    def session(self, ask: Ask) -> TemporaryKeys:
        """Exchange the pod's token for temporary keys of the role."""
        query = {
            "Action": "AssumeRoleWithWebIdentity",
            "Version": "2011-06-15",
            "RoleArn": self.role,
            "RoleSessionName": "tuning",
            "WebIdentityToken": pod_token(self.token_file),
        }
        url = self.sts or f"https://sts.{self.region}.{self.domain}/"
        accept = {"Accept": "application/json"}
        reply = answer("AWS STS", ask, "POST", url, form=query, headers=accept)
        try:
            keys = reply["AssumeRoleWithWebIdentityResponse"]["AssumeRoleWithWebIdentityResult"]
            keys = keys["Credentials"]
            names = ("AccessKeyId", "SecretAccessKey", "SessionToken")
            key, secret, session = (str(keys[name]) for name in names)
        except (KeyError, TypeError):
            raise no_token("AWS STS") from None
        return TemporaryKeys(key, secret, session, until(_seconds_until(keys.get("Expiration"))))


@dataclass(frozen=True)
class Google:
    """A workload identity federation of Google Cloud."""

    audience: str  # //iam.googleapis.com/projects/.../providers/...
    token_file: Path
    account: str = ""  # a service account to act as, by its address
    sts: str = "https://sts.googleapis.com/v1/token"
    iam: str = "https://iamcredentials.googleapis.com"

    def token(self, ask: Ask) -> Token:
        """Exchange the pod's token for Google's, and that for the service account's, if any."""
        form = {
            "grantType": "urn:ietf:params:oauth:grant-type:token-exchange",
            "audience": self.audience,
            "scope": GOOGLE_SCOPE,
            "requestedTokenType": "urn:ietf:params:oauth:token-type:access_token",
            "subjectTokenType": "urn:ietf:params:oauth:token-type:jwt",
            "subjectToken": pod_token(self.token_file),
        }
        reply = answer("Google STS", ask, "POST", self.sts, json=form)
        token, ends = text(reply, "access_token", "Google STS"), until(reply.get("expires_in"))
        if self.account:
            name = f"{self.iam}/v1/projects/-/serviceAccounts/{self.account}:generateAccessToken"
            headers = {"Authorization": f"Bearer {token}"}
            scopes = {"scope": [GOOGLE_SCOPE]}
            acting = answer("Google IAM", ask, "POST", name, json=scopes, headers=headers)
            token = text(acting, "accessToken", "Google IAM")
        return Token(token, ends)


@dataclass(frozen=True)
class GoogleUser:
    """A user's credentials from `gcloud auth application-default login`."""

    client: str
    secret: str = field(repr=False)
    refresh: str = field(repr=False)
    url: str = "https://oauth2.googleapis.com/token"

    def token(self, ask: Ask) -> Token:
        """Exchange the refresh token for an access token, valid for an hour."""
        form = {
            "grant_type": "refresh_token",
            "client_id": self.client,
            "client_secret": self.secret,
            "refresh_token": self.refresh,
        }
        renew = "run again: gcloud auth application-default login"
        reply = answer("Google", ask, "POST", self.url, renew=renew, form=form)
        return Token(text(reply, "access_token", "Google"), until(reply.get("expires_in")))


def pod_token(path: Path) -> str:
    """The pod's own token. Raises SpecError."""
    try:
        with path.open("rb") as file:
            token = file.read(LARGEST_TOKEN).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read ({type(error).__name__})"
        change = "project a service account token there, with the audience that the cloud expects"
        raise SpecError.at("REG-150", str(path), what, change) from None
    if not token:
        raise SpecError.at("REG-150", str(path), "is empty", "project a token there")
    return token


def answer(who: str, ask: Ask, method: str, url: str, *, renew: str = "", **more: Any) -> Value:
    """The JSON object that a token service answers; `renew`: the remedy of a refusal, if known.

    Raises RefusedError for a refusal, TransientError for a failure.
    """
    if urlsplit(url).scheme != "https" and not is_loopback(url):
        raise SpecError.at("REG-153", url, "is not an https URL", "name an https URL")
    try:
        reply = ask(method, url, **more)
    except Unreachable as error:
        what = f"cannot be reached ({error})"
        raise TransientError.at("REG-151", who, what, "run the same command again later") from None
    if is_retryable(reply.status):
        what = f"answered {reply.status}"
        raise TransientError.at("REG-151", who, what, "run the same command again later")
    if reply.status != 200:
        what = f"refuses the identity: it answered {reply.status}{_error_name(reply)}"
        change = "check the identity's trust (issuer, subject, audience) and its rights"
        raise RefusedError.at("REG-152", who, what, renew or change)
    try:
        value = reply.json()
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise no_token(who)
    return value


def _error_name(reply: Response) -> str:
    """The error's name as the clouds give it; never its text, which may quote a token."""
    try:
        value = reply.json()
        error = value.get("error") or value.get("__type") or value["Error"]
        name = error if isinstance(error, str) else error.get("Code") or error.get("status")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    return f" ({name})" if isinstance(name, str) and name.isprintable() and len(name) < 60 else ""


def text(value: Mapping[str, Any], name: str, who: str) -> str:
    """The string `name` in an answer of `who`. Raises TransientError if it is missing."""
    field_value = value.get(name)
    if not isinstance(field_value, str) or not field_value:
        raise no_token(who)
    return field_value


def no_token(who: str) -> TransientError:
    """The error of an answer without a token."""
    what = "answered without a token"
    return TransientError.at("REG-151", who, what, "correct the address of the token service")


def until(seconds: Any) -> float:
    """The expiry, on the monotonic clock, of what is valid for `seconds`."""
    try:
        lifetime = float(seconds)
    except (TypeError, ValueError, OverflowError):
        lifetime = LIFETIME
    return time.monotonic() + (lifetime if lifetime > 0 else LIFETIME)


def _seconds_until(ends: Any) -> float | None:
    """Seconds until a time that AWS writes as seconds of the epoch or as ISO 8601."""
    try:
        if isinstance(ends, str):
            return datetime.datetime.fromisoformat(ends).timestamp() - time.time()
        return float(ends) - time.time()
    except (TypeError, ValueError, OverflowError, OSError):
        return None
