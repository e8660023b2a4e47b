"""Other forms of the image: an index with a ModelPack, and layers that stand on a base image."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import adapters
import pytest
from faults import proxy as fp
from faults.proxy import Proxy
from registries import Registry, TokenFront

from tuning.errors import RefusedError
from tuning.network.docker_config import Login
from tuning.oci import delivery, registry
from tuning.oci.delivery import Access
from tuning.oci.layout.extract import unpack
from tuning.oci.layout.manifest import (
    DOCKER_MANIFEST,
    INDEX,
    MANIFEST,
    RUN_ID,
    blob_path,
    read_layout,
)
from tuning.oci.layout.package import Built
from tuning.spec import Destination, reference

pytestmark = pytest.mark.registry
PRESET = {"preset": "phi-3-mini-4k-instruct", "run_id": "run-1"}


def remote(host: str, repository: str, tag: str = "1", **more: Any) -> registry.Remote:
    patience = registry.Patience(total=5, first=0.01)
    return registry.Remote(reference.parse(f"{host}/{repository}:{tag}"), patience=patience, **more)


def read(layout: Path, digest: str) -> dict[str, Any]:
    return dict(json.loads(blob_path(layout, digest).read_bytes()))


# -- an index ------------------------------------------------------------------------------------


def test_an_index_holds_three_images_of_the_same_layers(tmp_path):
    """amd64, arm64 and a ModelPack; the weights are there once."""
    plain = adapters.build(tmp_path)
    first = read_layout(tmp_path / "image")
    built = adapters.build(tmp_path, index=True)
    layout = tmp_path / "image"
    index = read(layout, built.digest)

    assert INDEX == index["mediaType"]
    assert first.annotations == index["annotations"]
    assert [
        {"architecture": "amd64", "os": "linux"},
        {"architecture": "arm64", "os": "linux"},
        {"architecture": "unknown", "os": "unknown"},
    ] == [entry["platform"] for entry in index["manifests"]]
    assert plain.digest == index["manifests"][0]["digest"] == read_layout(layout).digest
    manifests = [read(layout, entry["digest"]) for entry in index["manifests"]]
    digests = [[layer["digest"] for layer in each["layers"]] for each in manifests]
    assert digests[0] == digests[1] == digests[2]
    configs = [read(layout, each["config"]["digest"]) for each in manifests[:2]]
    assert ["amd64", "arm64"] == [config["architecture"] for config in configs]
    kept = {f"sha256:{path.name}" for path in (layout / "blobs" / "sha256").iterdir()}
    named = {entry["digest"] for entry in index["manifests"]} | {built.digest}
    assert named | {blob.digest for blob in built.blobs} == kept


def test_the_modelpack_keeps_to_the_cncfs_specification(tmp_path):
    """Its artifact type, config and layers have the media types of the model specification."""
    built = adapters.build(
        tmp_path, index=True, annotations={"org.opencontainers.image.licenses": "MIT"}
    )
    layout = tmp_path / "image"
    entry = read(layout, built.digest)["manifests"][2]
    manifest = read(layout, entry["digest"])
    config = read(layout, manifest["config"]["digest"])

    kind = "application/vnd.cncf.model."
    assert f"{kind}manifest.v1+json" == manifest["artifactType"] == entry["artifactType"]
    assert f"{kind}config.v1+json" == manifest["config"]["mediaType"]
    assert [f"{kind}{part}.v1.tar" for part in ("weight", "weight.config", "doc")] == [
        layer["mediaType"] for layer in manifest["layers"]
    ]
    assert {"descriptor", "config", "modelfs"} == set(config)
    assert {"name": "phi-3-mini-4k-instruct", "licenses": ["MIT"]}.items() <= (
        config["descriptor"].items()
    )
    diff_ids = [layer["digest"] for layer in manifest["layers"]]
    assert {"type": "layers", "diffIds": diff_ids} == config["modelfs"]
    known = {"createdAt", "name", "licenses", "title", "description"}
    assert set(config["descriptor"]) <= known


def test_an_index_is_pushed_whole_and_pulled(started, tmp_path, repository):
    """Every manifest by its digest, the tag last; twice the same sends nothing."""
    built = adapters.build(tmp_path, index=True)
    with Proxy(started.address) as front:
        to = remote(front.host, repository)
        pushed = registry.push(to, tmp_path / "image", run_id="run-1")
        puts = [s.path.rpartition("/")[2] for s in front.seen if "/manifests/" in s.path]
        again = registry.push(to, tmp_path / "image", run_id="run-1")
    pulled = registry.pull(remote(started.host, repository), tmp_path / "out")

    assert built.digest == pushed.digest == again.digest == pulled.digest
    assert 0 == again.bytes_sent
    index = read(tmp_path / "image", built.digest)
    for entry in index["manifests"]:
        assert entry["digest"] in puts
    assert registry.Found(built.digest, "run-1") == registry.look(remote(started.host, repository))
    assert adapters.content(tmp_path / "adapter") == adapters.content(tmp_path / "out")


@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5])
def test_a_push_of_an_index_survives_a_fault_at_each_manifest(started, tmp_path, repository, nth):
    """The answer to a manifest is lost: it ends in the right digest."""
    built = adapters.build(tmp_path, index=True)
    with Proxy(started.address) as front:
        front.spoil(fp.drop_reply, method="PUT", path="/manifests/", nth=nth)
        registry.push(remote(front.host, repository), tmp_path / "image", run_id="run-1")

        assert front.struck()
    assert registry.Found(built.digest, "run-1") == registry.look(remote(started.host, repository))


# -- a base image --------------------------------------------------------------------------------


def base_image(
    to: registry.Remote, *, docker: bool = False, arch: str = "amd64", odd: str = ""
) -> str:
    """A small image with a shell, as Docker or as OCI has it; gives its reference by digest."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, data in (("bin/sh", b"#!"), ("etc/os-release", b"NAME=base")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    plain, packed = tar.getvalue(), gzip.compress(tar.getvalue())
    config = {
        "architecture": arch,
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"], "Labels": {"base": "yes"}},
        "rootfs": {"type": "layers", "diff_ids": [digest_of(plain)]},
        "history": [{"created_by": "base"}],
    }
    kinds = {
        True: (DOCKER_MANIFEST, "application/vnd.docker.container.image.v1+json",
               "application/vnd.docker.image.rootfs.diff.tar.gzip"),
        False: (MANIFEST, "application/vnd.oci.image.config.v1+json",
                "application/vnd.oci.image.layer.v1.tar+gzip"),
    }  # fmt: skip
    kind, config_kind, layer_kind = kinds[docker]
    parts = []
    for data, media_type in (
        (json.dumps(config).encode(), config_kind),
        (packed, odd or layer_kind),
    ):
        url = to.request("POST", "/blobs/uploads/", expect=(202,)).headers["Location"]
        name = digest_of(data)
        to.request("PUT", f"{url}&digest={name}", expect=(201,), body=lambda: data)  # noqa: B023
        parts.append({"mediaType": media_type, "digest": name, "size": len(data)})
    manifest = {"schemaVersion": 2, "mediaType": kind, "config": parts[0], "layers": parts[1:]}
    body = json.dumps(manifest).encode()
    headers = {"Content-Type": kind}
    to.request("PUT", "/manifests/1", expect=(201,), body=lambda: body, headers=headers)
    found = to.reference
    return f"{found.registry}/{found.repository}@{digest_of(body)}"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def package(tmp_path: Path, name: str, output: str | None = None) -> Built:
    source = tmp_path / "adapter"
    if not source.exists():
        adapters.adapter(source)
    destination = Destination(image=output, base_image=name)
    more: dict[str, Any] = {"destination": destination, "access": Access(), "annotations": {}}
    base = adapters.CONFIG["base_model_name_or_path"]
    return delivery.package(source, tmp_path / "image", base_model=base, **PRESET, **more)


