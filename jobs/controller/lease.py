"""Which replica writes: a Lease, held by one, renewed, and given back on a clean end.

The client library's election compares wall clocks, dies with the network and never gives a lease
back. Here all waiting is on the monotonic clock, and `held` is false as soon as the lease *may* be
somebody else's, so that a process that was frozen writes nothing when it wakes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from jobs.api.client import LEASE, ApiError, Cluster, Object

log = logging.getLogger(__name__)

DURATION, RENEW = 15.0, 3.0  # seconds


class Lease:
    """One candidate for the lease `name` in `namespace`."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        namespace: str,
        name: str,
        identity: str,
        duration: float = DURATION,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._namespace, self._name = cluster, namespace, name
        self._identity, self._duration, self._clock = identity, duration, clock
        self._renewed: float | None = None  # when our last renewal was *sent*
        self._seen: tuple[str, float] | None = None  # another's version, and since when
        self.taken = False  # whether another had it when it was last looked at

    @property
    def held(self) -> bool:
        """Whether writes are ours, with a margin for those on their way."""
        renewed = self._renewed
        return renewed is not None and self._clock() < renewed + 0.8 * self._duration

    def acquire(self, stop: threading.Event) -> bool:
        """Wait until the lease is ours; False if `stop` came first."""
        while not stop.is_set():
            if self.attempt():
                return True
            stop.wait(min(RENEW, self._duration / 5))
        return False

    def keep(self, stop: threading.Event) -> None:
        """Renew until `stop`, or until the lease is lost."""
        while not stop.wait(min(RENEW, self._duration / 5)):
            if not self.attempt() and not self.held:
                log.error("lease lost")
                return

    def attempt(self) -> bool:
        """Take or renew the lease if that is ours to do; True if it is ours now."""
        sent = self._clock()
        try:
            lease = self._cluster.get(LEASE, self._namespace, self._name)
            self.taken = lease is not None and not self._ours_or_free(lease)
            if lease is None:
                taken = self._cluster.create(LEASE, self._object({})) is not None
            elif self._may_take(lease):
                self._cluster.replace(LEASE, self._object(lease))
                taken = True
            else:
                taken = False
        except ApiError as error:
            log.warning("lease: %s", error)
            return False
        self._renewed = sent if taken else None
        return taken

    def give_back(self) -> None:
        """Let another replica go on at once."""
        if not self.held:
            return
        try:
            lease = self._cluster.get(LEASE, self._namespace, self._name)
            if lease and lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"] |= {"holderIdentity": None, "leaseDurationSeconds": 1}
                self._cluster.replace(LEASE, lease)
        except ApiError as error:
            log.warning("lease was not given back: %s", error)
        self._renewed = None

    def _ours_or_free(self, lease: Object) -> bool:
        return (lease.get("spec") or {}).get("holderIdentity") in (None, "", self._identity)

    def _may_take(self, lease: Object) -> bool:
        """Ours, nobody's, or unchanged for as long as its holder promised to renew it."""
        if self._ours_or_free(lease):
            return True
        spec = lease.get("spec") or {}
        version, now = lease["metadata"]["resourceVersion"], self._clock()
        if self._seen is None or self._seen[0] != version:
            self._seen = (version, now)
        return now - self._seen[1] > float(spec.get("leaseDurationSeconds") or self._duration)

    def _object(self, lease: Object) -> Object:
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        old = lease.get("spec") or {}
        ours = old.get("holderIdentity") == self._identity
        changes = int(old.get("leaseTransitions") or 0) + (0 if ours else 1)
        return {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.name,
            "metadata": lease.get("metadata") or {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": max(1, round(self._duration)),
                "acquireTime": old.get("acquireTime") if ours else now,
                "renewTime": now,
                "leaseTransitions": changes,
            },
        }
