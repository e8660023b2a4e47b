"""No provisioned node is paid for while nothing runs on it: each phase of the table, each refusal.

The operator is the whole one, reconcile by reconcile; the API server is in memory, and its clock
is turned. The same refusals on a real API server: tests/cluster/test_deadlines.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cluster import Scene, ended, engine

from jobs.api.client import ApiError
from jobs.api.kinds import (
    CLAIM,
    DEPLOYMENT,
    JOB,
    NETWORK_POLICY,
    NODE_CLAIM,
    POD,
    SERVICE,
    Kind,
    Object,
)
from jobs.api.options import Options
from jobs.controller.decide import REQUEUE_SECONDS
from jobs.observed import objects
from jobs.observed.phases import LOADING_SECONDS, PHASES, PhaseName

STUCK = Options().stuck_seconds
SLACK = 120  # seconds between two looks, and until what follows a deadline is done
PROXY = {"name": "istio-proxy", "state": {"running": {}}}
QUOTA = 'pods "phi-1" is forbidden: exceeded quota: gpus, requested: pods=1, limited: pods=0'


def waits(reason: str, message: str) -> Object:
    return engine({"waiting": {"reason": reason, "message": message}})


def kubelet(reason: str, message: str) -> Callable[[Scene], None]:
    """The kubelet refuses each pod, and there is always a next one."""

    def play(scene: Scene) -> None:
        scene.pod(phase="Failed", reason=reason, message=message)

    return play


def once(play: Callable[[Scene], object]) -> Callable[[Scene], None]:
    """Only for the first pod."""

    def first(scene: Scene) -> None:
        if not scene.owned(POD):
            play(scene)

    return first


def event(of: str, reason: str, message: str) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        about = scene.owned(JOB)[0] if of == "job" else scene.pod()
        scene.tell(about, reason, message)

    return play


@dataclass(frozen=True)
class Refusal:
    """Who keeps a Job from running: how it is played, and words of it that the status must tell."""

    words: str
    reason: str
    play: Callable[[Scene], object] = lambda scene: None
    create: tuple[Kind, int, str, str] | None = None  # kind, HTTP status, reason, message


def denied(code: int, reason: str, message: str, kind: Kind = JOB) -> Refusal:
    named = {400: "BadRequest", 403: "Forbidden", 413: "RequestEntityTooLarge", 422: "Invalid",
             429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}  # fmt: skip
    words = message.partition(":")[0]
    return Refusal(words, named.get(code, "Invalid"), create=(kind, code, reason, message))


REFUSALS: dict[str, Refusal] = {
    # who refuses the Job, and what must exist before it
    "quota of Jobs": denied(403, "Forbidden", "exceeded quota: jobs, limited: count/jobs.batch=0"),
    "webhook": denied(400, "signed images only!", "admission webhook x denied the request: no"),
    "webhook, its own code": denied(418, "", "admission webhook tea denied the request"),
    "webhook that is down": denied(500, "InternalError", "failed calling webhook y: timeout"),
    "admission policy": denied(422, "Invalid", "ValidatingAdmissionPolicy p denied request: no"),
    "too many requests": denied(429, "TooManyRequests", "try again later"),
    "size limit": denied(422, "Invalid", "metadata.annotations: Too long: at most 262144 bytes"),
    "request too large": denied(413, "RequestEntityTooLarge", "etcdserver: request is too large"),
    "quota of claims": denied(403, "Forbidden", "exceeded quota: storage", CLAIM),
    "network policies": denied(403, "Forbidden", "no rights on networkpolicies", NETWORK_POLICY),
    # who refuses its pod
    "quota of pods": Refusal("exceeded quota: gpus", "PodRefused",
                             once(event("job", "FailedCreate", f"Error creating: {QUOTA}"))),
    "pod security": Refusal("violates PodSecurity", "PodRefused",
                            event("job", "FailedCreate", "violates PodSecurity restricted")),
    "no pod, no word": Refusal("has not created a pod", "PodPending"),
    # what keeps the pod from starting
    "scheduler": Refusal("Insufficient gpu", "Unschedulable",
                         once(lambda s: s.pod(scheduled=False))),
    "image": Refusal("no such image", "ImagePullError",
                     once(lambda s: s.pod(**waits("ImagePullBackOff", "no such image")))),
    "registry": Refusal("502 of the mirror", "ImagePullError",
                        once(lambda s: s.pod(**waits("RegistryUnavailable", "502 of the mirror")))),
    "signature": Refusal("not signed", "ImagePullError",
                         once(lambda s: s.pod(**waits("SignatureValidationFailed", "not signed")))),
    "hook": Refusal("hook failed", "ContainerStartError",
                    once(lambda s: s.pod(**waits("PreStartHookError", "hook failed")))),
    "volume": Refusal("volume not found", "VolumeMountError",
                      once(event("pod", "FailedMount", "volume not found"))),
    "network": Refusal("no free address", "PodStartError",
                       once(event("pod", "FailedCreatePodSandBox", "no free address"))),
    "device": Refusal("the GPU is held", "PodStartError",
                      once(event("pod", "FailedPrepareDynamicResources", "the GPU is held"))),
    "silence": Refusal("the pod is starting", "PodPending", once(lambda s: s.pod())),
    "init container": Refusal("istio-validation", "PodPending", once(lambda s: s.pod(
        initContainerStatuses=[{"name": "istio-validation", "state": {"running": {}}}]))),
    # the kubelet
    "kubelet, devices": Refusal("Allocate failed", "UnexpectedAdmissionError",
                                kubelet("UnexpectedAdmissionError", "Allocate failed: no GPU")),
    "kubelet, resources": Refusal("didn't have enough", "OutOfnvidiacomgpu",
                                  kubelet("OutOfnvidia.com/gpu", "Node didn't have enough")),
    "kubelet, labels": Refusal("node affinity", "NodeAffinity",
                               kubelet("NodeAffinity", "Predicate node affinity failed")),
    "kubelet, disk": Refusal("was low on resource", "PodEvicted",
                             kubelet("Evicted", "The node was low on resource: imagefs")),
    "kubelet, shutdown": Refusal("node is shutting down", "NodeShutdown",
                                 kubelet("NodeShutdown", "Pod was rejected as the node is shutting down")),  # noqa: E501
    # another container of the pod
    "sidecar after a failed try": Refusal(
        "istio-proxy", "ContainerStays",
        once(lambda s: s.pod(phase="Running", **engine(ended(20, "REG-131 r: no route"), PROXY)))),
    "failed init container": Refusal(
        "the container vault-agent-init ended with exit code 2: no token", "ContainerFailed",
        lambda s: s.pod(phase="Failed", initContainerStatuses=[
            {"name": "vault-agent-init", "state": ended(2, "no token")}])),
}  # fmt: skip


def refuse(scene: Scene, refusal: Refusal) -> None:
    if refusal.create:
        kind, *error = refusal.create
        scene.api.refused[kind] = ApiError(*error)


def held_for(scene: Scene, play: Callable[[Scene], object], limit: float) -> float:
    """Seconds until no node is held, looking as often as the operator does."""
    start = scene.api.now
    while scene.owned(NODE_CLAIM):
        if scene.owned(JOB) or scene.owned(DEPLOYMENT):
            play(scene)
        scene.look(60)
        assert (scene.api.now - start).total_seconds() < limit, json.dumps(scene.status)
    return (scene.api.now - start).total_seconds()


def test_each_phase_gives_its_node_back_or_works_or_has_a_deadline() -> None:
    """The table names every phase, and each of them is looked at again without an event."""
    assert set(get_args(PhaseName)) == PHASES.keys()
    for name, row in PHASES.items():
        assert row.node in ("released", "works") or row.then, name
        assert row.then in ("", "refused") or row.deadline, name
        assert row.then in ("", "refused", "released", "stuck") or row.then in PHASES, name
        assert row.node == "released" or (REQUEUE_SECONDS[name] or 99) <= 60, name


@pytest.mark.parametrize("name", REFUSALS)
def test_a_node_on_which_nothing_can_run_is_given_back(name: str) -> None:
    """Whoever refuses: after stuckSeconds the node is gone, the Workspace failed, and its status
    tells it in the words of who refused, as it did before the deadline."""
    refusal = REFUSALS[name]
    scene = Scene()
    refuse(scene, refusal)
    scene.with_node()
    for _ in range(5):
        if scene.owned(JOB):
            refusal.play(scene)
        status = scene.look(60)
    assert "Pending" == status["state"]
    assert refusal.words in json.dumps(status["conditions"]), status["conditions"]
    assert 1 == len(scene.owned(NODE_CLAIM))

    held_for(scene, refusal.play, STUCK + SLACK)

    status = scene.look(60)
    assert "Failed" == status["state"]
    assert refusal.words in status["failure"]["message"]
    assert refusal.reason == status["failure"]["reason"]
    assert f"for {STUCK} s" in status["failure"]["message"] and status["failure"]["hint"]
    assert "workspaceFailed" == scene.reason("WorkspaceSucceeded")
    assert [] == scene.owned(JOB) == scene.owned(NODE_CLAIM)
    before = scene.status
    for _ in range(3):
        assert before == scene.look(3600)
    assert [] == scene.owned(NODE_CLAIM)


@pytest.mark.parametrize("name", [name for name, each in REFUSALS.items() if each.create])
def test_a_refused_job_buys_no_node(name: str) -> None:
    """What the API server says of the Job, it says in a dry run: no node is paid for, and the
    Workspace goes on by itself once the cause is removed."""
    refusal = REFUSALS[name]
    assert refusal.create
    kind, *error = refusal.create
    scene = Scene()
    scene.api.rehearsed[kind] = ApiError(*error)
    for _ in range(5):
        status = scene.look(60)
        assert [] == scene.owned(NODE_CLAIM)
        assert refusal.words in json.dumps(status["conditions"])
        assert refusal.reason == scene.reason("ResourceReady")
    written = json.dumps(status)
    assert written == json.dumps(scene.look(60))  # it does not alternate
    scene.api.rehearsed.clear()
    scene.look(60)
    scene.nodes_are_ready()
    scene.look(10)
    assert 1 == len(scene.owned(JOB))


def test_rerun_tries_again_with_the_whole_time() -> None:
    """After the cause is removed, the annotation starts a new run, whose deadline is its own."""
    scene = Scene()
    scene.with_node()
    held_for(scene, lambda s: None, STUCK + SLACK)
    item = scene.api.stored["workspaces", "phi"]
    item["metadata"]["annotations"] = {"tuning.kaito.sh/rerun": "2"}
    scene.with_node()
    assert 1 == len(scene.owned(NODE_CLAIM)) == len(scene.owned(JOB))
    assert "Pending" == scene.look(STUCK - SLACK)["state"]
    scene.pod(phase="Running", **engine({"running": {}}))
    assert "Running" == scene.look(60)["state"]
    assert "Running" == scene.look(40 * STUCK)["state"]


@pytest.mark.parametrize("code", [20, 75, 137])
def test_a_retry_has_its_own_time_and_says_what_went_before(code: int) -> None:
    """Days of training are no waiting: the time begins when the try ends. Then the status says how
    it ended, and that the next starts; while that runs, too."""
    scene = Scene()
    scene.with_node()
    pod = scene.pod(phase="Running", **engine({"running": {}}))
    assert "Running" == scene.look(60)["state"]
    scene.look(30 * STUCK)
    words = json.dumps({"reason": "TransientFailure", "message": "REG-131 r: no route."})
    told = {20: "REG-131 r: no route.", 75: "REG-131 r: no route.", 137: "exit code 137"}[code]
    verb = "was stopped" if code == 75 else "failed"
    pod["status"] = {"phase": "Failed"} | engine(ended(code, words if code != 137 else ""))
    scene.look(10)
    for kind in ("JobStarted", "WorkspaceSucceeded"):
        message = str(objects.condition({"status": scene.status}, kind))
        assert f"try 1 {verb}: {told}" in message and "the next starts" in message
    assert "Running" == scene.status["state"]
    scene.pod(phase="Running", **engine({"running": {}}))
    scene.look(STUCK - SLACK)
    assert "Running" == scene.look(60)["state"]
    message = str(objects.condition({"status": scene.status}, "WorkspaceSucceeded"))
    assert f"try 1 {verb}: {told}" in message
    assert 1 == len(scene.owned(NODE_CLAIM))


@pytest.mark.parametrize("code", [0, 10, 11, 12, 13, 14])
@pytest.mark.parametrize("name", ["istio-proxy", "linkerd-proxy", "vault-agent"])
def test_a_sidecar_does_not_keep_the_node(name: str, code: int) -> None:
    """When the engine has ended the run has, whatever goes on in its pod: digest or failure is told
    at once, with the name of the container, and Job and node go."""
    scene = Scene()
    scene.with_node()
    digest = "sha256:" + "a" * 64
    message = {"digest": digest, "phase": "finish"} if code == 0 else {}
    container = {"name": name, "state": {"running": {}}}
    scene.pod(phase="Running", **engine(ended(code, json.dumps(message)), container))
    status = scene.look(15)
    assert ("Failed" if code else "Succeeded") == status["state"]
    assert f"the container {name} of its pod still ran" in json.dumps(status["conditions"])
    if not code:
        assert digest == status["output"]["digest"] and [digest] == status["outputs"]
    scene.look(15)
    assert [] == scene.owned(NODE_CLAIM) == scene.owned(JOB)


@pytest.mark.parametrize("job", ["Failed", "FailureTarget", ""])
def test_a_sidecar_that_fails_after_the_engine_succeeded_fails_nothing(job: str) -> None:
    """Its exit code makes the pod Failed, and the Job tries again: the run has succeeded all the
    same, and no second one goes on."""
    scene = Scene()
    scene.with_node()
    sidecar = {"name": "istio-proxy", "state": ended(137)}
    scene.pod(phase="Failed", **engine(ended(0, at=scene.api.now), sidecar))
    if job:
        scene.ends_job(job)
    for _ in range(4):
        scene.look(30)
    assert "Succeeded" == scene.status["state"]
    assert [] == scene.owned(NODE_CLAIM)


def test_a_job_without_a_sidecar_is_kept_with_its_log() -> None:
    """Between the end of the engine and that of its Job, nothing is done; then the Job stays."""
    scene = Scene()
    scene.with_node()
    scene.pod(phase="Running", **engine(ended(0, at=scene.api.now)))
    assert "Running" == scene.look(5)["state"]
    scene.ends_job("Complete")
    assert "Succeeded" == scene.look(5)["state"]
    scene.look(5)
    assert [] == scene.owned(NODE_CLAIM)
    assert 1 == len(scene.owned(JOB))


def test_the_next_try_that_is_refused_tells_both() -> None:
    """A quota that was used up meanwhile: how the try ended, and why there is no other."""
    scene = Scene()
    scene.with_node()
    words = json.dumps({"reason": "TransientFailure", "message": "REG-131 r: no route."})
    scene.pod(phase="Failed", **engine(ended(20, words)))
    scene.tell(scene.owned(JOB)[0], "FailedCreate", QUOTA)
    status = scene.look(10)
    for text in ("try 1 failed: REG-131", "exceeded quota: gpus"):
        assert text in str(objects.condition({"status": status}, "JobStarted"))
    held_for(scene, lambda s: None, STUCK + SLACK)
    assert "exceeded quota: gpus" in scene.look(60)["failure"]["message"]


def test_a_node_that_registers_slowly_has_both_times() -> None:
    """A pod may be bound to it before it counts as ready: the time to register comes first."""
    scene = Scene()
    scene.with_node()
    scene.pod()
    for item in scene.owned(NODE_CLAIM):
        item["status"]["conditions"][-1]["status"] = "False"
    registered = Options().nodes.launch_seconds + Options().nodes.register_seconds
    assert "Pending" == scene.look(registered + STUCK - SLACK)["state"]
    held_for(scene, lambda s: None, 2 * SLACK)
    assert "Failed" == scene.look(60)["state"]


def test_a_lost_node_is_replaced() -> None:
    """A node that does not respond is given back after the same time, and the run goes on with
    another: it has not failed."""
    scene = Scene()
    scene.with_node()
    pod = scene.pod(phase="Running", **engine({"running": {}}))
    scene.look(60)
    lost = {"type": "Ready", "status": "Unknown", "lastTransitionTime": scene.api.stamp()}
    pod["status"]["conditions"].append(lost)
    assert "Running" == scene.look(STUCK - 60)["state"]
    assert "NodeLost" == scene.reason("WorkspaceSucceeded")
    assert 1 == len(scene.owned(NODE_CLAIM))
    scene.look(120)
    assert [] == scene.owned(NODE_CLAIM)
    del scene.api.stored["pods", pod["metadata"]["name"]]  # with its Node
    scene.pod(scheduled=False)
    scene.look(10)
    assert 1 == len(scene.owned(NODE_CLAIM))
    assert "Running" == scene.status["state"]


def test_an_earlier_job_that_does_not_stop_keeps_no_node() -> None:
    """An edit waits until the old pod is gone; the node goes first, and a new one comes then."""
    scene = Scene()
    scene.with_node()
    scene.pod(phase="Running", **engine({"running": {}}))
    scene.look(60)
    item = scene.api.stored["workspaces", "phi"]
    item["tuning"]["output"]["image"] = "registry.example.com/team/a:2"
    item["metadata"]["generation"] += 1
    (old,) = scene.owned(JOB)
    old["metadata"]["deletionTimestamp"] = scene.api.stamp()
    held_for(scene, lambda s: None, STUCK + SLACK)
    assert "Replacing" == scene.reason("ResourceReady")
    assert "Pending" == scene.status["state"]
    del scene.api.stored["jobs", old["metadata"]["name"]]
    scene.with_node()
    assert 1 == len(scene.owned(JOB))


def test_a_node_of_ones_own_waits_for_its_quota() -> None:
    """Where no node is paid for, a quota is a queue: nothing fails."""
    scene = Scene()
    scene.options.__dict__["nodes"] = Options().nodes
    scene.look(1)
    scene.look(1)
    scene.tell(scene.owned(JOB)[0], "FailedCreate", QUOTA)
    assert "Pending" == scene.look(10 * STUCK)["state"]
    assert "PodRefused" == scene.reason("JobStarted")


# servers


SERVERS: dict[str, tuple[str, int, Callable[[Scene], object]]] = {
    "image": ("no such image", STUCK,
              once(lambda s: s.pod(**waits("ErrImagePull", "no such image")))),
    "volume": ("volume not found", STUCK, once(event("pod", "FailedMount", "volume not found"))),
    "kubelet": ("Allocate failed", STUCK, kubelet("UnexpectedAdmissionError", "Allocate failed")),
    "silence": ("the pod is starting", STUCK, once(lambda s: s.pod())),
    "no pod": ("has no pod yet", STUCK, lambda s: None),
    "loads for ever": ("the model is loading", LOADING_SECONDS, once(
        lambda s: s.pod(phase="Running", **engine({"running": {}})))),
    "crash loop": ("exit code 12", LOADING_SECONDS, once(lambda s: s.pod(
        phase="Running",
        containerStatuses=[{"name": "tuning", "lastState": ended(12),
                            "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]))),
    "an added container crashes": ("the container envoy ended with exit code 3", STUCK, once(
        lambda s: s.pod(initContainerStatuses=[{"name": "envoy", "lastState": ended(3)}]))),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_that_never_answers_keeps_no_node(name: str) -> None:
    """After stuckSeconds, or an hour of loading, node and Deployment go, and the condition keeps
    the words; nothing is bought again until the Workspace is edited."""
    words, seconds, play = SERVERS[name]
    scene = Scene(serves=True)
    scene.with_node()
    assert 1 == len(scene.owned(DEPLOYMENT))
    held = held_for(scene, play, seconds + 2 * SLACK)
    assert held > seconds - SLACK
    for _ in range(3):
        status = scene.look(3600)
        assert [] == scene.owned(NODE_CLAIM) == scene.owned(DEPLOYMENT)
        assert "NotReady" == status["state"]
        assert words in str(objects.condition({"status": status}, "InferenceReady"))
        assert "NodeReleased" == scene.reason("NodeClaimReady")
    scene.api.stored["workspaces", "phi"]["metadata"]["generation"] += 1
    scene.api.refused.clear()
    scene.with_node()
    assert 1 == len(scene.owned(NODE_CLAIM)) == len(scene.owned(DEPLOYMENT))


@pytest.mark.parametrize("kind", [DEPLOYMENT, SERVICE])
def test_a_server_that_is_refused_keeps_no_node(kind: Kind) -> None:
    """A quota of Services or Deployments, or a webhook: the same."""
    scene = Scene(serves=True)
    scene.api.refused[kind] = ApiError(403, "Forbidden", "exceeded quota: x")
    scene.with_node()
    held_for(scene, lambda s: None, STUCK + SLACK)
    status = scene.look(60)
    assert "NotReady" == status["state"] and "exceeded quota: x" in status["failure"]["message"]


def test_a_server_that_answers_keeps_its_node() -> None:
    """For as long as it does, and while a wrong edit is corrected."""
    scene = Scene(serves=True)
    scene.with_node()
    ready = {"type": "Ready", "status": "True", "lastTransitionTime": scene.api.stamp()}
    pod = scene.pod(phase="Running", **engine({"running": {}}))
    pod["status"]["conditions"].append(ready)
    scene.owned(DEPLOYMENT)[0]["status"] = {"readyReplicas": 1}
    for _ in range(3):
        assert "Ready" == scene.look(10 * STUCK)["state"]
    item = scene.api.stored["workspaces", "phi"]
    item["inference"]["adapters"] = [{"source": {"name": "a", "image": "not an image"}}]
    item["metadata"]["generation"] += 1
    for _ in range(3):
        assert "NotReady" == scene.look(10 * STUCK)["state"]
    assert 1 == len(scene.owned(NODE_CLAIM)) == len(scene.owned(DEPLOYMENT))


@pytest.mark.parametrize("ready", [1, 0])
def test_a_wrong_edit_keeps_the_node_of_a_server_that_answers(ready: int) -> None:
    """And after the deadline no other."""
    scene = Scene(serves=True)
    scene.with_node()
    scene.pod(phase="Running", **engine({"running": {}}))
    scene.owned(DEPLOYMENT)[0]["status"] = {"readyReplicas": ready}
    item = scene.api.stored["workspaces", "phi"]
    item["inference"]["adapters"] = [{"source": {"name": "a", "image": "not an image"}}]
    item["metadata"]["generation"] += 1
    for _ in range(30):
        scene.look(60)
    assert ready == len(scene.owned(NODE_CLAIM)) == len(scene.owned(DEPLOYMENT))
    assert "SpecInvalid" == scene.reason("SpecValid")


# anything in any order


def run(scene: Scene) -> None:
    scene.pod(phase="Running", **engine({"running": {}}))


def end(code: int) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        for pod in scene.owned(POD):
            if objects.is_running(pod):
                pod["status"] |= {"phase": "Failed"} | engine(ended(code))

    return play


def lose(scene: Scene) -> None:
    for pod in scene.owned(POD):
        if objects.is_running(pod):
            unknown = {"status": "Unknown", "lastTransitionTime": scene.api.stamp()}
            pod["status"]["conditions"].append(unknown | {"type": "Ready"})


def forget(scene: Scene) -> None:
    for pod in scene.owned(POD):
        del scene.api.stored["pods", pod["metadata"]["name"]]


MOVES: list[Callable[[Scene], object]] = [
    run, end(20), end(75), end(137), lose, forget, lambda s: None,
    lambda s: s.api.refused.update({JOB: ApiError(403, "Forbidden", "no")}),
    lambda s: s.api.refused.clear(),
    *(each.play for each in REFUSALS.values() if not each.create),
]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(MOVES), st.sampled_from([5, 60, 300])), max_size=60))
@settings(max_examples=40, deadline=None)
def test_no_order_of_events_holds_an_idle_node(
    moves: list[tuple[Callable[[Scene], object], int]],
) -> None:
    """Pods that come and go, are refused, evicted, lost, forgotten: no node is ever held for longer
    than a launch and stuckSeconds without an engine on it."""
    scene = Scene()
    scene.with_node()
    idle_since = scene.api.now
    for move, seconds in moves:
        if scene.owned(JOB) or move in MOVES[6:9]:
            move(scene)
        left = seconds
        while left > 0:  # as often as the operator looks, at least
            scene.look(min(left, 30))
            scene.nodes_are_ready()
            left -= 30
        runs = any(
            objects.is_running(pod) and not objects.node_loss(pod) for pod in scene.owned(POD)
        )
        if runs or not scene.owned(NODE_CLAIM):
            idle_since = scene.api.now
        idle = (scene.api.now - idle_since).total_seconds()
        late = 300 + 60  # a move, within which an engine was lost, and two looks
        assert idle <= STUCK + SLACK + late, json.dumps(scene.status)
