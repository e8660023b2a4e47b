"""Images: the same adapter gives the same digest anywhere, and no image of strangers does harm."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import pytest
import zstandard

from tuning.errors import RefusedError, SpecError, TuningError
from tuning.oci.layout import tar
from tuning.oci.layout.extract import unpack
from tuning.oci.layout.manifest import (
    INDEX,
    MANIFEST,
    blob_path,
    choose_manifest,
    read_documents,
    read_layout,
)
from tuning.oci.layout.package import Built

DIGEST = "sha256:fddb1589c16b7062ad6127e03bda387242a5be577be4b800c0d4ab9bc43c50ee"


def build(folder: Path, **more: Any) -> Built:
    return adapters.build(folder, **more)


def layers(layout: Path) -> list[tarfile.TarFile]:
    found = read_layout(layout)
    data = [blob_path(layout, layer).read_bytes() for layer in found.layers]
    return [tarfile.open(fileobj=io.BytesIO(layer)) for layer in data]


# -- building --------------------------------------------------------------------------------------


def test_the_digest_is_known(tmp_path):
    """These files and annotations have this digest, with every Python and on every machine."""
    assert DIGEST == build(tmp_path).digest


@pytest.mark.parametrize(
    "change",
    [
        {"TZ": "Asia/Tokyo"},
        {"LC_ALL": "C", "LANG": "C"},
        {"OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "7"},
        {"PYTHONUTF8": "0", "USER": "somebody", "HOME": "/nonexistent"},
    ],
    ids=lambda change: "-".join(change),
)
def test_nothing_of_the_machine_is_in_the_digest(tmp_path, change):
    """Another process, folder, umask, order on the disk, time and environment: one digest."""
    source = adapters.adapter(tmp_path / "first")
    moved = tmp_path / "elsewhere" / "much deeper"
    moved.mkdir(parents=True)
    for path in sorted(source.iterdir(), reverse=True):
        copy = moved / path.name
        copy.write_bytes(path.read_bytes())
        copy.chmod(0o600)
        os.utime(copy, (1, 1))
    program = """
import os, sys
from pathlib import Path
from tuning.oci.layout.package import build_adapter
os.umask(0o077)
os.chdir(sys.argv[1])
built = build_adapter(Path("."), Path(sys.argv[2]), preset="phi-3-mini-4k-instruct",
                      run_id="run-1", annotations={"a": "b"})
print(built.digest)
"""
    command = [sys.executable, "-c", program, str(moved), str(tmp_path / "layout")]
    environment = {**os.environ, **change}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)

    assert DIGEST == done.stdout.strip()


def test_source_date_epoch_is_the_time_of_its_making(tmp_path, monkeypatch):
    """It is in config and annotations; what is no number is refused by name."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    build(tmp_path)
    found = read_layout(tmp_path / "image")
    config = json.loads(blob_path(tmp_path / "image", found.config).read_bytes())

    assert "1970-01-02T00:00:00Z" == config["created"]
    assert "1970-01-02T00:00:00Z" == found.annotations["org.opencontainers.image.created"]
    assert {"1970-01-02T00:00:00Z"} == {step["created"] for step in config["history"]}

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(SpecError, match="IMAGE-106 SOURCE_DATE_EPOCH"):
        build(tmp_path)


def test_the_layers_are_what_readers_need(tmp_path):
    """Plain USTAR: folders first, files under data/, hard links to them under models/."""
    build(tmp_path)
    weights, tokenizer, documents = layers(tmp_path / "image")

    assert [
        ("data", tarfile.DIRTYPE, 0o755, ""),
        ("data/adapter_config.json", tarfile.REGTYPE, 0o644, ""),
        ("data/adapter_model.safetensors", tarfile.REGTYPE, 0o644, ""),
        ("models", tarfile.DIRTYPE, 0o755, ""),
        ("models/adapter_config.json", tarfile.LNKTYPE, 0o644, "data/adapter_config.json"),
        (
            "models/adapter_model.safetensors",
            tarfile.LNKTYPE,
            0o644,
            "data/adapter_model.safetensors",
        ),
    ] == [(entry.name, entry.type, entry.mode, entry.linkname) for entry in weights]
    assert "data/tokenizer.json" in tokenizer.getnames()
    assert {"data/README.md", "data/tuning.json"} < set(documents.getnames())
    for layer in (weights, tokenizer, documents):
        assert {(0, 0, 0, "", "")} == {
            (entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname) for entry in layer
        }


