"""The operator on a real API server: pods are played, everything else is real."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cluster.world import (
    CORE_EVENT,
    DIGEST,
    SUCCESS,
    World,
    config_map,
    fresh,
    wait,
    workspace,
)

from jobs.api import kinds
from jobs.api.client import Cluster
from jobs.api.kinds import CLAIM, EVENT, JOB, POD, WORKSPACE, Object
from jobs.api.options import Nodes, Options, Storage
from jobs.desired import names
from jobs.desired import tuning as desired_tuning


def test_a_workspace_lives_from_pending_to_succeeded(world: World) -> None:
    """Pending, Running with progress, Succeeded with the digest; then the run volume is freed."""
    world.options = Options(storage=Storage(storage_class="manual"))
    world.apply(workspace("phi", world.namespace))
    world.step("phi", times=2)
    assert "Pending" == world.status("phi")["state"]
    assert ("True", "SpecValid") == world.condition("phi", "SpecValid")
    assert ("False", "WorkspaceTuningJobStatusPending") == world.condition("phi", "JobStarted")
    assert 1 == len(world.api.find(CLAIM, world.namespace))
    pod = world.pod("phi")
    world.progress = {"step": 3, "steps": 24, "loss": 2.5, "eta_seconds": 70, "epoch": 0.1}
    world.run(pod)
    status = world.state("phi", "Running")
    assert "3/24 (12%) 2m" == status["progress"]["text"]
    assert ("True", "WorkspaceTuningJobStatusStarted") == world.condition("phi", "JobStarted")
    assert ("True", "workspaceResourceStatusSuccess") == world.condition("phi", "ResourceReady")
    world.end(pod, 0, SUCCESS)
    status = world.state("phi", "Succeeded")
    made = {"image": "registry.example.com/team/a:1", "digest": DIGEST, "baseRevision": "c" * 40}
    assert made == status["output"]
    assert [DIGEST] == status["outputs"]
    assert 12345 == status["peakMemoryBytes"]
    assert "True" == status["ready"]
    assert "24/24 (100%)" == status["progress"]["text"]
    assert ("True", "workspaceSucceeded") == world.condition("phi", "WorkspaceSucceeded")
    before = world.status("phi")
    world.step("phi", times=3)
    claims = world.api.find(CLAIM, world.namespace)
    assert all(claim["metadata"].get("deletionTimestamp") for claim in claims)
    assert before == world.status("phi")
    reasons = {event["reason"] for event in world.api.find(EVENT, world.namespace)}
    assert {"WorkspaceTuningJobStatusStarted", "workspaceSucceeded"} <= reasons


@pytest.mark.parametrize(
    ("code", "message", "why", "reason", "hint"),
    [
        (10, {"reason": "DataUnusable", "message": "line 3", "hint": "mend", "code": 10}, "",
         "DataUnusable", "mend"),
        (137, None, "OOMKilled", "OutOfMemory", "max_length"),
        (12, {"reason": "AccessRefused", "message": "401", "hint": "login"}, "",
         "AccessRefused", "login"),
        (1, "not json \x1b[31m <b>", "Error", "InternalError", "log"),
    ],
)  # fmt: skip
def test_a_failed_job_tells_its_cause(
    world: World, code: int, message: Any, why: str, reason: str, hint: str
) -> None:
    """The engine's own reason and hint, or the kubelet's, in failure and condition."""
    world.options = Options(backoff_limit=0)
    world.apply(workspace("phi", world.namespace))
    pod = world.pod("phi")
    world.end(pod, code, message, why)
    status = world.state("phi", "Failed")
    assert reason == status["failure"]["reason"]
    assert hint in status["failure"]["hint"]
    assert ("False", "workspaceFailed") == world.condition("phi", "WorkspaceSucceeded")
    assert "\x1b" not in str(status)
    world.step("phi", times=3)
    assert 1 == len(world.jobs())


def test_a_lost_pod_is_replaced_and_the_state_stays_running(world: World) -> None:
    """A killed pod counts as a retry, never as the end: only the Job's conditions say that."""
    world.apply(workspace("phi", world.namespace))
    first = world.pod("phi")
    world.run(first)
    world.state("phi", "Running")
    world.end(first, 137, None, "Error")
    world.until("phi", lambda: world.status("phi").get("retries") == 1)
    assert "Running" == world.status("phi")["state"]


