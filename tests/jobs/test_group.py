"""A run on several machines: its objects, and what the operator makes of its pods and nodes.

The operator is the whole one; the API server is in memory and its clock is turned. The same Job
with a Job controller that obeys its fields: tests/cluster/test_group.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kubernetes import client
from memory_cluster import Scene, ended, engine

from jobs.api.kinds import CLAIM, JOB, NODE_CLAIM, POD, SERVICE, Object
from jobs.api.options import Nodes, Options, Storage
from jobs.desired import tuning as desired_tuning
from jobs.manifests import group
from jobs.manifests import job as job_manifests
from jobs.observed import objects
from tuning.errors import REASONS

STUCK = Options().stuck_seconds
SLACK = 120
LABEL = re.compile("[a-z]([-a-z0-9]*[a-z0-9])?")
RUNS = engine({"running": {}})
DIGEST = "sha256:" + "ab" * 32


def stored(name: str, count: int, **changes: Any) -> Object:
    item = Scene(count=count).api.stored["workspaces", "phi"] | changes
    item["metadata"] |= {"name": name, "uid": "11111111-2222-3333-4444-555555555555"}
    return item


def made(item: Object, options: Options, *, claim: bool = False) -> tuple[Object, Object, Object]:
    """(Job, Service, network policy)."""
    desired = desired_tuning.read(item, None, None)
    assert desired.spec, desired.problems
    return (
        job_manifests.job(item, desired, options, claim=claim, earlier=()),
        group.service(item, desired),
        job_manifests.network_policy(item, desired, options),
    )


@given(st.from_regex(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True), st.integers(2, 64))
@settings(max_examples=25, deadline=None)
def test_every_pod_of_an_indexed_job_has_a_name_that_is_found(name: str, count: int) -> None:
    """The engine meets at a name that exists: host name and subdomain are DNS labels, the Service
    selects the pods and names them before they are ready. Typed models know every field."""
    job, service, policy = made(stored(name, count), Options(network_policy=True))
    client.V1Job.model_validate(job)
    client.V1Service.model_validate(service)
    client.V1NetworkPolicy.model_validate(policy)
    spec, template = job["spec"], job["spec"]["template"]
    assert ("Indexed", count, count) == tuple(
        spec[key] for key in ("completionMode", "completions", "parallelism")
    )
    assert {"rules": [{"succeededIndexes": "0"}]} == spec["successPolicy"]
    hosts = [f"{job['metadata']['name']}-{index}" for index in (0, count - 1)]
    assert all(LABEL.fullmatch(host) and len(host) <= 63 for host in hosts)
    domain = template["spec"]["subdomain"]
    assert domain == service["metadata"]["name"] and LABEL.fullmatch(domain)
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert "None" == service["spec"]["clusterIP"] and service["spec"]["publishNotReadyAddresses"]
    command = template["spec"]["containers"][0]["command"]
    assert ["--nodes", str(count), "--meet", f"{hosts[0]}.{domain}:29400"] == command[-4:]


def test_a_run_on_one_machine_is_the_job_that_it_was() -> None:
    """No Service, no index, no further option of the engine."""
    item = stored("phi", 1)
    desired = desired_tuning.read(item, None, None)
    job = job_manifests.job(item, desired, Options(), claim=True, earlier=())
    text = json.dumps(job)
    for word in (
        "Indexed",
        "parallelism",
        "--nodes",
        "subdomain",
        "podAntiAffinity",
        "subPathExpr",
    ):
        assert word not in text


@pytest.mark.parametrize("count", [2, 3, 8])
def test_only_pods_of_the_same_job_may_talk_to_each_other(count: int) -> None:
    """On all ports, both ways; the operator still reaches the progress port, and nobody else is
    let in: no namespace, no address, no other Workspace or revision."""
    item = stored("phi", count)
    job, _, policy = made(item, Options())
    labels = job["spec"]["template"]["metadata"]["labels"]
    operator, peers = policy["spec"]["ingress"]
    assert [8080] == [each["port"] for each in operator["ports"]]
    ((selector,),) = (peers["from"],)
    assert "ports" not in peers and ["podSelector"] == list(selector)
    assert selector["podSelector"]["matchLabels"].items() <= labels.items()
    assert job["metadata"]["labels"]["tuning.kaito.sh/revision"] in json.dumps(selector)
    assert {"to": peers["from"]} == policy["spec"]["egress"][-1]
    item["tuning"]["output"]["image"] = "registry.example.com/team/a:2"
    other, _, _ = made(item, Options())
    others = other["spec"]["template"]["metadata"]["labels"]
    assert not selector["podSelector"]["matchLabels"].items() <= others.items()


@pytest.mark.parametrize("annotation", [None, "1", "0"])
def test_each_pod_asks_for_the_gpus_of_one_machine_and_gets_one_of_its_own(
    annotation: str | None,
) -> None:
    """Not for those of all machines; two pods never share a node, but where Kueue places them."""
    item = stored("phi", 2)
    item["resource"]["instanceType"] = "Standard_NC48ads_A100_v4"  # two GPUs
    if annotation:
        item["metadata"]["annotations"] = {"tuning.kaito.sh/gpus": annotation}
    job, _, _ = made(item, Options())
    limits = job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    expected = "2" if annotation is None else annotation
    assert (None if expected == "0" else expected) == limits.get("nvidia.com/gpu")
    rules = job["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"]
    (rule,) = rules["requiredDuringSchedulingIgnoredDuringExecution"]
    assert "kubernetes.io/hostname" == rule["topologyKey"]


@pytest.mark.parametrize("kind", ["required", "preferred", "unconstrained"])
def test_kueue_takes_the_pods_as_one_gang_and_places_them(kind: str) -> None:
    """One Job with the queue's label is one Workload; the topology stands at the pods, where Kueue
    looks for it, and no rule of ours contradicts the nodes that it assigns."""
    item = stored("phi", 4)
    item["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "team"}
    key = f"kueue.x-k8s.io/podset-{kind}-topology"
    item["metadata"]["annotations"] = {key: "cloud.provider.com/topology-rack"}
    job, _, _ = made(item, Options())
    assert "team" == job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    template = job["spec"]["template"]
    assert "cloud.provider.com/topology-rack" == template["metadata"]["annotations"][key]
    assert not {"podAntiAffinity", "podAffinity"} & template["spec"].get("affinity", {}).keys()


CLASSES: list[tuple[Storage, str | None, str | None]] = [
    # storage, access mode and class of the claim; None: an emptyDir
    (Storage(), None, None),
    (Storage(storage_class="disk"), None, None),
    (Storage(run_volume="claim", storage_class="disk"), None, None),
    (Storage(access_mode="ReadWriteOncePod", storage_class="disk"), None, None),
    (Storage(access_mode="ReadWriteMany", storage_class="files"), "ReadWriteMany", "files"),
    (Storage(storage_class="disk", shared_class="files"), "ReadWriteMany", "files"),
    (Storage(run_volume="ephemeral", shared_class="files"), None, None),
]


@pytest.mark.parametrize(("storage", "mode", "name"), CLASSES)
def test_a_claim_that_one_node_holds_is_never_named_by_pods_of_several(
    storage: Storage, mode: str | None, name: str | None
) -> None:
    """Each volume of a template is attached to every pod's node: a claim of ReadWriteOnce would
    keep all but one from starting. Where it can be shared each index has its own folder of it."""
    scene = Scene(count=2)
    scene.options.__dict__["storage"] = storage
    scene.with_node()
    (job,) = scene.owned(JOB)
    spec = job["spec"]["template"]["spec"]
    (run,) = (each for each in spec["volumes"] if each["name"] == "run")
    (mount,) = (m for m in spec["containers"][0]["volumeMounts"] if m["mountPath"] == "/run/tuning")
    assert "run-$(JOB_COMPLETION_INDEX)" == mount["subPathExpr"]
    claims = scene.owned(CLAIM)
    if mode is None:
        assert "emptyDir" in run and not claims
        assert "index 0 starts from the beginning" in scene.status["plan"]["runVolume"]
        return
    (claim,) = claims
    assert [mode] == claim["spec"]["accessModes"] and name == claim["spec"]["storageClassName"]
    assert claim["metadata"]["name"] == run["persistentVolumeClaim"]["claimName"]
    alone = Scene()
    alone.options.__dict__["storage"] = storage
    alone.with_node()
    assert [storage.access_mode] == alone.owned(CLAIM)[0]["spec"]["accessModes"]


@pytest.mark.parametrize("mode", ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"])
@pytest.mark.parametrize("part", ["input", "output"])
def test_data_that_one_node_can_mount_is_refused_before_nodes_are_paid_for(
    part: str, mode: str
) -> None:
    """Also a claim for the adapter; what several nodes can mount runs."""
    scene = Scene(count=2)
    source = {"volumeSource": {"persistentVolumeClaim": {"claimName": "mine"}}}
    scene.api.stored["workspaces", "phi"]["tuning"][part] = source
    scene.api.put(CLAIM, {"metadata": {"name": "mine"}, "spec": {"accessModes": [mode]}})
    is_shared = mode == "ReadWriteMany" or (part == "input" and mode == "ReadOnlyMany")
    scene.look(1)
    scene.look(1)
    assert (2 if is_shared else 0) == len(scene.owned(NODE_CLAIM))
    if not is_shared:
        assert "VolumeNotShared" == scene.reason("SpecValid")
        scene.api.stored["persistentvolumeclaims", "mine"]["spec"]["accessModes"] = [
            "ReadWriteMany"
        ]
        scene.look(30)
        assert 2 == len(scene.owned(NODE_CLAIM))


# nodes


def claims(scene: Scene) -> list[str]:
    return [each["metadata"]["name"] for each in scene.owned(NODE_CLAIM)]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_job_starts_when_all_nodes_are_ready(count: int) -> None:
    """One request for each, all at once; while one is missing there is no Job, and the status says
    how many there are."""
    scene = Scene(count=count)
    scene.look(1)
    scene.look(1)
    assert count == len(set(claims(scene)))
    for ready in range(count):
        scene.nodes_are_ready(ready)
        scene.look(10)
        assert [] == scene.owned(JOB) and count == len(claims(scene))
        message = str(objects.condition({"status": scene.status}, "NodeClaimReady"))
        assert f"{ready} of {count} nodes are ready" in message
        message = str(objects.condition({"status": scene.status}, "NodesReady"))
        assert f"{ready} of {count}" in message
    scene.nodes_are_ready()
    scene.look(10)
    (job,) = scene.owned(JOB)
    (service,) = scene.owned(SERVICE)
    assert job["metadata"]["name"] == service["metadata"]["name"]
    assert count == scene.status["targetNodeCount"]


@pytest.mark.parametrize("ready", [0, 1, 2])
def test_a_node_that_never_comes_gives_the_others_back(ready: int) -> None:
    """It is requested again as often as one alone; then none is kept, and the run has failed with
    the cloud's words. At no time are there more than there should be."""
    scene = Scene(count=3)
    scene.look(1)
    start, attempts = scene.api.now, set()
    while scene.owned(NODE_CLAIM) or not scene.status.get("completionTime"):
        scene.nodes_are_ready(ready)
        for item in scene.owned(NODE_CLAIM)[ready:]:
            told = {"type": "Launched", "status": "False", "message": "no capacity for you"}
            item["status"] = {"conditions": [told]}
        attempts |= set(claims(scene))
        assert len(claims(scene)) <= 3
        scene.look(30)
        limit = 3 * (Options().nodes.launch_seconds + 60) + SLACK
        assert (scene.api.now - start).total_seconds() < limit
    assert "Failed" == scene.status["state"]
    failure = scene.status["failure"]
    assert "NodeClaimNotReady" == failure["reason"] and "no capacity for you" in failure["message"]
    assert 3 * 3 - 2 * ready == len(attempts)
    assert [] == scene.owned(JOB)


