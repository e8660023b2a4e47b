"""Signatures: an image that is not signed by the right key is not unpacked."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapters
import pytest
from faults import proxy as fp
from faults.proxy import Proxy, Reply
from registries import ReferrersFront, Registry, Signer

from tuning import files
from tuning.console import Console
from tuning.errors import RefusedError, SpecError, TransientError
from tuning.oci import delivery, registry, signature
from tuning.oci.delivery import Access
from tuning.oci.layout.manifest import MANIFEST, Blob, read_layout
from tuning.oci.policy import Trust
from tuning.spec import reference

pytestmark = pytest.mark.registry
DIGEST = f"sha256:{'a' * 64}"
OTHER = f"sha256:{'b' * 64}"


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer(tmp_path_factory.mktemp("signer"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer(tmp_path_factory.mktemp("stranger"))


@pytest.fixture
def name(started: Registry, layout: Path, repository: str) -> str:
    """An image of its own in the registry, not signed yet."""
    registry.push(remote(started.host, f"{repository}:1"), layout, run_id="run-1")
    return f"{repository}:1"


def remote(host: str, name: str) -> registry.Remote:
    patience = registry.Patience(total=5, first=0.01)
    return registry.Remote(reference.parse(f"{host}/{name}"), patience=patience)


def leave_simple(to: registry.Remote, digest: str, payload: bytes, written: str) -> None:
    """What cosign 2 leaves: an image of documents under the tag sha256-<digest>.sig."""
    layer = {"mediaType": signature.SIMPLE, "annotations": {signature.ANNOTATION: written}}
    parts = [(b"{}", {"mediaType": "application/vnd.oci.image.config.v1+json"}), (payload, layer)]
    described = [put_blob(to, data) | more for data, more in parts]
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described[0]}
    data = json.dumps(manifest | {"layers": described[1:]}).encode()
    put_manifest(to, f"{digest.replace(':', '-')}.sig", data)


def put_blob(to: registry.Remote, data: bytes) -> dict[str, Any]:
    name = f"sha256:{files.digest(data)}"
    location = to.request("POST", "/blobs/uploads/", expect=(202,)).headers["Location"]
    to.request("PUT", f"{location}&digest={name}", expect=(201,), body=lambda: data)
    return {"digest": name, "size": len(data)}


def put_manifest(to: registry.Remote, name: str, data: bytes) -> None:
    headers = {"Content-Type": MANIFEST}
    to.request("PUT", f"/manifests/{name}", expect=(201,), body=lambda: data, headers=headers)


def leave_bundle(to: registry.Remote, digest: str, bundle: bytes) -> None:
    """What cosign 3 leaves: a bundle that names the image as its subject."""
    subject = Blob(MANIFEST, digest, 1)
    registry.attach(to, subject, bundle, media_type=signature.BUNDLE, annotations={})


def pull(host: str, name: str, target: Path, *keys: Path, rule: Any = "require") -> str:
    access = Access(trust=Trust(signatures=rule, keys=keys))
    return delivery.pull(f"{host}/{name}", target, access=access, console=Console())


# -- good ones -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ec", "rsa", "ed25519"])
def test_every_kind_of_key_that_cosign_makes(tmp_path, kind):
    """Both forms are good under their own key, and for their own image alone."""
    signer = Signer(tmp_path, kind=kind)
    keys = signature.read_keys([signer.public])
    payload, written = signer.simple(DIGEST)
    bundle = signer.bundle(DIGEST)

    assert signature.simple(payload, written, digest=DIGEST, keys=keys) is None
    assert signature.bundle(bundle, digest=DIGEST, keys=keys) is None
    assert "signs another image" == signature.simple(payload, written, digest=OTHER, keys=keys)
    assert "signs another image" in str(signature.bundle(bundle, digest=OTHER, keys=keys))


@pytest.mark.parametrize("way", ["simple", "bundle", "bundle by referrers"])
def test_a_signed_image_is_pulled(started, signer, stranger, layout, name, tmp_path, way):
    """Wherever the signature lies; one good key of several is enough, among foreign signatures."""
    digest = read_layout(layout).digest
    front = ReferrersFront(started) if "referrers" in way else Proxy(started.address)
    with front:
        to = remote(front.host, name)
        if way == "simple":
            leave_simple(to, digest, *signer.simple(digest))
        else:
            leave_bundle(to, digest, stranger.bundle(digest))
            leave_bundle(to, digest, signer.bundle(digest))
        other = Signer(tmp_path / "other").public
        pulled = pull(front.host, name, tmp_path / "out", other, signer.public)

    assert digest == pulled
    assert adapters.content(layout.parent / "adapter") == adapters.content(tmp_path / "out")


# -- refusals ------------------------------------------------------------------------------------


def flip(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def corrupt(reply: Reply) -> None:
    reply.body = flip(reply.content())


TAMPERED: dict[str, tuple[Callable[[Path], str], str]] = {
    "layer": (lambda layout: read_layout(layout).layers[0].digest, "REG-143"),
    "config": (lambda layout: read_layout(layout).config.digest, "REG-143"),
    "manifest": (lambda layout: "/manifests/1$", "SIGN-110|IMAGE-110|REG-136"),  # no JSON: again
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_image_is_refused(started, signer, layout, name, tmp_path, what):
    """A signature covers the manifest, the manifest the config and the layers."""
    digest = read_layout(layout).digest
    leave_simple(remote(started.host, name), digest, *signer.simple(digest))
    find, code = TAMPERED[what]
    with Proxy(started.address) as front:
        front.spoil(fp.edit(corrupt), method="GET", path=find(layout), times=None)
        with pytest.raises((RefusedError, TransientError), match=code):
            pull(front.host, name, tmp_path / "out", signer.public)

    assert not (tmp_path / "out").exists()


def test_a_tampered_signature_is_refused(started, signer, layout, name, tmp_path):
    """Neither bytes that changed in the registry, nor a signature of other bytes."""
    digest = read_layout(layout).digest
    payload, written = signer.simple(digest)
    wrong = base64.b64encode(flip(base64.b64decode(written))).decode()
    leave_simple(remote(started.host, name), digest, payload, wrong)

    with pytest.raises(RefusedError, match=r"SIGN-110.*is not by any of the keys"):
        pull(started.host, name, tmp_path / "out", signer.public)
    assert not (tmp_path / "out").exists()


def test_a_signature_by_another_key_is_refused(started, signer, stranger, layout, name, tmp_path):
    """In both forms."""
    digest = read_layout(layout).digest
    to = remote(started.host, name)
    leave_simple(to, digest, *stranger.simple(digest))
    leave_bundle(to, digest, stranger.bundle(digest))

    with pytest.raises(RefusedError, match=r"has 2 signatures; none is valid.*not by any"):
        pull(started.host, name, tmp_path / "out", signer.public)


def test_an_image_without_a_signature_is_refused(started, signer, layout, name, tmp_path):
    """The text says how to sign it; no blob is fetched."""
    with Proxy(started.address) as front:
        with pytest.raises(RefusedError, match=r"is not signed.*cosign sign --key") as caught:
            pull(front.host, name, tmp_path / "out", signer.public)

        assert [] == [seen for seen in front.seen if "/blobs/" in seen.path]
    assert f"@{read_layout(layout).digest}" in str(caught.value)


def test_a_signature_of_another_image_does_not_count(started, signer, layout, name, tmp_path):
    """Replayed from elsewhere, or a signed statement that is no signature of an image."""
    digest = read_layout(layout).digest
    to = remote(started.host, name)
    leave_simple(to, digest, *signer.simple(OTHER))
    leave_bundle(to, digest, signer.bundle(digest, predicateType="https://slsa.dev/provenance/v1"))
    leave_bundle(to, digest, signer.bundle(OTHER))

    with pytest.raises(RefusedError, match="has 3 signatures"):
        pull(started.host, name, tmp_path / "out", signer.public)


def test_a_tag_that_moves_after_the_look_changes_nothing(started, signer, layout, name, tmp_path):
    """What was judged is what is fetched: by digest, whatever the tag says meanwhile."""
    digest = read_layout(layout).digest
    leave_simple(remote(started.host, name), digest, *signer.simple(digest))
    adapters.build(tmp_path / "evil", run_id="run-2", seed=1)

    def move() -> None:
        to = remote(started.host, name)
        evil = tmp_path / "evil" / "image"
        registry.push(to, evil, run_id="run-2", on_tag_exists="overwrite")

    with Proxy(started.address) as front:
        front.spoil(fp.run(move), method="GET", path=r"\.sig$")
        pull(front.host, name, tmp_path / "out", signer.public)

        assert front.struck()
    assert adapters.content(layout.parent / "adapter") == adapters.content(tmp_path / "out")


def test_a_warning_is_told_and_the_image_comes(started, signer, name, tmp_path, capsys):
    """warn: one line; off: none, and nobody is asked for signatures."""
    pull(started.host, name, tmp_path / "warned", signer.public, rule="warn")
    warned = capsys.readouterr().err
    pull(started.host, name, tmp_path / "off", rule="off")

    assert "SIGN-110" in warned and "is not signed" in warned
    assert "SIGN" not in capsys.readouterr().err
    assert (tmp_path / "warned").is_dir() and (tmp_path / "off").is_dir()


def test_a_layout_folder_has_no_signatures(layout, signer, tmp_path):
    """Where they are required, only a registry will do."""
    access = Access(trust=Trust(signatures="require", keys=(signer.public,)))
    with pytest.raises(RefusedError, match=r"SIGN-110.*has no signatures"):
        delivery.pull(f"oci:{layout}", tmp_path / "out", access=access, console=Console())


def test_a_data_image_needs_a_signature_too(started, signer, name, tmp_path):
    """The rule is for every image that is pulled."""
    access = Access(trust=Trust(signatures="require", keys=(signer.public,)))
    with pytest.raises(RefusedError, match="SIGN-110"):
        access.pull_data(f"{started.host}/{name}", tmp_path / "out")
    replace(access, trust=Trust()).pull_data(f"{started.host}/{name}", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"no PEM", None])
def test_a_file_that_is_no_key(tmp_path, content):
    """Named, with what cosign calls it."""
    path = tmp_path / "key.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=r"SIGN-101 .*key\.pem: is not a public key.*cosign\.pub"):
        signature.read_keys([path])


@pytest.mark.parametrize(
    "bundle",
    [
        b"",
        b"[]",
        b"{}",
        b'{"dsseEnvelope": 1}',
        b'{"dsseEnvelope": {"payload": "e30=", "payloadType": "x", "signatures": []}}',
        b'{"dsseEnvelope": {"payload": "!", "payloadType": "application/vnd.in-toto+json",'
        b' "signatures": [{"sig": 5}]}}',
        b'{"dsseEnvelope": {"payload": "e30=", "payloadType": "application/vnd.in-toto+json",'
        b' "signatures": [{"sig": ""}]}}',
    ],
)
def test_odd_bundles_are_no_signatures(signer, bundle):
    """A reason, not a traceback."""
    keys = signature.read_keys([signer.public])

    assert signature.bundle(bundle, digest=DIGEST, keys=keys) is not None
    assert signature.simple(bundle, "e30=", digest=DIGEST, keys=keys) is not None
