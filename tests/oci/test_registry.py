"""Registry: one right digest whatever happens in between, against a real docker-registry."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapters
import pytest
from faults import proxy as fp
from faults.proxy import Fault, Proxy, Reply
from registries import Certificate, Registry, TokenFront, tool

from tuning.errors import RefusedError, SpecError, TransientError, TuningError
from tuning.network.docker_config import Login
from tuning.oci import delivery, registry
from tuning.oci.layout.manifest import INDEX, MANIFEST, blob_path, read_layout
from tuning.spec import Destination, reference

pytestmark = pytest.mark.registry

FAST = registry.Patience(total=20, first=0.01)
IMPATIENT = registry.Patience(total=0.3, first=0.01)
ME = Login("push.json auths[127.0.0.1]", "me", "secret")


@pytest.fixture(scope="module")
def open_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that asks for no login; tests use repositories of their own."""
    with Registry(tmp_path_factory.mktemp("registry")) as started:
        yield started


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout folder of an image that the run `run-1` made."""
    folder = tmp_path_factory.mktemp("built")
    adapters.build(folder)
    return folder / "image"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout folder of an image that another run made."""
    folder = tmp_path_factory.mktemp("other")
    adapters.build(folder, run_id="run-2", seed=1)
    return folder / "image"


@pytest.fixture
def proxied(open_registry: Registry) -> Iterator[Proxy]:
    """The registry behind a proxy that can be spoiled."""
    with Proxy(open_registry.address) as proxy:
        yield proxy


def remote(host: str, repository: str, *, tag: str = "1", **more: Any) -> registry.Remote:
    """A repository, with pieces so small that the weights take four."""
    settings = {"patience": FAST, "chunk": 1 << 16} | more
    name = f"{host}/{repository}{tag if tag[0] == '@' else f':{tag}'}"
    return registry.Remote(reference.parse(name), **settings)


def push(to: registry.Remote, layout: Path, **more: Any) -> registry.Pushed:
    return registry.push(to, layout, run_id=read_layout(layout).run_id or "", **more)


def digest(layout: Path) -> str:
    return read_layout(layout).digest


def held(started: Registry, repository: str, tag: str = "1") -> str | None:
    """What the tag holds, seen without the proxy."""
    found = registry.look(remote(started.host, repository, tag=tag))
    return found.digest if found else None


def size(layout: Path) -> int:
    return sum(blob.size for blob in read_layout(layout).blobs)


# -- push and pull -----------------------------------------------------------------------------


def test_what_is_pushed_is_what_skopeo_sees_and_what_is_pulled(
    open_registry, built, repository, tmp_path
):
    """The digest of the layout is the tag's; every file comes back; all of it was reported."""
    to, seen = remote(open_registry.host, repository), []

    pushed = push(to, built, progress=lambda done, total, note: seen.append((done, total)))
    pulled = registry.pull(to, tmp_path / "out")

    command = [tool("skopeo"), "inspect", "--tls-verify=false", "--format", "{{.Digest}}"]
    shown = subprocess.run(
        [*command, f"docker://{to.reference}"], capture_output=True, text=True, check=True
    )
    assert digest(built) == pushed.digest == pulled.digest == shown.stdout.strip()
    assert adapters.content(built.parent / "adapter") == adapters.content(tmp_path / "out")
    assert (size(built), size(built)) == seen[-1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_same_push_again_sends_nothing(proxied, built, repository):
    """An unchanged image costs a few questions and not one byte of a blob."""
    to = remote(proxied.host, repository)
    first = push(to, built)
    proxied.seen.clear()

    again = push(to, built)

    assert (size(built), 0) == (first.bytes_sent, again.bytes_sent)
    assert {"GET", "HEAD", "PUT"} >= {seen.method for seen in proxied.seen}
    assert proxied.received() == len(blob_path(built, digest(built)).read_bytes())


def test_a_pull_by_digest_and_of_an_index_and_of_an_index_within_one(
    open_registry, built, repository, tmp_path
):
    """An index leads to its image, and the digest told is the one that was named."""
    plain = remote(open_registry.host, repository)
    push(plain, built)
    size = len(blob_path(built, digest(built)).read_bytes())
    entry = {"mediaType": MANIFEST, "digest": digest(built), "size": size}
    inner = put_index(plain, "inner", entry | {"platform": {"os": "linux", "architecture": "x"}})
    outer = put_index(plain, "outer", inner)

    names = {f"@{digest(built)}": digest(built), "inner": inner["digest"], "outer": outer["digest"]}
    for name, expected in names.items():
        target = tmp_path / name
        pulled = registry.pull(remote(open_registry.host, repository, tag=name), target)
        assert (expected, digest(built)) == (pulled.digest, pulled.image.digest)
        assert adapters.content(built.parent / "adapter") == adapters.content(target)


def put_index(to: registry.Remote, tag: str, entry: dict[str, Any]) -> dict[str, Any]:
    """An index of one entry under `tag`; gives its descriptor."""
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}
    data, headers = json.dumps(index).encode(), {"Content-Type": INDEX}
    to.request("PUT", f"/manifests/{tag}", expect=(201,), body=lambda: data, headers=headers)
    name = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return {"mediaType": INDEX, "digest": name, "size": len(data)}


