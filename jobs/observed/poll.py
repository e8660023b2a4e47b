"""A running pod's progress, asked from the engine's port: the pod itself needs no API access."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

import urllib3

from jobs.api.client import ApiError, Cluster, Object
from jobs.manifests import server
from jobs.manifests.pod import PORT

log = logging.getLogger(__name__)

_TIMEOUT = urllib3.Timeout(connect=1.0, read=2.0)
_QUIET = 60.0  # seconds for which a pod that did not answer is left alone
_LARGEST = 64 * 1024  # bytes of an answer that are read


class Poll:
    """Asks pods, and leaves those alone for a while that do not answer."""

    def __init__(
        self,
        *,
        port: int = PORT,
        path: str = "/progress",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._port, self._path, self._clock = port, path, clock
        self._pool = urllib3.PoolManager(num_pools=64, maxsize=1, retries=False)
        self._silent: dict[str, float] = {}

    def __call__(self, pod: Object) -> dict[str, Any] | None:
        """The object that the engine in `pod` answers, or None."""
        address, uid = (pod.get("status") or {}).get("podIP"), pod["metadata"]["uid"]
        if not address or self._clock() < self._silent.get(uid, 0.0):
            return None
        host = f"[{address}]" if ":" in address else address
        try:
            answer = self._pool.request(
                "GET",
                f"http://{host}:{self._port}{self._path}",
                timeout=_TIMEOUT,
                redirect=False,
                preload_content=False,
            )
            text = answer.read(_LARGEST)
            answer.drain_conn()
            answer.release_conn()
            found = json.loads(text) if answer.status == 200 else None
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            log.debug("no answer from %s: %s", address, type(error).__name__)
            now = self._clock()
            self._silent = {k: v for k, v in self._silent.items() if v > now}
            self._silent[uid] = now + _QUIET
            return None
        return found if isinstance(found, dict) else None


class Ask:
    """What a server says of itself at /readyz: asked from its pod, or where that cannot be reached
    through the API server, if that is allowed."""

    def __init__(self, cluster: Cluster) -> None:
        self._direct, self._cluster = Poll(port=server.PORT, path="/readyz"), cluster

    def __call__(self, pod: Object) -> dict[str, Any] | None:
        """The JSON object, or None."""
        if found := self._direct(pod):
            return found
        try:
            return self._cluster.through(pod, server.PORT, "/readyz")
        except (ApiError, ValueError) as error:
            log.debug("no answer through the API server: %s", error)
            return None
