"""Both images as `make test-images` built them: in the full cluster, from containerd's store."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cluster import bed
from cluster.place import Local, Place, ended, operated, reachable
from cluster.world import World, config_map, wait, workspace

from jobs.api import client
from jobs.api.client import Cluster
from jobs.api.kinds import JOB, LEASE, NETWORK_POLICY, POD, WORKSPACE, Kind, Object
from jobs.api.options import Options
from jobs.desired import names

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
IMAGES = bed.CACHE / "images"
ENGINE, OPERATOR = "localhost/tuning-engine:test", "localhost/tuning-operator:test"
DEPLOYMENT = Kind("apps", "v1", "deployments", "Deployment")
OPTIONS = {"image": ENGINE, "imagePullPolicy": "Never", "storage": {"runVolume": "ephemeral"}}


@pytest.fixture(scope="module")
def images(full: bed.Bed) -> None:
    """Both images in the cluster's containerd."""
    for name in ("engine", "operator"):
        archive = IMAGES / f"{name}.tar"
        if not archive.exists():
            pytest.fail(f"{archive} is not there: run `make test-images`", pytrace=False)
        socket = full.folder / "run" / "containerd.sock"
        command = ["ctr", "-a", str(socket), "-n", "k8s.io", "images", "import", str(archive)]
        subprocess.run(command, check=True, capture_output=True, timeout=600)


@pytest.fixture(scope="module")
def api(full: bed.Bed) -> Iterator[Local]:
    with Local(client.connect(str(full.kubeconfig), threads=8)._api) as found:
        yield found


@pytest.fixture
def place(full: bed.Bed, api: Local, login_registry: str, tmp_path: Path) -> Iterator[Place]:
    there = Place(full, api, reachable(tmp_path), login_registry, image=ENGINE)
    with operated(there) as found:
        yield found


@pytest.mark.usefixtures("images")
def test_the_engine_s_image_trains_and_pushes(place: Place) -> None:
    """The Job as it is rendered, command and user included; the digest is in the registry."""
    place.apply("image:1")
    status = place.until(ended, 600)
    assert "Succeeded" == status["state"], status
    assert place.held("image:1") == status["output"]["digest"]


def deployed() -> list[Object]:
    """configs/deploy, with this test's images, on the host's network: there is no service proxy."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(ROOT / "configs/deploy")],
        capture_output=True,
        text=True,
        check=True,
    )
    found = [
        item
        for item in yaml.safe_load_all(done.stdout)
        if item["kind"] != "CustomResourceDefinition"
    ]
    for item in found:
        if item["kind"] == "Deployment":
            item["spec"]["replicas"] = 1
            pod = item["spec"]["template"]["spec"]
            pod |= {"hostNetwork": True, "dnsPolicy": "Default"}
            pod["containers"][0] |= {"image": OPERATOR, "imagePullPolicy": "Never"}
        elif item["kind"] == "ConfigMap":
            item["data"]["options.yaml"] = yaml.safe_dump(OPTIONS)
    return found


@pytest.mark.usefixtures("images")
def test_the_operator_s_image_works_as_it_is_deployed(full: bed.Bed, api: Cluster) -> None:
    """kubectl apply: ready by its own probe, a Workspace gets its Job, deletion gives the lease
    back. Nothing but the shipped rights, a read-only root and no privileges."""
    kubectl = ["kubectl", "--kubeconfig", str(full.kubeconfig)]
    items = deployed()
    for item in items:
        if item["kind"] == "Deployment":
            item["spec"]["template"]["spec"]["containers"][0]["env"] += [
                {"name": "KUBERNETES_SERVICE_HOST", "value": "127.0.0.1"},
                {"name": "KUBERNETES_SERVICE_PORT", "value": full.ports["APISERVER_PORT"]},
            ]
    text = yaml.safe_dump_all(items)
    subprocess.run([*kubectl, "apply", "-f", "-"], input=text, text=True, check=True)
    space = "tuning-system"

    def ready() -> bool:
        found = api.get(DEPLOYMENT, space, "tuning-operator") or {}
        return (found.get("status") or {}).get("readyReplicas") == 1

    try:
        wait(ready, 120)
        world = World(api, space, Options())
        world.apply(config_map("mine", space, "training_config: {}\n"))
        world.apply(workspace("phi", space, config="mine"))
        (job,) = wait(lambda: api.find(JOB, space))
        assert ENGINE == job["spec"]["template"]["spec"]["containers"][0]["image"]
        assert "phi" == job["metadata"]["labels"][names.WORKSPACE_LABEL]
        assert api.find(NETWORK_POLICY, space)
        wait(lambda: world.status("phi").get("state") == "Pending")
        api.delete(WORKSPACE, world.get("phi"))
        wait(lambda: not api.find(JOB, space))
        subprocess.run(
            [*kubectl, "-n", space, "delete", "deployment", "tuning-operator"], check=True
        )
        wait(lambda: not api.find(POD, space, labels="app.kubernetes.io/name=tuning-operator"))
        lease = api.get(LEASE, space, "tuning-operator")
        assert lease and not lease["spec"].get("holderIdentity")
    finally:
        subprocess.run([*kubectl, "delete", "namespace", space, "--wait=false"], check=False)
