"""`tuning.cluster`: a Workspace from Python, on a real API server with real pods."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from cluster.place import Place
from cluster.world import World

from tuning import cluster
from tuning.errors import RefusedError, SpecError, TransientError


def test_submit_wait_and_logs(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest of the pushed image, the progress, and what the pod printed."""
    monkeypatch.setenv("KUBECONFIG", str(place.full.kubeconfig))
    (tmp_path / "job.yaml").write_text(place.documents("python:1"))

    name = cluster.submit(tmp_path / "job.yaml", namespace=place.name)
    done = cluster.wait(name, namespace=place.name, timeout_seconds=150)
    lines = list(cluster.logs(name, namespace=place.name))

    assert ("demo", "Succeeded", True) == (name, done.state, done.is_done)
    assert place.held("python:1") == done.digest
    assert 12 == done.progress["step"]
    assert any("Training 12 steps" in line for line in lines)


def test_a_failure_is_raised_with_the_operator_s_words(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the run raises it on this machine: reason, message, hint, and the kind of the error."""
    monkeypatch.setenv("KUBECONFIG", str(place.full.kubeconfig))
    place.options.__dict__["backoff_limit"] = 0
    place.secret("wrong", "not-the-password")
    (tmp_path / "job.yaml").write_text(place.documents("python:2", secret="wrong"))

    name = cluster.submit(tmp_path / "job.yaml", namespace=place.name)
    with pytest.raises(RefusedError, match="JOB-142 demo: failed: AccessRefused") as caught:
        cluster.wait(name, namespace=place.name, timeout_seconds=150)

    assert 12 == caught.value.exit_code
    assert "not-the-password" not in str(caught.value)


def test_what_cannot_be_submitted(
    world: World, server: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong file is refused here; a missing Workspace, pod or cluster by name."""
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))  # type: ignore[attr-defined]
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace"}))
    with pytest.raises(SpecError, match="metadata"):
        cluster.submit(file, namespace=world.namespace)
    with pytest.raises(RefusedError, match=r'JOB-146 .* 404: .*"absent" not found'):
        cluster.status("absent", namespace=world.namespace)
    with pytest.raises(RefusedError, match="JOB-141 absent: has no pod yet"):
        list(cluster.logs("absent", namespace=world.namespace))

    config = yaml.safe_load(Path(server.kubeconfig).read_text())  # type: ignore[attr-defined]
    config["clusters"][0]["cluster"] = {"server": "http://127.0.0.1:9"}
    (tmp_path / "dead").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "dead"))
    with pytest.raises(TransientError, match="JOB-145"):
        cluster.status("absent", namespace=world.namespace)
    with pytest.raises(SpecError, match="JOB-143"):
        cluster.status("absent", context="nowhere")
