"""Kubernetes' Job controller as its documentation describes it, for a server that is older.

The API server of the test bed (1.20) drops fields of a Job without a word: `completionMode`,
`successPolicy`, `podFailurePolicy`, `podReplacementPolicy`, `suspend`. `Kept` is a client that
stores the whole spec in an annotation beside them, and shows it where a Job is read; it refuses
what a current server refuses. `JobController` obeys that spec. The rules, by their place in the
docs: concepts/workloads/controllers/job (completion mode, success policy, pod failure policy, pod
replacement policy, suspending, termination and clean-up, tracking with finalizers) and
reference/kubernetes-api/workload-resources/job-v1. What it does not play: backoffLimitPerIndex,
maxFailedIndexes, managedBy, elastic changes of completions.
"""

from __future__ import annotations

import contextlib
import copy
import json
import secrets
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import CORE_EVENT, JOB, POD, Kind, Object
from jobs.observed.objects import format_time, is_true, parse_time

WHOLE = "tests/whole-spec"
TRACKING = "batch.kubernetes.io/job-tracking"
INDEX = "batch.kubernetes.io/job-completion-index"
_DROPPED = (
    "completionMode",
    "successPolicy",
    "podFailurePolicy",
    "podReplacementPolicy",
    "suspend",
)
_PLAYED = {
    *_DROPPED,
    "activeDeadlineSeconds",
    "backoffLimit",
    "completions",
    "parallelism",
    "selector",
    "template",
}


class Kept(Cluster):
    """A server that knows every field of a Job, though ours forgets some."""

    def create(self, kind: Kind, item: Object) -> Object | None:
        made = super().create(kind, _kept(kind, item))
        return made and _shown(kind, made)

    def rehearse(self, kind: Kind, item: Object) -> None:
        super().rehearse(kind, _kept(kind, item))

    def replace(self, kind: Kind, item: Object) -> Object:
        return _shown(kind, super().replace(kind, _kept(kind, item)))

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        found = super().get(kind, namespace, name)
        return found and _shown(kind, found)

    def find(self, kind: Kind, namespace: str | None = None, **more: Any) -> list[Object]:
        return [_shown(kind, item) for item in super().find(kind, namespace, **more)]

    def suspend(self, job: Object, value: bool) -> None:
        """As Kueue does: it holds the Job back, or admits it."""
        spec = json.loads(job["metadata"]["annotations"][WHOLE]) | {"suspend": value}
        annotations = {WHOLE: json.dumps(spec)}
        _merge(self, JOB, job, {"metadata": {"annotations": annotations}})


def _kept(kind: Kind, item: Object) -> Object:
    if kind != JOB:
        return item
    if problem := next(_problems(item), None):
        raise ApiError(422, "Invalid", f'Job.batch "{item["metadata"]["name"]}" is {problem}')
    item = copy.deepcopy(item)
    annotations = item["metadata"].setdefault("annotations", {})
    annotations[WHOLE] = json.dumps(item["spec"])
    return item


def _shown(kind: Kind, item: Object) -> Object:
    if kind == JOB and (text := (item["metadata"].get("annotations") or {}).get(WHOLE)):
        whole = json.loads(text)
        item["spec"] |= {key: whole[key] for key in _DROPPED if key in whole}
    return item


def _problems(job: Object) -> Iterator[str]:
    """What the validation of a current server says of a Job."""
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    if unknown := spec.keys() - _PLAYED:
        raise NotImplementedError(f"fields that are not played: {unknown}")
    indexed = spec.get("completionMode") == "Indexed"
    if indexed:
        host = f"{job['metadata']['name']}-{spec['completions'] - 1}"
        if len(host) > 63 or "." in host:
            yield f"invalid: metadata.name: will not able to create pod with host name {host}"
        if spec["parallelism"] > spec["completions"]:
            yield "invalid: spec.parallelism: must be less than or equal to completions"
    if spec.get("successPolicy") and not indexed:
        yield "invalid: spec.successPolicy: requires indexed completion mode"
    for rule in (spec.get("successPolicy") or {}).get("rules", []):
        if not _indexes(rule.get("succeededIndexes", "0")) <= set(range(spec["completions"])):
            yield "invalid: spec.successPolicy.rules: too large an index"
    policy = spec.get("podFailurePolicy")
    if policy and pod.get("restartPolicy") != "Never":
        yield "invalid: spec.template.spec.restartPolicy: only Never with podFailurePolicy"
    if policy and spec.get("podReplacementPolicy", "Failed") != "Failed":
        yield "invalid: spec.podReplacementPolicy: must be Failed with podFailurePolicy"
    names = {each["name"] for each in pod["containers"]}
    for rule in (policy or {}).get("rules", []):
        codes = rule.get("onExitCodes")
        if rule["action"] not in ("FailJob", "Ignore", "Count"):
            yield f"invalid: podFailurePolicy: action {rule['action']}"
        if bool(codes) == bool(rule.get("onPodConditions")):
            yield "invalid: podFailurePolicy: one of onExitCodes and onPodConditions is required"
        if codes:
            values = codes["values"]
            is_odd = values != sorted(set(values)) or (codes["operator"] == "In" and 0 in values)
            if is_odd or codes.get("containerName", next(iter(names))) not in names:
                yield "invalid: podFailurePolicy: onExitCodes"