@pytest.mark.parametrize("vanish", [True, False])
def test_nodes_that_came_wait_for_the_others_a_limited_time(vanish: bool) -> None:
    """A launch that always begins anew, or one that takes for ever: what is ready and idle is given
    back after stuckSeconds."""
    nodes = Nodes(provision=True, launch_seconds=50_000, attempts=1000)
    scene = Scene(count=2)
    scene.options.__dict__["nodes"] = nodes
    scene.look(1)
    scene.look(1)
    start = scene.api.now
    while scene.owned(NODE_CLAIM):
        scene.nodes_are_ready(1)
        if vanish and len(claims(scene)) > 1:  # Karpenter deletes what the cloud refuses
            del scene.api.stored["nodeclaims", claims(scene)[-1]]
        scene.look(60)
        assert (scene.api.now - start).total_seconds() <= STUCK + SLACK, scene.status
    assert "Failed" == scene.status["state"]
    message = scene.status["failure"]["message"]
    assert "1 of 2 nodes are ready" in message and f"for {STUCK} s" in message


def test_a_limit_of_nodes_counts_all_of_them() -> None:
    """A namespace that may have three gets one run on two, and the next waits for both."""
    scene = Scene(count=2)
    scene.options.__dict__["nodes"] = Nodes(provision=True, per_namespace=3)
    labels = {
        "kaito.sh/workspacenamespace": "team",
        "app.kubernetes.io/managed-by": "tuning-operator",
    }
    for i in range(2):
        labels = labels | {"kaito.sh/workspace": "other"}
        scene.api.put(NODE_CLAIM, {"metadata": {"name": f"other-{i}", "labels": labels}})
    scene.look(1)
    scene.look(1)
    assert 2 == len(claims(scene)) and "MachineLimit" == scene.reason("ResourceReady")
    assert "needs 2" in json.dumps(scene.status["conditions"])
    del scene.api.stored["nodeclaims", "other-0"]
    scene.look(60)
    assert 3 == len(claims(scene))


