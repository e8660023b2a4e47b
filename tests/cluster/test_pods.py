"""Real pods: a Workspace applied with kubectl trains a tiny model in a Job and pushes its adapter.

The Job is what the operator renders. Only what replaces the engine's image is added: the machine's
own Python, read-only, in a busybox, and the host's network for the registry on loopback.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import bed
from cluster.world import NAMESPACE, SECRET, wait

from jobs import cluster, crd, reconcile
from jobs.cluster import CLAIM, CRD, JOB, NODE, POD, WORKSPACE, ApiError, Cluster, Kind, Object
from jobs.operator import Operator, Setup
from jobs.options import Options, Storage

ROOT = Path(__file__).parents[2]
VOLUME = Kind("", "v1", "persistentvolumes", "PersistentVolume", namespaced=False)
USER, PASSWORD = "someone", "p+w/0"
CONFIG = """\
training_config:
  ModelConfig: {torch_dtype: "float32"}
  LoraConfig: {r: 4, lora_alpha: 8}
  TrainingArguments:
    learning_rate: 0.005
    max_steps: 12
    save_steps: 2
    per_device_train_batch_size: 8
    logging_steps: 1
    packing: false
    seed: 42
"""


class HostPython(Cluster):
    """Runs the engine from this machine's environment instead of an image."""

    limit = "4Gi"

    def create(self, kind: Kind, item: Object) -> Object | None:
        if kind == JOB:
            pod = item["spec"]["template"]["spec"]
            pod |= {"hostNetwork": True, "dnsPolicy": "Default"}
            container = pod["containers"][0]
            container["command"] += ["--base-model", str(ROOT / "examples/tiny-model")]
            container["env"] += [
                {"name": "PATH", "value": f"{Path(sys.prefix) / 'bin'}:/bin:/usr/bin"},
                {"name": "PYTHONPATH", "value": str(ROOT)},  # this tree, whatever is installed
                {"name": "OMP_NUM_THREADS", "value": "1"},
                {"name": "PYTHONDONTWRITEBYTECODE", "value": "1"},
            ]
            resources = container["resources"]
            resources["requests"] |= {"cpu": "100m", "memory": "100Mi"}
            resources["limits"]["memory"] = self.limit
            mounts = {"/usr": "/usr", "/lib": "/usr/lib", "/lib64": "/usr/lib64"}
            mounts |= {str(p): str(p) for p in (ROOT, Path(sys.base_prefix), Path(sys.prefix))
                       if not p.is_relative_to("/usr")}  # fmt: skip
            for number, (inside, outside) in enumerate(sorted(mounts.items())):
                name = f"host{number}"
                pod["volumes"].append({"name": name, "hostPath": {"path": outside}})
                container["volumeMounts"].append(
                    {"name": name, "mountPath": inside, "readOnly": True}
                )
        return super().create(kind, item)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bed.Bed]:
    """One full cluster a machine: it needs root, cgroups and fixed ports."""
    if gap := bed.missing("kubelet", "kube-scheduler", "pause"):
        pytest.fail(gap, pytrace=False)
    if os.geteuid() or not all(map(shutil.which, ("containerd", "runc", "kubectl"))):
        pytest.skip("real pods are not tried here: needs root, containerd, runc and kubectl")
    with bed.up(tmp_path_factory.mktemp("full"), "full") as found:
        yield found