def _indexes(text: str) -> set[int]:
    """ "0,2-3" -> {0, 2, 3}."""
    pairs = [part.partition("-") for part in text.split(",")]
    return {i for low, _, high in pairs for i in range(int(low), int(high or low) + 1)}


def _merge(api: Cluster, kind: Kind, item: Object, body: Object, path: str = "") -> None:
    """A merge patch; an object that is gone is no error."""
    meta = item["metadata"]
    with contextlib.suppress(ApiError):
        api._call(
            "PATCH",
            kind.path(meta.get("namespace"), meta["name"]) + path,
            body=body,
            content="application/merge-patch+json",
        )


def action_of(job: Object, pod: Object) -> tuple[str, str]:
    """What the first rule that matches a failed pod says ("Count": none does), and a message."""
    meta, status = pod["metadata"], pod["status"]
    codes = {
        each["name"]: each["state"]["terminated"]["exitCode"]
        for each in [
            *(status.get("initContainerStatuses") or []),
            *(status.get("containerStatuses") or []),
        ]
        if each.get("state", {}).get("terminated", {}).get("exitCode")
    }
    conditions = {c["type"]: c["status"] for c in status.get("conditions") or []}
    for number, rule in enumerate((job["spec"].get("podFailurePolicy") or {}).get("rules", [])):
        if wanted := rule.get("onExitCodes"):
            for name, code in codes.items():
                is_in = code in wanted["values"]
                if wanted.get("containerName", name) == name and is_in == (
                    wanted["operator"] == "In"
                ):
                    message = f"Container {name} for pod {meta['namespace']}/{meta['name']} failed"
                    message += f" with exit code {code} matching {rule['action']} rule"
                    return rule["action"], f"{message} at index {number}"
        for each in rule.get("onPodConditions") or []:
            if conditions.get(each["type"]) == each.get("status", "True"):
                return rule["action"], f"Pod {meta['name']} has condition {each['type']}"
    return "Count", ""


