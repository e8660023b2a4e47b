"""Where a Workspace stands -> its status: KAITO's conditions, progress, result. Pure."""

from __future__ import annotations

from typing import Any

from jobs.api.client import Kind, Object
from jobs.api.options import Options
from jobs.desired import names
from jobs.observed import objects
from jobs.observed.objects import Trouble, clean, stamp
from jobs.observed.phase import Seen, Stage, Word, attempts, zone
from tuning.plan import Plan

_STATE: dict[Word, str] = {
    "invalid": "Failed",
    "conflict": "Failed",
    "misfit": "Failed",
    "unbought": "Failed",
    "stuck": "Failed",
    "failed": "Failed",
    "running": "Running",
    "succeeded": "Succeeded",
}  # every other word: Pending
_NO_JOB: tuple[Word, ...] = ("invalid", "conflict", "misfit", "buying", "unbought", "creating")
_ENDED: tuple[Word, ...] = ("succeeded", "failed", "stuck", "unbought")
_OURS = (
    "SpecValid",
    "NodeClaimReady",
    "NodesReady",
    "ResourceReady",
    "JobStarted",
    "WorkspaceSucceeded",
    "InferenceReady",
    "ConfigChanged",
)
_LONGEST = 4000  # characters of a condition's message; the API allows 32768
Claim = tuple[str, str, str, str]  # type, status, reason, message of a condition


def status(seen: Seen, stage: Stage, options: Options) -> Object:
    """The whole status of a Workspace: what it does not say is taken away."""
    old = seen.recorded
    if seen.serving:
        return _serving(seen, stage, options)
    if stage.word == "finished":
        told = _with(old, seen, [_config_changed(seen)])
        if "revision" in old:
            return told
        # KAITO's controller finished it: nothing runs again, unless it is edited.
        over = {"completionTime": stamp(seen.now), "state": "Succeeded"}
        return told | over | {"revision": seen.wanted.revision}
    same = old.get("revision") == seen.wanted.revision
    found: Object = {
        "observedGeneration": seen.workspace["metadata"]["generation"],
        "state": _state(seen, stage),
        "ready": "True" if stage.word == "succeeded" else "False",
        "revision": seen.wanted.revision,
        "targetNodeCount": 1,
        "outputs": old.get("outputs") or [],
        "plan": _plan(seen),
        "progress": _progress(seen, old.get("progress") if same else None),
    }
    if stage.word in ("creating", "refused"):
        found["job"] = names.job_name(seen.workspace, seen.wanted)
    elif kept := seen.job or seen.old:
        found["job"] = kept["metadata"]["name"]
    if seen.job:
        found["startTime"] = seen.job["metadata"]["creationTimestamp"]
        found["retries"] = (seen.job.get("status") or {}).get("failed")
        found["configDigest"] = names.config_of(seen.job)
    if nodes := sorted({p["spec"]["nodeName"] for p in seen.pods if p["spec"].get("nodeName")}):
        found["workerNodes"] = nodes
    if asked := attempts(seen) + (stage.word == "buying" and not seen.machines):
        found["nodeAttempts"] = 0 if stage.word == "running" else asked
    found["zone"] = zone(seen)
    if stage.word in _ENDED:
        ended = same and old.get("completionTime")
        found["completionTime"] = ended or _ended_at(seen)
    if _STATE.get(stage.word) == "Failed":
        found["failure"] = _failure(stage.trouble)
    if stage.word == "succeeded" and "inference" in seen.workspace:
        found |= {"state": "NotReady", "ready": "False"}  # until the adapter is served
    if stage.word == "succeeded":
        found |= _result(seen, found["outputs"])
    found = {key: value for key, value in found.items() if value not in (None, "", {}, [], 0)}
    return _with(found, seen, _conditions(seen, stage, options))


