"""What goes wrong around the operator, on a real API server: the same end, or it says why."""

from __future__ import annotations

import contextlib
import copy
import secrets
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from cluster.world import (
    CORE_EVENT,
    DIGEST,
    NAMESPACE,
    NODE_CLAIM_CRD,
    SUCCESS,
    World,
    config_map,
    fresh,
    operating,
    wait,
    workspace,
)

from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import (
    CLAIM,
    CRD,
    EVENT,
    JOB,
    NETWORK_POLICY,
    NODE_CLAIM,
    POD,
    WEBHOOK,
    WORKSPACE,
    Kind,
    Object,
)
from jobs.api.options import Nodes, Options, Storage
from jobs.controller import preflight
from jobs.controller.reconcile import reconcile
from jobs.desired import names
from tuning.errors import SpecError

QUOTA = Kind("", "v1", "resourcequotas", "ResourceQuota")


# events


class Deaf(Cluster):
    """Does not hear the n-th event, of whichever watch."""

    def __init__(self, inner: Cluster, number: int) -> None:
        super().__init__(inner._api)
        self.left, self.heard, self._lock = number, 0, threading.Lock()

    def watch(self, kind: Kind, namespace: str | None, **more: Any) -> Iterator[Object]:
        for item in super().watch(kind, namespace, **more):
            with self._lock:
                self.left -= 1
                lost = self.left == 0
                self.heard += not lost
            if not lost:
                yield item


def test_each_event_may_be_lost(api: Cluster) -> None:
    """Each of the first 20 events of a life is dropped once, each in a life of its own: the next
    list brings every one of them to the same end."""
    lives = []
    for number in range(1, 21):
        world = fresh(api, network_policy=False)
        world.options = world.options.model_copy(update={"namespaces": (world.namespace,)})
        lives.append((world, Deaf(api, number)))

    def live(world: World, deaf: Deaf) -> None:
        with operating(deaf, world.options, resync=2):
            world.apply(workspace("phi", world.namespace))
            pod = wait(world.pods, 90)[0]
            world.run(pod)
            wait(lambda: world.status("phi").get("state") == "Running", 90)
            world.end(pod, 0, SUCCESS)
            wait(lambda: world.status("phi").get("state") == "Succeeded", 90)

    threads = [threading.Thread(target=live, args=life) for life in lives]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for world, deaf in lives:
        assert [DIGEST] == world.status("phi")["outputs"]
        assert 1 == len(world.jobs())
        assert deaf.heard


def test_an_old_view_of_a_workspace_changes_nothing(world: World) -> None:
    """Any earlier version of it, as a late event would show it: a conflict, no second Job, and
    nothing is taken away."""
    views = [world.apply(workspace("phi", world.namespace))]
    world.step("phi")
    pod = world.pod("phi")
    world.run(pod)
    world.state("phi", "Running")
    views += [world.get("phi")]
    edited = workspace("phi", world.namespace)
    edited["tuning"]["output"]["image"] = "registry.example.com/team/a:2"
    world.apply(edited)
    views += [world.get("phi")]
    world.until("phi", lambda: world.status("phi").get("job") != views[1]["status"]["job"])
    pod = world.pod("phi")
    world.end(pod, 0, SUCCESS)
    world.state("phi", "Succeeded")
    end, jobs = world.status("phi"), world.jobs()

    for view in views:
        try:
            reconcile(world.context(), world.namespace, "phi", from_event=copy.deepcopy(view))
        except ApiError as error:
            assert 409 == error.status
    assert end == world.status("phi")
    uids = [job["metadata"]["uid"] for job in world.jobs() if job["metadata"]["name"] == end["job"]]
    assert [j["metadata"]["uid"] for j in jobs if j["metadata"]["name"] == end["job"]] == uids
    others = [job for job in world.jobs() if job["metadata"]["name"] != end["job"]]
    assert [] == [job for job in others if not job["metadata"].get("deletionTimestamp")]


