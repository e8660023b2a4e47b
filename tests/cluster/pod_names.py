"""DNS for pods of the test bed, which has none: names of headless Services, from real Endpoints.

The rule (Kubernetes' DNS specification, records for headless Services): a pod of the Service with a
host name has the record HOST.SERVICE.NAMESPACE.svc.cluster.local, if the endpoints controller lists
its address, ready or not as the Service says.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

from cluster.repeating import repeated

from jobs.api.client import Cluster
from jobs.api.kinds import SERVICE, Kind

ENDPOINTS = Kind("", "v1", "endpoints", "Endpoints")
GATEWAY = "10.244.0.1"  # of the bridge, in up.sh: where pods reach this machine
_DOMAIN = ".svc.cluster.local"
_IP_FREEBIND = 15  # the bridge appears with the first pod
_NOT_FOUND = 3


def address_of(api: Cluster, name: str) -> str | None:
    """The address that a pod finds for a name."""
    parts = name.rstrip(".").removesuffix(_DOMAIN).split(".")
    if not name.rstrip(".").endswith(_DOMAIN) or len(parts) != 3:
        return None
    host, service, namespace = parts
    found = api.get(SERVICE, namespace, service)
    if not found or found["spec"].get("clusterIP") != "None":
        return None
    for subset in (api.get(ENDPOINTS, namespace, service) or {}).get("subsets") or []:
        for each in subset.get("addresses") or []:
            if each.get("hostname") == host:
                return str(each["ip"])
    return None


@contextlib.contextmanager
def served(api: Cluster) -> Iterator[None]:
    """A name server at the pods' gateway, for the block."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door:
        door.setsockopt(socket.SOL_IP, _IP_FREEBIND, 1)
        door.bind((GATEWAY, 53))
        door.settimeout(0.2)

        def step() -> None:
            with contextlib.suppress(TimeoutError):
                query, client = door.recvfrom(512)
                door.sendto(_answer(api, query), client)

        with repeated(step):
            yield


def _answer(api: Cluster, query: bytes) -> bytes:
    labels, at = [], 12
    while length := query[at]:
        labels.append(query[at + 1 : at + 1 + length].decode())
        at += 1 + length
    kind = struct.unpack("!H", query[at + 1 : at + 3])[0]
    question = query[12 : at + 5]
    found = address_of(api, ".".join(labels))
    code = 0 if found else _NOT_FOUND
    has_record = found is not None and kind == 1  # A
    head = query[:2] + struct.pack("!HHHHH", 0x8580 | code, 1, int(has_record), 0, 0)
    if not has_record or found is None:
        return head + question
    record = struct.pack("!HHHIH", 0xC00C, 1, 1, 0, 4) + socket.inet_aton(found)
    return head + question + record
