"""Azure Blob Storage: requests with the account's key or a shared access signature.

Source: https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key
"""

from __future__ import annotations

import base64
import datetime
import email.utils
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from tuning.sources.stores.keys import Keys
from tuning.sources.stores.store import Signed, code_of

VERSION = "2021-08-06"  # of the REST API; decides what a signature covers
SUFFIX = "core.windows.net"
NAME, KEY, SAS, STRING = (
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_CONNECTION_STRING",
)
_ACCOUNT = re.compile("[a-z0-9]{3,24}")
_DOMAIN = re.compile("[a-z0-9-]+(\\.[a-z0-9-]+)+")
_SAS = re.compile(r"[\w.~%&=:/+,*-]+", re.ASCII)


@dataclass(frozen=True)
class _Account:
    """An account's endpoint, and a key or a shared access signature for it."""

    name: str
    endpoint: str
    key: bytes = field(default=b"", repr=False)
    sas: str = field(default="", repr=False)
    named: str = NAME  # the setting with its name
    proof: str = KEY  # the setting to correct when it does not fit


class AzureBlob:
    """One blob of a container.

    Without a key the request is unsigned, as public containers allow; if that is refused, the pod's
    identity is used.
    """

    def __init__(self, container: str, blob: str, keys: Keys) -> None:
        self.keys = keys
        self._account = _account(keys)
        self.identity = self._account.endpoint
        self.address = f"{self.identity}/{container}/{blob}"
        login = keys.logins.azure() if keys.logins and not self._proven else None
        self._login = login if login and login.fits(self.address) else None
        self._logged_in = False

    def signed(self, headers: Mapping[str, str]) -> Signed:
        """The address with the shared access signature, or headers signed with the key."""
        own = {"x-ms-version": VERSION}
        if self._account.sas:
            return Signed(f"{self.address}?{self._account.sas}", own)
        if self._login and self._logged_in:
            own["Authorization"] = f"Bearer {self._login().text}"
        if not self._account.key:
            return Signed(self.address, own)
        own["x-ms-date"] = email.utils.format_datetime(datetime.datetime.now(datetime.UTC), True)
        return Signed(self.address, sign(self.address, headers, own, self._account))

    def moved(self, headers: Mapping[str, str], body: str) -> str | None:
        """The same address with a login: an account has only one."""
        if self._login and not self._logged_in:
            self._logged_in = True
            return self.address
        return None

    def meaning(self, status: int, body: str) -> tuple[str, str]:
        """The problem and remedy of Azure's error code."""
        code, where = code_of(body, status), self.keys.origin
        account, proof = self._account.name or self._account.endpoint, self._account.proof
        allow = f"put {KEY} or {SAS} into {where}"
        not_public = ("is not public, and there is no key", allow)
        known = {
            "BlobNotFound": ("there is no such blob", "correct its name; capitals count"),
            "ContainerNotFound": (
                f"there is no such container in the account {account}",
                f"correct the container's name, or {self._account.named} in {where}",
            ),
            "NoAuthenticationInformation": not_public,
            "PublicAccessNotPermitted": not_public,
            "AuthorizationPermissionMismatch": (
                "the shared access signature does not allow reading",
                f"make one with the permission r, and put it into {proof} of {where}",
            ),
            "AuthenticationFailed": (
                f"{proof} does not fit the account {account}, or the clock is off",
                f"correct {self._suspects} in {where}; set the machine's clock (NTP)",
            ),
            "AuthorizationFailure": (
                f"{proof} does not fit the account {account}, or its firewall blocks this machine",
                f"correct {self._suspects} in {where}; open the firewall to this machine",
            ),
            "KeyBasedAuthenticationNotPermitted": (
                f"the account {account} accepts no key",
                f"put a user delegation SAS into {SAS} of {where}",
            ),
            "AccountIsDisabled": (f"the account {account} is disabled", "ask its owner"),
            "BlobArchived": ("the blob is archived", "rehydrate it to the hot tier first"),
        }
        if self._login and status in (401, 403):
            what = f"the store refuses access to {self._login.who} ({status} {code})"
            return what, f"give it the role Storage Blob Data Reader on the account {account}"
        if code in ("AuthenticationFailed", "AuthorizationFailure"):
            now = datetime.datetime.now(datetime.UTC)
            if (ends := self._moment("se")) and ends < now:
                what = f"the shared access signature ended at {ends:%Y-%m-%d %H:%M} UTC"
                return f"{what} ({status} {code})", f"renew {proof} in {where}"
            if (starts := self._moment("st")) and starts > now:
                what = f"the shared access signature begins at {starts:%Y-%m-%d %H:%M} UTC"
                return f"{what} ({status} {code})", f"make one that has begun: {proof} in {where}"
            if not self._proven:
                return f"is not public, and there is no key ({status} {code})", allow
        if code in known:
            what, change = known[code]
            return f"{what} ({status} {code})", change
        if status == 404 and not self._proven and not self._login:
            return f"there is no such blob, or it is not public ({code})", (
                f"correct container and name; if they are right, {allow}"
            )
        if status == 404:
            return f"there is no such blob ({code})", "correct container and name; capitals count"
        return f"the store refuses access ({status} {code})", f"check {proof} in {where}"

    @property
    def _proven(self) -> bool:
        return bool(self._account.sas or self._account.key)

    @property
    def _suspects(self) -> str:
        return " or ".join(dict.fromkeys((self._account.proof, self._account.named)))

    def _moment(self, name: str) -> datetime.datetime | None:
        """The start ("st") or the end ("se") of the shared access signature."""
        text = parse_qs(self._account.sas).get(name, [""])[0]
        try:
            moment = datetime.datetime.fromisoformat(text)
        except ValueError:
            return None
        return moment.replace(tzinfo=moment.tzinfo or datetime.UTC).astimezone(datetime.UTC)