def test_a_replayed_reconcile_repeats_no_event(world: World) -> None:
    """Each change has one event, also where a slower replica decides the same from an old view."""
    views = [world.apply(workspace("phi", world.namespace))]
    world.step("phi")
    pod = world.pod("phi")
    views += [world.get("phi")]
    world.run(pod)
    world.state("phi", "Running")
    views += [world.get("phi")]
    world.end(pod, 0, SUCCESS)
    world.state("phi", "Succeeded")

    def events() -> list[tuple[str, str, str]]:
        found = world.api.find(EVENT, world.namespace)
        return sorted(
            (event["type"], event["reason"], event["note"])
            for event in found
            if event["regarding"]["kind"] == "Workspace"
        )

    before = events()
    assert 1 == len([r for _, r, _ in before if r == "WorkspaceTuningJobStatusStarted"])
    assert 1 == len([r for _, r, _ in before if r == "workspaceSucceeded"])
    assert len(before) == len(set(before))
    for view in views:
        with pytest.raises(ApiError, match="409"):
            reconcile(world.context(), world.namespace, "phi", from_event=copy.deepcopy(view))
    world.step("phi", times=3)
    assert before == events()


def test_the_server_itself_calls_a_version_too_old(api: Cluster, world: World) -> None:
    """A watch from the beginning of time: 410, as its client expects it."""
    world.apply(workspace("phi", world.namespace))
    with pytest.raises(ApiError) as gone:
        list(api.watch(WORKSPACE, None, labels="", version="1", seconds=1))
    assert 410 == gone.value.status


# writes


class Crowded(Cluster):
    """Others write to the Workspace just before each of our first writes to it."""

    def __init__(self, inner: Cluster, times: int) -> None:
        super().__init__(inner._api)
        self.times = self.left = times

    def replace_status(self, kind: Kind, item: Object, status: Object) -> Object | None:
        if self.left:
            self.left -= 1
            newest = super().get(kind, item["metadata"]["namespace"], item["metadata"]["name"])
            assert newest is not None
            told = copy.deepcopy(newest.get("status") or {})
            others = {
                "type": "Theirs",
                "status": "True",
                "reason": "Counting",
                "message": str(self.left),
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }
            kept = [c for c in told.get("conditions") or [] if c["type"] != "Theirs"]
            super().replace_status(kind, newest, told | {"conditions": [*kept, others]})
        return super().replace_status(kind, item, status)


def test_conflicts_are_read_again_and_others_words_stay(world: World) -> None:
    """Five conflicts in a row; another controller's condition is still there in the end."""
    world.apply(workspace("phi", world.namespace))
    crowded = Crowded(world.api, 5)
    for _ in range(6):
        world.step("phi", cluster=crowded)
    assert 0 == crowded.left
    assert ("True", "Counting") == world.condition("phi", "Theirs")
    world.end(world.pod("phi"), 0, SUCCESS)
    world.state("phi", "Succeeded")
    assert ("True", "Counting") == world.condition("phi", "Theirs")
    assert 1 == len(world.jobs())


# what others do to our children


@pytest.mark.parametrize("how", ["Foreground", "Background", "Orphan"])
def test_a_job_that_a_user_deletes_is_made_again(world: World, how: str) -> None:
    """However it is deleted: one new Job, the state stays Running, an event says what happened."""
    world.apply(workspace("phi", world.namespace))
    world.run(world.pod("phi"))
    world.state("phi", "Running")
    old = world.jobs()[0]
    meta = old["metadata"]
    world.api._call(
        "DELETE", JOB.path(world.namespace, meta["name"]), body={"propagationPolicy": how}
    )
    again = world.until(
        "phi", lambda: [j for j in world.jobs() if j["metadata"]["uid"] != meta["uid"]]
    )
    world.step("phi")
    assert [meta["name"]] == [job["metadata"]["name"] for job in again]
    assert "Running" == world.status("phi")["state"]
    notes = [e["reason"] for e in world.api.find(EVENT, world.namespace)]
    assert "JobDeleted" in notes


def test_a_claim_that_is_lost_is_made_again(world: World) -> None:
    """Deleted under a pod that waits for a node: the run goes on, from the beginning if need be."""
    world.options = Options(storage=Storage(storage_class="manual"))
    world.apply(workspace("phi", world.namespace))
    pod = world.pod("phi")
    unscheduled = {"type": "PodScheduled", "status": "False", "message": "claim not found"}
    world.patch_status(POD, pod, {"phase": "Pending", "conditions": [unscheduled]})
    old = world.api.find(CLAIM, world.namespace)[0]
    world.api.delete(CLAIM, old)

    def gone() -> bool:
        for claim in world.api.find(CLAIM, world.namespace):
            with contextlib.suppress(ApiError):  # the controller that guards claims wrote it, too
                world.api.set_finalizers(CLAIM, claim, [])
        return not world.api.find(CLAIM, world.namespace)

    wait(gone)
    world.step("phi")
    again = world.api.find(CLAIM, world.namespace)
    assert [old["metadata"]["name"]] == [claim["metadata"]["name"] for claim in again]


