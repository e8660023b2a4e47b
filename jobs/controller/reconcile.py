"""One Workspace: observe, decide, act.

Level-triggered: nothing is remembered between calls but what the API server stores, so that a
replayed, dropped or stale event changes nothing, and a crash between any two writes is repaired by
the next call. A Job's name is the hash of what it is for: there are never two of them.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal

from jobs.api.client import (
    CLAIM,
    DEPLOYMENT,
    JOB,
    NETWORK_POLICY,
    NODE_CLAIM,
    SERVICE,
    WORKSPACE,
    ApiError,
    Cluster,
    Kind,
    Object,
)
from jobs.api.options import Options
from jobs.controller import preflight
from jobs.desired import names
from jobs.desired import tuning as desired
from jobs.manifests import job as manifests
from jobs.manifests import server
from jobs.observed import objects
from jobs.observed.objects import Trouble
from jobs.observed.observe import Context, observe
from jobs.observed.phase import Seen, Stage, Word, attempts, judge, zone
from jobs.observed.status import farewell, status

log = logging.getLogger(__name__)

_AGAIN: dict[Word, float] = {  # seconds until the next look, where no event would ask for one
    "invalid": 30,
    "replacing": 5,
    "buying": 10,
    "queued": 60,
    "creating": 2,
    "pending": 30,
    "running": 15,
    "deploying": 2,
    "starting": 15,
    "unready": 30,
    "ready": 60,
    "refused": 60,
    "conflict": 60,
    "stuck": 1,
    "succeeded": 1,
    "failed": 1,
    "unbought": 1,
}
_ENDED = ("stuck", "succeeded", "failed", "unbought")  # the machine is given back next
_SOONEST = 5.0  # seconds between looks at a young pod whose volumes are not there


@dataclass(frozen=True)
class Decision:
    """What is to be done, in this order."""

    finalizers: list[str] | None = None
    status: Object | None = None
    delete: tuple[tuple[Kind, Object], ...] = ()
    create: tuple[tuple[Kind, Object], ...] = ()
    put_back: tuple[tuple[Kind, Object], ...] = ()  # as they should be, with their version
    again: float | None = None  # seconds until the next look
    stage: Stage = field(default_factory=lambda: Stage("finished"))


@dataclass(frozen=True)
class Look:
    """What one look at a Workspace came to."""

    again: float | None = None  # seconds until the next one; None: an event will ask for it
    state: str | None = None  # of the Workspace; None: it is gone, or not ours
    promptly: bool = False  # there is something to do then: it is no look in passing


def reconcile(
    context: Context, namespace: str, name: str, *, arrived: Object | None = None
) -> Look:
    """Bring one Workspace a step nearer to what it wants.

    `arrived`: a new Workspace as an event showed it. It need not be read again: the first write is
    its status, which the server refuses with a conflict if this is not the newest version.
    Raises ApiError.
    """
    workspace = arrived or context.cluster.get(WORKSPACE, namespace, name)
    if workspace is None:
        return Look()  # gone; its children go by their owner references
    if context.options.beside_kaito == "opt-in" and names.annotation(workspace, "opt-in") != "true":
        return Look()  # KAITO's
    seen = observe(context, workspace)
    decision = decide(seen, context.options)
    refused = act(context, seen, decision)
    state = (decision.status or seen.recorded).get("state")
    if refused:
        return Look(_AGAIN["refused"], state)
    ended = decision.stage.word in _ENDED and decision.again is not None
    return Look(decision.again, state, promptly=ended and not seen.serving)


def decide(seen: Seen, options: Options) -> Decision:
    """What to do about what was seen. Pure."""
    if seen.workspace["metadata"].get("deletionTimestamp"):
        return _farewell(seen)
    stage = judge(seen, options)
    decision = Decision(status=status(seen, stage, options), again=_again(seen, stage), stage=stage)
    match stage.word:
        case "finished":
            return replace(decision, **_cleanup(seen, options))
        case "replacing":
            gone = [(JOB, seen.old)] if seen.old else []
            gone += [(DEPLOYMENT, seen.server)] if seen.server else []
            return replace(decision, delete=tuple(gone))
        case "buying":
            return replace(decision, **_buy(seen, options))
        case "creating":
            return replace(decision, create=_children(seen, options))
        case "deploying":
            return replace(decision, **_deploy(seen, options))
        case "starting" | "unready" | "ready":
            return replace(decision, **_keep_serving(seen, options))
        case "invalid" | "misfit" | "conflict" | "queued" if not seen.server:
            return replace(decision, delete=_machines(seen))
        case "unbought" if seen.serving:
            return replace(decision, delete=_machines(seen))
        case "pending" | "running":
            return replace(decision, **_mended(seen, options))
    return decision


def _again(seen: Seen, stage: Stage) -> float | None:
    """No change of Job or pod tells of a Secret or volume that is missing, or of a quota: who waits
    for one is asked, later and later."""
    usual = _AGAIN.get(stage.word)
    if stage.word == "unbought" and seen.serving:  # an edit asks anew
        return _AGAIN["refused"]
    last = objects.newest(seen.pods) or seen.job
    if usual is None or stage.word != "pending" or last is None:
        return usual
    if seen.pods and not objects.scheduled(last):
        return usual
    age = seen.now - objects.time(last["metadata"]["creationTimestamp"])
    return min(usual, max(_SOONEST, age.total_seconds() / 4))


def _children(seen: Seen, options: Options) -> tuple[tuple[Kind, Object], ...]:
    """What a run needs, the Job last: when it is there, everything is."""
    workspace, wish = seen.workspace, seen.wanted
    claim = seen.storage
    found: list[tuple[Kind, Object]] = []
    if claim and not seen.run_claim:
        found.append((CLAIM, manifests.run_claim(workspace, wish, options)))
    if options.network_policy:
        found.append((NETWORK_POLICY, manifests.network_policy(workspace, wish, options)))
    earlier = tuple(seen.recorded.get("outputs") or ())
    job = manifests.job(workspace, wish, options, claim=claim, earlier=earlier)
    return (*found, (JOB, job))


def _deploy(seen: Seen, options: Options) -> dict[str, Any]:
    """What a server needs, made or brought to what the Workspace says now."""
    workspace, wish = seen.workspace, seen.wanted
    made: list[tuple[Kind, Object]] = []
    changed: list[tuple[Kind, Object]] = []
    if seen.storage and not seen.run_claim:
        made.append((CLAIM, manifests.run_claim(workspace, wish, options)))
    new, mended = _server_policy(seen, options)
    made += new
    changed += mended
    service = server.service(workspace, wish)
    if seen.service is None:
        made.append((SERVICE, service))
    else:
        spec = seen.service["spec"] | service["spec"]
        changed.append((SERVICE, seen.service | {"spec": spec}))
    deployment = server.deployment(workspace, wish, options, claim=seen.storage)
    if seen.server is None:
        made.append((DEPLOYMENT, deployment))
    elif names.revision_of(seen.server) != names.revision_of(deployment):
        meta = seen.server["metadata"] | {"labels": deployment["metadata"]["labels"]}
        spec = deployment["spec"] | {"replicas": seen.server["spec"].get("replicas", 1)}
        changed.append((DEPLOYMENT, seen.server | {"metadata": meta, "spec": spec}))
    return {"create": tuple(made), "put_back": tuple(changed)}


def _server_policy(
    seen: Seen, options: Options
) -> tuple[list[tuple[Kind, Object]], list[tuple[Kind, Object]]]:
    """(made, put back) of a server's network policy, so that it is what the Workspace says now."""
    policy = manifests.server_policy(seen.workspace, seen.wanted, options)
    if options.network_policy and (not seen.server or seen.policy == "gone"):
        return [(NETWORK_POLICY, policy)], []
    if isinstance(seen.policy, dict) and seen.policy["spec"] != policy["spec"]:
        return [], [(NETWORK_POLICY, seen.policy | {"spec": policy["spec"]})]
    return [], []


