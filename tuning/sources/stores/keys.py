"""Credentials of object stores, by the names that each cloud's own tools know them by."""

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
from tuning.sources.stores.logins import GOOGLE_FILE, Logins, gcloud_file, token_service

LARGEST_KEY = 1 << 16  # bytes
NO_PROFILE = "AWS_PROFILE"  # among the keys only where it names no section of the credentials
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
    """Credentials of stores by their usual names, and where a person finds them."""

    values: Mapping[str, str] = field(default_factory=dict, repr=False)
    origin: str = "the data Secret"
    logins: Logins | None = field(default=None, repr=False)  # for who has no key
    ENVIRONMENT: ClassVar[str] = "the environment"

    def get(self, *names: str) -> str:
        """The first of `names` that is set, or an empty text."""
        return next((self.values[name] for name in names if self.values.get(name)), "")

    def refusal(self, what: str, change: str) -> SpecError:
        """The error of keys that cannot be meant so. Neither text may hold a key."""
        return SpecError.at("FETCH-107", self.origin, what, change)

    def endpoint(self, name: str, otherwise: str = "") -> str:
        """The address that the key `name` holds, without a / at its end; else `otherwise`.

        Raises SpecError if it is none. Whether it may be asked is the policy's to say.
        """
        text = self.get(name).rstrip("/")
        if not text:
            return otherwise
        return self.checked_endpoint(name, text)

    def checked_endpoint(self, name: str, text: str) -> str:
        """`text` with scheme and host in small letters, as they are sent. Raises SpecError."""
        try:
            parts = urlsplit(text)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            parts, usable = urlsplit(""), False
        if not usable or parts.query or parts.fragment or "@" in parts.netloc:
            raise self.refusal(f"{name} is no address", "write one such as https://store.corp:9000")
        return f"{parts.scheme}://{parts.netloc.lower()}{parts.path}"

    def word(self, *names: str) -> str:
        """The first of `names` that is set, which goes into a header as it stands.

        Raises SpecError if it holds what no header can, a line break in its middle, say.
        """
        text = self.get(*names)
        if text and not (text.isascii() and text.isprintable() and " " not in text):
            what = f"{names[0]} holds a line break or other characters that no key has"
            raise self.refusal(what, "write it in one line, without quotes")
        return text


def load_keys(folder: Path | None, policy: Policy | None = None) -> Keys:
    """The keys in a mounted Secret; without one those of the environment and ~/.aws/credentials.

    With a `policy`, which says how clouds are reached, whoever has no key logs in with what the
    environment knows. Raises SpecError that names a file of the Secret that cannot be read.
    """
    logins = None
    if policy:
        person = gcloud_file() if folder is None else None
        logins = Logins(os.environ, token_service(policy), gcloud=person)
    if folder is None:
        found = {name: os.environ[name] for name in _NAMES if os.environ.get(name)}
        if path := found.get(GOOGLE_FILE):
            # Whoever asks for gs:// is told of a file that cannot be read, nobody else.
            with contextlib.suppress(OSError, UnicodeDecodeError):
                found[GOOGLE_FILE] = _text(Path(path))
        return Keys({**_profile(found), **found}, Keys.ENVIRONMENT, logins)
    values = {}
    for name in _NAMES:
        try:
            values[name] = _text(folder / name)
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            what = f"cannot be read ({type(error).__name__})"
            change = "write the key as plain text"
            raise SpecError.at("FETCH-107", str(folder / name), what, change) from None
    return Keys(values, f"the data Secret ({folder})", logins)


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(LARGEST_KEY).decode("ascii").strip()


def _profile(environment: Mapping[str, str]) -> dict[str, str]:
    """What ~/.aws/credentials says, unless the environment holds a key: the two never mix."""
    if any(name in environment for name in _AMAZON[:3]):
        return {}
    path = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws" / "credentials"
    asked = os.environ.get("AWS_PROFILE")
    parser = configparser.RawConfigParser()
    try:
        parser.read(path, encoding="utf-8")
        section = parser[asked or "default"]
    except (OSError, UnicodeDecodeError, configparser.Error, KeyError):
        # It may be one of ~/.aws/config, a single sign-on, say: told to whom S3 refuses, no sooner.
        return {NO_PROFILE: asked} if asked else {}
    return {name: section[name.lower()] for name in _AMAZON[:3] if name.lower() in section}
