"""Observed and desired state of a Workspace -> its phase, and the cause. Pure.

`status` derives KAITO's conditions and reasons from the phase, `controller.decide` the actions.
`phases` has the table of what a provisioned node does in each phase, and its deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jobs.api.kinds import Object
from jobs.api.options import Options
from jobs.desired import allowed, names
from jobs.desired import inference as desired_inference
from jobs.desired import tuning as desired_tuning
from jobs.desired.tuning import QUEUE
from jobs.manifests import job as job_manifests
from jobs.manifests import server as server_manifests
from jobs.observed import group, objects
from jobs.observed.objects import Cause
from jobs.observed.phases import NODES_HINT, RELEASED, Observed, Phase, after_deadline, is_current
from jobs.observed.phases import PhaseName as PhaseName  # where it is looked for
from jobs.observed.readiness import readiness_of
from tuning.errors import Problem

_JOB_SECONDS = 60  # in which a Job is usually complete after the engine has ended

# HTTP status with which the API server, or an admission webhook, refuses an object -> reason.
_REFUSALS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    413: "RequestEntityTooLarge",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


def phase_of(observed: Observed, options: Options) -> Phase:
    """The first phase that applies, or what follows once a provisioned node waited too long."""
    return after_deadline(observed, _phase_of(observed, options), options)


def _phase_of(observed: Observed, options: Options) -> Phase:
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
    server, node = observed.desired.server, objects.condition(observed.workspace, "NodeClaimReady")
    if node and node["reason"] == RELEASED and is_current(observed):  # until it is edited
        kept = observed.recorded.get("failure") or {}
        fields = {key: kept.get(key, "") for key in ("reason", "message", "hint")}
        return Phase("stuck", Cause(**fields, code=kept.get("exitCode")))
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
        provisioning := _node_phase(observed, options)
    ):
        return provisioning
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
    if stored.get("status") != "False" or stored.get("reason") not in _REFUSALS.values():
        return None
    return Cause(stored["reason"], stored["message"])


def refusal(status: int, message: str) -> Cause:
    """Why an object was not created, in the words of who refused it. A webhook's own reason may be
    any text: the reason here is that of the HTTP status."""
    return Cause(_REFUSALS.get(status, "Invalid" if status < 500 else "InternalError"), message)


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
    if claims := ", ".join(observed.unshared):
        message = f"the claim {claims} can be mounted on one node only, and the run has several"
        hint = "use claims with the access mode ReadWriteMany (ReadOnlyMany for data), or an image"
        return Cause("VolumeNotShared", message, hint)
    if desired.spec is not None:
        earlier = tuple(observed.recorded.get("outputs") or ())
        if too_large := job_manifests.size_problem(desired, options, earlier):
            return Cause("SpecTooLarge", str(too_large))
    return _forbidden(forbidden) if forbidden and not desired.fit_problems else None


def _forbidden(problems: Sequence[Problem]) -> Cause:
    message = "; ".join(f"{each.where}: {each.what}" for each in problems)
    hint = "; ".join(each.change for each in problems)
    return Cause(allowed.REASONS[problems[0].code], message, hint)


def _job_phase(observed: Observed, job: Object, options: Options) -> Phase:
    state = objects.job_state(job)
    if state == "complete":
        return Phase("succeeded")
    if ended := _engine_phase(observed, state):
        return ended
    match state:
        case "failed":
            return Phase("failed", objects.failure(job, observed.pods))
        case "suspended":
            return Phase("queued", Cause("Queued", "the Job waits in its queue"))
    nodes = observed.desired.nodes
    live = tuple(
        pod for pod in observed.pods if not objects.has_ended(pod) or objects.exit_code(pod) == 0
    )
    last = group.decisive(live, nodes)
    earlier = objects.last_try(job, observed.pods)
    if last is not None and objects.is_running(last):
        retried = earlier and replace(earlier, reason="Retried", hint="")
        warnings = (objects.running_warning(job, pod, nodes) for pod in objects.newest_each(live))
        return Phase("running", next(filter(None, warnings), retried or Cause("", "")))
    if (
        names.provisions_node(observed.desired, options)
        and (last is None or not objects.is_scheduled(last))
        and (node := _node_phase(observed, options))
    ):
        return node
    return Phase("pending", _pending(observed, last, earlier))


def _engine_phase(observed: Observed, state: str) -> Phase | None:
    """The engine's container decides over the run, even if another container of its pod fails, or
    goes on: then the Job does not end by itself."""
    pods = group.first(observed.pods)
    done = next((pod for pod in pods if objects.exit_code(pod) == 0), None)
    if done is not None:
        staying = objects.staying(done)
        waited = (observed.now - objects.ended_at(done)).total_seconds()
        if staying or state == "failed" or waited > _JOB_SECONDS:
            note = f"the container {staying} of its pod still ran" if staying else ""
            return Phase("succeeded", Cause("ContainerStays" if staying else "", note))
        return Phase("running")  # the Job is about to be complete
    ended = tuple(pod for pod in objects.newest_each(observed.pods) if objects.has_ended(pod))
    last = objects.culprit(ended)
    if last is None or not (staying := objects.staying(last)) or state == "failed":
        return None
    if objects.exit_code(last) not in objects.PERMANENT:
        return None
    cause = objects.named(last, objects.pod_failure(last))
    note = f"{cause.message}; the container {staying} of its pod still ran"
    return Phase("failed", replace(cause, message=note))


def _pending(observed: Observed, last: Object | None, earlier: Cause | None) -> Cause:
    """Why no engine runs: `last` is the pod that is to start, `earlier` how the last try ended."""
    before = group.waiting(observed.pods, observed.desired.nodes)
    before += f"{earlier.message}; " if earlier else ""
    ended = objects.culprit(tuple(filter(objects.has_ended, observed.pods)))
    cause = objects.waiting(last, observed.warning) if last else None
    if observed.warning and not last:
        words = objects.sanitize(observed.warning)
        cause = Cause("PodRefused", words, "see the quota or the admission rule that it names")
    if cause:
        return replace(cause, message=before + cause.message)
    if not last and ended and earlier and (staying := objects.staying(ended)):
        message = f"{before}the container {staying} of its pod still runs, so that no other starts"
        return Cause("ContainerStays", message, f"keep {staying} out of pods of Jobs")
    if earlier:
        return replace(earlier, message=f"{before}the next starts")
    waits = objects.starting(last) if last else "the Job has not created a pod yet"
    return Cause("PodPending", before + waits)


def _node_phase(observed: Observed, options: Options) -> Phase | None:
    """The phase while not all provisioned nodes are ready; None if they are."""
    nodes, now, count = options.nodes, observed.now, observed.desired.nodes
    states = [objects.node_claim_state(each, nodes, now) for each in observed.node_claims]
    ready = sum(state == "ready" for state, _ in states)
    if ready >= count:
        return None
    messages = "; ".join(dict.fromkeys(message for _, message in states if message))
    attempts, limit = node_attempts(observed), nodes.per_namespace
    if missing_nodes(observed, options) and attempts >= nodes.attempts:
        stored = objects.condition(observed.workspace, "NodeClaimReady") or {}
        what = "no node" if count == 1 else f"not all of {count} nodes"
        message = f"{what} after {attempts} attempts: {messages or stored.get('message', '')}"
        return Phase("unprovisioned", Cause("NodeClaimNotReady", message, NODES_HINT))
    present = observed.node_claims_in_namespace
    if not states and limit is not None and present + count > limit:
        message = f"the namespace has {present} nodes, its limit is {limit}"
        message += f", and this Workspace needs {count}" if count > 1 else ""
        message += ": it can never run here" if count > limit else ""
        return Phase("queued", Cause("MachineLimit", message))
    if count > 1:
        messages = f"{ready} of {count} nodes are ready" + (f"; {messages}" if messages else "")
    requested = Cause("NodeClaimNotReady", messages or "a node is requested")
    return Phase("provisioning", (not states and _previous_refusal(observed)) or requested)


def missing_nodes(observed: Observed, options: Options) -> int:
    """How many nodes are to be requested: a request that failed is made again."""
    states = (
        objects.node_claim_state(each, options.nodes, observed.now)[0]
        for each in observed.node_claims
    )
    return max(0, observed.desired.nodes - sum(state != "failed" for state in states))


def node_attempts(observed: Observed) -> int:
    """How often a node was requested for this revision, including a NodeClaim that the status does
    not count. Of several nodes those that stay keep their numbers: there the status alone counts,
    which starts again whenever all pods run."""
    stored = (observed.recorded.get("nodeAttempts") or 0) if is_current(observed) else 0
    return stored if observed.desired.nodes > 1 else max(stored, last_number(observed))


def last_number(observed: Observed) -> int:
    """The highest number of an attempt in the names of NodeClaims."""
    numbers = (each["metadata"]["name"].rpartition("-")[2] for each in observed.node_claims)
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def zone(observed: Observed) -> str | None:
    """Zone of the run volume, if known: a node of another zone could not mount it."""
    labels = [each["metadata"].get("labels") or {} for each in observed.node_claims]
    zones = [each[names.ZONE] for each in labels if each.get(names.ZONE)]
    if observed.desired.nodes > 1 and zones:
        return str(zones[-1])  # the others shall be near
    if not observed.storage or not (zones or observed.run_claim):
        return None
    found: str | None = zones[-1] if zones else observed.recorded.get("zone")
    return found
