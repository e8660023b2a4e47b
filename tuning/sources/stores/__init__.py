"""Files in object stores: `s3://`, `gs://` and `az://` -> signed https on the store's own address.

The address is downloaded like any other URL, so that resuming, limits, the policy on hosts and
checksums hold; a cloud's client library would bypass them. A store adds an address, a signature for
each request (signatures expire), and the meaning of its refusals. Only the address itself gets the
signature, never a redirect's target.
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
    """The object that `url` names, or None if it names none. Raises SpecError for its keys."""
    match urls.in_store(url):
        case ("s3", bucket, key):
            return S3(bucket, key, keys)
        case ("gs", bucket, key):
            return CloudStorage(bucket, key, keys)
        case ("az", container, key):
            return AzureBlob(container, key, keys)
    return None
