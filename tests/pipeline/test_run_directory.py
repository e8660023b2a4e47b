"""A run directory with links, damaged lines, and a file system that fails."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tuning import files
from tuning.errors import SpecError, TransientError, TuningError
from tuning.pipeline import changes, endings, journal, outcome, report


def opened(folder: Path) -> list[dict[str, Any]]:
    with journal.opened(folder) as book:
        return book.records


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with three finished phases and a file."""
    folder = tmp_path / "run"
    with journal.opened(folder) as book:
        (folder / "data").mkdir()
        for name in ("fetch", "tokenise", "pack"):
            path = folder / "data" / name
            path.write_text(name * 100)
            book.do(name, "k", lambda name=name: {"n": name}, outputs=lambda _, path=path: [path])
    return folder


@pytest.mark.parametrize(
    "name",
    [*journal.FILES, *journal.FOLDERS, "image/blobs", "data/packed/train.arrow", "log/train.log"],
)
def test_nothing_is_written_through_a_link(name: str, tmp_path: Path) -> None:
    """A link in a run directory is refused by name; what it points at stays as it was."""
    run, victim = tmp_path / "run", tmp_path / "victim"
    victim.write_text("precious")
    (run / name).parent.mkdir(parents=True)
    (run / "spec.yaml").touch()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)

    with pytest.raises(SpecError, match=f"RUN-105 {run / name}: is a symbolic link"):
        opened(run)
    assert "precious" == victim.read_text()


def test_a_pipe_never_makes_a_run_wait_and_a_folder_is_no_file(tmp_path: Path) -> None:
    """A pipe called .lock, a folder called journal.jsonl, a file called data."""
    for number, (name, make) in enumerate(
        {".lock": os.mkfifo, "journal.jsonl": os.mkdir, "data": lambda p: Path(p).touch()}.items()
    ):
        run = tmp_path / str(number)
        run.mkdir()
        (run / "spec.yaml").touch()
        make(run / name)
        with pytest.raises(SpecError, match=r"RUN-105 .* another kind"):
            opened(run)


def test_the_run_directory_itself_may_be_a_link(tmp_path: Path) -> None:
    """To a larger disk, say."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    assert [] == opened(tmp_path / "run")


def test_a_scratch_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    """Its name can be guessed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("spec.yaml", "copy"):
        (tmp_path / f".{name}.{os.getpid()}.tmp").symlink_to(victim)
    files.write(tmp_path / "spec.yaml", "new")
    files.copy(tmp_path / "spec.yaml", tmp_path / "copy")

    assert ("precious", "new") == (victim.read_text(), (tmp_path / "copy").read_text())


LINES = [b"null", b"[]", b"{}", b"7", b'"text"', b"\xff\xfe", b"\0" * 50, b"{" * 100_000, b""]
LINES += [b'{"at":1,"phase":2,"event":3,"key":4}', b'{"at":"","phase":"x","event":"end","key":""}']


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_is_no_record_is_dropped(line: bytes, run: Path) -> None:
    """At the start, between the others or at the end: the others count, and new ones follow."""
    path = run / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for place in (0, 3, len(lines)):
        path.write_bytes(b"".join([*lines[:place], line + b"\n", *lines[place:]]))
        assert len(lines) == len(opened(run))
    path.write_bytes(b"".join(lines) + line)
    assert len(lines) == len(opened(run))


def test_a_flipped_byte_of_the_journal_never_changes_a_record(run: Path) -> None:
    """At any place: each record that is left is one that was written."""
    path = run / "journal.jsonl"
    whole, before = path.read_bytes(), opened(run)
    for place in range(0, len(whole), 3):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        for record in opened(run):
            known = {name: record.get(name) for name in ("phase", "event", "key", "value")}
            assert any(known.items() <= {"value": None, **each}.items() for each in before), place


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_an_output_that_differs_makes_its_phase_again_and_no_other(how: str, run: Path) -> None:
    """Found by who needs it, and remembered by the journal over a crash."""
    path = run / "data" / "tokenise"
    data = path.read_bytes()
    path.write_bytes(b"T" + data[1:] if how == "flip" else data[:-1])
    if how == "remove":
        path.unlink()

    with journal.opened(run) as book, pytest.raises(journal.Damaged, match="phase tokenise"):
        book.do("train", "k", lambda: {"never": 1}, needs=("fetch", "tokenise"))
    with journal.opened(run) as book:
        assert book.current("tokenise", "k") is None
        assert book.current("fetch", "k") == {"n": "fetch"}
        assert book.current("fetch", "k", unless=("tokenise",)) is None