@pytest.fixture(scope="module")
def api(full: bed.Bed) -> HostPython:
    found = HostPython(cluster.connect(str(full.kubeconfig), threads=8)._api)
    found.create(CRD, crd.definition())

    def served() -> bool:
        try:
            return found.find(WORKSPACE) == []
        except ApiError:
            return False

    wait(served)
    node = found.find(NODE)[0]
    found._call(
        "PATCH",
        NODE.path(None, node["metadata"]["name"]),
        body={"metadata": {"labels": {"apps": "demo"}}},
        content="application/merge-patch+json",
    )
    gpu = [{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": "4"}]
    found._call(
        "PATCH",
        NODE.path(None, node["metadata"]["name"]) + "/status",
        body=gpu,  # type: ignore[arg-type]
        content="application/json-patch+json",
    )
    return found


@pytest.fixture(scope="module")
def docker_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real registry with a password, on loopback; gives host:port."""
    folder = tmp_path_factory.mktemp("registry")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    login = ["htpasswd", "-Bbn", USER, PASSWORD]
    (folder / "htpasswd").write_text(subprocess.check_output(login, text=True))
    settings = {
        "version": 0.1,
        "http": {"addr": f"127.0.0.1:{port}", "secret": "fixed"},
        "auth": {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "log": {"level": "error"},
    }
    (folder / "config.yml").write_text(yaml.safe_dump(settings))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(folder / "config.yml")], stdout=log, stderr=log
        )
        try:

            def listens() -> bool:
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", port)) == 0

            wait(listens)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


class Place:
    """A namespace with volumes, Secrets and an operator; Workspaces are applied with kubectl."""

    def __init__(self, full: bed.Bed, api: HostPython, folder: Path, registry_: str) -> None:
        self.full, self.api, self.folder, self.registry = full, api, folder, registry_
        self.name = f"p-{os.urandom(4).hex()}"
        self.options = Options(
            image="localhost/busybox:test",
            image_pull_policy="Never",
            namespaces=(self.name,),
            backoff_limit=4,
            storage=Storage(storage_class=self.name),
        )
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.name}}
        api.create(NAMESPACE, namespace)
        self.volume("run", "500Gi", self.name)
        self.volume("data", "1Gi", f"{self.name}-data")
        shutil.copy(ROOT / "examples/data/demo.jsonl", folder / "data" / "demo.jsonl")
        self.claim("data", f"{self.name}-data")
        self.secret("push", PASSWORD)

    def volume(self, name: str, size: str, storage_class: str) -> None:
        folder = self.folder / name
        folder.mkdir(mode=0o777)
        folder.chmod(0o777)
        self.api.create(
            VOLUME,
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"{self.name}-{name}"},
                "spec": {
                    "capacity": {"storage": size},
                    "accessModes": ["ReadWriteOnce"],
                    "storageClassName": storage_class,
                    "hostPath": {"path": str(folder)},
                },
            },
        )

    def claim(self, name: str, storage_class: str) -> None:
        self.api.create(
            CLAIM,
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": name, "namespace": self.name},
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "storageClassName": storage_class,
                    "resources": {"requests": {"storage": "1Gi"}},
                },
            },
        )

    def secret(self, name: str, password: str) -> None:
        auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
        login = json.dumps({"auths": {self.registry: {"auth": auth}}})
        self.api.create(
            SECRET,
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "type": "kubernetes.io/dockerconfigjson",
                "metadata": {"name": name, "namespace": self.name},
                "data": {".dockerconfigjson": base64.b64encode(login.encode()).decode()},
            },
        )

    def metrics(self) -> list[str]:
        """The lines of the run's metrics.jsonl, from the run volume."""
        return (self.folder / "run" / "run" / "metrics.jsonl").read_text().splitlines()

    def kubectl(self, *arguments: str, text: str | None = None) -> str:
        return subprocess.run(
            ["kubectl", "--kubeconfig", str(self.full.kubeconfig), "-n", self.name, *arguments],
            input=text,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout

    def apply(self, tag: str, *, secret: str = "push", steps: int = 12) -> None:
        """The example Workspace, as a user would write it."""
        item = {
            "apiVersion": "kaito.sh/v1beta1",
            "kind": "Workspace",
            "metadata": {"name": "demo"},
            "resource": {"labelSelector": {"matchLabels": {"apps": "demo"}}},
            "tuning": {
                "preset": {"name": "tuning/tiny-model"},
                "method": "lora",
                "config": "demo-config",
                "input": {"volumeSource": {"persistentVolumeClaim": {"claimName": "data"}}},
                "output": {"image": f"{self.registry}/team/{tag}", "imagePushSecret": secret},
            },
        }
        config = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "demo-config"},
            "data": {"training_config.yaml": CONFIG.replace("12", str(steps))},
        }
        self.kubectl("apply", "-f", "-", text=yaml.safe_dump_all([config, item]))

    def status(self) -> Object:
        found = self.api.get(WORKSPACE, self.name, "demo") or {}
        status: Object = found.get("status") or {}
        return status

    def until(self, ready: Callable[[Object], Any], seconds: float = 150) -> Object:
        """The status, as soon as `ready` likes it."""
        end = time.monotonic() + seconds
        while not ready(status := self.status()):
            if time.monotonic() > end:
                log = [self.kubectl("logs", "--tail=30", p["metadata"]["name"])
                       for p in self.api.find(POD, self.name)
                       if p["status"].get("containerStatuses")]  # fmt: skip
                raise AssertionError(f"never; {json.dumps(status)}\n{log}")
            time.sleep(0.2)
        return status


@pytest.fixture
def place(full: bed.Bed, api: HostPython, docker_registry: str, tmp_path: Path) -> Iterator[Place]:
    for above in (tmp_path, *tmp_path.parents):  # pods run as another user
        if above.owner() == Path(tmp_path).owner() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o011)
    found = Place(full, api, tmp_path, docker_registry)
    operator = Operator(api, found.options, Setup("full", elect=False, resync=5))
    stop = threading.Event()
    thread = threading.Thread(target=operator.run, args=(stop,))
    thread.start()
    try:
        yield found
    finally:
        if api.get(WORKSPACE, found.name, "demo"):
            found.kubectl("delete", "workspace", "demo", "--wait=false")
        wait(lambda: not api.find(POD, found.name), 90)
        stop.set()
        thread.join()


