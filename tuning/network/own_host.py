"""Whether a request to a local server names this machine: what protects it from a web page.

A page whose name is pointed at a private address after it was loaded (DNS rebinding) may read what
that address answers; its requests carry the page's name as `Host`.
"""

from __future__ import annotations

import ipaddress
import socket

# Names that no public DNS resolves, so that no page can have them (RFC 6761, 6762, 9476, 8375).
PRIVATE = (".localhost", ".local", ".internal", ".svc", ".cluster.local", ".home.arpa")


def is_own(host: str | None) -> bool:
    """Whether the `Host` header names this machine or a private name; None (HTTP/1.0) does.

    Addresses, names of one label, private domains and the machine's own name are taken.
    """
    if host is None:
        return True
    name = host.strip().lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    else:
        name = name.partition(":")[0]
    name = name.removesuffix(".")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        own = {socket.gethostname().lower()}
        return bool(name) and ("." not in name or name.endswith(PRIVATE) or name in own)
    return True
