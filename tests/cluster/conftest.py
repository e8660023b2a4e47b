"""A real API server for this folder's tests, one a test process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import bed
from cluster.place import HostPython, Place, docker_registry, operated, prepare, reachable, serve
from cluster.world import NODE_CLAIM_CRD, World, fresh

from jobs.api import client, crd
from jobs.api.client import Cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/cluster/" in str(item.path):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bed.Bed]:
    """The control plane: etcd, API server, controllers. Pods never run."""
    if gap := bed.missing("kube-apiserver", "kube-controller-manager"):
        pytest.fail(gap, pytrace=False)
    with bed.up(tmp_path_factory.mktemp("bed")) as found:
        yield found


@pytest.fixture(scope="session")
def api(server: bed.Bed) -> Iterator[Cluster]:
    """The administrator's access, with Workspaces and NodeClaims served."""
    with client.connect(str(server.kubeconfig), threads=16) as found:
        serve(found, crd.definition(), NODE_CLAIM_CRD)
        yield found


@pytest.fixture
def world(api: Cluster) -> World:
    """A namespace of its own, and an operator that is called step by step."""
    return fresh(api)


# real pods


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bed.Bed]:
    """One full cluster a machine: it needs root, cgroups and fixed ports."""
    if gap := bed.missing("kubelet", "kube-scheduler", "pause"):
        pytest.fail(gap, pytrace=False)
    if os.geteuid() or not all(map(shutil.which, ("containerd", "runc", "kubectl"))):
        pytest.skip("real pods are not tried here: needs root, containerd, runc and kubectl")
    with bed.up(tmp_path_factory.mktemp("full"), "full") as found:
        with client.connect(str(found.kubeconfig), threads=8) as api:
            prepare(api)
        yield found


@pytest.fixture(scope="session")
def login_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a real registry that asks for a password."""
    with docker_registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture
def place(full: bed.Bed, login_registry: str, tmp_path: Path) -> Iterator[Place]:
    """A namespace of it with data, Secrets and an operator; Jobs run this machine's Python."""
    with (
        HostPython(client.connect(str(full.kubeconfig), threads=8)._api) as api,
        operated(Place(full, api, reachable(tmp_path), login_registry)) as found,
    ):
        yield found
