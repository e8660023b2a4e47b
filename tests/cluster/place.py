"""What tests with real pods share: a registry, a namespace with volumes and Secrets, an engine."""

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from cluster import bed
from cluster.world import NAMESPACE, SECRET, wait

from jobs.api import crd
from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import CLAIM, CRD, DEPLOYMENT, JOB, NODE, POD, WORKSPACE, Kind, Object
from jobs.api.options import Options, Storage
from jobs.controller.operator import Operator, Setup

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


class Local(Cluster):
    """Its Jobs reach the registry on loopback, and find the tiny model in a folder of the host."""

    limit = "4Gi"

    def create(self, kind: Kind, item: Object) -> Object | None:
        self.fit(kind, item)
        return super().create(kind, item)

    def replace(self, kind: Kind, item: Object) -> Object:
        self.fit(kind, item)
        return super().replace(kind, item)

    def fit(self, kind: Kind, item: Object) -> None:
        """Change what would run to what can run here."""
        if kind in (JOB, DEPLOYMENT):
            pod = item["spec"]["template"]["spec"]
            pod |= {"hostNetwork": True, "dnsPolicy": "Default"}
            container = pod["containers"][0]
            if kind == JOB:
                container["command"] += ["--base-model", "/base"]
            else:
                command = container["command"]
                command[command.index("--base") + 1] = "/base"
            container["env"].append({"name": "OMP_NUM_THREADS", "value": "1"})
            resources = container["resources"]
            resources["requests"] |= {"cpu": "100m", "memory": "100Mi"}
            resources["limits"]["memory"] = self.limit
            self.mount(pod, {"/base": str(ROOT / "examples/tiny-model")})

    def mount(self, pod: Object, folders: dict[str, str]) -> None:
        """Show folders of the host in the pod, read-only."""
        for inside, outside in sorted(folders.items()):
            name = f"host{len(pod['volumes'])}"
            pod["volumes"].append({"name": name, "hostPath": {"path": outside}})
            pod["containers"][0]["volumeMounts"].append(
                {"name": name, "mountPath": inside, "readOnly": True}
            )


class HostPython(Local):
    """Runs the engine from this machine's environment instead of an image."""

    def fit(self, kind: Kind, item: Object) -> None:
        super().fit(kind, item)
        if kind in (JOB, DEPLOYMENT):
            pod = item["spec"]["template"]["spec"]
            pod["containers"][0]["env"] += [
                {"name": "PATH", "value": f"{Path(sys.prefix) / 'bin'}:/bin:/usr/bin"},
                {"name": "PYTHONPATH", "value": str(ROOT)},  # this tree, whatever is installed
                {"name": "PYTHONDONTWRITEBYTECODE", "value": "1"},
            ]
            folders = {"/usr": "/usr", "/lib": "/usr/lib", "/lib64": "/usr/lib64"}
            homes = (ROOT, Path(sys.base_prefix), Path(sys.prefix))
            folders |= {str(p): str(p) for p in homes if not p.is_relative_to("/usr")}
            self.mount(pod, folders)


def serve(found: Cluster, *definitions: Object) -> None:
    """Create CustomResourceDefinitions, and wait until their kinds are served."""

    def served(definition: Object) -> bool:
        spec = definition["spec"]
        version, names = spec["versions"][0]["name"], spec["names"]
        try:
            found.find(Kind(spec["group"], version, names["plural"], names["kind"]))
        except ApiError:
            return False
        return True

    for definition in definitions:
        found.create(CRD, definition)
    wait(lambda: all(map(served, definitions)))


def prepare(found: Cluster) -> None:
    """Serve Workspaces; the node carries the label that they select, and four GPUs on paper."""
    serve(found, crd.definition())
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