def test_an_edit_stops_the_old_job_first(world: World) -> None:
    """A new output is a new revision: the old Job is gone before the new one is there."""
    world.apply(workspace("phi", world.namespace))
    world.run(world.pod("phi"))
    world.state("phi", "Running")
    old = world.jobs()[0]
    edited = workspace("phi", world.namespace)
    edited["tuning"]["output"]["image"] = "registry.example.com/team/a:2"
    world.apply(edited)

    def replaced() -> list[Object]:
        found = world.jobs()
        assert len(found) <= 1
        return [job for job in found if job["metadata"]["uid"] != old["metadata"]["uid"]]

    found = world.until("phi", replaced, "the new Job")
    assert found[0]["metadata"]["name"] != old["metadata"]["name"]
    assert "a:2" in str(found[0]["spec"]["template"]["metadata"]["annotations"])


def test_an_earlier_output_is_told_to_the_next_run(world: World) -> None:
    """A finished Workspace that is edited may replace the tag that it wrote itself."""
    world.apply(workspace("phi", world.namespace))
    world.end(world.pod("phi"), 0, SUCCESS)
    world.state("phi", "Succeeded")
    edited = workspace("phi", world.namespace, input={"urls": ["https://data.example.com/b.jsonl"]})
    world.apply(edited)
    world.until("phi", lambda: len(world.jobs()) == 1 and "b.jsonl" in str(world.jobs()))
    annotations = world.jobs()[0]["spec"]["template"]["metadata"]["annotations"]
    assert DIGEST in annotations["tuning.kaito.sh/document"]
    assert "Pending" == world.status("phi")["state"]


def test_a_finished_job_is_removed_later_and_nothing_runs_again(world: World) -> None:
    """Neither the end of the keeping time nor a user who deletes the Job leads to a rerun."""
    world.apply(workspace("phi", world.namespace))
    world.end(world.pod("phi"), 0, SUCCESS)
    world.state("phi", "Succeeded")
    world.late = world.options.keep_seconds + 60
    world.until("phi", lambda: not world.jobs(), "the Job's removal")
    world.step("phi", times=3)
    assert [] == world.jobs()
    assert "Succeeded" == world.status("phi")["state"]


def test_an_edited_config_map_only_says_so(world: World) -> None:
    """ConfigChanged is set, nothing runs again; going back takes it away."""
    text = "training_config:\n  TrainingArguments:\n    seed: 1\n"
    world.apply(config_map("mine", world.namespace, text))
    world.apply(workspace("phi", world.namespace, config="mine"))
    world.end(world.pod("phi"), 0, SUCCESS)
    world.state("phi", "Succeeded")
    world.apply(config_map("mine", world.namespace, text.replace("1", "2")))
    world.step("phi", times=2)
    assert ("True", "ConfigMapEdited") == world.condition("phi", "ConfigChanged")
    assert 1 == len(world.jobs())
    world.apply(config_map("mine", world.namespace, text))
    world.step("phi", times=2)
    assert ("", "") == world.condition("phi", "ConfigChanged")


def test_a_missing_config_map_is_waited_for(world: World) -> None:
    """No Job before the ConfigMap is there; then the run starts by itself."""
    world.apply(workspace("phi", world.namespace, config="late"))
    world.step("phi", times=2)
    assert ("False", "ConfigMapNotFound") == world.condition("phi", "SpecValid")
    assert [] == world.jobs()
    world.apply(config_map("late", world.namespace, "training_config: {}\n"))
    world.until("phi", world.jobs, "a Job")
    assert ("True", "SpecValid") == world.condition("phi", "SpecValid")


def test_a_wrong_spec_makes_nothing(world: World) -> None:
    """A server without CEL lets it in; the condition says what the rule would have said."""
    world.apply(workspace("phi", world.namespace, input={"urls": ["https://127.0.0.1/x.jsonl"]}))
    world.step("phi", times=2)
    assert ("False", "SpecInvalid") == world.condition("phi", "SpecValid")
    assert "Failed" == world.status("phi")["state"]
    assert [] == world.jobs()
    world.apply(workspace("phi", world.namespace))
    world.until("phi", world.jobs, "a Job after the edit")
    assert "Pending" == world.status("phi")["state"]