def test_kaitos_puller_gets_the_files(open_registry, built, repository, tmp_path):
    """skopeo to a folder, `tar x` of every layer in order, `data` moved away: KAITO's own steps."""
    to = remote(open_registry.host, repository)
    push(to, built)
    pulled, unpacked = tmp_path / "dir", tmp_path / "unpacked"
    unpacked.mkdir()

    command = [tool("skopeo"), "copy", "--src-tls-verify=false", "--dest-decompress"]
    subprocess.run([*command, f"docker://{to.reference}", f"dir:{pulled}"], check=True)
    manifest = json.loads((pulled / "manifest.json").read_bytes())
    for layer in manifest["layers"]:
        file = pulled / layer["digest"].removeprefix("sha256:")
        subprocess.run([tool("tar"), "-x", "-f", file, "-C", unpacked], check=True)

    expected = adapters.content(built.parent / "adapter")
    assert expected == adapters.content(unpacked / "data")
    assert expected == adapters.content(unpacked / "models")
    weights = [unpacked / top / "adapter_model.safetensors" for top in ("data", "models")]
    assert weights[0].samefile(weights[1])  # a hard link: stored once


def test_an_image_of_kaitos_pusher_can_be_pulled(open_registry, repository, tmp_path):
    """One gzip layer by GNU tar with two files under data/, and a config with diff_ids alone."""
    source = adapters.adapter(tmp_path / "source")
    data = tmp_path / "root" / "data"
    data.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (data / name).write_bytes((source / name).read_bytes())
    plain = tmp_path / "layer.tar"
    subprocess.run([tool("tar"), "-c", "-f", plain, "-C", data.parent, "data"], check=True)
    diff_id = subprocess.run(["sha256sum", plain], capture_output=True, text=True, check=True)
    subprocess.run(["gzip", "-9", plain], check=True)
    config = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id.stdout[:64]}"]},
    }
    to = remote(open_registry.host, repository)
    put_image(to, config=json.dumps(config).encode(), layer=Path(f"{plain}.gz").read_bytes())

    pulled = registry.pull(to, tmp_path / "out")

    assert adapters.content(data) == adapters.content(tmp_path / "out")
    assert ("adapter_config.json", "adapter_model.safetensors") == pulled.files


def put_image(to: registry.Remote, *, config: bytes, layer: bytes) -> None:
    """An image by hand: one gzip layer."""
    parts = []
    for data, kind in ((config, "config.v1+json"), (layer, "layer.v1.tar+gzip")):
        name = f"sha256:{hashlib.sha256(data).hexdigest()}"
        answer = to.request("POST", "/blobs/uploads/", expect=(202,))
        url = f"{answer.headers['Location']}&digest={name}"
        to.request("PUT", url, expect=(201,), body=lambda: data)  # noqa: B023
        media_type = f"application/vnd.oci.image.{kind}"
        parts.append({"mediaType": media_type, "digest": name, "size": len(data)})
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST}
    manifest |= {"config": parts[0], "layers": parts[1:]}
    body, headers = json.dumps(manifest).encode(), {"Content-Type": MANIFEST}
    to.request("PUT", "/manifests/1", expect=(201,), body=lambda: body, headers=headers)


def test_a_check_leaves_nothing_behind(open_registry, repository):
    """An upload is begun and given up: no tag, no blob, no upload."""
    registry.check_push(remote(open_registry.host, repository))

    assert held(open_registry, repository) is None
    uploads = open_registry.folder.glob(
        f"data/docker/registry/v2/repositories/{repository}/**/data"
    )
    assert [] == list(uploads)


# -- the tag -----------------------------------------------------------------------------------


