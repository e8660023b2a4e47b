"""What to do about the observed state of a Workspace. Pure.

The phase decides: each one has its status and its objects to delete, create or update.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from jobs.api.kinds import (
    CLAIM,
    DEPLOYMENT,
    JOB,
    NETWORK_POLICY,
    NODE_CLAIM,
    SERVICE,
    Kind,
    Object,
)
from jobs.api.options import Options
from jobs.desired import names
from jobs.desired import tuning as desired_tuning
from jobs.manifests import group
from jobs.manifests import job as job_manifests
from jobs.manifests import server as server_manifests
from jobs.observed import group as group_pods
from jobs.observed import objects
from jobs.observed.phase import last_number, missing_nodes, node_attempts, phase_of, zone
from jobs.observed.phases import PHASES, Observed, Phase, PhaseName
from jobs.observed.status import deleting_status, status

REQUEUE_SECONDS = {name: row.requeue for name, row in PHASES.items()}
_MIN_PENDING = 5.0  # seconds between reconciles of a young pod whose volumes are missing

Item = tuple[Kind, Object]
Items = tuple[Item, ...]


@dataclass(frozen=True)
class Decision:
    """What to write, in this order."""

    rehearse: Items = ()  # created only in a dry run, before a node is paid for
    finalizers: list[str] | None = None
    status: Object | None = None
    delete: Items = ()
    create: Items = ()
    update: Items = ()  # stored objects with the desired content
    requeue_after: float | None = None  # seconds
    phase: Phase = field(default_factory=lambda: Phase("finished"))


def decide(observed: Observed, options: Options) -> Decision:
    """What to do now."""
    if observed.workspace["metadata"].get("deletionTimestamp"):
        return _finalize(observed)
    phase = phase_of(observed, options)
    seconds = _requeue_after(observed, phase.name)
    decision = Decision(status=status(observed, phase, options), requeue_after=seconds, phase=phase)
    released = _released_nodes(observed) if phase.is_overdue or not observed.server else ()
    match phase.name:
        case "finished":
            return replace(decision, **_clean_up(observed, options))
        case "replacing":
            stopped = _stored((JOB, observed.previous_job), (DEPLOYMENT, observed.server))
            return replace(decision, delete=(*stopped, *(released if phase.is_overdue else ())))
        case "provisioning":
            return replace(decision, **_provision(observed, options))
        case "creating":
            return replace(decision, create=_run_objects(observed, options))
        case "deploying":
            return replace(decision, **_deploy(observed, options))
        case "running" | "unready" if phase.is_overdue:  # the node is lost: the next replaces it
            return replace(decision, delete=_lost_nodes(observed) or released)
        case "starting" | "unready" | "ready":
            return replace(decision, **_keep_serving(observed, options))
        case "stuck" if observed.serving:
            server = _stored((DEPLOYMENT, observed.server))
            return replace(decision, delete=(*server, *_released_nodes(observed)))
        case "unprovisioned" if observed.serving:
            return replace(decision, delete=_released_nodes(observed))
        case "invalid" | "unfit" | "conflict" | "queued":
            server = _stored((DEPLOYMENT, observed.server)) if phase.is_overdue else ()
            return replace(decision, delete=(*server, *released))
        case "pending" | "running" if not observed.storage and group_pods.is_left_alone(
            observed.pods
        ):  # it is created again, with all of its pods
            return replace(decision, delete=_stored((JOB, observed.job)))
        case "pending" | "running":
            return replace(decision, **_restore(observed, options))
    return decision


def _requeue_after(observed: Observed, name: PhaseName) -> float | None:
    """Seconds until the next reconcile. No event of a Job or pod reports that a missing Secret,
    volume or quota was added: such pods are checked with growing intervals."""
    if name in ("stuck", "unprovisioned") and observed.serving:  # until it is edited
        return REQUEUE_SECONDS["refused"]
    seconds = REQUEUE_SECONDS[name]
    last = objects.newest(observed.pods) or observed.job
    if name != "pending" or seconds is None or last is None:
        return seconds
    if observed.pods and not objects.is_scheduled(last):
        return seconds
    age = observed.now - objects.parse_time(last["metadata"]["creationTimestamp"])
    return min(seconds, max(_MIN_PENDING, age.total_seconds() / 4))


def _stored(*items: tuple[Kind, Object | None]) -> Items:
    """Those that exist and are not being deleted."""
    return tuple(
        (kind, item)
        for kind, item in items
        if item and not item["metadata"].get("deletionTimestamp")
    )


def _run_claim(observed: Observed, options: Options) -> list[Item]:
    """The claim of the run directory, if it is to be created."""
    if not observed.storage or observed.run_claim:
        return []
    claim = job_manifests.run_claim(observed.workspace, observed.desired, options)
    return [(CLAIM, claim)]


def _run_objects(observed: Observed, options: Options) -> Items:
    """What a run needs. The Job is last: when it exists, so does the rest."""
    workspace, desired = observed.workspace, observed.desired
    items = _run_claim(observed, options)
    if options.network_policy:
        items.append((NETWORK_POLICY, job_manifests.network_policy(workspace, desired, options)))
    if desired.nodes > 1 and observed.service is None:
        items.append((SERVICE, group.service(workspace, desired)))
    earlier = tuple(observed.recorded.get("outputs") or ())
    job = job_manifests.job(workspace, desired, options, claim=observed.storage, earlier=earlier)
    return (*items, (JOB, job))


def _deploy(observed: Observed, options: Options) -> dict[str, Any]:
    """Create the server's objects, or update them to the desired state."""
    workspace, desired = observed.workspace, observed.desired
    created, updated = _server_policy(observed, options)
    created = [*_run_claim(observed, options), *created]
    service = server_manifests.service(workspace, desired)
    if observed.service is None:
        created.append((SERVICE, service))
    else:
        spec = observed.service["spec"] | service["spec"]
        updated.append((SERVICE, observed.service | {"spec": spec}))
    stored = observed.server
    deployment = server_manifests.deployment(workspace, desired, options, claim=observed.storage)
    if stored is None:
        created.append((DEPLOYMENT, deployment))
    elif names.revision_of(stored) != names.revision_of(deployment):
        meta = stored["metadata"] | {"labels": deployment["metadata"]["labels"]}
        spec = deployment["spec"] | {"replicas": stored["spec"].get("replicas", 1)}
        updated.append((DEPLOYMENT, stored | {"metadata": meta, "spec": spec}))
    return {"create": tuple(created), "update": tuple(updated)}