@pytest.mark.parametrize("docker", [False, True])
def test_layers_of_a_base_image_come_first(started, tmp_path, repository, docker):
    """Its files, command and labels are there; its name and digest are told; ours pulls as ever."""
    name = base_image(remote(started.host, f"{repository}/base"), docker=docker)
    built = package(tmp_path, name)
    layout = tmp_path / "image"
    found = read_layout(layout)
    config = read(layout, found.config.digest)

    assert built.digest == package(tmp_path, name).digest
    assert 4 == len(found.layers) == len(config["rootfs"]["diff_ids"]) == len(config["history"])
    assert "application/vnd.oci.image.layer.v1.tar+gzip" == found.layers[0].media_type
    assert (["/bin/sh"], ["PATH=/bin"]) == (config["config"]["Cmd"], config["config"]["Env"])
    assert {"base": "yes", RUN_ID: "run-1"}.items() <= config["config"]["Labels"].items()
    told = [found.annotations[f"org.opencontainers.image.base.{key}"] for key in ("name", "digest")]
    assert [name, name.partition("@")[2]] == told
    unpack(found, layout, tmp_path / "out")
    made, out = adapters.content(tmp_path / "adapter"), adapters.content(tmp_path / "out")
    assert adapters.CONFIG == json.loads(made.pop("adapter_config.json"))
    assert adapters.CONFIG == json.loads(out.pop("adapter_config.json"))
    assert made == out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"arch": "arm64"}, "is an image for linux/arm64"),
        (
            {"odd": "application/vnd.oci.image.layer.nondistributable.v1.tar"},
            "not a container image",
        ),
    ],
)
def test_a_base_that_will_not_do(started, tmp_path, repository, more, words):
    """Named, before anything is built."""
    name = base_image(remote(started.host, f"{repository}/base"), **more)

    with pytest.raises(RefusedError, match=f"IMAGE-110 base image {name}: .*{words}"):
        package(tmp_path, name)
    assert not (tmp_path / "image" / "index.json").exists()