def test_the_next_job_waits_for_the_last_pod_of_the_old_one(world: World) -> None:
    """A pod that takes its time to stop: Replacing, and no second writer before it is gone."""
    world.apply(workspace("phi", world.namespace))
    pod = world.pod("phi")
    world.run(pod)
    world.state("phi", "Running")
    world.api.set_finalizers(POD, world.api.find(POD, world.namespace)[0], ["example.com/slow"])
    edited = workspace("phi", world.namespace)
    edited["tuning"]["output"]["image"] = "registry.example.com/team/a:2"
    world.apply(edited)
    old = {job["metadata"]["uid"] for job in world.jobs()}
    for _ in range(10):
        world.step("phi")
        assert old == {job["metadata"]["uid"] for job in world.jobs()}
        time.sleep(0.05)
    assert ("False", "Replacing") == world.condition("phi", "ResourceReady")
    world.api.set_finalizers(POD, world.api.find(POD, world.namespace)[0], [])
    world.until("phi", lambda: old.isdisjoint({job["metadata"]["uid"] for job in world.jobs()}))
    world.until("phi", world.jobs)


def test_a_network_policy_is_put_back(world: World) -> None:
    """Taken away or opened, it is as it was within a minute; one write each."""
    world.apply(workspace("phi", world.namespace))
    world.run(world.pod("phi"))
    world.state("phi", "Running")
    policy = world.api.find(NETWORK_POLICY, world.namespace)[0]
    world.api.delete(NETWORK_POLICY, policy)
    wait(lambda: not world.api.find(NETWORK_POLICY, world.namespace))
    world.step("phi")
    again = world.api.find(NETWORK_POLICY, world.namespace)
    assert [policy["spec"]] == [each["spec"] for each in again]
    opened = again[0] | {"spec": again[0]["spec"] | {"egress": [{}]}}
    world.api.replace(NETWORK_POLICY, opened)
    world.step("phi")
    found = world.api.find(NETWORK_POLICY, world.namespace)[0]
    assert policy["spec"] == found["spec"]
    world.step("phi", times=3)
    quiet = world.api.find(NETWORK_POLICY, world.namespace)[0]
    assert found["metadata"]["resourceVersion"] == quiet["metadata"]["resourceVersion"]


def test_a_claim_of_our_name_that_is_anothers_is_not_used(world: World) -> None:
    """NameConflict: no run writes into a volume that somebody laid in its way."""
    world.options = Options(storage=Storage(storage_class="manual"))
    item = world.apply(workspace("phi", world.namespace))
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    meta = {"name": names.claim_name(item), "namespace": world.namespace}
    theirs = {"apiVersion": "v1", "kind": CLAIM.name, "metadata": meta, "spec": spec}
    world.api.create(CLAIM, theirs)
    world.step("phi", times=3)
    assert ("False", "NameConflict") == world.condition("phi", "ResourceReady")
    assert [] == world.jobs()


def test_a_pod_that_no_quota_allows_says_so(world: World) -> None:
    """The Job is there and has no pod: the event of the Job controller tells why."""
    world.api.create(
        QUOTA,
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "none", "namespace": world.namespace},
            "spec": {"hard": {"pods": "0"}},
        },
    )
    wait(
        lambda: (world.api.get(QUOTA, world.namespace, "none") or {}).get("status", {}).get("hard")
    )
    world.apply(workspace("phi", world.namespace))
    world.step("phi")
    wait(lambda: world.api.find(CORE_EVENT, world.namespace, fields="reason=FailedCreate"))
    world.late = 10
    world.step("phi")
    assert ("False", "PodRefused") == world.condition("phi", "JobStarted")
    message = next(
        c["message"] for c in world.status("phi")["conditions"] if c["type"] == "JobStarted"
    )
    assert "exceeded quota" in message
    served = workspace("talk", world.namespace)
    del served["tuning"]
    served["inference"] = {"preset": {"name": "phi-3-mini-4k-instruct"}}
    world.apply(served)
    world.until("talk", lambda: world.condition("talk", "InferenceReady")[1] == "PodRefused")
    assert "exceeded quota" in world.status("talk")["failure"]["message"]


