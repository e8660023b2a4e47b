"""What a Job, its pods and a NodeClaim say of themselves: objects in, plain answers out. Pure."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from jobs.api.client import Object
from jobs.api.options import Nodes
from jobs.manifests.pod import CONTAINER
from tuning.errors import REASONS, redact
from tuning.spec import reference

LONGEST = 1000  # characters of a message that came from a pod or a cloud
_COMMIT = re.compile("[0-9a-f]{40}")
_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
_START = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")


@dataclass(frozen=True)
class Trouble:
    """Why something does not start, or how it ended: one CamelCase word and a sentence."""

    reason: str
    message: str
    hint: str = ""
    phase: str = ""
    code: int | None = None


def condition(item: Object, kind: str) -> Object | None:
    """The condition of this type in an object's status."""
    for each in (item.get("status") or {}).get("conditions") or []:
        if each.get("type") == kind:
            found: Object = each
            return found
    return None


def holds(item: Object, kind: str) -> bool:
    """Whether a condition is True."""
    found = condition(item, kind)
    return found is not None and found.get("status") == "True"


def time(text: str) -> datetime:
    """A timestamp of the API as a moment."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def stamp(moment: datetime) -> str:
    """A moment as the API writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def clean(text: object, limit: int = LONGEST) -> str:
    """One harmless line of what a stranger wrote: no control characters, no URL query."""
    flat = " ".join(str(text)[: 4 * limit].split())
    shown = "".join(c for c in flat if unicodedata.category(c)[0] != "C")
    return redact(shown)[:limit]


def number(value: object) -> bool:
    """Whether a stranger's value is a number that JSON and the API server can hold."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and abs(value) < 1 << 53  # type: ignore[arg-type]  # false for NaN, too


def job_state(job: Object) -> Literal["complete", "failed", "suspended", "active"]:
    """From the Job's conditions alone: a count of failed pods says nothing about the end."""
    if holds(job, "Complete"):
        return "complete"
    if holds(job, "Failed"):
        return "failed"
    suspended = (job.get("spec") or {}).get("suspend") or holds(job, "Suspended")
    return "suspended" if suspended else "active"


def newest(pods: tuple[Object, ...]) -> Object | None:
    """The pod that was made last."""
    return max(pods, key=lambda p: p["metadata"]["creationTimestamp"], default=None)


def container(pod: Object) -> Object:
    """The status of the engine's container in it."""
    for each in (pod.get("status") or {}).get("containerStatuses") or []:
        if each.get("name") == CONTAINER:
            found: Object = each
            return found
    return {}


def running(pod: Object) -> bool:
    """Whether the engine runs in it now."""
    return "running" in (container(pod).get("state") or {})


def started(pod: Object) -> bool:
    """Whether the engine's container runs or has run."""
    state = container(pod).get("state") or {}
    return "running" in state or "terminated" in state


def scheduled(pod: Object) -> bool:
    """Whether it has a node."""
    return bool((pod.get("spec") or {}).get("nodeName")) or holds(pod, "PodScheduled")


def scheduled_at(pod: Object) -> datetime | None:
    """Since when it has a node."""
    if not scheduled(pod):
        return None
    found = condition(pod, "PodScheduled") or {}
    return time(found.get("lastTransitionTime") or pod["metadata"]["creationTimestamp"])


def ready_at(item: Object) -> datetime | None:
    """Since when a machine is ready."""
    found = condition(item, "Ready") or {}
    if found.get("status") != "True":
        return None
    return time(found.get("lastTransitionTime") or item["metadata"]["creationTimestamp"])


def terminated(pod: Object) -> Object | None:
    """How the engine ended in it, as the kubelet saw it."""
    found: Object | None = (container(pod).get("state") or {}).get("terminated")
    return found


def outcome(pod: Object) -> dict[str, Any]:
    """The engine's termination message; empty where there is none that can be trusted in form."""
    try:
        found = json.loads((terminated(pod) or {}).get("message") or "")
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    texts = {k: clean(found[k]) for k in ("phase", "reason", "message", "hint") if k in found}
    numbers: dict[str, Any] = {
        k: found[k]
        for k in ("code", "step", "steps", "peakMemoryBytes")
        if number(found.get(k)) and isinstance(found[k], int)
    }
    digest = found.get("digest")
    if isinstance(digest, str) and reference.is_digest(digest):
        texts["digest"] = digest
    commit = found.get("baseRevision")
    if isinstance(commit, str) and _COMMIT.fullmatch(commit):
        texts["baseRevision"] = commit
    if number(found.get("loss")):
        numbers["loss"] = found["loss"]
    return texts | numbers


