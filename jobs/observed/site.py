"""What the cluster is like: its nodes' GPUs and whether it can bind a claim. Asked once a minute.

Both need rights on cluster-scoped objects, which a namespaced installation does not have: then the
nodes' GPU is unknown (the Job decides) and the options decide about claims.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from jobs.api.client import NODE, STORAGE_CLASS, ApiError, Cluster
from jobs.api.options import Options
from jobs.desired import tuning as desired
from tuning.plan.device import Device

FRESH = 60.0  # seconds
_DEFAULT = "storageclass.kubernetes.io/is-default-class"


class Site:
    """Answers about the cluster, each at most a minute old."""

    def __init__(
        self, cluster: Cluster, options: Options, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cluster, self._options, self._clock = cluster, options, clock
        self._known: dict[str, tuple[float, Any]] = {}
        self._lock = threading.Lock()

    def device(self, labels: dict[str, str]) -> Device | None:
        """The GPU of the largest node with these labels, as far as nodes say so."""
        selector = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))

        def ask() -> Device | None:
            return desired.device_of_nodes(self._cluster.find(NODE, labels=selector))

        found: Device | None = self._remember(f"nodes {selector}", ask, None)
        return found

    def storage(self) -> bool:
        """Whether a claim for the run directory would be bound."""
        asked = self._options.storage
        if asked.run_volume != "auto" or asked.storage_class:
            return asked.run_volume != "ephemeral"

        def ask() -> bool:
            found = self._cluster.find(STORAGE_CLASS)
            notes = [each["metadata"].get("annotations") or {} for each in found]
            return any(each.get(_DEFAULT) == "true" for each in notes)

        return bool(self._remember("storage", ask, False))

    def _remember(self, what: str, ask: Callable[[], Any], forbidden: Any) -> Any:
        with self._lock:
            known = self._known.get(what)
        if known and self._clock() - known[0] < FRESH:
            return known[1]
        try:
            answer = ask()
        except ApiError as error:
            if error.status not in (400, 403):  # 400: labels that none can have
                raise
            answer = forbidden
        with self._lock:
            self._known[what] = (self._clock(), answer)
        return answer