# machines


def test_a_namespace_has_no_more_machines_than_it_may(api: Cluster) -> None:
    """The second waits and says why; it is served when the first is done."""
    world = fresh(api, nodes=Nodes(provision=True, per_namespace=1))
    for name in ("a", "b"):
        world.apply(workspace(name, world.namespace))
        world.step(name, times=2)

    def mine() -> list[Object]:
        return api.find(NODE_CLAIM, labels=f"{names.NAMESPACE_LABEL}={world.namespace}")

    assert ["a"] == [m["metadata"]["labels"][names.WORKSPACE_LABEL] for m in mine()]
    assert ("False", "MachineLimit") == world.condition("b", "ResourceReady")
    world.node_is_ready()
    world.end(world.pod("a"), 0, SUCCESS)
    world.state("a", "Succeeded")
    world.until("a", lambda: not mine(), "the machine's end")
    world.until("b", mine, "a machine for b")


def test_a_machine_is_given_back_where_none_is_bought_any_more(api: Cluster) -> None:
    """The option was turned off meanwhile: the finalizer still sees to the machine's end."""
    world = fresh(api, nodes=Nodes(provision=True))
    world.apply(workspace("phi", world.namespace))
    world.step("phi", times=2)
    mine = f"{names.UID_LABEL}={world.get('phi')['metadata']['uid']}"
    assert api.find(NODE_CLAIM, labels=mine)
    world.options = Options()
    api.delete(WORKSPACE, world.get("phi"))
    gone(world, "phi")
    assert [] == api.find(NODE_CLAIM, labels=mine)


def gone(world: World, name: str) -> None:
    """Let the operator look until the Workspace is no more."""
    end = time.monotonic() + 60
    while world.api.get(WORKSPACE, world.namespace, name):
        assert time.monotonic() < end, world.status(name)
        world.step(name)
        time.sleep(0.1)


class Webhook(Cluster):
    """One in front of machines says no, or is down, so many times."""

    def __init__(self, inner: Cluster, error: ApiError, times: int) -> None:
        super().__init__(inner._api)
        self.error, self.times = error, times

    def create(self, kind: Kind, item: Object) -> Object | None:
        if kind == NODE_CLAIM and self.times:
            self.times -= 1
            raise self.error
        return super().create(kind, item)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ApiError(500, "InternalError", "failed calling webhook"), ""),
        (ApiError(403, "Forbidden", "denied by the policy of the cloud"), "Forbidden"),
    ],
)
def test_a_machine_that_was_never_asked_for_costs_no_attempt(
    api: Cluster, error: ApiError, reason: str
) -> None:
    """Not the third time either; the server's own words are told, and then it is bought."""
    world = fresh(api, nodes=Nodes(provision=True, attempts=3))
    world.apply(workspace("phi", world.namespace))
    down = Webhook(api, error, 5)
    for _ in range(5):
        with contextlib.suppress(ApiError):
            reconcile(world.context(down), world.namespace, "phi")
    assert "Failed" != world.status("phi")["state"]
    if reason:
        assert ("False", "NodeClaimNotReady") == world.condition("phi", "NodeClaimReady")
        assert "denied by the policy" in str(world.status("phi")["conditions"])
    world.step("phi", cluster=down)
    mine = f"{names.UID_LABEL}={world.get('phi')['metadata']['uid']}"
    (node_claim,) = api.find(NODE_CLAIM, labels=mine)
    assert node_claim["metadata"]["name"].endswith("-1")


