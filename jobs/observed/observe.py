"""Reads a Workspace's objects, its pods and their reports: the input of one reconcile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import (
    CLAIM,
    CONFIG_MAP,
    CORE_EVENT,
    DEPLOYMENT,
    JOB,
    NETWORK_POLICY,
    NODE_CLAIM,
    POD,
    REPLICA_SET,
    SERVICE,
    Object,
)
from jobs.api.options import Options
from jobs.desired import inference as desired_inference
from jobs.desired import names
from jobs.desired import tuning as desired_tuning
from jobs.desired.tuning import Server
from jobs.observed import group, objects
from jobs.observed.phases import Observed, Policy
from jobs.observed.site import Site
from tuning.plan.device import Device

_EVENT_PAGES = 5  # of the events about one object
_POD_EVENTS = (
    "FailedAttachVolume",
    "FailedCreatePodSandBox",
    "FailedMapVolume",
    "FailedMount",
    "FailedPrepareDynamicResources",
    "NetworkNotReady",
)
_YOUNG = timedelta(seconds=4)  # age at which a Job usually has its first pod


class RateLimit:
    """Allows each key once per `seconds`. Thread-safe."""

    def __init__(self, seconds: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._until: dict[Hashable, float] = {}
        self._lock = threading.Lock()

    def __call__(self, key: Hashable) -> bool:
        """Whether `key` is allowed now."""
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
    """What all reconciles share."""

    cluster: Cluster
    options: Options
    site: Site
    poll: Callable[[Object], dict[str, Any] | None]  # pod -> its progress
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    poll_server: Callable[[Object], dict[str, Any] | None] = lambda pod: None  # pod -> its report
    rate_limit: RateLimit = field(default_factory=RateLimit)  # of checks of network policies


def observe(context: Context, workspace: Object) -> Observed:
    """Everything about the Workspace, read now.

    No object is created before the status is stored: without a status, none exists.
    """
    if _is_serving(workspace):
        return _observe_server(context, workspace)
    cluster, options = context.cluster, context.options
    namespace, uid = workspace["metadata"]["namespace"], workspace["metadata"]["uid"]
    config_map = _config_map(cluster, workspace, "tuning")
    recorded, revision = workspace.get("status") or {}, desired_tuning.revision(workspace)
    nodes, name = desired_tuning.node_count(workspace), desired_tuning.job_name(workspace, revision)
    named = run_claim = service = None
    if recorded:
        named = cluster.get(JOB, namespace, name)
    job = named if named and names.is_owned_by(named, uid) else None
    same = recorded.get("revision") == revision
    has_ended = same and "completionTime" in recorded
    node_claims = _node_claims(context, workspace)
    is_short = len(node_claims) < nodes
    needs_node = options.nodes.provision and _instance_type(workspace) and is_short
    unshared: tuple[str, ...] = ()
    if has_ended or (same and job and "plan" in recorded and not needs_node):
        desired = desired_tuning.read_brief(workspace, config_map)
    else:
        device = _device(context, workspace)
        desired = desired_tuning.read(workspace, config_map, device)
        desired = desired_inference.check_inference(workspace, desired, device)
        unshared = _unshared_claims(cluster, workspace) if nodes > 1 and not job else ()
    pods = _job_pods(cluster, job) if job and not has_ended else ()
    last, now = group.decisive(pods, nodes), context.now()
    leader = objects.newest(group.first(pods))
    if recorded and not (last and objects.is_running(last)):
        run_claim = cluster.get(CLAIM, namespace, names.claim_name(workspace))
    if recorded and nodes > 1 and not has_ended:
        service = cluster.get(SERVICE, namespace, name)
    storage = context.site.storage(nodes)
    return Observed(
        workspace=workspace,
        desired=desired,
        config_map=config_map,
        now=now,
        job=job,
        previous_job=_previous_job(cluster, workspace, named),
        conflicting=_conflicting(uid, named, run_claim if storage else None, service),
        pods=pods,
        warning=_warning(cluster, job, last, now),
        node_claims=node_claims,
        node_claims_in_namespace=0
        if job or node_claims
        else _count_in_namespace(context, workspace),
        progress=context.poll(leader) if leader and objects.is_running(leader) else None,
        run_claim=run_claim,
        unshared=unshared,
        storage=storage,
        policy=_policy(context, workspace, job) if job and not has_ended else "unchecked",
        service=service,
        server=_own_server(cluster, workspace) if "inference" in workspace else None,
    )


def _is_serving(workspace: Object) -> bool:
    """Whether to serve now: there is nothing to tune, or this revision has been tuned."""
    if workspace.get("inference") is None:
        return False
    if workspace.get("tuning") is None:
        return True
    recorded = workspace.get("status") or {}
    same = recorded.get("revision") == desired_tuning.revision(workspace)
    has_succeeded = objects.is_true(workspace, "WorkspaceSucceeded")
    return same and "completionTime" in recorded and has_succeeded


def _observe_server(context: Context, workspace: Object) -> Observed:
    """The same for a Workspace that serves."""
    cluster, options = context.cluster, context.options
    meta, recorded = workspace["metadata"], workspace.get("status") or {}
    namespace, name, uid = meta["namespace"], meta["name"], meta["uid"]
    config_map = _config_map(cluster, workspace, "inference")
    desired = desired_inference.read(workspace, config_map, _device(context, workspace))
    server = service = policy = run_claim = job = None
    if recorded:
        server = cluster.get(DEPLOYMENT, namespace, name)
        service = cluster.get(SERVICE, namespace, name)
        run_claim = cluster.get(CLAIM, namespace, names.claim_name(workspace))
        if workspace.get("tuning") and recorded.get("job"):
            job = cluster.get(JOB, namespace, recorded["job"])
        if not server and options.network_policy:
            policy = cluster.get(NETWORK_POLICY, namespace, name)
    storage = context.site.storage() and not options.storage.cached
    conflicting = _conflicting(uid, server, service, run_claim if storage else None, policy)
    if conflicting:
        server = service = None
    pods: tuple[Object, ...] = ()
    if server and desired.server:
        pods = _server_pods(cluster, workspace, server, desired.server)
    last, now = objects.newest(pods), context.now()
    is_ours = desired.server is not None and desired.server.runtime == "transformers"
    reports = is_ours and last is not None and objects.is_true(last, "Ready")
    is_edited = bool(
        server and desired.server and names.revision_of(server) != desired.server.fingerprint
    )
    return Observed(
        workspace=workspace,
        desired=desired,
        now=now,
        job=job if job and names.is_owned_by(job, uid) else None,
        conflicting=conflicting,
        pods=pods,
        warning=_warning(cluster, None, last, now) if last else _replica_failure(server),
        node_claims=_node_claims(context, workspace),
        node_claims_in_namespace=0 if server else _count_in_namespace(context, workspace),
        run_claim=run_claim,
        storage=storage,
        policy=_policy(context, workspace, server, always=is_edited) if server else "unchecked",
        serving=True,
        server=server,
        service=service,
        server_report=context.poll_server(last) if reports and last else None,
    )


def _config_map(cluster: Cluster, workspace: Object, section: str) -> Object | None:
    """The ConfigMap that `tuning` or `inference` names."""
    name = (workspace.get(section) or {}).get("config")
    if not name or not names.is_object_name(name):
        return None
    return cluster.get(CONFIG_MAP, workspace["metadata"]["namespace"], name)


def _instance_type(workspace: Object) -> str | None:
    found: str | None = (workspace.get("resource") or {}).get("instanceType")
    return found


def _device(context: Context, workspace: Object) -> Device | None:
    """The GPU of the nodes that the Workspace selects, unless it names an instance type."""
    if _instance_type(workspace):
        return None
    return context.site.device(names.node_selector(workspace))


def _own_server(cluster: Cluster, workspace: Object) -> Object | None:
    """The Workspace's Deployment, if there may be one."""
    meta = workspace["metadata"]
    if not workspace.get("status"):
        return None
    server = cluster.get(DEPLOYMENT, meta["namespace"], meta["name"])
    return server if server and names.is_owned_by(server, meta["uid"]) else None