def _keep_serving(seen: Seen, options: Options) -> dict[str, Any]:
    """The Job that made the adapter goes after a while; a claim that is gone is made again, and so
    is a network policy that was taken away or changed."""
    made, changed = _server_policy(seen, options)
    if seen.storage and not seen.run_claim:
        made.append((CLAIM, manifests.run_claim(seen.workspace, seen.wanted, options)))
    gone = []
    if seen.job and "completionTime" in seen.recorded:
        until = objects.time(seen.recorded["completionTime"])
        if seen.now >= until + timedelta(seconds=options.keep_seconds):
            gone.append((JOB, seen.job))
    return {"create": tuple(made), "delete": tuple(gone), "put_back": tuple(changed)}


def _mended(seen: Seen, options: Options) -> dict[str, Any]:
    """What others took away or changed is put back. The Job itself is left to who edits it."""
    made: list[tuple[Kind, Object]] = []
    last = objects.newest(seen.pods)
    if seen.storage and not seen.run_claim and last and not objects.scheduled(last):
        made.append((CLAIM, manifests.run_claim(seen.workspace, seen.wanted, options)))
    if seen.policy in ("unasked", "whole"):
        return {"create": tuple(made)}
    wish = desired.read(seen.workspace, seen.config_map, None)
    if wish.spec is None:  # its ConfigMap is gone: the policy cannot be told any more
        return {"create": tuple(made)}
    policy = manifests.network_policy(seen.workspace, wish, options)
    if isinstance(seen.policy, str):
        made.append((NETWORK_POLICY, policy))
    elif seen.policy["spec"] != policy["spec"]:
        changed = seen.policy | {"spec": policy["spec"]}
        return {"create": tuple(made), "put_back": ((NETWORK_POLICY, changed),)}
    return {"create": tuple(made)}