REFUSED = {errno.ENOLCK: "No locks", errno.EOPNOTSUPP: "not supported", errno.ENOSYS: "not impl"}


@pytest.mark.parametrize("number", REFUSED)
def test_a_disk_without_locks_is_not_another_run(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS without its lock daemon, FUSE: exit 20, and what to mount otherwise."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(TransientError, match=f"RUN-104 .*{REFUSED[number]}.*--run-dir"):
        opened(tmp_path / "run")


FAILING = ("EIO", "ESTALE", "EROFS", "ETIMEDOUT", "ENODEV", "ENXIO", "ENOTCONN", "EREMOTEIO")
FAILING += ("ENOSPC", "EDQUOT", "EMFILE", "ENOMEM", "EAGAIN", "ENOENT", "EUCLEAN")


@pytest.mark.parametrize("name", FAILING)
def test_a_failing_file_system_is_worth_another_try(name: str, tmp_path: Path) -> None:
    """Exit 20 with the path, from the parent, a child and a library written in Rust."""
    number = getattr(errno, name)
    path = str(tmp_path / "run" / "plan.json")
    for error in (
        OSError(number, os.strerror(number), path),
        OSError(number, os.strerror(number)),
        RuntimeError(f"Error while serializing: {os.strerror(number)} (os error {number})"),
    ):
        known = endings.known(error, "train", tmp_path / "run")
        assert 20 == known.exit_code
        assert str(tmp_path / "run") in str(known)
        code = "RUN-120" if name in ("ENOSPC", "EDQUOT") else "RUN-122"
        assert str(known).startswith(f"{code} {tmp_path}")


@pytest.mark.parametrize("name", ["EACCES", "EPERM", "EISDIR", "ENOTDIR", "ENAMETOOLONG", "ELOOP"])
def test_a_path_that_cannot_be_used_is_named(name: str, tmp_path: Path) -> None:
    """Waiting does not help: exit 11, with the path."""
    number = getattr(errno, name)
    known = endings.known(OSError(number, os.strerror(number), "/x/plan.json"), "plan", tmp_path)

    assert 11 == known.exit_code and "RUN-103 /x/plan.json" in str(known)


def test_a_traceback_that_cannot_be_written_hides_nothing(tmp_path: Path) -> None:
    """A bug of ours on a disk that is gone is still told as one."""
    known: TuningError = endings.known(ValueError("x"), "plan", tmp_path / "gone")
    assert "RUN-199" in str(known)
    assert files.system_error(ValueError("x")) is None


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_folder_that_cannot_be_synced_is_written_all_the_same(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SMB and FUSE refuse fsync of a folder; a file that cannot be synced is an error."""
    sync = os.fsync

    def refuse(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").resolve().is_dir():
            raise OSError(number, os.strerror(number))
        sync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    files.write(tmp_path / "a", "text")
    assert "text" == (tmp_path / "a").read_text()


def test_damaged_lines_of_the_metrics_are_left_out(tmp_path: Path) -> None:
    """Neither the report nor the progress ends with an error."""
    good = {"step": 4, "steps": 8, "loss": 2.5, "tokens_per_second": 10.0}
    lines = [json.dumps(good).encode(), b"\xff}", b"[1]}", b'{"step":"5"}', b'{"step":5,"loss":[]}']
    for junk in (b"\0\0\0", b"{}", b'{"step": 1e999}'):
        (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines, junk, b""]))
        assert good == outcome.progress(tmp_path)
        assert "step 4 of 8" in report.page(tmp_path)


def test_an_adapter_of_a_broken_card_has_no_changes_to_name(tmp_path: Path) -> None:
    """What changed is a help; it never ends a run."""
    for text in ("", "[]", '{"recipe": 5}', "\x00"):
        (tmp_path / "tuning.json").write_text(text)
        assert [] == changes.changed(tmp_path, None)  # type: ignore[arg-type]
