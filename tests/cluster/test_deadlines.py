"""A provisioned node on which nothing can run is given back: refusals of a real API server, of real
admission, of a real kubelet. Karpenter is played; tests/jobs/test_deadlines.py has all others."""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cluster import bed
from cluster.place import HostPython, Place, docker_registry, operated, reachable, serve
from cluster.world import NODE_CLAIM_CRD, World, fresh, wait, workspace

from jobs.api import client
from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import JOB, NODE, NODE_CLAIM, POD, WEBHOOK, Kind, Object
from jobs.api.options import MAX_ANNOTATIONS, Nodes
from jobs.desired import names
from jobs.desired import tuning as desired_tuning
from jobs.manifests import job as job_manifests
from jobs.observed import objects

QUOTA = Kind("", "v1", "resourcequotas", "ResourceQuota")
INSTANCE = "Standard_NC24ads_A100_v4"


def quota(world: World, resource: str) -> Object:
    """A quota of none, once the API server enforces it."""
    item = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none", "namespace": world.namespace},
        "spec": {"hard": {resource: "0"}},
    }
    made = world.api.create(QUOTA, item)
    assert made is not None
    wait(
        lambda: (world.api.get(QUOTA, world.namespace, "none") or {}).get("status", {}).get("hard")
    )
    return made


def mine(world: World) -> list[Object]:
    labels = f"{names.UID_LABEL}={world.get('phi')['metadata']['uid']}"
    return world.api.find(NODE_CLAIM, labels=labels)


def with_node(api: Cluster) -> World:
    """A Workspace whose node is ready, before anything is created on it."""
    world = fresh(api, nodes=Nodes(provision=True))
    world.apply(workspace("phi", world.namespace))
    world.step("phi", times=2)
    assert 1 == len(mine(world))
    world.node_is_ready()
    return world


def gives_back(world: World, *words: str) -> None:
    """Pending with the words; after the deadline, Failed with the words and without a node."""

    def told() -> bool:
        conditions = json.dumps(world.status("phi")["conditions"])
        return all(word in conditions for word in words)

    world.until("phi", told, str(words))
    assert "Pending" == world.status("phi")["state"]
    assert mine(world)
    world.late += world.options.stuck_seconds + 5
    status = world.state("phi", "Failed")
    assert all(word in status["failure"]["message"] for word in words), status["failure"]
    world.until("phi", lambda: not mine(world) and not world.jobs(), "the node's end")


@contextmanager
def webhook(server: bed.Bed, world: World, *, answer: bool, folder: Path) -> Iterator[None]:
    """A real admission webhook for Jobs of the namespace: it denies them, or does not answer."""
    key, certificate = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip

    class Deny(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            denied = {"code": 418, "reason": "not signed!", "message": "sign your images"}
            response = {"uid": review["request"]["uid"], "allowed": False, "status": denied}
            body = json.dumps(
                {k: review[k] for k in ("apiVersion", "kind")} | {"response": response}
            )
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Deny)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    http.socket = context.wrap_socket(http.socket, server_side=True)
    port = http.server_address[1] if answer else 1
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    space = f"in-{world.namespace}"
    world.api._call(
        "PATCH",
        f"/api/v1/namespaces/{world.namespace}",
        body={"metadata": {"labels": {space: "yes"}}},
        content="application/merge-patch+json",
    )
    rule = {"apiGroups": ["batch"], "apiVersions": ["v1"], "resources": ["jobs"]}
    item = world.api.create(
        WEBHOOK,
        {
            "apiVersion": WEBHOOK.api_version,
            "kind": WEBHOOK.name,
            "metadata": {"name": world.namespace},
            "webhooks": [
                {
                    "name": "images.example.com",
                    "admissionReviewVersions": ["v1"],
                    "sideEffects": "None",
                    "failurePolicy": "Fail",
                    "timeoutSeconds": 2,
                    "namespaceSelector": {"matchLabels": {space: "yes"}},
                    "rules": [rule | {"operations": ["CREATE"]}],
                    "clientConfig": {
                        "url": f"https://127.0.0.1:{port}/",
                        "caBundle": base64.b64encode(certificate.read_bytes()).decode(),
                    },
                }
            ],
        },
    )
    assert item is not None
    probe = {"apiVersion": "batch/v1", "kind": "Job",
             "metadata": {"name": "probe", "namespace": world.namespace},
             "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [
                 {"name": "x", "image": "x"}]}}}}  # fmt: skip

    def works() -> bool:
        try:
            world.api.rehearse(JOB, probe)
        except ApiError:
            return True
        return False

    try:
        wait(works)
        yield
    finally:
        world.api.delete(WEBHOOK, item)
        http.shutdown()
        http.server_close()
        thread.join()