@pytest.mark.parametrize("count", [1, 2])
def test_nodes_are_requested_in_one_zone(count: int) -> None:
    """Where the selector names it; else a later node follows those that are there."""
    zone = "topology.kubernetes.io/zone"

    def zones(scene: Scene) -> list[list[str]]:
        return [
            each["values"]
            for item in scene.owned(NODE_CLAIM)
            for each in item["spec"]["requirements"]
            if each["key"] == zone
        ]

    scene = Scene(count=count)
    selector = scene.api.stored["workspaces", "phi"]["resource"]["labelSelector"]
    selector["matchLabels"][zone] = "eastus-2"
    scene.look(1)
    scene.look(1)
    assert [["eastus-2"]] * count == zones(scene)
    free = Scene(count=count)
    free.with_node()
    assert [] == zones(free)
    if count > 1:
        kept, gone = free.owned(NODE_CLAIM)
        kept["metadata"]["labels"][zone] = "eastus-3"
        del free.api.stored["nodeclaims", gone["metadata"]["name"]]
        free.pod(index=0, scheduled=False)
        free.look(10)
        assert 2 == len(claims(free)) and [["eastus-3"]] == zones(free)


@pytest.mark.parametrize("limit", [1, 2])
def test_a_run_that_is_larger_than_the_limit_says_so(limit: int) -> None:
    """It waits for nothing that can come, and no node is requested."""
    scene = Scene(count=3)
    scene.options.__dict__["nodes"] = Nodes(provision=True, per_namespace=limit)
    for _ in range(3):
        scene.look(60)
    assert [] == claims(scene) and "never run here" in json.dumps(scene.status["conditions"])


