"""Folders that an adapter may or may not go to, judged before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapters
import pytest

from tuning import files
from tuning.console import Console
from tuning.errors import RefusedError, SpecError
from tuning.oci import delivery, model_image
from tuning.oci.delivery import Access
from tuning.oci.layout.package import build_adapter
from tuning.oci.policy import Trust
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