def test_a_tag_of_somebody_else_is_not_touched(open_registry, built, other, repository):
    """Refused before a byte is sent, with both ways out named."""
    to = remote(open_registry.host, repository)
    push(to, other)

    with pytest.raises(RefusedError) as caught:
        push(to, built)

    assert "REG-140" in str(caught.value) and digest(other) in str(caught.value)
    assert "on-tag-exists: overwrite" in str(caught.value)
    assert digest(other) == held(open_registry, repository)


@pytest.mark.parametrize("way", ["own", "overwrite"])
def test_a_tag_is_replaced_where_that_is_wanted(open_registry, built, other, repository, way):
    """A digest recorded as an earlier output, or the word overwrite."""
    to = remote(open_registry.host, repository)
    push(to, other)

    push(to, built, **({"own": (digest(other),)} if way == "own" else {"on_tag_exists": way}))

    assert digest(built) == held(open_registry, repository)


def test_an_earlier_output_of_the_workspace_is_replaced(open_registry, built, other, repository):
    """What the operator recorded in the status counts like what the run directory remembers."""
    to = remote(open_registry.host, repository)
    push(to, other)
    name = f"{open_registry.host}/{repository}:1"
    terms = {"access": delivery.Access(), "run_id": "run-1", "own": ()}

    with pytest.raises(RefusedError, match="REG-140"):
        delivery.claim(Destination(image=name), **terms)
    earlier = Destination(image=name, earlier=(digest(other),))
    assert delivery.claim(earlier, **terms) is None


def test_a_look_tells_whose_image_it_is(open_registry, built, repository, tmp_path):
    """Nothing, an image of ours with its run id, or somebody's artifact without one."""
    to = remote(open_registry.host, repository)
    before = registry.look(to)
    push(to, built)

    assert before is None
    assert registry.Found(digest(built), "run-1") == registry.look(to)
    terms = {"own": (), "on_tag_exists": "refuse"}
    assert registry.Found(digest(built), "run-1") == registry.claim(to, run_id="run-1", **terms)
    assert registry.claim(to, run_id=None, **terms) is None
    with pytest.raises(RefusedError, match="REG-140"):
        registry.claim(to, run_id="run-2", **terms)


def test_somebody_who_comes_in_between_is_not_overwritten(
    open_registry, proxied, built, other, repository
):
    """The tag is looked at again right before it is written."""
    direct = remote(open_registry.host, repository)
    meanwhile = fp.run(lambda: push(direct, other))
    proxied.spoil(meanwhile, method="PUT", path="/manifests/sha256:")

    with pytest.raises(RefusedError, match="REG-140"):
        push(remote(proxied.host, repository), built)

    assert digest(other) == held(open_registry, repository)


def test_racing_pushes_leave_one_whole_image(open_registry, built, other, repository):
    """Two runs push to one tag at once: the tag holds one of them, and its pusher knows."""
    for tag in map(str, range(10)):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            jobs = {
                digest(layout): pool.submit(
                    push, remote(open_registry.host, repository, tag=tag), layout
                )
                for layout in (built, other)
            }
        won = {name for name, job in jobs.items() if not job.exception()}
        lost = [job.exception() for job in jobs.values() if job.exception()]

        now = held(open_registry, repository, tag)
        assert now in won
        assert all(isinstance(error, RefusedError) for error in lost)


@pytest.mark.parametrize(
    ("status", "code"), [(400, "TAG_INVALID"), (409, "DENIED"), (412, "PRECONDITION"), (403, "")]
)
def test_an_immutable_tag_that_holds_our_image_is_success(
    proxied, open_registry, built, repository, status, code
):
    """Registries with immutable tags answer an error even to the same bytes."""
    push(remote(open_registry.host, repository), built)
    no = json.dumps({"errors": [{"code": code}]}).encode()
    proxied.spoil(fp.status(status, no), method="PUT", times=None)
    hide_tag_once = fp.status(404)
    proxied.spoil(hide_tag_once, method="GET", path="/manifests/1", nth=2)

    pushed = push(remote(proxied.host, repository), built)

    assert digest(built) == pushed.digest


# -- faults ------------------------------------------------------------------------------------

