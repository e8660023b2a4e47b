"""Files that survive a crash."""

import os

import pytest

from tuning import files
from tuning.errors import SpecError


def test_a_failed_write_leaves_the_old_file_and_no_scratch(tmp_path, monkeypatch):
    """When the disk is full in mid-write the old content stays and nothing half-written is left."""
    target = tmp_path / "plan.json"
    files.write(target, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write(target, "new")

    assert target.read_text() == "old"
    assert [target] == list(tmp_path.iterdir())


def test_canonical_json_depends_on_the_value_alone():
    """Key order, spaces and non-ASCII text do not change the bytes; NaN is no JSON."""
    assert files.canonical({"z": "é", "a": [1, 2.5]}) == b'{"a":[1,2.5],"z":"\xc3\xa9"}'
    with pytest.raises(ValueError, match="JSON compliant"):
        files.canonical(float("nan"))


def test_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    """Read in pieces or at once, the sha256 is the same."""
    data = os.urandom(files.CHUNK + 17)
    (tmp_path / "x").write_bytes(data)

    assert files.digest(data) == files.digest_file(tmp_path / "x")


def test_a_finished_folder_takes_its_place(tmp_path):
    """The scratch folder becomes the target with all it holds."""
    scratch = tmp_path / "tmp.1"
    (scratch / "sub").mkdir(parents=True)
    files.write_json(scratch / "sub" / "x.json", {"n": 1})

    files.replace_folder(scratch, tmp_path / "done")

    assert files.read_json(tmp_path / "done" / "sub" / "x.json") == {"n": 1}
    assert not scratch.exists()


def test_what_killed_writers_left_is_swept(tmp_path):
    """Scratch files of any process go, at any depth; everything else stays."""
    (tmp_path / "adapter").mkdir()
    for name in (".plan.json.12.tmp", "adapter/.tuning.json.7.tmp"):
        (tmp_path / name).write_text("half")
    kept = {".lock", "a.tmp", ".mine.tmp"}
    for name in kept:
        (tmp_path / name).touch()

    files.sweep(tmp_path)

    assert kept == {path.name for path in tmp_path.rglob("*") if path.is_file()}


def test_a_disk_too_small_is_refused_before_its_folder_exists(tmp_path):
    """The nearest existing parent says what is free; the caller's code and remedy are kept."""
    folder = tmp_path / "a" / "b"
    files.require_space(folder, 1, code="RUN-121", where="train", instead="move")

    with pytest.raises(SpecError, match=r"RUN-121 train: needs 1,\d+.* Change: free .*, or move"):
        files.require_space(folder, 1 << 60, code="RUN-121", where="train", instead="move")

    assert not folder.parent.exists()


def test_one_folder_keeps_what_is_cached(monkeypatch):
    """XDG_CACHE_HOME, else ~/.cache; an empty value counts as none."""
    for value, expected in (("/x", "/x/tuning"), ("", "/home/me/.cache/tuning")):
        monkeypatch.setenv("HOME", "/home/me")
        monkeypatch.setenv("XDG_CACHE_HOME", value)

        assert expected == str(files.cache_folder())
