"""One Workspace: observe, decide, act.

Level-triggered: nothing is remembered between calls but what the API server stores, so that a
replayed, dropped or stale event changes nothing, and a crash between any two writes is repaired by
the next call. A Job's name is the hash of what it is for: there are never two of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from jobs import children, manifests, names, wanted
from jobs.children import Trouble
from jobs.cluster import (
    CLAIM,
    CONFIG_MAP,
    CORE_EVENT,
    JOB,
    NETWORK_POLICY,
    NODE_CLAIM,
    POD,
    WORKSPACE,
    ApiError,
    Cluster,
    Kind,
    Object,
)
from jobs.options import Options
from jobs.site import Site
from jobs.stage import Seen, Stage, Word, attempts, judge
from jobs.status import status

log = logging.getLogger(__name__)

_AGAIN: dict[Word, float] = {  # seconds until the next look, where no event would ask for one
    "invalid": 30,
    "replacing": 5,
    "buying": 10,
    "creating": 2,
    "pending": 30,
    "running": 15,
    "refused": 60,
    "conflict": 60,
    "stuck": 1,
    "succeeded": 1,
    "failed": 1,
    "unbought": 1,
}
_SOONEST = 5.0  # seconds between looks at a young pod whose volumes are not there


@dataclass(frozen=True)
class Context:
    """What every reconcile shares."""

    cluster: Cluster
    options: Options
    site: Site
    poll: Callable[[Object], dict[str, Any] | None]  # pod -> its progress
    now: Callable[[], datetime] = lambda: datetime.now(UTC)


@dataclass(frozen=True)
class Decision:
    """What is to be done, in this order: finalizers, deletions, status, creations."""

    finalizers: list[str] | None = None
    delete: tuple[tuple[Kind, Object], ...] = ()
    create: tuple[tuple[Kind, Object], ...] = ()
    status: Object | None = None
    again: float | None = None  # seconds until the next look
    stage: Stage = field(default_factory=lambda: Stage("finished"))


def reconcile(
    context: Context, namespace: str, name: str, *, arrived: Object | None = None
) -> float | None:
    """Bring one Workspace a step nearer to what it wants.

    `arrived`: a new Workspace as an event showed it. It need not be read again: the first write is
    its status, which the server refuses with a conflict if this is not the newest version.

    Returns the seconds after which to look again, or None to wait for an event. Raises ApiError.
    """
    workspace = arrived or context.cluster.get(WORKSPACE, namespace, name)
    if workspace is None:
        return None  # gone; its children go by their owner references
    seen = observe(context, workspace)
    decision = decide(seen, context.options)
    act(context, seen, decision)
    return decision.again


def observe(context: Context, workspace: Object) -> Seen:
    """Everything about the Workspace, read now.

    Nothing is made before the status tells of it: without a status there is nothing to look for.
    """
    cluster, options = context.cluster, context.options
    namespace, uid = workspace["metadata"]["namespace"], workspace["metadata"]["uid"]
    config = (workspace.get("tuning") or {}).get("config")
    config_map = cluster.get(CONFIG_MAP, namespace, config) if config else None
    recorded, revision = workspace.get("status") or {}, wanted.revision(workspace)
    named = run_claim = None
    machines: tuple[Object, ...] = ()
    if recorded:
        named = cluster.get(JOB, namespace, wanted.short_name(workspace, revision))
    job = named if named and names.owned(named, uid) else None
    same = recorded.get("revision") == revision
    ended = same and "completionTime" in recorded
    if ended or (same and job and "plan" in recorded):
        wish = wanted.glance(workspace, config_map)
    else:
        known = not _own_nodes(workspace)
        device = None if known else context.site.device(names.selected(workspace))
        wish = wanted.read(workspace, config_map, device)
    pods = _pods(cluster, namespace, job) if job and not ended else ()
    last = children.newest(pods)
    if options.nodes.provision and recorded:
        machines = tuple(cluster.find(NODE_CLAIM, labels=f"{names.UID_LABEL}={uid}"))
    if recorded and (ended or not job):
        run_claim = cluster.get(CLAIM, namespace, names.claim_name(workspace))
    return Seen(
        workspace=workspace,
        wanted=wish,
        now=context.now(),
        job=job,
        old=_earlier_job(cluster, workspace, named),
        foreign=named is not None and job is None,
        pods=pods,
        mount_warning=_mount_warning(cluster, last) if last else None,
        machines=machines,
        progress=context.poll(last) if last and children.running(last) else None,
        run_claim=run_claim,
        storage=context.site.storage(),
    )


def _earlier_job(cluster: Cluster, workspace: Object, named: Object | None) -> Object | None:
    """The Job of an earlier spec, if it is still there. Its name was recorded before it was made,
    so that none is ever forgotten, and no list of all Jobs is needed to find it."""
    meta, name = workspace["metadata"], (workspace.get("status") or {}).get("job")
    if not name or (named and named["metadata"]["name"] == name):
        return None
    found = cluster.get(JOB, meta["namespace"], name)
    return found if found and names.owned(found, meta["uid"]) else None


def _own_nodes(workspace: Object) -> bool:
    return not (workspace.get("resource") or {}).get("instanceType")


def _pods(cluster: Cluster, namespace: str, job: Object) -> tuple[Object, ...]:
    """The pods of this very Job, oldest first; the newest truth only where it is the last word."""
    over = children.job_state(job) in ("complete", "failed")
    label = f"job-name={job['metadata']['name']}"
    found = cluster.find(POD, namespace, labels=label, cached=not over)
    own = [pod for pod in found if names.owned(pod, job["metadata"]["uid"])]
    return tuple(sorted(own, key=lambda pod: str(pod["metadata"]["creationTimestamp"])))


def _mount_warning(cluster: Cluster, pod: Object) -> str | None:
    """Why a pod with a node still has no container: a Secret or volume is missing."""
    if not children.scheduled(pod) or children.started(pod):
        return None
    meta = pod["metadata"]
    fields = f"involvedObject.uid={meta['uid']},reason=FailedMount"
    found = cluster.find(CORE_EVENT, meta["namespace"], fields=fields)
    last = max(found, key=lambda e: str(e.get("lastTimestamp") or ""), default=None)
    return last.get("message") if last else None


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
            return replace(decision, delete=((JOB, seen.old),) if seen.old else ())
        case "buying":
            return replace(decision, **_buy(seen, options))
        case "creating":
            return replace(decision, create=_children(seen, options))
    return decision


def _again(seen: Seen, stage: Stage) -> float | None:
    """No event tells of a Secret or volume that is missing: who waits for one is asked, later and
    later."""
    usual, last = _AGAIN.get(stage.word), children.newest(seen.pods)
    if usual and stage.word == "pending" and last and children.scheduled(last):
        age = seen.now - children.time(last["metadata"]["creationTimestamp"])
        return min(usual, max(_SOONEST, age.total_seconds() / 4))
    return usual


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


def _buy(seen: Seen, options: Options) -> dict[str, Any]:
    """A machine, if none is on its way; one that failed is given back first."""
    states = [(m, children.claim_state(m, options.nodes, seen.now)[0]) for m in seen.machines]
    failed = tuple((NODE_CLAIM, machine) for machine, word in states if word == "failed")
    if len(failed) < len(states):
        return {"delete": failed}
    number = attempts(seen) + 1
    claim = manifests.node_claim(seen.workspace, seen.wanted, options, attempt=number)
    return {
        "finalizers": _with_finalizer(seen.workspace),
        "delete": failed,
        "create": ((NODE_CLAIM, claim),),
    }


def _with_finalizer(workspace: Object) -> list[str] | None:
    """Machines are no children in Kubernetes' eyes: their end is ours to see to."""
    have = workspace["metadata"].get("finalizers") or []
    return None if names.FINALIZER in have else [*have, names.FINALIZER]


