"""Real pods: a Workspace applied with kubectl trains a tiny model in a Job and pushes its adapter.

The Job is what the operator renders. Only what replaces the engine's image is added: the machine's
own Python, read-only, in a busybox, and the host's network for the registry on loopback.
"""

from __future__ import annotations

import json
import shutil

import pytest
from cluster.place import PASSWORD, HostPython, Place, ended
from cluster.world import wait

from jobs.controller import decide


def test_the_example_trains_and_pushes(place: Place) -> None:
    """kubectl apply, a real pod, a real push with the imagePushSecret, the digest in the status."""
    place.apply("demo:1")
    status = place.until(lambda s: s.get("state") == "Running")
    status = place.until(ended)
    assert "Succeeded" == status["state"], status
    assert "12/12 (100%)" == status["progress"]["text"]
    assert place.held("demo:1") == status["output"]["digest"]
    table = place.kubectl("get", "workspaces", "demo")
    assert "Succeeded" in table and "12/12" in table
    place.kubectl("wait", "--for=condition=WorkspaceSucceeded", "workspace/demo", "--timeout=5s")


@pytest.mark.timeout(600)
def test_a_killed_pod_goes_on_and_gives_the_same_digest(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped with a notice, as a spot machine is, then killed without one, both in mid-training:
    the next pod resumes from the claim. Then the same data undisturbed: the same bytes."""
    monkeypatch.setitem(decide.REQUEUE_SECONDS, "running", 0.5)
    place.apply("killed:1", steps=200)
    for step, seconds in ((20, 60), (60, 0)):
        wait(lambda step=step: len(place.metrics()) >= step, 150)
        place.delete_pods(seconds)
    place.until(lambda s: s.get("progress", {}).get("step", 0) >= 60)
    status = place.until(ended)
    assert "Succeeded" == status["state"], status
    steps = [json.loads(line)["step"] for line in place.metrics()]
    assert 200 == steps[-1] and len(steps) == len(set(steps))
    assert 58 <= place.result("train")["resumed_from"] < 200
    killed = status["output"]["digest"]
    place.kubectl("delete", "workspace", "demo")
    shutil.rmtree(place.folder / "run")
    place.volume("run2", "500Gi", place.name)
    place.apply("clean:1", steps=200)
    status = place.until(ended)
    assert "Succeeded" == status["state"], status
    assert killed == status["output"]["digest"]


def test_an_edited_workspace_replaces_its_own_tag(place: Place) -> None:
    """The next revision may write the tag that this Workspace wrote; a stranger's it may not."""
    place.apply("mine:1", steps=2)
    first = place.until(ended)
    assert "Succeeded" == first["state"], first
    place.volume("run2", "500Gi", place.name)
    place.apply("mine:1", steps=3, config="other-config")
    place.until(lambda s: s.get("revision") != first["revision"])
    second = place.until(ended)
    assert "Succeeded" == second["state"], second
    digests = [first["output"]["digest"], second["output"]["digest"]]
    assert digests == second["outputs"] and digests[0] != digests[1]
    assert digests[1] == place.held("mine:1")
    place.clear()
    place.options.__dict__["backoff_limit"] = 0
    wait(lambda: not place.status())
    place.volume("run3", "500Gi", place.name)
    place.apply("mine:1", steps=4)
    third = place.until(ended)
    assert "AccessRefused" == third["failure"]["reason"], third
    assert digests[1] == place.held("mine:1")


def test_unusable_data_is_told_with_its_line(place: Place) -> None:
    """The engine's own words, from the termination message into the condition."""
    with (place.folder / "data" / "demo.jsonl").open("a") as file:
        file.write("{broken\n")
    place.options.__dict__["backoff_limit"] = 0
    place.apply("bad:1")
    status = place.until(ended)
    assert "DataUnusable" == status["failure"]["reason"], status
    assert 10 == status["failure"]["exitCode"]
    assert status["failure"]["hint"]


def test_a_wrong_password_is_told_before_training(place: Place) -> None:
    """AccessRefused, and the password stands nowhere."""
    place.options.__dict__["backoff_limit"] = 0
    place.secret("wrong", "not-the-password")
    place.apply("refused:1", secret="wrong")
    status = place.until(ended)
    assert "AccessRefused" == status["failure"]["reason"], status
    assert "not-the-password" not in json.dumps(status)


def test_a_secret_that_comes_late(place: Place) -> None:
    """SecretNotFound while it is missing; made, the Job goes on by itself."""
    place.apply("late:1", secret="late")
    place.until(lambda s: any(c["reason"] == "SecretNotFound" for c in s.get("conditions", [])))
    place.secret("late", PASSWORD)
    status = place.until(ended, 240)
    assert "Succeeded" == status["state"], status


def test_the_kernel_s_word_is_told_as_out_of_memory(place: Place) -> None:
    """A limit that Python with torch cannot live in."""
    place.options.__dict__["backoff_limit"] = 0
    HostPython.limit = "150Mi"
    try:
        place.apply("oom:1")
        status = place.until(ended)
    finally:
        HostPython.limit = "4Gi"
    assert "OutOfMemory" == status["failure"]["reason"], status


def test_a_deadline_ends_the_job(place: Place) -> None:
    """DeadlineExceeded, nothing pushed."""
    place.options.__dict__["deadline_seconds"] = 6
    place.apply("slow:1")
    status = place.until(ended)
    assert "DeadlineExceeded" == status["failure"]["reason"], status