def sign(
    address: str, headers: Mapping[str, str], own: Mapping[str, str], account: _Account
) -> dict[str, str]:
    """`own` headers of a GET with the account's signature (Shared Key) over them and the range."""
    sent = {name.lower(): value for name, value in {**headers, **own}.items()}
    lines = ["GET", *[""] * 10, sent.get("range", "")]  # no other standard header is sent
    named = sorted(each for each in sent.items() if each[0].startswith("x-ms-"))
    lines += [f"{name}:{value}" for name, value in named]
    lines.append(f"/{account.name}{urlsplit(address).path}")
    digest = hmac.digest(account.key, "\n".join(lines).encode(), "sha256")
    proof = base64.b64encode(digest).decode()
    return {**own, "Authorization": f"SharedKey {account.name}:{proof}"}


def _account(keys: Keys) -> _Account:
    """The account that `keys` name. Raises SpecError, which never contains a key."""
    parts = _parts(keys)
    separate = keys.get(NAME, "AZURE_STORAGE_ACCOUNT")
    name = parts.get("accountname") or separate
    endpoint = parts.get("blobendpoint", "").rstrip("/")
    key, sas = parts.get("accountkey", ""), parts.get("sharedaccesssignature", "")
    if not key and not sas:  # else those of the string belong to its account
        key, sas = keys.get(KEY, "AZURE_STORAGE_KEY"), keys.get(SAS)
    sas = sas.lstrip("?").replace("+", "%2B")  # a + would be read as a space
    suffix = parts.get("endpointsuffix", SUFFIX)
    if not name and not endpoint:
        what = "az:// needs the name of the storage account"
        raise keys.refusal(what, f"set {NAME}, or {STRING}")
    if separate and separate != name:
        what = f"{NAME} and {STRING} name two accounts"
        raise keys.refusal(what, "remove one of them")
    if endpoint:
        endpoint = keys.checked_endpoint(f"BlobEndpoint in {STRING}", endpoint)
    if name and not _ACCOUNT.fullmatch(name):
        what = f"{NAME} is not a storage account's name"
        raise keys.refusal(what, "write 3 to 24 lower-case letters and digits")
    if not _DOMAIN.fullmatch(suffix):
        raise keys.refusal(f"EndpointSuffix in {STRING} is not a domain", f"write {SUFFIX}")
    if sas and not ("sig=" in sas and _SAS.fullmatch(sas)):
        what = f"{SAS} is not a shared access signature"
        raise keys.refusal(what, "write what the portal shows as SAS token: sv=...&sig=...")
    try:
        secret = base64.b64decode(key, validate=True)
    except ValueError:
        what = f"{KEY} is not a storage account's key"
        raise keys.refusal(what, "write it as the portal shows it (base64)") from None
    scheme = "http" if parts.get("defaultendpointsprotocol") == "http" else "https"
    endpoint = endpoint or f"{scheme}://{name}.blob.{suffix}"
    # A key reads everything, a signature only what it was made for: prefer the signature.
    kind, usual = ("sharedaccesssignature", SAS) if sas else ("accountkey", KEY)
    return _Account(
        name,
        endpoint,
        key=b"" if sas else secret,
        sas=sas,
        named=STRING if parts.get("accountname") else NAME,
        proof=STRING if parts.get(kind) else usual,
    )


def _parts(keys: Keys) -> dict[str, str]:
    """The parts of the connection string, by lower-case name."""
    text = keys.get(STRING)
    pairs = [part.partition("=") for part in text.split(";") if part.strip()]
    if any(not equals for _, equals, _ in pairs):
        what = f"{STRING} is not a connection string"
        raise keys.refusal(what, "write AccountName=...;AccountKey=... as the portal shows it")
    return {name.strip().lower(): value.strip() for name, _, value in pairs}