@contextmanager
def docker_registry(folder: Path, tls: tuple[Path, Path] | None = None) -> Iterator[str]:
    """A real registry with a password; gives host:port on loopback. With `tls`, a certificate and
    its key, it listens at every address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    login = ["htpasswd", "-Bbn", USER, PASSWORD]
    (folder / "htpasswd").write_text(subprocess.check_output(login, text=True))
    settings = {
        "version": 0.1,
        "http": {"addr": f"127.0.0.1:{port}", "secret": "fixed"}
        | (
            {"addr": f":{port}", "tls": {"certificate": str(tls[0]), "key": str(tls[1])}}
            if tls
            else {}
        ),
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

    access_mode = "ReadWriteOnce"  # of its volumes

    def __init__(
        self,
        full: bed.Bed,
        api: Cluster,
        folder: Path,
        registry_: str,
        *,
        image: str = "localhost/busybox:test",
    ) -> None:
        self.full, self.api, self.folder, self.registry = full, api, folder, registry_
        self.name = f"p-{os.urandom(4).hex()}"
        self.options = Options(
            image=image,
            image_pull_policy="Never",
            namespaces=(self.name,),
            backoff_limit=4,
            storage=Storage(storage_class=self.name, access_mode=self.access_mode),
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
                    "accessModes": [self.access_mode],
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
                    "accessModes": [self.access_mode],
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
        """The lines of the run's metrics.jsonl, from the run volume; none before the first."""
        path = self.folder / "run" / "run" / "metrics.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    def kubectl(self, *arguments: str, text: str | None = None) -> str:
        return subprocess.run(
            ["kubectl", "--kubeconfig", str(self.full.kubeconfig), "-n", self.name, *arguments],
            input=text,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout

    def delete_pods(self, seconds: int) -> None:
        """As a node does that is drained (with time to stop) or lost (0 seconds)."""
        for pod in self.api.find(POD, self.name):
            path = POD.path(self.name, pod["metadata"]["name"])
            self.api._call("DELETE", path, body={"gracePeriodSeconds": seconds})

    def result(self, child: str) -> Object:
        """What a child process of the run answered last, from the run volume."""
        path = self.folder / "run" / "run" / "log" / f"{child}.result.json"
        answer: Object = json.loads(path.read_text())["ok"]
        return answer

    def held(self, tag: str) -> str:
        """The digest that the registry has under the tag, as skopeo sees it."""
        shown = subprocess.check_output(
            ["skopeo", "inspect", "--tls-verify=false", "--creds", f"{USER}:{PASSWORD}",
             f"docker://{self.registry}/team/{tag}"], text=True)  # fmt: skip
        return str(json.loads(shown)["Digest"])

    def apply(self, tag: str, **changes: Any) -> None:
        """Apply the example Workspace with `changes`, as a user would."""
        self.kubectl("apply", "-f", "-", text=self.documents(tag, **changes))

    def documents(
        self,
        tag: str,
        *,
        secret: str = "push",
        steps: int = 12,
        config: str = "demo-config",
        arguments: str = "",
        instance: str | None = None,
        count: int = 1,
    ) -> str:
        """The example Workspace, as a user would write it."""
        item = {
            "apiVersion": "kaito.sh/v1beta1",
            "kind": "Workspace",
            "metadata": {"name": "demo"},
            "resource": {"labelSelector": {"matchLabels": {"apps": "demo"}}},
            "tuning": {
                "preset": {"name": "tuning/tiny-model"},
                "method": "lora",
                "config": config,
                "input": {"volumeSource": {"persistentVolumeClaim": {"claimName": "data"}}},
                "output": {"image": f"{self.registry}/team/{tag}", "imagePushSecret": secret},
            },
        }
        if instance:
            item["resource"] |= {"instanceType": instance}
        if count > 1:
            item["resource"] |= {"count": count}
        settings = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": config},
            "data": {"training_config.yaml": CONFIG.replace("12", str(steps)) + arguments},
        }
        return yaml.safe_dump_all([settings, item])

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

    def clear(self) -> None:
        """Delete the Workspace, and wait until its pods are gone."""
        if self.api.get(WORKSPACE, self.name, "demo"):
            self.kubectl("delete", "workspace", "demo", "--wait=false")
        wait(lambda: not self.api.find(POD, self.name), 90)


@contextmanager
def operated(found: Place) -> Iterator[Place]:
    """The place with an operator at work in threads; in the end no pod is left in it."""
    operator = Operator(found.api, found.options, Setup("full", elect=False, resync=5))
    stop = threading.Event()
    thread = threading.Thread(target=operator.run, args=(stop,))
    thread.start()
    try:
        yield found
        found.clear()
    finally:
        stop.set()
        thread.join()


def reachable(folder: Path) -> Path:
    """`folder`, so that pods, which run as another user, may enter it."""
    for above in (folder, *folder.parents):
        if above.owner() == folder.owner() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o011)
    return folder


def ended(status: Object) -> bool:
    return status.get("state") in ("Succeeded", "Failed")
