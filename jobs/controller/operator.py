"""The running operator: watches fill a workqueue, workers empty it, a lease elects the leader."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs.api.client import ApiError, Cluster, NotLeader
from jobs.api.kinds import WORKSPACE, Kind, Object
from jobs.api.options import Options
from jobs.controller.lease import Lease
from jobs.controller.probes import Metrics
from jobs.controller.queue import Queue
from jobs.controller.reconcile import reconcile
from jobs.controller.watch import RESYNC, SOURCES, Key, Watch
from jobs.observed.observe import Context
from jobs.observed.poll import Poll, PollServer
from jobs.observed.site import Site

log = logging.getLogger(__name__)

_RECHECK_SECONDS = 0.02  # between periodic reconciles of any Workspaces
_RECHECK_SHARE = 4  # periodic reconciles take a quarter of the workers' time: events find them free
_BATCH_SECONDS = 0.1  # in which events of one Job and its pods are gathered
_WATCH_TIMEOUT = 300  # seconds in which a working watch starts a call, even one that fails


@dataclass(frozen=True)
class Setup:
    """Settings of this process."""

    identity: str
    namespace: str = "tuning-system"  # of the lease
    elect: bool = True
    workers: int = 4
    resync: int = RESYNC
    lease_seconds: float = 15.0


class Operator:
    """One replica."""

    def __init__(
        self,
        cluster: Cluster,
        options: Options,
        setup: Setup,
        *,
        poll: Callable[[Object], dict[str, Any] | None] | None = None,
    ) -> None:
        self._setup, self._options = setup, options
        self._lease = Lease(
            cluster,
            namespace=setup.namespace,
            name="tuning-operator",
            identity=setup.identity,
            duration=setup.lease_seconds,
        )
        self._cluster = cluster.guarded(lambda: self._lease.held) if setup.elect else cluster
        site = Site(self._cluster, options)
        poll_server = PollServer(self._cluster)
        self._context = Context(
            self._cluster, options, site, poll or Poll(), poll_server=poll_server
        )
        self._watches: list[Watch] = []
        self._mean_seconds = 0.0  # of a reconcile, an exponential average over about fifty
        self._new: dict[Key, Object] = {}  # Workspaces without a status, from events
        self.metrics = Metrics()
        self.queue: Queue[Key] = Queue(group_of=lambda key: key[0])

    @property
    def ready(self) -> bool:
        """Whether it could lead: the API server answers and serves Workspaces."""
        try:
            namespace = self._options.namespaces[0] if self._options.namespaces else None
            self._cluster.find(WORKSPACE, namespace, fields="metadata.name=none")
        except ApiError:
            return False
        return True

    @property
    def healthy(self) -> bool:
        """False if a watch hangs, which a restart repairs. True while the API server is down."""
        now = time.monotonic()
        return all(w.last_call is None or now - w.last_call < _WATCH_TIMEOUT for w in self._watches)

    def run(self, stop: threading.Event) -> bool:
        """Work until `stop`; False if another replica leads now, so that the process should exit.

        A lease that expired because the API server was unreachable is acquired again.
        """
        if not self._setup.elect:
            self._lead(stop)
            return True
        while self._lease.acquire(stop):
            log.info("leading as %s", self._setup.identity)
            self._term(stop)
            if stop.is_set():
                self._lease.release()
                return True
            if self._lease.held_by_other:
                return False
        return True

    def _term(self, stop: threading.Event) -> None:
        """Lead until `stop`, or until the lease is lost."""
        over = threading.Event()

        def renew() -> None:
            self._lease.keep(stop)
            over.set()

        renewal = threading.Thread(target=renew, name="lease", daemon=True)
        renewal.start()
        self._lead(over)
        renewal.join()

    def _lead(self, stop: threading.Event) -> None:
        self.metrics.leading.set(1)
        self.queue = Queue(group_of=lambda key: key[0], on_wait=self.metrics.waited.observe)
        namespaces: tuple[str | None, ...] = self._options.namespaces or (None,)
        self._watches = [
            Watch(
                self._cluster,
                kind,
                namespace,
                labels=labels,
                key_of=key_of,
                on_event=partial(self._enqueue, kind),
                resync=self._setup.resync,
            )
            for namespace in namespaces
            for kind, labels, key_of in SOURCES
        ]
        threads = [
            threading.Thread(target=each.run, args=(stop,), daemon=True) for each in self._watches
        ]
        workers = [
            threading.Thread(target=self._work, daemon=True) for _ in range(self._setup.workers)
        ]
        for thread in (*threads, *workers):
            thread.start()
        stop.wait()
        self.queue.close()
        for worker in workers:
            worker.join()  # finishes its reconcile; watches end with their own timeouts
        self.metrics.leading.set(0)
        self.metrics.reset()

    def _enqueue(self, kind: Kind, key: Key, item: Object | None) -> None:
        """A new or edited Workspace comes before all others, as its user waits for it. Jobs and
        pods change several times in a moment: one reconcile handles all of that."""
        if kind != WORKSPACE:
            self.queue.add(key, after=_BATCH_SECONDS)
            return
        if item and not item.get("status"):
            self._new[key] = item
        self.queue.add(key, first=item is not None)

    def _work(self) -> None:
        while (key := self.queue.take()) is not None:
            self.metrics.queued.set(len(self.queue))
            start = time.monotonic()
            result = self._reconcile(key)
            seconds = time.monotonic() - start
            self._mean_seconds += (seconds - self._mean_seconds) / 50
            self.metrics.seconds.observe(seconds)
            self.metrics.reconciles.labels(result).inc()

    def _reconcile(self, key: Key) -> str:
        """Reconcile one Workspace and give its key back to the queue; returns a metric's label."""
        extra = {"namespace": key[0], "workspace": key[1]}
        try:
            result = reconcile(self._context, *key, from_event=self._new.pop(key, None))
        except NotLeader:
            self.queue.done(key)
            return "not leading"
        except ApiError as error:
            delay = self.queue.failed(key)
            is_conflict = error.status == 409
            level = logging.DEBUG if is_conflict else logging.WARNING
            log.log(level, "retry in %.1f s: %s", delay, error, extra=extra)
            return "conflict" if is_conflict else "api error"
        except Exception:
            log.exception("reconcile failed", extra=extra)
            self.queue.failed(key)
            return "error"
        seconds = result.requeue_after
        if seconds is not None and not result.has_work:  # spread periodic reconciles
            interval = _RECHECK_SHARE * self._mean_seconds / self._setup.workers
            seconds = max(seconds, max(_RECHECK_SECONDS, interval) * len(self.queue))
        self.queue.done(key, requeue_after=seconds)
        self.metrics.count(key, result)
        return "done"
