"""The fields of our Jobs at work: failure policy, retries, success, suspension, pods by index.

The server of the test bed forgets these fields; `job_controller` plays those who obey them.
Objects, garbage collector and the operator are real; the kubelet is played.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from cluster import bed
from cluster.job_controller import INDEX, JobController
from cluster.whole_jobs import Kept
from cluster.world import SUCCESS, World, fresh, wait, workspace

from jobs.api.client import Cluster
from jobs.api.kinds import JOB, POD, WORKSPACE, Object
from jobs.api.options import Nodes, Options, Storage
from jobs.observed import objects


@pytest.fixture(scope="module")
def kept(server: bed.Bed, api: Cluster) -> Iterator[Kept]:
    """The server with our Job controller in place of its own."""
    with server.without("job"), JobController(api).at_work():
        yield Kept(api._api)


@pytest.fixture
def group(kept: Kept) -> World:
    """A world whose Jobs are what they say."""
    return fresh(kept, storage=Storage(run_volume="ephemeral"))


def live(world: World) -> list[Object]:
    """Pods that have not ended."""
    return [p for p in world.pods() if p["status"].get("phase") not in ("Failed", "Succeeded")]


def tune(world: World, name: str, count: int = 1, **changes: Any) -> Object:
    """Apply a Workspace, until its Job has all of its pods."""
    item = workspace(name, world.namespace)
    item["resource"] |= {"count": count} if count > 1 else {}
    item["metadata"] |= changes
    world.apply(item)
    world.until(name, lambda: len(live(world)) == count, "pods")
    (job,) = world.jobs()
    return job


def by_index(world: World) -> dict[int, Object]:
    return {objects.completion_index(pod): pod for pod in live(world)}


@pytest.mark.parametrize("code", [10, 11, 12, 13, 14])
def test_what_would_fail_again_is_not_tried_again(group: World, code: int) -> None:
    """The engine's permanent exit codes end the Job with the first pod."""
    tune(group, "phi")
    group.end(group.pod("phi"), code, {"reason": "DataUnusable", "message": "no rows"})
    status = group.state("phi", "Failed")
    assert code == status["failure"]["exitCode"] and "no rows" in status["failure"]["message"]
    assert 1 == len(group.pods())
    (job,) = group.jobs()
    failed = objects.condition(job, "Failed")
    assert failed and "PodFailurePolicy" == failed["reason"]


def test_a_stop_is_no_try_and_a_failure_is(group: World) -> None:
    """75 as often as it likes; of transient failures as many as the option says."""
    group.options = Options(storage=Storage(run_volume="ephemeral"), backoff_limit=1)
    tune(group, "phi")
    for code in (75, 75, 75, 20):
        pod = group.pod("phi")
        group.run(pod)
        group.end(pod, code)
        group.until("phi", lambda pod=pod: live(group) and live(group) != [pod], "the next pod")
        assert "Failed" != group.status("phi").get("state")
    group.end(group.pod("phi"), 137)
    status = group.state("phi", "Failed")
    assert 137 == status["failure"]["exitCode"] and 2 == status["retries"]


def test_a_drained_pod_is_no_try(group: World) -> None:
    """A pod with the condition DisruptionTarget, whatever its exit code."""
    group.options = Options(storage=Storage(run_volume="ephemeral"), backoff_limit=0)
    tune(group, "phi")
    pod = group.pod("phi")
    target = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
    state = {"name": "tuning", "image": "x", "imageID": "", "ready": False, "restartCount": 0,
             "state": {"terminated": {"exitCode": 143}}}  # fmt: skip
    group.patch_status(
        POD, pod, {"phase": "Failed", "conditions": [target], "containerStatuses": [state]}
    )
    group.until("phi", lambda: live(group), "the next pod")
    assert "Failed" != group.status("phi")["state"]


@pytest.mark.parametrize("count", [1, 3])
def test_kueue_holds_the_job_back_and_admits_it(kept: Kept, group: World, count: int) -> None:
    """Suspended, before it starts or by a preemption, it loses its pods, and the status says
    Queued; admitted, it gets all of them at once."""
    job = tune(group, "phi", count, labels={"kueue.x-k8s.io/queue-name": "team"})
    assert "team" == job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    kept.suspend(job, value=True)
    group.until("phi", lambda: not live(group) and not group.pods(), "no pods")
    group.until("phi", lambda: group.condition("phi", "ResourceReady") == ("False", "Queued"))
    kept.suspend(group.jobs()[0], value=False)
    group.until("phi", lambda: len(live(group)) == count, "pods")
    group.until("phi", lambda: group.condition("phi", "ResourceReady") != ("False", "Queued"))