# pods


def running(scene: Scene, count: int) -> list[Object]:
    return [scene.pod(index=i, phase="Running", **RUNS) for i in range(count)]


def test_it_runs_when_all_pods_run() -> None:
    """Until then the status says how many do, and what the first that does not waits for."""
    scene = Scene(count=3)
    scene.with_node()
    scene.pod(index=2, phase="Running", **RUNS)
    scene.pod(index=0, phase="Running", **RUNS)
    assert "Pending" == scene.look(10)["state"]
    assert "2 of 3 pods run" in str(objects.condition({"status": scene.status}, "JobStarted"))
    late = scene.pod(index=1, **engine({"waiting": {"reason": "ErrImagePull", "message": "gone"}}))
    scene.look(10)
    assert "ImagePullError" == scene.reason("JobStarted")
    late["status"] |= {"phase": "Running"} | RUNS
    assert "Running" == scene.look(10)["state"]


@pytest.mark.parametrize("index", [0, 1])
def test_progress_and_result_are_those_of_index_0(index: int) -> None:
    """Another pod is not asked, and its message is no result."""
    scene = Scene(count=2)
    asked: list[int] = []

    def poll(pod: Object) -> Object:
        asked.append(objects.completion_index(pod))
        return {"step": 1 + asked[-1], "steps": 9}

    scene.context.__dict__["poll"] = poll
    scene.with_node()
    pods = running(scene, 2)
    scene.look(10)
    assert {0} == set(asked) and 1 == scene.status["progress"]["step"]
    message = json.dumps({"digest": DIGEST, "phase": "finish", "step": 9, "steps": 9})
    pods[index]["status"] = {"phase": "Succeeded"} | engine(ended(0, message, scene.api.now))
    scene.look(10)
    assert "Running" == scene.status["state"]
    scene.look(100)
    if index == 0:  # whatever the other does
        assert "Succeeded" == scene.status["state"]
        assert DIGEST == scene.status["output"]["digest"]
        scene.look(1)
        assert [] == claims(scene)
    else:
        assert "Running" == scene.status["state"] and 2 == len(claims(scene))


