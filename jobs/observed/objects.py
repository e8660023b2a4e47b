"""Facts and causes read from Jobs, pods and NodeClaims. Pure."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from jobs.api import nesting
from jobs.api.kinds import Object
from jobs.api.options import Nodes
from jobs.manifests.pod import CONTAINER
from tuning.errors import REASONS, redact
from tuning.spec import reference

LONGEST = 1000  # characters of a message that came from a pod or a cloud
_COMMIT = re.compile("[0-9a-f]{40}")
_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
_START = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")


@dataclass(frozen=True)
class Cause:
    """Why something does not start, or how it ended: a CamelCase reason and a sentence."""

    reason: str
    message: str
    hint: str = ""
    phase: str = ""  # of the engine's run
    code: int | None = None


def condition(item: Object, kind: str) -> Object | None:
    """The condition of this type in an object's status."""
    for each in (item.get("status") or {}).get("conditions") or []:
        if each.get("type") == kind:
            found: Object = each
            return found
    return None


def is_true(item: Object, kind: str) -> bool:
    """Whether a condition is True."""
    return (condition(item, kind) or {}).get("status") == "True"


def parse_time(text: str) -> datetime:
    """A timestamp of the API."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def format_time(moment: datetime) -> str:
    """`moment` as the API writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def sanitize(text: object, limit: int = LONGEST) -> str:
    """Untrusted text on one line, without control characters and URL queries."""
    flat = " ".join(str(text)[: 4 * limit].split())
    shown = "".join(c for c in flat if unicodedata.category(c)[0] != "C")
    return redact(shown)[:limit]


def is_number(value: object) -> bool:
    """Whether an untrusted value is a number that JSON and the API server can hold."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and abs(value) < 1 << 53  # type: ignore[arg-type]  # false for NaN, too


def job_state(job: Object) -> Literal["complete", "failed", "suspended", "active"]:
    """From the Job's conditions alone: its count of failed pods does not tell whether it ended."""
    if is_true(job, "Complete"):
        return "complete"
    if is_true(job, "Failed"):
        return "failed"
    suspended = (job.get("spec") or {}).get("suspend") or is_true(job, "Suspended")
    return "suspended" if suspended else "active"


def newest(pods: tuple[Object, ...]) -> Object | None:
    """The pod created last."""
    return max(pods, key=lambda p: p["metadata"]["creationTimestamp"], default=None)


def container(pod: Object) -> Object:
    """The status of the engine's container."""
    for each in (pod.get("status") or {}).get("containerStatuses") or []:
        if each.get("name") == CONTAINER:
            found: Object = each
            return found
    return {}


def is_running(pod: Object) -> bool:
    """Whether the engine's container runs."""
    return "running" in (container(pod).get("state") or {})


def is_scheduled(pod: Object) -> bool:
    """Whether it has a node."""
    return bool((pod.get("spec") or {}).get("nodeName")) or is_true(pod, "PodScheduled")


def changed_at(item: Object, kind: str) -> datetime:
    """When a condition last changed, else when the object was created."""
    found = condition(item, kind) or {}
    return parse_time(found.get("lastTransitionTime") or item["metadata"]["creationTimestamp"])


def terminated(pod: Object) -> Object | None:
    """How the engine's container terminated, as the kubelet reports it."""
    found: Object | None = (container(pod).get("state") or {}).get("terminated")
    return found


def termination_message(pod: Object) -> dict[str, Any]:
    """The engine's termination message, well-formed fields only. Empty if missing or malformed."""
    message = str((terminated(pod) or {}).get("message") or "")
    try:
        document = nesting.loads_untrusted(message.encode(errors="replace"))
    except ValueError:
        return {}
    if not isinstance(document, dict):
        return {}
    fields: dict[str, Any] = {
        k: sanitize(document[k]) for k in ("phase", "reason", "message", "hint") if k in document
    }
    digest, commit = document.get("digest"), document.get("baseRevision")
    if isinstance(digest, str) and reference.is_digest(digest):
        fields["digest"] = digest
    if isinstance(commit, str) and _COMMIT.fullmatch(commit):
        fields["baseRevision"] = commit
    for k in ("code", "step", "steps", "peakMemoryBytes"):
        if is_number(document.get(k)) and isinstance(document[k], int):
            fields[k] = document[k]
    if is_number(document.get("loss")):
        fields["loss"] = document["loss"]
    return fields


def eviction(pod: Object, code: int | None = None) -> Cause | None:
    """The kubelet's message, if it evicted the pod."""
    status = pod.get("status") or {}
    if status.get("reason") != "Evicted":
        return None
    message = sanitize(status.get("message") or "the kubelet evicted the pod")
    return Cause("PodEvicted", message, "see the node's disk and memory", code=code)


