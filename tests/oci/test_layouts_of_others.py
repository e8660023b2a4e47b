"""Layouts as other tools read and write them: names of images, several in one, many layers."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import adapters
import pytest
from fake_hub import MODEL, tensors
from faults import proxy as fp
from faults.proxy import Proxy
from registries import Registry, tool

from tuning.console import Console
from tuning.errors import RefusedError
from tuning.oci import delivery, inspection, model_image, registry
from tuning.oci.delivery import Access
from tuning.oci.layout.extract import unpack
from tuning.oci.layout.manifest import MOST_LAYERS, layout_of, read_layout
from tuning.oci.layout.package import build_model
from tuning.spec import reference

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layouts, `small` and `large`, and `both`, to which skopeo has copied them."""
    folder = tmp_path_factory.mktemp("two")
    for seed, name in enumerate(("small", "large")):
        adapters.build(folder / name, seed=seed, size=4096, run_id=name)
        shutil.move(folder / name / "image", folder / f"{name}-image")
        copy = [tool("skopeo"), "copy", f"oci:{folder}/{name}-image", f"oci:{folder}/both:{name}"]
        subprocess.run(copy, check=True, capture_output=True)
    return folder


def test_other_tools_find_the_image_by_its_name(two: Path, tmp_path: Path) -> None:
    """skopeo and umoci ask for one; the image's digest is what it was without."""
    layout = two / "small-image"
    shown = [tool("skopeo"), "inspect", f"oci:{layout}:latest", "--format", "{{.Digest}}"]
    digest = subprocess.run(shown, capture_output=True, text=True, check=True).stdout.strip()

    assert read_layout(layout).digest == digest
    if umoci := shutil.which("umoci"):
        listed = subprocess.run([umoci, "ls", "--layout", layout], capture_output=True, text=True)
        assert "latest" == listed.stdout.strip()
        unpacked = [umoci, "unpack", "--rootless", "--image", f"{layout}:latest", tmp_path / "out"]
        subprocess.run(unpacked, check=True, capture_output=True)
        assert (tmp_path / "out/rootfs/data/adapter_config.json").is_file()


@pytest.mark.parametrize("name", ["small", "large"])
def test_an_image_among_several_is_chosen_by_its_name(two: Path, tmp_path: Path, name: str) -> None:
    """By every reader of layouts."""
    named = f"oci:{two}/both:{name}"
    shown = [tool("skopeo"), "inspect", named, "--format", "{{.Digest}}"]
    digest = subprocess.run(shown, capture_output=True, text=True, check=True).stdout.strip()

    assert digest == delivery.pull(named, tmp_path / "out", access=Access(), console=QUIET)
    found = inspection.inspect(named, access=Access())
    assert (digest, name) == (found.digest, found.to_json()["run_id"])


@pytest.mark.parametrize(("name", "words"), [("", "several"), (":other", "has no other, only")])
def test_without_a_name_none_of_several_is_taken(
    two: Path, tmp_path: Path, name: str, words: str
) -> None:
    """The first would be a guess; the names that can be written are listed."""
    for read in (
        lambda: delivery.pull(
            f"oci:{two}/both{name}", tmp_path / "x", access=Access(), console=QUIET
        ),
        lambda: inspection.inspect(f"oci:{two}/both{name}", access=Access()),
        lambda: model_image.config(f"oci:{two}/both{name}", access=Access()),
    ):
        with pytest.raises(RefusedError, match=f"IMAGE-111 .*{words}.*large, small"):
            read()


def test_a_folder_with_a_colon_is_a_folder(tmp_path: Path) -> None:
    """A name after the last colon is looked for only where there is no such folder."""
    (tmp_path / "a:b").mkdir()

    assert (tmp_path / "a:b", None) == layout_of(f"oci:{tmp_path}/a:b")
    assert (tmp_path, "c") == layout_of(f"oci:{tmp_path}:c")
    assert (tmp_path / "x:c", None) == layout_of(f"oci:{tmp_path}/x:c")