def _policy(observed: Observed, desired: Object) -> tuple[list[Item], list[Item]]:
    """(to create, to update): the network policy, so that it is as desired."""
    stored = observed.policy
    if isinstance(stored, str):
        return [(NETWORK_POLICY, desired)] if stored == "missing" else [], []
    if stored["spec"] == desired["spec"]:
        return [], []
    return [], [(NETWORK_POLICY, stored | {"spec": desired["spec"]})]


def _server_policy(observed: Observed, options: Options) -> tuple[list[Item], list[Item]]:
    policy = job_manifests.server_policy(observed.workspace, observed.desired, options)
    if options.network_policy and not observed.server:
        return [(NETWORK_POLICY, policy)], []
    return _policy(observed, policy)


def _keep_serving(observed: Observed, options: Options) -> dict[str, Any]:
    """Restore claim and network policy; delete the Job that tuned the adapter after a while."""
    created, updated = _server_policy(observed, options)
    created = [*created, *_run_claim(observed, options)]
    deleted: Items = ()
    has_ended = observed.job and "completionTime" in observed.recorded
    if observed.job and has_ended and observed.now >= _kept_until(observed, options):
        deleted = ((JOB, observed.job),)
    return {"create": tuple(created), "delete": deleted, "update": tuple(updated)}


def _kept_until(observed: Observed, options: Options) -> datetime:
    """When the finished Job is deleted."""
    ended = objects.parse_time(observed.recorded["completionTime"])
    return ended + timedelta(seconds=options.keep_seconds)


def _restore(observed: Observed, options: Options) -> dict[str, Any]:
    created, updated = _service(observed)
    if not all(map(objects.is_scheduled, objects.newest_each(observed.pods))):
        created += _run_claim(observed, options)
    stored = observed.policy
    is_unchanged = isinstance(stored, dict) and stored["metadata"].get("generation") == 1
    desired = None
    if stored != "unchecked" and not is_unchanged:
        desired = desired_tuning.read(observed.workspace, observed.config_map, None)
    if desired and desired.spec:  # else its ConfigMap was deleted
        policy = job_manifests.network_policy(observed.workspace, desired, options)
        missing, changed = _policy(observed, policy)
        created, updated = [*created, *missing], [*updated, *changed]
    return {"create": tuple(created), "update": tuple(updated)}


