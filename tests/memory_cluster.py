"""An API server in memory, with a cluster's clock: what is stored, and what refuses to be."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from cluster.world import workspace

from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import (
    CORE_EVENT,
    DEPLOYMENT,
    JOB,
    NODE_CLAIM,
    POD,
    WORKSPACE,
    Kind,
    Object,
)
from jobs.api.options import Nodes, Options, Storage
from jobs.controller.reconcile import reconcile
from jobs.desired import names
from jobs.observed import objects
from jobs.observed.observe import Context
from jobs.observed.site import Site

START = datetime(2026, 1, 1, tzinfo=UTC)
REPLICA_SETS = Kind("apps", "v1", "replicasets", "ReplicaSet")
INDEX = "batch.kubernetes.io/job-completion-index"
Key = tuple[str, str]


class Memory(Cluster):
    """Stores objects by kind and name; `refused` holds the error that creating a kind gives."""

    def __init__(self) -> None:
        self.now, self.stored = START, dict[Key, Object]()
        self.refused: dict[Kind, ApiError] = {}
        self.rehearsed: dict[Kind, ApiError] = {}  # the same in a dry run
        self.uids = itertools.count(1)
        self.events: list[tuple[str, str, str]] = []  # type, reason, note

    def stamp(self) -> str:
        return objects.format_time(self.now)

    def put(self, kind: Kind, item: Object) -> Object:
        item = copy.deepcopy(item)
        meta = {"uid": f"u{next(self.uids)}", "creationTimestamp": self.stamp(), "generation": 1}
        item["metadata"] = meta | item["metadata"]
        self.stored[kind.plural, item["metadata"]["name"]] = item
        return item

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        return copy.deepcopy(self.stored.get((kind.plural, name)))

    def find(self, kind: Kind, namespace: str | None = None, *, labels: str = "",
             fields: str = "", cached: bool = False) -> list[Object]:  # fmt: skip
        wanted = dict(each.split("=") for each in labels.split(",") if each)
        about = fields.removeprefix("involvedObject.uid=")
        return [
            copy.deepcopy(item)
            for (plural, _), item in self.stored.items()
            if plural == kind.plural
            and wanted.items() <= (item["metadata"].get("labels") or {}).items()
            and (kind != CORE_EVENT or item["involvedObject"]["uid"] == about)
        ]

    def pages(self, *arguments: Any, **more: Any) -> Iterator[tuple[list[Object], str]]:
        yield self.find(*arguments, **more), "1"

    def create(self, kind: Kind, item: Object) -> Object | None:
        if kind in self.refused:
            raise self.refused[kind]
        if (kind.plural, item["metadata"]["name"]) in self.stored:
            return None
        return self.put(kind, item)

    def rehearse(self, kind: Kind, item: Object) -> None:
        if kind in self.rehearsed:
            raise self.rehearsed[kind]

    def replace(self, kind: Kind, item: Object) -> Object:
        if kind in self.refused:
            raise self.refused[kind]
        self.stored[kind.plural, item["metadata"]["name"]] = copy.deepcopy(item)
        return item

    def replace_status(self, kind: Kind, item: Object, status: Object) -> Object | None:
        stored = self.stored[kind.plural, item["metadata"]["name"]]
        stored["status"] = copy.deepcopy(status)
        return copy.deepcopy(stored)

    def set_finalizers(self, kind: Kind, item: Object, finalizers: list[str]) -> Object | None:
        stored = self.stored[kind.plural, item["metadata"]["name"]]
        stored["metadata"]["finalizers"] = finalizers
        return copy.deepcopy(stored)

    def delete(self, kind: Kind, item: Object) -> None:
        uid = item["metadata"]["uid"]
        self.stored.pop((kind.plural, item["metadata"]["name"]), None)
        for key, each in list(self.stored.items()):
            if names.is_owned_by(each, uid):
                del self.stored[key]

    def event(self, about: Object, *, kind: str, reason: str, note: str) -> None:
        self.events.append((kind, reason, note))


class Scene:
    """One Workspace whose nodes are provisioned, an operator, and a cluster that is played."""

    def __init__(self, *, serves: bool = False, count: int = 1, **options: Any) -> None:
        self.api = Memory()
        storage = Storage(storage_class="fast")
        self.options = Options(nodes=Nodes(provision=True), storage=storage, **options)
        item = workspace("phi", "team")
        item["resource"] |= {"count": count} if count > 1 else {}
        if serves:
            del item["tuning"]
            item["inference"] = {"preset": {"name": "phi-3-mini-4k-instruct"}}
        self.api.put(WORKSPACE, item)
        site = Site(self.api, self.options, clock=lambda: self.api.now.timestamp())
        self.context = Context(self.api, self.options, site, lambda pod: None, lambda: self.api.now)
        self.pods = itertools.count(1)

    def look(self, seconds: float = 0) -> Object:
        """Let the operator reconcile after `seconds`; gives the status."""
        self.api.now += timedelta(seconds=seconds)
        with contextlib.suppress(ApiError):  # the workqueue tries again
            reconcile(self.context, "team", "phi")
        return self.status

    @property
    def status(self) -> Object:
        found: Object = self.api.stored["workspaces", "phi"].get("status") or {}
        return found

    def reason(self, kind: str) -> str:
        found = objects.condition({"status": self.status}, kind)
        return str(found["reason"]) if found else ""

    def owned(self, kind: Kind) -> list[Object]:
        return [item for (plural, _), item in self.api.stored.items() if plural == kind.plural]

    def nodes_are_ready(self, count: int = 100) -> None:
        """The first `count` of the nodes that are requested come."""
        for item in self.owned(NODE_CLAIM)[:count]:
            if not objects.is_true(item, "Ready"):
                ready = {"status": "True", "lastTransitionTime": self.api.stamp()}
                kinds = ("Launched", "Registered", "Ready")
                item["status"] = {"conditions": [ready | {"type": kind} for kind in kinds]}

    def with_node(self) -> Scene:
        """Until a node is ready, and what needs it is created or refused."""
        for _ in range(3):
            self.look(1)
            self.nodes_are_ready()
        self.look(1)
        return self

    def pod(self, *, index: int | None = None, scheduled: bool = True, **status: Any) -> Object:
        """A further pod of the Job or server; of an Indexed Job, the one of `index`."""
        (owner,) = self.owned(JOB) or self.owned(DEPLOYMENT)
        meta = owner["metadata"]
        labels = meta["labels"] | {"job-name": meta["name"]}
        conditions = [
            {
                "type": "PodScheduled",
                "status": str(scheduled),
                "message": "" if scheduled else "0/1 nodes are available: 1 Insufficient gpu.",
                "lastTransitionTime": self.api.stamp(),
            }
        ]
        controller = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "controller": True}
        controller |= {"name": meta["name"], "uid": meta["uid"]}
        if owner["kind"] == DEPLOYMENT.name:  # its ReplicaSet is between the two
            name = f"{meta['name']}-set"
            put = self.api.stored.get(("replicasets", name)) or self.api.put(
                REPLICA_SETS, {"metadata": {"name": name, "ownerReferences": [controller]}}
            )
            uid = put["metadata"]["uid"]
            controller = controller | {"kind": "ReplicaSet", "name": name, "uid": uid}
        return self.api.put(
            POD,
            {
                "metadata": {
                    "name": f"pod-{next(self.pods)}",
                    "namespace": "team",
                    "labels": labels,
                    "annotations": {} if index is None else {INDEX: str(index)},
                    "ownerReferences": [controller],
                },
                "spec": {"nodeName": f"n{index or ''}"} if scheduled else {},
                "status": {"phase": "Pending", "conditions": conditions} | status,
            },
        )

    def ends_job(self, kind: str) -> None:
        """The Job's controller sets a condition."""
        true = {"type": kind, "status": "True", "lastTransitionTime": self.api.stamp()}
        self.owned(JOB)[0]["status"] = {"conditions": [true]}

    def tell(self, about: Object, reason: str, message: str) -> None:
        """An event."""
        item = {
            "metadata": {"name": f"event-{next(self.pods)}"},
            "involvedObject": {"uid": about["metadata"]["uid"]},
            "reason": reason,
            "message": message,
            "lastTimestamp": self.api.stamp(),
        }
        self.api.put(CORE_EVENT, item)


def engine(state: Object, *others: Object) -> Object:
    """A pod's status with the engine's container in `state`, beside other containers."""
    return {"containerStatuses": [{"name": "tuning", "state": state}, *others]}


def ended(code: int, message: str = "", at: datetime | None = None) -> Object:
    """The state of a container that terminated."""
    terminated: Object = {"exitCode": code, "message": message, "reason": "Error" if code else ""}
    if at:
        terminated["finishedAt"] = objects.format_time(at)
    return {"terminated": terminated}
