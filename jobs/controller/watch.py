"""List and watch of Workspaces and their objects -> keys of Workspaces to reconcile.

A key only requests a reconcile, which reads everything anew, so that an event may come twice, late
or never. The object of an event is passed along with the key; a list's items are not. Whatever
ends a watch, a new list follows, at the latest after `RESYNC` seconds.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import DEPLOYMENT, JOB, POD, WORKSPACE, Kind, Object
from jobs.desired import names
from tuning.spec.workspace import ANNOTATION

log = logging.getLogger(__name__)

Key = tuple[str, str]  # namespace, name
RESYNC = 300  # seconds
WATCH = 50  # seconds of one connection: a dead one is detected within a minute
PAUSE, LONGEST_PAUSE = 1.0, 20.0  # seconds between failed lists


def key_of_workspace(item: Object) -> Key | None:
    """The key of a Workspace."""
    return item["metadata"]["namespace"], item["metadata"]["name"]


def key_of_owned(item: Object) -> Key | None:
    """The key of the Workspace that owns a Job, a Deployment or a pod, by its label."""
    labels: dict[str, str] = item["metadata"].get("labels") or {}
    name = labels.get(names.WORKSPACE_LABEL)
    return (item["metadata"]["namespace"], name) if name else None


def is_echo(item: Object, known: Object | None) -> bool:
    """Whether an event of a Workspace most likely reports our own status update.

    `known` are the annotations before, which no generation counts; None: unknown.
    """
    meta, status = item["metadata"], item.get("status") or {}
    is_observed = status.get("observedGeneration") == meta.get("generation")
    is_same = known is None or known == _annotations(item)
    return is_observed and is_same and not meta.get("deletionTimestamp")


def _annotations(item: Object) -> Object:
    """The annotations that are part of a Workspace's spec."""
    annotations: Object = item["metadata"].get("annotations") or {}
    return {k: v for k, v in annotations.items() if k.startswith((ANNOTATION, "kaito.sh/"))}


SOURCES: tuple[tuple[Kind, str, Callable[[Object], Key | None]], ...] = (
    (WORKSPACE, "", key_of_workspace),
    (JOB, names.REVISION_LABEL, key_of_owned),
    (DEPLOYMENT, names.REVISION_LABEL, key_of_owned),
    (POD, names.REVISION_LABEL, key_of_owned),
)


class Watch:
    """An endless list-and-watch; `last_call` is when it last started a call (monotonic)."""

    def __init__(
        self,
        cluster: Cluster,
        kind: Kind,
        namespace: str | None,
        *,
        labels: str,
        key_of: Callable[[Object], Key | None],
        on_event: Callable[[Key, Object | None], None],
        resync: int = RESYNC,
    ) -> None:
        self._cluster, self._kind, self._namespace = cluster, kind, namespace
        self._labels, self._key_of, self._on_event, self._resync = labels, key_of, on_event, resync
        self.last_call: float | None = None
        self._known: dict[Key, Object] = {}  # annotations of Workspaces, from their last event

    def run(self, stop: threading.Event) -> None:
        """Until `stop`: list, report every key, watch, and start again."""
        pause = PAUSE
        while not stop.is_set():
            self.last_call = time.monotonic()
            try:
                self._once(stop)
                pause = PAUSE
            except ApiError as error:
                if error.status == 410:  # the version is too old: list again
                    continue
                log.warning("watch of %s ended: %s", self._kind.plural, error)
                stop.wait(pause * random.uniform(0.5, 1))  # noqa: S311 jitter, no secret
                pause = min(LONGEST_PAUSE, 2 * pause)
            except Exception:
                log.exception("watch of %s failed", self._kind.plural)
                stop.wait(LONGEST_PAUSE)

    def _once(self, stop: threading.Event) -> None:
        version = ""
        self._known.clear()
        metadata_only = self._kind != WORKSPACE  # the key is in the labels
        for items, version in self._cluster.pages(  # noqa: B007 the last one's
            self._kind, self._namespace, labels=self._labels, metadata_only=metadata_only
        ):
            for item in items:
                self._report(item, None)
        until = time.monotonic() + self._resync
        while not stop.is_set() and (remaining := until - time.monotonic()) > 0:
            self.last_call = time.monotonic()
            for item in self._cluster.watch(
                self._kind,
                self._namespace,
                labels=self._labels,
                version=version,
                seconds=max(1, min(WATCH, int(remaining))),
                metadata_only=metadata_only,
            ):
                version = item["metadata"]["resourceVersion"]
                key = key_of_workspace(item) if self._kind == WORKSPACE else None
                if not (key and is_echo(item, self._known.get(key))):
                    self._report(item, item)
                if stop.is_set():
                    return

    def _report(self, item: Object, event: Object | None) -> None:
        if key := self._key_of(item):
            if self._kind == WORKSPACE:
                self._known[key] = _annotations(item)
            self._on_event(key, event)
