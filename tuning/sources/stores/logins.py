"""Logins without a key: a pod's workload identity, or a user's default credentials.

They come from what the clouds' webhooks put into a pod's environment, and from Google's file of
default credentials. A token is requested after a store refused an anonymous request, so that public
files need none, and again before it expires. Tokens go to the clouds' own addresses only: an
endpoint in a Secret could steal them. An emulator's token goes to this machine only.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from tuning.errors import SpecError
from tuning.network import federation
from tuning.network.federation import Ask, TemporaryKeys, Token
from tuning.network.policy import Policy, place
from tuning.network.session import Session, is_loopback

EARLY = 120.0  # seconds before its expiry in which a token counts as expired
GOOGLE_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
LARGEST_FILE = 1 << 16  # bytes
AZURE_SCOPE = "https://storage.azure.com/.default"
_STORES = re.compile(
    r"([a-z0-9.-]+\.)?s3\.[a-z0-9-]+\.amazonaws\.com(\.cn)?"
    r"|storage\.googleapis\.com"
    r"|[a-z0-9]+\.blob\.core\.(windows\.net|chinacloudapi\.cn|usgovcloudapi\.net)"
)
_GOOGLE = re.compile(r"(oauth2|sts|iamcredentials)\.googleapis\.com")
_ACCOUNT = re.compile(r"/v1/projects/-/serviceAccounts/([\w.@-]+):generateAccessToken")
Grant = TypeVar("Grant", TemporaryKeys, Token)


@dataclass
class Login(Generic[Grant]):
    """A token, or temporary keys, renewed in time. Thread-safe."""

    who: str  # its name in messages
    ask: Callable[[], Grant] = field(repr=False)
    local: bool = False  # from a token service on this machine
    _grant: Grant | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __call__(self) -> Grant:
        """What is valid now. Raises as `federation` does."""
        with self._lock:
            if self._grant is None or time.monotonic() >= self._grant.until - EARLY:
                self._grant = self.ask()
            return self._grant

    def fits(self, address: str) -> bool:
        """Whether it may be sent to `address`."""
        return _is(address, None if self.local else _STORES)


class Logins:
    """The logins that an environment provides for each cloud."""

    def __init__(
        self, environment: Mapping[str, str], ask: Ask, gcloud: Path | None = None
    ) -> None:
        """`gcloud`: the file of a user's default credentials, if they may be used."""
        self._environment, self._ask, self._gcloud = environment, ask, gcloud
        self._known: dict[str, Any] = {}

    def amazon(self, region: str) -> Login[TemporaryKeys] | None:
        """The login of the role that EKS gives to a service account."""
        role = self._environment.get("AWS_ROLE_ARN")
        file = self._environment.get("AWS_WEB_IDENTITY_TOKEN_FILE")
        if not role or not file:
            return None
        sts = self._environment.get("AWS_ENDPOINT_URL_STS", "")
        aws = federation.Aws(role, region, Path(file), sts)
        who = f"the role {role}"
        return self._once(f"aws {region}", who, lambda: aws.session(self._ask), sts)

    def azure(self) -> Login[Token] | None:
        """The login of the identity that Azure's webhook gives to a service account."""
        names = ("AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_FEDERATED_TOKEN_FILE")
        tenant, client, file = (self._environment.get(name, "") for name in names)
        if not (tenant and client and file):
            return None
        authority = self._environment.get("AZURE_AUTHORITY_HOST")
        more = {"authority": authority} if authority else {}
        azure = federation.Azure(tenant, client, Path(file), **more)
        who = f"the identity {client}"
        return self._once(
            "azure", who, lambda: azure.token(AZURE_SCOPE, self._ask), azure.authority
        )

    def google(self) -> Login[Token] | None:
        """The login of `gcloud auth application-default login`, or of a federated identity."""
        named = self._environment.get(GOOGLE_FILE)
        path = Path(named) if named else self._gcloud
        try:
            credentials: dict[str, Any] = json.loads(read_text(path)) if path else {}
            kind = credentials.get("type")
        except (OSError, ValueError, AttributeError):
            return None  # the store reports an unreadable file
        match kind:
            case "authorized_user":
                who, url = "the user of gcloud's default login", str(credentials.get("token_uri"))
                return self._once(
                    "google", who, lambda: _user(credentials, str(path)).token(self._ask), url
                )
            case "external_account":
                who, url = "the federated identity", str(credentials.get("token_url"))
                return self._once(
                    "google", who, lambda: _federated(credentials, str(path)).token(self._ask), url
                )
        return None

    def _once(self, key: str, who: str, ask: Callable[[], Grant], service: str) -> Login[Grant]:
        """The same login for all files of a cloud."""
        new = Login(who, ask, _is(service, None))
        login: Login[Grant] = self._known.setdefault(key, new)
        return login