def _service(observed: Observed) -> tuple[list[Item], list[Item]]:
    """(to create, to update): the Service in which the pods of one Job find each other."""
    stored, uid = observed.service, observed.workspace["metadata"]["uid"]
    if observed.desired.nodes == 1:
        return [], []
    service = group.service(observed.workspace, observed.desired)
    if stored is None:
        return [(SERVICE, service)], []
    if not names.is_owned_by(stored, uid) or group.is_headless(stored, service):
        return [], []
    return [], [(SERVICE, stored | {"spec": stored["spec"] | service["spec"]})]


def _provision(observed: Observed, options: Options) -> dict[str, Any]:
    """The NodeClaims that are missing; failed ones are deleted first."""
    failed = tuple(
        (NODE_CLAIM, each)
        for each in observed.node_claims
        if objects.node_claim_state(each, options.nodes, observed.now)[0] == "failed"
    )
    missing = missing_nodes(observed, options)
    if not missing:
        return {"delete": failed}
    workspace, desired = observed.workspace, observed.desired
    attempt = 1 + max(node_attempts(observed), last_number(observed))
    node_claims = [
        job_manifests.node_claim(
            workspace, desired, options, attempt=attempt, number=number, zone=zone(observed)
        )
        for number in range(missing)
    ]
    # NodeClaims are cluster-scoped, so that owner references do not delete them.
    present = workspace["metadata"].get("finalizers") or []
    return {
        "finalizers": None if names.FINALIZER in present else [*present, names.FINALIZER],
        "rehearse": () if observed.job else _rehearsal(observed, options),
        "delete": failed,
        "create": tuple((NODE_CLAIM, each) for each in node_claims),
    }


def _rehearsal(observed: Observed, options: Options) -> Items:
    """What will be created on the node."""
    if not observed.serving:
        return _run_objects(observed, options)
    created: Items = _deploy(observed, options)["create"]
    return created


def _released_nodes(observed: Observed) -> Items:
    """The NodeClaims to delete, as nothing runs on their nodes."""
    if names.annotation(observed.workspace, "keep-node") == "true":
        return ()
    return _stored(*((NODE_CLAIM, each) for each in observed.node_claims))


def _lost_nodes(observed: Observed) -> Items:
    """The NodeClaims of those nodes of a run that do not respond, where others do: they wait for
    the new ones."""
    lost = {pod["spec"].get("nodeName") for pod in observed.pods if objects.node_loss(pod)}
    claims = [
        each
        for each in observed.node_claims
        if (each.get("status") or {}).get("nodeName") in lost - {None}
    ]
    is_kept = names.annotation(observed.workspace, "keep-node") == "true"
    return () if is_kept else _stored(*((NODE_CLAIM, each) for each in claims))


def _clean_up(observed: Observed, options: Options) -> dict[str, Any]:
    """After the end is recorded, delete nodes and run volume at once, the Job after a while."""
    deleted = [*_released_nodes(observed)]
    requeue_after = None
    if observed.job:
        until = _kept_until(observed, options)
        has_ended = objects.job_state(observed.job) in ("complete", "failed")
        if has_ended and observed.now < until:
            requeue_after = (until - observed.now).total_seconds() + 1
        else:
            deleted.append((JOB, observed.job))
    claim, uid = observed.run_claim, observed.workspace["metadata"]["uid"]
    if claim and names.is_owned_by(claim, uid):
        deleted.append((CLAIM, claim))
    return {"delete": _stored(*deleted), "requeue_after": requeue_after}


def _finalize(observed: Observed) -> Decision:
    """The Workspace is being deleted: delete what is ours, then remove the finalizer."""
    ours = [(JOB, observed.job), (JOB, observed.previous_job), (DEPLOYMENT, observed.server)]
    ours += [(NODE_CLAIM, each) for each in observed.node_claims]
    remaining = [(kind, item) for kind, item in ours if item]
    finalizers = observed.workspace["metadata"].get("finalizers") or []
    if remaining:
        deleting = deleting_status(observed, remaining)
        return Decision(status=deleting, delete=_stored(*remaining), requeue_after=2)
    if names.FINALIZER in finalizers:
        return Decision(finalizers=[each for each in finalizers if each != names.FINALIZER])
    return Decision()
