"""Files in object stores: `s3://`, `gs://` and `az://` -> https on the store's own address, signed.

No client library of a cloud is at work here: the address is asked for by our own fetcher like any
other, so that resuming, caps, the policy on hosts and checksums hold. A store adds three things: an
address, a proof that is made anew for each request (signatures age), and what its refusals mean.
Only the address itself ever gets that proof, never where it redirects to.
"""

from __future__ import annotations

from tuning.sources.stores.amazon import S3
from tuning.sources.stores.azure import AzureBlob
from tuning.sources.stores.google import CloudStorage
from tuning.sources.stores.keys import Keys, load_keys
from tuning.sources.stores.store import Signed, Store
from tuning.spec import urls

__all__ = ["Keys", "Signed", "Store", "load_keys", "of"]


def of(url: str, keys: Keys) -> Store | None:
    """The place of `url`, or None if that is no URL of a store. Raises SpecError for its keys."""
    match urls.in_store(url):
        case ("s3", bucket, key):
            return S3(bucket, key, keys)
        case ("gs", bucket, key):
            return CloudStorage(bucket, key, keys)
        case ("az", container, key):
            return AzureBlob(container, key, keys)
    return None
