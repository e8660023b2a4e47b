"""Who has no key of a store, but is known to its cloud: a pod by its workload identity, a person.

What the clouds' webhooks put into a pod's environment is read, and Google's file of default
credentials. Tokens are asked for when a store refuses who says nothing, so that nobody needs one
for what is public, and again before they run out. They go to the clouds' own addresses alone: one
that a Secret names could keep them. What an emulator on this machine gives goes to this machine.
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

import requests

from tuning.errors import SpecError
from tuning.network import federation
from tuning.network import session as https
from tuning.network.federation import Ask, Session, Token
from tuning.network.policy import Policy, place

EARLY = 120.0  # seconds before its end in which a token counts as run out
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
Given = TypeVar("Given", Session, Token)


@dataclass
class Login(Generic[Given]):
    """A token or session that is renewed. Threads may share it."""

    who: str  # as messages call it
    ask: Callable[[], Given] = field(repr=False)
    local: bool = False  # from a token service on this machine
    _given: Given | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __call__(self) -> Given:
        """What is good now. Raises as `federation` does."""
        with self._lock:
            if self._given is None or time.monotonic() >= self._given.until - EARLY:
                self._given = self.ask()
            return self._given

    def fits(self, address: str) -> bool:
        """Whether what it gives may be sent to `address`."""
        return _is(address, None if self.local else _STORES)


class Logins:
    """The logins that an environment has for each cloud."""

    def __init__(
        self, environment: Mapping[str, str], ask: Ask, gcloud: Path | None = None
    ) -> None:
        """`gcloud`: where gcloud keeps a person's default credentials, if they count."""
        self._environment, self._ask, self._gcloud = environment, ask, gcloud
        self._known: dict[str, Any] = {}

    def amazon(self, region: str) -> Login[Session] | None:
        """Of the role that EKS gives to a service account."""
        role = self._environment.get("AWS_ROLE_ARN")
        file = self._environment.get("AWS_WEB_IDENTITY_TOKEN_FILE")
        if not role or not file:
            return None
        sts = self._environment.get("AWS_ENDPOINT_URL_STS", "")
        aws = federation.Aws(role, region, Path(file), sts)
        who = f"the role {role}"
        return self._once(f"aws {region}", who, lambda: aws.session(self._ask), sts)

    def azure(self) -> Login[Token] | None:
        """Of the identity that Azure's webhook gives to a service account."""
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
        """Of who said `gcloud auth application-default login`, or of a federated identity."""
        named = self._environment.get(GOOGLE_FILE)
        path = Path(named) if named else self._gcloud
        try:
            found: dict[str, Any] = json.loads(_text(path)) if path else {}
            kind = found.get("type")
        except (OSError, ValueError, AttributeError):
            return None  # a file that is named and cannot be read: the store says so
        match kind:
            case "authorized_user":
                who, url = "the person of gcloud's default login", str(found.get("token_uri"))
                return self._once(
                    "google", who, lambda: _user(found, str(path)).token(self._ask), url
                )
            case "external_account":
                who, url = "the federated identity", str(found.get("token_url"))
                return self._once(
                    "google", who, lambda: _federated(found, str(path)).token(self._ask), url
                )
        return None

    def _once(self, key: str, who: str, ask: Callable[[], Given], service: str) -> Login[Given]:
        """The same login for all files of a cloud."""
        made = Login(who, ask, _is(service, None))
        found: Login[Given] = self._known.setdefault(key, made)
        return found


def token_service(policy: Policy) -> Ask:
    """Requests to token services, by the proxy and with the authorities that `policy` says."""
    session = https.session(policy.ca_bundle)

    def ask(method: str, url: str, **more: Any) -> requests.Response:
        scheme, host, port = place(url)
        through = not https.is_loopback(url) and policy.uses_proxy(host, port)
        proxies = {scheme: str(policy.proxy)} if through else {}
        return session.request(method, url, proxies=proxies, **more)

    return ask


def _is(address: str, hosts: re.Pattern[str] | None) -> bool:
    """Whether `address` is one of `hosts`, by https; None: this machine."""
    try:
        scheme, host, port = place(address)
        local = https.is_loopback(address)
    except ValueError:
        return False
    if hosts is None:
        return local
    return (scheme, port) == ("https", 443) and bool(hosts.fullmatch(host))


def gcloud_file() -> Path:
    """Where gcloud keeps a person's default credentials."""
    folder = os.environ.get("CLOUDSDK_CONFIG") or Path.home() / ".config" / "gcloud"
    return Path(folder) / "application_default_credentials.json"


def _user(found: dict[str, Any], where: str) -> federation.GoogleUser:
    names = ("client_id", "client_secret", "refresh_token")
    values = [found.get(name) for name in names]
    if not all(isinstance(value, str) and value for value in values):
        change = "say once more: gcloud auth application-default login"
        raise SpecError.at("FETCH-107", where, f"holds no {', '.join(names)}", change)
    uri = str(found.get("token_uri"))  # old files have older addresses of the same service
    more = {"url": uri} if _is(uri, None) else {}
    return federation.GoogleUser(*map(str, values), **more)


def _federated(found: dict[str, Any], where: str) -> federation.Google:
    """A file of `gcloud iam workload-identity-pools create-cred-config`, its token in a file."""
    source, audience = found.get("credential_source"), found.get("audience")
    file = source.get("file") if isinstance(source, dict) else None
    if not isinstance(file, str) or not isinstance(audience, str):
        what = "says no credential_source.file, or no audience"
        change = "make it with --credential-source-file; other sources are not read"
        raise SpecError.at("FETCH-107", where, what, change)
    form = source.get("format") if isinstance(source, dict) else None
    if isinstance(form, dict) and form.get("type", "text") != "text":
        what, change = "wants a token inside of JSON", "make it without --credential-source-type"
        raise SpecError.at("FETCH-107", where, what, change)
    acts, account, more = found.get("service_account_impersonation_url"), "", {}
    if acts:
        parts = urlsplit(str(acts))
        match = _ACCOUNT.fullmatch(parts.path)
        if not match or not _googles(str(acts)):
            what = "has a service_account_impersonation_url that is none of Google's"
            raise SpecError.at("FETCH-107", where, what, "make the file once more")
        account, more = match[1], {"iam": f"{parts.scheme}://{parts.netloc}"}
    more |= _place(found, "token_url", "sts", where)
    return federation.Google(audience, Path(file), account, **more)


def _place(found: dict[str, Any], name: str, as_: str, where: str) -> dict[str, str]:
    """An address of Google's token service in a file, if it says one."""
    url = found.get(name)
    if not url:
        return {}
    if not _googles(str(url)):
        what = f"has a {name} that is none of Google's"
        raise SpecError.at("FETCH-107", where, what, "make the file once more")
    return {as_: str(url)}


def _googles(url: str) -> bool:
    return _is(url, _GOOGLE) or _is(url, None)


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(LARGEST_FILE).decode("utf-8")
