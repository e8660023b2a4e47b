"""What was seen of a Workspace -> one word for where it stands, and why. Pure.

`status` puts the word into KAITO's conditions and reasons, `reconcile` acts on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from jobs.api.client import Object
from jobs.api.options import Options
from jobs.desired import inference, names
from jobs.desired.tuning import Wanted, smallest_fit
from jobs.manifests import pod
from jobs.manifests import server as serving
from jobs.observed import objects, readiness
from jobs.observed.objects import Trouble

Word = Literal[
    "finished",  # recorded for this revision: nothing runs again
    "deploying",  # what serves is to be made, or to be changed
    "starting",  # its pod does not answer yet
    "unready",  # and something is in its way
    "ready",  # it answers
    "invalid",  # the spec, or what it names
    "conflict",  # somebody else's Job has the name
    "replacing",  # the Job of an earlier spec is stopping
    "misfit",  # no GPU of the machine is large enough
    "buying",  # a machine is on its way
    "unbought",  # the cloud gave no machine
    "creating",  # the Job is to be made
    "refused",  # the API server refused what was to be made
    "queued",  # Kueue holds the Job back
    "pending",  # the pod has not started
    "stuck",  # and will not
    "running",
    "succeeded",
    "failed",
]

Policy = Literal["unasked", "whole", "gone"] | Object


# Reasons of the API server for which the same words will be refused again.
_REFUSALS = ("BadRequest", "Forbidden", "Invalid", "NotFound", "RequestEntityTooLarge")


@dataclass(frozen=True)
class Seen:
    """Everything that was observed of one Workspace, at one time."""

    workspace: Object
    wanted: Wanted
    now: datetime
    config_map: Object | None = None  # that the Workspace names
    job: Object | None = None  # of this revision
    old: Object | None = None  # the Job of an earlier revision
    foreign: Object | None = None  # somebody else's object with a name of ours
    pods: tuple[Object, ...] = ()  # of `job`
    warning: str | None = None  # an event that says why there is no pod, or no container
    machines: tuple[Object, ...] = ()  # NodeClaims of this Workspace
    machines_nearby: int = 0  # of all Workspaces of the namespace, where that is limited
    progress: dict[str, Any] | None = None
    run_claim: Object | None = None
    storage: bool = True  # a claim for the run directory can be bound
    policy: Policy = "unasked"  # the child's network policy; the object if it was edited
    serving: bool = False  # there is nothing to tune, or it was tuned: `wanted` is what to serve
    server: Object | None = None  # the Deployment
    service: Object | None = None
    told: dict[str, Any] | None = None  # what the server says at /readyz

    @property
    def recorded(self) -> Object:
        """The status as it is stored."""
        found: Object = self.workspace.get("status") or {}
        return found


@dataclass(frozen=True)
class Stage:
    """Where it stands, and why."""

    word: Word
    trouble: Trouble = field(default_factory=lambda: Trouble("", ""))


def judge(seen: Seen, options: Options) -> Stage:
    """The first of the words above that holds."""
    wanted, recorded = seen.wanted, seen.recorded
    if seen.serving:
        return _of_server(seen, options)
    if recorded.get("completionTime") and recorded.get("revision") == wanted.revision:
        return Stage("finished")
    if "revision" not in recorded and objects.holds(seen.workspace, "WorkspaceSucceeded"):
        return Stage("finished")  # by KAITO's controller
    if seen.job:  # follow it, whatever became of the ConfigMap meanwhile
        return _of_job(seen, seen.job, options)
    if seen.old:  # whatever the new spec is worth
        return Stage("replacing", Trouble("Replacing", "the Job of the earlier spec is stopping"))
    if trouble := _invalid(seen, options):
        return Stage("invalid", trouble)
    if seen.server:
        what = "the server of the earlier adapter is stopping"
        return Stage("replacing", Trouble("Replacing", what))
    if seen.foreign:
        kind, name = seen.foreign.get("kind") or "object", seen.foreign["metadata"]["name"]
        what = f"a {kind} {name} exists that does not belong to this Workspace"
        return Stage("conflict", Trouble("NameConflict", what, "delete or rename it"))
    if wanted.misfit:
        return Stage("misfit", misfit(seen.wanted))
    queued = names.queue(seen.workspace) is not None
    creating = Stage("creating", _again(seen) or refused_before(seen) or Trouble("", ""))
    if names.bought(wanted, options) and not queued:
        return _of_machine(seen, options) or creating
    return creating


def _of_server(seen: Seen, options: Options) -> Stage:
    wanted = seen.wanted
    if (trouble := _invalid(seen, options)) or wanted.server is None:
        return Stage("invalid", trouble or Trouble("SpecInvalid", "nothing is to be served"))
    if seen.foreign:
        kind, name = seen.foreign.get("kind") or "object", seen.foreign["metadata"]["name"]
        what = f"a {kind} {name} exists that does not belong to this Workspace"
        return Stage("conflict", Trouble("NameConflict", what, "delete or rename it"))
    if wanted.misfit:
        message = " ".join(str(problem) for problem in wanted.misfit)
        machine = inference.smallest(wanted)
        hint = f"use {machine} or larger" if machine else "no known machine fits"
        return Stage("misfit", Trouble("DoesNotFit", message, hint))
    up_to_date = (
        seen.server is not None
        and seen.service is not None
        and names.revision_of(seen.server) == wanted.server.fingerprint
        and serving.leads_to(seen.service, serving.service(seen.workspace, wanted))
    )
    found = readiness.judge(seen.pods, seen.warning, seen.told, wanted.server, was=seen.recorded)
    if up_to_date and found.answers:
        return Stage("unready" if found.trouble.reason else "ready", found.trouble)
    if names.bought(wanted, options) and (buying := _of_machine(seen, options)):
        return buying
    if not up_to_date:
        return Stage("deploying", refused_before(seen) or Trouble("", "the server is being made"))
    return Stage("unready" if found.known else "starting", found.trouble)


def refused_before(seen: Seen) -> Trouble | None:
    """What the API server refused when this was tried last: it stays told until it is made."""
    found = objects.condition(seen.workspace, "ResourceReady") or {}
    if found.get("status") != "False" or found.get("reason") not in _REFUSALS:
        return None
    return Trouble(found["reason"], found["message"])


def _again(seen: Seen) -> Trouble | None:
    """Says that a Job which was there is gone before its end."""
    name, recorded = names.job_name(seen.workspace, seen.wanted), seen.recorded
    if recorded.get("job") != name or not recorded.get("startTime"):
        return None
    what = "somebody deleted the Job; it is made again and goes on from the run volume"
    if not seen.storage:
        what = "somebody deleted the Job; it is made again and starts from the beginning"
    return Trouble("JobDeleted", what)


def _invalid(seen: Seen, options: Options) -> Trouble | None:
    wanted = seen.wanted
    if forbidden := pod.forbidden_volume(seen.workspace, options):
        field_, kind = forbidden
        what = f"{field_}: a volume of the kind {kind} is not allowed here"
        return Trouble("VolumeForbidden", what, "use persistentVolumeClaim")
    if wanted.missing_config is not None:
        message = " ".join(str(problem) for problem in wanted.problems)
        return Trouble("ConfigMapNotFound", message, "create the ConfigMap; it goes on by itself")
    if wanted.spec is None and wanted.server is None:
        return Trouble("SpecInvalid", " ".join(str(problem) for problem in wanted.problems))
    notes = seen.workspace["metadata"].get("annotations") or {}
    serves = seen.workspace.get("inference") is not None
    if serves and notes.get(inference.RUNTIME) == "vllm" and not options.vllm_image:
        what = "the operator has no image of vLLM (option vllmImage)"
        change = "ask the administrator, or use the runtime transformers"
        return Trouble("RuntimeUnavailable", what, change)
    return None


def misfit(wanted: Wanted) -> Trouble:
    """Why it does not fit, and the smallest machine on which it would."""
    message = " ".join(str(problem) for problem in wanted.misfit)
    if all(problem.code == "PLAN-120" for problem in wanted.misfit):  # it names the machine
        return Trouble("DoesNotFit", message, "; ".join(p.change for p in wanted.misfit))
    cloud = wanted.instance.cloud if wanted.instance else "azure"
    machine = smallest_fit(wanted.snapshot, cloud)
    hint = f"use {machine} or larger" if machine else "no known machine fits"
    return Trouble("DoesNotFit", message, hint)


def _of_job(seen: Seen, job: Object, options: Options) -> Stage:
    match objects.job_state(job):
        case "complete":
            return Stage("succeeded")
        case "failed":
            return Stage("failed", objects.failure(job, seen.pods))
        case "suspended":
            return Stage("queued", Trouble("Queued", "the Job waits in its queue"))
    last = objects.newest(tuple(p for p in seen.pods if not objects.terminated(p)))
    if last is not None and objects.running(last):
        return Stage("running", objects.unwell(job, last) or Trouble("", ""))
    if (
        names.bought(seen.wanted, options)
        and (last is None or not objects.scheduled(last))
        and (buying := _of_machine(seen, options))
    ):
        return buying
    if last is None:
        why = Trouble("PodRefused", objects.clean(seen.warning)) if seen.warning else None
        return Stage("pending", why or Trouble("PodPending", "the Job has made no pod yet"))
    trouble = objects.waiting(last, seen.warning)
    since = objects.scheduled_at(last)  # a pod may have waited long for its node
    if trouble and trouble.reason == "Unschedulable":
        # The scheduler may take its time, but no machine is paid for that no pod can use.
        ready = [objects.ready_at(machine) for machine in seen.machines]
        since = max((at for at in ready if at), default=None)
    if trouble and since and seen.now - since > timedelta(seconds=options.stuck_seconds):
        return Stage("stuck", trouble)
    return Stage("pending", trouble or Trouble("PodPending", "the pod is starting"))


def _of_machine(seen: Seen, options: Options) -> Stage | None:
    """None when a bought machine is ready."""
    found = [objects.claim_state(m, options.nodes, seen.now) for m in seen.machines]
    if any(word == "ready" for word, _ in found):
        return None
    words = "; ".join(message for _, message in found)
    usable = any(word == "waiting" for word, _ in found)
    if not usable and attempts(seen) >= options.nodes.attempts:
        said = words or last_message(seen, "NodeClaimReady")
        what = f"no machine after {attempts(seen)} attempts: {said}"
        return Stage("unbought", Trouble("NodeClaimNotReady", what, "try another instanceType"))
    limit = options.nodes.per_namespace
    if not seen.machines and limit is not None and seen.machines_nearby >= limit:
        what = f"the namespace has {seen.machines_nearby} machines, of {limit} that it may have"
        return Stage("queued", Trouble("MachineLimit", what))
    return Stage("buying", Trouble("NodeClaimNotReady", words or "a machine is asked for"))


def attempts(seen: Seen) -> int:
    """Machines asked for so far in this revision, whether or not the status could say it."""
    recorded = seen.recorded.get("nodeAttempts") or 0
    if seen.recorded.get("revision") != seen.wanted.revision:
        recorded = 0
    if seen.serving:  # no revision tells of an edit
        edited = seen.recorded.get("observedGeneration") != seen.workspace["metadata"]["generation"]
        recorded = 0 if edited else recorded
    numbers = (m["metadata"]["name"].rpartition("-")[2] for m in seen.machines)
    return max([recorded, *(int(number) for number in numbers if number.isdecimal())])


def zone(seen: Seen) -> str | None:
    """Where the run volume is, as far as machines told: a machine elsewhere could not mount it."""
    labels = [machine["metadata"].get("labels") or {} for machine in seen.machines]
    here = [each[names.ZONE] for each in labels if each.get(names.ZONE)]
    if not seen.storage or not (here or seen.run_claim):
        return None
    found: str | None = here[-1] if here else seen.recorded.get("zone")
    return found


def last_message(seen: Seen, kind: str) -> str:
    """What the stored condition of this type says."""
    found = objects.condition(seen.workspace, kind)
    return str(found["message"]) if found else ""
