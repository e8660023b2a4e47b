"""Whether an inference server answers requests, and if not, why. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.api.kinds import Object
from jobs.desired.tuning import Server
from jobs.manifests.server import PULLER
from jobs.observed import objects
from jobs.observed.objects import Cause, sanitize
from tuning.errors import REASONS

_LOG_TAIL = 600  # characters of a container's log that a message quotes


@dataclass(frozen=True)
class Readiness:
    """Whether requests are answered, and the cause if not all is well."""

    answers: bool
    cause: Cause
    is_final: bool = False  # waiting alone will not remove the cause


def readiness_of(
    pods: tuple[Object, ...],
    warning: str | None,
    report: dict[str, Any] | None,
    server: Server,
    *,
    recorded: Object,
) -> Readiness:
    """From the pods of the current Deployment, oldest first, and the server's own report."""
    last = objects.newest(
        tuple(pod for pod in pods if not pod["metadata"].get("deletionTimestamp"))
    )
    if last is None:
        if warning:
            return Readiness(False, Cause("PodRefused", sanitize(warning)), is_final=True)
        return _waiting("the server has no pod yet")
    cause = objects.pod_failure(last) if objects.is_over(last) else objects.node_loss(last)
    if cause is None and objects.is_true(last, "Ready"):
        return Readiness(True, refused_adapters(report, recorded) or Cause("", ""), is_final=True)
    cause = cause or _failed_pull(last, server) or objects.waiting(last, warning)
    cause = cause or objects.failed_container(last) or _crash(last)
    if cause:
        return Readiness(False, cause, is_final=True)
    is_loading = objects.is_running(last)
    return _waiting("the model is loading" if is_loading else objects.starting(last))


def _waiting(message: str) -> Readiness:
    return Readiness(False, Cause("WorkspaceInferenceStatusPending", message))


def refused_adapters(report: dict[str, Any] | None, recorded: Object) -> Cause | None:
    """Adapters that the server refused; without a report, as the stored status says."""
    if report is None:
        stored = objects.condition({"status": recorded}, "InferenceReady")
        if stored and stored["reason"] == "AdapterRefused":
            return Cause("AdapterRefused", stored["message"])
        return None
    refused = report.get("refused")
    adapters = [a for a in refused if isinstance(a, dict)] if isinstance(refused, list) else []
    if not adapters:
        return None
    reasons = [
        f"{sanitize(a.get('name'), 100)}: {sanitize(a.get('reason'), 400)}" for a in adapters[:10]
    ]
    return Cause("AdapterRefused", f"refused, all others are served: {'; '.join(reasons)}")


def _failed_pull(pod: Object, server: Server) -> Cause | None:
    """An adapter that an init container could not pull."""
    images = [adapter for adapter in server.adapters if adapter.image]
    for container in (pod.get("status") or {}).get("initContainerStatuses") or []:
        end = _end(container)
        number = str(container.get("name")).removeprefix(PULLER)
        if end and end.get("exitCode") and number.isdigit() and int(number) < len(images):
            name = images[int(number)].name
            return Cause("AdapterRefused", f"{name}: {_log_tail(end)}", code=end["exitCode"])
    return None


def _end(container: Object) -> Object | None:
    """How the container terminated, now or before its last restart."""
    for state in (container.get("state"), container.get("lastState")):
        if state and state.get("terminated"):
            terminated: Object = state["terminated"]
            return terminated
    return None


def _crash(pod: Object) -> Cause | None:
    """How the server terminated last, if with an error."""
    end = _end(objects.container(pod))
    if end is None or not (end.get("exitCode") or end.get("reason") == "OOMKilled"):
        return None
    code = end.get("exitCode")
    if end.get("reason") == "OOMKilled" or code == 14:
        hint = "use an instance type with more memory, or a smaller model"
        return Cause("ContainerOOMKilled", "the server ran out of memory", hint, code=code)
    reason = REASONS.get(code or 0, "Killed")
    message = f"the server terminated with exit code {code} ({reason}): {_log_tail(end)}"
    return Cause("ContainerCrashLoopBackOff", message, "see the pod's log", code=code)


def _log_tail(end: Object) -> str:
    return sanitize(str(end.get("message") or end.get("reason") or "no message")[-_LOG_TAIL:])