class JobController:
    """Syncs every Job of a server, one after another, until it is stopped."""

    def __init__(self, api: Cluster, *, backoff: float = 0.5, pause: float = 0.2) -> None:
        self._api = Kept(api._api)
        self._backoff, self._pause = backoff, pause  # seconds; Kubernetes begins with 10
        self._counted = set[str]()  # UIDs of pods that are in the Job's status
        self._succeeded = dict[str, set[int]]()  # UID of the Job -> indexes
        self._failed_at = dict[str, float]()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """In a thread, for the block."""
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(self._pause):
                with contextlib.suppress(ApiError):  # conflicts, namespaces that end
                    self.sync_all()

        thread = threading.Thread(target=run, name="job-controller", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.sync_all()  # no finalizer of ours is left behind

    def sync_all(self) -> None:
        """One look at every Job."""
        jobs = {job["metadata"]["uid"]: job for job in self._api.find(JOB)}
        pods: dict[str, list[Object]] = {uid: [] for uid in jobs}
        for pod in self._api.find(POD):
            for owner in pod["metadata"].get("ownerReferences") or []:
                if owner.get("controller") and owner["kind"] == "Job":
                    pods.setdefault(owner["uid"], []).append(pod)
        for uid, own in pods.items():
            job = jobs.get(uid)
            if job is None or job["metadata"].get("deletionTimestamp"):
                for pod in own:
                    self._release(pod)
            elif WHOLE in (job["metadata"].get("annotations") or {}):
                with contextlib.suppress(ApiError):
                    self._sync(job, own)

    def _release(self, pod: Object) -> None:
        """It is counted, or nobody counts any more: it may go."""
        finalizers = pod["metadata"].get("finalizers") or []
        if TRACKING in finalizers:
            rest = [each for each in finalizers if each != TRACKING]
            _merge(self._api, POD, pod, {"metadata": {"finalizers": rest or None}})

    def _sync(self, job: Object, pods: list[Object]) -> None:
        status = copy.deepcopy(job.get("status") or {})
        if is_true(job, "Complete") or is_true(job, "Failed"):
            for pod in pods:
                self._release(pod)
            return
        self._resume_or_suspend(job, status)
        self._count(job, status, pods)
        ending = next((k for k in ("FailureTarget", "SuccessCriteriaMet") if _has(status, k)), None)
        ending = ending or self._target(job, status)
        live = [pod for pod in pods if _phase(pod) not in ("Failed", "Succeeded")]
        if ending or job["spec"].get("suspend"):
            for pod in live:
                self._api.delete(POD, pod)
        else:
            live += self._start(job, status, live)
        status["active"] = sum(not pod["metadata"].get("deletionTimestamp") for pod in live)
        if ending and not live:
            last = next(c for c in status["conditions"] if c["type"] == ending)
            kind = "Failed" if ending == "FailureTarget" else "Complete"
            _set(status, kind, last["reason"], last["message"])
            if kind == "Complete":
                status["completionTime"] = format_time(datetime.now(UTC))
        if status != job.get("status"):
            _merge(self._api, JOB, job, {"status": status}, "/status")
        for pod in pods:
            if pod["metadata"]["uid"] in self._counted:
                self._release(pod)

    def _resume_or_suspend(self, job: Object, status: Object) -> None:
        if job["spec"].get("suspend"):
            if not _has(status, "Suspended"):
                _set(status, "Suspended", "JobSuspended", "Job suspended")
            status["startTime"] = None
        elif _has(status, "Suspended"):
            _set(status, "Suspended", "JobResumed", "Job resumed", value="False")
            status["startTime"] = format_time(datetime.now(UTC))
        elif not status.get("startTime"):
            status["startTime"] = format_time(datetime.now(UTC))

    def _count(self, job: Object, status: Object, pods: list[Object]) -> None:
        """Each pod that ended counts once; a terminating one only when it has ended."""
        done = self._succeeded.setdefault(job["metadata"]["uid"], set())
        for pod in pods:
            meta, phase = pod["metadata"], _phase(pod)
            if meta["uid"] in self._counted or phase not in ("Failed", "Succeeded"):
                continue
            self._counted.add(meta["uid"])
            if phase == "Succeeded":
                done.add(_index(pod))
                status["succeeded"] = status.get("succeeded", 0) + 1
                continue
            action, message = action_of(job, pod)
            if action == "FailJob" and not _has(status, "FailureTarget"):
                _set(status, "FailureTarget", "PodFailurePolicy", message)
            if action == "Ignore":
                continue
            status["failed"] = status.get("failed", 0) + 1
            self._failed_at[job["metadata"]["uid"]] = time.monotonic()

    def _target(self, job: Object, status: Object) -> str | None:
        """The condition that ends the Job, set where one applies: failure before success."""
        spec, done = job["spec"], self._succeeded[job["metadata"]["uid"]]
        started = status.get("startTime")
        limit = spec.get("activeDeadlineSeconds")
        if limit and started:
            age = (datetime.now(UTC) - parse_time(started)).total_seconds()
            if age >= limit:
                words = "Job was active longer than specified deadline"
                return _set(status, "FailureTarget", "DeadlineExceeded", words)
        if status.get("failed", 0) > spec.get("backoffLimit", 6):
            words = "Job has reached the specified backoff limit"
            return _set(status, "FailureTarget", "BackoffLimitExceeded", words)
        for number, rule in enumerate((spec.get("successPolicy") or {}).get("rules", [])):
            wanted = _indexes(rule["succeededIndexes"]) if "succeededIndexes" in rule else done
            count = rule.get("succeededCount", len(wanted))
            if len(done & wanted) >= count and count:
                words = f"Matched rules at index {number}"
                return _set(status, "SuccessCriteriaMet", "SuccessPolicy", words)
        if status.get("succeeded", 0) >= spec.get("completions", 1):
            words = "Reached expected number of succeeded pods"
            return _set(status, "SuccessCriteriaMet", "CompletionsReached", words)
        return None

    def _start(self, job: Object, status: Object, live: list[Object]) -> list[Object]:
        """The pods that are missing: by index, or by number; after a failure later and later."""
        spec, uid, failed = job["spec"], job["metadata"]["uid"], status.get("failed", 0)
        waited = time.monotonic() - self._failed_at.get(uid, 0.0)
        if failed and waited < min(self._backoff * 2 ** (failed - 1), 360):
            return []
        # podReplacementPolicy: whether a terminating pod keeps its place until it has ended
        early = spec.get("podReplacementPolicy") == "TerminatingOrFailed"
        held = [pod for pod in live if not (early and pod["metadata"].get("deletionTimestamp"))]
        parallelism, completions = spec.get("parallelism", 1), spec.get("completions", 1)
        if spec.get("completionMode") == "Indexed":
            taken = {_index(pod) for pod in held} | self._succeeded[uid]
            free = [index for index in range(completions) if index not in taken]
            wanted: list[int | None] = [*free[: parallelism - len(held)]]
        else:
            missing = min(parallelism, completions - status.get("succeeded", 0)) - len(held)
            wanted = [None] * max(missing, 0)
        return [made for index in wanted if (made := self._pod(job, index))]

    def _pod(self, job: Object, index: int | None) -> Object | None:
        meta, template = job["metadata"], copy.deepcopy(job["spec"]["template"])
        labels, annotations = template["metadata"]["labels"], template["metadata"]["annotations"]
        labels |= {
            "batch.kubernetes.io/job-name": meta["name"],
            "batch.kubernetes.io/controller-uid": meta["uid"],
        }
        pod, prefix = template["spec"], meta["name"]
        if index is not None:
            labels[INDEX] = annotations[INDEX] = str(index)
            prefix = f"{meta['name']}-{index}"
            pod["hostname"] = prefix
            source = {"fieldRef": {"fieldPath": f"metadata.labels['{INDEX}']"}}
            for container in [*pod["containers"], *pod.get("initContainers", [])]:
                container["env"].append({"name": "JOB_COMPLETION_INDEX", "valueFrom": source})
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": meta["uid"]}
        name = f"{prefix[:57]}-{secrets.token_hex(3)[:5]}"
        item = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": meta["namespace"],
                "labels": labels,
                "annotations": annotations,
                "finalizers": [TRACKING],
                "ownerReferences": [owner | {"controller": True, "blockOwnerDeletion": True}],
            },
            "spec": pod,
        }
        try:
            return self._api.create(POD, item)
        except ApiError as error:
            self._event(job, error.message)
            return None

    def _event(self, job: Object, message: str) -> None:
        meta, now = job["metadata"], format_time(datetime.now(UTC))
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "name": f"{meta['name'][:200]}.{secrets.token_hex(8)}",
                "namespace": meta["namespace"],
            },
            "involvedObject": {"kind": "Job", "namespace": meta["namespace"], "uid": meta["uid"]},
            "reason": "FailedCreate",
            "type": "Warning",
            "message": f"Error creating: {message}",
            "lastTimestamp": now,
        }
        self._api.create(CORE_EVENT, event)


def _phase(pod: Object) -> str:
    """A pod that is deleted before it has a node has failed."""
    unscheduled = not pod["spec"].get("nodeName") and pod["metadata"].get("deletionTimestamp")
    return "Failed" if unscheduled else str(pod["status"].get("phase"))


def _index(pod: Object) -> int:
    return int((pod["metadata"].get("annotations") or {}).get(INDEX, -1))


def _has(status: Object, kind: str) -> bool:
    return is_true({"status": status}, kind)


def _set(status: Object, kind: str, reason: str, message: str, value: str = "True") -> str:
    """Set a condition; gives its type."""
    rest = [each for each in status.get("conditions") or [] if each["type"] != kind]
    now = format_time(datetime.now(UTC))
    new = {"type": kind, "status": value, "reason": reason, "message": message}
    status["conditions"] = [*rest, new | {"lastTransitionTime": now, "lastProbeTime": now}]
    return kind
