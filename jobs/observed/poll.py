"""HTTP requests to our pods: a run's progress and a server's readiness report."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

import urllib3

from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import Object
from jobs.manifests import server as server_manifests
from jobs.manifests.pod import PORT

log = logging.getLogger(__name__)

_TIMEOUT = urllib3.Timeout(connect=1.0, read=2.0)
_BACKOFF = 60.0  # seconds without requests to a pod that did not answer
_MAX_BYTES = 64 * 1024  # of a response


class Poll:
    """GETs a JSON object from pods, with a back-off for pods that do not answer."""

    def __init__(
        self,
        *,
        port: int = PORT,
        path: str = "/progress",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._port, self._path, self._clock = port, path, clock
        self._pool = urllib3.PoolManager(num_pools=64, maxsize=1, retries=False)
        self._paused_until: dict[str, float] = {}  # by pod UID

    def __call__(self, pod: Object) -> dict[str, Any] | None:
        """The object that `pod` returns, or None."""
        address, uid = (pod.get("status") or {}).get("podIP"), pod["metadata"]["uid"]
        if not address or self._clock() < self._paused_until.get(uid, 0.0):
            return None
        host = f"[{address}]" if ":" in address else address
        try:
            response = self._pool.request(
                "GET",
                f"http://{host}:{self._port}{self._path}",
                timeout=_TIMEOUT,
                redirect=False,
                preload_content=False,
            )
            text = response.read(_MAX_BYTES)
            response.drain_conn()
            response.release_conn()
            document = json.loads(text) if response.status == 200 else None
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            log.debug("no answer from %s: %s", address, type(error).__name__)
            now = self._clock()
            self._paused_until = {k: v for k, v in self._paused_until.items() if v > now}
            self._paused_until[uid] = now + _BACKOFF
            return None
        return document if isinstance(document, dict) else None


class PollServer:
    """GETs a server's /readyz from its pod, or, if that fails, through the API server's proxy."""

    def __init__(self, cluster: Cluster) -> None:
        self._poll, self._cluster = Poll(port=server_manifests.PORT, path="/readyz"), cluster

    def __call__(self, pod: Object) -> dict[str, Any] | None:
        """The report, or None."""
        if report := self._poll(pod):
            return report
        try:
            return self._cluster.proxy_get(pod, server_manifests.PORT, "/readyz")
        except (ApiError, ValueError) as error:
            log.debug("no answer through the API server: %s", error)
            return None
