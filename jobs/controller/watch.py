"""List and watch -> keys of Workspaces, for ever.

A key says only "look at this one": the reconciler reads everything anew, so that an event may come
twice, late or never. What an event shows is passed on beside the key; a list's items are not.
Whatever ends a watch, a new list follows, and every `RESYNC` seconds at most.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from jobs.api.client import DEPLOYMENT, JOB, POD, WORKSPACE, ApiError, Cluster, Kind, Object
from jobs.desired import names
from tuning.spec.workspace import ANNOTATION

log = logging.getLogger(__name__)

Key = tuple[str, str]  # namespace, name
RESYNC = 300  # seconds
WATCH = 50  # seconds of one connection: a silent one is found out before a minute is over
PAUSE, LONGEST_PAUSE = 1.0, 20.0  # seconds between lists that fail


def key_of_workspace(item: Object) -> Key | None:
    """The key of a Workspace."""
    return item["metadata"]["namespace"], item["metadata"]["name"]


def key_of_child(item: Object) -> Key | None:
    """The key of the Workspace that a Job or a pod belongs to."""
    labels: dict[str, str] = item["metadata"].get("labels") or {}
    name = labels.get(names.WORKSPACE_LABEL)
    return (item["metadata"]["namespace"], name) if name else None


def is_echo(item: Object, notes: Object | None) -> bool:
    """Whether an event of a Workspace most likely tells of our own status: nothing new in it.

    `notes` are the annotations that were there before, which no generation counts; None: unknown.
    """
    meta, status = item["metadata"], item.get("status") or {}
    seen = status.get("observedGeneration") == meta.get("generation")
    same = notes is None or notes == _notes(item)
    return seen and same and not meta.get("deletionTimestamp")


def _notes(item: Object) -> Object:
    """The annotations that change what becomes of a Workspace."""
    found: Object = item["metadata"].get("annotations") or {}
    return {k: v for k, v in found.items() if k.startswith((ANNOTATION, "kaito.sh/"))}


SOURCES: tuple[tuple[Kind, str, Callable[[Object], Key | None]], ...] = (
    (WORKSPACE, "", key_of_workspace),
    (JOB, names.REVISION_LABEL, key_of_child),
    (DEPLOYMENT, names.REVISION_LABEL, key_of_child),
    (POD, names.REVISION_LABEL, key_of_child),
)


class Watch:
    """One endless list-and-watch; `moved` is when it last began a call (monotonic)."""

    def __init__(
        self,
        cluster: Cluster,
        kind: Kind,
        namespace: str | None,
        *,
        labels: str,
        key_of: Callable[[Object], Key | None],
        tell: Callable[[Key, Object | None], None],
        resync: int = RESYNC,
    ) -> None:
        self._cluster, self._kind, self._namespace = cluster, kind, namespace
        self._labels, self._key_of, self._tell, self._resync = labels, key_of, tell, resync
        self.moved: float | None = None
        self._notes: dict[Key, Object] = {}  # of Workspaces, as they were seen last

    def run(self, stop: threading.Event) -> None:
        """Until `stop`: list, tell every key, watch, and from the start again."""
        pause = PAUSE
        while not stop.is_set():
            self.moved = time.monotonic()
            try:
                self._once(stop)
                pause = PAUSE
            except ApiError as error:
                if error.status == 410:  # our version is too old: that is what lists are for
                    continue
                log.warning("watch of %s ended: %s", self._kind.plural, error)
                stop.wait(pause * random.uniform(0.5, 1))  # noqa: S311 jitter, no secret
                pause = min(LONGEST_PAUSE, 2 * pause)
            except Exception:
                log.exception("watch of %s failed", self._kind.plural)
                stop.wait(LONGEST_PAUSE)

    def _once(self, stop: threading.Event) -> None:
        version = ""
        self._notes.clear()
        brief = self._kind != WORKSPACE  # a key is all that is wanted of the others
        for page in self._cluster.pages(
            self._kind, self._namespace, labels=self._labels, metadata_only=brief
        ):
            items, version = page
            for item in items:
                self._pass_on(item, None)
        until = time.monotonic() + self._resync
        while not stop.is_set() and (left := until - time.monotonic()) > 0:
            self.moved = time.monotonic()
            for item in self._cluster.watch(
                self._kind,
                self._namespace,
                labels=self._labels,
                version=version,
                seconds=max(1, min(WATCH, int(left))),
                metadata_only=brief,
            ):
                version = item["metadata"]["resourceVersion"]
                key = key_of_workspace(item) if self._kind == WORKSPACE else None
                if not (key and is_echo(item, self._notes.get(key))):
                    self._pass_on(item, item)
                if stop.is_set():
                    return

    def _pass_on(self, item: Object, news: Object | None) -> None:
        if key := self._key_of(item):
            if self._kind == WORKSPACE:
                self._notes[key] = _notes(item)
            self._tell(key, news)