def test_a_job_of_several_has_a_pod_for_each_index(group: World) -> None:
    """With host name, label and environment; one that fails is replaced alone."""
    tune(group, "phi", 3)
    first = by_index(group)
    assert {0, 1, 2} == first.keys()
    for index, pod in first.items():
        (job,) = group.jobs()
        assert f"{job['metadata']['name']}-{index}" == pod["spec"]["hostname"]
        assert job["metadata"]["name"] == pod["spec"]["subdomain"]
        assert str(index) == pod["metadata"]["labels"][INDEX]
        group.run(pod)
    group.state("phi", "Running")
    group.end(first[1], 137)
    group.until("phi", lambda: len(by_index(group)) == 3, "the next pod")
    again = by_index(group)
    assert first[1]["metadata"]["uid"] != again[1]["metadata"]["uid"]
    assert all(first[i]["metadata"]["uid"] == again[i]["metadata"]["uid"] for i in (0, 2))
    assert "Running" == group.status("phi")["state"]


def test_index_0_decides_that_it_has_succeeded(group: World) -> None:
    """The others, which still run, are stopped by the Job's success policy; the digest is its."""
    tune(group, "phi", 2)
    pods = by_index(group)
    for pod in pods.values():
        group.run(pod)
    group.state("phi", "Running")
    group.end(pods[0], 0, SUCCESS)
    status = group.state("phi", "Succeeded")
    assert SUCCESS["digest"] == status["output"]["digest"]
    (job,) = wait(lambda: [j for j in group.jobs() if objects.is_true(j, "Complete")])
    complete = objects.condition(job, "Complete")
    assert complete and "SuccessPolicy" == complete["reason"]


def test_a_permanent_failure_of_any_pod_ends_all(group: World) -> None:
    """No pod goes on, and the cause is that pod's, not the stop of the others."""
    tune(group, "phi", 2)
    pods = by_index(group)
    for pod in pods.values():
        group.run(pod)
    group.end(pods[1], 14, {"reason": "OutOfMemory", "message": "GPU 3 is full"})
    status = group.state("phi", "Failed")
    assert "OutOfMemory" == status["failure"]["reason"]
    assert "pod 1: GPU 3 is full" in status["failure"]["message"]
    wait(lambda: not live(group))


def test_nodes_of_a_group_are_given_back_together(kept: Kept) -> None:
    """Karpenter is played: two requests, the Job when both are ready, none when it ends, nor when
    the Workspace is deleted while it runs."""
    nodes = Nodes(provision=True)
    world = fresh(kept, nodes=nodes, storage=Storage(run_volume="ephemeral"))

    def own() -> list[Object]:
        space = "kaito.sh/workspacenamespace"
        return [
            c for c in world.node_claims() if world.namespace == c["metadata"]["labels"].get(space)
        ]

    for end in ("success", "failure", "deletion"):
        item = workspace(end, world.namespace)
        item["resource"]["count"] = 2
        world.apply(item)
        world.until(end, lambda: len(own()) == 2, "two nodes")
        assert [] == [j for j in world.jobs() if end in j["metadata"]["name"]]
        world.node_is_ready()
        world.until(end, lambda: len(live(world)) == 2, "pods")
        pods = by_index(world)
        for pod in pods.values():
            world.run(pod)
        world.state(end, "Running")
        if end == "deletion":
            world.api.delete(WORKSPACE, world.get(end))
            wait(lambda: world.step("deletion") or not own())
            continue
        world.end(pods[0], 0 if end == "success" else 12, SUCCESS if end == "success" else None)
        world.until(end, lambda: not own(), "no node")
        expected = {"success": "Succeeded", "failure": "Failed"}[end]
        assert expected == world.status(end)["state"]
        wait(lambda: not live(world))
    wait(lambda: not [j for j in world.api.find(JOB, world.namespace) if "deletion" in str(j)])