def test_the_same_name_made_again_adopts_nothing(world: World) -> None:
    """A new UID is a new Workspace: another Job name, another volume, no result."""
    world.apply(workspace("phi", world.namespace))
    world.end(world.pod("phi"), 0, SUCCESS)
    world.state("phi", "Succeeded")
    old = world.jobs()[0]
    world.api.delete(WORKSPACE, world.get("phi"))
    wait(lambda: world.api.get(WORKSPACE, world.namespace, "phi") is None)
    world.apply(workspace("phi", world.namespace))
    job = world.until(
        "phi",
        lambda: [j for j in world.jobs() if j["metadata"]["uid"] != old["metadata"]["uid"]],
        "a Job of its own",
    )[0]
    assert job["metadata"]["name"] != old["metadata"]["name"]
    assert "outputs" not in world.status("phi")


def test_a_foreign_job_of_the_name_is_left_alone(world: World) -> None:
    """NameConflict, and the other's Job stays as it is."""
    made = world.apply(workspace("phi", world.namespace))
    name = desired_tuning.short_name(made, desired_tuning.revision(made))
    conflicting = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": world.namespace},
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [
            {"name": "x", "image": "x"}]}}},
    }  # fmt: skip
    world.api.create(JOB, conflicting)
    world.step("phi", times=2)
    assert ("False", "NameConflict") == world.condition("phi", "ResourceReady")
    kept = world.api.get(JOB, world.namespace, name)
    assert kept is not None and "ownerReferences" not in kept["metadata"]


@pytest.mark.parametrize(
    ("model", "instance_type"),
    [("phi-4", "Standard_NC6"), ("llama-3.3-70b-instruct", "Standard_NC24ads_A100_v4")],
    ids=["too old", "too small"],
)
def test_what_does_not_fit_buys_nothing(api: Cluster, model: str, instance_type: str) -> None:
    """DoesNotFit names the smallest instance type that fits; neither node nor Job is made."""
    world = fresh(api, nodes=Nodes(provision=True))
    item = workspace("big", world.namespace, preset={"name": model}, method="lora")
    item["resource"]["instanceType"] = instance_type
    world.apply(item)
    before = len(world.node_claims())
    world.step("big", times=3)
    assert ("False", "DoesNotFit") == world.condition("big", "ResourceReady")
    assert "use " in world.status("big")["failure"]["hint"]
    assert [] == world.jobs()
    assert before == len(world.node_claims())


def test_a_machine_is_bought_used_and_given_back(api: Cluster) -> None:
    """NodeClaim first, then the Job; when the work ends the machine goes, and so can the object."""
    world = fresh(api, nodes=Nodes(provision=True))
    world.apply(workspace("phi", world.namespace))
    world.step("phi", times=2)
    mine = f"{names.UID_LABEL}={world.get('phi')['metadata']['uid']}"
    assert 1 == len(api.find(kinds.NODE_CLAIM, labels=mine))
    assert [] == world.jobs()
    assert ("False", "NodeClaimNotReady") == world.condition("phi", "ResourceReady")
    assert [names.FINALIZER] == world.get("phi")["metadata"]["finalizers"]
    world.node_is_ready()
    pod = world.pod("phi")
    assert ("True", "NodeClaimsReady") == world.condition("phi", "NodeClaimReady")
    world.run(pod)
    world.state("phi", "Running")
    world.end(pod, 0, SUCCESS)
    world.state("phi", "Succeeded")
    world.until("phi", lambda: not api.find(kinds.NODE_CLAIM, labels=mine), "machine's end")
    api.delete(WORKSPACE, world.get("phi"))
    world_gone(world, "phi")


def world_gone(world: World, name: str) -> None:
    def gone() -> bool:
        world.step(name)
        return world.api.get(WORKSPACE, world.namespace, name) is None

    wait(gone)


