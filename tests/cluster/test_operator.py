"""The whole operator on a real API server: election, rights, outages, two at once, mutations."""

from __future__ import annotations

import base64
import copy
import random
import re
import secrets
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml
from cluster import bed
from cluster.world import (
    ACCOUNT,
    DIGEST,
    NAMESPACE,
    SECRET,
    SUCCESS,
    World,
    config_map,
    fresh,
    operating,
    wait,
    workspace,
)

from jobs.api import client
from jobs.api.client import ApiError, Cluster, NotLeader
from jobs.api.kinds import DEPLOYMENT, JOB, LEASE, NETWORK_POLICY, NODE_CLAIM, POD, WORKSPACE, Kind
from jobs.api.options import Nodes, Options, Storage
from jobs.controller import preflight, probes
from jobs.controller.lease import Lease
from jobs.controller.watch import Watch
from jobs.desired import names

ROOT = Path(__file__).parents[2]
RIGHTS = {
    "Namespace": NAMESPACE,
    "ServiceAccount": ACCOUNT,
    "Role": Kind("rbac.authorization.k8s.io", "v1", "roles", "Role"),
    "RoleBinding": Kind("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding"),
    "ClusterRole": Kind("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", False),
    "ClusterRoleBinding": Kind(
        "rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", False
    ),
}


def play(world: World, name: str) -> None:
    """Let the pod of a Workspace run and succeed, as the kubelet would."""

    def pods() -> list[Any]:
        label = f"{names.WORKSPACE_LABEL}={name}"
        return [p for p in world.api.find(POD, world.namespace, labels=label)
                if p["status"].get("phase") == "Pending"]  # fmt: skip

    pod = wait(pods)[0]
    world.run(pod)
    wait(lambda: world.status(name).get("state") == "Running")
    world.end(pod, 0, SUCCESS)


# rights


