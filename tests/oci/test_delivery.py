"""Folders that an adapter may or may not go to, judged before anything is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapters
import pytest

from tuning import adapter as adapter_rules
from tuning import files
from tuning.console import Console
from tuning.errors import RefusedError, SpecError, TransientError, UsageError
from tuning.oci import delivery, inspection, model_image
from tuning.oci.delivery import Access
from tuning.oci.layout.package import _point, build_adapter
from tuning.oci.layout.platforms import Writer
from tuning.oci.layout.write import write_layer
from tuning.oci.policy import Trust
from tuning.oci.registry import Patience
from tuning.spec import Destination

QUIET = Console(quiet=True)


def built(tmp_path: Path, run_id: str) -> tuple[Path, Path, str]:
    """An adapter, its layout, and the digest of its image."""
    adapter = adapters.adapter(tmp_path / f"adapter-{run_id}")
    files.write_json(adapter / "tuning.json", {"run_id": run_id})
    layout = tmp_path / f"image-{run_id}"
    made = build_adapter(adapter, layout, preset="p", run_id=run_id, annotations={})
    return adapter, layout, made.digest


def claim(destination: Destination, run_id: str | None, own: tuple[str, ...] = ()) -> None:
    delivery.claim(destination, Access(), run_id=run_id, own=own)


@pytest.mark.parametrize("kind", ["layout", "folder"])
def test_another_runs_work_is_not_replaced(tmp_path: Path, kind: str) -> None:
    """As a tag is not; the run itself, its run directory and who says so may."""
    adapter, layout, digest = built(tmp_path, "run-1")
    where, weights = (layout, digest) if kind == "layout" else (adapter, "")
    destination = Destination(**{kind: where})
    weights = weights or files.digest_file(adapter / "adapter_model.safetensors")

    with pytest.raises(RefusedError, match=r"REG-105 .*run-1.*on-tag-exists: overwrite"):
        claim(destination, "run-2")
    claim(destination, "run-1")
    claim(destination, None)  # not known yet whose run it is
    claim(destination, "run-2", own=(weights,))
    claim(Destination(**{kind: where}, on_tag_exists="overwrite"), "run-2")


@pytest.mark.parametrize("kind", ["layout", "folder"])
def test_a_folder_that_cannot_be_filled_is_told_at_once(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")

    for name, code in (("file", "REG-102"), ("file/below", "REG-102"), ("mine", "REG-103")):
        with pytest.raises(SpecError, match=code):
            delivery.check(Destination(**{kind: tmp_path / name}), Access())
    for name in ("new", "new/below"):
        delivery.check(Destination(**{kind: tmp_path / name}), Access())
    assert not (tmp_path / "new").exists()


def test_a_layout_that_nobody_can_read_may_be_replaced(tmp_path: Path) -> None:
    _, layout, _ = built(tmp_path, "run-1")
    (layout / "index.json").write_text("{cut")

    claim(Destination(layout=layout), "run-2")


def test_what_is_ours_may_be_filled_again(tmp_path: Path) -> None:
    adapter, layout, _ = built(tmp_path, "run-1")

    delivery.check(Destination(folder=adapter, layout=layout), Access())


def pulled(layout: Path, target: Path, **more: Any) -> str:
    return delivery.pull(f"oci:{layout}", target, access=Access(), console=QUIET, **more)


@pytest.mark.parametrize("how", ["new", "empty", "here", "volume"])
def test_an_empty_folder_that_is_there_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A mounted volume cannot be renamed over, and a shell's own folder should stay that."""
    _, layout, digest = built(tmp_path, "run-1")
    target = tmp_path / "target"
    if how != "new":
        target.mkdir()
    if how == "volume":  # in which an earlier try was killed
        (target / "lost+found").mkdir()
        (target / ".making-x").mkdir()
    before = target.stat().st_ino if target.exists() else None
    if how == "here":
        monkeypatch.chdir(target)

    assert digest == pulled(layout, Path() if how == "here" else target)

    assert before in (None, target.stat().st_ino)
    assert (target / "adapter_config.json").is_file()
    left = [".making-x"] if how == "volume" else []
    assert left == [path.name for path in target.iterdir() if path.name.startswith(".")]


def test_a_folder_that_cannot_be_made_or_is_full_stays_as_it_is(tmp_path: Path) -> None:
    """Said before anything is fetched; an adapter of another base leaves nothing either."""
    _, layout, _ = built(tmp_path, "run-1")
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "empty").mkdir()

    for name, code in (("file", "103"), ("file/below", "107"), ("full", "103")):
        with pytest.raises(SpecError, match=f"IMAGE-{code}"):
            pulled(layout, tmp_path / name)
    with pytest.raises(SpecError, match="MODEL-2"):
        pulled(layout, tmp_path / "empty", base="falcon-7b")

    assert ["mine"] == [path.name for path in (tmp_path / "full").iterdir()]
    assert (tmp_path / "empty").is_dir() and not any((tmp_path / "empty").iterdir())


