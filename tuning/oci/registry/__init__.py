"""Push, pull and verify images: the OCI distribution protocol, exactly once.

`wire` speaks HTTP to one repository, `auth` proves who we are, `answers` puts what comes back into
words; `push`, `upload` and `pull` are the protocols on top. oras reads the login challenges; its
transport is not used, since it retries on any exception and on few of the statuses that pass,
sends a token of too small a scope again, never renews one, and holds whole blobs in memory.
"""

from tuning.oci.registry.pull import Pulled, beginning, download, pull, resolve
from tuning.oci.registry.push import Found, Pushed, check_push, claim, look, manifest, push
from tuning.oci.registry.referrers import Attached, Part, attach, attached, document, parts
from tuning.oci.registry.signed import signed
from tuning.oci.registry.wire import Patience, Remote

__all__ = [
    "Attached",
    "Found",
    "Part",
    "Patience",
    "Pulled",
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