def test_a_quota_of_jobs_buys_no_node_and_is_waited_for(api: Cluster) -> None:
    """The Job is tried in a dry run before a node is paid for; with the quota gone, all goes on."""
    world = fresh(api, nodes=Nodes(provision=True))
    full = quota(world, "count/jobs.batch")
    world.apply(workspace("phi", world.namespace))
    world.step("phi", times=3)
    assert [] == mine(world)
    assert ("False", "Forbidden") == world.condition("phi", "ResourceReady")
    assert "exceeded quota: none" in json.dumps(world.status("phi"))
    before = world.status("phi")
    world.step("phi", times=2)
    assert before == world.status("phi")
    api.delete(QUOTA, full)
    world.until("phi", lambda: mine(world), "a node")
    world.node_is_ready()
    world.until("phi", world.jobs, "a Job")


def test_a_quota_that_comes_later_costs_a_quarter_of_an_hour(api: Cluster) -> None:
    """The Job is refused when the node is there: its words, the deadline, and the node goes."""
    world = with_node(api)
    quota(world, "count/jobs.batch")
    gives_back(world, "exceeded quota: none", "count/jobs.batch=0")


def test_a_quota_of_pods_costs_a_quarter_of_an_hour(api: Cluster) -> None:
    """The Job is there, and its controller may not create the pod."""
    world = with_node(api)
    quota(world, "pods")
    world.late = 10
    gives_back(world, "exceeded quota: none", "pods=0")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (True, 'admission webhook "images.example.com" denied the request: sign your images'),
        (False, 'failed calling webhook "images.example.com"'),
    ],
)
def test_admission_is_told_in_its_own_words(
    server: bed.Bed, api: Cluster, tmp_path: Path, answer: bool, words: str
) -> None:
    """A webhook that denies, with a code and a reason of its own, or that is down. Before the node:
    none is bought. After it: the deadline."""
    world = fresh(api, nodes=Nodes(provision=True))
    with webhook(server, world, answer=answer, folder=tmp_path):
        world.apply(workspace("phi", world.namespace))
        for _ in range(3):
            try:
                world.step("phi")
            except ApiError as error:  # a webhook that is down is tried again
                assert 500 == error.status and not answer
        assert [] == mine(world)
        assert words in json.dumps(world.status("phi")["conditions"]).replace("\\", "")
    world = with_node(api)
    with webhook(server, world, answer=answer, folder=tmp_path):
        for late in (0, world.options.stuck_seconds + 5):
            world.late = late
            try:
                world.step("phi", times=2)
            except ApiError as error:
                assert 500 == error.status and not answer
            assert words in json.dumps(world.status("phi")["conditions"]).replace("\\", "")
        assert "Failed" == world.state("phi", "Failed")["state"]
        assert words in world.status("phi")["failure"]["message"]
        world.until("phi", lambda: not mine(world), "the node's end")


def test_what_we_measure_is_what_the_api_server_takes(api: Cluster) -> None:
    """The limit of what travels in annotations is within the API server's own, not far from it; and
    a document beyond it buys nothing, makes no Job, and says how large it is."""
    world = fresh(api, nodes=Nodes(provision=True))
    made = world.apply(workspace("phi", world.namespace))
    desired = desired_tuning.read(made, None, None)
    job = job_manifests.job(made, desired, world.options, claim=False, earlier=())
    annotations = job["spec"]["template"]["metadata"]["annotations"]
    size = sum(len(key) + len(value) for key, value in annotations.items())
    annotations["tuning.kaito.sh/document"] += " " * (MAX_ANNOTATIONS - size)
    world.api.rehearse(JOB, job)
    annotations["tuning.kaito.sh/document"] += " " * (262_145 - MAX_ANNOTATIONS)
    with pytest.raises(ApiError) as refused:
        world.api.rehearse(JOB, job)
    assert 422 == refused.value.status
    urls = [f"https://data.example.com/{i:06}/{'x' * 1500}.jsonl" for i in range(200)]
    world.apply(workspace("big", world.namespace, input={"urls": urls}))
    world.step("big", times=3)
    assert ("False", "SpecTooLarge") == world.condition("big", "SpecValid")
    assert f"{MAX_ANNOTATIONS:,} bytes" in world.status("big")["failure"]["message"]
    labels = f"{names.UID_LABEL}={world.get('big')['metadata']['uid']}"
    assert [] == api.find(NODE_CLAIM, labels=labels) == world.jobs()


# real pods on a node that Karpenter would have provisioned


class Altered(HostPython):
    """Adds to the pod of the Job what a cluster's webhooks would add."""

    sidecar = False
    huge = False

    def fit(self, kind: Kind, item: Object) -> None:
        super().fit(kind, item)
        if kind != JOB:
            return
        pod = item["spec"]["template"]["spec"]
        if self.sidecar:
            command = ["sh", "-c", "trap exit TERM; sleep 3600 & wait"]
            sidecar = {"name": "istio-proxy", "image": "localhost/busybox:test"}
            pod["containers"].append(sidecar | {"imagePullPolicy": "Never", "command": command})
        if self.huge:  # bound past the scheduler: the kubelet itself refuses it
            pod["nodeName"] = "localhost"
            pod["containers"][0]["resources"]["requests"]["cpu"] = "1000"


