"""inspect: what an adapter is, from a registry, a layout or a folder, without its weights."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import adapters
import pytest
from commands import tuning
from faults.proxy import Proxy
from registries import ReferrersFront, Registry, Signer, tool

from tuning.console import Console
from tuning.errors import RefusedError, SpecError, UsageError
from tuning.oci import delivery, inspection, provenance, registry
from tuning.oci.delivery import Access
from tuning.oci.layout.manifest import MANIFEST, Blob, blob_path, read_layout
from tuning.oci.layout.platforms import MODELPACK
from tuning.oci.policy import Trust
from tuning.spec import reference

pytestmark = pytest.mark.registry
SIZE = 12_000_000
RECORD = {
    "run_id": "run-1",
    "preset": "phi-3-mini-4k-instruct",
    "recipe": {"base_revision": "c" * 40, "method": "qlora", "data": ["d" * 64], "steps": 8},
    "loss_by_step": [[1, 2.0], [8, 0.5]],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of 30 MB and its image."""
    made = tmp_path_factory.mktemp("built")
    adapters.adapter(made / "adapter", size=SIZE)
    (made / "adapter" / "tuning.json").write_text(json.dumps(RECORD))
    adapters.build(made)
    return made


@pytest.fixture
def name(started: Registry, folder: Path, repository: str) -> str:
    found = f"{repository}:1"
    to = registry.Remote(reference.parse(f"{started.host}/{found}"))
    registry.push(to, folder / "image", run_id="run-1")
    return found


def inspect(name: str, **trust: Any) -> dict[str, Any]:
    return inspection.inspect(name, access=Access(trust=Trust(**trust))).to_json()


def check(found: dict[str, Any]) -> None:
    """What is known of the adapter, wherever it lies."""
    assert [] == found["problems"]
    assert ("org/base", "c" * 40, "qlora") == tuple(
        found[key] for key in ("base_model", "base_revision", "method")
    )
    assert (8, 16, ["q_proj"]) == (found["rank"], found["alpha"], found["targets"])
    assert (SIZE // 4, ["F32"]) == (found["parameters"], found["dtypes"])
    assert ("run-1", ["d" * 64], 8, 0.5) == tuple(
        found[key] for key in ("run_id", "data", "steps", "final_loss")
    )


def test_an_image_is_told_without_its_weights(started, folder, name):
    """Base, rank, run and size out of a third of the bytes."""
    with Proxy(started.address) as front:
        found = inspect(f"{front.host}/{name}")
        ranges = [s.headers["range"] for s in front.seen if "range" in s.headers]

    check(found)
    assert read_layout(folder / "image").digest == found["digest"]
    assert ("linux/amd64",) == tuple(found["platforms"])
    assert found["size"] > SIZE and 3 == len(found["layers"])
    assert [f"bytes=0-{inspection.PART - 1}"] == ranges


def test_layouts_and_folders_are_told_alike(folder):
    """The same answers, but for what only an image has."""
    layout, plain = inspect(f"oci:{folder}/image"), inspect(str(folder / "adapter"))

    check(layout)
    check(plain)
    assert (read_layout(folder / "image").digest, None) == (layout["digest"], plain["digest"])


def test_what_is_attached_is_listed_and_signatures_are_judged(started, folder, name, tmp_path):
    """A statement by its kind; a signature is good, wrong, or not checked."""
    signer, other = Signer(tmp_path / "signer"), Signer(tmp_path / "other")
    digest = read_layout(folder / "image").digest
    with ReferrersFront(started) as front:
        to = registry.Remote(reference.parse(f"{front.host}/{name}"))
        subject = Blob(MANIFEST, digest, 1)
        kind = {provenance.PREDICATE_KEY: provenance.PREDICATE}
        registry.attach(to, subject, b"{}", media_type=provenance.MEDIA_TYPE, annotations=kind)
        bundle = "application/vnd.dev.sigstore.bundle.v0.3+json"
        registry.attach(to, subject, signer.bundle(digest), media_type=bundle, annotations={})
        where = f"{front.host}/{name}"
        verdicts = [
            inspect(where, keys=keys)["signatures"]
            for keys in ((), (signer.public,), (other.public,))
        ]
        found = inspect(where)

    assert {provenance.MEDIA_TYPE, bundle} == {each["type"] for each in found["attached"]}
    assert [
        ["not checked: no key given"],
        ["good"],
        ["is not by any of the keys"],
    ] == verdicts


def test_an_index_tells_its_platforms(folder, tmp_path):
    """Both architectures and the ModelPack."""
    adapters.build(tmp_path, index=True)

    found = inspect(f"oci:{tmp_path}/image")

    assert ["linux/amd64", "linux/arm64", MODELPACK] == found["platforms"]


def test_the_table_and_the_json_of_the_command(folder):
    """A line for each thing; problems and unknown things leave no line empty."""
    shown = tuning("inspect", folder / "adapter")
    record = tuning("inspect", folder / "adapter", "--json")

    assert (0, 0) == (shown.returncode, record.returncode), shown.stderr + record.stderr
    assert "org/base" in shown.stdout and "3,000,000 (F32)" in shown.stdout
    assert "None" not in shown.stdout
    check(json.loads(record.stdout))


def test_an_image_of_kaitos_pusher_is_told_too(tmp_path):
    """One gzip layer by GNU tar; no tuning.json, no labels."""
    source = adapters.adapter(tmp_path / "root" / "data")
    for path in source.iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    subprocess.run(
        [tool("tar"), "-c", "-z", "-f", tmp_path / "layer", "-C", source.parent, "data"], check=True
    )
    data = (tmp_path / "layer").read_bytes()
    layout = tmp_path / "layout"
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(content: bytes, kind: str) -> dict[str, Any]:
        name = hashlib.sha256(content).hexdigest()
        (blobs / name).write_bytes(content)
        return {"mediaType": kind, "digest": f"sha256:{name}", "size": len(content)}

    config = put(
        b'{"architecture": "amd64", "os": "linux"}', "application/vnd.oci.image.config.v1+json"
    )
    layer = put(data, "application/vnd.oci.image.layer.v1.tar+gzip")
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config,
        "layers": [layer],
    }
    top = put(json.dumps(manifest).encode(), MANIFEST)
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))

    found = inspect(f"oci:{layout}")

    assert [] == found["problems"]
    assert ("org/base", 8, None) == (found["base_model"], found["rank"], found["run_id"])


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("adapter_config.json", b'{"peft_type": "IA3"}', "MODEL-203"),
        ("adapter_config.json", None, "no adapter_config.json was found"),
        ("adapter_model.safetensors", b"\xff" * 64, "header"),
        ("adapter_model.safetensors", b"\2\0\0\0\0\0\0\0[]", "header|no LoRA"),
        (
            "adapter_model.safetensors",
            b'\x1f\0\0\0\0\0\0\0{"a": {"dtype": 5, "shape": 1}}',
            "header",
        ),
        ("tuning.json", b"[]", "IMAGE-110"),
    ],
)
def test_what_would_not_be_loaded_is_told_as_problems(folder, tmp_path, file, content, words):
    """A look never fails for what is inside; the problems are those that a pull would have."""
    adapter = adapters.adapter(tmp_path / "adapter")
    if content is None:
        (adapter / file).unlink()
        with pytest.raises(UsageError):
            inspect(str(adapter))
        return
    (adapter / file).write_bytes(content)

    found = inspect(str(adapter))

    assert re.search(words, " ".join(found["problems"])), found["problems"]