def _unshared_claims(cluster: Cluster, workspace: Object) -> tuple[str, ...]:
    """Claims with data, or for the adapter, that can be mounted on one node only."""
    namespace, unshared = workspace["metadata"]["namespace"], []
    shared = {"input": {"ReadWriteMany", "ReadOnlyMany"}, "output": {"ReadWriteMany"}}
    for part, modes in shared.items():
        volume = (workspace["tuning"].get(part) or {}).get("volumeSource") or {}
        name = str((volume.get("persistentVolumeClaim") or {}).get("claimName", ""))
        claim = cluster.get(CLAIM, namespace, name) if names.is_object_name(name) else None
        if claim and modes.isdisjoint(claim["spec"]["accessModes"]):
            unshared.append(name)
    return tuple(unshared)


def _conflicting(uid: str, *named: Object | None) -> Object | None:
    """The first object with one of our names that is not ours."""
    return next((each for each in named if each and not names.is_owned_by(each, uid)), None)


def _previous_job(cluster: Cluster, workspace: Object, named: Object | None) -> Object | None:
    """The Job of an earlier spec, if it still exists. Its name was recorded before it was created,
    so that it is found without listing all Jobs."""
    meta, recorded = workspace["metadata"], workspace.get("status") or {}
    name = recorded.get("job")
    if recorded and "revision" not in recorded:
        name = meta["name"]  # KAITO's
    if not name or (named and named["metadata"]["name"] == name):
        return None
    job = cluster.get(JOB, meta["namespace"], name)
    return job if job and names.is_owned_by(job, meta["uid"]) else None


