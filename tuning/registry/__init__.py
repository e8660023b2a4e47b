"""Push, pull and verify images: the OCI distribution protocol, exactly once.

`wire` speaks HTTP to one registry (login, retries, where a credential may go), `push` and `pull`
are the protocols on top of it. oras parses the login challenges; its transport is not used, since
it retries on any exception, sends tokens of too small a scope again, and holds whole blobs in
memory.
"""

from tuning.registry.pull import Pulled, pull
from tuning.registry.push import Found, Pushed, check_push, claim, look, push
from tuning.registry.wire import Patience, Remote

__all__ = [
    "Found",
    "Patience",
    "Pulled",
    "Pushed",
    "Remote",
    "check_push",
    "claim",
    "look",
    "pull",
    "push",
]