def account_of(server: bed.Bed, api: Cluster, folder: str, namespace: str) -> Cluster:
    """The operator's ServiceAccount with the rights of one folder of configs/deploy, no others."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(ROOT / "configs/deploy" / folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    for item in yaml.safe_load_all(done.stdout.replace("tuning-system", namespace)):
        if item["kind"] in RIGHTS:
            api.create(RIGHTS[item["kind"]], item)
    own = wait(lambda: (api.get(ACCOUNT, namespace, "tuning-operator") or {}).get("secrets"))
    secret = api.get(SECRET, namespace, own[0]["name"])
    assert secret is not None
    token = base64.b64decode(secret["data"]["token"]).decode()
    config = yaml.safe_load(server.kubeconfig.read_text())
    config["users"] = [{"name": "me", "user": {"token": token}}]
    file = server.folder / "cfg" / f"{namespace}.kubeconfig"
    file.write_text(yaml.safe_dump(config))
    return client.connect(str(file), threads=8)


@pytest.fixture(scope="module")
def account(server: bed.Bed, api: Cluster) -> Iterator[Cluster]:
    """The rights that buy machines, too."""
    with account_of(server, api, "provisioning", "tuning-system") as found:
        yield found


class Recording(Cluster):
    """Remembers each call as (verb, group, resource)."""

    calls: set[tuple[str, str, str]]

    @classmethod
    def of(cls, inner: Cluster) -> Recording:
        found = cls(inner._api)
        found.calls = set()
        return found

    def guarded(self, may_write: Any) -> Recording:
        found = type(self)(self._api, may_write=may_write)
        found.calls = self.calls
        return found

    def _open(self, method: str, path: str, **more: Any) -> Any:
        found = re.match(
            r"/(?:api|apis/([^/]+))/v\w+(?:/namespaces/[^/]+)?/(\w+)(/[^/]+)?(/\w+)?$", path
        )
        assert found, path
        group, plural, name, sub = found.groups()
        query = more.get("query") or {}
        verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(method)
        verb = verb or ("get" if name else "watch" if query.get("watch") else "list")
        self.calls.add((verb, group or "", plural + (sub or "")))
        return super()._open(method, path, **more)


def test_the_shipped_rights_are_enough_and_none_is_idle(api: Cluster, account: Cluster) -> None:
    """Machines bought for a success and a server, deletions: every right used, none missing."""
    recording = Recording.of(account)
    options = Options(nodes=Nodes(provision=True), keep_seconds=0)
    options = options.model_copy(
        update={"storage": options.storage.model_copy(update={"storage_class": "manual"})}
    )
    world = fresh(api)
    preflight.check(recording, options, threading.Event())
    with operating(recording, options, elect=True) as operator:
        world.apply(config_map("mine", world.namespace, "training_config: {}\n"))
        world.apply(workspace("phi", world.namespace, config="mine"))
        mine = f"{names.UID_LABEL}={world.get('phi')['metadata']['uid']}"
        wait(lambda: api.find(NODE_CLAIM, labels=mine))
        world.node_is_ready()
        pod = wait(lambda: api.find(POD, world.namespace))[0]
        world.patch_status(POD, pod, {"conditions": [{"type": "PodScheduled", "status": "True"}]})
        wait(lambda: ("list", "", "events") in recording.calls)
        policy = api.find(NETWORK_POLICY, world.namespace)[0]
        api.replace(NETWORK_POLICY, policy | {"spec": policy["spec"] | {"egress": []}})
        operator._context.rate_limit._until.clear()  # its minute is over
        play(world, "phi")
        wait(lambda: world.status("phi").get("state") == "Succeeded")
        wait(lambda: not api.find(NODE_CLAIM, labels=mine))
        wait(lambda: not api.find(JOB, world.namespace))
        own = workspace("own", world.namespace)
        del own["resource"]["instanceType"]
        world.apply(own)
        wait(lambda: ("list", "", "nodes") in recording.calls)
        talk = workspace("talk", world.namespace)
        del talk["tuning"]
        talk["inference"] = {"preset": {"name": "phi-3-mini-4k-instruct"}}
        world.apply(talk)
        served = f"{names.UID_LABEL}={world.get('talk')['metadata']['uid']}"
        wait(lambda: api.find(NODE_CLAIM, labels=served))
        world.node_is_ready()
        wait(lambda: api.find(DEPLOYMENT, world.namespace))
        image = "registry.example.com/team/a:1"
        talk["inference"]["adapters"] = [{"source": {"name": "extra", "image": image}}]
        world.apply(talk)
        wait(lambda: image in str(api.find(DEPLOYMENT, world.namespace)))
        api.delete(WORKSPACE, world.get("talk"))
        wait(lambda: api.get(WORKSPACE, world.namespace, "talk") is None)
        assert not api.find(DEPLOYMENT, world.namespace)
        wait(lambda: not api.find(NODE_CLAIM, labels=served))
        with_default = options.model_copy(update={"storage": Options().storage})
    with operating(recording, with_default, elect=True):
        wait(lambda: ("list", "storage.k8s.io", "storageclasses") in recording.calls)
        api.delete(WORKSPACE, world.get("phi"))
        wait(lambda: api.get(WORKSPACE, world.namespace, "phi") is None)
    done = subprocess.run(
        ["kubectl", "kustomize", str(ROOT / "configs/deploy/provisioning")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    granted = {
        (verb, group, resource)
        for role in yaml.safe_load_all(done.stdout)
        if role["kind"] in ("Role", "ClusterRole")
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    admission_only = {("update", "kaito.sh", "workspaces/finalizers")}
    assert granted - admission_only == recording.calls
    with pytest.raises(ApiError) as refused:
        account.find(SECRET, world.namespace)
    assert 403 == refused.value.status


@pytest.mark.usefixtures("account")  # whose binding has the name of the one that is made here
def test_the_rights_without_machines_end_what_holds_one(server: bed.Bed, api: Cluster) -> None:
    """KAITO's finalizer, or ours from a time when machines were bought: seen to with the rights of
    the installation that buys none."""
    space = f"tuning-{secrets.token_hex(3)}"
    api.create(NAMESPACE, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": space}})
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": space},
        "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": "ClusterRole",
            "name": "tuning-operator",
        },
        "subjects": [{"kind": "ServiceAccount", "name": "tuning-operator", "namespace": space}],
    }
    api.create(RIGHTS["ClusterRoleBinding"], binding)
    world = fresh(api)
    item = workspace("phi", world.namespace)
    item["metadata"]["finalizers"] = [names.FINALIZER]
    world.apply(item)
    with account_of(server, api, ".", space) as account:
        world.step("phi", cluster=account, times=2)
        assert 1 == len(world.jobs())
        api.delete(WORKSPACE, world.get("phi"))

        def ended() -> bool:
            world.step("phi", cluster=account)
            return api.get(WORKSPACE, world.namespace, "phi") is None

        wait(ended)


def test_the_rights_in_one_namespace_are_enough_for_it(server: bed.Bed, api: Cluster) -> None:
    """From a Workspace to its end with nothing cluster-scoped; of other namespaces: nothing."""
    space = "tuning-here"
    api.create(NAMESPACE, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": space}})
    options = Options(namespaces=(space,), operator_namespace=space, keep_seconds=0)
    options = options.model_copy(update={"storage": Storage(run_volume="claim")})
    world = World(api, space, options)
    with account_of(server, api, "namespaced", space) as account:
        preflight.check(account, options, threading.Event())
        with operating(account, options, elect=True, namespace=space) as operator:
            world.apply(config_map("mine", space, "training_config: {}\n"))
            world.apply(workspace("phi", space, config="mine"))
            own = workspace("own", space)
            del own["resource"]["instanceType"]
            world.apply(own)
            play(world, "phi")
            wait(lambda: world.status("phi").get("state") == "Succeeded")
            wait(lambda: world.status("own").get("state") == "Pending")
            assert "PlanUnknown" in world.status("own")["plan"]["summary"]
            assert 0 == operator.metrics.reconciles.labels("error")._value.get()
        with pytest.raises(ApiError) as refused:
            account.find(WORKSPACE)
        assert 403 == refused.value.status


# election


def lease_of(api: Cluster, who: str, duration: float = 2.0) -> Lease:
    return Lease(api, namespace="default", name="t", identity=who, duration=duration)


def test_one_holds_the_lease_and_gives_it_back(api: Cluster) -> None:
    """The second waits while the first renews, and goes on at once when it is given back."""
    first, second = lease_of(api, "first", 30), lease_of(api, "second", 30)
    assert first.attempt() and first.held
    assert not second.attempt() and not second.held
    first.release()
    assert not first.held
    assert second.attempt()
    second.release()


def test_a_frozen_leader_writes_nothing_when_it_wakes(api: Cluster) -> None:
    """By its own clock the lease has run out: writes are refused before they leave."""
    now = [0.0]
    lease = Lease(
        api, namespace="default", name="frozen", identity="a", duration=15, clock=lambda: now[0]
    )
    assert lease.attempt()
    guarded = api.guarded(lambda: lease.held)
    now[0] = 20
    with pytest.raises(NotLeader):
        guarded.create(LEASE, {"metadata": {"name": "x", "namespace": "default"}})
    other = lease_of(api, "b", 1.0)
    other._name = "frozen"
    wait(other.attempt, 30)
    assert not lease.attempt()
    other.release()


def test_two_replicas_take_turns(api: Cluster) -> None:
    """The second does the work after the first ended; each in its turn."""
    world = fresh(api)
    options = Options(namespaces=(world.namespace,), operator_namespace=world.namespace)
    with operating(api, options, elect=True, namespace=world.namespace, lease_seconds=3):
        world.apply(workspace("a", world.namespace))
        wait(lambda: len(world.jobs()) == 1)
    with operating(api, options, elect=True, namespace=world.namespace, lease_seconds=3):
        world.apply(workspace("b", world.namespace))
        wait(lambda: len(world.jobs()) == 2)


def test_two_operators_without_election_make_one_job_each(api: Cluster) -> None:
    """Names decide, not luck: 20 Workspaces, two writers, 20 Jobs, 20 right ends."""
    world = fresh(api)
    options = Options(namespaces=(world.namespace,))
    with operating(api, options), operating(api, options):
        for i in range(20):
            world.apply(workspace(f"w{i}", world.namespace))
        wait(lambda: len(world.pods()) == 20)
        assert 20 == len(world.jobs())
        for pod in world.pods():
            world.end(pod, 0, SUCCESS)
        states = lambda: {w.get("status", {}).get("state")  # noqa: E731
                          for w in api.find(WORKSPACE, world.namespace)}  # fmt: skip
        wait(lambda: states() == {"Succeeded"})
    assert 20 == len(world.jobs())


# the API server's moods


class Faulty(Cluster):
    """Fails calls by a seeded chance, before or after the server handled them; drops events."""

    chance = random.Random(0)
    share = 0.0
    down = False

    def _open(self, method: str, path: str, **more: Any) -> Any:
        if self.down:
            raise ApiError(0, "Unreachable", "down")
        roll = self.chance.random()
        if roll < self.share / 3:
            raise ApiError(503, "ServiceUnavailable", "before")
        if method != "GET" and roll < self.share * 2 / 3:
            raise ApiError(409, "Conflict", "before")
        answer = super()._open(method, path, **more)
        if roll > 1 - self.share / 3:
            answer.close()
            raise ApiError(0, "Unreachable", "reply lost")
        return answer

    def watch(self, kind: Kind, namespace: str | None, **more: Any) -> Iterator[Any]:
        for number, item in enumerate(super().watch(kind, namespace, **more)):
            if self.down:
                raise ApiError(0, "Unreachable", "down")
            if self.chance.random() < self.share:
                continue  # dropped
            if self.chance.random() < self.share:
                yield item  # twice
            if number == 20:
                raise ApiError(410, "Gone", "too old")
            yield item


def test_a_moody_api_server_leads_to_the_same_end(api: Cluster) -> None:
    """A fifth of all calls fail, replies are lost, events dropped, doubled or cut off by 410."""
    world = fresh(api)
    faulty = Faulty(api._api)
    faulty.share = 0.2
    with operating(faulty, Options(namespaces=(world.namespace,)), resync=2):
        for i in range(10):
            world.apply(workspace(f"w{i}", world.namespace))
        wait(lambda: len(world.pods()) == 10)
        for pod in world.pods():
            world.end(pod, 0, SUCCESS)
        for i in range(10):
            wait(lambda i=i: world.status(f"w{i}").get("state") == "Succeeded", 90)
    assert 10 == len(world.jobs())
    assert all([DIGEST] == world.status(f"w{i}")["outputs"] for i in range(10))


def test_an_outage_touches_no_running_job(api: Cluster) -> None:
    """While the API is down nothing is done; after it, the state is fresh."""
    world = fresh(api)
    faulty = Faulty(api._api)
    with operating(faulty, Options(namespaces=(world.namespace,)), resync=1) as operator:
        world.apply(workspace("phi", world.namespace))
        pod = wait(world.pods)[0]
        world.run(pod)
        wait(lambda: world.status("phi").get("state") == "Running")
        faulty.down = True
        operator._cluster.down = True  # type: ignore[attr-defined]
        before = world.jobs()[0]["metadata"]["uid"]
        world.end(pod, 0, SUCCESS)
        time.sleep(3)  # the outage itself; nothing waits for it
        assert "Running" == world.status("phi")["state"]
        assert not operator.ready
        faulty.down = operator._cluster.down = False  # type: ignore[attr-defined]
        wait(lambda: world.status("phi").get("state") == "Succeeded", 30)
        assert operator.ready and operator.healthy
    assert [before] == [job["metadata"]["uid"] for job in world.jobs()]


def test_a_stale_version_is_answered_by_a_list(api: Cluster) -> None:
    """410, at connect or in mid-stream, is no error: list again at once."""
    world = fresh(api)
    world.apply(workspace("phi", world.namespace))
    lists = []

    class Stale(Cluster):
        def pages(self, *args: Any, **more: Any) -> Any:
            lists.append(time.monotonic())
            return super().pages(*args, **more)

        def watch(self, *args: Any, **more: Any) -> Iterator[Any]:
            raise ApiError(410, "Gone", "too old resource version")
            yield

    stop, told = threading.Event(), []

    def report(key: Any, item: Any) -> None:
        told.append(key)
        if len(told) == 5:
            stop.set()

    Watch(
        Stale(api._api),
        WORKSPACE,
        world.namespace,
        labels="",
        key_of=lambda item: (item["metadata"]["namespace"], item["metadata"]["name"]),
        on_event=report,
    ).run(stop)
    assert 5 == len(lists) and lists[-1] - lists[0] < 1
    assert {(world.namespace, "phi")} == set(told)


def test_probes_and_metrics_answer(api: Cluster) -> None:
    """/healthz, /readyz and /metrics of a working operator."""
    world = fresh(api)
    with operating(api, Options(namespaces=(world.namespace,))) as operator:
        world.apply(workspace("phi", world.namespace))
        wait(world.jobs)
        with probes.serving(
            0,
            healthy=lambda: operator.healthy,
            ready=lambda: operator.ready,
            metrics=operator.metrics,
        ) as port:
            pool = urllib3.PoolManager(retries=False)
            for path in ("/healthz", "/readyz"):
                assert 200 == pool.request("GET", f"http://127.0.0.1:{port}{path}").status
            text = pool.request("GET", f"http://127.0.0.1:{port}/metrics").data.decode()
            assert 404 == pool.request("GET", f"http://127.0.0.1:{port}/secrets").status
            pool.clear()
    assert 'tuning_operator_reconciles_total{result="done"}' in text
    assert "tuning_operator_leading 1.0" in text
    assert 'tuning_operator_workspaces{state="Pending"} 1.0' in text


# 300 mutations


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything that can be changed."""
    if path:
        yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()  # fmt: skip # noqa: E501
    for key, value in items:
        yield from leaves(value, (*path, key))