def _job_pods(cluster: Cluster, job: Object) -> tuple[Object, ...]:
    """The pods of exactly this Job, oldest first; uncached only once it has ended."""
    meta, has_ended = job["metadata"], objects.job_state(job) in ("complete", "failed")
    label = f"job-name={meta['name']}"
    pods = cluster.find(POD, meta["namespace"], labels=label, cached=not has_ended)
    return _by_age(pod for pod in pods if names.is_controlled_by(pod, meta["uid"]))


def _server_pods(
    cluster: Cluster, workspace: Object, deployment: Object, server: Server
) -> tuple[Object, ...]:
    """The pods of the desired server that belong to its Deployment, oldest first."""
    labels = names.server_labels(workspace) | {names.REVISION_LABEL: server.fingerprint}
    selector = ",".join(f"{key}={value}" for key, value in labels.items())
    namespace = workspace["metadata"]["namespace"]
    pods = cluster.find(POD, namespace, labels=selector, cached=True)
    ours = _replica_sets(cluster, namespace, deployment["metadata"]["uid"], pods)
    return _by_age(pod for pod in pods if any(names.is_controlled_by(pod, uid) for uid in ours))


def _replica_sets(cluster: Cluster, namespace: str, uid: str, pods: list[Object]) -> set[str]:
    """UIDs of those controllers of `pods` that are ReplicaSets of the Deployment with this UID."""
    controllers = {
        each["name"]: each["uid"]
        for pod in pods
        for each in pod["metadata"].get("ownerReferences") or []
        if each.get("controller") and each["kind"] == REPLICA_SET.name
    }
    try:
        found = [cluster.get(REPLICA_SET, namespace, name) for name in sorted(controllers)[:10]]
    except ApiError as error:
        if error.status != 403:
            raise
        return set(controllers.values())  # the rights of an earlier version
    return {each["metadata"]["uid"] for each in found if each and names.is_controlled_by(each, uid)}


