"""Folders of data that hold several splits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tuning.errors import DataError
from tuning.sources.fetch import on_this_machine
from tuning.sources.local import chosen, copy_notes, listed, split_notes
from tuning.spec import Source

CASES = {
    "files": (["train.jsonl", "test.jsonl", "validation.jsonl"], ["train.jsonl"]),
    "other names": (["train.csv", "dev.csv", "val.csv", "eval.csv", "valid.csv"], ["train.csv"]),
    "folders": (["test/a.csv", "train/a.csv", "train/b.csv"], ["train/a.csv", "train/b.csv"]),
    "shards": (
        ["data/test-00000-of-00001.arrow", "data/train-00000-of-00002.arrow"],
        ["data/train-00000-of-00002.arrow"],
    ),
    "near names": (["contest.jsonl", "training_data.jsonl", "latest.jsonl", "train.jsonl"],) * 2,
    "words of a name": (
        ["birds_train.csv", "birds_test.csv", "train_prefs-0.csv", "test_prefs-0.csv"],
        ["birds_train.csv", "train_prefs-0.csv"],
    ),
    "words of two splits": (["train.csv", "train_test.csv"],) * 2,
    "no train": (["test.jsonl", "validation.jsonl"],) * 2,
    "compressed, in capitals": (["Test.jsonl.gz", "TRAIN.jsonl.gz"], ["TRAIN.jsonl.gz"]),
    "others beside": (["extra.jsonl", "test.jsonl", "train.jsonl"], ["extra.jsonl", "train.jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_only_train_is_trained_of_a_folder_of_splits(name: str, tmp_path: Path) -> None:
    """Validation and test files are left out beside train files, and named in a note."""
    given, expected = CASES[name]
    folder = tmp_path / "test"  # the folder's own name means nothing
    for each in given:
        (folder / each).parent.mkdir(parents=True, exist_ok=True)
        (folder / each).write_text("{}")

    kept = chosen(listed(folder), folder, Source(folder=str(folder)))
    notes = split_notes(folder)

    assert sorted(expected) == sorted(path.relative_to(folder).as_posix() for path, _ in kept)
    assert all(any(each in note for note in notes) for each in {*given} - {*expected})
    assert bool(notes) == (sorted(given) != sorted(expected))


def test_a_copy_is_told_and_a_name_that_is_not_utf_8_refused(tmp_path: Path) -> None:
    """Rows of the same bytes under two names count twice, whatever the names are."""
    for name, text in (("a.jsonl", "{}"), ("a.jsonl.bak", "{}"), ("b.jsonl", "[]")):
        (tmp_path / name).write_text(text)
    (note,) = copy_notes(on_this_machine(Source(folder=tmp_path)))
    assert "a.jsonl.bak has the same content as " in note and "count twice" in note

    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_text("")
    with pytest.raises(DataError, match=r"FETCH-123 \\udcff.jsonl: has a name that is not UTF-8"):
        on_this_machine(Source(folder=tmp_path))