def ended(status: Object) -> bool:
    return status.get("state") in ("Succeeded", "Failed")


def test_the_example_trains_and_pushes(place: Place) -> None:
    """kubectl apply, a real pod, a real push with the imagePushSecret, the digest in the status."""
    place.apply("demo:1")
    status = place.until(lambda s: s.get("state") == "Running")
    status = place.until(ended)
    assert "Succeeded" == status["state"], status
    assert "12/12 (100%)" == status["progress"]["text"]
    reference = f"{place.registry}/team/demo:1"
    shown = subprocess.check_output(
        ["skopeo", "inspect", "--tls-verify=false", "--creds", f"{USER}:{PASSWORD}",
         f"docker://{reference}"], text=True)  # fmt: skip
    assert json.loads(shown)["Digest"] == status["output"]["digest"]
    table = place.kubectl("get", "workspaces", "demo")
    assert "Succeeded" in table and "12/12" in table
    place.kubectl("wait", "--for=condition=WorkspaceSucceeded", "workspace/demo", "--timeout=5s")


def test_a_killed_pod_goes_on_and_gives_the_same_digest(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed without grace in mid-training; the next pod resumes from the claim. Then the same
    data from the beginning, undisturbed: the same bytes."""
    monkeypatch.setitem(reconcile._AGAIN, "running", 0.5)
    place.apply("killed:1", steps=300)
    place.until(lambda s: s.get("progress", {}).get("step", 0) >= 20)
    (pod,) = [p["metadata"]["name"] for p in place.api.find(POD, place.name)]
    place.kubectl("delete", "pod", pod, "--grace-period=0", "--force")
    status = place.until(ended)
    assert "Succeeded" == status["state"], status
    steps = [json.loads(line)["step"] for line in place.metrics()]
    assert 300 == steps[-1] and 1 == steps.count(300)
    killed = status["output"]["digest"]
    place.kubectl("delete", "workspace", "demo")
    shutil.rmtree(place.folder / "run")
    place.volume("run2", "500Gi", place.name)
    place.apply("clean:1", steps=300)
    status = place.until(ended)
    assert "Succeeded" == status["state"], status
    assert killed == status["output"]["digest"]


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
