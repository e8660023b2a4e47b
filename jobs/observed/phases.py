"""The phases of a Workspace, what a provisioned node does in each of them, and its deadlines. Pure.

A node is paid for by the second. So in each phase it is given back, or the engine works on it, or
it waits, and then there is a deadline. PHASES is the table; `after_deadline` alone applies it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

from jobs.api.kinds import Object
from jobs.api.options import Options
from jobs.desired.tuning import Desired
from jobs.observed import group, objects
from jobs.observed.objects import Cause
from tuning.spec.workspace import ANNOTATION

# Names are internal: no object stores them.
PhaseName = Literal[
    "finished", "deploying", "starting", "unready", "ready", "invalid", "conflict", "replacing",
    "unfit", "provisioning", "unprovisioned", "creating", "refused", "queued", "pending", "stuck",
    "running", "succeeded", "failed",
]  # fmt: skip

Policy = Literal["unchecked", "missing"] | Object  # the stored network policy

RELEASED = "NodeReleased"  # reason of NodeClaimReady after a deadline
NODES_HINT = "try another instanceType"
LOADING_SECONDS = 3600  # in which a server's container that has started must become ready


class Row(NamedTuple):
    """What a phase means, what a provisioned node does in it, and what follows its deadline."""

    meaning: str
    requeue: float | None  # seconds until the next reconcile, if no event comes first
    node: Literal["released", "requested", "waits", "works"] = "released"
    then: Literal["", "refused", "released", "stuck", "unprovisioned"] = ""
    deadline: str = "stuckSeconds"  # the options that set it


PHASES: dict[PhaseName, Row] = {
    "provisioning": Row(
        "A node is being provisioned",
        10,
        "requested",
        "unprovisioned",
        "nodes.launchSeconds, nodes.registerSeconds, nodes.attempts, stuckSeconds",
    ),
    "creating": Row("The Job is created at once", 2, "waits", "refused", ""),
    "deploying": Row("The server is created or updated at once", 2, "waits", "refused", ""),
    "refused": Row("The API server refuses to create an object", 60, "waits", "stuck"),
    "pending": Row("No pod has started, also between two tries", 30, "waits", "stuck"),
    "starting": Row("The server's pod starts, or loads the model", 15, "waits", "stuck"),
    "unready": Row("The server's pod is not ready for a known cause", 30, "waits", "stuck"),
    "replacing": Row("An earlier Job or server is stopping", 5, "waits", "released"),
    "running": Row("The engine runs", 15, "works"),
    "ready": Row("The server answers", 60, "works"),
    # Only the node of an earlier server waits here.
    "queued": Row("Kueue or the limit of nodes holds the Job back", 60, then="released"),
    "invalid": Row("The spec, or an object that it names, is invalid", 30, then="released"),
    "conflict": Row("An object of another owner has the name", 60, then="released"),
    "unfit": Row("No GPU of the instance type is large enough", None, then="released"),
    "unprovisioned": Row("All attempts to provision a node failed", 1),
    "stuck": Row("A deadline has passed", 1),
    "succeeded": Row("The run succeeded", 1),
    "failed": Row("The run failed", 1),
    "finished": Row("The end is recorded: nothing runs again", None),
}
# In place of the row of `running` or `unready`.
NODE_LOST = Row("The node of the running pod does not respond", 15, "waits", "released")


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
    unshared: tuple[str, ...] = ()  # claims of the Workspace that only one node can mount
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
    is_overdue: bool = False  # its deadline has passed: the node is given back


def is_current(observed: Observed) -> bool:
    """Whether the stored status is of what is desired now."""
    if not observed.serving:
        return observed.is_recorded
    generation = observed.workspace["metadata"]["generation"]  # the revision is of `tuning` alone
    return observed.is_recorded and observed.recorded.get("observedGeneration") == generation


def row_of(phase: Phase) -> Row:
    """The row of the table that applies."""
    return NODE_LOST if phase.cause.reason == "NodeLost" else PHASES[phase.name]


def after_deadline(observed: Observed, phase: Phase, options: Options) -> Phase:
    """`phase`, or what follows its deadline if that has passed (the table is in `phases`)."""
    since, then = _waiting_since(observed, phase, options), row_of(phase).then
    last = objects.newest(observed.pods)
    seconds = options.stuck_seconds
    if observed.serving and last and objects.has_started(last):
        seconds = max(seconds, LOADING_SECONDS)
    if since is None or observed.now - since <= timedelta(seconds=seconds):
        return phase
    if then == "released":
        return replace(phase, is_overdue=True)
    cause, message = phase.cause, phase.cause.message or PHASES[phase.name].meaning
    if observed.node_claims:
        node = "node" if observed.desired.nodes == 1 else "nodes"
        message += f"; nothing ran on the provisioned {node} for {seconds} s"
    if then == "unprovisioned":
        return Phase("unprovisioned", replace(cause, message=message, hint=NODES_HINT))
    again = "edit `inference`" if observed.serving else f"set the annotation {ANNOTATION}rerun"
    hint = f"{cause.hint or 'remove the cause'}, then {again}"
    return Phase("stuck", replace(cause, message=message, hint=hint))


def _waiting_since(observed: Observed, phase: Phase, options: Options) -> datetime | None:
    """Since when a provisioned node has been waiting; None if none is, or the phase has no end.

    No pod restarts this time, as pods may be replaced for ever: only a run does, or a new node.
    """
    row, now = row_of(phase), observed.now
    if not row.then or row.then == "refused" or _answers(observed):
        return None
    held = [c for c in observed.node_claims if not c["metadata"].get("deletionTimestamp")]
    if phase.name == "provisioning":  # those that came wait for the others
        held = [each for each in held if objects.is_true(each, "Ready")]
    last = group.decisive(observed.pods, observed.desired.nodes)
    if not held:
        if phase.name != "pending" or last is None or not objects.is_scheduled(last):
            return None
        if not (objects.waiting(last, observed.warning) or objects.staying(last)):
            return None  # on a node of one's own, only a known problem has a deadline
        return max(objects.changed_at(last, "PodScheduled"), objects.ended_at(last))
    registered = timedelta(seconds=options.nodes.launch_seconds + options.nodes.register_seconds)
    times = [
        objects.changed_at(each, "Ready")
        if objects.is_true(each, "Ready")
        else objects.parse_time(each["metadata"]["creationTimestamp"]) + registered
        for each in held
    ]
    if row is NODE_LOST and (pod := group.lost(observed.pods)):
        return max([*times, objects.changed_at(pod, "Ready")])
    if phase.name == "replacing":
        stopping = (observed.previous_job, observed.server)
        stamps = [each["metadata"].get("deletionTimestamp") for each in stopping if each]
        return max([*times, *(objects.parse_time(stamp) if stamp else now for stamp in stamps)])
    if observed.job and phase.name != "provisioning":
        times.append(objects.parse_time(observed.job["metadata"]["creationTimestamp"]))
    kind = "InferenceReady" if observed.serving else "JobStarted"
    kind = "NodeClaimReady" if phase.name == "provisioning" else kind
    stored = objects.condition(observed.workspace, kind)
    if not stored or stored["status"] != "False" or not is_current(observed):
        return now
    return max([*times, objects.changed_at(observed.workspace, kind)])


def _answers(observed: Observed) -> bool:
    """Whether a server answers, be it of an earlier spec."""
    ready = ((observed.server or {}).get("status") or {}).get("readyReplicas")
    return bool(ready) or (
        observed.serving and any(objects.is_true(pod, "Ready") for pod in observed.pods)
    )