REQUESTS = {
    "look": ("GET", "/manifests/1", 1),
    "head": ("HEAD", "/blobs/", 2),
    "post": ("POST", "/uploads/", 2),
    "patch": ("PATCH", "/uploads/", 2),
    "blob": ("PUT", "/uploads/", 2),
    "manifest": ("PUT", "/manifests/sha256:", 1),
    "tag": ("PUT", "/manifests/1", 1),
    "verify": ("GET", "/manifests/1", 4),  # the second is the first again, with the login
}
TOLD = {"retry_after": 0}
FAULTS: dict[str, Fault | None] = {
    "refused": fp.refuse,
    "reset-early": fp.reset_after(1),
    "reset-late": fp.reset_after(40_000),
    "reply-lost": fp.drop_reply,
    "reply-cut": fp.cut_reply(0),
    "401": fp.status(401, www_authenticate='Basic realm="x"'),
    "429": fp.status(429, **TOLD),
    "500-once": fp.status(500),
    "503": fp.status(503, b"<html>nginx</html>"),
    "restart": None,  # the registry is killed and started again
}


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry with a login, that tests may kill and start again."""
    with Registry(tmp_path_factory.mktemp("mortal"), users={"me": "secret"}) as started:
        yield started


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("request_", REQUESTS)
def test_a_push_survives_each_fault_at_each_request(mortal, built, repository, request_, fault):
    """8 requests x 10 faults: the right digest under the tag, at most twice the bytes."""
    method, path, nth = REQUESTS[request_]

    def restart() -> None:
        mortal.kill()
        mortal.start()

    with Proxy(mortal.address) as proxy:
        spoiled = FAULTS[fault] or fp.run(restart, then=fp.drop_reply)
        proxy.spoil(spoiled, method=method, path=path, nth=nth)
        pushed = push(remote(proxy.host, repository, login=ME), built)

    assert proxy.struck(), [str(seen) for seen in proxy.seen]
    there = registry.look(remote(mortal.host, repository, login=ME))
    assert registry.Found(digest(built), "run-1") == there
    assert digest(built) == pushed.digest
    assert {blob.digest for blob in read_layout(built).blobs} <= mortal.blobs()
    assert proxy.received() <= 2 * size(built)


@pytest.mark.parametrize("nth", [1, 6, 12, 20])
def test_a_registry_that_is_down_for_a_while_is_waited_for(
    proxied, open_registry, built, repository, nth
):
    """Ten requests in a row find nobody; then it goes on, and nothing is sent twice in vain."""
    proxied.spoil(fp.refuse, nth=nth, times=10)

    pushed = push(remote(proxied.host, repository), built)

    assert digest(built) == pushed.digest == held(open_registry, repository)
    assert proxied.struck() and proxied.received() <= 2 * size(built)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 522])
def test_trouble_that_lasts_is_transient_and_names_the_request(proxied, built, repository, status):
    """Exit code 20 after patience, not 12, and the tag is untouched."""
    proxied.spoil(fp.status(status), method="POST", times=None)

    with pytest.raises(TransientError) as caught:
        push(remote(proxied.host, repository, patience=IMPATIENT), built)

    assert f"answered {status} to POST" in str(caught.value)
    assert 2 == sum(seen.method == "POST" for seen in proxied.seen) or status != 500


def test_retry_after_is_honoured_and_capped(proxied, built, repository):
    """Seconds or a date as the registry says, but never longer than two minutes."""
    waits: list[float] = []
    patience = registry.Patience(total=1e6, first=0.0, sleep=waits.append)
    for nth, told in enumerate(["7", "86400", "Fri, 01 Jan 2027 00:00:00 GMT"], 1):
        proxied.spoil(fp.status(429, retry_after=told), method="POST", nth=nth)

    registry.check_push(remote(proxied.host, repository, patience=patience))

    assert [7.0, 120.0, 120.0] == waits


@pytest.mark.parametrize(
    ("status", "body", "code", "words"),
    [
        (403, '{"errors":[{"code":"DENIED","message":"no push"}]}', "REG-122", "no push"),
        (403, '{"errors":[{"code":"DENIED","message":"quota"}]}', "REG-128", "quota"),
        (404, '{"errors":[{"code":"NAME_UNKNOWN"}]}', "REG-123", "made first"),
        (405, '{"errors":[{"code":"UNSUPPORTED"}]}', "REG-129", "read-only"),
        (413, "<html>too large</html>", "REG-124", "limit"),
        (418, "", "REG-125", "418"),
        (507, "", "REG-128", "quota"),
    ],
)
def test_a_final_no_is_not_tried_again(proxied, built, repository, status, body, code, words):
    """Exit code 12 after one try; the text says who must change what."""
    proxied.spoil(fp.status(status, body.encode()), method="POST", times=None)

    with pytest.raises(RefusedError) as caught:
        push(remote(proxied.host, repository), built)

    assert code in str(caught.value) and words in str(caught.value)
    assert f"{proxied.host}/{repository}:1" in str(caught.value)
    assert 1 == sum(seen.method == "POST" for seen in proxied.seen)


def test_a_registry_that_takes_no_pieces_gets_blobs_whole(
    proxied, open_registry, built, repository
):
    """405 to a PATCH is no refusal of the image."""
    proxied.spoil(fp.status(405), method="PATCH", times=None)

    push(remote(proxied.host, repository), built)

    assert digest(built) == held(open_registry, repository)
    assert 1 == sum(seen.method == "PATCH" for seen in proxied.seen)


def test_a_piece_at_a_wrong_place_is_seen(proxied, open_registry, built, repository):
    """docker-registry takes it; its Range header tells, and the blob is sent again."""

    def lie(reply: Reply) -> None:
        reply.replace("Range", "0-17")

    proxied.spoil(fp.edit(lie), method="PATCH", nth=2)

    push(remote(proxied.host, repository), built)

    assert digest(built) == held(open_registry, repository)
    assert 3 == sum(seen.path.partition("?")[0].endswith("/uploads/") for seen in proxied.seen) - 2


def test_credentials_stay_with_the_registry(mortal, built, repository):
    """An upload that goes on at another host goes there without a login."""
    with Proxy(mortal.address) as near, Proxy(mortal.address) as far:

        def elsewhere(reply: Reply) -> None:
            location = reply.header("location").replace(near.host, f"localhost:{far.port}")
            reply.replace("Location", location)

        near.spoil(fp.edit(elsewhere), method="POST", path="/uploads/", times=None)

        with pytest.raises(RefusedError, match="REG-121"):
            push(remote(near.host, repository, login=ME), built)

    assert far.seen
    assert [] == [seen for seen in far.seen if "authorization" in seen.headers]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_blob_may_lie_elsewhere(open_registry, built, repository, tmp_path, status):
    """A pull follows redirects to a store, without the login."""
    push(remote(open_registry.host, repository), built)
    with Proxy(open_registry.address) as near, Proxy(open_registry.address) as store:
        for blob in read_layout(built).blobs:
            url = f"http://localhost:{store.port}/v2/{repository}/blobs/{blob.digest}"
            near.spoil(fp.status(status, location=url), method="GET", path=blob.digest)

        registry.pull(remote(near.host, repository, login=ME), tmp_path / "out")

    assert len(read_layout(built).blobs) == len(store.seen)
    assert [] == [seen for seen in store.seen if "authorization" in seen.headers]


def test_a_redirect_that_never_ends_is_refused(proxied, built, repository):
    """Five are followed, the sixth is an answer that nobody wanted."""
    url = f"/v2/{repository}/manifests/1"
    proxied.spoil(fp.status(307, location=url), path="/manifests/", times=None)

    with pytest.raises(RefusedError, match=r"REG-125.*answered 307"):
        registry.look(remote(proxied.host, repository))
    assert 6 == len(proxied.seen)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ({"method": "GET", "path": "/manifests/1", "nth": 3}, "shows the tag as"),
        ({"method": "GET", "path": "/manifests/1", "nth": 3, "times": None}, "already holds"),
    ],
)
def test_a_registry_that_shows_something_else_never_succeeds(
    proxied, built, repository, spoil, words
):
    """The tag is read back and hashed."""

    def corrupt(reply: Reply) -> None:
        reply.body = reply.content().replace(b"run-1", b"run-7")

    proxied.spoil(fp.edit(corrupt), **spoil)

    with pytest.raises(RefusedError, match=words):
        push(remote(proxied.host, repository), built)


def test_a_blob_that_the_registry_lost_is_noticed(proxied, built, repository):
    """Every blob is asked for again at the end."""
    blobs = len(read_layout(built).blobs)
    proxied.spoil(fp.status(404), method="HEAD", path="/blobs/", nth=blobs + 2, times=None)

    with pytest.raises(TransientError, match="does not show the blob"):
        push(remote(proxied.host, repository), built)


def test_a_manifest_whose_blob_vanished_brings_it_back(proxied, open_registry, built, repository):
    """MANIFEST_BLOB_UNKNOWN: the blobs are asked for and sent again."""
    no = b'{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN"}]}'
    proxied.spoil(fp.status(400, no), method="PUT", path="/manifests/sha256:")

    push(remote(proxied.host, repository), built)

    assert digest(built) == held(open_registry, repository)


def test_a_damaged_layout_is_not_the_registrys_fault(open_registry, repository, tmp_path):
    """A blob whose bytes changed on the disk is named, and the tag is not written."""
    adapters.build(tmp_path)
    blob = read_layout(tmp_path / "image").layers[1]
    path = blob_path(tmp_path / "image", blob)
    path.write_bytes(path.read_bytes()[:-1] + b"!")

    with pytest.raises(SpecError, match=f"IMAGE-105 {path}"):
        push(remote(open_registry.host, repository), tmp_path / "image")
    assert held(open_registry, repository) is None


# -- pulls that go wrong -------------------------------------------------------------------------


def test_a_pull_goes_on_where_it_broke_off(proxied, open_registry, built, repository, tmp_path):
    """The rest of a blob is asked for, not the whole."""
    push(remote(open_registry.host, repository), built)
    weights = read_layout(built).layers[0]
    proxied.spoil(fp.cut_reply(150_000, reset=False), method="GET", path=weights.digest)

    registry.pull(remote(proxied.host, repository), tmp_path / "out")

    asked = [seen.headers.get("range") for seen in proxied.seen if weights.digest in seen.path]
    assert [None, "bytes=150000-"] == asked
    assert adapters.content(built.parent / "adapter") == adapters.content(tmp_path / "out")


def test_a_blob_that_is_shorter_than_its_manifest_says_is_refused_at_once(
    proxied, open_registry, built, repository, tmp_path
):
    """It will never be whole: no patience helps."""
    push(remote(open_registry.host, repository), built)
    weights = read_layout(built).layers[0]
    proxied.spoil(fp.status(200, b"short"), method="GET", path=weights.digest)

    with pytest.raises(RefusedError, match=r"REG-143 .*has 5 bytes of"):
        registry.pull(remote(proxied.host, repository), tmp_path / "out")

    assert 1 == sum(weights.digest in seen.path for seen in proxied.seen)


def test_a_digest_of_another_kind_is_verified_as_well(
    proxied, open_registry, built, repository, tmp_path
):
    """A server's word is not enough, whatever the algorithm."""
    push(remote(open_registry.host, repository), built)
    proxied.spoil(fp.status(200, b"{}"), method="GET", path="/manifests/sha512:")

    with pytest.raises(RefusedError, match="REG-143"):
        registry.resolve(remote(proxied.host, repository, tag="@sha512:" + "0" * 128))


