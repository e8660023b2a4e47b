"""Workload identities -> a login for one registry: a pod's token, exchanged with its cloud.

Kubernetes projects a short-lived token into a file; Azure, AWS and Google each take it for one of
their own, and that for a login of their registries. Nobody keeps a password. Each kind is a value
with one verb, `login`; which registry may be reached with which identity, an administrator says
(`trust`). Files are read anew each time, since kubelets renew them.
"""

from __future__ import annotations

import base64
import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import requests

from tuning.credentials import Login
from tuning.errors import RefusedError, SpecError, TransientError
from tuning.sigv4 import sign

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
NOBODY = "00000000-0000-0000-0000-000000000000"  # the user's name of an Azure registry token
GOOGLE_USER = "oauth2accesstoken"
LIFETIME = 600.0  # seconds, where a cloud does not say
LARGEST_TOKEN = 1 << 16  # bytes
Value = dict[str, Any]
Ask = Callable[..., requests.Response]  # (method, url, **more): one request, as it comes


class Identity(Protocol):
    """A way to prove to a cloud's registry who this pod is."""

    def login(self, registry: str, ask: Ask) -> Login:
        """A login for `registry`, and until when it is good.

        Raises SpecError for what is not set up, RefusedError for a no, TransientError for trouble.
        """
        ...


@dataclass(frozen=True)
class Azure:
    """A federated credential of Microsoft Entra, for Azure's registries (*.azurecr.io)."""

    tenant: str
    client: str
    token_file: Path
    authority: str = "https://login.microsoftonline.com"
    scope: str = "https://containerregistry.azure.net/.default"

    def login(self, registry: str, ask: Ask) -> Login:
        """The pod's token for one of Entra, that for a refresh token of the registry."""
        form = {
            "grant_type": "client_credentials",
            "client_id": self.client,
            "scope": self.scope,
            "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
            "client_assertion": _token(self.token_file),
        }
        url = f"{self.authority.rstrip('/')}/{self.tenant}/oauth2/v2.0/token"
        entra = _answer("Entra", ask, "POST", url, data=form)
        form = {
            "grant_type": "access_token",
            "service": registry,
            "tenant": self.tenant,
            "access_token": _text(entra, "access_token", "Entra"),
        }
        scheme = "http" if urlsplit(self.authority).scheme == "http" else "https"
        exchange = f"{scheme}://{registry}/oauth2/exchange"
        found = _answer("the registry", ask, "POST", exchange, data=form)
        token = _text(found, "refresh_token", "the registry")
        # The refresh token lives for hours; Entra's answer says when to ask both again.
        until = _until(entra.get("expires_in"))
        return Login("workload identity (azure)", NOBODY, identity_token=token, until=until)


@dataclass(frozen=True)
class Aws:
    """A role of IAM that the pod's token may assume, for ECR (*.dkr.ecr.REGION.amazonaws.com)."""

    role: str
    region: str
    token_file: Path
    sts: str = ""  # another address than the region's
    ecr: str = ""

    def login(self, registry: str, ask: Ask) -> Login:
        """The pod's token for credentials of the role, those for a password of ECR."""
        query = {
            "Action": "AssumeRoleWithWebIdentity",
            "Version": "2011-06-15",
            "RoleArn": self.role,
            "RoleSessionName": "tuning",
            "WebIdentityToken": _token(self.token_file),
        }
        url = self.sts or f"https://sts.{self.region}.amazonaws.com/"
        accept = {"Accept": "application/json"}
        answer = _answer("AWS STS", ask, "POST", url, data=query, headers=accept)
        try:
            keys = answer["AssumeRoleWithWebIdentityResponse"]["AssumeRoleWithWebIdentityResult"]
            keys = keys["Credentials"]
            names = ("AccessKeyId", "SecretAccessKey", "SessionToken")
            key, secret, session = (str(keys[name]) for name in names)
        except (KeyError, TypeError):
            raise _odd("AWS STS") from None
        url = self.ecr or f"https://api.ecr.{self.region}.amazonaws.com/"
        headers = {
            "Content-Type": "application/x-amz-json-1.1",
            "X-Amz-Target": "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken",
            "X-Amz-Security-Token": session,
        }
        now = datetime.datetime.now(datetime.UTC)
        signed = sign(
            "POST",
            url,
            headers,
            b"{}",
            key=key,
            secret=secret,
            region=self.region,
            service="ecr",
            now=now,
        )
        found = _answer("ECR", ask, "POST", url, data=b"{}", headers=signed)
        try:
            data = found["authorizationData"][0]
            pair = base64.b64decode(data["authorizationToken"], validate=True).decode()
            left = float(data.get("expiresAt", 0)) - time.time()
        except (KeyError, IndexError, TypeError, ValueError):
            raise _odd("ECR") from None
        user, _, password = pair.partition(":")
        return Login("workload identity (aws)", user, password, until=_until(left))


