"""Facts and causes read from Jobs, pods and NodeClaims. Pure."""

from __future__ import annotations

import itertools
import re
import unicodedata
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from jobs.api import nesting
from jobs.api.kinds import Object
from jobs.api.options import Nodes
from jobs.manifests.pod import CONTAINER
from tuning.errors import REASONS, RETRYABLE, redact
from tuning.spec import reference

LONGEST = 1000  # characters of a message that came from a pod or a cloud
_COMMIT = re.compile("[0-9a-f]{40}")
PERMANENT = frozenset(REASONS) - RETRYABLE - {0}  # exit codes after which no other try follows
_ORDINARY = ("ContainerCreating", "PodInitializing", "CrashLoopBackOff")  # reasons without a cause
_IMAGE = ("Image", "Registry", "Signature")  # in reasons of a container that waits for its image


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


def completion_index(pod: Object) -> int:
    """Which pod of its Job it is: 0 for the only one, and for the first of several."""
    annotations = pod["metadata"].get("annotations") or {}
    text = str(annotations.get("batch.kubernetes.io/job-completion-index", ""))
    return int(text) if text.isdecimal() and len(text) < 6 else 0


def newest_each(pods: tuple[Object, ...]) -> tuple[Object, ...]:
    """The newest pod of each index, in their order."""
    by_index: dict[int, list[Object]] = {}
    for pod in pods:
        by_index.setdefault(completion_index(pod), []).append(pod)
    lists = (tuple(by_index[index]) for index in sorted(by_index))
    return tuple(last for each in lists if (last := newest(each)))


def culprit(pods: tuple[Object, ...]) -> Object | None:
    """Of ended pods the one that tells why: one pod that fails ends the others of its Job."""

    def weight(pod: Object) -> tuple[bool, bool]:
        code = exit_code(pod)
        return code in PERMANENT, code != 75

    return max(newest_each(pods), key=weight, default=None)


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


def has_started(pod: Object) -> bool:
    """Whether the engine's container runs, or ran before it was restarted."""
    found = container(pod)
    states = (found.get("state") or {}) | (found.get("lastState") or {})
    return "running" in states or "terminated" in states


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


def is_over(pod: Object) -> bool:
    """Whether no container of it runs again; the kubelet may also have refused or evicted it."""
    status = pod.get("status") or {}
    return status.get("phase") in ("Failed", "Succeeded") or status.get("reason") == "Evicted"


def has_ended(pod: Object) -> bool:
    """Whether the engine's container has terminated, or never will run. Another container may still
    keep its pod."""
    return is_over(pod) or terminated(pod) is not None


def exit_code(pod: Object) -> int | None:
    """The exit code of the engine; None if it runs, or never ran."""
    return (terminated(pod) or {}).get("exitCode")


def staying(pod: Object) -> str:
    """Names of the other containers that have not terminated, joined by commas: sidecars."""
    others = (pod.get("status") or {}).get("containerStatuses") or []
    return ", ".join(
        sanitize(each.get("name"), 63)
        for each in others
        if each.get("name") != CONTAINER and "terminated" not in (each.get("state") or {})
    )


def ended_at(pod: Object) -> datetime:
    """When the engine's container terminated, else when the pod was created."""
    finished = (terminated(pod) or {}).get("finishedAt")
    return parse_time(finished or pod["metadata"]["creationTimestamp"])


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
    if found := nesting.links(document.get("trackers")):
        fields["trackers"] = found
    for k in ("code", "step", "steps", "peakMemoryBytes"):
        if is_number(document.get(k)) and isinstance(document[k], int):
            fields[k] = document[k]
    if is_number(document.get("loss")):
        fields["loss"] = document["loss"]
    return fields


def node_loss(pod: Object) -> Cause | None:
    """Set if the pod's node does not respond."""
    ready = condition(pod, "Ready") or {}
    if ready.get("status") != "Unknown" and (pod.get("status") or {}).get("reason") != "NodeLost":
        return None
    hint = "delete the Node object if the node is gone for good; the pod is replaced then"
    return Cause("NodeLost", "the pod's node does not respond", hint)


def running_warning(job: Object, pod: Object, nodes: int = 1) -> Cause | None:
    """What may be wrong with a running Job: edited, node lost, pod terminating."""
    parallelism = (job.get("spec") or {}).get("parallelism")
    if parallelism not in (None, nodes):
        train = "one pod trains" if nodes == 1 else f"{nodes} pods train"
        message = f"the Job's parallelism was set to {parallelism}: {train}, all others fail"
        return Cause("JobEdited", message, f"set it to {nodes}")
    if cause := node_loss(pod):
        return cause
    if pod["metadata"].get("deletionTimestamp"):
        words = f"the pod is terminating and saves its state{_disruption(pod)}"
        return Cause("PodTerminating", words)
    return None


def _disruption(pod: Object) -> str:
    """Who ends a pod, and why, such as a preemption or a drain; in parentheses."""
    target = condition(pod, "DisruptionTarget") or {}
    words = sanitize(target.get("message") or target.get("reason") or "")
    return f" ({words})" if words and target.get("status") == "True" else ""


def failure(job: Object, pods: tuple[Object, ...]) -> Cause:
    """Why `job` failed: from the engine's termination message if there is one, else the kubelet."""
    failed = condition(job, "Failed") or {}
    if failed.get("reason") == "DeadlineExceeded":
        hint = (
            "raise the annotation tuning.kaito.sh/deadline-seconds and set tuning.kaito.sh/rerun, "
            "or use a faster instance type in a new Workspace"
        )
        return Cause("DeadlineExceeded", "the Job ran longer than its deadline", hint)
    ended = tuple(pod for pod in pods if has_ended(pod) and exit_code(pod) != 0)
    last = culprit(ended) or newest(pods)
    if last is None:
        message = sanitize(failed.get("message") or "no pod")
        return Cause(failed.get("reason") or "JobFailed", message)
    return named(last, pod_failure(last))