def test_a_server_without_ranges_is_read_from_the_start(
    proxied, open_registry, built, repository, tmp_path
):
    """A 200 to a range means all of it."""
    push(remote(open_registry.host, repository), built)
    weights = read_layout(built).layers[0]
    proxied.spoil(fp.cut_reply(150_000, reset=False), method="GET", path=weights.digest)
    whole = blob_path(built, weights).read_bytes()
    proxied.spoil(fp.status(200, whole), method="GET", path=weights.digest, nth=2)

    registry.pull(remote(proxied.host, repository), tmp_path / "out")

    assert adapters.content(built.parent / "adapter") == adapters.content(tmp_path / "out")


@pytest.mark.parametrize("what", ["blob", "longer", "manifest"])
def test_bytes_that_are_not_the_digest_leave_nothing(
    proxied, open_registry, built, repository, tmp_path, what
):
    """Refused, and neither the target nor a scratch folder is there."""
    push(remote(open_registry.host, repository), built)
    weights = read_layout(built).layers[0]

    def corrupt(reply: Reply) -> None:
        data = reply.content()
        reply.body = data + b"!" if what == "longer" else data[:-2] + b"!}"

    named = digest(built) if what == "manifest" else weights.digest
    proxied.spoil(fp.edit(corrupt), method="GET", path=named, times=None)
    source = remote(proxied.host, repository, tag=f"@{digest(built)}")

    with pytest.raises(RefusedError, match="REG-143"):
        registry.pull(source, tmp_path / "out")
    assert [] == list(tmp_path.iterdir())


