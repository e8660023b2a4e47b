"""What the pods of a server say of themselves: whether it answers, and if not, why. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.api.client import Object
from jobs.desired.tuning import Server
from jobs.manifests import server as serving
from jobs.observed import objects
from jobs.observed.objects import Trouble, clean
from tuning.errors import REASONS

_SAID = 600  # characters of the end of a log


@dataclass(frozen=True)
class Readiness:
    """Whether requests are answered, and what is in the way."""

    answers: bool
    trouble: Trouble
    known: bool = False  # the trouble is more than that it takes a while


def judge(
    pods: tuple[Object, ...],
    warning: str | None,
    told: dict[str, Any] | None,
    server: Server,
    *,
    was: Object,
) -> Readiness:
    """From the pods of the present Deployment, oldest first, and what the server says itself."""
    alive = [pod for pod in pods if not pod["metadata"].get("deletionTimestamp")]
    last = objects.newest(tuple(alive))
    if last is None:
        why = Trouble("PodRefused", clean(warning)) if warning else None
        return _waits(why, "no pod of the server is there yet")
    status = last.get("status") or {}
    if status.get("reason") == "Evicted":
        what = clean(status.get("message") or "the kubelet evicted the pod")
        return _waits(Trouble("PodEvicted", what, "see the node's disk and memory"), "")
    ready = objects.condition(last, "Ready") or {}
    if ready.get("status") == "Unknown" or status.get("reason") == "NodeLost":
        what = "the pod's node does not answer"
        return _waits(
            Trouble("NodeLost", what, "delete the Node object if it is gone for good"), ""
        )
    if ready.get("status") == "True":
        return Readiness(True, refusal(told, was) or Trouble("", ""), known=True)
    if trouble := _pulling(last, server) or objects.waiting(last, warning) or _crashed(last):
        return _waits(trouble, "")
    if objects.running(last):
        return _waits(None, "the model is being loaded")
    return _waits(None, "the pod is starting")


def _waits(trouble: Trouble | None, usual: str) -> Readiness:
    if trouble:
        return Readiness(False, trouble, known=True)
    return Readiness(False, Trouble("WorkspaceInferenceStatusPending", usual))


def refusal(told: dict[str, Any] | None, was: Object) -> Trouble | None:
    """Adapters that the server refused, by name. A server that cannot be asked just now is taken
    at its last word."""
    if told is None:
        before = objects.condition({"status": was}, "InferenceReady")
        if before and before["reason"] == "AdapterRefused":
            return Trouble("AdapterRefused", before["message"])
        return None
    refused = told.get("refused")
    found = (
        [each for each in refused if isinstance(each, dict)] if isinstance(refused, list) else []
    )
    if not found:
        return None
    words = [f"{clean(e.get('name'), 100)}: {clean(e.get('reason'), 400)}" for e in found[:10]]
    what = f"refused, while all others are served: {'; '.join(words)}"
    return Trouble("AdapterRefused", what)


def _pulling(pod: Object, server: Server) -> Trouble | None:
    """An adapter that an init container could not fetch."""
    images = [each for each in server.adapters if each.image]
    for each in (pod.get("status") or {}).get("initContainerStatuses") or []:
        ended = _ended(each)
        number = str(each.get("name")).removeprefix(serving.PULLER)
        if ended and ended.get("exitCode") and number.isdigit() and int(number) < len(images):
            said = _tail(ended)
            name = images[int(number)].name
            return Trouble("AdapterRefused", f"{name}: {said}", code=ended["exitCode"])
    return None


def _ended(container: Object) -> Object | None:
    state = container.get("state") or {}
    found: Object | None = state.get("terminated") or (container.get("lastState") or {}).get(
        "terminated"
    )
    return found


def _crashed(pod: Object) -> Trouble | None:
    """How the server ended last, if it did."""
    ended = _ended(objects.container(pod))
    if ended is None or not (ended.get("exitCode") or ended.get("reason") == "OOMKilled"):
        return None
    code = ended.get("exitCode")
    if ended.get("reason") == "OOMKilled" or code == 14:
        hint = "take a machine with more memory, or a smaller model"
        return Trouble("ContainerOOMKilled", "the server ran out of memory", hint, code=code)
    reason = REASONS.get(code or 0, "Killed")
    what = f"the server ended with exit code {code} ({reason}): {_tail(ended)}"
    return Trouble("ContainerCrashLoopBackOff", what, "see the pod's log", code=code)


def _tail(ended: Object) -> str:
    said = str(ended.get("message") or ended.get("reason") or "it said nothing")
    return clean(said[-_SAID:])