def _serving(seen: Seen, stage: Stage, options: Options) -> Object:
    """The status while it serves; what the tuning came to stays as it was told."""
    old, word, trouble = seen.recorded, stage.word, stage.trouble
    tuned = "tuning" in seen.workspace
    found: Object = {k: v for k, v in old.items() if k != "failure"} if tuned else {}
    ready = word == "ready"
    waits = word in ("buying", "queued", "deploying", "starting")
    was = old.get("state") in ("Ready", "NotReady")
    found |= {
        "state": "Ready" if ready else "Pending" if waits and not was else "NotReady",
        "ready": "True" if ready else "False",
        "revision": seen.wanted.revision,
        "targetNodeCount": 1,
    }
    if nodes := sorted({p["spec"]["nodeName"] for p in seen.pods if p["spec"].get("nodeName")}):
        found["workerNodes"] = nodes
    asked = attempts(seen) + (word == "buying" and not seen.machines)
    found["nodeAttempts"] = 0 if ready else asked
    if not ready and not waits:
        found["failure"] = _failure(trouble)
    found = {key: value for key, value in found.items() if value not in (None, "", {}, [], 0)}
    kept = [
        (c["type"], c["status"], c["reason"], c["message"])
        for c in old.get("conditions") or []
        if tuned and c["type"] in ("JobStarted", "WorkspaceSucceeded", "ConfigChanged")
    ]
    return _with(found, seen, [*kept, *_serving_conditions(seen, stage, options)])


def _serving_conditions(seen: Seen, stage: Stage, options: Options) -> list[Claim]:
    word, trouble, server = stage.word, stage.trouble, seen.wanted.server
    what = f"{trouble.message}. Change: {trouble.hint}" if trouble.hint else trouble.message
    if word == "invalid":
        return [
            ("SpecValid", "False", trouble.reason, what),
            ("InferenceReady", "False", trouble.reason, what),
        ]
    note = f"; {server.note}" if server and server.note else ""
    claims: list[Claim] = [("SpecValid", "True", "SpecValid", f"the Workspace is valid{note}")]
    if names.bought(seen.wanted, options) and word != "misfit":
        claims += _machine_conditions(seen, word, trouble)
    claims.append(_resource(word, trouble))
    if word == "ready":
        done = "Inference has been deployed successfully"
        return [*claims, ("InferenceReady", "True", "WorkspaceInferenceStatusSuccess", done)]
    reason = trouble.reason or "WorkspaceInferenceStatusPending"
    return [
        *claims,
        ("InferenceReady", "False", reason, what or "Inference workload is not ready"),
    ]


def farewell(seen: Seen, left: list[tuple[Kind, Object]]) -> Object:
    """The status of a Workspace that is being deleted: what it still waits for, by name."""
    what = ", ".join(f"{kind.name} {item['metadata']['name']}" for kind, item in left)
    message = f"workspace is being deleted; waiting for {what} to go"
    return _with(seen.recorded, seen, [("WorkspaceDeleting", "True", "workspaceDeleted", message)])


def _state(seen: Seen, stage: Stage) -> str:
    """Running stays Running while a pod that was lost is replaced."""
    was = seen.recorded
    again = was.get("state") == "Running" and was.get("revision") == seen.wanted.revision
    if again and stage.word in ("pending", "buying", "creating"):
        return "Running"
    return _STATE.get(stage.word, "Pending")


def _ended_at(seen: Seen) -> str:
    times = [
        each["lastTransitionTime"]
        for kind in ("Complete", "Failed")
        if seen.job and (each := objects.condition(seen.job, kind))
    ]
    return times[0] if times and times[0] else stamp(seen.now)


def _failure(trouble: Trouble) -> Object:
    found = {
        "reason": trouble.reason,
        "message": trouble.message[:_LONGEST],
        "hint": trouble.hint[:_LONGEST],
        "phase": trouble.phase,
        "exitCode": trouble.code,
    }
    return {key: value for key, value in found.items() if value not in (None, "")}


def _result(seen: Seen, outputs: list[str]) -> Object:
    """What the engine said when it had finished: the digest, and what it took."""
    told = next((t for p in seen.pods if (t := objects.outcome(p)).get("digest")), {})
    digest, image = told.get("digest"), seen.workspace["tuning"]["output"].get("image")
    output = {"image": image, "digest": digest, "baseRevision": told.get("baseRevision")}
    return {
        "output": {key: value for key, value in output.items() if value},
        "outputs": [*(d for d in outputs if d != digest), digest][-50:] if digest else outputs,
        "peakMemoryBytes": told.get("peakMemoryBytes"),
    }