def test_what_is_not_there_cannot_be_pulled(open_registry, repository, tmp_path):
    """One clear line."""
    with pytest.raises(RefusedError, match=f"REG-123 .*{repository}:1: has no image 1"):
        registry.pull(remote(open_registry.host, repository), tmp_path / "out")


# -- logins --------------------------------------------------------------------------------------


def test_htpasswd(mortal, built, repository, tmp_path):
    """The right login works; a wrong one and none end at once, each in its own words."""
    push(remote(mortal.host, repository, login=ME), built)
    registry.pull(remote(mortal.host, repository, login=ME), tmp_path / "out")

    with Proxy(mortal.address) as proxy:
        for login, words in (
            (Login("push.json auths[x]", "me", "wrong"), "refuses the login from push.json auths"),
            (None, "wants a login, and there is none"),
        ):
            proxy.seen.clear()
            with pytest.raises(RefusedError, match=words) as caught:
                registry.check_push(remote(proxy.host, repository, login=login))
            assert "wrong" not in str(caught.value)
            assert (2 if login else 1) == len(proxy.seen)


@pytest.mark.parametrize("too_little", [401, 403])
def test_a_token_that_may_only_pull_is_not_used_to_push(
    open_registry, built, repository, tmp_path, too_little
):
    """Looking comes first, with a small token; then one is asked for that may push."""
    with TokenFront(open_registry, too_little=too_little) as front:
        to = remote(front.host, repository, login=ME)
        push(to, built)
        registry.pull(remote(front.host, repository), tmp_path / "out")  # anybody may pull

    assert digest(built) == held(open_registry, repository)