@pytest.mark.parametrize(
    ("codes", "reason", "words"),
    [
        ([75, 14], "OutOfMemory", "pod 1: "),
        ([20, 75, 75], "TransientFailure", "exit code 20"),
        ([75, 75, 10], "DataUnusable", "pod 2: "),
        ([12, 20], "BadPlan", "exit code 12"),
        ([20, 20], "TransientFailure", "exit code 20: of 0"),
        ([75, 20], "TransientFailure", "pod 1: "),
    ],
)
def test_the_failure_is_that_of_the_pod_that_ended_the_others(
    codes: list[int], reason: str, words: str
) -> None:
    """Not of one that was stopped for it; all nodes are given back."""
    scene = Scene(count=len(codes))
    scene.with_node()
    for index, code in enumerate(codes):
        scene.pod(index=index, phase="Failed", **engine(ended(code, f"of {index}")))
    scene.ends_job("Failed")
    failure = scene.look(10)["failure"]
    code = next(code for code in codes if REASONS[code] == failure["reason"])
    assert code == failure["exitCode"] and failure["message"].startswith(words), failure
    scene.look(1)
    assert [] == claims(scene)


def test_a_pod_that_is_tried_again_is_told_by_its_number() -> None:
    """The others wait for it; the run stays Running and goes on."""
    scene = Scene(count=2)
    scene.with_node()
    pods = running(scene, 2)
    scene.look(60)
    pods[1]["status"] = {"phase": "Failed"} | engine(ended(137))
    scene.look(10)
    message = str(objects.condition({"status": scene.status}, "JobStarted"))
    assert "1 of 2 pods run; pod 1: try 1 failed: exit code 137" in message
    assert "Running" == scene.status["state"]
    scene.pod(index=1, phase="Running", **RUNS)
    scene.look(10)
    assert "Retried" == scene.reason("WorkspaceSucceeded") and 2 == len(claims(scene))


