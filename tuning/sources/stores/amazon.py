"""Amazon S3 and compatible stores: each request signed with Signature Version 4."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tuning.network import sigv4
from tuning.sources.stores.keys import NO_PROFILE, Keys
from tuning.sources.stores.store import Signed, code_of

_EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of nothing
_REGION = re.compile("[a-z0-9-]{2,40}")
_PLACE = re.compile(r"<Region>([a-z0-9-]+)</Region>")


class S3:
    """One object of Amazon S3 or of a compatible store (MinIO, Ceph, R2).

    Without AWS_ACCESS_KEY_ID the request is unsigned, as public buckets allow; if that is refused,
    the pod's role signs it.
    """

    def __init__(self, bucket: str, key: str, keys: Keys) -> None:
        self.bucket, self.key, self.keys = bucket, key, keys
        self.region = keys.get("AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1"
        self.identity = self._endpoint = keys.endpoint("AWS_ENDPOINT_URL")
        self._moved = False
        self._id, self._secret, self._session = (
            keys.word(name)
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        )
        half = bool(self._id) != bool(self._secret)
        if half or not _REGION.fullmatch(self.region):
            what = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go together"
            what = what if half else "AWS_REGION is not a region"
            change = "set both" if half else "write one such as eu-central-1"
            raise keys.refusal(what, change)
        login = keys.logins.amazon(self.region) if keys.logins and not self._id else None
        self._login = login if login and login.fits(self.address) else None
        self._logged_in = False

    @property
    def address(self) -> str:
        """https://BUCKET.s3.REGION.amazonaws.com/KEY, or the path below the endpoint."""
        if self._endpoint:
            return f"{self._endpoint}/{self.bucket}/{self.key}"
        domain = "amazonaws.com" + (".cn" if self.region.startswith("cn-") else "")
        if "." in self.bucket:  # the store's certificate covers one label
            return f"https://s3.{self.region}.{domain}/{self.bucket}/{self.key}"
        return f"https://{self.bucket}.s3.{self.region}.{domain}/{self.key}"

    def signed(self, headers: Mapping[str, str]) -> Signed:
        """Signature Version 4 over host, date, range and all x-amz- headers."""
        key, secret, session = self._id, self._secret, self._session
        if self._login and self._logged_in:
            keys = self._login()
            key, secret, session = keys.key, keys.secret, keys.token
        if not key:
            return Signed(self.address)
        named = {
            name: value
            for name, value in headers.items()
            if name.lower() == "range" or name.lower().startswith("x-amz-")
        }
        named["X-Amz-Content-SHA256"] = _EMPTY
        if session:
            named["X-Amz-Security-Token"] = session
        signed = sigv4.sign(
            "GET",
            self.address,
            named,
            b"",
            key=key,
            secret=secret,
            region=self.region,
            service="s3",
        )
        return Signed(self.address, signed)

    def moved(self, headers: Mapping[str, str], body: str) -> str | None:
        """The address in the bucket's own region, if the answer names it; the same with a login."""
        match = _PLACE.search(body)
        region = headers.get("x-amz-bucket-region") or (match[1] if match else "")
        if not self._moved and region != self.region and _REGION.fullmatch(region):
            self._moved, self.region = True, region
            return self.address
        if self._login and not self._logged_in:
            self._logged_in = True
            return self.address
        return None

    def meaning(self, status: int, body: str) -> tuple[str, str]:
        """The problem and remedy of Amazon's error code."""
        code, where = code_of(body, status), self.keys.origin
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
            "InvalidToken": ("the session token is wrong", f"correct AWS_SESSION_TOKEN in {where}"),
            "InvalidAccessKeyId": (
                "the store does not know the access key",
                f"correct AWS_ACCESS_KEY_ID in {where}; a temporary one needs AWS_SESSION_TOKEN",
            ),
            "SignatureDoesNotMatch": (
                "the secret key does not fit the access key",
                f"correct AWS_SECRET_ACCESS_KEY in {where}",
            ),
            "InvalidObjectState": ("the object is archived", "restore it from Glacier first"),
        }
        elsewhere = (f"the bucket is not in the region {self.region}", f"set AWS_REGION in {where}")
        known |= dict.fromkeys(("AuthorizationHeaderMalformed", "PermanentRedirect"), elsewhere)
        if code in known:
            what, change = known[code]
            return f"{what} ({status} {code})", change
        if status == 404:
            return f"there is no such object ({code})", "correct bucket and key; capitals count"
        # Without the right to list the bucket, S3 does not say whether the object exists.
        if self._login:
            what = f"the store refuses access, or there is no such object ({status} {code})"
            return what, f"correct its name, or grant s3:GetObject on it to {self._login.who}"
        if not self._id:
            what = f"is not public, or not there, and there is no key to sign with ({code})"
            if profile := self.keys.get(NO_PROFILE):
                change = "give its keys: aws configure export-credentials --format env"
                return f"{what}; ~/.aws/credentials has no profile {profile[:40]!r}", change
            return what, f"put AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY into {where}"
        what = f"the store refuses access, or there is no such object ({status} {code})"
        change = f"correct its name, grant s3:GetObject on it to the access key in {where}"
        return what, f"{change}, or name another key"
