"""Every change of state is reported by an event, and no event without a change."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cluster import Scene, ended, engine

from jobs.api.client import ApiError
from jobs.api.kinds import DEPLOYMENT, JOB, POD, WORKSPACE, Kind, Object
from jobs.controller.reconcile import _transitions
from jobs.observed import objects
from jobs.observed.conditions import SUMMARY

Move = Callable[[Scene], object]


def conditions(status: Object) -> dict[str, tuple[str, str]]:
    """Type -> (status, reason) of those that are no summary of others."""
    return {
        each["type"]: (each["status"], each["reason"])
        for each in status.get("conditions") or []
        if each["type"] not in SUMMARY
    }


def look(scene: Scene, seconds: float = 15) -> list[tuple[str, str, str]]:
    """The events of one reconcile, which are as many as the changes that it writes."""
    api, writes = scene.api, list[tuple[Object, int]]()
    replace = type(api).replace_status

    def write(kind: Kind, item: Object, status: Object) -> Object | None:
        writes.append((copy.deepcopy(scene.status), len(api.events)))
        return replace(api, kind, item, status)

    before, count = copy.deepcopy(scene.status), len(api.events)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "replace_status", write)
        after = scene.look(seconds)
    for (old, start), (new, end) in itertools.pairwise([*writes, (after, len(api.events))]):
        _compare(old, new, api.events[start:end])
    if conditions(before) == conditions(after) and before.get("state") == after.get("state"):
        assert count == len(api.events)  # nor for what is taken back at once
    return api.events[count:]


def _compare(old: Object, new: Object, events: list[tuple[str, str, str]]) -> None:
    was, now = conditions(old), conditions(new)
    changed = {kind for kind in now if was.get(kind) != now[kind]}
    is_new_state = bool(old.get("state")) and old["state"] != new["state"]
    assert bool(events) >= is_new_state
    assert len(events) <= max(len(changed), is_new_state)
    assert len(events) == len(set(events))
    for kind, _, note in events:
        assert note
        assert kind == "Normal" or new["state"] in ("Failed", "NotReady")


def run(scene: Scene) -> None:
    scene.pod(phase="Running", **engine({"running": {}}))


def end(code: int) -> Move:
    def play(scene: Scene) -> None:
        for pod in scene.owned(POD):
            if objects.is_running(pod):
                pod["status"] |= {"phase": "Failed"} | engine(ended(code))

    return play


def forget(scene: Scene) -> None:
    for pod in scene.owned(POD):
        del scene.api.stored["pods", pod["metadata"]["name"]]


def refuse(code: int) -> Move:
    def play(scene: Scene) -> None:
        error = ApiError(code, "Refused", "a webhook is down")
        scene.api.refused.update({JOB: error, DEPLOYMENT: error})

    return play


def edit(**tuning: Any) -> Move:
    def play(scene: Scene) -> None:
        item = scene.api.stored["workspaces", "phi"]
        if "tuning" in item:
            item["tuning"] |= tuning
            item["metadata"]["generation"] += 1

    return play


def is_ready(scene: Scene) -> None:
    """The server's newest pod answers."""
    for deployment in scene.owned(DEPLOYMENT):
        deployment["status"] = {"readyReplicas": 1}
    for pod in scene.owned(POD)[-1:]:
        ready = {"type": "Ready", "status": "True", "lastTransitionTime": scene.api.stamp()}
        pod["status"]["conditions"].append(ready)


def replace_job(scene: Scene) -> None:
    for job in scene.owned(JOB):
        scene.api.delete(JOB, job)


MOVES: list[Move] = [
    run, end(20), end(75), end(10), forget, is_ready, replace_job,
    refuse(500), refuse(403), refuse(429), lambda s: s.api.refused.clear(),
    edit(input={"urls": ["ftp://x"]}), edit(input={"urls": ["https://data.example.com/b.jsonl"]}),
    lambda s: s.ends_job("Complete") if s.owned(JOB) else None,
    lambda s: s.ends_job("Failed") if s.owned(JOB) else None,
    lambda s: None,
]  # fmt: skip


@pytest.mark.parametrize("serves", [False, True])
@given(moves=st.lists(st.sampled_from(MOVES), max_size=30))
@settings(max_examples=60, deadline=None)
def test_no_change_is_silent_and_no_event_is_idle(serves: bool, moves: list[Move]) -> None:
    """Runs and servers that start, fail, are refused, edited and lost, in any order."""
    scene = Scene(serves=serves)
    look(scene)
    for move in moves:
        if scene.owned(JOB) or scene.owned(DEPLOYMENT) or move in MOVES[7:13]:
            move(scene)
        look(scene)
        scene.nodes_are_ready()
        look(scene, 40)


def test_a_life_is_told_once() -> None:
    """Node, start, retry, end: one event each, however often the operator looks."""
    scene = Scene()
    heard = []

    def looks() -> None:
        for _ in range(5):
            heard.extend(reason for _, reason, _ in look(scene))
            scene.nodes_are_ready()

    looks()
    run(scene)
    looks()
    end(20)(scene)
    looks()
    run(scene)
    looks()
    end(10)(scene)
    scene.ends_job("Failed")
    looks()
    assert "Failed" == scene.status["state"]
    assert 2 == heard.count("WorkspaceTuningJobStatusStarted")  # the second pod's, too
    assert 1 == heard.count("TransientFailure")
    assert 1 == heard.count("WorkspaceTuningJobStatusFailed")
    assert ["Warning"] == [kind for kind, *_ in scene.api.events if kind == "Warning"]


@pytest.mark.parametrize("code", [403, 429, 500])
def test_a_refusal_is_told_whether_or_not_it_is_tried_again(code: int) -> None:
    """Its words are in one event, and the start that follows in another."""
    scene = Scene()
    refuse(code)(scene)
    for _ in range(5):
        look(scene)
        scene.nodes_are_ready()
    assert 1 == sum("a webhook is down" in note for *_, note in scene.api.events)
    scene.api.refused.clear()
    look(scene)
    run(scene)
    assert ["WorkspaceTuningJobStatusStarted"] == [
        reason for _, reason, _ in look(scene) if reason.startswith("WorkspaceTuning")
    ]


def test_a_state_that_changes_alone_is_told() -> None:
    """By the summary, where no other condition changed."""
    ready = {"type": "Ready", "status": "False", "reason": "Why", "message": "because"}
    old: Object = {"state": "NotReady", "conditions": [ready]}
    assert [("Normal", "Why", "because")] == _transitions(old, old | {"state": "Pending"})
    assert [("Warning", "Why", "because")] == _transitions(old, old | {"state": "Failed"})
    assert [] == _transitions(old, dict(old)) == _transitions({}, old | {"state": "Pending"})


def test_a_deletion_that_waits_is_told_once() -> None:
    """With the objects that it waits for."""
    scene = Scene().with_node()
    item = scene.api.stored[WORKSPACE.plural, "phi"]
    item["metadata"]["deletionTimestamp"] = scene.api.stamp()
    scene.owned(JOB)[0]["metadata"]["deletionTimestamp"] = scene.api.stamp()
    heard = [event for _ in range(3) for event in look(scene)]
    assert ["workspaceDeleted"] == [reason for _, reason, _ in heard]