ODD: tuple[Any, ...] = (
    None, "", "x" * 70_000, "ü\u202e\u0000x", "../../etc", "$(id)", "http://169.254.169.254/",
    -1, 0, 2**40, 1.5, True, [], {}, ["a"] * 200, {"a": {"b": 1}}, "LORA", "phi-4",
    "https://d.example.com/\nX", "registry.example.com/a:2", {"hostPath": {"path": "/"}},
)  # fmt: skip


def test_300_mutations_and_back(api: Cluster) -> None:
    """Refused with a reason, or reached; after the revert the Workspace stands where it stood."""
    world = fresh(api)
    chance = random.Random(11)
    base = workspace("phi", world.namespace)
    world.apply(base)
    world.step("phi", times=2)
    revision = world.status("phi")["revision"]
    refused = reached = 0
    for _ in range(300):
        item = copy.deepcopy(base)
        paths = [p for p in leaves(item) if p[0] in ("resource", "tuning")]
        *above, last = chance.choice(paths)
        node = item
        for step in above:
            node = node[step]
        node[last] = copy.deepcopy(chance.choice(ODD))
        try:
            world.apply(item)
        except ApiError as error:
            assert error.status in (400, 413, 422), error
            refused += 1
            continue
        reached += 1
        world.step("phi", times=2)
        status = world.status("phi")
        assert status["state"] in ("Pending", "Failed"), status
        if status["state"] == "Failed":
            assert status["failure"]["message"]
        world.apply(base)
        world.until("phi", lambda: world.status("phi").get("revision") == revision
                    and world.status("phi")["state"] == "Pending"
                    and [names.revision_of(job) for job in world.jobs()] == [revision])  # fmt: skip
    assert refused > 50 and reached > 30, (refused, reached)
    assert "SpecValid" == world.condition("phi", "SpecValid")[1]
