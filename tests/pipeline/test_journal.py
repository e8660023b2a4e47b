"""The run directory: lock, phases, crashes in mid-line."""

import json
import subprocess
import sys

import pytest

from tuning.errors import SpecError, TransientError
from tuning.pipeline import journal


def test_a_phase_is_done_once_for_each_key(tmp_path):
    """The same key gives the remembered value, another key works again."""
    worked = []

    def work():
        worked.append(1)
        return {"count": len(worked)}

    with journal.opened(tmp_path / "run") as book:
        assert book.do("fetch", "a", work) == {"count": 1}
        assert book.do("fetch", "a", work) == {"count": 1}
        assert book.do("fetch", "b", work) == {"count": 2}
    with journal.opened(tmp_path / "run") as book:
        assert book.done("fetch", "a") == {"count": 1}
        assert book.done("fetch", "b") == {"count": 2}
        assert book.current("fetch", "a") is None
        assert book.values("fetch") == [{"count": 1}, {"count": 2}]


def test_files_of_another_key_are_not_taken_for_those_of_this_one(tmp_path):
    """A, then B in the same place, finished or not, then A again: A is worked out again."""
    worked = []

    def work(name):
        worked.append(name)
        return {"name": name}

    with journal.opened(tmp_path / "run") as book:
        for name in ("a", "b", "a", "a"):
            book.do("tokenise", name, lambda name=name: work(name))
        with pytest.raises(ZeroDivisionError):
            book.do("tokenise", "b", lambda: {"x": 1 // 0})
        book.do("tokenise", "a", lambda: work("a"))

        assert book.current("tokenise", "a", unless=("train",)) == {"name": "a"}
        book.append("train", "start", "k")
        assert book.current("tokenise", "a", unless=("train",)) is None

    assert ["a", "b", "a", "a"] == worked


def test_a_phase_that_fails_is_not_done(tmp_path):
    """Its start is on record, its end is not; the next run works again."""
    with journal.opened(tmp_path / "run") as book:
        with pytest.raises(ZeroDivisionError):
            book.do("train", "k", lambda: {"x": 1 // 0})

        assert [r["event"] for r in book.records] == ["start"]
        assert book.done("train", "k") is None


def test_a_line_cut_by_a_crash_is_dropped(tmp_path):
    """What was complete counts; the torn tail goes, and new lines follow cleanly."""
    with journal.opened(tmp_path / "run") as book:
        book.append("fetch", "end", "k", value={"n": 1})
    path = tmp_path / "run" / "journal.jsonl"
    path.write_bytes(path.read_bytes() + b'{"phase":"train","ev')

    with journal.opened(tmp_path / "run") as book:
        book.append("train", "start", "k")

    lines = path.read_text().splitlines()
    assert ["fetch", "train"] == [json.loads(line)["phase"] for line in lines]


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    """Not a traceback of the file system's."""
    (tmp_path / "file").write_text("x")

    with (
        pytest.raises(SpecError, match=r"RUN-103 .*cannot be written .*--run-dir"),
        journal.opened(tmp_path / "file" / "run"),
    ):
        pass


def test_a_second_run_on_one_directory_is_refused_and_told_who_holds_it(tmp_path):
    """The lock is the kernel's: another process gets exit code 20 and the owner's pid."""
    code = (
        "import sys; from pathlib import Path; from tuning.pipeline import journal\n"
        "with journal.opened(Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(TransientError, match=f"pid {holder.pid}"),
            journal.opened(tmp_path / "run"),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()

    with journal.opened(tmp_path / "run"):
        pass  # a dead owner's lock is free


def test_a_folder_that_holds_something_else_is_not_touched(tmp_path):
    """A non-empty folder without a journal is refused and stays as it was."""
    (tmp_path / "thesis.tex").write_text("precious")

    with (
        pytest.raises(SpecError, match=r"nor a run directory \(it holds thesis.tex\)"),
        journal.opened(tmp_path),
    ):
        pass

    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_volume_may_hold_lost_and_found(tmp_path):
    """A fresh volume of a cluster is an empty folder but for lost+found."""
    (tmp_path / "lost+found").mkdir()

    with journal.opened(tmp_path) as book:
        assert book.records == []