@dataclass(frozen=True)
class Google:
    """A workload identity federation of Google Cloud, for Artifact Registry (*.pkg.dev)."""

    audience: str  # //iam.googleapis.com/projects/.../providers/...
    token_file: Path
    account: str = ""  # a service account to act as, by its address
    sts: str = "https://sts.googleapis.com/v1/token"
    iam: str = "https://iamcredentials.googleapis.com"

    def login(self, registry: str, ask: Ask) -> Login:
        """The pod's token for one of Google's, that for one of the service account, if any."""
        form = {
            "grantType": "urn:ietf:params:oauth:grant-type:token-exchange",
            "audience": self.audience,
            "scope": "https://www.googleapis.com/auth/cloud-platform",
            "requestedTokenType": "urn:ietf:params:oauth:token-type:access_token",
            "subjectTokenType": "urn:ietf:params:oauth:token-type:jwt",
            "subjectToken": _token(self.token_file),
        }
        found = _answer("Google STS", ask, "POST", self.sts, json=form)
        token = _text(found, "access_token", "Google STS")
        until = _until(found.get("expires_in"))
        if self.account:
            name = f"{self.iam}/v1/projects/-/serviceAccounts/{self.account}:generateAccessToken"
            wish = {"scope": ["https://www.googleapis.com/auth/cloud-platform"]}
            headers = {"Authorization": f"Bearer {token}"}
            acted = _answer("Google IAM", ask, "POST", name, json=wish, headers=headers)
            token = _text(acted, "accessToken", "Google IAM")
        return Login("workload identity (google)", GOOGLE_USER, token, until=until)


def _token(path: Path) -> str:
    """The pod's own token. Raises SpecError."""
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_TOKEN).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read ({type(error).__name__})"
        change = "project a service account token there, with the audience that the cloud expects"
        raise SpecError.at("REG-150", str(path), what, change) from None
    if not text:
        raise SpecError.at("REG-150", str(path), "is empty", "project a token there")
    return text


def _answer(who: str, ask: Ask, method: str, url: str, **more: Any) -> Value:
    """The JSON object that a cloud answers."""
    place = urlsplit(url)
    if place.scheme != "https" and not _local(place.hostname):
        raise SpecError.at("REG-150", url, "is no https", "name an address that begins with https")
    try:
        answer = ask(method, url, timeout=(10.0, 60.0), allow_redirects=False, **more)
    except requests.exceptions.RequestException as error:
        what = f"cannot be reached ({type(error).__name__})"
        raise TransientError.at("REG-151", who, what, "run the same command again later") from None
    if answer.status_code in AGAIN:
        what = f"answered {answer.status_code}"
        raise TransientError.at("REG-151", who, what, "run the same command again later")
    if answer.status_code != 200:
        what = f"refuses the pod's identity: it answered {answer.status_code}{_said(answer)}"
        change = "look at the identity's trust (issuer, subject, audience) and its rights"
        raise RefusedError.at("REG-152", who, what, change)
    try:
        value = answer.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise _odd(who)
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


def _local(host: str | None) -> bool:
    return host in ("127.0.0.1", "localhost", "::1")


def _text(value: Mapping[str, Any], name: str, who: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not found:
        raise _odd(who)
    return found


def _odd(who: str) -> TransientError:
    what = "answers what it should not: there is no token in it"
    return TransientError.at("REG-151", who, what, "look at the policy file's addresses")


def _until(seconds: Any) -> float:
    """When what lives for so many seconds runs out, on the monotonic clock."""
    try:
        left = float(seconds)
    except (TypeError, ValueError):
        left = LIFETIME
    return time.monotonic() + (left if left > 0 else LIFETIME)
