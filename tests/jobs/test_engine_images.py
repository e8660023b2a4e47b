"""The engine's image, by the GPU that is planned for and the driver of its node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.world import workspace
from inference_workspaces import workspace as server_workspace

from jobs import render
from jobs.api.options import Options, load
from jobs.desired import inference as desired_inference
from jobs.desired import tuning as desired_tuning
from jobs.manifests import job as job_manifests
from jobs.manifests import server as server_manifests
from jobs.observed import site
from tuning.errors import SpecError

IMAGES = {"cu126": "r.example/tuning:1-cu126", "cu130": "r.example/tuning:1-cu130"}
H100 = {"gpu.product": "NVIDIA-H100-80GB-HBM3", "gpu.memory": "81559", "gpu.count": "8"}
V100 = {"gpu.product": "Tesla-V100-SXM2-16GB", "gpu.memory": "16384", "gpu.count": "1"}
B200 = {"gpu.product": "NVIDIA-B200", "gpu.memory": "183359", "gpu.count": "8"}
MIG = {"gpu.product": "NVIDIA-A100-SXM4-80GB-MIG-1g.10gb", "gpu.memory": "9728"}
OTHER = {"gpu.product": "NVIDIA-RTX-9000", "gpu.memory": "32768"}


def driver(cuda: str) -> dict[str, str]:
    """Labels of GPU feature discovery, which call the driver's CUDA its runtime version."""
    major, minor = cuda.split(".")
    return {"cuda.runtime-version.major": major, "cuda.runtime-version.minor": minor}


def older_driver(cuda: str) -> dict[str, str]:
    """The same labels of its earlier versions."""
    return {name.replace("-version", ""): value for name, value in driver(cuda).items()}


def compute(capability: str) -> dict[str, str]:
    major, minor = capability.split(".")
    return {"gpu.compute.major": major, "gpu.compute.minor": minor}


def images(found: list[dict[str, Any]]) -> set[str]:
    """The images of all containers."""
    pods = [each["spec"]["template"]["spec"] for each in found if "template" in each["spec"]]
    return {c["image"] for p in pods for c in [*p["containers"], *p.get("initContainers", [])]}


@pytest.mark.parametrize(
    ("instance", "build"),
    [
        ("Standard_NC6s_v3", "cu126"),  # V100
        ("Standard_NC4as_T4_v3", "cu126"),  # whatever the driver of the node will be
        ("p5.48xlarge", "cu126"),
        ("p6-b200.48xlarge", "cu130"),  # the first with kernels for it
    ],
)
@pytest.mark.parametrize("serves", [False, True])
def test_render_shows_the_image_that_has_kernels_for_the_planned_gpu(
    instance: str, build: str, serves: bool, tmp_path: Path
) -> None:
    """Of a Job and of the server alike; without `images` it is `image` as before."""
    item = server_workspace() if serves else workspace("phi", "team")
    item["metadata"] = {"name": "phi"}
    item["resource"]["instanceType"] = instance
    file = tmp_path / "w.yaml"
    file.write_text(yaml.safe_dump(item))
    options = Options(image="one", images=IMAGES)

    assert {IMAGES[build]} == images(render.render(file, options, namespace="team"))
    assert {"one"} == images(render.render(file, Options(image="one"), namespace="team"))


@pytest.mark.parametrize(
    ("nodes", "given", "image"),
    [
        ([H100 | driver("13.0")], IMAGES, IMAGES["cu130"]),
        ([H100 | driver("12.4")], IMAGES, IMAGES["cu126"]),
        ([H100 | older_driver("12.2")], IMAGES, IMAGES["cu126"]),
        ([H100], IMAGES, IMAGES["cu126"]),  # the driver is not known
        ([B200], IMAGES, IMAGES["cu130"]),
        ([MIG | driver("12.8")], IMAGES, IMAGES["cu126"]),
        ([OTHER | compute("8.9")], IMAGES, IMAGES["cu126"]),
        ([OTHER | compute("8.9") | driver("13.0")], IMAGES, IMAGES["cu130"]),
        ([OTHER | compute("7.0")], IMAGES, IMAGES["cu126"]),
        ([H100 | driver("13.0"), V100 | driver("13.0")], IMAGES, IMAGES["cu126"]),  # either node
        ([H100 | driver("13.0"), H100 | driver("12.8")], IMAGES, IMAGES["cu126"]),
        ([B200 | driver("13.0"), V100 | driver("13.0")], IMAGES, IMAGES["cu130"]),  # the largest
        ([H100 | driver("13.0")], {"cu126": "old"}, "old"),  # the administrator gives no other
        ([B200 | driver("13.0")], {"cu126": "old"}, "one"),
        ([B200 | driver("12.8")], IMAGES, "one"),  # nothing runs: the Job says so
        ([{}], IMAGES, "one"),
        ([], IMAGES, "one"),
    ],
)
def test_nodes_of_ones_own_get_the_image_that_their_gpus_and_drivers_run(
    nodes: list[dict[str, str]], given: dict[str, str], image: str
) -> None:
    """By the labels of NVIDIA's GPU feature discovery, old and new."""
    found = [
        {"metadata": {"name": f"n{i}", "labels": {f"nvidia.com/{k}": v for k, v in each.items()}}}
        for i, each in enumerate(nodes)
    ]
    device = site.device_of_nodes(found)
    options = Options(image="one", images=given)
    tuned, served = workspace("phi", "team"), server_workspace()
    for item in (tuned, served):
        del item["resource"]["instanceType"]
        item["metadata"] |= {"uid": "1-2"}
    desired = desired_tuning.read(tuned, None, device)
    job = job_manifests.job(tuned, desired, options, claim=True, earlier=())
    server = desired_inference.read(served, None, device)
    deployment = server_manifests.deployment(served, server, options, claim=False)

    assert {image} == images([job]) == images([deployment])


@pytest.mark.parametrize("gpus", ["0", "1"])
def test_a_container_without_a_gpu_sees_none(gpus: str) -> None:
    """The image asks NVIDIA's runtime for every GPU; one that was given is named by the plugin."""
    item = workspace("phi", "team")
    item["metadata"] |= {"uid": "1-2", "annotations": {"tuning.kaito.sh/gpus": gpus}}
    del item["resource"]["instanceType"]
    desired = desired_tuning.read(item, None, None)
    job = job_manifests.job(item, desired, Options(), claim=True, earlier=())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}

    assert ("void" if gpus == "0" else None) == variables.get("NVIDIA_VISIBLE_DEVICES")
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (gpus == "1")


def test_a_build_that_there_is_not_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    """A slip in the options must not look like a missing image later."""
    file = tmp_path / "options.yaml"
    file.write_text("images: {cu128: x}")
    with pytest.raises(SpecError, match=r"JOB-102 images.*cu126, cu130"):
        load(file)