def _cleanup(seen: Seen, options: Options) -> dict[str, Any]:
    """After the end is recorded: machines and run volume go at once, the Job after a while."""
    gone: list[tuple[Kind, Object]] = []
    if names.annotation(seen.workspace, "keep-node") != "true":
        gone += [(NODE_CLAIM, machine) for machine in seen.machines]
    again = None
    if seen.job:
        over = children.job_state(seen.job) in ("complete", "failed")
        until = children.time(seen.recorded["completionTime"])
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
    left += [(NODE_CLAIM, machine) for machine in seen.machines]
    have = seen.workspace["metadata"].get("finalizers") or []
    if left:
        alive = tuple(
            (kind, item) for kind, item in left if not item["metadata"].get("deletionTimestamp")
        )
        return Decision(delete=alive, again=2)
    if names.FINALIZER in have:
        return Decision(finalizers=[each for each in have if each != names.FINALIZER])
    return Decision()


def act(context: Context, seen: Seen, decision: Decision) -> None:
    """Carry a decision out. The status comes before what is created, as a note of the intent and as
    a lock: of two writers the slower one gets a conflict there, and creates nothing.

    A creation that the server refuses for good becomes a condition.
    """
    cluster, workspace = context.cluster, seen.workspace
    if decision.finalizers is not None:
        stored = cluster.set_finalizers(WORKSPACE, workspace, decision.finalizers)
        if stored is None:
            return
        workspace = stored
    for kind, item in decision.delete:
        cluster.delete(kind, item)
    if decision.status is not None:
        told = _tell(cluster, workspace, decision.status)
        if told is None:
            return
        workspace = told
    try:
        for kind, item in decision.create:
            cluster.create(kind, item)
    except ApiError as error:
        if error.passing:
            raise
        refused = Stage("refused", Trouble(children.word(error.reason), error.message))
        now = replace(seen, workspace=workspace)
        _tell(cluster, workspace, status(now, refused, context.options))


def _tell(cluster: Cluster, workspace: Object, told: Object) -> Object | None:
    """The Workspace after its status and events for its transitions were written, if it says
    something new; None if it is gone."""
    recorded = workspace.get("status") or {}
    if told == recorded:
        return workspace
    stored = cluster.replace_status(WORKSPACE, workspace, told)
    if stored is None:
        return None
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
        bad = new.get("state") == "Failed" and each["status"] == "False"
        found.append(("Warning" if bad else "Normal", each["reason"], each["message"]))
    return found
