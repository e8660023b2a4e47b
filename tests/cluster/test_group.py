"""Real pods of one Job: they start, find each other by name, survive each other, and end.

Objects, kubelet, containers, network and endpoints are real. The test bed has one node, no DNS and
an old Job controller: the rule that keeps two pods from one node is taken out, `pod_names` answers
from the real Endpoints, `job_controller` obeys the Job. NodeClaims are real, Karpenter is played.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import bed, pod_names
from cluster.job_controller import JobController
from cluster.place import (
    ROOT,
    HostPython,
    Place,
    docker_registry,
    ended,
    operated,
    reachable,
    serve,
)
from cluster.whole_jobs import Kept
from cluster.world import NODE_CLAIM_CRD, wait

from jobs.api import client
from jobs.api.kinds import JOB, NODE, NODE_CLAIM, POD, Kind, Object
from jobs.api.options import Nodes, with_policy
from jobs.controller import decide
from jobs.desired import names
from jobs.observed import objects

MACHINE = "Standard_NC24ads_A100_v4"  # one GPU: the bed's node has four on paper


class Grouped(Kept, HostPython):
    """Jobs of several pods, in the pods' network, with the engine or what stands in for it."""

    stands_in, share_a_node = True, True

    def fit(self, kind: Kind, item: Object) -> None:
        super().fit(kind, item)
        if kind != JOB:
            return
        pod, space = item["spec"]["template"]["spec"], item["metadata"]["namespace"]
        del pod["hostNetwork"]
        pod["dnsPolicy"] = "None"
        searches = [f"{space}.svc.cluster.local", "svc.cluster.local"]
        pod["dnsConfig"] = {"nameservers": [pod_names.GATEWAY], "searches": searches}
        if self.share_a_node:  # there is one
            assert pod["affinity"].pop("podAntiAffinity")
        if self.stands_in:
            container = pod["containers"][0]
            script = str(ROOT / "tests/cluster/meeting.py")
            container["command"] = ["python", script, *container["command"][3:]]


class Shared(Place):
    """Its volumes may be mounted on several nodes, and its nodes are provisioned."""

    access_mode = "ReadWriteMany"

    def node(self, **labels: str | None) -> None:
        """Label the node, as Karpenter does for a NodeClaim."""
        meta = {"labels": {names.WORKSPACE_LABEL: None, names.NAMESPACE_LABEL: None} | labels}
        self._patch(NODE, "localhost", {"metadata": meta})

    def nodes_come(self) -> None:
        """Both NodeClaims are ready."""
        wait(lambda: len(self.node_claims()) == 2)
        self.node(
            **{names.WORKSPACE_LABEL: "demo", names.NAMESPACE_LABEL: self.name},
        )
        for each in self.node_claims():
            kinds = ("Launched", "Registered", "Initialized", "Ready")
            conditions = [{"type": kind, "status": "True"} for kind in kinds]
            body = {"status": {"conditions": conditions}}
            self._patch(NODE_CLAIM, each["metadata"]["name"], body, "/status")

    def node_claims(self) -> list[Object]:
        labels = f"{names.NAMESPACE_LABEL}={self.name}"
        return self.api.find(NODE_CLAIM, labels=labels)

    def pods(self) -> dict[int, Object]:
        """The newest pod of each index."""
        pods = tuple(self.api.find(POD, self.name))
        return {objects.completion_index(pod): pod for pod in objects.newest_each(pods)}

    def kill(self, index: int) -> None:
        """As a node does that is lost."""
        path = POD.path(self.name, self.pods()[index]["metadata"]["name"])
        self.api._call("DELETE", path, body={"gracePeriodSeconds": 0})

    def lines(self, file: str) -> list[str]:
        """Of a file in the run directory of index 0."""
        path = self.folder / "run" / "run-0" / file
        return path.read_text().splitlines() if path.exists() else []

    def _patch(self, kind: Kind, name: str, body: Object, path: str = "") -> None:
        content = "application/merge-patch+json"
        self.api._call("PATCH", kind.path(None, name) + path, body=body, content=content)