def test_layouts_are_refused_where_signatures_are_required(tmp_path: Path) -> None:
    """An adapter's and a model's alike: a folder holds none."""
    _, layout, _ = built(tmp_path, "run-1")
    strict = Access(trust=Trust(signatures="require"))

    for work in (
        lambda: delivery.pull(f"oci:{layout}", tmp_path / "x", access=strict, console=QUIET),
        lambda: model_image.local(f"oci:{layout}", access=strict, console=QUIET),
        lambda: model_image.config(f"oci:{layout}", access=strict),
    ):
        with pytest.raises(RefusedError, match="SIGN-110"):
            work()


@pytest.mark.parametrize(
    "name", ["out1", "./runs/out1", "/nowhere/out1", "~/out1", "here/out1", "out1/"]
)
def test_a_mistyped_folder_is_not_looked_for_in_a_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """At once, and with each way to write what may have been meant."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()

    with (
        pytest.raises(UsageError, match=r"REG-107 .*folder's name.*REGISTRY/REPOSITORY:TAG"),
        delivery.at_hand(name, access=Access(), console=QUIET),
    ):
        pass
    with pytest.raises(UsageError, match="REG-107"):
        inspection.inspect(name, access=Access())


@pytest.mark.parametrize(
    "name", ["a/b", "a:1", "a@sha256:" + "0" * 64, "x.example/a", "localhost/a"]
)
def test_an_image_is_told_from_a_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder of that name comes first; what is left to Docker Hub is said."""
    monkeypatch.chdir(tmp_path)

    assert delivery.named_folder(name) is None
    assert ("Docker Hub" in caplog.text) == (name == "a/b")
    (tmp_path / name).mkdir(parents=True)
    assert Path(name) == delivery.named_folder(name)


def test_each_retry_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """With the reason and the wait, so that nobody looks at a silent terminal."""
    brisk = replace(Access(), patience=Patience(total=0.3, first=0.01))

    with pytest.raises(TransientError, match="REG-131"):
        delivery.pull("127.0.0.1:9/a/b:1", Path("/nowhere/x"), access=brisk, console=QUIET)

    told = [each for each in caplog.messages if "Trying again in" in each]
    assert "REG-131 127.0.0.1:9/a/b:1: cannot connect" in told[0]
    assert all(each.startswith("The same. Trying again in ") for each in told[1:])


def pickled(tmp_path: Path, name: str) -> Path:
    """The layout of an image whose weights are a pickle."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "adapter_config.json").write_text(json.dumps(adapters.CONFIG))
    (source / name).write_bytes(b"PK pickle" * 1_000_000)  # larger than what a look reads
    blobs = tmp_path / "image" / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    layer = write_layer(source, [path.name for path in source.iterdir()], blobs)
    top, _ = Writer(blobs, {"weights": layer}, "1970-01-01T00:00:00Z", {}).image("amd64")
    _point(tmp_path / "image", top)
    return tmp_path / "image"


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"])
def test_weights_in_a_pickle_are_refused_as_that(tmp_path: Path, name: str) -> None:
    """The image is named, not a scratch folder, and the way to safetensors."""
    image = f"oci:{pickled(tmp_path, name)}"

    with pytest.raises(SpecError) as caught:
        delivery.pull(image, tmp_path / "out", access=Access(), console=QUIET)

    text = str(caught.value)
    assert f"MODEL-201 {image}: has no adapter_model.safetensors, only a pickle ({name})" in text
    assert "save_pretrained" in text and "made" not in text
    if name == "adapter_model.bin":
        problems = inspection.inspect(image, access=Access()).problems
        assert ["MODEL-201"] == [each.partition(" ")[0] for each in problems]


def test_a_folder_with_a_pickle_is_refused_as_that(tmp_path: Path) -> None:
    """And its other faults with it."""
    pickled(tmp_path, "adapter_model.bin")

    for work in (
        lambda: adapter_rules.inspect(tmp_path / "source"),
        lambda: delivery.check_base(adapter_rules.inspect(tmp_path / "source"), "x"),
    ):
        with pytest.raises(SpecError, match=r"MODEL-201 .*/source: .*only a pickle"):
            work()
    assert inspection.inspect(str(tmp_path / "source"), access=Access()).problems


def test_a_broken_adapter_of_an_image_is_named_by_the_image(tmp_path: Path) -> None:
    """Not by the scratch folder that it was unpacked to."""
    adapter = adapters.adapter(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(json.dumps(adapters.CONFIG | {"r": 4}))
    build_adapter(adapter, tmp_path / "image", preset="p", run_id="r", annotations={})

    with pytest.raises(SpecError) as caught:
        pulled(tmp_path / "image", tmp_path / "out")

    assert f"MODEL-205 oci:{tmp_path}/image/adapter_model.safetensors" in str(caught.value)


@pytest.mark.parametrize("base", ["oci://registry.example.com/base:1", "oci:layout"])
def test_a_base_that_is_an_image_is_not_compared_by_name(tmp_path: Path, base: str) -> None:
    """A run prints such a command; the weights tell whether they fit."""
    _, layout, digest = built(tmp_path, "run-1")

    assert digest == pulled(layout, tmp_path / "out", base=base)
    with delivery.at_hand(str(tmp_path / "out"), access=Access(), console=QUIET, base=base) as it:
        assert it == tmp_path / "out"
