"""A client to whom a server of 1.20 seems to know every field of a Job.

The server drops `completionMode`, `successPolicy`, `podFailurePolicy`, `podReplacementPolicy` and
`suspend` without a word. `Kept` stores the whole spec in an annotation beside them, shows it where
a Job is read, and refuses what a current server's validation refuses. The code that uses it is
the same as with a current server.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any

from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import JOB, Kind, Object

WHOLE = "tests/whole-spec"
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
        merge(self, JOB, job, {"metadata": {"annotations": annotations}})


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
        if not indexes(rule.get("succeededIndexes", "0")) <= set(range(spec["completions"])):
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


def indexes(text: str) -> set[int]:
    """ "0,2-3" -> {0, 2, 3}."""
    pairs = [part.partition("-") for part in text.split(",")]
    return {i for low, _, high in pairs for i in range(int(low), int(high or low) + 1)}


def merge(api: Cluster, kind: Kind, item: Object, body: Object, path: str = "") -> None:
    """A merge patch; an object that is gone is no error."""
    meta = item["metadata"]
    with contextlib.suppress(ApiError):
        api._call(
            "PATCH",
            kind.path(meta.get("namespace"), meta["name"]) + path,
            body=body,
            content="application/merge-patch+json",
        )