def token_service(policy: Policy) -> Ask:
    """Requests to token services, by the proxy and with the authorities that `policy` names."""

    def proxy(url: str) -> str | None:
        return None if is_loopback(url) else policy.proxy_for(url)

    return Session(policy.ca_bundle, proxy=proxy).request


def _is(address: str, hosts: re.Pattern[str] | None) -> bool:
    """Whether `address` is one of `hosts`, by https; None: this machine."""
    try:
        scheme, host, port = place(address)
        local = is_loopback(address)
    except ValueError:
        return False
    if hosts is None:
        return local
    return (scheme, port) == ("https", 443) and bool(hosts.fullmatch(host))


def gcloud_file() -> Path:
    """The file of a user's default credentials of gcloud."""
    folder = os.environ.get("CLOUDSDK_CONFIG") or Path.home() / ".config" / "gcloud"
    return Path(folder) / "application_default_credentials.json"


def _user(credentials: dict[str, Any], where: str) -> federation.GoogleUser:
    names = ("client_id", "client_secret", "refresh_token")
    values = [credentials.get(name) for name in names]
    if not all(isinstance(value, str) and value for value in values):
        change = "run again: gcloud auth application-default login"
        raise SpecError.at("FETCH-107", where, f"has no {', '.join(names)}", change)
    uri = str(credentials.get("token_uri"))  # old files have older addresses of the same service
    more = {"url": uri} if _is(uri, None) else {}
    return federation.GoogleUser(*map(str, values), **more)


def _federated(credentials: dict[str, Any], where: str) -> federation.Google:
    """A file of `gcloud iam workload-identity-pools create-cred-config`, its token in a file."""
    source, audience = credentials.get("credential_source"), credentials.get("audience")
    file = source.get("file") if isinstance(source, dict) else None
    if not isinstance(file, str) or not isinstance(audience, str):
        what = "has no credential_source.file or no audience"
        change = "make it with --credential-source-file; other sources are not supported"
        raise SpecError.at("FETCH-107", where, what, change)
    form = source.get("format") if isinstance(source, dict) else None
    if isinstance(form, dict) and form.get("type", "text") != "text":
        what, change = "expects a token in JSON", "make it without --credential-source-type"
        raise SpecError.at("FETCH-107", where, what, change)
    impersonation, account, more = credentials.get("service_account_impersonation_url"), "", {}
    if impersonation:
        parts = urlsplit(str(impersonation))
        match = _ACCOUNT.fullmatch(parts.path)
        if not match or not _googles(str(impersonation)):
            what = "has a service_account_impersonation_url that is not Google's"
            raise SpecError.at("FETCH-107", where, what, "make the file again")
        account, more = match[1], {"iam": f"{parts.scheme}://{parts.netloc}"}
    more |= _place(credentials, "token_url", "sts", where)
    return federation.Google(audience, Path(file), account, **more)


def _place(credentials: dict[str, Any], name: str, as_: str, where: str) -> dict[str, str]:
    """The address of Google's token service in a file, if any."""
    url = credentials.get(name)
    if not url:
        return {}
    if not _googles(str(url)):
        what = f"has a {name} that is not Google's"
        raise SpecError.at("FETCH-107", where, what, "make the file again")
    return {as_: str(url)}


def _googles(url: str) -> bool:
    return _is(url, _GOOGLE) or _is(url, None)


def read_text(path: Path) -> str:
    """The text of a small file."""
    with path.open("rb") as file:
        return file.read(LARGEST_FILE).decode().strip()
