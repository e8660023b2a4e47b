"""Credentials of object stores, by the names that each cloud's own tools use."""

from __future__ import annotations

import configparser
import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from tuning.errors import SpecError
from tuning.network.policy import Policy
from tuning.sources.stores.logins import GOOGLE_FILE, Logins, gcloud_file, read_text, token_service

NO_PROFILE = "AWS_PROFILE"  # among the keys only if ~/.aws/credentials has no such section
_AMAZON = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
)
_GOOGLE = (
    GOOGLE_FILE,  # in the environment a path, in a Secret the file
    "GOOGLE_OAUTH_ACCESS_TOKEN",
    "STORAGE_EMULATOR_HOST",
)
_AZURE = (
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
)
_NAMES = (*_AMAZON, *_GOOGLE, *_AZURE)


@dataclass(frozen=True)
class Keys:
    """Credentials of stores by their usual names, and where they come from."""

    values: Mapping[str, str] = field(default_factory=dict, repr=False)
    origin: str = "the data Secret"
    logins: Logins | None = field(default=None, repr=False)  # used without a key
    ENVIRONMENT: ClassVar[str] = "the environment"

    def get(self, *names: str) -> str:
        """The first of `names` that is set, or an empty string."""
        return next((self.values[name] for name in names if self.values.get(name)), "")

    def refusal(self, what: str, change: str) -> SpecError:
        """The error of invalid keys. Neither text may contain a key."""
        return SpecError.at("FETCH-107", self.origin, what, change)

    def endpoint(self, name: str, otherwise: str = "") -> str:
        """The address in the key `name`, without a final /; else `otherwise`. Raises SpecError."""
        text = self.get(name).rstrip("/")
        return self.checked_endpoint(name, text) if text else otherwise

    def checked_endpoint(self, name: str, text: str) -> str:
        """`text` with scheme and host in lower case. Raises SpecError if it is no address."""
        try:
            parts = urlsplit(text)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            parts, usable = urlsplit(""), False
        if not usable or parts.query or parts.fragment or "@" in parts.netloc:
            raise self.refusal(f"{name} is not a URL", "write one such as https://store.corp:9000")
        return f"{parts.scheme}://{parts.netloc.lower()}{parts.path}"

    def word(self, *names: str) -> str:
        """The first of `names` that is set, usable in a header. Raises SpecError if it is not."""
        text = self.get(*names)
        if text and not (text.isascii() and text.isprintable() and " " not in text):
            what = f"{names[0]} contains a line break or other characters that no key has"
            raise self.refusal(what, "write it in one line, without quotes")
        return text


def load_keys(folder: Path | None, policy: Policy | None = None) -> Keys:
    """The keys in a mounted Secret; without one those of the environment and ~/.aws/credentials.

    With a `policy`, which says how clouds are reached, the environment's logins serve where there
    is no key. Raises SpecError that names an unreadable file of the Secret.
    """
    logins = None
    if policy:
        gcloud = gcloud_file() if folder is None else None
        logins = Logins(os.environ, token_service(policy), gcloud=gcloud)
    if folder is None:
        values = {name: os.environ[name] for name in _NAMES if os.environ.get(name)}
        if path := values.get(GOOGLE_FILE):
            # An unreadable file is an error of gs:// URLs only.
            with contextlib.suppress(OSError, UnicodeDecodeError):
                values[GOOGLE_FILE] = read_text(Path(path))
        return Keys({**_profile(values), **values}, Keys.ENVIRONMENT, logins)
    values = {}
    for name in _NAMES:
        try:
            values[name] = read_text(folder / name)
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            what = f"cannot be read ({type(error).__name__})"
            change = "write the key as plain text"
            raise SpecError.at("FETCH-107", str(folder / name), what, change) from None
    return Keys(values, f"the data Secret ({folder})", logins)


def _profile(environment: Mapping[str, str]) -> dict[str, str]:
    """The keys in ~/.aws/credentials, unless the environment has one: the two never mix."""
    if any(name in environment for name in _AMAZON[:3]):
        return {}
    path = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws" / "credentials"
    profile = os.environ.get("AWS_PROFILE")
    parser = configparser.RawConfigParser()
    try:
        parser.read(path, encoding="utf-8")
        section = parser[profile or "default"]
    except (OSError, UnicodeDecodeError, configparser.Error, KeyError):
        # It may be in ~/.aws/config, such as single sign-on: reported only if S3 refuses.
        return {NO_PROFILE: profile} if profile else {}
    return {name: section[name.lower()] for name in _AMAZON[:3] if name.lower() in section}
