"""The API server's judgement on everything under configs/deploy: a strict server-side dry run.

The test bed's server is Kubernetes 1.20. What is newer is left out here, and judged elsewhere: the
CRD's rules in test_rules.py, the Job's fields by the official client's models in tests/jobs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.bed import Bed
from cluster.world import NAMESPACE

from jobs.api.client import Cluster
from jobs.api.kinds import Object

DEPLOY = Path(__file__).parents[2] / "configs" / "deploy"
LATER = {"x-kubernetes-validations", "podReplacementPolicy"}
LATER |= {"completionMode", "podFailurePolicy", "successPolicy"}  # of Jobs
# The kinds of observability/ are the Prometheus operator's; tests/jobs/test_watching.py reads them.
FOLDERS = sorted(
    path.parent
    for path in DEPLOY.rglob("kustomization.yaml")
    if path.parent.name != "observability"
)


@pytest.fixture(scope="module")
def space(api: Cluster) -> None:
    """The namespace that is there when the files are applied."""
    metadata = {"name": "tuning-system"}
    api.create(NAMESPACE, {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})


def served(items: list[Object]) -> Iterator[Object]:
    """What this API server knows. Of a runtime of Kubeflow Trainer those are its Jobs."""
    for item in items:
        if item["kind"] != "ClusterTrainingRuntime":
            yield item
            continue
        for job in item["spec"]["template"]["spec"]["replicatedJobs"]:
            metadata = {"name": job["name"], "namespace": "tuning-system"}
            spec = job["template"]["spec"]
            yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def known(value: Any) -> Any:
    """Without what is newer than the server."""
    if isinstance(value, list):
        return [known(each) for each in value]
    if isinstance(value, dict):
        return {key: known(each) for key, each in value.items() if key not in LATER}
    return value


def judged(server: Bed, items: list[Object]) -> tuple[list[str], str]:
    """What the API server would create or change, and its warnings and errors."""
    command = ["kubectl", "--kubeconfig", str(server.kubeconfig), "apply", "-f", "-"]
    command += ["--dry-run=server", "--validate=strict"]
    text = yaml.safe_dump_all(known(items))
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    own = "is missing the kubectl.kubernetes.io/last-applied-configuration annotation"
    said = [line for line in done.stderr.splitlines() if own not in line]
    return done.stdout.splitlines(), "\n".join(said)


@pytest.mark.usefixtures("space")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_the_api_server_takes_every_kustomization(folder: Path, server: Bed) -> None:
    """No unknown field, no wrong type, no warning."""
    text = subprocess.check_output(["kubectl", "kustomize", str(folder)], text=True)
    items = list(served(list(yaml.safe_load_all(text))))
    lines, said = judged(server, items)
    assert "" == said
    assert len(items) == len(lines) > 0


@pytest.mark.usefixtures("space")
def test_a_field_that_is_not_there_is_found(server: Bed) -> None:
    """The judge is awake."""
    (item,) = yaml.safe_load_all((DEPLOY / "base/deployment.yaml").read_text())
    item["metadata"]["namespace"] = "tuning-system"
    item["spec"]["replica"] = 2
    assert 'unknown field "replica"' in judged(server, [item])[1]