def test_a_lost_node_alone_is_replaced() -> None:
    """The others keep theirs, with what they have stored there, and wait."""
    scene = Scene(count=3)
    scene.with_node()
    for i, item in enumerate(scene.owned(NODE_CLAIM)):
        item["status"]["nodeName"] = f"n{i or ''}"
    pods, before = running(scene, 3), set(claims(scene))
    scene.look(60)
    unknown = {"type": "Ready", "status": "Unknown", "lastTransitionTime": scene.api.stamp()}
    pods[1]["status"]["conditions"].append(unknown)
    scene.look(STUCK - 60)
    assert before == set(claims(scene)) and "NodeLost" == scene.reason("WorkspaceSucceeded")
    scene.look(120)
    assert 2 == len(set(claims(scene)) & before)
    del scene.api.stored["pods", pods[1]["metadata"]["name"]]
    scene.pod(index=1, scheduled=False)
    scene.look(10)
    assert 3 == len(claims(scene)) and 2 == len(set(claims(scene)) & before)
    assert "Running" == scene.status["state"]
    for _ in range(5):  # as often as it happens: each time has all of its attempts
        scene.nodes_are_ready()
        running(scene, 3)
        scene.look(10)
        del scene.api.stored["nodeclaims", claims(scene)[-1]]
        scene.pod(index=2, scheduled=False)
        scene.look(10)
        assert 3 == len(claims(scene)), scene.status
        for pod in scene.owned(POD):
            del scene.api.stored["pods", pod["metadata"]["name"]]


def test_the_service_is_put_back_and_a_stranger_s_is_a_conflict() -> None:
    """Without it no pod finds another. One of the name that is not ours is never written to."""
    scene = Scene(count=2)
    scene.with_node()
    running(scene, 2)
    (service,) = scene.owned(SERVICE)
    del scene.api.stored["services", service["metadata"]["name"]]
    scene.look(10)
    (again,) = scene.owned(SERVICE)
    again["spec"]["selector"] = {"app": "mine"}
    scene.look(10)
    assert service["spec"] == scene.owned(SERVICE)[0]["spec"]
    other = Scene(count=2)
    workspace = other.api.stored["workspaces", "phi"]
    name = desired_tuning.job_name(workspace, desired_tuning.revision(workspace))
    other.api.put(SERVICE, {"kind": "Service", "metadata": {"name": name}, "spec": {}})
    for _ in range(4):
        other.look(10)
    assert "NameConflict" == other.reason("ResourceReady")
    assert [] == other.owned(NODE_CLAIM) == other.owned(JOB)
    del other.api.stored["services", name]
    other.with_node()
    assert 1 == len(other.owned(JOB))


@pytest.mark.parametrize("shared", [True, False])
def test_index_0_that_has_lost_all_does_not_wait_for_pods_that_have_ended(shared: bool) -> None:
    """A pod that ended well never starts again: where index 0 goes on from its volume it needs
    none, elsewhere the whole Job begins anew."""
    scene = Scene(count=2)
    if shared:
        scene.options.__dict__["storage"] = Storage(shared_class="files")
    scene.with_node()
    pods = running(scene, 2)
    (job,) = scene.owned(JOB)
    scene.look(600)
    pods[1]["status"] = {"phase": "Succeeded"} | engine(ended(0, "", scene.api.now))
    assert "Running" == scene.look(600)["state"]
    assert job["metadata"]["uid"] == scene.owned(JOB)[0]["metadata"]["uid"]
    pods[0]["status"] = {"phase": "Failed"} | engine(ended(20, "", scene.api.now))
    scene.look(10)
    scene.pod(index=0, phase="Running", **RUNS)
    for _ in range(3):
        scene.look(10)
    assert shared == (job["metadata"]["uid"] == scene.owned(JOB)[0]["metadata"]["uid"])
    assert 2 == len(claims(scene))


def test_a_changed_parallelism_is_told() -> None:
    """The engine was started for as many pods as the Workspace says."""
    scene = Scene(count=2)
    scene.with_node()
    running(scene, 2)
    scene.look(10)
    assert "Running" == scene.status["state"] and "JobEdited" != scene.reason("WorkspaceSucceeded")
    scene.owned(JOB)[0]["spec"]["parallelism"] = 3
    scene.look(10)
    assert "JobEdited" == scene.reason("WorkspaceSucceeded")


# ends


def deleted(scene: Scene) -> None:
    scene.api.stored["workspaces", "phi"]["metadata"]["deletionTimestamp"] = scene.api.stamp()


def succeeded(scene: Scene) -> None:
    for pod in scene.owned(POD):
        pod["status"] = {"phase": "Succeeded"} | engine(ended(0, "", scene.api.now))
    scene.ends_job("Complete")


def failed(scene: Scene) -> None:
    scene.ends_job("Failed")


