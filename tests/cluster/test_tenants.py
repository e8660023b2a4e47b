"""What one tenant stores or runs keeps the operator from nobody else, on a real API server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cluster.world import fresh, operating, wait, workspace

from jobs.api.client import Cluster
from jobs.api.kinds import JOB, POD, WORKSPACE
from jobs.api.options import Options
from jobs.desired import names
from jobs.observed.objects import condition


def create_raw(api: Cluster, namespace: str, text: str) -> int:
    """The status of a POST of a Workspace that Python could not serialize."""
    response = api._pool.urlopen(
        "POST",
        f"{api._base}{WORKSPACE.path(namespace)}",
        body=text.encode(),
        headers={"Content-Type": "application/json"} | api._token(),
    )
    return response.status


@pytest.mark.parametrize("depth", [500, 3000, 9000])
def test_an_object_that_is_nested_too_deeply_stops_nobody(api: Cluster, depth: int) -> None:
    """The API server stores it; lists, watches and reconciles of all others go on, and it is
    refused itself."""
    world = fresh(api)
    item = workspace("deep", world.namespace)
    item["tuning"]["input"] = {"volumeSource": {"nfs": "HERE"}}
    text = json.dumps(item).replace('"HERE"', '{"a":' * depth + "1" + "}" * depth)
    status = create_raw(api, world.namespace, text)
    if status != 201:
        pytest.skip(f"the API server refuses it itself: {status}")

    with operating(api, Options()):
        world.apply(workspace("good", world.namespace))
        wait(lambda: api.find(JOB, world.namespace))
        wait(lambda: world.status("deep").get("state") == "Failed")
    found = condition(world.get("deep"), "SpecValid")
    assert found and "VolumeForbidden" == found["reason"]


def test_a_pod_with_the_jobs_label_is_not_the_jobs(api: Cluster) -> None:
    """Nobody asks it for progress, and its end is not that of the run."""
    world = fresh(api)
    world.apply(workspace("phi", world.namespace))
    ours = world.pod("phi")
    labels = dict(ours["metadata"]["labels"])
    labels.pop("controller-uid")  # by which the Job would adopt the pod
    spec: Any = {"containers": [{"name": "tuning", "image": "busybox"}]}
    meta = {"name": "forged", "namespace": world.namespace, "labels": labels | {"x": "y"}}
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": labels["job-name"]}
    owner["uid"] = next(j["metadata"]["uid"] for j in world.jobs())
    meta["ownerReferences"] = [owner]  # not as its controller
    forged = api.create(POD, {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
    assert forged is not None
    world.run(forged)
    asked: list[str] = []
    context = world.context()
    world.run(ours)

    def poll(pod: Any) -> None:
        asked.append(pod["metadata"]["name"])

    from dataclasses import replace

    from jobs.controller.reconcile import reconcile

    def running() -> bool:
        reconcile(replace(context, poll=poll), world.namespace, "phi")
        return world.status("phi").get("state") == "Running"

    wait(running)
    assert {ours["metadata"]["name"]} == set(asked)
    assert names.WORKSPACE_LABEL in labels


def test_ready_is_what_tools_wait_for(api: Cluster) -> None:
    """False and Stalled for what is invalid, and the summary survives the CRD's schema."""
    world = fresh(api)
    item = workspace("bad", world.namespace)
    item["tuning"]["input"] = {"volumeSource": {"nfs": {"server": "s", "path": "/"}}}
    world.apply(item)
    status = world.state("bad", "Failed")
    found = {each["type"]: each["status"] for each in status["conditions"]}

    assert ("False", "True") == (found["Ready"], found["Stalled"])
    assert status["observedGeneration"] == world.get("bad")["metadata"]["generation"]
