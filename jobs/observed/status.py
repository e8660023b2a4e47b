"""The phase of a Workspace -> its status: state, conditions, plan, progress, result. Pure."""

from __future__ import annotations

from typing import Any

from jobs.api import nesting
from jobs.api.kinds import Kind, Object
from jobs.api.options import Options
from jobs.desired import names
from jobs.observed import conditions, group, objects
from jobs.observed.nodes import cost_of
from jobs.observed.objects import Cause, format_time
from jobs.observed.phase import missing_nodes, node_attempts, zone
from jobs.observed.phases import Observed, Phase, PhaseName
from tuning.plan import Plan
from tuning.spec import Spec

# Phases in which the run has ended: the node is released next.
ENDED: tuple[PhaseName, ...] = ("succeeded", "failed", "stuck", "unprovisioned")
_UNTIL_CREATED = ("provisioning", "queued", "deploying", "starting")  # phases of a new server


def status(observed: Observed, phase: Phase, options: Options) -> Object:
    """The whole new status: fields that it does not contain are removed from the stored one."""
    fields = _status(observed, phase, options)
    fields.pop("cost", None)
    return fields | _without_empty({"cost": cost_of(observed, phase, options)})


def _status(observed: Observed, phase: Phase, options: Options) -> Object:
    stored, name = observed.recorded, phase.name
    if observed.serving:
        return _server_status(observed, phase, options)
    if name == "finished":
        return _finished_status(observed)
    same = observed.is_recorded
    # a pod on a lost node counts as running, and does not train with the others
    all_run = name == "running" and not (observed.desired.nodes > 1 and group.lost(observed.pods))
    fields: Object = {
        "state": _state(observed, name),
        "ready": "True" if name == "succeeded" else "False",
        "revision": observed.desired.revision,
        "targetNodeCount": observed.desired.nodes,
        "outputs": stored.get("outputs"),
        "plan": _plan(observed, options),
        "progress": _progress(observed, stored.get("progress") if same else None),
        "trackers": _trackers(observed, stored.get("trackers") if same else None),
        "zone": zone(observed),
        "nodeAttempts": None if all_run else _node_attempts(observed, name, options),
        "workerNodes": _worker_nodes(observed),
    }
    if name in ("creating", "refused"):
        fields["job"] = names.job_name(observed.workspace, observed.desired)
    elif job := observed.job or observed.previous_job:
        fields["job"] = job["metadata"]["name"]
    if observed.job:
        fields["startTime"] = observed.job["metadata"]["creationTimestamp"]
        fields["retries"] = (observed.job.get("status") or {}).get("failed")
        fields["configDigest"] = conditions.config_digest(observed.job)
    if name in ENDED:
        fields["completionTime"] = (same and stored.get("completionTime")) or _ended_at(observed)
    if name in conditions.FAILED:
        fields["failure"] = _failure(phase.cause)
    if name == "succeeded":
        fields |= _result(observed, stored.get("outputs") or [])
        if "inference" in observed.workspace:
            fields |= {"state": "NotReady", "ready": "False"}  # until the adapter is served
    new = conditions.conditions_of(observed, phase, options)
    return _without_empty(fields) | conditions.stored(observed, new)


def _finished_status(observed: Observed) -> Object:
    """The stored status, with ConfigChanged brought up to date."""
    changed = [conditions.config_changed(observed)]
    if objects.condition(observed.workspace, "Ready") is None:  # KAITO's, or an earlier operator's
        has_succeeded = objects.is_true(observed.workspace, "WorkspaceSucceeded")
        changed += conditions.summary(
            conditions.recorded(observed), Phase("succeeded" if has_succeeded else "failed")
        )
    fields = observed.recorded | conditions.stored(observed, changed, keep=True)
    if "revision" not in fields:  # KAITO's controller finished it: it runs again only if edited
        fields |= {
            "completionTime": format_time(observed.now),
            "state": "Succeeded",
            "revision": observed.desired.revision,
        }
    return fields