def test_a_cloud_without_machines_is_asked_three_times(api: Cluster) -> None:
    """Bounded attempts, the cloud's own words in the condition, nothing left behind."""
    world = fresh(api, nodes=Nodes(provision=True, launch_seconds=100, attempts=3))
    world.apply(workspace("phi", world.namespace))
    world.step("phi")
    mine = f"{names.UID_LABEL}={world.get('phi')['metadata']['uid']}"
    names_seen = set()

    def given_up() -> bool:
        # Each machine goes when the garbage collector has seen to it, which may take seconds.
        for node_claim in api.find(kinds.NODE_CLAIM, labels=mine):
            names_seen.add(node_claim["metadata"]["name"])
            if node_claim["metadata"].get("deletionTimestamp"):
                continue
            world.patch_status(
                kinds.NODE_CLAIM,
                node_claim,
                {"conditions": [{"type": "Launched", "status": "False", "message": "no quota"}]},
            )
        world.late += 101
        return world.status("phi").get("state") == "Failed"

    world.until("phi", given_up, "three attempts")
    assert 3 == len(names_seen)
    assert "no quota" in world.status("phi")["failure"]["message"]
    world.until("phi", lambda: not api.find(kinds.NODE_CLAIM, labels=mine), "cleanup")


def test_deletion_while_a_machine_runs_leaves_nothing(api: Cluster) -> None:
    """The finalizer holds the object until Job and machine are gone."""
    world = fresh(api, nodes=Nodes(provision=True))
    world.apply(workspace("phi", world.namespace))
    world.step("phi", times=2)
    world.node_is_ready()
    world.run(world.pod("phi"))
    world.state("phi", "Running")
    api.delete(WORKSPACE, world.get("phi"))
    world_gone(world, "phi")
    assert [] == world.jobs()


def test_a_missing_secret_is_named(world: World) -> None:
    """Without a right to read Secrets, the kubelet's event tells which one is missing."""
    world.apply(workspace("phi", world.namespace))
    pod = world.pod("phi")
    world.patch_status(
        POD, pod, {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "True"}]}
    )
    meta = pod["metadata"]
    world.api.create(
        CORE_EVENT,
        {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": "mount.1", "namespace": world.namespace},
            "involvedObject": {"kind": "Pod", "name": meta["name"], "uid": meta["uid"],
                               "namespace": world.namespace},
            "reason": "FailedMount",
            "message": 'MountVolume.SetUp failed for volume "files" : secret "push" not found',
            "lastTimestamp": "2096-01-01T00:00:00Z",
            "type": "Warning",
        },
    )  # fmt: skip
    world.step("phi")
    assert ("False", "SecretNotFound") == world.condition("phi", "JobStarted")
    assert "Pending" == world.status("phi")["state"]
    world.api.create(
        CORE_EVENT,
        {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": "pull.1", "namespace": world.namespace},
            "involvedObject": {"kind": "Pod", "name": meta["name"], "uid": meta["uid"],
                               "namespace": world.namespace},
            "reason": "Pulling",
            "message": "Pulling image",
            "lastTimestamp": "2096-01-01T00:05:00Z",
            "type": "Normal",
        },
    )  # fmt: skip
    world.step("phi")
    assert ("False", "WorkspaceTuningJobStatusPending") == world.condition("phi", "JobStarted")


def test_an_image_that_cannot_be_pulled_fails_after_a_while(world: World) -> None:
    """First the reason, then, after the set time, Failed, and the Job is stopped."""
    world.apply(workspace("phi", world.namespace))
    world.wait_for_image(world.pod("phi"), "ImagePullBackOff", "no such image x")
    world.step("phi")
    assert ("False", "ImagePullError") == world.condition("phi", "JobStarted")
    world.late = world.options.stuck_seconds + 60
    status = world.state("phi", "Failed")
    assert "ImagePullError" == status["failure"]["reason"]
    world.until("phi", lambda: not world.jobs(), "the Job's end")


def test_a_pod_that_waited_long_for_its_node_has_its_time_for_the_image(world: World) -> None:
    """A busy cluster is no reason to fail at the first hiccup of a registry."""
    world.apply(workspace("phi", world.namespace))
    pod = world.pod("phi")
    world.late = 10 * world.options.stuck_seconds
    here = (datetime.now(UTC) + timedelta(seconds=world.late - 5)).strftime("%Y-%m-%dT%H:%M:%SZ")
    waits = {"state": {"waiting": {"reason": "ErrImagePull", "message": "502"}}}
    container = {"name": "tuning", "image": "x", "imageID": "", "ready": False, "restartCount": 0}
    world.patch_status(
        POD,
        pod,
        {
            "conditions": [{"type": "PodScheduled", "status": "True", "lastTransitionTime": here}],
            "containerStatuses": [container | waits],
        },
    )
    world.step("phi")
    assert ("False", "ImagePullError") == world.condition("phi", "JobStarted")
    assert "Pending" == world.status("phi")["state"]
    world.late += world.options.stuck_seconds + 60
    world.state("phi", "Failed")


