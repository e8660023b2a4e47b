"""Leader election: a Lease that one replica holds, renews, and releases on a clean exit.

The client library's election compares wall clocks, exits on network errors and never releases a
lease. Here all times are monotonic, and `held` is False as soon as another replica *may* have the
lease, so that a suspended process writes nothing when it resumes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import LEASE, Object

log = logging.getLogger(__name__)

DURATION, RENEW = 15.0, 3.0  # seconds


class Lease:
    """One candidate for the Lease `name` in `namespace`."""

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
        self._other: tuple[str, float] | None = None  # another holder's version, and since when
        self.held_by_other = False  # at the last attempt

    @property
    def held(self) -> bool:
        """Whether this replica may write, with a margin for writes in flight."""
        renewed = self._renewed
        return renewed is not None and self._clock() < renewed + 0.8 * self._duration

    def acquire(self, stop: threading.Event) -> bool:
        """Wait until the lease is ours; False if `stop` is set first."""
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
        """Take or renew the lease if allowed; True if it is ours now."""
        sent = self._clock()
        try:
            lease = self._cluster.get(LEASE, self._namespace, self._name)
            self.held_by_other = lease is not None and not self._ours_or_free(lease)
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

    def release(self) -> None:
        """Let another replica take over at once."""
        if not self.held:
            return
        try:
            lease = self._cluster.get(LEASE, self._namespace, self._name)
            if lease and lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"] |= {"holderIdentity": None, "leaseDurationSeconds": 1}
                self._cluster.replace(LEASE, lease)
        except ApiError as error:
            log.warning("lease was not released: %s", error)
        self._renewed = None

    def _ours_or_free(self, lease: Object) -> bool:
        return (lease.get("spec") or {}).get("holderIdentity") in (None, "", self._identity)

    def _may_take(self, lease: Object) -> bool:
        """Ours, without a holder, or not renewed within the duration that its holder set."""
        if self._ours_or_free(lease):
            return True
        spec = lease.get("spec") or {}
        version, now = lease["metadata"]["resourceVersion"], self._clock()
        if self._other is None or self._other[0] != version:
            self._other = (version, now)
        return now - self._other[1] > float(spec.get("leaseDurationSeconds") or self._duration)

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
