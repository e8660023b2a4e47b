"""Google Cloud Storage: a signed URL for each request, or an access token.

A service account's key file signs by itself, without a token (V4 signing, GOOG4-RSA-SHA256).
Source: https://cloud.google.com/storage/docs/authentication/signatures
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from urllib.parse import quote, urlsplit

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tuning.sources.stores.keys import Keys
from tuning.sources.stores.store import Signed, code_of

FILE, TOKEN = "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_OAUTH_ACCESS_TOKEN"
ENDPOINT = "https://storage.googleapis.com"
VALID_FOR = 900  # seconds in which a transfer may start


class CloudStorage:
    """One object of a bucket.

    Without a key file or token the request is unsigned, as public buckets allow; if that is
    refused, the environment's login is used.
    """

    def __init__(self, bucket: str, key: str, keys: Keys) -> None:
        self.keys = keys
        self.identity = keys.endpoint("STORAGE_EMULATOR_HOST", ENDPOINT)
        self.address = f"{self.identity}/{bucket}/{key}"
        self._token = keys.word(TOKEN)
        self._email, self._key, self._login, self._logged_in = "", None, None, False
        text, own = keys.get(FILE), keys.origin == Keys.ENVIRONMENT
        login = None
        if keys.logins and not self._token and (own or not text):
            login = keys.logins.google()
            self._login = login if login and login.fits(self.address) else None
        if text and not self._token and not login:
            self._email, self._key = _service_account(text, keys)

    def signed(self, headers: Mapping[str, str]) -> Signed:
        """The address with a signature of the service account, or with the token."""
        # An object that is stored compressed is sent as it is: decompressed on the way it would
        # have neither length nor ranges, and could not be resumed.
        own = {"Accept-Encoding": "gzip"}
        token = self._login().text if self._login and self._logged_in else self._token
        if token:
            return Signed(self.address, own | {"Authorization": f"Bearer {token}"})
        if self._key is None:
            return Signed(self.address, own)
        now = datetime.datetime.now(datetime.UTC)
        return Signed(sign(self.address, self._email, self._key, now), own)

    def moved(self, headers: Mapping[str, str], body: str) -> str | None:
        """The same address with a login: a bucket has only one."""
        if self._login and not self._logged_in:
            self._logged_in = True
            return self.address
        return None

    def meaning(self, status: int, body: str) -> tuple[str, str]:
        """The problem and remedy of Google's error code."""
        code, where = code_of(body, status), self.keys.origin
        known = {
            "NoSuchKey": ("there is no such object", "correct the name; capitals count"),
            "NoSuchBucket": ("there is no such bucket", "correct the bucket's name"),
            "UserProjectMissing": (
                "the bucket is requester-pays, which is not supported",
                "copy the file to your own bucket",
            ),
            "SignatureDoesNotMatch": (
                "the key does not fit its service account",
                f"make a new key of the account, and put its file into {FILE} of {where}",
            ),
            "ExpiredToken": (
                "this machine's clock is more than 15 minutes off",
                "set the clock (NTP) of the machine",
            ),
        }
        if code in known:
            what, change = known[code]
            return f"{what} ({status} {code})", change
        if status == 404:
            return f"there is no such object ({code})", "correct bucket and name; capitals count"
        if self._token and status == 401:
            what = f"the access token is wrong or has expired ({code})"
            return what, f"renew {TOKEN} in {where} (gcloud auth print-access-token)"
        if not self._token and not self._login and self._key is None:
            what = f"is not public, or not there, and there is no key to sign with ({code})"
            return what, f"put a service account's key file into {FILE} of {where}, or set {TOKEN}"
        who = self._email or (self._login.who if self._login else "the token's owner")
        what = f"the store refuses access, or there is no such object ({status} {code})"
        change = f"grant storage.objects.get on it (Storage Object Viewer) to {who}"
        return what, f"correct its name, or {change}"


def sign(address: str, email: str, key: rsa.RSAPrivateKey, now: datetime.datetime) -> str:
    """The signed URL of a GET of `address`; `now` is in UTC."""
    place, stamp = urlsplit(address), now.strftime("%Y%m%dT%H%M%SZ")
    scope = f"{stamp[:8]}/auto/storage/goog4_request"
    query = "&".join(
        f"{name}={quote(value, safe='-._~')}"
        for name, value in (
            ("X-Goog-Algorithm", "GOOG4-RSA-SHA256"),
            ("X-Goog-Credential", f"{email}/{scope}"),
            ("X-Goog-Date", stamp),
            ("X-Goog-Expires", str(VALID_FOR)),
            ("X-Goog-SignedHeaders", "host"),
        )
    )
    lines = ["GET", place.path, query, f"host:{place.netloc}", "", "host", "UNSIGNED-PAYLOAD"]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    text = "\n".join(["GOOG4-RSA-SHA256", stamp, scope, digest])
    signature = key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{address}?{query}&X-Goog-Signature={signature.hex()}"


def _service_account(text: str, keys: Keys) -> tuple[str, rsa.RSAPrivateKey]:
    """E-mail address and key of a key file. Raises SpecError, which never contains the key."""
    change = f"put the file in whole (--from-file={FILE}=key.json); in the environment, its path"
    if not text.startswith("{") and keys.origin == Keys.ENVIRONMENT:
        raise keys.refusal(f"{FILE} does not name a readable file", "correct the path")
    try:
        record = json.loads(text)
        kind = record["type"]
    except (ValueError, KeyError, TypeError):
        raise keys.refusal(f"{FILE} is not a key file of Google's", change) from None
    if kind != "service_account":
        shown = kind if kind in ("authorized_user", "external_account") else "something else"
        what = f"{FILE} is not a service account's key but {shown}, which needs a token service"
        raise keys.refusal(what, f"set {TOKEN} to what `gcloud auth print-access-token` prints")
    try:
        key = serialization.load_pem_private_key(record["private_key"].encode(), None)
        email = record["client_email"]
    except (ValueError, TypeError, KeyError, AttributeError, UnsupportedAlgorithm):
        raise keys.refusal(f"{FILE} has no readable private key", change) from None
    if not isinstance(key, rsa.RSAPrivateKey) or not isinstance(email, str):
        raise keys.refusal(f"{FILE} has no RSA key with an account", change)
    return email, key
