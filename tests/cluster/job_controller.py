"""Kubernetes' Job controller as its documentation describes it, for a server that is older.

The API server of the test bed (1.20) drops fields of today's Jobs; `whole_jobs` keeps them, and
this controller obeys them, in place of the bed's own. The rules, by their place in the docs:
concepts/workloads/controllers/job (completion mode, success policy, pod failure policy, pod
replacement policy, suspending, termination and clean-up, tracking with finalizers) and
reference/kubernetes-api/workload-resources/job-v1. What it does not play: backoffLimitPerIndex,
maxFailedIndexes, managedBy, elastic changes of completions.
"""

from __future__ import annotations

import contextlib
import copy
import secrets
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from cluster.repeating import repeated
from cluster.whole_jobs import WHOLE, Kept, indexes, merge

from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import CORE_EVENT, JOB, POD, Object
from jobs.observed.objects import format_time, is_true, parse_time

TRACKING = "batch.kubernetes.io/job-tracking"
INDEX = "batch.kubernetes.io/job-completion-index"


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

        def step() -> None:
            with contextlib.suppress(ApiError):  # conflicts, namespaces that end
                self.sync_all()

        try:
            with repeated(step, pause=self._pause):
                yield
        finally:
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
            merge(self._api, POD, pod, {"metadata": {"finalizers": rest or None}})

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
            merge(self._api, JOB, job, {"status": status}, "/status")
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
            wanted = indexes(rule["succeededIndexes"]) if "succeededIndexes" in rule else done
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