def _by_age(pods: Iterable[Object]) -> tuple[Object, ...]:
    return tuple(sorted(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"])))


def _warning(
    cluster: Cluster, job: Object | None, last: Object | None, now: datetime
) -> str | None:
    """What only an event reports: why a Job has no pod, or no further one (a quota), or why a
    scheduled pod has no container (a missing Secret or volume, no network)."""
    if last is not None and not objects.has_ended(last):
        if objects.is_running(last) or not objects.is_scheduled(last):
            return None
        return _event(cluster, last, *_POD_EVENTS)
    if job is None or objects.job_state(job) != "active":
        return None
    is_young = now - objects.parse_time(job["metadata"]["creationTimestamp"]) < _YOUNG
    return None if is_young else _event(cluster, job, "FailedCreate")


def _replica_failure(server: Object | None) -> str | None:
    """Why a Deployment has no pod: a quota, or an admission rule."""
    failure = objects.condition(server, "ReplicaFailure") if server else None
    return str(failure.get("message")) if failure and failure.get("status") == "True" else None


def _event(cluster: Cluster, about: Object, *reasons: str) -> str | None:
    """The message of the last event if it has one of these reasons; a later event of another
    reason means that the problem was overcome."""
    meta = about["metadata"]
    pages = cluster.pages(
        CORE_EVENT, meta["namespace"], fields=f"involvedObject.uid={meta['uid']}"
    )  # a tenant may write thousands
    events = [event for items, _ in islice(pages, _EVENT_PAGES) for event in items]

    def order(event: Object) -> tuple[str, bool]:  # by time, to the second
        last_seen = str(event.get("lastTimestamp") or event.get("eventTime") or "")
        return last_seen[:19], event.get("reason") in reasons

    last = max(events, key=order, default=None)
    return last.get("message") if last and last.get("reason") in reasons else None


def _node_claims(context: Context, workspace: Object) -> tuple[Object, ...]:
    """NodeClaims of this Workspace, also those left from when nodes were still provisioned.

    KAITO's, which carry no UID, are included: no other controller would delete them.
    """
    meta = workspace["metadata"]
    may_have = names.FINALIZER in (meta.get("finalizers") or [])
    if not may_have and not (context.options.nodes.provision and workspace.get("status")):
        return ()
    labels = f"{names.WORKSPACE_LABEL}={meta['name']},{names.NAMESPACE_LABEL}={meta['namespace']}"
    return tuple(
        each
        for each in _find_node_claims(context.cluster, labels)
        if each["metadata"]["labels"].get(names.UID_LABEL, meta["uid"]) == meta["uid"]
    )


def _count_in_namespace(context: Context, workspace: Object) -> int:
    """Number of NodeClaims of all Workspaces in the namespace; 0 if there is no limit."""
    nodes, namespace = context.options.nodes, workspace["metadata"]["namespace"]
    if not nodes.provision or nodes.per_namespace is None:
        return 0
    ours = f"{names.NAMESPACE_LABEL}={namespace},app.kubernetes.io/managed-by=tuning-operator"
    return len(_find_node_claims(context.cluster, ours))


def _find_node_claims(cluster: Cluster, labels: str) -> list[Object]:
    try:
        return cluster.find(NODE_CLAIM, labels=labels)
    except ApiError as error:
        if error.status not in (403, 404):
            raise
        return []  # no rights, or Karpenter was removed and its nodes with it


def _policy(context: Context, workspace: Object, owner: Object, *, always: bool = False) -> Policy:
    """The network policy of a Job or Deployment; checked once a minute, or `always`."""
    meta = owner["metadata"]
    if not context.options.network_policy or not (always or context.rate_limit(meta["uid"])):
        return "unchecked"
    policy = context.cluster.get(NETWORK_POLICY, meta["namespace"], meta["name"])
    is_ours = policy and names.is_owned_by(policy, workspace["metadata"]["uid"])
    return policy if policy and is_ours else "missing"
