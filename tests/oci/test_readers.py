"""Readers of the image: each tool that people pull with gets the very same files.

Against a registry with TLS and htpasswd, and one behind a token server; the plain image and, where
the tool reads one, the index. A tool that this machine lacks is skipped with its name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import adapters
import pytest
from registries import Certificate, Registry, TokenFront

from tuning.network.docker_config import Login
from tuning.oci import registry
from tuning.oci.layout.extract import unpack
from tuning.oci.layout.manifest import RUN_ID, read_documents, read_layout
from tuning.spec import reference

pytestmark = pytest.mark.registry
ME, WORD = "me", "secret"


@dataclass(frozen=True)
class Place:
    """A registry that holds the image and the index, and how a tool gets in."""

    host: str
    certs: Path | None  # a folder with ca.crt, as Docker's certs.d has it

    def name(self, tag: str) -> str:
        return f"{self.host}/team/adapter:{tag}"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layouts of one adapter, and the adapter."""
    folder = tmp_path_factory.mktemp("built")
    adapters.build(folder)
    (folder / "image").rename(folder / "plain")
    adapters.build(folder, index=True)
    (folder / "image").rename(folder / "index")
    return folder


def fill(host: str, built: Path, ca: Path | None = None) -> None:
    for tag in ("plain", "index"):
        name = reference.parse(f"{host}/team/adapter:{tag}")
        registry.push(
            registry.Remote(name, Login("x", ME, WORD), ca=ca), built / tag, run_id="run-1"
        )


