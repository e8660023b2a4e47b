"""One Workspace and all that belongs to it, read from the API server now."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from jobs.api.client import (
    CLAIM,
    CONFIG_MAP,
    CORE_EVENT,
    DEPLOYMENT,
    JOB,
    NETWORK_POLICY,
    NODE_CLAIM,
    POD,
    SERVICE,
    ApiError,
    Cluster,
    Kind,
    Object,
)
from jobs.api.options import Options
from jobs.desired import inference, names
from jobs.desired import tuning as desired
from jobs.manifests import server as serving
from jobs.observed import objects
from jobs.observed.phase import Policy, Seen
from jobs.observed.site import Site

_YOUNG = timedelta(seconds=4)  # of a Job: the time in which its first pod is usually made


class Rarely:
    """Says yes at most once in `seconds` for each key."""

    def __init__(self, seconds: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._until: dict[Hashable, float] = {}
        self._lock = threading.Lock()

    def __call__(self, key: Hashable) -> bool:
        """Whether `key` has its turn now."""
        now = self._clock()
        with self._lock:
            if now < self._until.get(key, 0.0):
                return False
            if len(self._until) > 1000:
                self._until = {k: v for k, v in self._until.items() if v > now}
            self._until[key] = now + self._seconds
            return True


@dataclass(frozen=True)
class Context:
    """What every reconcile shares."""

    cluster: Cluster
    options: Options
    site: Site
    poll: Callable[[Object], dict[str, Any] | None]  # pod -> its progress
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ask: Callable[[Object], dict[str, Any] | None] = lambda pod: None  # what a server says
    rarely: Rarely = field(default_factory=Rarely)


def observe(context: Context, workspace: Object) -> Seen:
    """Everything about the Workspace, read now.

    Nothing is made before the status tells of it: without a status there is nothing to look for.
    """
    if _serving(workspace):
        return _observe_server(context, workspace)
    cluster, options = context.cluster, context.options
    namespace, uid = workspace["metadata"]["namespace"], workspace["metadata"]["uid"]
    config = (workspace.get("tuning") or {}).get("config")
    config_map = None
    if config and names.possible(config):
        config_map = cluster.get(CONFIG_MAP, namespace, config)
    recorded, revision = workspace.get("status") or {}, desired.revision(workspace)
    named = run_claim = None
    if recorded:
        named = cluster.get(JOB, namespace, desired.short_name(workspace, revision))
    job = named if named and names.owned(named, uid) else None
    same = recorded.get("revision") == revision
    ended = same and "completionTime" in recorded
    machines = _machines(cluster, options, workspace)
    buying = options.nodes.provision and not _own_nodes(workspace) and not machines
    if ended or (same and job and "plan" in recorded and not buying):
        wish = desired.glance(workspace, config_map)
    else:
        known = not _own_nodes(workspace)
        device = None if known else context.site.device(names.selected(workspace))
        wish = inference.ahead(workspace, desired.read(workspace, config_map, device), device)
    pods = _pods(cluster, namespace, job) if job and not ended else ()
    last, now = objects.newest(pods), context.now()
    running = last is not None and objects.running(last)
    if recorded and not running:
        run_claim = cluster.get(CLAIM, namespace, names.claim_name(workspace))
    storage = context.site.storage()
    return Seen(
        workspace=workspace,
        wanted=wish,
        config_map=config_map,
        now=now,
        job=job,
        old=_earlier_job(cluster, workspace, named),
        foreign=_foreign(named, job, run_claim if storage else None, uid),
        pods=pods,
        warning=_warning(cluster, job, last, now),
        machines=machines,
        machines_nearby=0 if job or machines else _machines_nearby(cluster, options, namespace),
        progress=context.poll(last) if last and running else None,
        run_claim=run_claim,
        storage=storage,
        policy=_policy(context, workspace, job) if job and not ended else "unasked",
        server=_own(cluster, DEPLOYMENT, workspace) if "inference" in workspace else None,
    )


def _serving(workspace: Object) -> bool:
    """Whether it is time to serve: nothing is to be tuned, or this very spec was tuned."""
    if workspace.get("inference") is None:
        return False
    recorded = workspace.get("status") or {}
    if workspace.get("tuning") is None:
        return True
    same = recorded.get("revision") == desired.revision(workspace)
    return same and "completionTime" in recorded and objects.holds(workspace, "WorkspaceSucceeded")


def _observe_server(context: Context, workspace: Object) -> Seen:
    """The same for a Workspace that serves."""
    cluster, options = context.cluster, context.options
    namespace, uid = workspace["metadata"]["namespace"], workspace["metadata"]["uid"]
    recorded = workspace.get("status") or {}
    config, config_map = workspace["inference"].get("config"), None
    if config and names.possible(config):
        config_map = cluster.get(CONFIG_MAP, namespace, config)
    device = context.site.device(names.selected(workspace)) if _own_nodes(workspace) else None
    wish = inference.read(workspace, config_map, device)
    found: dict[str, Object | None] = {"server": None, "service": None}
    run_claim = job = None
    if recorded:
        name = serving.name(workspace)
        found["server"] = cluster.get(DEPLOYMENT, namespace, name)
        found["service"] = cluster.get(SERVICE, namespace, name)
        run_claim = cluster.get(CLAIM, namespace, names.claim_name(workspace))
        if workspace.get("tuning") and recorded.get("job"):
            job = cluster.get(JOB, namespace, recorded["job"])
    storage = context.site.storage() and not options.storage.cached
    others = [found["server"], found["service"], run_claim if storage else None]
    if recorded and not found["server"] and options.network_policy:
        others.append(cluster.get(NETWORK_POLICY, namespace, serving.name(workspace)))
    foreign = next((each for each in others if each and not names.owned(each, uid)), None)
    pods: tuple[Object, ...] = ()
    server = found["server"] if not foreign else None
    if server and wish.server:
        labels = names.server_labels(workspace) | {names.REVISION_LABEL: wish.server.fingerprint}
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        listed = cluster.find(POD, namespace, labels=selector, cached=True)
        pods = tuple(sorted(listed, key=lambda pod: str(pod["metadata"]["creationTimestamp"])))
    last = objects.newest(pods)
    asked = last is not None and objects.holds(last, "Ready")
    asked = asked and wish.server is not None and wish.server.runtime == "transformers"
    return Seen(
        workspace=workspace,
        wanted=wish,
        now=context.now(),
        job=job if job and names.owned(job, uid) else None,
        foreign=foreign,
        pods=pods,
        warning=_warning(cluster, None, last, context.now()) if last else _refused(server),
        machines=_machines(cluster, options, workspace),
        machines_nearby=_machines_nearby(cluster, options, namespace) if not server else 0,
        run_claim=run_claim,
        storage=storage,
        policy=_policy_of_server(context, workspace, wish, server) if server else "unasked",
        serving=True,
        server=server,
        service=found["service"] if not foreign else None,
        told=context.ask(last) if asked and last else None,
    )


def _own(cluster: Cluster, kind: Kind, workspace: Object) -> Object | None:
    """The child of this kind that is called as the Workspace, once there may be one."""
    meta = workspace["metadata"]
    found = cluster.get(kind, meta["namespace"], meta["name"]) if workspace.get("status") else None
    return found if found and names.owned(found, meta["uid"]) else None


def _foreign(
    named: Object | None, job: Object | None, run_claim: Object | None, uid: str
) -> Object | None:
    """What has one of our names without being ours."""
    if named and not job:
        return named
    return run_claim if run_claim and not names.owned(run_claim, uid) else None


def _earlier_job(cluster: Cluster, workspace: Object, named: Object | None) -> Object | None:
    """The Job of an earlier spec, if it is still there. Its name was recorded before it was made,
    so that none is ever forgotten, and no list of all Jobs is needed to find it."""
    meta, recorded = workspace["metadata"], workspace.get("status") or {}
    name = recorded.get("job")
    if recorded and "revision" not in recorded:
        name = meta["name"]  # KAITO's
    if not name or (named and named["metadata"]["name"] == name):
        return None
    found = cluster.get(JOB, meta["namespace"], name)
    return found if found and names.owned(found, meta["uid"]) else None


def _own_nodes(workspace: Object) -> bool:
    return not (workspace.get("resource") or {}).get("instanceType")


def _pods(cluster: Cluster, namespace: str, job: Object) -> tuple[Object, ...]:
    """The pods of this very Job, oldest first; the newest truth only where it is the last word."""
    over = objects.job_state(job) in ("complete", "failed")
    label = f"job-name={job['metadata']['name']}"
    found = cluster.find(POD, namespace, labels=label, cached=not over)
    own = [pod for pod in found if names.owned(pod, job["metadata"]["uid"])]
    return tuple(sorted(own, key=lambda pod: str(pod["metadata"]["creationTimestamp"])))


def _warning(
    cluster: Cluster, job: Object | None, last: Object | None, now: datetime
) -> str | None:
    """What only an event tells: why a Job has no pod (a quota), or why a pod with a node has no
    container (a missing Secret or volume)."""
    if last is not None:
        waits = objects.scheduled(last) and not objects.started(last)
        return _event(cluster, last, "FailedMount", "FailedAttachVolume") if waits else None
    if job is None or objects.job_state(job) != "active":
        return None
    young = now - objects.time(job["metadata"]["creationTimestamp"]) < _YOUNG
    return None if young else _event(cluster, job, "FailedCreate")


def _refused(server: Object | None) -> str | None:
    """Why a Deployment has no pod: a quota, or an admission rule."""
    found = objects.condition(server, "ReplicaFailure") if server else None
    return str(found.get("message")) if found and found.get("status") == "True" else None


def _event(cluster: Cluster, about: Object, *reasons: str) -> str | None:
    """The message of the last event, if it has one of these reasons: what came after a failure has
    overcome it."""
    meta = about["metadata"]
    found = cluster.find(CORE_EVENT, meta["namespace"], fields=f"involvedObject.uid={meta['uid']}")
    last = max(found, key=lambda e: (_moment(e), e.get("reason") in reasons), default=None)
    return last.get("message") if last and last.get("reason") in reasons else None


def _moment(event: Object) -> str:
    """When it happened last, to the second."""
    return str(event.get("lastTimestamp") or event.get("eventTime") or "")[:19]


def _machines(cluster: Cluster, options: Options, workspace: Object) -> tuple[Object, ...]:
    """Those of this Workspace; also where machines are bought no more, as long as it holds one.

    Those that KAITO bought for it are among them: they carry no UID, and nobody else would give
    them back.
    """
    meta = workspace["metadata"]
    holds = names.FINALIZER in (meta.get("finalizers") or [])
    if not holds and not (options.nodes.provision and workspace.get("status")):
        return ()
    whose = (names.WORKSPACE_LABEL, meta["name"]), (names.NAMESPACE_LABEL, meta["namespace"])
    found = _node_claims(cluster, ",".join(f"{key}={value}" for key, value in whose))
    uid = names.UID_LABEL
    return tuple(m for m in found if m["metadata"]["labels"].get(uid, meta["uid"]) == meta["uid"])


def _machines_nearby(cluster: Cluster, options: Options, namespace: str) -> int:
    """Machines of all Workspaces in the namespace, if there is a limit to them."""
    if not options.nodes.provision or options.nodes.per_namespace is None:
        return 0
    ours = f"{names.NAMESPACE_LABEL}={namespace},app.kubernetes.io/managed-by=tuning-operator"
    return len(_node_claims(cluster, ours))


def _node_claims(cluster: Cluster, labels: str) -> list[Object]:
    try:
        return cluster.find(NODE_CLAIM, labels=labels)
    except ApiError as error:
        if error.status not in (403, 404):
            raise
        return []  # Karpenter was removed, and its machines with it; or they are not ours to see


def _policy_of_server(
    context: Context, workspace: Object, wish: desired.Wanted, server: Object
) -> Policy:
    """The network policy of a server as it is; asked once a minute, and before it is changed."""
    meta = server["metadata"]
    edited = wish.server is not None and names.revision_of(server) != wish.server.fingerprint
    if not context.options.network_policy or not (edited or context.rarely(meta["uid"])):
        return "unasked"
    found = context.cluster.get(NETWORK_POLICY, meta["namespace"], meta["name"])
    owned = found is not None and names.owned(found, workspace["metadata"]["uid"])
    return found if found is not None and owned else "gone"


def _policy(context: Context, workspace: Object, child: Object) -> Policy:
    """What became of the network policy of a Job; asked once a minute."""
    meta = child["metadata"]
    if not context.options.network_policy or not context.rarely(meta["uid"]):
        return "unasked"
    found = context.cluster.get(NETWORK_POLICY, meta["namespace"], meta["name"])
    if found is None or not names.owned(found, workspace["metadata"]["uid"]):
        return "gone"
    return "whole" if found["metadata"].get("generation") == 1 else found