def named(pod: Object, cause: Cause) -> Cause:
    """`cause` with the index of `pod`, unless that is the first one, of which all else is told."""
    index = completion_index(pod)
    return replace(cause, message=f"pod {index}: {cause.message}") if index else cause


def pod_failure(pod: Object) -> Cause:
    """Why the engine did not succeed in a pod: from its termination message if there is one, else
    from the kubelet, which also refuses and evicts pods, or from a container that was added."""
    status, end, reported = pod.get("status") or {}, terminated(pod) or {}, termination_message(pod)
    code = end.get("exitCode")
    if status.get("reason") == "Evicted":
        message = sanitize(status.get("message") or "the kubelet evicted the pod")
        return Cause("PodEvicted", message, "see the node's disk and memory", code=code)
    if end.get("reason") == "OOMKilled":
        hint = "set a smaller per_device_train_batch_size or max_length, or use more memory"
        return Cause("OutOfMemory", "the kernel killed the engine: out of memory", hint, code=code)
    if "reason" in reported:
        return Cause(
            condition_reason(reported["reason"]),
            (reported.get("message") or reported["reason"]) + _disruption(pod),
            reported.get("hint", ""),
            reported.get("phase", ""),
            reported.get("code", code),
        )
    if status.get("reason") or status.get("message"):
        reason = condition_reason(str(status.get("reason") or "PodFailed"))
        message = sanitize(status.get("message") or f"the kubelet ended the pod: {reason}")
        return Cause(reason, message, "see the pod's node and its events", code=code)
    if not end and (other := failed_container(pod)):
        return other
    message = sanitize(end.get("message") or end.get("reason") or "no message")
    return Cause(
        REASONS.get(code or 0, "Killed") if code else "JobFailed",
        (f"exit code {code}: {message}" if end else "the pod ended before the engine ran")
        + _disruption(pod),
        "see the pod's log",
        code=code,
    )


def failed_container(pod: Object) -> Cause | None:
    """Another container, such as one that an admission webhook added, that failed."""
    status = pod.get("status") or {}
    kinds = (status.get("initContainerStatuses"), status.get("containerStatuses"))
    for each in itertools.chain.from_iterable(filter(None, kinds)):
        states = (each.get("state") or {}, each.get("lastState") or {})
        end: Object = next((state["terminated"] for state in states if "terminated" in state), {})
        if end.get("exitCode") and each["name"] != CONTAINER:
            name, code = sanitize(each["name"], 63), end["exitCode"]
            words = sanitize(end.get("message") or end.get("reason") or "no message")
            message = f"the container {name} ended with exit code {code}: {words}"
            return Cause("ContainerFailed", message, f"see the log of the container {name}")
    return None


def last_try(job: Object, pods: tuple[Object, ...]) -> Cause | None:
    """How the last pod ended, if without success, while the Job goes on."""
    ended = tuple(pod for pod in pods if has_ended(pod) and exit_code(pod) != 0)
    last = culprit(ended)
    if last is None:
        return None
    own = [pod for pod in ended if completion_index(pod) == completion_index(last)]
    number = len(own)
    if len(own) == len(ended) and (job.get("spec") or {}).get("completionMode") != "Indexed":
        number = max(number, (job.get("status") or {}).get("failed") or 0)  # some are gone
    cause, verb = pod_failure(last), "was stopped" if exit_code(last) == 75 else "failed"
    return named(last, replace(cause, message=f"try {number} {verb}: {cause.message}"))


def condition_reason(text: str) -> str:
    """`text` as a valid reason of a condition."""
    letters = "".join(c for c in text if c.isascii() and c.isalnum())[:64]
    return letters if letters[:1].isalpha() else "Failed"


def waiting(pod: Object, mount_warning: str | None) -> Cause | None:
    """Why a pod does not start, if the API knows."""
    scheduled = condition(pod, "PodScheduled")
    if scheduled and scheduled.get("status") == "False":
        return Cause("Unschedulable", sanitize(scheduled.get("message") or "no node fits"))
    status = pod.get("status") or {}
    for each in [*(status.get("initContainerStatuses") or []), container(pod)]:
        state = (each.get("state") or {}).get("waiting") or {}
        if not (reason := state.get("reason")) or reason in _ORDINARY:
            continue
        message = sanitize(state.get("message") or reason)
        if each["name"] != CONTAINER:
            message = f"container {sanitize(each['name'], 63)}: {message}"
        if any(word in reason for word in _IMAGE):
            return Cause("ImagePullError", message, "check the image and its pull secret")
        return Cause("ContainerStartError", message)
    if mount_warning:
        is_secret = 'secret "' in mount_warning and "not found" in mount_warning
        is_volume = "olume" in mount_warning
        reason = "SecretNotFound" if is_secret else "VolumeMountError"
        reason = reason if is_secret or is_volume else "PodStartError"
        hint = "create the Secret" if is_secret else ""
        return Cause(reason, sanitize(mount_warning), hint)
    if status.get("message"):
        return Cause(
            condition_reason(status.get("reason") or "Failed"), sanitize(status["message"])
        )
    return None


def starting(pod: Object) -> str:
    """What a pod without a known problem waits for."""
    names = [
        sanitize(each.get("name"), 63)
        for each in (pod.get("status") or {}).get("initContainerStatuses") or []
        if "running" in (each.get("state") or {}) and not each.get("started")
    ]
    return f"the init container {names[0]} has not finished" if names else "the pod is starting"


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