def _server_status(observed: Observed, phase: Phase, options: Options) -> Object:
    """The status while serving; what the tuning left in it stays."""
    stored, name = observed.recorded, phase.name
    has_tuned = "tuning" in observed.workspace
    is_new = name in _UNTIL_CREATED
    was_up = stored.get("state") in ("Ready", "NotReady")
    fields: Object = {k: v for k, v in stored.items() if k != "failure"} if has_tuned else {}
    fields |= {
        "state": "Ready" if name == "ready" else "Pending" if is_new and not was_up else "NotReady",
        "ready": "True" if name == "ready" else "False",
        "revision": observed.desired.revision,
        "targetNodeCount": 1,
        "nodeAttempts": None if name == "ready" else _node_attempts(observed, name, options),
    }
    if nodes := _worker_nodes(observed):
        fields["workerNodes"] = nodes
    if name != "ready" and not is_new:
        fields["failure"] = _failure(phase.cause)
    kept = [
        each
        for each in conditions.recorded(observed)
        if has_tuned and each[0] in ("JobStarted", "WorkspaceSucceeded", "ConfigChanged")
    ]
    new = conditions.conditions_of(observed, phase, options)
    return _without_empty(fields) | conditions.stored(observed, [*kept, *new])


def deleting_status(observed: Observed, remaining: list[tuple[Kind, Object]]) -> Object:
    """The status of a Workspace that is being deleted: names the objects that must go first."""
    blockers = ", ".join(f"{kind.name} {item['metadata']['name']}" for kind, item in remaining)
    message = f"workspace is being deleted; waiting for the deletion of {blockers}"
    deleting = ("WorkspaceDeleting", "True", "workspaceDeleted", message)
    return observed.recorded | conditions.stored(observed, [deleting], keep=True)


def _without_empty(fields: Object) -> Object:
    return {key: value for key, value in fields.items() if value not in (None, "", {}, [], 0)}


def _state(observed: Observed, name: PhaseName) -> str:
    if name in conditions.FAILED:
        return "Failed"
    if name in ("running", "succeeded"):
        return name.capitalize()
    was_running = observed.recorded.get("state") == "Running" and observed.is_recorded
    # It stays Running while a lost pod is replaced.
    return (
        "Running" if was_running and name in ("pending", "provisioning", "creating") else "Pending"
    )


def _worker_nodes(observed: Observed) -> list[str]:
    return sorted({p["spec"]["nodeName"] for p in observed.pods if p["spec"].get("nodeName")})


def _node_attempts(observed: Observed, name: PhaseName, options: Options) -> int:
    """How often nodes were requested, with the request that the phase `provisioning` makes next."""
    return node_attempts(observed) + (
        name == "provisioning" and missing_nodes(observed, options) > 0
    )


def _ended_at(observed: Observed) -> str:
    times = [
        each["lastTransitionTime"]
        for kind in ("Complete", "Failed")
        if observed.job and (each := objects.condition(observed.job, kind))
    ]
    return times[0] if times and times[0] else format_time(observed.now)


def _failure(cause: Cause) -> Object:
    fields = {
        "reason": cause.reason,
        "message": cause.message[: conditions.MAX_MESSAGE],
        "hint": cause.hint[: conditions.MAX_MESSAGE],
        "phase": cause.phase,
        "exitCode": cause.code,
    }
    return {key: value for key, value in fields.items() if value not in (None, "")}


def _result(observed: Observed, outputs: list[str]) -> Object:
    """Output and peak memory from the engine's termination message."""
    messages = (objects.termination_message(pod) for pod in group.first(observed.pods))
    last = next((message for message in messages if message.get("digest")), {})
    digest, image = last.get("digest"), observed.workspace["tuning"]["output"].get("image")
    output = {"image": image, "digest": digest, "baseRevision": last.get("baseRevision")}
    return {
        "output": {key: value for key, value in output.items() if value},
        "outputs": [*(d for d in outputs if d != digest), digest][-50:] if digest else outputs,
        "peakMemoryBytes": last.get("peakMemoryBytes"),
    }