def test_a_token_that_runs_out_within_an_upload_is_renewed(open_registry, built, repository):
    """Each token lives for eight requests, of all uploads together."""
    with TokenFront(open_registry, uses=8) as front:
        push(remote(front.host, repository, login=ME), built)

    assert digest(built) == held(open_registry, repository)
    assert 2 < len(front.tokens)


def test_a_token_that_is_about_to_run_out_is_renewed_before_it_does(
    open_registry, built, repository
):
    """A token that lives for no time at all is asked for before each request."""
    with TokenFront(open_registry, expires_in=-1) as front:
        push(remote(front.host, repository, login=ME), built)

    asked = [seen for seen in front.seen if seen.path.startswith("/token")]
    refused = [seen for seen in front.seen if seen.status == 401]
    assert 1 == len(refused)
    assert len(asked) >= sum(seen.method in ("PUT", "PATCH", "POST") for seen in front.seen)


def test_an_identity_token_is_exchanged(open_registry, built, repository):
    """What `az acr login` and others leave: no password, but a refresh token."""
    login = Login("config.json", "<token>", identity_token="identity")
    with TokenFront(open_registry) as front:
        push(remote(front.host, repository, login=login), built)
        with pytest.raises(RefusedError, match="REG-121"):
            wrong = Login("config.json", "<token>", identity_token="other")
            push(remote(front.host, repository, login=wrong), built)

    assert digest(built) == held(open_registry, repository)


def test_a_wrong_password_is_tried_once(open_registry, built, repository):
    """One question to the token server, exit code 12."""
    wrong = Login("push.json auths[x]", "me", "wrong")
    with TokenFront(open_registry) as front, pytest.raises(RefusedError, match="REG-121"):
        push(remote(front.host, repository, login=wrong), built)

    assert 1 == sum(seen.path.startswith("/token") for seen in front.seen)


@pytest.mark.parametrize("status", [500, 503])
def test_a_token_server_in_trouble_is_waited_for(open_registry, built, repository, status):
    """Once or for a while: the push goes on. For ever: exit code 20."""
    with TokenFront(open_registry) as front:
        front.spoil(fp.status(status), path="^/token")
        push(remote(front.host, repository, login=ME), built)
        front.token_status = status
        with pytest.raises(TransientError, match=f"REG-133.*{status}"):
            push(remote(front.host, repository, login=ME, patience=IMPATIENT), built)


def test_a_password_does_not_go_to_a_token_server_without_tls(built, tmp_path, repository):
    """A registry behind TLS that names a plain realm gets no answer."""
    certificate = Certificate(tmp_path / "tls")
    with Registry(tmp_path) as started, TokenFront(started) as plain:
        tls = TokenFront(started)
        tls._server.socket = certificate.context().wrap_socket(
            tls._server.socket, server_side=True, do_handshake_on_connect=False
        )
        tls.realm = f"http://{plain.host}/token"
        with tls, pytest.raises(RefusedError, match="REG-127"):
            push(remote(tls.host, repository, login=ME, ca=certificate.ca), built)

    assert [] == plain.seen


# -- TLS and names -------------------------------------------------------------------------------