@pytest.fixture(scope="module")
def tls(full: bed.Bed, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for the pods' gateway, of the bed's authority, and its key."""
    folder, pki = tmp_path_factory.mktemp("tls"), full.folder / "pki"
    key, request, made = (folder / name for name in ("tls.key", "tls.csr", "tls.crt"))
    (folder / "names").write_text(f"subjectAltName=IP:{pod_names.GATEWAY},IP:127.0.0.1\n")
    for command in (
        ["req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, "-subj", "/CN=r"],
        ["x509", "-req", "-in", request, "-CA", pki / "ca.crt", "-CAkey", pki / "ca.key",
         "-CAcreateserial", "-days", "30", "-out", made, "-extfile", folder / "names"],
    ):  # fmt: skip
        subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True)
    return made, key


@pytest.fixture(scope="module")
def gateway_registry(
    tls: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """host:port of a registry that pods reach in their own network."""
    with docker_registry(tmp_path_factory.mktemp("registry"), tls) as found:
        yield f"{pod_names.GATEWAY}:{found.rpartition(':')[2]}"


@pytest.fixture(scope="module")
def api(full: bed.Bed) -> Iterator[Grouped]:
    """The cluster with DNS for its pods, and our Job controller in place of its own."""
    with Grouped(client.connect(str(full.kubeconfig), threads=8)._api) as found:
        serve(found, NODE_CLAIM_CRD)
        with full.without("job"), JobController(found).at_work(), pod_names.served(found):
            yield found


@pytest.fixture
def place(
    full: bed.Bed,
    api: Grouped,
    gateway_registry: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Shared]:
    monkeypatch.setitem(decide.REQUEUE_SECONDS, "running", 0.5)
    there = Shared(full, api, reachable(tmp_path), gateway_registry)
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"registry: {{hosts: {{'{gateway_registry}': {{ca: ca.crt}}}}}}\n")
    (tmp_path / "ca.crt").write_text((full.folder / "pki/ca.crt").read_text())
    options = there.options.model_copy(update={"nodes": Nodes(provision=True), "backoff_limit": 4})
    there.options = with_policy(options, policy)
    with operated(there) as found:
        yield found
    there.node()


def test_two_pods_find_each_other_and_end(place: Shared) -> None:
    """Each at its own address, index 0 under its name; progress and result are index 0's, and both
    nodes are given back."""
    place.apply("two:1", count=2, instance=MACHINE)
    place.nodes_come()
    place.until(lambda s: s.get("state") == "Running")
    pods = place.pods()
    assert 2 == len({pod["status"]["podIP"] for pod in pods.values()})
    name = f"{pods[0]['spec']['hostname']}.{pods[0]['spec']['subdomain']}"
    found = pod_names.address_of(place.api, f"{name}.{place.name}.svc.cluster.local")
    assert pods[0]["status"]["podIP"] == found
    assert 2 == place.status()["targetNodeCount"] == len(place.node_claims())
    place.until(lambda s: s.get("progress", {}).get("step", 0) > 1)
    assert place.status()["progress"]["step"] <= 30  # the other says 1000
    status = place.until(ended)
    assert "Succeeded" == status["state"], status
    assert "30/30 (100%)" == status["progress"]["text"]
    assert status["output"]["digest"].startswith("sha256:abab")
    wait(lambda: not place.node_claims())


def test_two_pods_never_share_a_node(
    place: Shared, api: Grouped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it has the GPUs of both: the scheduler keeps one away, and the status says why."""
    monkeypatch.setattr(api, "share_a_node", False)
    place.apply("apart:1", count=2, instance=MACHINE)
    place.nodes_come()
    status = place.until(lambda s: "anti-affinity" in json.dumps(s))
    assert "Pending" == status["state"]
    phases = sorted(pod["status"]["phase"] for pod in place.pods().values())
    assert "Pending" == phases[0] and 2 == len(phases)


def uid(pod: Object | None) -> str:
    return pod["metadata"]["uid"] if pod else ""


@pytest.mark.parametrize("index", [0, 1])
def test_a_pod_that_is_killed_is_replaced_and_the_group_goes_on(place: Shared, index: int) -> None:
    """The other pod stays and waits for it: no step is lost, none is taken twice, and index 0 is
    found under its name at its next address, too."""
    place.apply(f"killed:{index}", count=2, instance=MACHINE)
    place.nodes_come()
    wait(lambda: len(place.lines("steps")) > 3, 60)
    before = place.pods()
    place.kill(index)
    wait(lambda: uid(place.pods().get(index)) not in ("", uid(before[index])), 60)
    assert uid(before[1 - index]) == uid(place.pods()[1 - index])
    status = place.until(ended)
    assert "Succeeded" == status["state"], status
    assert list(range(1, 31)) == [int(line.split()[0]) for line in place.lines("steps")]
    wait(lambda: not place.node_claims())


@pytest.mark.timeout(900)
def test_two_pods_train_one_adapter_and_survive_each_other(
    place: Shared, api: Grouped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model, sharded over two pods; first one, then the other is killed in mid-training,
    and the run goes on from its last checkpoint and pushes one image. Both nodes are given back."""
    monkeypatch.setattr(api, "stands_in", False)
    shard = "    fsdp: full_shard\n"
    place.apply("trained:1", count=2, steps=60, instance=MACHINE, arguments=shard)
    place.nodes_come()
    for index, step in ((1, 8), (0, 30)):
        wait(lambda step=step: len(place.lines("metrics.jsonl")) >= step, 400)
        place.kill(index)
    status = place.until(ended, 400)
    assert "Succeeded" == status["state"], status
    steps = [json.loads(line)["step"] for line in place.lines("metrics.jsonl")]
    assert 60 == steps[-1] and len(steps) == len(set(steps))
    plan = json.loads((place.folder / "run/run-0/plan.json").read_text())
    assert (2, 2) == (plan["placement"]["ranks"], plan["placement"]["shards"])
    assert place.held("trained:1") == status["output"]["digest"]
    wait(lambda: not place.node_claims())