def test_a_damaged_layout_is_refused(tmp_path):
    """Small layers are checked against their digests."""
    adapters.build(tmp_path)
    blob = read_layout(tmp_path / "image").layers[2]
    path = blob_path(tmp_path / "image", blob)
    path.write_bytes(path.read_bytes()[:-1] + b"!")

    with pytest.raises(RefusedError, match=f"IMAGE-110 .*damaged blob {blob.digest}"):
        inspect(f"oci:{tmp_path}/image")


# -- for which base ------------------------------------------------------------------------------


def test_an_adapter_for_another_base_is_refused_by_name(folder, tmp_path):
    """Both models are named; then nothing is left. Case is no matter, nor is a folder's name."""
    where, more = f"oci:{folder}/image", {"access": Access(), "console": Console()}
    with pytest.raises(SpecError) as caught:
        delivery.pull(where, tmp_path / "a", base="org/other", **more)
    delivery.pull(where, tmp_path / "b", base="Org/Base", **more)
    delivery.pull(where, tmp_path / "c", base=str(tmp_path), **more)

    assert "MODEL-207" in str(caught.value)
    assert "is made for org/base, not for org/other" in str(caught.value)
    assert ["b", "c"] == sorted(path.name for path in tmp_path.iterdir())


def test_a_preset_stands_for_its_hub_id(folder):
    """A folder is judged like an image; the way around the check is named."""
    name, more = str(folder / "adapter"), {"access": Access(), "console": Console()}
    with (
        pytest.raises(SpecError) as caught,
        delivery.at_hand(name, base="phi-3-mini-4k-instruct", **more),
    ):
        pass
    with delivery.at_hand(name, base=None, **more) as found:
        assert folder / "adapter" == found

    assert "not for microsoft/Phi-3-mini-4k-instruct" in str(caught.value)
    assert "--any-base" in str(caught.value)