@pytest.fixture
def bought(full: bed.Bed, login_registry: str, tmp_path: Path) -> Iterator[Place]:
    """A place whose operator provisions nodes; each is the cluster's one node."""
    with Altered(client.connect(str(full.kubeconfig), threads=8)._api) as api:
        serve(api, NODE_CLAIM_CRD)
        place = Place(full, api, reachable(tmp_path), login_registry)
        changed = {"stuck_seconds": 20, "gpu_resource": "x.test/gpu"}
        place.options = place.options.model_copy(update={"nodes": Nodes(provision=True)} | changed)
        with operated(place):
            yield place


def provision(place: Place) -> None:
    """What Karpenter does: the node has the claim's labels, and the claim is ready."""
    (claim,) = wait(lambda: place.api.find(NODE_CLAIM))
    labels = {
        key: claim["metadata"]["labels"][key]
        for key in (names.WORKSPACE_LABEL, names.NAMESPACE_LABEL)
    }
    merge = "application/merge-patch+json"
    place.api._call("PATCH", NODE.path(None, "localhost"), body={"metadata": {"labels": labels}},
                    content=merge)  # fmt: skip
    gpu = {"status": {"capacity": {"x.test/gpu": "4"}, "allocatable": {"x.test/gpu": "4"}}}
    place.api._call("PATCH", NODE.path(None, "localhost") + "/status", body=gpu, content=merge)
    status = {"conditions": [{"type": kind, "status": "True"} for kind in ("Launched", "Ready")]}
    place.api._call("PATCH", NODE_CLAIM.path(None, claim["metadata"]["name"]) + "/status",
                    body={"status": status}, content=merge)  # fmt: skip


def end_of(place: Place, *, seconds: float = 150) -> Object:
    """The status when the Workspace has ended, its node is gone and no pod of it runs."""
    provision(place)
    status = place.until(lambda s: s.get("state") in ("Succeeded", "Failed"), seconds)
    wait(lambda: not place.api.find(NODE_CLAIM), 60)
    wait(lambda: all(objects.is_over(pod) for pod in place.api.find(POD, place.name)), 90)
    return status


def test_an_image_that_does_not_exist_keeps_no_node(bought: Place) -> None:
    """The kubelet's own words on it, and the node is given back."""
    bought.options.__dict__["image"] = "localhost/none:1"
    bought.apply("a:1", instance=INSTANCE)
    status = end_of(bought)
    assert "ImagePullError" == status["failure"]["reason"], status
    assert "localhost/none:1" in status["failure"]["message"]
    assert "for 20 s" in status["failure"]["message"]


def test_a_secret_that_does_not_exist_keeps_no_node(bought: Place) -> None:
    """The volume of the Secret cannot be mounted."""
    bought.apply("a:1", instance=INSTANCE, secret="absent")
    status = end_of(bought)
    assert "SecretNotFound" == status["failure"]["reason"], status
    assert 'secret "absent" not found' in status["failure"]["message"]


def test_a_pod_that_the_kubelet_refuses_keeps_no_node(
    bought: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OutOfcpu has no container to say anything: the pod's own status does."""
    monkeypatch.setattr(Altered, "huge", True)
    bought.options.__dict__["backoff_limit"] = 1
    bought.apply("a:1", instance=INSTANCE)
    status = end_of(bought)
    assert "OutOfcpu" == status["failure"]["reason"], status
    assert "enough resource: cpu" in status["failure"]["message"]


def test_a_sidecar_that_goes_on_keeps_neither_node_nor_digest(
    bought: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine pushed its adapter and ended; istio-proxy would run for an hour."""
    monkeypatch.setattr(Altered, "sidecar", True)
    bought.apply("sidecar:1", instance=INSTANCE)
    status = end_of(bought)
    assert "Succeeded" == status["state"], status
    assert bought.held("sidecar:1") == status["output"]["digest"]
    told = json.dumps(status["conditions"])
    assert "the container istio-proxy of its pod still ran" in told


def test_a_try_that_failed_is_told_while_the_next_one_starts(bought: Place) -> None:
    """No registry listens: exit code 20, the engine's own words, and 'the next starts'."""
    with docker_registry(bought.folder) as gone:
        bought.registry = gone
    bought.apply("a:1", instance=INSTANCE)
    provision(bought)
    status = bought.until(lambda s: "try 1 failed: " in json.dumps(s), 150)
    told = json.dumps(status["conditions"])
    assert "REG-" in told and ("the next starts" in told or "Retried" in told)
