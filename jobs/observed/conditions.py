"""The phase of a Workspace -> KAITO's conditions, and ours. Pure."""

from __future__ import annotations

from jobs.api.kinds import Object
from jobs.api.options import Options
from jobs.desired import names
from jobs.observed.objects import format_time, sanitize
from jobs.observed.phases import RELEASED, Observed, Phase, PhaseName, is_current

OURS = (
    "SpecValid",
    "NodeClaimReady",
    "NodesReady",
    "ResourceReady",
    "JobStarted",
    "WorkspaceSucceeded",
    "InferenceReady",
    "ConfigChanged",
)
FAILED: tuple[PhaseName, ...] = ("invalid", "conflict", "unfit", "unprovisioned", "stuck", "failed")
_WITHOUT_RESOURCE: tuple[PhaseName, ...] = (
    "unfit",
    "provisioning",
    "unprovisioned",
    "queued",
    "replacing",
    "conflict",
    "refused",
)
MAX_MESSAGE = 4000  # characters of a condition's message; the API allows 32768
Condition = tuple[str, str, str, str]  # type, status, reason, message


def stored(observed: Observed, conditions: list[Condition], *, keep: bool = False) -> Object:
    """The fields `conditions` and `observedGeneration` of the new status.

    Unchanged conditions keep their transition time, unless the Workspace was edited: deadlines are
    measured from it. Other controllers' conditions stay; so do ours that are not in `conditions`,
    if `keep`. A condition with an empty status is removed.
    """
    before = {each["type"]: each for each in observed.recorded.get("conditions") or []}
    after = {kind: each for kind, each in before.items() if keep or kind not in OURS}
    generation = observed.workspace["metadata"]["generation"]
    for kind, value, reason, message in conditions:
        if not value:
            after.pop(kind, None)
            continue
        old, since = before.get(kind, {}), format_time(observed.now)
        if old.get("status") == value and (keep or is_current(observed)):
            since = old["lastTransitionTime"]
        after[kind] = {
            "type": kind,
            "status": value,
            "reason": reason,
            "message": sanitize(message, MAX_MESSAGE),
            "lastTransitionTime": since,
            "observedGeneration": generation,
        }
    return {"conditions": list(after.values()), "observedGeneration": generation}


def conditions_of(observed: Observed, phase: Phase, options: Options) -> list[Condition]:
    """All conditions, in the order in which they become True."""
    cause, server = phase.cause, observed.desired.server
    following = _inference if observed.serving else _job
    if phase.name == "invalid":
        hint = f". Change: {cause.hint}" if observed.serving and cause.hint else ""
        invalid = ("SpecValid", "False", cause.reason, cause.message + hint)
        return [invalid, *following(phase)]
    note = f"; {server.note}" if server and server.note else ""
    conditions: list[Condition] = [
        ("SpecValid", "True", "SpecValid", f"the Workspace is valid{note}")
    ]
    if names.provisions_node(observed.desired, options) and phase.name != "unfit":
        conditions += _nodes(observed, phase)
    given_back = phase.name == "stuck" and bool(observed.node_claims)
    conditions += [_resource(phase, given_back=given_back), *following(phase)]
    if observed.serving:
        return conditions
    if "inference" in observed.workspace:
        message = "the adapter is served once it has been tuned"
        conditions.append(("InferenceReady", "False", "WorkspaceInferenceStatusPending", message))
    return [*conditions, config_changed(observed)]


def _inference(phase: Phase) -> list[Condition]:
    cause = phase.cause
    if phase.name == "ready":
        message = "Inference has been deployed successfully"
        return [("InferenceReady", "True", "WorkspaceInferenceStatusSuccess", message)]
    message = f"{cause.message}. Change: {cause.hint}" if cause.hint else cause.message
    reason = cause.reason or "WorkspaceInferenceStatusPending"
    return [("InferenceReady", "False", reason, message or "Inference workload is not ready")]


def _nodes(observed: Observed, phase: Phase) -> list[Condition]:
    if phase.name == "stuck":
        return [("NodeClaimReady", "False", RELEASED, phase.cause.message)]
    is_missing = phase.name == "refused" and not observed.node_claims
    if is_missing or phase.name in ("provisioning", "unprovisioned", "queued"):
        return [
            ("NodeClaimReady", "False", "NodeClaimNotReady", phase.cause.message),
            ("NodesReady", "False", "NodeNotReady", "Not enough Nodes are ready"),
        ]
    return [
        ("NodeClaimReady", "True", "NodeClaimsReady", "Enough NodeClaims are ready"),
        ("NodesReady", "True", "NodesReady", "Enough Nodes are ready with GPU resources"),
    ]


def _resource(phase: Phase, *, given_back: bool) -> Condition:
    not_ready = "workspaceResourceStatusNotReady"
    reason, message = phase.cause.reason, phase.cause.message
    if phase.name in ("creating", "deploying"):
        reason, message = reason or not_ready, message or "the Job is being created"
    elif phase.name == "pending" and reason == "PodPending":
        reason = not_ready
    elif not given_back and phase.name not in _WITHOUT_RESOURCE and reason != "Unschedulable":
        done = "workspace resource is ready"
        return ("ResourceReady", "True", "workspaceResourceStatusSuccess", done)
    return ("ResourceReady", "False", reason, message)


def _job(phase: Phase) -> list[Condition]:
    started, succeeded = "JobStarted", "WorkspaceSucceeded"
    name, cause = phase.name, phase.cause
    reason = f"{cause.reason}: {cause.message}" if cause.message else ""
    if name in ("running", "succeeded"):
        now = (started, "True", "WorkspaceTuningJobStatusStarted", "Tuning job has started")
        if name == "succeeded":
            message = (
                f"workspace succeeds; {cause.message}" if cause.message else "workspace succeeds"
            )
            return [now, (succeeded, "True", "workspaceSucceeded", message)]
        running = "workspace has not completed yet, tuning job is running"
        return [now, (succeeded, "False", cause.reason or "workspacePending", reason or running)]
    if name in FAILED:
        message = f"tuning job failed: {reason}"
        message += f". Change: {cause.hint}" if cause.hint else ""
        return [
            (started, "False", "WorkspaceTuningJobStatusFailed", message),
            (succeeded, "False", "workspaceFailed", message),
        ]
    is_known = cause.reason and cause.reason != "PodPending"
    pending = cause.reason if is_known else "WorkspaceTuningJobStatusPending"
    told = "workspace is initializing, tuning job has not started"
    if name == "pending" and is_known:
        told = f"workspace has not completed yet: {cause.message}"
    return [
        (started, "False", pending, cause.message or "Tuning job has not started"),
        (succeeded, "False", "workspacePending", told),
    ]


def config_digest(job: Object) -> str | None:
    """sha256 of the ConfigMap's content that `job` was created with."""
    found: str | None = (job["metadata"].get("annotations") or {}).get(names.CONFIG_ANNOTATION)
    return found


def config_changed(observed: Observed) -> Condition:
    """Set if the ConfigMap is no longer the one that the Job was created with."""
    recorded = observed.recorded.get("configDigest")
    used = config_digest(observed.job) if observed.job else recorded
    now = observed.desired.config_digest
    if not used or not now or used == now:
        return ("ConfigChanged", "", "", "")
    message = "the ConfigMap changed after the Job was created; edit the Workspace to run with it"
    return ("ConfigChanged", "True", "ConfigMapEdited", message)