def test_config_and_manifest_say_what_they_must(tmp_path):
    """diff_ids are the layers' digests, annotations come back as labels, names are KAITO's."""
    built = build(tmp_path)
    layout = tmp_path / "image"
    found = read_layout(layout)
    config = json.loads(blob_path(layout, found.config).read_bytes())

    assert [layer.digest for layer in found.layers] == config["rootfs"]["diff_ids"]
    assert found.annotations == config["config"]["Labels"]
    assert "phi-3-mini-4k-instruct" == found.annotations["sh.kaito.model.name"]
    assert ("run-1", "b") == (found.run_id, found.annotations["a"])
    assert len(config["history"]) == len(found.layers) == 3
    assert {"imageLayoutVersion": "1.0.0"} == json.loads((layout / "oci-layout").read_bytes())
    assert built.size == sum(path.stat().st_size for path in layout.glob("blobs/sha256/*"))


def test_the_image_before_is_replaced_whole(tmp_path):
    """A rebuilt layout holds the new image and nothing of the old one."""
    first = build(tmp_path)
    readme = tmp_path / "adapter" / "README.md"
    readme.write_text("# Another\n")
    (tmp_path / "image" / "blobs" / "sha256" / ".1.tmp").write_bytes(b"left by a crash")

    second = build(tmp_path)

    kept = {f"sha256:{path.name}" for path in (tmp_path / "image" / "blobs" / "sha256").iterdir()}
    assert first.digest != second.digest == read_layout(tmp_path / "image").digest
    assert {second.digest, *(blob.digest for blob in second.blobs)} == kept


@pytest.mark.parametrize(
    "name",
    ["training_args.bin", "optimizer.pt", "model.pkl", "run.sh", ".env", "link.json", "folder"],
)
def test_only_an_adapters_files_go_in(tmp_path, name):
    """Pickles, secrets, links and anything unknown are named; no image is made."""
    stranger = adapters.adapter(tmp_path / "adapter") / name
    if name == "folder":
        stranger.mkdir()
    elif name == "link.json":
        stranger = stranger.with_name("vocab.json")
        stranger.symlink_to("/etc/hostname")
    else:
        stranger.write_bytes(b"x")

    with pytest.raises(SpecError) as caught:
        build(tmp_path)

    assert [("IMAGE-102", str(stranger))] == [(p.code, p.where) for p in caught.value.problems]
    assert not (tmp_path / "image").exists()


def test_an_adapter_without_its_files_is_no_image(tmp_path):
    """Both that are missing are named at once."""
    (tmp_path / "adapter").mkdir()

    with pytest.raises(SpecError) as caught:
        build(tmp_path)

    assert ["IMAGE-101", "IMAGE-101"] == [problem.code for problem in caught.value.problems]


# -- reading ---------------------------------------------------------------------------------------