def _buy(seen: Seen, options: Options) -> dict[str, Any]:
    """A machine, if none is on its way; one that failed is given back first."""
    states = [(m, objects.claim_state(m, options.nodes, seen.now)[0]) for m in seen.machines]
    failed = tuple((NODE_CLAIM, machine) for machine, word in states if word == "failed")
    if len(failed) < len(states):
        return {"delete": failed}
    number = attempts(seen) + 1
    claim = manifests.node_claim(
        seen.workspace, seen.wanted, options, attempt=number, zone=zone(seen)
    )
    return {
        "finalizers": _with_finalizer(seen.workspace),
        "delete": failed,
        "create": ((NODE_CLAIM, claim),),
    }


def _with_finalizer(workspace: Object) -> list[str] | None:
    """Machines are no children in Kubernetes' eyes: their end is ours to see to."""
    have = workspace["metadata"].get("finalizers") or []
    return None if names.FINALIZER in have else [*have, names.FINALIZER]


def _machines(seen: Seen) -> tuple[tuple[Kind, Object], ...]:
    """The machines that are given back, for nothing runs on them."""
    if names.annotation(seen.workspace, "keep-node") == "true":
        return ()
    alive = [m for m in seen.machines if not m["metadata"].get("deletionTimestamp")]
    return tuple((NODE_CLAIM, machine) for machine in alive)


def _cleanup(seen: Seen, options: Options) -> dict[str, Any]:
    """After the end is recorded: machines and run volume go at once, the Job after a while."""
    gone: list[tuple[Kind, Object]] = [*_machines(seen)]
    again = None
    if seen.job:
        over = objects.job_state(seen.job) in ("complete", "failed")
        until = objects.time(seen.recorded["completionTime"])
        until += timedelta(seconds=options.keep_seconds)
        if not over or seen.now >= until:
            gone.append((JOB, seen.job))
        else:
            again = (until - seen.now).total_seconds() + 1
    if seen.run_claim and names.owned(seen.run_claim, seen.workspace["metadata"]["uid"]):
        gone.append((CLAIM, seen.run_claim))
    alive = tuple(
        (kind, item) for kind, item in gone if not item["metadata"].get("deletionTimestamp")
    )
    return {"delete": alive, "again": again}


