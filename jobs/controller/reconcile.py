"""One reconcile of one Workspace: observe, decide, act.

Level-triggered: no state is kept between calls but what the API server stores, so that a replayed,
dropped or stale event changes nothing, and the next call repairs a crash between any two writes. A
Job's name is a hash of what it runs: there are never two of them.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Literal

from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import CLAIM, DEPLOYMENT, SERVICE, WORKSPACE, Object
from jobs.controller import preflight
from jobs.controller.decide import REQUEUE_SECONDS, Decision, decide
from jobs.desired import names
from jobs.observed.conditions import FAILED, SUMMARY
from jobs.observed.nodes import Nodes, nodes_of
from jobs.observed.observe import Context, observe
from jobs.observed.phase import node_attempts, refusal
from jobs.observed.phases import Observed, Phase, after_deadline
from jobs.observed.status import ENDED, status


@dataclass(frozen=True)
class Result:
    """The result of one reconcile."""

    requeue_after: float | None = None  # seconds; None: wait for an event
    state: str | None = None  # of the Workspace; None: it is gone, or not ours
    has_work: bool = False  # the next reconcile has something to do, not only to check
    failure: str = ""  # reason of a failure that this reconcile has recorded
    exit_code: int | None = None  # of the engine, if it failed
    nodes: Nodes | None = None  # provisioned


def reconcile(
    context: Context, namespace: str, name: str, *, from_event: Object | None = None
) -> Result:
    """Bring one Workspace a step nearer to its desired state.

    `from_event`: a new Workspace as an event showed it, which saves a read. If it is stale, the
    first write, its status, fails with a conflict. Raises ApiError.
    """
    workspace = from_event or context.cluster.get(WORKSPACE, namespace, name)
    if workspace is None:
        return Result()  # gone; owner references take care of its objects
    if context.options.beside_kaito == "opt-in" and names.annotation(workspace, "opt-in") != "true":
        return Result()  # KAITO's
    observed = observe(context, workspace)
    decision = decide(observed, context.options)
    refused = act(context, observed, decision)
    state = (decision.status or observed.recorded).get("state")
    phase = refused or decision.phase
    found = replace(_failure(observed, phase), state=state, nodes=nodes_of(observed, phase))
    if refused:
        return replace(found, requeue_after=REQUEUE_SECONDS[refused.name])
    has_ended = phase.name in ENDED and decision.requeue_after is not None
    has_work = has_ended and not observed.serving
    return replace(found, requeue_after=decision.requeue_after, has_work=has_work)


def _failure(observed: Observed, phase: Phase) -> Result:
    """The failure in the new status, if it was not in the stored one."""
    if phase.name not in (*FAILED, "unready"):
        return Result()
    stored, meta = observed.recorded, observed.workspace["metadata"]
    before = (stored.get("failure") or {}).get("reason")
    if before == phase.cause.reason and stored.get("observedGeneration") == meta["generation"]:
        return Result()
    return Result(failure=phase.cause.reason or "Failed", exit_code=phase.cause.code)


def act(context: Context, observed: Observed, decision: Decision) -> Phase | None:
    """Write what was decided. The status is first, as a record of the intent and as a lock: of two
    writers, the slower one gets a conflict there, and deletes and creates nothing.

    Returns the phase if the API server refused an object, which becomes a condition: `refused`,
    or, if a provisioned node has waited for it too long, `stuck`.
    """
    cluster, workspace = context.cluster, observed.workspace
    try:
        for kind, item in decision.rehearse:
            cluster.rehearse(kind, item)
    except ApiError as error:
        return _refused(context, observed, error)
    if decision.finalizers is not None:
        stored = cluster.set_finalizers(WORKSPACE, workspace, decision.finalizers)
        if stored is None:
            return None
        workspace = stored
    if decision.status is not None:
        stored = _store_status(cluster, workspace, decision.status)
        if stored is None:
            return None
        workspace = stored
    for kind, item in decision.delete:
        cluster.delete(kind, item)
    try:
        for kind, item in decision.create:
            if cluster.create(kind, item) is None and kind in (CLAIM, DEPLOYMENT, SERVICE):
                return None  # check the owner of the existing one before a run writes into it
        for kind, item in decision.update:
            cluster.replace(kind, item)
    except ApiError as error:
        if decision.phase.name == "provisioning":  # no NodeClaim was created: it does not count
            attempts = {"nodeAttempts": node_attempts(observed)}
            workspace = workspace | {"status": (workspace.get("status") or {}) | attempts}
        return _refused(context, replace(observed, workspace=workspace), error)
    return None


def _refused(context: Context, observed: Observed, error: ApiError) -> Phase:
    """Store that an object was refused, in the words of who refused it; what may succeed a moment
    later is raised again, so that it is tried sooner."""
    cluster, options = context.cluster, context.options
    cause = refusal(error.status, error.message)
    phase = after_deadline(observed, Phase("refused", cause), options)
    if not error.is_transient or phase.name != "refused":
        _store_status(cluster, observed.workspace, status(observed, phase, options))
        return phase
    new: Object = observed.workspace.get("status") or {}
    if error.status == 429 or error.status >= 500:
        new = status(observed, phase, options)
    with contextlib.suppress(ApiError):
        _write_status(cluster, observed.workspace, new)
    raise error


def _store_status(cluster: Cluster, workspace: Object, new: Object) -> Object | None:
    """The Workspace with the status `new`, written if it differs; None if it is gone."""
    if new == (workspace.get("status") or {}):
        return workspace
    return _write_status(cluster, workspace, new)


def _write_status(cluster: Cluster, workspace: Object, new: Object) -> Object | None:
    """The Workspace with the status `new`, and an event per transition; None if it is gone. A stale
    Workspace is a conflict, so that no transition is reported twice."""
    stored = cluster.replace_status(WORKSPACE, workspace, new)
    if stored is None:
        return None
    if "revision" in new and "revision" not in (stored.get("status") or {}):
        raise preflight.foreign_crd()  # before anything is created that the status cannot record
    for kind, reason, note in _transitions(workspace.get("status") or {}, new):
        cluster.event(workspace, kind=kind, reason=reason, note=note)
    return stored


def _transitions(old: Object, new: Object) -> list[tuple[Literal["Normal", "Warning"], str, str]]:
    """(type, reason, note) of an event for each condition that changed; if none did, for a changed
    state."""
    before = {c["type"]: (c["status"], c["reason"]) for c in old.get("conditions") or []}
    events: list[tuple[Literal["Normal", "Warning"], str, str]] = []
    notes = set()
    for each in new.get("conditions") or []:
        if each["type"] in SUMMARY:  # another condition says the same
            continue
        was, now = before.get(each["type"]), (each["status"], each["reason"])
        is_initial = was is None and (each["type"] == "SpecValid") == (each["status"] == "True")
        is_initial = is_initial and new.get("state") == "Pending"
        if was == now or is_initial or each["message"] in notes:
            continue
        notes.add(each["message"])
        is_bad = new.get("state") in ("Failed", "NotReady") and each["status"] == "False"
        events.append(("Warning" if is_bad else "Normal", each["reason"], each["message"]))
    if events or not old.get("state") or old["state"] == new.get("state"):
        return events
    is_bad = new.get("state") in ("Failed", "NotReady")
    ready = next(c for c in new["conditions"] if c["type"] == "Ready")
    note = ready["message"] or f"the Workspace is {new['state']}"
    return [("Warning" if is_bad else "Normal", ready["reason"], note)]