@pytest.fixture(scope="module", params=["tls and htpasswd", "token server"])
def place(
    request: pytest.FixtureRequest, built: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("registry")
    if request.param == "token server":
        with Registry(folder) as started, TokenFront(started) as front:
            fill(front.host, built)
            yield Place(front.host, None)
        return
    certificate = Certificate(folder / "tls")
    with Registry(folder, users={ME: WORD}, tls=certificate) as started:
        fill(started.host, built, certificate.ca)
        (folder / "certs").mkdir()
        shutil.copy(certificate.ca, folder / "certs" / "ca.crt")
        yield Place(started.host, folder / "certs")


def program(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is missing, so what it reads is not seen: apt-get install {package}")
    return path


def run(*command: object, **more: object) -> str:
    """What a program prints. It must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return str(done.stdout)


def skopeo(place: Place, *, source: bool = True) -> list[object]:
    prefix = "src-" if source else ""
    trust = ["cert-dir", place.certs] if place.certs else ["tls-verify=false"]
    login = [f"--{prefix}creds", f"{ME}:{WORD}"]
    return [f"--{prefix}{trust[0]}", *trust[1:], *login]


def same(built: Path, folder: Path) -> None:
    assert adapters.content(built / "adapter") == adapters.content(folder)


@pytest.mark.parametrize("tag", ["plain", "index"])
def test_skopeo_inspects(place, built, tag):
    """Digest, layers and labels, as it tells them of every image."""
    name = f"docker://{place.name(tag)}"
    told = json.loads(
        run(program("skopeo", "skopeo"), "inspect", *skopeo(place, source=False), name)
    )

    assert read_documents(built / tag)[-1].blob.digest == told["Digest"]
    assert [layer.digest for layer in read_layout(built / tag).layers] == told["Layers"]
    assert "run-1" == told["Labels"][RUN_ID]


@pytest.mark.parametrize("tag", ["plain", "index"])
def test_skopeo_copies_and_kaitos_puller_unpacks(place, built, tmp_path, tag):
    """Decompressed into a folder, every layer unpacked in order, data moved: KAITO's own steps."""
    pulled, root = tmp_path / "dir", tmp_path / "root"
    root.mkdir()
    copy = [program("skopeo", "skopeo"), "copy", *skopeo(place), "--dest-decompress"]
    run(*copy, f"docker://{place.name(tag)}", f"dir:{pulled}")
    for layer in json.loads((pulled / "manifest.json").read_bytes())["layers"]:
        run("tar", "-x", "-f", pulled / layer["digest"].removeprefix("sha256:"), "-C", root)
    (root / "data").rename(tmp_path / "adapter")

    same(built, tmp_path / "adapter")


@pytest.fixture
def short() -> Iterator[str]:
    """A folder whose name has less than fifty letters, which podman wants."""
    with tempfile.TemporaryDirectory(prefix="p") as folder:
        yield folder


@pytest.mark.parametrize("tag", ["plain", "index"])
def test_podman_pulls(place, built, tmp_path, short, tag):
    """A container can be made of it, and its files copied out: docker create and docker cp."""
    trust = ["--cert-dir", place.certs] if place.certs else ["--tls-verify=false"]
    podman = [
        *(program("podman", "podman"), "--root", tmp_path / "s", "--runroot", short),
        *("--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "none"),
    ]
    run(*podman, "pull", *trust, "--creds", f"{ME}:{WORD}", place.name(tag))
    run(*podman, "create", "--name", "adapter", place.name(tag), "unused")
    for top in ("data", "models"):
        run(*podman, "cp", f"adapter:/{top}", tmp_path / top)
        same(built, tmp_path / top)
    run(*podman, "rm", "adapter")


@pytest.mark.parametrize("tag", ["plain", "index"])
def test_umoci_unpacks(place, built, tmp_path, tag):
    """The layout that skopeo writes, laid down as a root file system; hard links survive."""
    umoci = program("umoci", "umoci")
    where = f"oci:{tmp_path}/layout:{tag}"
    run(program("skopeo", "skopeo"), "copy", *skopeo(place), f"docker://{place.name(tag)}", where)
    run(umoci, "unpack", "--rootless", "--image", f"{tmp_path}/layout:{tag}", tmp_path / "bundle")
    root = tmp_path / "bundle" / "rootfs"

    same(built, root / "data")
    same(built, root / "models")
    weights = [root / top / "adapter_model.safetensors" for top in ("data", "models")]
    assert weights[0].samefile(weights[1])


def test_oras_pulls(built, place, tmp_path, monkeypatch):
    """Its Python client, as it comes: each layer's tar under its digest, bytes as they were."""
    import oras.client

    if place.certs:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(place.certs / "ca.crt"))
    kind = "basic" if place.certs else "token"
    client = oras.client.OrasClient(insecure=place.certs is None, auth_backend=kind)
    client.auth.set_basic_auth(ME, WORD)
    paths = client.pull(target=place.name("plain"), outdir=str(tmp_path / "out"))
    root = tmp_path / "root"
    root.mkdir()
    for path in map(Path, paths):
        run("tar", "-x", "-f", path, "-C", root)

    assert len(read_layout(built / "plain").layers) == len(paths)
    same(built, root / "data")


def test_the_oras_command_pulls(built, place, tmp_path):
    """The layers as files; they have no titles, so that it does not write tars by a name."""
    oras = shutil.which("oras")
    if oras is None:
        pytest.skip("the oras command is missing (Debian has no package): only its library is seen")
    trust = ["--from-ca-file", place.certs / "ca.crt"] if place.certs else ["--from-plain-http"]
    login = ["--from-username", ME, "--from-password", WORD]
    layout = f"{tmp_path}/layout:1"
    run(oras, "copy", *trust, *login, "--to-oci-layout", place.name("plain"), layout)
    found = read_layout(tmp_path / "layout")
    unpack(found, tmp_path / "layout", tmp_path / "out")

    same(built, tmp_path / "out")


@pytest.fixture(scope="module")
def ctr(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """containerd's own client, with a containerd of its own."""
    client, daemon = program("ctr", "containerd"), program("containerd", "containerd")
    if os.geteuid() != 0:
        pytest.skip("containerd runs as root alone, and this is not root")
    folder = tmp_path_factory.mktemp("containerd")
    (folder / "config.toml").write_text(
        f'version = 2\nroot = "{folder}/root"\nstate = "{folder}/state"\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\naddress = "{folder}/socket"\n'
    )
    with (folder / "log").open("wb") as log:
        running = subprocess.Popen(
            [daemon, "--config", folder / "config.toml"], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 20
        while not (folder / "socket").exists():
            if running.poll() is not None or time.monotonic() > deadline:
                pytest.skip(
                    f"containerd does not start here: {(folder / 'log').read_text()[-300:]}"
                )
            time.sleep(0.05)
        yield lambda *command: run(client, "--address", folder / "socket", *command)
    finally:
        running.terminate()
        running.wait()


@pytest.mark.parametrize("tag", ["plain", "index"])
def test_containerd_pulls_and_mounts(ctr, place, built, tmp_path, tag):
    """What kubelets do for an image volume: pulled, unpacked by a snapshotter, mounted."""
    hosts = tmp_path / "hosts" / f"{place.host.replace(':', '_')}_"
    hosts.mkdir(parents=True)
    scheme = "https" if place.certs else "http"
    ca = f'ca = "{place.certs / "ca.crt"}"\n' if place.certs else ""
    url = f"{scheme}://{place.host}"
    (hosts / "hosts.toml").write_text(f'server = "{url}"\n[host."{url}"]\n{ca}')
    name = place.name(tag)
    (tmp_path / "root").mkdir()
    plain = [] if place.certs else ["--plain-http"]
    pull = ["images", "pull", "--hosts-dir", tmp_path / "hosts", *plain, "--user", f"{ME}:{WORD}"]
    ctr(*pull, "--snapshotter", "native", name)
    try:
        ctr("images", "mount", "--snapshotter", "native", name, tmp_path / "root")
    except AssertionError as error:
        if "operation not permitted" in str(error):
            pytest.skip("this machine lets nobody mount, so only the pull is seen")
        raise
    try:
        same(built, tmp_path / "root" / "data")
        same(built, tmp_path / "root" / "models")
    finally:
        ctr("images", "unmount", tmp_path / "root")
