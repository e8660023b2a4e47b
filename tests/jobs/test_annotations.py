"""What travels to a Job in its pod's labels and annotations: sizes, opt-outs of sidecars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from memory_cluster import Scene

from jobs.api.kinds import DEPLOYMENT, JOB, NODE_CLAIM
from jobs.api.options import MAX_ANNOTATIONS, Options, with_policy
from jobs.render import render
from tuning.errors import SpecError


def large(scene: Scene, size: int) -> None:
    """Its document has about `size` bytes."""
    urls = [f"https://data.example.com/{i:03}/{'x' * (size // 200 - 30)}" for i in range(200)]
    scene.api.stored["workspaces", "phi"]["tuning"]["input"] = {"urls": urls}


@pytest.mark.parametrize(
    ("document", "policy", "remedy"),
    [
        (300_000, 0, "name fewer URLs"),
        (120_000, 150_000, "ask the administrator"),
        (252_000, 4_000, "name fewer URLs"),
    ],
)
def test_what_is_too_large_to_travel_buys_no_node(
    document: int, policy: int, remedy: str, tmp_path: Path
) -> None:
    """Document, policy and its certificates together: refused at SpecValid with their sizes, and by
    `python -m jobs render` with the same words and exit code 11."""
    scene = Scene(policy="# policy" if policy else None, policy_files={"ca.pem": "x" * policy})
    large(scene, document)
    for _ in range(3):
        status = scene.look(30)
    assert ("Failed", "SpecTooLarge") == (status["state"], scene.reason("SpecValid"))
    words = status["failure"]["message"]
    assert f"{MAX_ANNOTATIONS:,} bytes" in words and remedy in words
    assert [] == scene.owned(NODE_CLAIM) == scene.owned(JOB)
    file = tmp_path / "workspace.yaml"
    plain = {k: v for k, v in scene.api.stored["workspaces", "phi"].items() if k != "status"}
    file.write_text(json.dumps(plain | {"metadata": {"name": "phi"}}))
    with pytest.raises(SpecError) as refused:
        render(file, scene.options, namespace="team")
    assert "JOB-114" == refused.value.problems[0].code and 11 == refused.value.exit_code
    assert remedy in str(refused.value)


def test_what_is_nearly_too_large_travels() -> None:
    """A document of 240,000 bytes gets its node and its Job."""
    scene = Scene()
    large(scene, 240_000)
    scene.with_node()
    assert 1 == len(scene.owned(JOB))


def test_digests_of_earlier_runs_count_as_well() -> None:
    """They travel with the document, so that what fitted once may not fit later."""
    scene = Scene()
    large(scene, 251_000)
    outputs = [f"sha256:{i:064}" for i in range(50)]
    scene.api.stored["workspaces", "phi"]["status"] = {"outputs": outputs, "revision": "0"}
    scene.look(30)
    assert "SpecTooLarge" == scene.reason("SpecValid")


def test_a_policy_that_is_too_large_for_any_job_is_refused_at_the_start(tmp_path: Path) -> None:
    """With the sizes of the files that it names, before a Workspace meets it."""
    (tmp_path / "ca.pem").write_text("x" * MAX_ANNOTATIONS)
    policy = tmp_path / "policy.yaml"
    policy.write_text("data: {caBundle: ca.pem}\n")
    with pytest.raises(SpecError) as refused:
        with_policy(Options(), policy)
    assert "JOB-115" == refused.value.problems[0].code
    assert f"ca.pem {MAX_ANNOTATIONS:,}" in str(refused.value)
    (tmp_path / "ca.pem").write_text("x" * 200_000)
    assert with_policy(Options(), policy).policy_files


def test_jobs_opt_out_of_sidecars_and_an_administrator_opts_in() -> None:
    """Istio, Kuma, Linkerd, Consul, Vault and OpenTelemetry; podLabels may say otherwise. A pod
    that serves may have sidecars, as it does not end."""
    scene = Scene(pod_labels={"sidecar.istio.io/inject": "true"})
    scene.with_node()
    meta = scene.owned(JOB)[0]["spec"]["template"]["metadata"]
    assert "true" == meta["labels"]["sidecar.istio.io/inject"]
    assert "disabled" == meta["labels"]["kuma.io/sidecar-injection"]
    for key, value in {
        "linkerd.io/inject": "disabled",
        "consul.hashicorp.com/connect-inject": "false",
        "vault.hashicorp.com/agent-inject": "false",
        "sidecar.opentelemetry.io/inject": "false",
    }.items():
        assert value == meta["annotations"][key]
    plain = Scene()
    plain.with_node()
    labels = plain.owned(JOB)[0]["spec"]["template"]["metadata"]["labels"]
    assert "false" == labels["sidecar.istio.io/inject"]
    served = Scene(serves=True)
    served.with_node()
    assert "inject" not in json.dumps(served.owned(DEPLOYMENT)[0]["spec"]["template"]["metadata"])
