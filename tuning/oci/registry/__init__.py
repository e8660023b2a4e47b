"""Push, pull and verify images: the OCI distribution protocol, exactly once.

`wire` speaks HTTP to one repository, `auth` keeps its credentials fresh, `answers` makes errors of
what comes back; `push`, `upload` and `pull` are the protocols on top. No client library is used:
oras retries on any exception and on few of the statuses that pass, sends a token of too small a
scope again, never renews one, and holds whole blobs in memory.
"""

from tuning.network.retry import Patience
from tuning.oci.registry.pull import beginning, download, pull, resolve
from tuning.oci.registry.push import Found, Pushed, check_push, claim, look, manifest, push
from tuning.oci.registry.referrers import Attached, attach, attached, document, parts
from tuning.oci.registry.signed import signed
from tuning.oci.registry.wire import OVERWRITE, Remote

__all__ = [
    "OVERWRITE",
    "Attached",
    "Found",
    "Patience",
    "Pushed",
    "Remote",
    "attach",
    "attached",
    "beginning",
    "check_push",
    "claim",
    "document",
    "download",
    "look",
    "manifest",
    "parts",
    "pull",
    "push",
    "resolve",
    "signed",
]