@pytest.mark.parametrize("count", [1, 125, 126, 300])
def test_a_model_of_many_files_has_no_more_layers_than_runtimes_take(
    tmp_path: Path, count: int
) -> None:
    """Each file a layer as long as that fits; then several share one, and all come back."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_bytes(MODEL[name])
    for number in range(count):
        part = tensors({f"t{number}": ("F32", [1], bytes(4))})
        (model / f"model-{number:05}.safetensors").write_bytes(part)

    build_model(model, tmp_path / "image", annotations={})
    image = read_layout(tmp_path / "image")
    unpack(image, tmp_path / "image", tmp_path / "out", wanted=model_image.wanted)

    assert len(image.layers) <= MOST_LAYERS
    assert len(image.layers) == 1 + count or count > 125
    assert adapters.content(model) == adapters.content(tmp_path / "out")


@pytest.fixture(scope="module")
def pushed(started: Registry, two: Path) -> Iterator[str]:
    remote = registry.Remote(reference.parse(f"{started.host}/tests/two:1"))
    registry.push(remote, two / "small-image", run_id="small")
    yield remote.reference.repository


@pytest.mark.registry
@pytest.mark.parametrize(
    "link", ['</v2/{}/next>; rel="next"', "<http://{host}/v2/{}/next>;rel=next"]
)
def test_the_second_page_of_attachments_is_read(
    started: Registry, two: Path, pushed: str, link: str
) -> None:
    """A registry may list them a few at a time, with a relative or a whole address."""

    def page(number: int) -> bytes:
        entry = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 1}
        entry |= {"digest": f"sha256:{number:064}", "artifactType": "application/x"}
        return json.dumps({"manifests": [entry]}).encode()

    with Proxy(started.address) as front:
        follow = {"link": link.format(pushed, host=front.host)}
        front.spoil(fp.status(200, page(1), **follow), path="/referrers/", times=None)
        front.spoil(fp.status(200, page(2)), path="/next$", times=None)
        remote = registry.Remote(reference.parse(f"{front.host}/{pushed}:1"))
        found = registry.attached(remote, read_layout(two / "small-image").digest)

    assert [f"sha256:{n:064}" for n in (1, 2)] == [each.digest for each in found]


@pytest.mark.registry
def test_a_list_of_attachments_that_never_ends_is_left(started: Registry, pushed: str) -> None:
    """A page that names itself as the next."""
    with Proxy(started.address) as front:
        again = f'</v2/{pushed}/referrers/x>; rel="next"'
        front.spoil(
            fp.status(200, b'{"manifests": []}', link=again), path="/referrers/", times=None
        )
        remote = registry.Remote(reference.parse(f"{front.host}/{pushed}:1"))

        assert () == registry.attached(remote, "sha256:" + "0" * 64)
        assert len(front.seen) < 60


@pytest.mark.registry
def test_a_pull_that_is_stopped_leaves_nothing(
    started: Registry, pushed: str, tmp_path: Path
) -> None:
    """SIGTERM in the middle of a download: exit code 75, and no scratch folder."""
    with Proxy(started.address) as front:
        front.spoil(lambda turn: time.sleep(30), method="GET", path="/blobs/", times=None)
        command = [sys.executable, "-m", "tuning", "pull", f"{front.host}/{pushed}:1", "out"]
        child = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not any("/blobs/" in seen.path for seen in front.seen):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        during = list(tmp_path.iterdir())
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=30)

    assert during and [] == list(tmp_path.iterdir())
    assert (75, False) == (child.returncode, "Traceback" in said)


@pytest.mark.registry
@pytest.mark.parametrize("command", ["pull", "inspect"])
def test_a_command_shows_the_registrys_words(tmp_path: Path, command: str) -> None:
    """The whole way, in a process of its own: one line on stderr, exit code 12."""
    with Proxy(("127.0.0.1", 9)) as front:
        front.spoil(fp.status(401, b"ask the desk", www_authenticate="Negotiate"), times=None)
        arguments = [f"{front.host}/team/x:1", *(["out"] if command == "pull" else [])]
        run = [sys.executable, "-m", "tuning", command, *arguments]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert 12 == done.returncode
    assert done.stderr.startswith("REG-121") and "ask the desk" in done.stderr
    assert 1 == len(done.stderr.splitlines())