def test_what_kaito_began_is_ended_by_us(api: Cluster) -> None:
    """Its machine goes with the Workspace, its running Job before ours begins."""
    world = fresh(api, nodes=Nodes(provision=True))
    item = workspace("phi", world.namespace)
    item["metadata"]["finalizers"] = [names.FINALIZER]
    world.apply(item)
    stored = world.get("phi")
    api.replace_status(WORKSPACE, stored, {"conditions": []} | {"workerNodes": ["aks-1"]})
    kaitos = {
        "apiVersion": "karpenter.sh/v1",
        "kind": "NodeClaim",
        "metadata": {
            "name": f"ws{secrets.token_hex(4)}",
            "labels": {
                names.WORKSPACE_LABEL: "phi",
                names.NAMESPACE_LABEL: world.namespace,
            },
        },
    }
    api.create(NODE_CLAIM, kaitos)
    job = copy.deepcopy(JOB_OF_KAITO)
    job["metadata"] |= {
        "namespace": world.namespace,
        "ownerReferences": names.owner_references(stored),
    }
    api.create(JOB, job)
    for _ in range(600):
        world.step("phi")
        running = [each["metadata"]["name"] for each in world.jobs()]
        assert len(running) == 1 or running == []
        if running and running != ["phi"]:
            break
        world.node_is_ready()
        time.sleep(0.1)
    assert running and running[0].startswith("phi-")
    api.delete(WORKSPACE, world.get("phi"))
    gone(world, "phi")
    assert api.get(NODE_CLAIM, None, kaitos["metadata"]["name"]) is None


JOB_OF_KAITO: Object = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "phi"},
    "spec": {
        "template": {
            "spec": {
                "containers": [{"name": "tuning", "image": "x"}],
                "restartPolicy": "Never",
            }
        }
    },
}


class WithoutKarpenter(Cluster):
    """Its kinds were removed from the cluster."""

    def _open(self, method: str, path: str, **more: Any) -> Any:
        if "/karpenter.sh/" in path:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        return super()._open(method, path, **more)


def test_karpenter_may_be_removed(api: Cluster) -> None:
    """NotFound is done: no Workspace is stuck behind a machine of a kind that is no more."""
    world = fresh(api, nodes=Nodes(provision=True))
    world.apply(workspace("phi", world.namespace))
    world.step("phi", times=2)
    without = WithoutKarpenter(api._api)
    other = workspace("other", world.namespace)
    world.apply(other)
    world.step("other", cluster=without, times=2)
    assert ("False", "NotFound") == world.condition("other", "ResourceReady")
    for name in ("phi", "other"):
        api.delete(WORKSPACE, world.get(name))
        end = time.monotonic() + 60
        while api.get(WORKSPACE, world.namespace, name):
            assert time.monotonic() < end
            world.step(name, cluster=without)
            time.sleep(0.1)


# the end


PHASES = ["new", "invalid", "buying", "pending", "running", "succeeded", "failed"]


@pytest.mark.parametrize("phase", PHASES)
def test_deletion_in_each_phase_leaves_nothing(api: Cluster, phase: str) -> None:
    """Job, pods, machine, claim and the object itself: gone, and nothing comes back."""
    provision = phase in ("buying", "running", "succeeded")
    world = fresh(
        api,
        nodes=Nodes(provision=provision),
        storage=Storage(storage_class="manual"),
        backoff_limit=0,
    )
    item = workspace("phi", world.namespace)
    if phase == "invalid":
        del item["tuning"]["output"]["imagePushSecret"]
    world.apply(item)
    if phase != "new":
        world.step("phi", times=2)
    if phase in ("running", "succeeded", "failed"):
        world.node_is_ready()
        pod = world.pod("phi")
        world.run(pod)
        world.state("phi", "Running")
        if phase != "running":
            world.end(pod, 0 if phase == "succeeded" else 10, SUCCESS)
            world.state("phi", phase.capitalize())
    uid = world.get("phi")["metadata"]["uid"]
    api.delete(WORKSPACE, world.get("phi"))
    gone(world, "phi")
    wait(lambda: not (world.jobs() or world.pods()), 90)
    wait(lambda: not api.find(NETWORK_POLICY, world.namespace), 90)
    assert [] == api.find(NODE_CLAIM, labels=f"{names.UID_LABEL}={uid}")
    claims = api.find(CLAIM, world.namespace)
    assert all(claim["metadata"].get("deletionTimestamp") for claim in claims)


def test_a_deletion_that_waits_says_for_what(api: Cluster) -> None:
    """A machine that the cloud does not take back is named, by condition and event."""
    world = fresh(api, nodes=Nodes(provision=True))
    world.apply(workspace("phi", world.namespace))
    world.step("phi", times=2)
    mine = f"{names.UID_LABEL}={world.get('phi')['metadata']['uid']}"
    node_claim = api.find(NODE_CLAIM, labels=mine)[0]
    api.set_finalizers(NODE_CLAIM, node_claim, ["karpenter.sh/termination"])
    api.delete(WORKSPACE, world.get("phi"))
    world.step("phi", times=3)
    assert ("True", "workspaceDeleted") == world.condition("phi", "WorkspaceDeleting")
    shown = next(c for c in world.status("phi")["conditions"] if c["type"] == "WorkspaceDeleting")
    assert node_claim["metadata"]["name"] in shown["message"]
    stuck = api.find(NODE_CLAIM, labels=mine)[0]
    api.set_finalizers(NODE_CLAIM, stuck, [])
    gone(world, "phi")


