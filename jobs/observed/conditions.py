"""The phase of a Workspace -> KAITO's conditions, and ours. Pure."""

from __future__ import annotations

from jobs.api.kinds import Object
from jobs.api.options import Options
from jobs.desired import names
from jobs.observed import objects
from jobs.observed.objects import condition, format_time, sanitize
from jobs.observed.phases import RELEASED, Observed, Phase, PhaseName, is_current

# Of the whole Workspace, for tools that know no other condition (kstatus: Flux, kpt; Argo CD).
SUMMARY = ("Ready", "Reconciling", "Stalled")
OURS = (
    "SpecValid",
    "NodeClaimReady",
    "NodesReady",
    "ResourceReady",
    "JobStarted",
    "WorkspaceSucceeded",
    "InferenceReady",
    "ConfigChanged",
    *SUMMARY,
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
    """All conditions, in the order in which they become True, and their summary."""
    found = _conditions(observed, phase, options)
    return [*found, *summary(found, phase)]


def summary(conditions: list[Condition], phase: Phase) -> list[Condition]:
    """Ready, with what keeps it from being True: Reconciling while that may go by itself, Stalled
    where somebody must change something. As kstatus wants it, only what is True is there."""
    if phase.name == "ready" or (phase.name == "succeeded" and not _follows(conditions)):
        kind = "InferenceReady" if phase.name == "ready" else "WorkspaceSucceeded"
        _, _, reason, message = next(each for each in conditions if each[0] == kind)
        return [("Ready", "True", reason, message)]
    first = next((each for each in conditions if each[1] == "False"), ("", "", "Pending", ""))
    is_final = phase.name == "unready" or phase.name in FAILED
    if phase.cause.reason == "ConfigMapNotFound":  # it may be applied next
        is_final = False
    reason, message = first[2] or "Pending", first[3]
    if is_final and phase.cause.hint and phase.cause.hint not in message:
        message += f". Change: {phase.cause.hint}"
    why = (reason, message)
    return [("Ready", "False", *why), ("Stalled" if is_final else "Reconciling", "True", *why)]


def recorded(observed: Observed) -> list[Condition]:
    """The conditions of the stored status."""
    return [
        (each["type"], each["status"], each["reason"], each["message"])
        for each in observed.recorded.get("conditions") or []
    ]


def _follows(conditions: list[Condition]) -> bool:
    """Whether the adapter that was tuned is to be served."""
    return any(kind == "InferenceReady" for kind, *_ in conditions)


def _conditions(observed: Observed, phase: Phase, options: Options) -> list[Condition]:
    cause = phase.cause
    following = _inference if observed.serving else _job
    if phase.name == "invalid":
        hint = f". Change: {cause.hint}" if cause.hint else ""
        invalid = ("SpecValid", "False", cause.reason, cause.message + hint)
        return [invalid, *following(phase)]
    conditions: list[Condition] = [("SpecValid", "True", "SpecValid", _valid(observed))]
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


def _valid(observed: Observed) -> str:
    """Says also what has no effect; once the Job is there, as it was said before."""
    desired, text = observed.desired, "the Workspace is valid"
    stored = condition(observed.workspace, "SpecValid")
    if desired.spec is None and desired.server is None and observed.is_recorded and stored:
        return str(stored["message"]) if stored["status"] == "True" else text
    notes = desired.spec.cluster_notes if desired.spec else ()
    notes = (desired.server.note,) if desired.server and desired.server.note else notes
    if (observed.workspace.get("resource") or {}).get("preferredNodes") and desired.instance:
        notes = (*notes, "resource.preferredNodes has no effect on a node that is provisioned")
    return "; ".join([text, *notes])


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
    count = observed.desired.nodes
    if is_missing or phase.name in ("provisioning", "unprovisioned", "queued"):
        enough = "Not enough Nodes are ready"
        if count > 1:
            ready = sum(objects.is_true(each, "Ready") for each in observed.node_claims)
            enough += f": {ready} of {count}"
        return [
            ("NodeClaimReady", "False", "NodeClaimNotReady", phase.cause.message),
            ("NodesReady", "False", "NodeNotReady", enough),
        ]
    of = f": {count} of {count}" if count > 1 else ""
    return [
        ("NodeClaimReady", "True", "NodeClaimsReady", f"Enough NodeClaims are ready{of}"),
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
