"""The runtime for Kubeflow Trainer: documented fields, and the same engine as in our own Job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from jobs.api.options import Options
from jobs.manifests import job as job_manifests

FOLDER = Path(__file__).parents[2] / "configs" / "deploy" / "trainer"
# trainer.kubeflow.org/v1alpha1 and jobset.x-k8s.io/v1alpha2, as their API references have them.
FIELDS: dict[str, set[str]] = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"mlPolicy", "podGroupPolicy", "template"},
    "spec.mlPolicy": {"numNodes", "torch", "mpi", "flux"},
    "spec.mlPolicy.torch": {"numProcPerNode", "elasticPolicy"},
    "spec.template": {"metadata", "spec"},
    "spec.template.spec": {
        "replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend",
        "coordinator", "managedBy", "ttlSecondsAfterFinished",
    },
    "spec.template.spec.replicatedJobs.0": {
        "name", "groupName", "replicas", "template", "dependsOn",
    },
    "spec.template.spec.replicatedJobs.0.template": {"metadata", "spec"},
}  # fmt: skip


@pytest.fixture(scope="module")
def runtime() -> dict[str, Any]:
    text = subprocess.check_output(["kubectl", "kustomize", str(FOLDER)], text=True)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def at(value: Any, path: str) -> Any:
    for step in filter(None, path.split(".")):
        value = value[int(step) if step.isdecimal() else step]
    return value


@pytest.mark.parametrize("path", FIELDS)
def test_it_has_documented_fields_only(runtime: dict[str, Any], path: str) -> None:
    """A field that the API server does not know is dropped, or refused."""
    assert at(runtime, path).keys() <= FIELDS[path]


def test_its_job_is_one_that_kubernetes_takes(runtime: dict[str, Any]) -> None:
    """Strict types at every depth; the names and the label by which Trainer finds job and pod."""
    assert ("trainer.kubeflow.org/v1alpha1", "ClusterTrainingRuntime") == (
        runtime["apiVersion"], runtime["kind"],
    )  # fmt: skip
    (node,) = at(runtime, "spec.template.spec.replicatedJobs")
    assert "node" == node["name"]
    labels = node["template"]["metadata"]["labels"]
    assert "trainer" == labels["trainer.kubeflow.org/trainjob-ancestor-step"]
    template = client.V1JobTemplateSpec.model_validate(node["template"])
    assert ["node"] == [each.name for each in template.spec.template.spec.containers]


def test_it_ends_as_our_own_jobs_do(runtime: dict[str, Any]) -> None:
    """The same exit codes fail it, the same are tried again; index 0 decides."""
    spec = at(runtime, "spec.template.spec.replicatedJobs.0.template.spec")
    ours = yaml.safe_dump(job_manifests._failure_rules()).replace(": tuning", ": node")
    assert yaml.safe_load(ours) == spec["podFailurePolicy"]["rules"]
    assert {"rules": [{"succeededIndexes": "0"}]} == spec["successPolicy"]
    pod = spec["template"]["spec"]
    assert "Never" == pod["restartPolicy"] and "Failed" == spec["podReplacementPolicy"]
    assert Options().user_id == pod["securityContext"]["runAsUser"]
    assert Options().grace_seconds == pod["terminationGracePeriodSeconds"]


def test_its_command_is_one_of_the_engine(runtime: dict[str, Any], tmp_path: Path) -> None:
    """Kubernetes puts Trainer's variables in; the engine knows each option, and reads the document
    where the ConfigMap is mounted."""
    pod = at(runtime, "spec.template.spec.replicatedJobs.0.template.spec.template.spec")
    (container,) = pod["containers"]
    command = container["command"]
    assert ["python", "-m", "tuning", "run"] == command[:4]
    host = "demo-node-0-0.demo"
    values = {
        "PET_NNODES": "2",
        "PET_MASTER_ADDR": host,
        "PET_MASTER_PORT": "29500",
    }
    for name, value in values.items():
        command = [each.replace(f"$({name})", value) for each in command]
    assert not [each for each in command if "$" in each]
    assert f"{host}:29500" == command[command.index("--meet") + 1]
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    volumes = {each["name"] for each in pod["volumes"]}
    assert {"/etc/tuning", "/run/tuning", "/models", "/tmp", "/dev/shm"} == mounts.keys()
    assert set(mounts.values()) == volumes
    absent = str(tmp_path / "absent.yaml")
    moved = [each if each[0] != "/" else str(tmp_path) for each in command[5:]]
    done = subprocess.run(
        [sys.executable, "-m", "tuning", "run", "-f", absent, *moved[1:]],
        env=os.environ | {"JOB_COMPLETION_INDEX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert 11 == done.returncode and absent in done.stderr, done.stderr