def one_is_stuck(scene: Scene) -> None:
    """Its image is gone, and its pod begins anew for ever."""
    for pod in scene.owned(POD)[1:]:
        pod["status"] = engine({"waiting": {"reason": "ErrImagePull", "message": "gone"}})


@pytest.mark.parametrize("end", [deleted, succeeded, failed, one_is_stuck])
@pytest.mark.parametrize("count", [2, 5])
def test_all_nodes_are_given_back_together(end: Callable[[Scene], None], count: int) -> None:
    """At the end, the failure, the deadline, the deletion: within one reconcile."""
    scene = Scene(count=count)
    scene.with_node()
    running(scene, count)
    scene.look(60)
    end(scene)
    for _ in range(STUCK // 60 + 3):
        scene.look(60)
        assert len(claims(scene)) in (0, count)
        if not claims(scene):
            break
    assert [] == claims(scene)


def end(index: int, code: int) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        for pod in scene.owned(POD):
            if objects.completion_index(pod) == index and objects.is_running(pod):
                pod["status"] |= {"phase": "Failed"} | engine(ended(code))

    return play


def start(index: int) -> Callable[[Scene], object]:
    return lambda scene: scene.pod(index=index, phase="Running", **RUNS)


def lose(index: int) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        for pod in scene.owned(POD):
            if objects.completion_index(pod) == index and objects.is_running(pod):
                unknown = {"status": "Unknown", "lastTransitionTime": scene.api.stamp()}
                pod["status"]["conditions"].append(unknown | {"type": "Ready"})

    return play


def lose_claim(scene: Scene) -> None:
    if names := claims(scene):
        del scene.api.stored["nodeclaims", names[0]]


def unschedulable(index: int) -> Callable[[Scene], object]:
    return lambda scene: scene.pod(index=index, scheduled=False)


MOVES: list[Callable[[Scene], object]] = [
    start(0), start(1), end(0, 20), end(1, 75), end(1, 137), lose(0), lose(1), lose_claim,
    unschedulable(0), unschedulable(1), lambda scene: None,
]  # fmt: skip


def test_a_pod_on_a_lost_node_gives_no_new_attempts() -> None:
    """It still counts as running when the other starts: not as all of them."""
    scene = Scene(count=2)
    scene.with_node()
    start(0)(scene)
    for _ in range(2):
        scene.look(300)
        lose_claim(scene)
    lose(0)(scene)
    before = scene.status["nodeAttempts"]
    start(1)(scene)
    scene.look(5)

    assert "Running" == scene.status["state"] and before > 1
    assert before == scene.status["nodeAttempts"]
    scene.owned(POD)[0]["status"]["conditions"].pop()
    scene.look(5)
    assert "nodeAttempts" not in scene.status


@given(
    st.lists(
        st.tuples(st.sampled_from(MOVES), st.sampled_from([5, 60, 300]), st.integers(0, 2)),
        max_size=40,
    )
)
@settings(max_examples=30, deadline=None)
def test_no_order_of_events_holds_idle_nodes(
    moves: list[tuple[Callable[[Scene], object], int, int]],
) -> None:
    """Pods and nodes that come, go, or never come: never more nodes than two, and none for longer
    than a request for one, and stuckSeconds, without an engine on each."""
    scene = Scene(count=2)
    scene.with_node()
    idle_since = scene.api.now
    pause = 30  # between two looks, so that each of both deadlines is seen so much later
    allowed = Options().nodes.launch_seconds + STUCK + SLACK + 300 + 2 * pause
    for move, seconds, ready in moves:
        if scene.owned(JOB):
            move(scene)
        left = seconds
        while left > 0:
            scene.look(min(left, pause))
            scene.nodes_are_ready(ready)
            left -= pause
            assert len(claims(scene)) <= 2
        live = objects.newest_each(tuple(scene.owned(POD)))
        runs = [pod for pod in live if objects.is_running(pod) and not objects.node_loss(pod)]
        if len(runs) == 2 or not claims(scene):
            idle_since = scene.api.now
        idle = (scene.api.now - idle_since).total_seconds()
        assert idle <= allowed, json.dumps(scene.status)