def unwell(job: Object, pod: Object) -> Trouble | None:
    """What is worth knowing of a Job that runs: its node is silent, or somebody edited it."""
    many = (job.get("spec") or {}).get("parallelism")
    if many not in (None, 1):
        what = f"somebody set the Job's parallelism to {many}: one pod trains, the others fail"
        return Trouble("JobEdited", what, "set it to 1")
    ready, meta = condition(pod, "Ready") or {}, pod["metadata"]
    if ready.get("status") == "Unknown" or (pod.get("status") or {}).get("reason") == "NodeLost":
        what = "the pod's node does not answer; no other pod starts before this one is gone"
        return Trouble("NodeLost", what, "delete the Node object if the machine is gone for good")
    if meta.get("deletionTimestamp"):
        return Trouble("PodTerminating", "the pod is being stopped and saves its state")
    return None


def failure(job: Object, pods: tuple[Object, ...]) -> Trouble:
    """Why `job` failed: the engine's own words where it could say any, else the kubelet's."""
    said = condition(job, "Failed") or {}
    if said.get("reason") == "DeadlineExceeded":
        hint = (
            "raise the annotation tuning.kaito.sh/deadline-seconds and set tuning.kaito.sh/rerun, "
            "or take a faster machine in a new Workspace"
        )
        return Trouble("DeadlineExceeded", "the Job ran longer than it may", hint)
    ended = [pod for pod in pods if terminated(pod) or (pod.get("status") or {}).get("reason")]
    last = newest(tuple(ended))
    if last is None:
        return Trouble(said.get("reason") or "JobFailed", clean(said.get("message") or "no pod"))
    end, told = terminated(last) or {}, outcome(last)
    code = end.get("exitCode")
    if (last.get("status") or {}).get("reason") == "Evicted":
        what = clean(last["status"].get("message") or "the kubelet evicted the pod")
        return Trouble("PodEvicted", what, "see the node's disk and memory", code=code)
    if end.get("reason") == "OOMKilled":
        hint = "set a smaller per_device_train_batch_size or max_length, or take more memory"
        return Trouble("OutOfMemory", "the kernel killed it: out of memory", hint, code=code)
    if "reason" in told:
        message, hint = told.get("message") or told["reason"], told.get("hint", "")
        phase = told.get("phase", "")
        return Trouble(word(told["reason"]), message, hint, phase, told.get("code", code))
    message = clean(end.get("message") or end.get("reason") or "it said nothing")
    return Trouble(
        REASONS.get(code or 0, "Killed") if code else "JobFailed",
        f"exit code {code}: {message}",
        "see the pod's log",
        code=code,
    )


def word(text: str) -> str:
    """What a condition's reason may be."""
    found = "".join(c for c in text if c.isascii() and c.isalnum())[:64]
    return found if found[:1].isalpha() else "Failed"


def waiting(pod: Object, mount_warning: str | None) -> Trouble | None:
    """Why a pod that should run does not, if the API knows."""
    unscheduled = condition(pod, "PodScheduled")
    if unscheduled and unscheduled.get("status") == "False":
        return Trouble("Unschedulable", clean(unscheduled.get("message") or "no node fits"))
    found = (container(pod).get("state") or {}).get("waiting") or {}
    reason, message = found.get("reason"), clean(found.get("message") or "")
    if reason in _IMAGE:
        return Trouble("ImagePullError", message or f"{reason}", "check the engine's image")
    if reason in _START:
        return Trouble("ContainerStartError", message or f"{reason}")
    if mount_warning:
        secret = 'secret "' in mount_warning and "not found" in mount_warning
        reason = "SecretNotFound" if secret else "VolumeMountError"
        hint = "create the Secret; the Job goes on by itself" if secret else ""
        return Trouble(reason, clean(mount_warning), hint)
    return None


def claim_state(
    claim: Object, options: Nodes, now: datetime
) -> tuple[Literal["ready", "waiting", "failed"], str]:
    """Whether a bought machine can be used, and what the cloud says of it."""
    if claim["metadata"].get("deletionTimestamp"):
        return "waiting", "a machine is being given back"
    if holds(claim, "Ready"):
        return "ready", ""
    words = [
        clean(each.get("message") or each.get("reason") or "")
        for each in (claim.get("status") or {}).get("conditions") or []
        if each.get("status") != "True" and (each.get("message") or each.get("reason"))
    ]
    message = "; ".join(dict.fromkeys(words)) or "the machine has been asked for"
    age = now - time(claim["metadata"]["creationTimestamp"])
    launched = holds(claim, "Launched")
    limit = options.register_seconds if launched else options.launch_seconds
    if age > timedelta(seconds=limit):
        what = "did not become a node" if launched else "was not launched"
        return "failed", f"the machine {what} within {limit} s: {message}"
    return "waiting", message
