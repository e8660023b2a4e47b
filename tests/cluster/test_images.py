"""`make images` into a registry on loopback; the full cluster pulls both images by digest."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import bed, building
from cluster.place import Local, Place, ended, operated, reachable
from cluster.world import World, config_map, wait, workspace
from registries import Registry

from jobs.api import client
from jobs.api.client import Cluster
from jobs.api.kinds import JOB, LEASE, NETWORK_POLICY, POD, WORKSPACE, Kind, Object
from jobs.api.options import Options
from jobs.desired import names

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

DEPLOYMENT = Kind("apps", "v1", "deployments", "Deployment")


@pytest.fixture(scope="module")
def made(full: bed.Bed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The kustomization that was written. ENGINES are built, and the one for CPUs at last: it is
    the operator's option `image`."""
    folder = tmp_path_factory.mktemp("images")
    others = [each for each in os.environ.get("ENGINES", "").split() if each != "cpu"]
    with Registry(folder) as registry:
        building.make_images(f"{registry.host}/team", folder / "deploy", *others, "cpu")
        yield folder / "deploy"


@pytest.fixture(scope="module")
def values(made: Path) -> dict[str, Any]:
    """The names of the images, as the Helm chart takes them."""
    found: dict[str, Any] = yaml.safe_load((made / "values.yaml").read_text())
    return found


@pytest.fixture(scope="module")
def api(full: bed.Bed) -> Iterator[Local]:
    with Local(client.connect(str(full.kubeconfig), threads=8)._api) as found:
        yield found


@pytest.fixture
def place(
    full: bed.Bed, api: Local, login_registry: str, tmp_path: Path, values: dict[str, Any]
) -> Iterator[Place]:
    engine = values["options"]["image"]
    there = Place(full, api, reachable(tmp_path), login_registry, image=engine)
    there.options = there.options.model_copy(update={"image_pull_policy": "IfNotPresent"})
    with operated(there) as found:
        yield found


def test_every_image_is_named_by_the_digest_that_the_registry_has(
    made: Path, values: dict[str, Any]
) -> None:
    """As skopeo reads it by its tag, which is git's name of this tree."""
    options = values["options"]
    pinned = [values["image"], options["image"], *options["images"].values()]
    for name in pinned:
        repository, _, digest = name.partition("@")
        command = ["skopeo", "list-tags", "--tls-verify=false", f"docker://{repository}"]
        tags = json.loads(subprocess.check_output(command))["Tags"]
        command = ["skopeo", "inspect", "--tls-verify=false", "--format={{.Digest}}"]
        told = [subprocess.check_output([*command, f"docker://{repository}:{t}"]) for t in tags]
        assert digest in [each.decode().strip() for each in told]
    assert {each["kind"] for each in deployed(made)} >= {"Deployment", "ClusterRole"}


def test_the_engine_s_image_trains_and_pushes(place: Place) -> None:
    """The Job as it is rendered, command and user included; the digest is in the registry."""
    place.apply("image:1")
    status = place.until(ended, 600)
    assert "Succeeded" == status["state"], status
    assert place.held("image:1") == status["output"]["digest"]


def deployed(folder: Path) -> list[Object]:
    """What `kubectl apply -k` takes, on the host's network: there is no service proxy."""
    text = subprocess.check_output(["kubectl", "kustomize", str(folder)], text=True)
    found = [
        item for item in yaml.safe_load_all(text) if item["kind"] != "CustomResourceDefinition"
    ]
    for item in found:
        if item["kind"] == "Deployment":
            item["spec"]["replicas"] = 1
            pod = item["spec"]["template"]["spec"]
            pod |= {"hostNetwork": True, "dnsPolicy": "Default"}
        elif item["kind"] == "ConfigMap":
            options = yaml.safe_load(item["data"]["options.yaml"])
            options["storage"]["runVolume"] = "ephemeral"
            item["data"]["options.yaml"] = yaml.safe_dump(options)
    return found


def test_the_operator_s_image_works_as_it_is_deployed(
    full: bed.Bed, api: Cluster, made: Path, values: dict[str, Any]
) -> None:
    """kubectl apply: ready by its own probe, a Workspace gets its Job, deletion gives the lease
    back. Nothing but the shipped rights, a read-only root and no privileges."""
    kubectl = ["kubectl", "--kubeconfig", str(full.kubeconfig)]
    items = deployed(made)
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
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert values["options"]["image"] == container["image"]
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
