"""Observed and desired state of a Workspace -> its phase, and the cause. Pure.

`status` derives KAITO's conditions and reasons from the phase, `controller.decide` the actions.
Phase names are internal: no object stores them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from jobs.api.kinds import Object
from jobs.api.options import Options
from jobs.desired import allowed, names
from jobs.desired import inference as desired_inference
from jobs.desired import tuning as desired_tuning
from jobs.desired.tuning import QUEUE, Desired
from jobs.manifests import server as server_manifests
from jobs.observed import objects
from jobs.observed.objects import Cause
from jobs.observed.readiness import readiness_of
from tuning.errors import Problem

PhaseName = Literal[
    "finished",  # recorded for this revision: nothing runs again
    "deploying",  # the server's objects must be created or updated
    "starting",  # its pod is not ready yet
    "unready",  # its pod is not ready, or an adapter was refused, for a known cause
    "ready",  # it answers
    "invalid",  # the spec, or an object that it names
    "conflict",  # an object of another owner has the name
    "replacing",  # the Job or server of an earlier spec is stopping
    "unfit",  # no GPU of the instance type is large enough
    "provisioning",  # a node is being provisioned
    "unprovisioned",  # all attempts to provision a node failed
    "creating",  # the Job must be created
    "refused",  # the API server refused to create an object
    "queued",  # Kueue suspends the Job, or the namespace's limit of nodes is reached
    "pending",  # the pod has not started
    "stuck",  # the pod has not started in time
    "running",
    "succeeded",
    "failed",
]

Policy = Literal["unchecked", "missing"] | Object  # the stored network policy

# Reasons with which the API server will refuse the same object again.
_PERMANENT = ("BadRequest", "Forbidden", "Invalid", "NotFound", "RequestEntityTooLarge")


@dataclass(frozen=True)
class Observed:
    """Everything read about one Workspace at one time, beside its desired state."""

    workspace: Object
    desired: Desired
    now: datetime
    config_map: Object | None = None  # named by the Workspace
    job: Object | None = None  # of this revision
    previous_job: Object | None = None  # of an earlier revision
    conflicting: Object | None = None  # an object of another owner with one of our names
    pods: tuple[Object, ...] = ()  # of the Job or server, oldest first
    warning: str | None = None  # of an event: why there is no pod, or no container
    node_claims: tuple[Object, ...] = ()  # of this Workspace
    node_claims_in_namespace: int = 0  # counted only if there is a limit
    progress: dict[str, Any] | None = None
    run_claim: Object | None = None
    storage: bool = True  # whether a claim for the run directory can be bound
    policy: Policy = "unchecked"
    serving: bool = False  # nothing is left to tune: `desired` is an inference server
    server: Object | None = None  # the Deployment
    service: Object | None = None
    server_report: dict[str, Any] | None = None  # from the server's /readyz

    @property
    def recorded(self) -> Object:
        """The stored status."""
        found: Object = self.workspace.get("status") or {}
        return found

    @property
    def is_recorded(self) -> bool:
        """Whether the stored status is of this revision."""
        return bool(self.recorded.get("revision") == self.desired.revision)


@dataclass(frozen=True)
class Phase:
    """The phase of a Workspace, and why."""

    name: PhaseName
    cause: Cause = field(default_factory=lambda: Cause("", ""))


def phase_of(observed: Observed, options: Options) -> Phase:
    """The first phase that applies."""
    if observed.serving:
        return _server_phase(observed, options)
    has_ended = observed.recorded.get("completionTime") and observed.is_recorded
    is_kaitos = "revision" not in observed.recorded
    if has_ended or (is_kaitos and objects.is_true(observed.workspace, "WorkspaceSucceeded")):
        return Phase("finished")
    if observed.job:  # it has its own snapshot of the ConfigMap
        return _job_phase(observed, observed.job, options)
    if observed.previous_job:  # stopped even if the new spec is invalid
        return Phase("replacing", Cause("Replacing", "the Job of the earlier spec is stopping"))
    if cause := _invalid(observed, options):
        return Phase("invalid", cause)
    if observed.server:
        return Phase("replacing", Cause("Replacing", "the earlier adapter's server is stopping"))
    if blocked := _blocked(observed):
        return blocked
    cause = _deleted_job(observed) or _previous_refusal(observed) or Cause("", "")
    creating = Phase("creating", cause)
    is_queued = QUEUE in (observed.workspace["metadata"].get("labels") or {})
    if names.provisions_node(observed.desired, options) and not is_queued:
        return _node_phase(observed, options) or creating
    return creating


def _server_phase(observed: Observed, options: Options) -> Phase:
    server = observed.desired.server
    if (cause := _invalid(observed, options)) or server is None:
        return Phase("invalid", cause or Cause("SpecInvalid", "there is nothing to serve"))
    if blocked := _blocked(observed):
        return blocked
    up_to_date = (
        observed.server is not None
        and observed.service is not None
        and names.revision_of(observed.server) == server.fingerprint
        and server_manifests.service_matches(
            observed.service, server_manifests.service(observed.workspace, observed.desired)
        )
    )
    report, recorded = observed.server_report, observed.recorded
    readiness = readiness_of(observed.pods, observed.warning, report, server, recorded=recorded)
    if up_to_date and readiness.answers:
        return Phase("unready" if readiness.cause.reason else "ready", readiness.cause)
    if names.provisions_node(observed.desired, options) and (
        node := _node_phase(observed, options)
    ):
        return node
    if not up_to_date:
        pending = Cause("", "the server is being created")
        return Phase("deploying", _previous_refusal(observed) or pending)
    return Phase("unready" if readiness.is_final else "starting", readiness.cause)


def _blocked(observed: Observed) -> Phase | None:
    """The phase of a valid Workspace whose name is taken, or which does not fit its GPU."""
    if other := observed.conflicting:
        kind, name = other.get("kind") or "object", other["metadata"]["name"]
        message = f"a {kind} {name} exists that does not belong to this Workspace"
        return Phase("conflict", Cause("NameConflict", message, "delete or rename it"))
    desired = observed.desired
    if not desired.fit_problems:
        return None
    if observed.serving:
        hint = desired_inference.fit_hint(desired)
    elif all(problem.code == "PLAN-120" for problem in desired.fit_problems):
        hint = "; ".join(problem.change for problem in desired.fit_problems)
    else:
        cloud = desired.instance.cloud if desired.instance else "azure"
        hint = desired_tuning.fit_hint(desired.snapshot, cloud)
    return Phase("unfit", Cause("DoesNotFit", " ".join(map(str, desired.fit_problems)), hint))


def _previous_refusal(observed: Observed) -> Cause | None:
    """The stored refusal of the API server; the condition stays until the object exists."""
    stored = objects.condition(observed.workspace, "ResourceReady") or {}
    if stored.get("status") != "False" or stored.get("reason") not in _PERMANENT:
        return None
    return Cause(stored["reason"], stored["message"])


def _deleted_job(observed: Observed) -> Cause | None:
    """Set if a Job that had been started no longer exists."""
    name = names.job_name(observed.workspace, observed.desired)
    if observed.recorded.get("job") != name or not observed.recorded.get("startTime"):
        return None
    effect = "continues from the run volume" if observed.storage else "starts from the beginning"
    message = f"the Job was deleted by another client; it is created again and {effect}"
    return Cause("JobDeleted", message)


def _invalid(observed: Observed, options: Options) -> Cause | None:
    desired = observed.desired
    problems = " ".join(map(str, desired.problems))
    forbidden = allowed.problems(observed.workspace, options)
    if volumes := [each for each in forbidden if each.code == "JOB-103"]:
        return _forbidden(volumes)
    if desired.missing_config_map is not None:
        return Cause("ConfigMapNotFound", problems, "create the ConfigMap; the run then starts")
    if desired.spec is None and desired.server is None:
        return Cause("SpecInvalid", problems)
    return _forbidden(forbidden) if forbidden and not desired.fit_problems else None


def _forbidden(problems: Sequence[Problem]) -> Cause:
    message = "; ".join(f"{each.where}: {each.what}" for each in problems)
    hint = "; ".join(each.change for each in problems)
    return Cause(allowed.REASONS[problems[0].code], message, hint)


def _job_phase(observed: Observed, job: Object, options: Options) -> Phase:
    match objects.job_state(job):
        case "complete":
            return Phase("succeeded")
        case "failed":
            return Phase("failed", objects.failure(job, observed.pods))
        case "suspended":
            return Phase("queued", Cause("Queued", "the Job waits in its queue"))
    last = objects.newest(tuple(p for p in observed.pods if not objects.terminated(p)))
    if last is not None and objects.is_running(last):
        return Phase("running", objects.running_warning(job, last) or Cause("", ""))
    if (
        names.provisions_node(observed.desired, options)
        and (last is None or not objects.is_scheduled(last))
        and (node := _node_phase(observed, options))
    ):
        return node
    if last is None:
        if observed.warning:
            return Phase("pending", Cause("PodRefused", objects.sanitize(observed.warning)))
        return Phase("pending", Cause("PodPending", "the Job has not created a pod yet"))
    cause = objects.waiting(last, observed.warning)
    times = [objects.changed_at(last, "PodScheduled")] if objects.is_scheduled(last) else []
    if cause and cause.reason == "Unschedulable":
        # The scheduler may take its time, unless a provisioned node costs money meanwhile.
        ready = (each for each in observed.node_claims if objects.is_true(each, "Ready"))
        times = [objects.changed_at(each, "Ready") for each in ready]
    since = max(times, default=observed.now)  # not since the pod's creation: nodes may take long
    if cause and observed.now - since > timedelta(seconds=options.stuck_seconds):
        return Phase("stuck", cause)
    return Phase("pending", cause or Cause("PodPending", "the pod is starting"))


def _node_phase(observed: Observed, options: Options) -> Phase | None:
    """The phase while no provisioned node is ready; None if one is."""
    nodes, now = options.nodes, observed.now
    states = [objects.node_claim_state(each, nodes, now) for each in observed.node_claims]
    if any(state == "ready" for state, _ in states):
        return None
    messages = "; ".join(message for _, message in states)
    count, limit = node_attempts(observed), nodes.per_namespace
    if all(state != "waiting" for state, _ in states) and count >= nodes.attempts:
        stored = objects.condition(observed.workspace, "NodeClaimReady") or {}
        message = f"no node after {count} attempts: {messages or stored.get('message', '')}"
        return Phase(
            "unprovisioned", Cause("NodeClaimNotReady", message, "try another instanceType")
        )
    if not states and limit is not None and observed.node_claims_in_namespace >= limit:
        message = (
            f"the namespace has {observed.node_claims_in_namespace} nodes, its limit is {limit}"
        )
        return Phase("queued", Cause("MachineLimit", message))
    return Phase("provisioning", Cause("NodeClaimNotReady", messages or "a node is requested"))


def node_attempts(observed: Observed) -> int:
    """NodeClaims created so far for this revision, including one that the status does not count."""
    is_current = observed.is_recorded
    if observed.serving:  # the revision is of `tuning` alone
        generation = observed.workspace["metadata"]["generation"]
        is_current = is_current and observed.recorded.get("observedGeneration") == generation
    stored = (observed.recorded.get("nodeAttempts") or 0) if is_current else 0
    numbers = (each["metadata"]["name"].rpartition("-")[2] for each in observed.node_claims)
    return max([stored, *(int(number) for number in numbers if number.isdecimal())])


def zone(observed: Observed) -> str | None:
    """Zone of the run volume, if known: a node of another zone could not mount it."""
    labels = [each["metadata"].get("labels") or {} for each in observed.node_claims]
    zones = [each[names.ZONE] for each in labels if each.get(names.ZONE)]
    if not observed.storage or not (zones or observed.run_claim):
        return None
    found: str | None = zones[-1] if zones else observed.recorded.get("zone")
    return found
