"""The CRD's CEL rules, judged by a current CRD server (Kubernetes 1.36)."""

from __future__ import annotations

import copy
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import bed
from cluster.world import workspace

from jobs.api import client, kinds
from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import WORKSPACE

ROOT = Path(__file__).parents[2]
CRD_FILE = ROOT / "configs/deploy/crd/workspaces.kaito.sh.yaml"
ALPHA = kinds.Kind("kaito.sh", "v1alpha1", "workspaces", "Workspace")


@pytest.fixture(scope="module")
def crd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An API server whose Workspaces are served by the current CRD server."""
    if gap := bed.missing("apiextensions-apiserver"):
        pytest.skip(f"CEL rules are not judged here: {gap}")
    with bed.up(tmp_path_factory.mktemp("rules")) as found:
        for version in ("v1beta1", "v1alpha1"):
            arguments = ("kaito.sh", version, str(CRD_FILE), str(found.folder))
            found.script("crd-up.sh", *arguments)
        with client.connect(str(found.kubeconfig), threads=2) as api:
            yield api


def made(crd_server: Cluster, change: Any = None) -> dict[str, Any]:
    """A fresh valid Workspace after `change(item)`, created; with what the server filled in."""
    item = workspace(f"w-{secrets.token_hex(4)}")
    if change:
        change(item)
    found = crd_server.create(
        kinds.Kind("kaito.sh", item["apiVersion"].split("/")[1], "workspaces", "Workspace"), item
    )
    assert found is not None
    return found


def put(path: str, value: Any) -> Any:
    """A change: set the field at the dotted path, or remove it with Ellipsis."""

    def change(item: dict[str, Any]) -> None:
        *above, last = path.split(".")
        node = item
        for step in above:
            node = node[int(step)] if isinstance(node, list) else node[step]
        if value is ...:
            del node[last]
        else:
            node[last] = value

    return change


ADAPTER = {"source": {"name": "a", "image": "r.example.com/a:1"}, "strength": "0.5"}
SERVE = {"preset": {"name": "phi-3-mini-4k-instruct"}}

REFUSED = [
    ("metadata.name", "a.b", "DNS label"),
    ("tuning", ..., "Either Inference or Tuning must be specified, not neither"),
    ("resource.count", 65, "resource.count"),
    ("resource.partition", {"mode": "mig", "profile": "1g"}, "partitioning is not supported"),
    ("resource.labelSelector", {"matchExpressions": [{"key": "a", "operator": "Exists"}]},
     "Only allow matchLabels"),
    ("tuning.method", "lorra", "tuning.method"),
    ("tuning.input", {}, "Exactly one of URLs, Volume, or Image"),
    ("tuning.input", {"urls": ["https://a.b/c"], "image": "x"}, "Exactly one of URLs"),
    ("tuning.input", ..., "tuning.input"),
    ("tuning.output", ..., "tuning.output"),
    ("tuning.output", {}, "Exactly one of Volume or Image"),
    ("tuning.output", {"image": "r.example.com/a:1"}, "Must specify imagePushSecret"),
    ("tuning.output.image", "oci:adapter", "must be in a registry"),
    ("tuning.output.image", "hf://org/name", "must be in a registry"),
    ("tuning.input.urls", ["rows.jsonl"], "must use HTTP or HTTPS, hf, s3, gs or az"),
    *[("tuning.input.urls", [url], "loopback, private") for url in (
        "http://localhost/x", "https://LOCALHOST:80/", "https://a.localhost", "http://127.0.0.1",
        "http://10.1.2.3/", "http://192.168.0.1", "http://172.20.0.1/", "http://169.254.169.254/",
        "http://[::1]/", "http://metadata.google.internal/x", "http://u:p@127.0.0.1/",
        "http://[fd00::1]/")],
    ("tuning.input.urls", ["ftp://a.example.com/x"], "HTTP or HTTPS"),
    ("inference", {"template": {}}, "Preset or Template"),
    ("inference", {"preset": {"name": "phi-4"}}, "must be that of tuning"),
    ("inference", SERVE | {"adapters": [ADAPTER, ADAPTER]}, "once each"),
    ("inference", SERVE | {"adapters": [ADAPTER | {"strength": "1.5"}]}, "between 0 and 1"),
    ("inference", SERVE | {"adapters": [{"source": {"name": "a"}}]}, "Image or Volume"),
    ("inference", SERVE | {"adapters": [{"source": {"name": "a", "urls": ["https://x.y"]}}]},
     "URLs are not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), REFUSED)
def test_what_is_wrong_is_refused_at_the_door(
    crd_server: Cluster, path: str, value: Any, message: str
) -> None:
    """On create, with the sentence of the rule; the same on update."""
    with pytest.raises(ApiError) as refused:
        made(crd_server, put(path, value))
    assert 422 == refused.value.status
    assert message in refused.value.message
    if path in ("metadata.name", "tuning", "inference"):
        return
    item = made(crd_server)
    put(path, value)(item)
    with pytest.raises(ApiError) as refused:
        crd_server.replace(WORKSPACE, item)
    assert 422 == refused.value.status


ACCEPTED = [
    ("tuning.method", "QLoRA"),
    ("tuning.output", {"image": "r.example.com/a:1", "imagePushSecret": "p",
                       "volumeSource": {"persistentVolumeClaim": {"claimName": "x"}}}),
    ("tuning.input", {"volumeSource": {"nfs": {"server": "s", "path": "/x"}}}),
    ("inference", SERVE | {"adapters": [ADAPTER]}),
    ("inference", {}),
    ("resource.labelSelector", {"matchExpressions": [
        {"key": "a", "operator": "In", "values": ["b"]}]}),
    ("resource", ...),
    ("tuning.input.urls", ["https://1270.example.com/10.0.0.1?x=localhost"]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), ACCEPTED)
def test_what_is_right_comes_in(crd_server: Cluster, path: str, value: Any) -> None:
    """Both outputs at once, tuning with inference, nodes without a type."""
    made(crd_server, put(path, value))


IMMUTABLE = [
    ("tuning.preset", {"name": "phi-4"}, "Preset cannot be changed"),
    ("tuning.method", "lora", "Method cannot be changed"),
    ("resource.instanceType", "Standard_NC48ads_A100_v4", "instanceType cannot be changed"),
    ("resource.instanceType", ..., "instanceType cannot be changed"),
    ("resource.labelSelector", {"matchLabels": {"a": "b"}}, "field is immutable"),
    ("resource", ..., "resource cannot be toggled"),
    ("inference", SERVE, "Inference field cannot be toggled"),
    ("tuning.input.name", "other", "Name field cannot be changed"),
]  # fmt: skip
EDITABLE = [
    ("tuning.method", "QLORA"),
    ("tuning.config", "other"),
    ("tuning.input", {"image": "r.example.com/d:1"}),
    ("tuning.output.image", "r.example.com/b:2"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), IMMUTABLE)
def test_some_fields_stay_as_they_are(
    crd_server: Cluster, path: str, value: Any, message: str
) -> None:
    """As in KAITO: preset, method, machine and selector."""
    item = made(crd_server)
    put(path, value)(item)
    with pytest.raises(ApiError) as refused:
        crd_server.replace(WORKSPACE, item)
    assert message in refused.value.message


@pytest.mark.parametrize(("path", "value"), EDITABLE)
def test_and_some_may_change(crd_server: Cluster, path: str, value: Any) -> None:
    """Config, data and output: a new revision."""
    item = made(crd_server)
    put(path, value)(item)
    assert (
        item["metadata"]["generation"] + (path != "")
        == crd_server.replace(WORKSPACE, item)["metadata"]["generation"]
    )


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("workspace-*.yaml")), ids=str)
def test_every_example_comes_in(crd_server: Cluster, file: Path) -> None:
    """With its placeholders filled in; an empty one is told at the door, not by the kubelet."""
    text = re.sub(r"\b[A-Z]+(_[A-Z]+)+_HERE\b", "mine", file.read_text())
    found = [d for d in yaml.safe_load_all(text) if d["kind"] == "Workspace"]
    for item in found:
        item["metadata"] |= {"name": f"e-{secrets.token_hex(4)}", "namespace": "default"}
        kind = ALPHA if item["apiVersion"].endswith("v1alpha1") else WORKSPACE
        assert crd_server.create(kind, item)
    assert found


def test_both_versions_show_the_same_object(crd_server: Cluster) -> None:
    """v1alpha1 gets KAITO's default machine and is stored as v1beta1."""

    def alpha(item: dict[str, Any]) -> None:
        item["apiVersion"] = "kaito.sh/v1alpha1"
        del item["resource"]["instanceType"]

    item = made(crd_server, alpha)
    found = crd_server.get(WORKSPACE, "default", item["metadata"]["name"])
    assert found is not None
    assert "Standard_NC24ads_A100_v4" == found["resource"]["instanceType"]
    assert "public" == found["tuning"]["preset"]["accessMode"]
    assert 1 == found["resource"]["count"]


def test_an_unknown_field_is_refused_strictly(crd_server: Cluster) -> None:
    """As kubectl asks for: a slip of the pen is no silent pruning."""
    item = workspace("strict")
    item["tuning"]["ouput"] = copy.deepcopy(item["tuning"]["output"])
    with pytest.raises(ApiError) as refused:
        crd_server._call(
            "POST", WORKSPACE.path("default"), body=item, query={"fieldValidation": "Strict"}
        )
    assert 'unknown field "tuning.ouput"' in refused.value.message


@pytest.mark.parametrize(
    "url",
    ["s3://rows/a.jsonl", "gs://rows/a.jsonl", "az://rows/a.jsonl", "hf://datasets/o/rows/a.jsonl"],
)
def test_addresses_that_stand_for_https_are_admitted(crd_server: Cluster, url: str) -> None:
    assert [url] == made(crd_server, put("tuning.input", {"urls": [url]}))["tuning"]["input"][
        "urls"
    ]


def test_what_is_not_read_is_refused(crd_server: Cluster) -> None:
    with pytest.raises(ApiError, match="HTTP or HTTPS"):
        made(crd_server, put("tuning.input", {"urls": ["ftp://rows/a.jsonl"]}))
