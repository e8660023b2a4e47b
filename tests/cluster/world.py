"""What tests of the operator on a real API server share: objects, small verbs, a played kubelet."""

from __future__ import annotations

import contextlib
import copy
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import CONFIG_MAP, JOB, NODE_CLAIM, POD, WORKSPACE, Kind, Object
from jobs.api.options import Options
from jobs.controller.operator import Operator, Setup
from jobs.controller.reconcile import reconcile
from jobs.observed import objects
from jobs.observed.observe import Context
from jobs.observed.site import Site

NAMESPACE = Kind("", "v1", "namespaces", "Namespace", namespaced=False)
ACCOUNT = Kind("", "v1", "serviceaccounts", "ServiceAccount")
SECRET = Kind("", "v1", "secrets", "Secret")
CORE_EVENT = Kind("", "v1", "events", "Event")
DIGEST = "sha256:" + "ab" * 32

# Karpenter's kind, as far as we speak to it; its controller is played by the tests.
NODE_CLAIM_CRD: Object = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "nodeclaims.karpenter.sh"},
    "spec": {
        "group": "karpenter.sh",
        "scope": "Cluster",
        "names": {"kind": "NodeClaim", "plural": "nodeclaims", "singular": "nodeclaim"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "subresources": {"status": {}},
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "x-kubernetes-preserve-unknown-fields": True,
                    }
                },
            }
        ],
    },
}


def workspace(name: str, namespace: str = "default", **tuning: Any) -> Object:
    """A Workspace that is valid and fits its machine."""
    return {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": name, "namespace": namespace},
        "resource": {
            "instanceType": "Standard_NC24ads_A100_v4",
            "labelSelector": {"matchLabels": {"apps": name}},
        },
        "tuning": {
            "preset": {"name": "phi-3-mini-4k-instruct"},
            "method": "qlora",
            "input": {"urls": ["https://data.example.com/train.jsonl"]},
            "output": {"image": "registry.example.com/team/a:1", "imagePushSecret": "push"},
        }
        | tuning,
    }