def test_rerun_runs_again(world: World) -> None:
    """An annotation of ours counts at once, and a finished run is another one then."""
    world.apply(workspace("phi", world.namespace))
    world.end(world.pod("phi"), 0, SUCCESS)
    world.state("phi", "Succeeded")
    first = world.status("phi")["revision"]
    item = world.get("phi")
    item["metadata"]["annotations"] = {"tuning.kaito.sh/rerun": "2"}
    world.api.replace(WORKSPACE, item)
    world.until("phi", lambda: world.status("phi")["revision"] != first)
    world.end(world.pod("phi"), 0, SUCCESS)
    world.state("phi", "Succeeded")


def test_a_deleted_job_is_made_again_and_resumes(world: World) -> None:
    """Deleting the Job is no way to fail a Workspace; the run volume is kept meanwhile."""
    world.options = Options(storage=Storage(storage_class="manual"))
    world.apply(workspace("phi", world.namespace))
    world.run(world.pod("phi"))
    world.state("phi", "Running")
    old, claim = world.jobs()[0], world.api.find(CLAIM, world.namespace)[0]
    world.api.delete(JOB, old)
    again = world.until(
        "phi",
        lambda: [j for j in world.jobs() if j["metadata"]["uid"] != old["metadata"]["uid"]],
    )
    assert 1 == len(again)
    kept = world.api.find(CLAIM, world.namespace)
    assert [claim["metadata"]["uid"]] == [c["metadata"]["uid"] for c in kept]


def test_a_quota_is_told_in_its_own_words(world: World) -> None:
    """What the API server refuses for good becomes a condition, not a crash loop."""
    quota = kinds.Kind("", "v1", "resourcequotas", "ResourceQuota")
    world.api.create(
        quota,
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "none", "namespace": world.namespace},
            "spec": {"hard": {"count/jobs.batch": "0"}},
        },
    )
    wait(
        lambda: (world.api.get(quota, world.namespace, "none") or {}).get("status", {}).get("hard")
    )
    world.apply(workspace("phi", world.namespace))
    world.step("phi", times=2)
    found = world.condition("phi", "ResourceReady")
    assert ("False", "Forbidden") == found
    assert [] == world.jobs()


class Crash(Exception):
    """The operator dies here."""


class Dying(Cluster):
    """A client that dies before or after its n-th write."""

    def __init__(self, inner: Cluster, number: int, *, after: bool) -> None:
        super().__init__(inner._api)
        self.left, self.after = number, after

    def _open(self, method: str, path: str, **more: Any) -> Any:
        if method == "GET":
            return super()._open(method, path, **more)
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Crash
        answer = super()._open(method, path, **more)
        if self.left == 0:
            answer.close()
            raise Crash
        return answer


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_at_any_write_changes_nothing_in_the_end(api: Cluster, after: bool) -> None:
    """Killed around its k-th write and started again: one Job, one machine, one end."""
    for number in range(1, 13):
        world = fresh(api, nodes=Nodes(provision=True), storage=Storage(storage_class="manual"))
        world.apply(workspace("phi", world.namespace))
        dying = Dying(api, number, after=after)

        def life(proxy_get: Cluster | None, world: World = world) -> None:
            world.step("phi", cluster=proxy_get, times=2)
            world.node_is_ready()
            world.step("phi", cluster=proxy_get, times=2)
            if world.status("phi").get("state") != "Succeeded":
                world.end(world.pod("phi"), 0, SUCCESS)
            wait(lambda: world.jobs()[0]["status"].get("succeeded"))
            world.step("phi", cluster=proxy_get, times=3)

        try:
            life(dying)
        except Crash:
            life(None)
        status = world.state("phi", "Succeeded")
        assert DIGEST == status["output"]["digest"]
        assert 1 == len(world.jobs())
        mine = f"{names.UID_LABEL}={world.get('phi')['metadata']['uid']}"
        world.until("phi", lambda w=mine: not api.find(kinds.NODE_CLAIM, labels=w))