def test_a_namespace_that_ends_takes_everything_along(api: Cluster) -> None:
    """Deleted in the middle of a run on a bought machine: no finalizer keeps it."""
    world = fresh(api, nodes=Nodes(provision=True), storage=Storage(storage_class="manual"))
    world.options = world.options.model_copy(update={"namespaces": (world.namespace,)})
    with operating(api, world.options, resync=5):
        world.apply(workspace("phi", world.namespace))
        mine = f"{names.UID_LABEL}={world.get('phi')['metadata']['uid']}"
        wait(lambda: api.find(NODE_CLAIM, labels=mine))
        world.node_is_ready()
        pod = wait(world.pods)[0]
        world.run(pod)
        wait(lambda: world.status("phi").get("state") == "Running")
        api._call("DELETE", NAMESPACE.path(None, world.namespace))
        wait(lambda: api.get(WORKSPACE, world.namespace, "phi") is None, 120)
        wait(lambda: not api.find(NODE_CLAIM, labels=mine))
    wait(lambda: not [kind for kind in (JOB, CLAIM, NETWORK_POLICY) if kept(world, kind)], 120)


def kept(world: World, kind: Kind) -> list[Any]:
    """What nobody has begun to delete; the namespace controller takes its time."""
    found = world.api.find(kind, world.namespace)
    return [item for item in found if not item["metadata"].get("deletionTimestamp")]


# many


class Poisoned(Cluster):
    """One Workspace that the operator cannot read without falling over."""

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        if kind == CRD or name != "poison" or kind != WORKSPACE:
            return super().get(kind, namespace, name)
        raise KeyError("a bug of ours")


def test_one_that_raises_holds_nobody_up(api: Cluster) -> None:
    """It has its own back-off; thirty others come to their Jobs."""
    world = fresh(api)
    options = Options(namespaces=(world.namespace,))
    world.apply(workspace("poison", world.namespace))
    with operating(Poisoned(api._api), options) as operator:
        for i in range(30):
            world.apply(workspace(f"w{i}", world.namespace))
        wait(lambda: len({j["metadata"]["labels"][names.WORKSPACE_LABEL] for j in world.jobs()} - {
            "poison"}) == 30)  # fmt: skip
        failed = operator.metrics.reconciles.labels("error")
        assert 1 <= failed._value.get() < 20


def test_who_floods_does_not_hold_up_the_others(api: Cluster) -> None:
    """One namespace brings 200 at once; another's one, brought last, is served among the first."""
    flood, other = fresh(api), fresh(api)
    options = Options(namespaces=(flood.namespace, other.namespace))
    with operating(api, options, workers=1):
        for i in range(200):
            flood.apply(workspace(f"w{i}", flood.namespace))
        other.apply(workspace("one", other.namespace))
        wait(other.jobs)
        alone = {j["metadata"]["labels"][names.WORKSPACE_LABEL] for j in other.jobs()}
        assert {"one"} == alone
        wait(lambda: len(flood.jobs()) == 200, 120)


# KAITO, and a CRD that is not there


def foreign_crd() -> Object:
    """KAITO's, as far as it matters: the same name, a status that knows less."""
    found = copy.deepcopy(NODE_CLAIM_CRD)
    found["metadata"]["name"] = preflight.NAME
    schema = {"type": "object", "properties": {"status": {"type": "object", "properties": {}}}}
    version = found["spec"]["versions"][0] | {"name": "v1beta1"}
    version["schema"] = {"openAPIV3Schema": schema}
    found["spec"]["versions"] = [version]
    return found


class Elsewhere(Cluster):
    """A cluster with another CRD than ours, or none."""

    definition: Object | None = None

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        return self.definition if kind == CRD else super().get(kind, namespace, name)

    def find(self, kind: Kind, *arguments: Any, **more: Any) -> list[Object]:
        if kind == WORKSPACE and self.definition is None:
            raise ApiError(404, "NotFound", "no such resource")
        return super().find(kind, *arguments, **more)


