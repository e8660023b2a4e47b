"""Files in object stores: `s3://BUCKET/KEY` -> https on the store's own address, signed.

No client library of a cloud is at work here: the address is asked for by our own fetcher like any
other, so that resuming, caps, the policy on hosts and checksums hold. A store adds three things: an
address, headers that are made anew for each request (signatures age), and what its refusals mean.
Only the address itself ever gets those headers, never where it redirects to.
"""

from __future__ import annotations

import configparser
import datetime
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tuning import sigv4
from tuning.errors import SpecError
from tuning.spec import urls

LARGEST_KEY = 1 << 16  # bytes
_EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of nothing
_REGION = re.compile("[a-z0-9-]{2,40}")
_CODE, _PLACE = re.compile(r"<Code>(\w{1,80})</Code>"), re.compile(r"<Region>([a-z0-9-]+)</Region>")
_NAMES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
)


@dataclass(frozen=True)
class Keys:
    """Credentials of stores by their usual names, and where a person finds them."""

    values: Mapping[str, str] = field(default_factory=dict, repr=False)
    origin: str = "the data Secret"

    def get(self, *names: str) -> str:
        """The first of `names` that is set, or an empty text."""
        return next((self.values[name] for name in names if self.values.get(name)), "")


class Store(Protocol):
    """A place of one file."""

    @property
    def address(self) -> str:
        """Where it is asked for; holds no secret."""
        ...

    def signed(self, headers: Mapping[str, str]) -> dict[str, str]:
        """What proves, from now on for some minutes, that a GET with `headers` is ours."""
        ...

    def moved(self, headers: Mapping[str, str], body: str) -> str | None:
        """Another address that an answer points to; None if it does not, or a second time."""
        ...

    def meaning(self, status: int, body: str) -> tuple[str, str]:
        """What is wrong, and what to change; never a text of the answer's."""
        ...


def of(url: str, keys: Keys) -> Store | None:
    """The place of `url`, or None if that is no URL of a store. Raises SpecError for its keys."""
    match urls.in_store(url):
        case ("s3", bucket, key):
            return S3(bucket, key, keys)
    return None


def load_keys(folder: Path | None) -> Keys:
    """The keys in a mounted Secret; without one those of the environment and ~/.aws/credentials.

    Raises SpecError that names a file that cannot be read.
    """
    if folder is None:
        found = {name: os.environ[name] for name in _NAMES if name in os.environ}
        return Keys({**_profile(found), **found}, "the environment")
    values = {}
    for name in _NAMES:
        try:
            with (folder / name).open("rb") as file:
                values[name] = file.read(LARGEST_KEY).decode("ascii").strip()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            what = f"cannot be read ({type(error).__name__})"
            change = "write the key as plain text"
            raise SpecError.at("FETCH-107", str(folder / name), what, change) from None
    return Keys(values, f"the data Secret ({folder})")


def _profile(environment: Mapping[str, str]) -> dict[str, str]:
    """What ~/.aws/credentials says, unless the environment holds a key: the two never mix."""
    if "AWS_ACCESS_KEY_ID" in environment:
        return {}
    usual = Path.home() / ".aws" / "credentials"
    parser = configparser.RawConfigParser()
    try:
        parser.read(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or usual, encoding="utf-8")
        section = parser[os.environ.get("AWS_PROFILE") or "default"]
    except (OSError, UnicodeDecodeError, configparser.Error, KeyError):
        return {}
    return {name: section[name.lower()] for name in _NAMES[:3] if name.lower() in section}