def config_map(name: str, namespace: str, text: str) -> Object:
    """A ConfigMap with a training_config."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace},
        "data": {"training_config.yaml": text},
    }


class World:
    """One namespace of a real API server, an operator that is called step by step, and a kubelet
    that is played: pods never run here, their status is what a test says."""

    def __init__(self, api: Cluster, namespace: str, options: Options | None = None) -> None:
        self.api, self.namespace = api, namespace
        self.options = options or Options()
        self.late = 0.0  # seconds that the operator's clock is ahead
        self.progress: dict[str, Any] | None = None

    def context(self, cluster: Cluster | None = None) -> Context:
        api = cluster or self.api
        return Context(
            api,
            self.options,
            Site(api, self.options),
            lambda pod: self.progress,
            lambda: datetime.now(UTC) + timedelta(seconds=self.late),
        )

    # verbs

    def apply(self, item: Object) -> Object:
        """Create, or replace what a user may replace."""
        item = copy.deepcopy(item)
        kind = {"Workspace": WORKSPACE, "ConfigMap": CONFIG_MAP}[item["kind"]]
        old = self.api.get(kind, self.namespace, item["metadata"]["name"])
        if old is None:
            made = self.api.create(kind, item)
            assert made is not None
            return made
        item["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
        item["metadata"].setdefault("finalizers", old["metadata"].get("finalizers", []))
        return self.api.replace(kind, item)

    def get(self, name: str) -> Object:
        found = self.api.get(WORKSPACE, self.namespace, name)
        assert found is not None, f"no Workspace {name}"
        return found

    def status(self, name: str) -> Object:
        found: Object = self.get(name).get("status", {})
        return found

    def condition(self, name: str, kind: str) -> tuple[str, str]:
        found = objects.condition(self.get(name), kind)
        return (found["status"], found["reason"]) if found else ("", "")

    def jobs(self) -> list[Object]:
        return self.api.find(JOB, self.namespace)

    def pods(self) -> list[Object]:
        return self.api.find(POD, self.namespace)

    def node_claims(self) -> list[Object]:
        return self.api.find(NODE_CLAIM)

    def step(self, name: str, *, times: int = 1, cluster: Cluster | None = None) -> None:
        """Let the operator look `times` times; a conflict is what it is: look again."""
        context = self.context(cluster)
        for _ in range(times):
            try:
                reconcile(context, self.namespace, name)
            except ApiError as error:
                if error.status != 409:
                    raise

    def until(self, name: str, ready: Callable[[], Any], what: str = "") -> Any:
        """Let the operator look until `ready` answers something."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            self.step(name)
            if found := ready():
                return found
            time.sleep(0.1)
        raise AssertionError(f"never: {what or ready}; status {json.dumps(self.status(name))}")

    def state(self, name: str, expected: str) -> Object:
        """Let the operator look until the state is `expected`; gives the status."""
        self.until(name, lambda: self.status(name).get("state") == expected, expected)
        return self.status(name)

    # the kubelet, Kueue and Karpenter, played

    def pod(self, name: str) -> Object:
        """The newest pod of the Workspace that has not ended."""

        def alive() -> Object | None:
            own = [
                p
                for p in self.pods()
                if p["metadata"].get("labels", {}).get("kaito.sh/workspace") == name
                and p["status"].get("phase") not in ("Failed", "Succeeded")
                and not p["metadata"].get("deletionTimestamp")
            ]
            return objects.newest(tuple(own))

        found: Object = self.until(name, alive, "a pod")
        return found

    def patch_status(self, kind: Kind, item: Object, status: Object) -> None:
        meta = item["metadata"]
        self.api._call(
            "PATCH",
            kind.path(meta.get("namespace"), meta["name"]) + "/status",
            body={"status": status},
            content="application/merge-patch+json",
        )

    def run(self, pod: Object) -> None:
        """The engine's container starts."""
        state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
        self._container(pod, "Running", state, podIP="127.0.0.1")

    def end(
        self, pod: Object, code: int, message: Object | str | None = None, reason: str = ""
    ) -> None:
        """The engine's container ends."""
        text = message if isinstance(message, str) else json.dumps(message) if message else ""
        ended = {"exitCode": code, "message": text, "reason": reason or "Completed"}
        phase = "Failed" if code else "Succeeded"
        self._container(pod, phase, {"terminated": ended})

    def wait_for_image(self, pod: Object, reason: str, message: str) -> None:
        """The container does not start."""
        state = {"waiting": {"reason": reason, "message": message}}
        self._container(pod, "Pending", state)

    def _container(self, pod: Object, phase: str, state: Object, **more: Any) -> None:
        status = {
            "name": "tuning",
            "image": "x",
            "imageID": "",
            "ready": phase == "Running",
            "restartCount": 0,
            "state": state,
        }
        scheduled = {"type": "PodScheduled", "status": "True"}
        ready = {"type": "Ready", "status": "True" if phase == "Running" else "False"}
        self.patch_status(
            POD,
            pod,
            {"phase": phase, "conditions": [scheduled, ready], "containerStatuses": [status]}
            | more,
        )

    def node_is_ready(self) -> None:
        for node_claim in self.node_claims():
            kinds = ("Launched", "Registered", "Initialized", "Ready")
            conditions = [{"type": kind, "status": "True"} for kind in kinds]
            self.patch_status(NODE_CLAIM, node_claim, {"conditions": conditions})


def wait(ready: Callable[[], Any], seconds: float = 180) -> Any:
    """What `ready` answers, as soon as that is something."""
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)
    return found


def fresh(api: Cluster, **options: Any) -> World:
    """A world in a namespace of its own."""
    name = f"t-{secrets.token_hex(4)}"
    api.create(NAMESPACE, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    wait(lambda: (api.get(ACCOUNT, name, "default") or {}).get("secrets"))
    return World(api, name, Options(**options))


SUCCESS: Object = {
    "phase": "finish",
    "code": 0,
    "reason": "Succeeded",
    "step": 24,
    "steps": 24,
    "loss": 0.5,
    "digest": DIGEST,
    "peakMemoryBytes": 12345,
    "baseRevision": "c" * 40,
}


@contextlib.contextmanager
def operating(
    api: Cluster, options: Options, *, elect: bool = False, resync: int = 300, **setup: Any
) -> Iterator[Operator]:
    """An operator in threads, for as long as the block lasts."""
    found = Operator(
        api,
        options,
        Setup("one", elect=elect, resync=resync, **setup),
        poll=lambda pod: {"step": 1, "steps": 2},
    )
    stop = threading.Event()
    thread = threading.Thread(target=found.run, args=(stop,))
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