def node_loss(pod: Object) -> Cause | None:
    """Set if the pod's node does not respond."""
    ready = condition(pod, "Ready") or {}
    if ready.get("status") != "Unknown" and (pod.get("status") or {}).get("reason") != "NodeLost":
        return None
    hint = "delete the Node object if the node is gone for good; the pod is replaced then"
    return Cause("NodeLost", "the pod's node does not respond", hint)


def running_warning(job: Object, pod: Object) -> Cause | None:
    """What may be wrong with a running Job: edited, node lost, pod terminating."""
    parallelism = (job.get("spec") or {}).get("parallelism")
    if parallelism not in (None, 1):
        message = f"the Job's parallelism was set to {parallelism}: one pod trains, all others fail"
        return Cause("JobEdited", message, "set it to 1")
    if cause := node_loss(pod):
        return cause
    if pod["metadata"].get("deletionTimestamp"):
        return Cause("PodTerminating", "the pod is terminating and saves its state")
    return None


def failure(job: Object, pods: tuple[Object, ...]) -> Cause:
    """Why `job` failed: from the engine's termination message if there is one, else the kubelet."""
    failed = condition(job, "Failed") or {}
    if failed.get("reason") == "DeadlineExceeded":
        hint = (
            "raise the annotation tuning.kaito.sh/deadline-seconds and set tuning.kaito.sh/rerun, "
            "or use a faster instance type in a new Workspace"
        )
        return Cause("DeadlineExceeded", "the Job ran longer than its deadline", hint)
    last = newest(
        tuple(pod for pod in pods if terminated(pod) or (pod.get("status") or {}).get("reason"))
    )
    if last is None:
        message = sanitize(failed.get("message") or "no pod")
        return Cause(failed.get("reason") or "JobFailed", message)
    end, reported = terminated(last) or {}, termination_message(last)
    code = end.get("exitCode")
    if cause := eviction(last, code):
        return cause
    if end.get("reason") == "OOMKilled":
        hint = "set a smaller per_device_train_batch_size or max_length, or use more memory"
        return Cause("OutOfMemory", "the kernel killed the engine: out of memory", hint, code=code)
    if "reason" in reported:
        return Cause(
            condition_reason(reported["reason"]),
            reported.get("message") or reported["reason"],
            reported.get("hint", ""),
            reported.get("phase", ""),
            reported.get("code", code),
        )
    message = sanitize(end.get("message") or end.get("reason") or "no message")
    return Cause(
        REASONS.get(code or 0, "Killed") if code else "JobFailed",
        f"exit code {code}: {message}",
        "see the pod's log",
        code=code,
    )


def condition_reason(text: str) -> str:
    """`text` as a valid reason of a condition."""
    letters = "".join(c for c in text if c.isascii() and c.isalnum())[:64]
    return letters if letters[:1].isalpha() else "Failed"


def waiting(pod: Object, mount_warning: str | None) -> Cause | None:
    """Why a pod does not start, if the API knows."""
    scheduled = condition(pod, "PodScheduled")
    if scheduled and scheduled.get("status") == "False":
        return Cause("Unschedulable", sanitize(scheduled.get("message") or "no node fits"))
    state = (container(pod).get("state") or {}).get("waiting") or {}
    reason, message = state.get("reason"), sanitize(state.get("message") or "")
    if reason in _IMAGE:
        return Cause("ImagePullError", message or f"{reason}", "check the engine's image")
    if reason in _START:
        return Cause("ContainerStartError", message or f"{reason}")
    if mount_warning:
        is_secret = 'secret "' in mount_warning and "not found" in mount_warning
        reason = "SecretNotFound" if is_secret else "VolumeMountError"
        hint = "create the Secret; the Job then continues" if is_secret else ""
        return Cause(reason, sanitize(mount_warning), hint)
    return None


def node_claim_state(
    node_claim: Object, options: Nodes, now: datetime
) -> tuple[Literal["ready", "waiting", "failed"], str]:
    """Whether a provisioned node can be used, and the cloud provider's message."""
    if node_claim["metadata"].get("deletionTimestamp"):
        return "waiting", "a node is being deleted"
    if is_true(node_claim, "Ready"):
        return "ready", ""
    messages = [
        sanitize(each.get("message") or each.get("reason") or "")
        for each in (node_claim.get("status") or {}).get("conditions") or []
        if each.get("status") != "True" and (each.get("message") or each.get("reason"))
    ]
    message = "; ".join(dict.fromkeys(messages)) or "the node has been requested"
    launched = is_true(node_claim, "Launched")
    limit = options.register_seconds if launched else options.launch_seconds
    age = now - parse_time(node_claim["metadata"]["creationTimestamp"])
    if age > timedelta(seconds=limit):
        problem = "did not become ready" if launched else "was not launched"
        return "failed", f"the node {problem} within {limit} s: {message}"
    return "waiting", message