def _plan(observed: Observed, options: Options) -> Object:
    """Summary of the plan, as far as it is known before the data is read."""
    desired = observed.desired
    run_volume = names.claim_name(observed.workspace)
    if not observed.storage:
        pod = "a new pod" if desired.nodes == 1 else "a new pod of index 0"
        run_volume = f"emptyDir: {pod} starts from the beginning"
    if desired.spec is None:
        return observed.recorded.get("plan") or {} if observed.job else {}
    fields: Object = {"runVolume": run_volume}
    if plan := desired.plan:
        fields |= {
            "summary": _summary(plan),
            "baseModel": f"{plan.recipe.base_model}@{plan.recipe.base_revision}",
            "device": str(plan.device),
            "peakMemoryBytes": plan.fit.memory.total if plan.fit else None,
            "cost": _expected_cost(plan, desired.spec, options),
            # of an adapter to go on from, only the Job reads it
            "rank": None if desired.spec.settings.start_adapter else plan.recipe.rank,
        }
    else:
        fields["rank"] = desired.spec.settings.rank
        if desired.plan_unknown:
            fields["summary"] = f"PlanUnknown: {desired.plan_unknown}; the Job decides"
    return {key: value for key, value in fields.items() if value}


def _expected_cost(plan: Plan, spec: Spec, options: Options) -> str | None:
    priced = options.prices.priced(plan, spec, source="the policy")
    return priced.cost and f"{priced.cost}: {priced.reasons['cost']}"


def _summary(plan: Plan) -> str:
    recipe, placement = plan.recipe, plan.placement
    each, nodes = placement.ranks // placement.nodes, placement.nodes
    gpus = f"{nodes} machines, each " if nodes > 1 else ""
    gpus += f"{each} x " if each > 1 else ""
    return (
        f"{recipe.method} of rank {recipe.rank} in {recipe.precision} on {gpus}{plan.device.name}, "
        f"{recipe.max_length} tokens, {recipe.epochs:g} epochs"
    )


def _progress(observed: Observed, before: Object | None) -> Object:
    """Progress of the running pod, else of the last one that reported any, else as stored."""
    pods = group.first(observed.pods)
    messages = (objects.termination_message(pod) for pod in reversed(pods))
    record = observed.progress or next((each for each in messages if "step" in each), None)
    if not record or not all(_is_count(record.get(name, 0)) for name in ("step", "steps")):
        return before or {}
    keys = {name: name for name in ("step", "steps", "epoch", "loss")}
    keys |= {"tokensPerSecond": "tokens_per_second", "etaSeconds": "eta_seconds"}
    fields = {k: record[name] for k, name in keys.items() if objects.is_number(record.get(name))}
    if "step" not in fields:
        return before or {}
    return {"text": _progress_text(fields), **fields}


def _trackers(observed: Observed, before: Object | None) -> Object:
    """Pages that show the run, as its pods say."""
    messages = [objects.termination_message(pod) for pod in group.first(observed.pods)]
    found = [nesting.links((observed.progress or {}).get("trackers"))]
    found += [message.get("trackers", {}) for message in reversed(messages)]
    return next(filter(None, found), before or {})


def _is_count(value: object) -> bool:
    return isinstance(value, int) and objects.is_number(value) and value >= 0


def _progress_text(fields: dict[str, Any]) -> str:
    step, steps, seconds = fields["step"], fields.get("steps"), fields.get("etaSeconds")
    text = f"{step}/{steps} ({100 * step // steps}%)" if steps else str(step)
    if not seconds or seconds < 0 or step == steps:
        return text
    minutes = -(-int(seconds) // 60)
    return f"{text} {f'{minutes // 60}h{minutes % 60:02}m' if minutes >= 60 else f'{minutes}m'}"