def test_blobs_of_a_base_in_the_same_registry_are_mounted(started, tmp_path, repository):
    """Not one byte of them is sent, with a token server that gives rights for both."""
    base = f"{repository}/base"
    name = base_image(remote(started.host, base))
    package(tmp_path, name, f"{started.host}/{repository}:1")
    size = sum(layer.size for layer in read_layout(tmp_path / "image").layers[1:])
    with TokenFront(started) as front:
        login = Login("file", "me", "secret")
        to = remote(front.host, repository, login=login, mount_from=base)
        pushed = registry.push(to, tmp_path / "image", run_id="run-1")

        mounts = [seen for seen in front.seen if "mount=" in seen.path]
        assert {201, 202} == {seen.status for seen in mounts}
        scopes = [seen.path for seen in front.seen if seen.path.startswith("/token")]
        assert f"repository%3A{base.replace('/', '%2F')}%3Apull" in scopes[-1]
    assert size < pushed.bytes_sent < size + 10_000  # our layers and the config
    assert pushed.digest == digest_in(started, repository)


def digest_in(started: Registry, repository: str) -> str | None:
    found = registry.look(remote(started.host, repository))
    return found.digest if found else None


@pytest.mark.parametrize("status", [400, 403, 404, 405])
def test_a_registry_that_mounts_nothing_gets_the_bytes(started, tmp_path, repository, status):
    """A no to a mount is no refusal of the image."""
    adapters.build(tmp_path)
    with Proxy(started.address) as front:
        front.spoil(fp.status(status), method="POST", path="mount=", times=None)
        to = remote(front.host, repository, mount_from="tests/elsewhere")
        pushed = registry.push(to, tmp_path / "image", run_id="run-1")

    assert pushed.digest == digest_in(started, repository)


@pytest.mark.parametrize("fault", [fp.refuse, fp.drop_reply, fp.status(503), fp.status(500)])
def test_a_mount_survives_faults(started, tmp_path, repository, fault):
    """Whatever breaks, the blob is there in the end."""
    adapters.build(tmp_path)
    registry.push(remote(started.host, f"{repository}/first"), tmp_path / "image", run_id="run-1")
    with Proxy(started.address) as front:
        front.spoil(fault, method="POST", path="mount=", nth=2)
        to = remote(front.host, repository, mount_from=f"{repository}/first")
        pushed = registry.push(to, tmp_path / "image", run_id="run-1")

        assert front.struck()
    assert pushed.digest == digest_in(started, repository)
    assert pushed.bytes_sent == 0


def test_a_delivery_mounts_from_its_base_image(started, tmp_path, repository):
    """The destination says where the base is; a run passes nothing else."""
    name = base_image(remote(started.host, f"{repository}/base"))
    with Proxy(started.address) as front:
        near = name.replace(started.host, front.host)
        package(tmp_path, near, f"{front.host}/{repository}:1")
        delivery.deliver(
            Destination(image=f"{front.host}/{repository}:1", base_image=near),
            Access(),
            layout=tmp_path / "image",
            adapter=tmp_path / "adapter",
            run_id="run-1",
            own=(),
            progress=lambda done, total, note: None,
        )

        mounted = [s for s in front.seen if "mount=" in s.path and s.status == 201]
    assert 1 == len(mounted)