def _plan(seen: Seen) -> Object:
    """The plan in short, as far as there is one before the data is read."""
    wanted, where = seen.wanted, names.claim_name(seen.workspace)
    if not seen.storage:
        where = "emptyDir: a new pod starts from the beginning"
    if wanted.spec is None:
        return seen.recorded.get("plan") or {} if seen.job else {}
    if wanted.plan is None:
        summary = f"PlanUnknown: {wanted.unknown}; the Job decides" if wanted.unknown else None
        told = {"summary": summary, "runVolume": where, "rank": wanted.spec.settings.rank}
        return {k: v for k, v in told.items() if v}
    recipe = wanted.plan.recipe
    found = {
        "summary": _summary(wanted.plan),
        "baseModel": f"{recipe.base_model}@{recipe.base_revision}",
        "device": str(wanted.plan.device),
        "peakMemoryBytes": wanted.plan.fit.memory.total if wanted.plan.fit else None,
        "runVolume": where,
        "rank": recipe.rank,
    }
    return {key: value for key, value in found.items() if value}


def _summary(plan: Plan) -> str:
    recipe, placement = plan.recipe, plan.placement
    gpus = f"{placement.ranks} x " if placement.ranks > 1 else ""
    return (
        f"{recipe.method} of rank {recipe.rank} in {recipe.precision} on {gpus}{plan.device.name}, "
        f"{recipe.max_length} tokens, {recipe.epochs:g} epochs"
    )


def _progress(seen: Seen, before: Object | None) -> Object:
    """The last word of the running pod, of the pod that ended, or what was known before."""
    told = next((t for p in reversed(seen.pods) if "step" in (t := objects.outcome(p))), None)
    record = seen.progress or told
    if not record or not all(_count(record.get(name, 0)) for name in ("step", "steps")):
        return before or {}
    names_ = (("step", "step"), ("steps", "steps"), ("epoch", "epoch"), ("loss", "loss"))
    more = (("tokensPerSecond", "tokens_per_second"), ("etaSeconds", "eta_seconds"))
    found = {
        key: record[name] for key, name in (*names_, *more) if objects.number(record.get(name))
    }
    if "step" not in found:
        return before or {}
    return {"text": _progress_text(found), **found}


def _count(value: object) -> bool:
    return isinstance(value, int) and objects.number(value) and value >= 0