def test_what_was_built_comes_out_again(tmp_path):
    """Every file, byte for byte, also into an empty folder that is there already."""
    build(tmp_path)
    found = read_layout(tmp_path / "image")
    (tmp_path / "out").mkdir()

    names = unpack(found, tmp_path / "image", tmp_path / "out")

    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == list(names)
    assert adapters.content(tmp_path / "adapter") == adapters.content(tmp_path / "out")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    """The target must be new."""
    build(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")

    with pytest.raises(SpecError, match="IMAGE-103"):
        unpack(read_layout(tmp_path / "image"), tmp_path / "image", tmp_path / "out")
    assert {"mine": b"kept"} == adapters.content(tmp_path / "out")


Files = dict[str, bytes]


def archive(files: Files | None = None, *entries: tarfile.TarInfo, format: int = 0) -> bytes:
    """A tar of `files` and then of `entries`, which have no content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format or tarfile.USTAR_FORMAT) as made:
        for name, data in (files or {}).items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            made.addfile(entry, io.BytesIO(data))
        for entry in entries:
            made.addfile(entry)
    return out.getvalue()


def entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


def layout_of(folder: Path, *layers: bytes, config: Any = "fits", **manifest: Any) -> Path:
    """A layout with an image of these layers, by hand."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media_type: str) -> dict[str, Any]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(data)}

    parts = [put(layer, "application/vnd.oci.image.layer.v1.tar") for layer in layers]
    if config == "fits":
        plain = [_plain(layer) for layer in layers]
        ids = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in plain]
        config = {"architecture": "amd64", "os": "linux"}
        config |= {"rootfs": {"type": "layers", "diff_ids": ids}}
    record: dict[str, Any] = {"schemaVersion": 2, "mediaType": MANIFEST, "layers": parts}
    record["config"] = put(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json")
    record |= manifest
    top = put(json.dumps(record).encode(), MANIFEST)
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    return folder


def _plain(layer: bytes) -> bytes:
    if layer[:2] == b"\x1f\x8b":
        with contextlib.suppress(OSError, EOFError):
            return gzip.decompress(layer)
    if layer[:4] == b"\x28\xb5\x2f\xfd":
        return zstandard.ZstdDecompressor().decompressobj().decompress(layer)
    return layer


def unpacked(layout: Path, target: Path, **more: Any) -> Files:
    unpack(read_layout(layout), layout, target, **more)
    return adapters.content(target)


FINE = {"data/adapter_config.json": b"{}", "data/adapter_model.safetensors": b"weights"}
OUT = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
LONG = f"data/{'n' * 60}/{'m' * 80}/{'o' * 90}.jsonl"

ODD_BUT_FINE: dict[str, Callable[[], tuple[list[bytes], Files]]] = {
    "gzip": lambda: ([gzip.compress(archive(FINE))], OUT),
    "two gzip members": lambda: (
        [gzip.compress(archive(FINE)[:700]) + gzip.compress(archive(FINE)[700:])],
        OUT,
    ),
    "zstd": lambda: ([zstandard.compress(archive(FINE))], OUT),
    "dots": lambda: ([archive({f"./{name}": data for name, data in FINE.items()})], OUT),
    "gnu": lambda: ([archive(FINE, format=tarfile.GNU_FORMAT)], OUT),
    "pax": lambda: ([archive(FINE | {"data/é.txt": b""}, format=tarfile.PAX_FORMAT)], OUT),
    "a later layer wins": lambda: (
        [archive(FINE), archive({"data/adapter_config.json": b"new"})],
        OUT | {"adapter_config.json": b"new"},
    ),
    "a link within the layer": lambda: (
        [archive(FINE, entry("data/vocab.json", tarfile.LNKTYPE, "data/adapter_config.json"))],
        OUT | {"vocab.json": b"{}"},
    ),
    "a whole system around it": lambda: (
        [
            archive(
                {"bin/busybox": b"\x7fELF", "etc/.wh.motd": b""},
                entry("bin/sh", tarfile.SYMTYPE, "/bin/busybox"),
                entry("dev/null", tarfile.CHRTYPE),
                entry("data", tarfile.DIRTYPE),
            ),
            archive(FINE),
        ],
        OUT,
    ),
    "files of others": lambda: ([archive(FINE | {"data/training_args.bin": b"pickle"})], OUT),
    "no end": lambda: ([archive(FINE).rstrip(b"\0").ljust(4 * 512, b"\0")], OUT),
}


@pytest.mark.parametrize("case", ODD_BUT_FINE)
def test_images_of_others_are_read(tmp_path, case):
    """Compressed layers, other tar writers, base images: /data comes out, nothing else."""
    made, expected = ODD_BUT_FINE[case]()

    assert expected == unpacked(layout_of(tmp_path / "image", *made), tmp_path / "out")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_come_out_of_every_kind_of_tar(tmp_path, format):
    """A dataset's names may be longer than a USTAR header is wide; all may be wanted."""
    layer = archive({LONG: b"rows", "data/ä/b.csv": b"c"}, format=format)

    found = unpacked(layout_of(tmp_path / "image", layer), tmp_path / "out", wanted=lambda _: True)

    assert {LONG.removeprefix("data/"): b"rows", "ä/b.csv": b"c"} == found


def pax(name: str, records: Files, *, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An archive whose file `name` has PAX records of ours before it."""
    body = b""
    for key, value in records.items():
        length = len(key) + len(value) + 3
        length += len(str(length + len(str(length))))
        body += b"%d %b=%b\n" % (length, key.encode(), value)
    extension = tarfile.TarInfo("pax")
    extension.type, extension.size = kind, len(body)
    head = extension.tobuf(tarfile.USTAR_FORMAT) + body.ljust(-(-len(body) // 512) * 512, b"\0")
    return head + archive({name: b"x"})


def header(**changes: Any) -> bytes:
    """An archive of one file, its first header changed and its checksum right again."""
    whole = bytearray(archive({"data/vocab.json": b"x"}))
    for place, value in changes.items():
        start = {"size": 124, "kind": 156, "name": 0, "checksum": 148}[place]
        whole[start : start + len(value)] = value
    if "checksum" not in changes:
        total = sum(whole[:148]) + sum(whole[156:512]) + 256
        whole[148:156] = b"%06o\0 " % total
    return bytes(whole)


def fifo(kind: bytes, target: str = "") -> bytes:
    return archive(FINE, entry("data/vocab.json", kind, target))


HOSTILE: dict[str, Callable[[], list[bytes]]] = {
    "parent": lambda: [archive({"data/../../evil": b"x"})],
    "parent elsewhere": lambda: [archive(FINE | {"usr/../../evil": b"x"})],
    "absolute": lambda: [archive({"/data/vocab.json": b"x"})],
    "symlink": lambda: [fifo(tarfile.SYMTYPE, "/etc/passwd")],
    "symlink within": lambda: [fifo(tarfile.SYMTYPE, "adapter_config.json")],
    "data is a link": lambda: [archive({}, entry("data", tarfile.SYMTYPE, "/etc")), archive(FINE)],
    "link out": lambda: [fifo(tarfile.LNKTYPE, "/etc/passwd")],
    "link up": lambda: [fifo(tarfile.LNKTYPE, "data/../../../etc/passwd")],
    "link to another layer": lambda: [
        archive(FINE),
        archive({}, entry("data/vocab.json", tarfile.LNKTYPE, "data/adapter_config.json")),
    ],
    "link to itself": lambda: [fifo(tarfile.LNKTYPE, "data/vocab.json")],
    "device": lambda: [fifo(tarfile.BLKTYPE)],
    "fifo": lambda: [fifo(tarfile.FIFOTYPE)],
    "twice": lambda: [archive({"data/vocab.json": b"1", "data//vocab.json": b"2"})],
    "whiteout": lambda: [archive(FINE), archive({"data/.wh.adapter_config.json": b""})],
    "opaque": lambda: [archive(FINE), archive({"data/.wh..wh..opq": b""})],
    "data whiteout": lambda: [archive(FINE), archive({".wh.data": b""})],
    "control character": lambda: [archive({"data/a\nb": b"x"})],
    "backslash": lambda: [archive({"data/..\\evil": b"x"})],
    "not UTF-8": lambda: [header(name=b"data/\xff\xfe\0")],
    "file as folder": lambda: [archive({"data/a": b"x", "data/a/b": b"x"})],
    "deep": lambda: [pax("data/x", {"path": b"data" + b"/a" * 5000})],
    "long": lambda: [pax("data/x", {"path": b"data/" + b"a" * 2000})],
    "pax parent": lambda: [pax("data/x", {"path": b"data/../../evil"})],
    "pax size": lambda: [pax("data/x", {"size": b"99999999999"})],
    "pax sparse": lambda: [pax("data/x", {"GNU.sparse.realsize": b"99999999999"})],
    "pax global": lambda: [pax("data/x", {"path": b"data/y"}, kind=tarfile.XGLTYPE)],
    "pax damaged": lambda: [pax("data/x", {"path": b"y"}).replace(b"path=y\n", b"path=yy", 1)],
    "pax huge": lambda: [pax("data/x", {"comment": b"c" * (1 << 20)})],
    "sparse": lambda: [header(kind=b"S")],
    "size in base 256": lambda: [header(size=b"\x80" + b"\0" * 7 + b"\xff" * 4)],
    "size is none": lambda: [header(size=b"99999999999")],
    "size beyond the end": lambda: [header(size=b"00000777777")],
    "checksum": lambda: [header(checksum=b"000000\0 ")],
    "cut": lambda: [archive(FINE)[:-9000]],
    "trailer": lambda: [archive(FINE) + b"something"],
    "no tar": lambda: [b"#!/bin/sh\n" * 200],
    "gzip cut": lambda: [gzip.compress(archive(FINE))[:-9]],
    "gzip trailer": lambda: [gzip.compress(archive(FINE)) + b"something"],
    "gzip bomb": lambda: [gzip.compress(archive({"data/vocab.json": bytes(64 << 20)}))],
    "zstd bomb": lambda: [zstandard.compress(archive({"data/vocab.json": bytes(64 << 20)}))],
    "zstd damaged": lambda: [zstandard.compress(archive(FINE))[:-9]],
    "nothing": lambda: [archive({"etc/passwd": b"x"})],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_layers_are_refused(tmp_path, case):
    """One clear line; nothing is written outside, and nothing is left inside."""
    layout = layout_of(tmp_path / "image", *HOSTILE[case]())
    before = set(tmp_path.rglob("*"))

    with pytest.raises(RefusedError, match="IMAGE-110") as caught:
        unpack(read_layout(layout), layout, tmp_path / "out", wanted=lambda _: True)

    assert before == set(tmp_path.rglob("*"))
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no json": lambda m: b"{",
    "a list": lambda m: [],
    "no layers": lambda m: {k: v for k, v in m.items() if k != "layers"},
    "layers are text": lambda m: m | {"layers": "abc"},
    "digest leads out": lambda m: m | {"config": m["config"] | {"digest": "sha256:../../x"}},
    "size is negative": lambda m: m | {"config": m["config"] | {"size": -1}},
    "size is true": lambda m: m | {"config": m["config"] | {"size": True}},
    "wrong size": lambda m: m | {"config": m["config"] | {"size": 5}},
    "many layers": lambda m: m | {"layers": m["layers"] * 200},
    "another type": lambda m: (
        m | {"layers": [m["layers"][0] | {"mediaType": "application/octet-stream"}]}
    ),
    "unknown blob": lambda m: m | {"layers": [m["layers"][0] | {"digest": f"sha256:{'0' * 64}"}]},
    "index without images": lambda m: {"mediaType": INDEX, "manifests": []},
    "index of junk": lambda m: {"mediaType": INDEX, "manifests": [5]},
    "too large": lambda m: m | {"annotations": {"a": "x" * (5 << 20)}},
    "deep": lambda m: b'{"a":' * 100_000,
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_hostile_manifests_are_refused(tmp_path, case):
    """Whatever a manifest says, one clear line."""
    layout = layout_of(tmp_path / "image", archive(FINE))
    digest = read_layout(layout).digest
    record = json.loads(blob_path(layout, digest).read_bytes())
    changed = MANIFESTS[case](record)
    data = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    name = hashlib.sha256(data).hexdigest()
    (layout / "blobs" / "sha256" / name).write_bytes(data)
    top = {"mediaType": MANIFEST, "digest": f"sha256:{name}", "size": len(data)}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))

    with pytest.raises(RefusedError, match="IMAGE-110"):
        unpack(read_layout(layout), layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("levels", "words"),
    [([1, 150, 150], "more than 256"), ([1, 9, 9, 9], "deeply nested"), ([1, 120, 120], "")],
)
def test_an_index_of_many_indexes_ends_at_once(tmp_path, levels, words):
    """Each of a level names all of the level below: read once each, and not too many."""
    blobs = tmp_path / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    for width in reversed(levels):
        below, entries = entries, []
        for number in range(width):
            record = {"mediaType": INDEX, "manifests": below, "annotations": {"n": f"{number}"}}
            data = json.dumps(record).encode()
            name = hashlib.sha256(data).hexdigest()
            (blobs / name).write_bytes(data)
            entries.append({"mediaType": INDEX, "digest": f"sha256:{name}", "size": len(data)})
    (tmp_path / "index.json").write_text(json.dumps({"manifests": entries}))

    if words:
        with pytest.raises(RefusedError, match=words):
            read_documents(tmp_path)
    else:
        assert sum(levels) == len(read_documents(tmp_path))


def test_layers_that_are_not_what_the_config_says(tmp_path):
    """diff_ids are checked, of compressed layers too."""
    lie = {"rootfs": {"type": "layers", "diff_ids": [f"sha256:{'0' * 64}"]}}
    layout = layout_of(tmp_path / "image", gzip.compress(archive(FINE)), config=lie)

    with pytest.raises(RefusedError, match="has a layer that is not sha256:000"):
        unpack(read_layout(layout), layout, tmp_path / "out")


def test_a_damaged_blob_is_noticed(tmp_path):
    """One flipped bit in a layer."""
    build(tmp_path)
    found = read_layout(tmp_path / "image")
    path = blob_path(tmp_path / "image", found.layers[0])
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)

    with pytest.raises(RefusedError, match=f"has a damaged blob {found.layers[0].digest}"):
        unpack(found, tmp_path / "image", tmp_path / "out")


def test_an_index_leads_to_its_amd64_image(tmp_path):
    """Attestations are passed over; without amd64 the first image is meant."""

    def named(os_: str, machine: str, digit: str) -> dict[str, Any]:
        platform = {"os": os_, "architecture": machine}
        top = {"mediaType": MANIFEST, "digest": f"sha256:{digit * 64}", "size": 1}
        return top | {"platform": platform}

    entries = [
        named("unknown", "unknown", "1"),
        named("linux", "arm64", "2"),
        named("linux", "amd64", "3"),
    ]

    assert "sha256:" + "3" * 64 == choose_manifest({"manifests": entries}, where="x").digest
    assert "sha256:" + "2" * 64 == choose_manifest({"manifests": entries[:2]}, where="x").digest


def test_the_reader_agrees_with_pythons(tmp_path):
    """Names, kinds, sizes and content of what tarfile and GNU tar write."""
    files = {f"data/{'d' * n}/{n}": b"x" * n * 5 for n in (1, 90, 99, 100, 101, 102, 103, 200)}
    folder = tmp_path / "made"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    made = [archive(files, format=f) for f in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    for option in ("gnu", "posix"):
        command = ["tar", f"--format={option}", "-c", "-C", folder, "data"]
        made.append(subprocess.run(command, capture_output=True, check=True).stdout)

    for data in made:
        found = {e.name: c.read(1000) for e, c in tar.entries(io.BytesIO(data)) if e.kind == b"0"}
        assert files == found


def test_mutated_archives_end_in_an_answer(tmp_path):
    """Three hundred archives with a few bytes changed: refused or read, never anything else."""
    chance = random.Random(7)
    originals = [pax("data/x", {"path": b"data/y"}), archive(FINE, format=tarfile.GNU_FORMAT)]
    ends = set()
    for number in range(300):
        data = bytearray(chance.choice(originals))
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(min(len(data), 2048))] = chance.randrange(256)
        layout = layout_of(tmp_path / str(number), bytes(data))
        try:
            unpack(read_layout(layout), layout, tmp_path / f"out{number}", wanted=lambda _: True)
            ends.add("read")
        except TuningError as error:
            ends.add(error.problems[0].code)
    assert {"IMAGE-110"} <= ends <= {"IMAGE-110", "read"}


def test_memory_stays_flat(tmp_path):
    """200 MB of weights are built and unpacked in a process that has 64 MB more than at rest."""
    weights = adapters.adapter(tmp_path / "adapter") / "adapter_model.safetensors"
    with weights.open("ab") as file:
        file.truncate(200 << 20)
    program = """
import resource, sys
from pathlib import Path
from tuning.oci.layout.extract import unpack
from tuning.oci.layout.manifest import read_layout
from tuning.oci.layout.package import build_adapter
folder = Path(sys.argv[1])
rest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
build_adapter(folder / "adapter", folder / "image", preset="p", run_id="r", annotations={})
unpack(read_layout(folder / "image"), folder / "image", folder / "out")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rest)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert int(done.stdout) < 64 << 10  # KiB
