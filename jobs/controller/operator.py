"""The operator's life: watches fill a queue, workers empty it, a lease says who writes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs.api.client import WORKSPACE, ApiError, Cluster, Kind, NotLeader, Object
from jobs.api.options import Options
from jobs.controller.lease import Lease
from jobs.controller.probes import Metrics
from jobs.controller.queue import Queue
from jobs.controller.reconcile import reconcile
from jobs.controller.watch import RESYNC, SOURCES, Key, Watch
from jobs.observed.observe import Context
from jobs.observed.poll import Ask, Poll
from jobs.observed.site import Site

log = logging.getLogger(__name__)

_TURN = 0.02  # seconds between looks that no event asked for, all Workspaces together
_SHARE = 4  # of the workers' time such looks take a fourth: events and retries find them free
_SETTLE = 0.1  # seconds in which events of one Job and its pods are gathered
_STALE = 300  # seconds in which a watch begins some call, be it in vain; else its thread hangs


@dataclass(frozen=True)
class Setup:
    """How this process takes part."""

    identity: str
    namespace: str = "tuning-system"  # of the lease
    elect: bool = True
    workers: int = 4
    resync: int = RESYNC
    lease_seconds: float = 15.0


class Operator:
    """One replica. `run` returns when `stop` is set or the lease is lost."""

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
        asks = Ask(self._cluster)
        self._context = Context(self._cluster, options, site, poll or Poll(), ask=asks)
        self._watches: list[Watch] = []
        self._pace = 0.0  # seconds of a look, the last fifty counting most
        self._arrived: dict[Key, Object] = {}  # new Workspaces as an event showed them
        self.metrics = Metrics()
        self.queue: Queue[Key] = Queue(group_of=lambda key: key[0])

    @property
    def ready(self) -> bool:
        """Whether it could take over: the API server answers and knows Workspaces."""
        try:
            namespace = self._options.namespaces[0] if self._options.namespaces else None
            self._cluster.find(WORKSPACE, namespace, fields="metadata.name=none")
        except ApiError:
            return False
        return True

    @property
    def healthy(self) -> bool:
        """False when a watch hangs, so that a restart is the better try. An API server that is down
        is no reason: a restart would not bring it back."""
        now = time.monotonic()
        return all(w.moved is None or now - w.moved < _STALE for w in self._watches)

    def run(self, stop: threading.Event) -> bool:
        """Work until `stop`; False if another has the lease now, so that the process should end.

        A lease that ran out because the API server was away is asked for again.
        """
        if not self._setup.elect:
            self._lead(stop)
            return True
        while self._lease.acquire(stop):
            log.info("leading as %s", self._setup.identity)
            self._term(stop)
            if stop.is_set():
                self._lease.give_back()
                return True
            if self._lease.taken:
                return False
        return True

    def _term(self, stop: threading.Event) -> None:
        """Lead until `stop`, or until the lease is lost."""
        over = threading.Event()

        def keep() -> None:
            self._lease.keep(stop)
            over.set()

        keeper = threading.Thread(target=keep, name="lease", daemon=True)
        keeper.start()
        self._lead(over)
        keeper.join()

    def _lead(self, stop: threading.Event) -> None:
        self.metrics.leading.set(1)
        self.queue = Queue(group_of=lambda key: key[0])
        spaces: tuple[str | None, ...] = self._options.namespaces or (None,)
        self._watches = [
            Watch(
                self._cluster,
                kind,
                space,
                labels=labels,
                key_of=key_of,
                tell=partial(self._told, kind),
                resync=self._setup.resync,
            )
            for space in spaces
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
            worker.join()  # what was begun is ended; watches are left to their time limit
        self.metrics.leading.set(0)
        self.metrics.forget()

    def _told(self, kind: Kind, key: Key, news: Object | None) -> None:
        """A new or edited Workspace is looked at before all others, for somebody waits for it.
        Jobs and pods change several times in a moment, which is worth one look."""
        if kind != WORKSPACE:
            self.queue.add(key, after=_SETTLE)
            return
        if news and not news.get("status"):
            self._arrived[key] = news
        self.queue.add(key, first=news is not None)

    def _work(self) -> None:
        while (key := self.queue.take()) is not None:
            self.metrics.queued.set(len(self.queue))
            place = {"namespace": key[0], "workspace": key[1]}
            start = time.monotonic()
            result = self._look(key, place)
            took = time.monotonic() - start
            self._pace += (took - self._pace) / 50
            self.metrics.seconds.observe(took)
            self.metrics.reconciles.labels(result).inc()

    def _look(self, key: Key, place: dict[str, str]) -> str:
        try:
            look = reconcile(self._context, *key, arrived=self._arrived.pop(key, None))
        except NotLeader:
            self.queue.done(key)
            return "not leading"
        except ApiError as error:
            delay = self.queue.failed(key)
            usual = error.status == 409
            log.log(
                logging.DEBUG if usual else logging.WARNING,
                "again in %.1f s: %s",
                delay,
                error,
                extra=place,
            )
            return "conflict" if usual else "api error"
        except Exception:
            log.exception("reconcile failed", extra=place)
            self.queue.failed(key)
            return "error"
        again = look.again
        if again is not None and not look.promptly:  # many that wait are asked in turn
            turn = max(_TURN, _SHARE * self._pace / self._setup.workers)
            again = max(again, turn * len(self.queue))
        self.queue.done(key, again=again)
        self.metrics.stands(key, look.state)
        return "done"