def _progress_text(found: dict[str, Any]) -> str:
    step, steps = found["step"], found.get("steps")
    text = f"{step}/{steps} ({100 * step // steps}%)" if steps else str(step)
    left = found.get("etaSeconds")
    if not left or left < 0 or step == steps:
        return text
    minutes = -(-int(left) // 60)
    return f"{text} {f'{minutes // 60}h{minutes % 60:02}m' if minutes >= 60 else f'{minutes}m'}"


def _with(found: Object, seen: Seen, claims: list[Claim]) -> Object:
    """`found` with `claims` as conditions; those that did not change keep their time."""
    before = {c["type"]: c for c in seen.recorded.get("conditions") or []}
    ours = () if found is seen.recorded else _OURS
    kept = {kind: each for kind, each in before.items() if kind not in ours}  # others' words stay
    generation = seen.workspace["metadata"]["generation"]
    for kind, value, reason, message in claims:
        if not value:
            kept.pop(kind, None)
            continue
        was = before.get(kind, {})
        changed = was.get("status") != value
        kept[kind] = {
            "type": kind,
            "status": value,
            "reason": reason,
            "message": clean(message, _LONGEST),
            "lastTransitionTime": stamp(seen.now) if changed else was["lastTransitionTime"],
            "observedGeneration": generation,
        }
    return {**found, "conditions": list(kept.values()), "observedGeneration": generation}


def _conditions(seen: Seen, stage: Stage, options: Options) -> list[Claim]:
    """KAITO's conditions, in the order in which they turn True, and ours."""
    word, trouble = stage.word, stage.trouble
    why = f"{trouble.reason}: {trouble.message}" if trouble.message else ""
    invalid = word == "invalid"
    claims: list[Claim] = [
        ("SpecValid", "False", trouble.reason, trouble.message)
        if invalid
        else ("SpecValid", "True", "SpecValid", "the Workspace is valid")
    ]
    if invalid:
        return [*claims, *_job_conditions(word, trouble, why)]
    if names.bought(seen.wanted, options) and word != "misfit":
        claims += _machine_conditions(seen, word, trouble)
    claims.append(_resource(word, trouble))
    claims += _job_conditions(word, trouble, why)
    if "inference" in seen.workspace:
        what = "the adapter is served when it has been tuned"
        claims.append(("InferenceReady", "False", "WorkspaceInferenceStatusPending", what))
    return [*claims, _config_changed(seen)]


def _machine_conditions(seen: Seen, word: Word, trouble: Trouble) -> list[Claim]:
    missing = word == "refused" and not seen.machines
    if word in ("buying", "unbought", "queued") or missing:
        return [
            ("NodeClaimReady", "False", "NodeClaimNotReady", trouble.message),
            ("NodesReady", "False", "NodeNotReady", "Not enough Nodes are ready"),
        ]
    return [
        ("NodeClaimReady", "True", "NodeClaimsReady", "Enough NodeClaims are ready"),
        ("NodesReady", "True", "NodesReady", "Enough Nodes are ready with GPU resources"),
    ]


def _resource(word: Word, trouble: Trouble) -> Claim:
    if word in ("misfit", "buying", "unbought", "queued", "replacing", "conflict", "refused"):
        return ("ResourceReady", "False", trouble.reason, trouble.message)
    if word == "deploying":
        reason = "workspaceResourceStatusNotReady"
        return ("ResourceReady", "False", trouble.reason or reason, trouble.message)
    if word == "creating":
        reason = trouble.reason or "workspaceResourceStatusNotReady"
        return ("ResourceReady", "False", reason, trouble.message or "the Job is being made")
    if trouble.reason == "Unschedulable":
        return ("ResourceReady", "False", "Unschedulable", trouble.message)
    if word == "pending" and trouble.reason == "PodPending":
        return ("ResourceReady", "False", "workspaceResourceStatusNotReady", trouble.message)
    done = "workspace resource is ready"
    return ("ResourceReady", "True", "workspaceResourceStatusSuccess", done)


def _job_conditions(word: Word, trouble: Trouble, why: str) -> list[Claim]:
    started, succeeded = "JobStarted", "WorkspaceSucceeded"
    if word in ("running", "succeeded"):
        now = (started, "True", "WorkspaceTuningJobStatusStarted", "Tuning job has started")
        if word == "succeeded":
            return [now, (succeeded, "True", "workspaceSucceeded", "workspace succeeds")]
        what = "workspace has not completed yet, tuning job is running"
        return [now, (succeeded, "False", trouble.reason or "workspacePending", why or what)]
    if _STATE.get(word) == "Failed":
        reason = "WorkspaceTuningJobStatusFailed"
        what = f"{why}. Change: {trouble.hint}" if trouble.hint else why
        return [
            (started, "False", reason, f"tuning job failed: {what}"),
            (succeeded, "False", "workspaceFailed", f"tuning job failed: {what}"),
        ]
    known = trouble.reason and trouble.reason != "PodPending"
    reason = trouble.reason if known else "WorkspaceTuningJobStatusPending"
    what = "workspace is initializing, tuning job has not started"
    return [
        (started, "False", reason, trouble.message or "Tuning job has not started"),
        (succeeded, "False", "workspacePending", what),
    ]


def _config_changed(seen: Seen) -> Claim:
    """Says when the ConfigMap is no longer the one that the Job was given; nothing runs again."""
    given = names.config_of(seen.job) if seen.job else seen.recorded.get("configDigest")
    now = seen.wanted.config_digest
    if not given or not now or given == now:
        return ("ConfigChanged", "", "", "")
    what = "the ConfigMap changed after the Job was made; edit the Workspace to run with it"
    return ("ConfigChanged", "True", "ConfigMapEdited", what)