def _farewell(seen: Seen) -> Decision:
    """The Workspace is being deleted: stop the work, give machines back, then let it go."""
    left: list[tuple[Kind, Object]] = [(JOB, job) for job in (seen.job, seen.old) if job]
    left += [(DEPLOYMENT, seen.server)] if seen.server else []
    left += [(NODE_CLAIM, machine) for machine in seen.machines]
    have = seen.workspace["metadata"].get("finalizers") or []
    if left:
        alive = tuple(
            (kind, item) for kind, item in left if not item["metadata"].get("deletionTimestamp")
        )
        return Decision(status=farewell(seen, left), delete=alive, again=2)
    if names.FINALIZER in have:
        return Decision(finalizers=[each for each in have if each != names.FINALIZER])
    return Decision()


def act(context: Context, seen: Seen, decision: Decision) -> bool:
    """Carry a decision out. The status comes first, as a note of the intent and as a lock: of two
    writers the slower one gets a conflict there, and deletes and creates nothing.

    A creation that the server refuses for good becomes a condition: then True is returned.
    """
    cluster, workspace = context.cluster, seen.workspace
    if decision.finalizers is not None:
        stored = cluster.set_finalizers(WORKSPACE, workspace, decision.finalizers)
        if stored is None:
            return False
        workspace = stored
    if decision.status is not None:
        told = _tell(cluster, workspace, decision.status)
        if told is None:
            return False
        workspace = told
    for kind, item in decision.delete:
        cluster.delete(kind, item)
    try:
        for kind, item in decision.create:
            if cluster.create(kind, item) is None and kind in (CLAIM, DEPLOYMENT, SERVICE):
                return False  # whose it is must be seen before a run writes into it
        for kind, item in decision.put_back:
            cluster.replace(kind, item)
    except ApiError as error:
        asked = workspace.get("status") or {}
        if decision.stage.word == "buying":  # in vain: no machine was asked of the cloud
            before = {"nodeAttempts": attempts(seen)}
            workspace = workspace | {"status": asked | before}
        if error.passing:
            if decision.stage.word == "buying":
                with contextlib.suppress(ApiError):
                    cluster.replace_status(WORKSPACE, workspace, workspace["status"])
            raise
        refused = Stage("refused", Trouble(objects.word(error.reason), error.message))
        now = replace(seen, workspace=workspace)
        _tell(cluster, workspace, status(now, refused, context.options))
        return True
    return False


def _tell(cluster: Cluster, workspace: Object, told: Object) -> Object | None:
    """The Workspace after its status and events for its transitions were written, if it says
    something new; None if it is gone."""
    recorded = workspace.get("status") or {}
    if told == recorded:
        return workspace
    stored = cluster.replace_status(WORKSPACE, workspace, told)
    if stored is None:
        return None
    if "revision" in told and "revision" not in (stored.get("status") or {}):
        raise preflight.foreign()  # before anything is made that would be forgotten
    for kind, reason, note in transitions(recorded, told):
        cluster.event(workspace, kind=kind, reason=reason, note=note)
    return stored


def transitions(old: Object, new: Object) -> list[tuple[Literal["Normal", "Warning"], str, str]]:
    """(kind, reason, note) of each condition that now says something else."""
    before = {c["type"]: (c["status"], c["reason"]) for c in old.get("conditions") or []}
    found: list[tuple[Literal["Normal", "Warning"], str, str]] = []
    seen_notes = set()
    for each in new.get("conditions") or []:
        was, now = before.get(each["type"]), (each["status"], each["reason"])
        usual = was is None and (each["type"] == "SpecValid") == (each["status"] == "True")
        usual = usual and new.get("state") == "Pending"
        if was == now or usual or each["message"] in seen_notes:
            continue
        seen_notes.add(each["message"])
        bad = new.get("state") in ("Failed", "NotReady") and each["status"] == "False"
        found.append(("Warning" if bad else "Normal", each["reason"], each["message"]))
    return found