def test_tls_with_a_ca_of_ones_own(built, repository, tmp_path):
    """Trusted when its CA is given; never without."""
    certificate = Certificate(tmp_path / "tls")
    with Registry(tmp_path, tls=certificate) as started:
        to = remote(started.host, repository, ca=certificate.ca)
        push(to, built)
        assert registry.Found(digest(built), "run-1") == registry.look(to)

        other_ca = Certificate(tmp_path / "other").ca
        with pytest.raises(RefusedError, match=r"REG-126.*not trusted"):
            registry.look(remote(started.host, repository, ca=other_ca))
        with pytest.raises(RefusedError, match=r"REG-126.*talks TLS"):
            registry.look(remote(started.host, repository))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"days": -1}, "expired"), ({"host": "DNS:elsewhere.example"}, "IP address mismatch")],
)
def test_a_certificate_that_does_not_fit(tmp_path, repository, changes, words):
    """Expired, or for another host."""
    certificate = Certificate(tmp_path / "tls", **changes)
    with (
        Registry(tmp_path, tls=certificate) as started,
        pytest.raises(RefusedError, match=f"REG-126.*{words}"),
    ):
        registry.look(remote(started.host, repository, ca=certificate.ca))


def test_plain_http_where_tls_is_wanted(open_registry, repository, tmp_path):
    """The text names the way to allow it."""
    ca = Certificate(tmp_path).ca
    with pytest.raises(RefusedError, match=r"REG-126.*--insecure"):
        registry.look(remote(open_registry.host, repository, ca=ca))


def test_a_registry_behind_a_proxy_that_ends_tls(open_registry, built, repository, tmp_path):
    """It names itself with http in every Location; uploads go on by https, with the login."""
    certificate = Certificate(tmp_path)
    with Proxy(open_registry.address, tls=certificate.context()) as front:
        push(remote(front.host, repository, ca=certificate.ca), built)
        assert {"https"} == {"https" for seen in front.seen}

    assert digest(built) == held(open_registry, repository)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("127.0.0.1:1", "cannot connect: Connection refused"),
        ("registry.invalid:5000", "there is no host registry.invalid|name cannot be looked up"),
    ],
)
def test_a_registry_that_is_not_there(repository, host, words):
    """Exit code 20: down, or a wrong name; the text says both."""
    with pytest.raises(TransientError, match=f"REG-131.*({words})") as caught:
        registry.look(remote(host, repository, patience=IMPATIENT))

    assert "check the " in str(caught.value)


def test_no_netrc_and_no_cookies(mortal, repository, tmp_path, monkeypatch):
    """A login is only what we were given; Harbor's cookies lead to CSRF refusals."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with Proxy(mortal.address) as proxy:
        proxy.spoil(fp.edit(lambda reply: reply.replace("Set-Cookie", "sid=1")), times=None)
        with pytest.raises(RefusedError, match="wants a login"):
            registry.look(remote(proxy.host, repository))
        registry.check_push(remote(proxy.host, repository, login=ME))

    assert [] == [seen for seen in proxy.seen if "cookie" in seen.headers]


def test_the_environments_proxy_is_used_but_never_for_loopback(
    open_registry, proxied, repository, monkeypatch
):
    """HTTP_PROXY and NO_PROXY count as for every other program."""
    for name, value in (("http_proxy", f"http://{proxied.host}"), ("no_proxy", "direct.invalid")):
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.upper(), value)

    assert registry.look(remote(open_registry.host, repository)) is None
    assert registry.look(remote("registry.invalid", repository, insecure=True)) is None
    with pytest.raises(TransientError, match="REG-131"):
        registry.look(remote("direct.invalid", repository, insecure=True, patience=IMPATIENT))

    shown = f"http://registry.invalid/v2/{repository}/manifests/1"
    assert [shown] == [seen.path for seen in proxied.seen]


def test_no_secret_is_shown(mortal, built, repository, caplog):
    """Neither in messages nor in logs, whatever goes wrong."""
    caplog.set_level("DEBUG")
    texts = []
    with Proxy(mortal.address) as proxy:
        for fault in (fp.refuse, fp.status(403), fp.status(500), fp.status(418, b"x" * 99)):
            proxy.mend()
            proxy.spoil(fault, method="POST", times=None)
            login = Login("file", "me", "secret")
            with pytest.raises(TuningError) as caught:
                push(remote(proxy.host, repository, login=login, patience=IMPATIENT), built)
            texts += [str(caught.value), repr(login)]

    shown = "\n".join([*texts, caplog.text])
    assert "secret" not in shown and login.basic not in shown and login.basic[6:] not in shown
