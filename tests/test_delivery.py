"""Folders that an adapter may or may not go to, judged before anything is trained."""

from __future__ import annotations

from pathlib import Path

import adapters
import pytest

from tuning import delivery, files, image
from tuning.delivery import Access
from tuning.errors import RefusedError, SpecError
from tuning.spec import Destination


def built(tmp_path: Path, run_id: str) -> tuple[Path, Path, str]:
    """An adapter, its layout, and the digest of its image."""
    adapter = adapters.adapter(tmp_path / f"adapter-{run_id}")
    files.write_json(adapter / "tuning.json", {"run_id": run_id})
    layout = tmp_path / f"image-{run_id}"
    made = image.build(adapter, layout, preset="p", run_id=run_id, annotations={})
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