class S3:
    """One object of Amazon S3, or of a store that speaks its language (MinIO, Ceph, R2).

    Without AWS_ACCESS_KEY_ID it is asked for unsigned, as public buckets allow.
    """

    def __init__(self, bucket: str, key: str, keys: Keys) -> None:
        self.bucket, self.key, self.keys = bucket, key, keys
        self.region = keys.get("AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1"
        self._endpoint = keys.get("AWS_ENDPOINT_URL").rstrip("/")
        self._moved = False
        half = bool(keys.get("AWS_ACCESS_KEY_ID")) != bool(keys.get("AWS_SECRET_ACCESS_KEY"))
        if half or not _REGION.fullmatch(self.region):
            what = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go together"
            what = what if half else "AWS_REGION is no region"
            change = "set both" if half else "write one such as eu-central-1"
            raise SpecError.at("FETCH-107", keys.origin, what, change)

    @property
    def address(self) -> str:
        """https://BUCKET.s3.REGION.amazonaws.com/KEY, or the path below the endpoint."""
        if self._endpoint:
            return f"{self._endpoint}/{self.bucket}/{self.key}"
        domain = "amazonaws.com" + (".cn" if self.region.startswith("cn-") else "")
        if "." in self.bucket:  # the store's certificate covers one label
            return f"https://s3.{self.region}.{domain}/{self.bucket}/{self.key}"
        return f"https://{self.bucket}.s3.{self.region}.{domain}/{self.key}"

    def signed(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Signature Version 4 over host, date and the range that is asked for."""
        key = self.keys.get("AWS_ACCESS_KEY_ID")
        if not key:
            return {}
        named = {name: value for name, value in headers.items() if name == "Range"}
        named["X-Amz-Content-SHA256"] = _EMPTY
        if session := self.keys.get("AWS_SESSION_TOKEN"):
            named["X-Amz-Security-Token"] = session
        found = sigv4.sign(
            "GET",
            self.address,
            named,
            b"",
            key=key,
            secret=self.keys.get("AWS_SECRET_ACCESS_KEY"),
            region=self.region,
            service="s3",
            now=datetime.datetime.now(datetime.UTC),
        )
        return found

    def moved(self, headers: Mapping[str, str], body: str) -> str | None:
        """The address in the bucket's own region, if an answer names it."""
        match = _PLACE.search(body)
        region = headers.get("x-amz-bucket-region") or (match[1] if match else "")
        if self._moved or region == self.region or not _REGION.fullmatch(region):
            return None
        self._moved, self.region = True, region
        return self.address

    def meaning(self, status: int, body: str) -> tuple[str, str]:
        """Amazon's code in our words."""
        found = _CODE.search(body)
        code, where = found[1] if found else str(status), self.keys.origin
        signed = bool(self.keys.get("AWS_ACCESS_KEY_ID"))
        known = {
            "NoSuchKey": ("there is no such object", "correct the key; capitals count"),
            "NoSuchBucket": ("there is no such bucket", "correct the bucket's name"),
            "RequestTimeTooSkewed": (
                "this machine's clock is more than 15 minutes off",
                "set the clock (NTP) of the machine",
            ),
            "ExpiredToken": (
                "the session has expired",
                f"renew AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN in {where}",
            ),
            "InvalidToken": ("the session's token is wrong", f"mend AWS_SESSION_TOKEN in {where}"),
            "InvalidAccessKeyId": (
                "the store does not know the access key",
                f"mend AWS_ACCESS_KEY_ID in {where}; a temporary one needs AWS_SESSION_TOKEN",
            ),
            "SignatureDoesNotMatch": (
                "the secret key does not fit the access key",
                f"mend AWS_SECRET_ACCESS_KEY in {where}",
            ),
            "AuthorizationHeaderMalformed": (
                f"the bucket is not in the region {self.region}",
                f"set AWS_REGION in {where}",
            ),
            "PermanentRedirect": (
                f"the bucket is not in the region {self.region}",
                f"set AWS_REGION in {where}",
            ),
            "InvalidObjectState": ("the object is archived", "restore it from Glacier first"),
        }
        if code in known:
            what, change = known[code]
            return f"{what} ({status} {code})", change
        if status == 404:
            return f"there is no such object ({code})", "correct bucket and key; capitals count"
        if not signed:
            what = f"is not public, and there is no key to sign with ({code})"
            return what, f"put AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY into {where}"
        what = f"the store refuses access ({status} {code})"
        return what, f"grant s3:GetObject on it to the access key in {where}, or name another key"
