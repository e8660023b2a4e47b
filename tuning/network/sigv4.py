"""AWS's Signature Version 4, for ECR and S3.

The path is signed as it is in the URL: S3 wants it encoded once.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit


def sign(
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    key: str,
    secret: str,
    region: str,
    service: str,
    now: datetime.datetime | None = None,
) -> dict[str, str]:
    """`headers` with AWS's Signature Version 4 for a request without a query; `now` is UTC."""
    place, now = urlsplit(url), now or datetime.datetime.now(datetime.UTC)
    stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    sent = {**headers, "Host": place.netloc, "X-Amz-Date": stamp}
    lines = sorted((name.lower(), " ".join(value.split())) for name, value in sent.items())
    names = ";".join(name for name, _ in lines)
    listed = "".join(f"{name}:{value}\n" for name, value in lines)
    hashed = hashlib.sha256(body).hexdigest()
    request = "\n".join([method, place.path or "/", place.query, listed, names, hashed])
    scope = f"{day}/{region}/{service}/aws4_request"
    digest = hashlib.sha256(request.encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, digest])
    chain = f"AWS4{secret}".encode()
    for part in (*scope.split("/"), text):
        chain = hmac.digest(chain, part.encode(), "sha256")
    credential = f"Credential={key}/{scope}, SignedHeaders={names}, Signature={chain.hex()}"
    return {**sent, "Authorization": f"AWS4-HMAC-SHA256 {credential}"}