def test_our_crd_and_nobody_else_is_a_fine_place(api: Cluster) -> None:
    """Nothing to say."""
    preflight.check(api, Options(), threading.Event())


def test_a_missing_crd_is_waited_for_and_then_named(api: Cluster) -> None:
    """With the command that installs it."""
    with pytest.raises(SpecError, match=r"JOB-110.*kubectl apply -k configs/deploy/crd"):
        preflight.check(Elsewhere(api._api), Options(), threading.Event(), patience=0)


def test_kaitos_crd_is_refused(api: Cluster) -> None:
    """Its status would forget what ran: refused before the start, whatever the options say."""
    elsewhere = Elsewhere(api._api)
    elsewhere.definition = foreign_crd()
    for word in ("refuse", "opt-in"):
        with pytest.raises(SpecError, match="JOB-111"):
            preflight.check(elsewhere, Options(beside_kaito=word), threading.Event())


class Forgetful(Cluster):
    """Its server cuts off the fields of a status that KAITO's CRD does not know."""

    def replace_status(self, kind: Kind, item: Object, status: Object) -> Object | None:
        known = ("conditions", "state", "workerNodes", "observedGeneration")
        cut = {key: value for key, value in status.items() if key in known}
        return super().replace_status(kind, item, cut)


def test_a_status_that_is_cut_off_makes_no_job(world: World) -> None:
    """Where the rights do not go as far as reading the CRD, the first write tells."""
    world.apply(workspace("phi", world.namespace))
    with pytest.raises(SpecError, match="JOB-111"):
        world.step("phi", cluster=Forgetful(world.api._api))
    assert [] == world.jobs()


@pytest.fixture
def kaito(api: Cluster) -> Iterator[None]:
    """KAITO's webhook, as its chart installs it, for nobody's namespace."""
    hook = {
        "name": preflight.KAITO_WEBHOOK,
        "clientConfig": {"url": "https://127.0.0.1:1/validate"},
        "failurePolicy": "Ignore",
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        "namespaceSelector": {"matchLabels": {"nobody": "here"}},
    }
    item = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": WEBHOOK.name,
        "metadata": {"name": "validation.workspace.kaito.sh"},
        "webhooks": [hook],
    }
    api.create(WEBHOOK, item)
    try:
        yield
    finally:
        api._call("DELETE", WEBHOOK.path(None, "validation.workspace.kaito.sh"))


@pytest.mark.usefixtures("kaito")
def test_beside_kaito_only_what_opts_in_is_looked_after(world: World) -> None:
    """Refused by default; with the option, by annotation."""
    with pytest.raises(SpecError, match="JOB-112"):
        preflight.check(world.api, Options(), threading.Event())
    world.options = Options(beside_kaito="opt-in")
    preflight.check(world.api, world.options, threading.Event())
    ours = workspace("ours", world.namespace)
    ours["metadata"]["annotations"] = {"tuning.kaito.sh/opt-in": "true"}
    for item in (ours, workspace("theirs", world.namespace)):
        world.apply(item)
        world.step(item["metadata"]["name"], times=2)
    labels = [job["metadata"]["labels"][names.WORKSPACE_LABEL] for job in world.jobs()]
    assert ["ours"] == labels
    assert {} == world.status("theirs")


# a newer operator


def test_an_upgrade_in_mid_run_restarts_nothing(world: World) -> None:
    """Another image, other limits, another version label: what runs goes on, what is over stays."""
    world.apply(config_map("mine", world.namespace, "training_config: {}\n"))
    for name in ("running", "over"):
        world.apply(workspace(name, world.namespace, config="mine"))
        world.run(world.pod(name))
        world.state(name, "Running")
    world.end(world.pod("over"), 0, SUCCESS)
    world.state("over", "Succeeded")
    world.step("over", times=2)
    before = {job["metadata"]["uid"] for job in world.jobs()}
    over = world.status("over")
    world.options = Options(image="tuning:2", backoff_limit=9, grace_seconds=20, egress_ports=(1,))
    for name in ("running", "over"):
        world.step(name, times=4)
    assert before == {job["metadata"]["uid"] for job in world.jobs()}
    assert "Running" == world.status("running")["state"]
    assert over == world.status("over")
