"""Disks and mounts that fail: exit code 20 with the path and the remedy, never a bug of ours."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.web import Origin

from tuning import files
from tuning.errors import TransientError
from tuning.network.policy import Policy
from tuning.sources import fetch
from tuning.spec import Source

ROWS = b'{"text": "a row"}\n' * 9000
LOOPBACK = Policy(allow_hosts={"127.0.0.1"})
FAILURES = (errno.EIO, errno.ESTALE, errno.EROFS, errno.EDQUOT, errno.ENOSPC, errno.EFBIG)
CHILD = """
import resource, signal, sys
from pathlib import Path
from tuning.errors import TuningError
from tuning.network.policy import Policy
from tuning.sources import fetch
from tuning.spec import Source
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    policy = Policy(allow_hosts={"127.0.0.1"})
    fetch.fetch(Source(urls=(sys.argv[1],)), Path(sys.argv[2]), policy=policy)
except TuningError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as server:
        yield server


def test_a_disk_that_refuses_more_bytes_is_named(origin: Origin, tmp_path: Path) -> None:
    """A real limit of the kernel: the write fails in the middle of the file."""
    url = origin.serve("/rows", ROWS)

    child = subprocess.run(
        [sys.executable, "-c", CHILD, url, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert child.stdout.startswith(f"FETCH-140 {tmp_path}/0000"), child.stderr
    assert "File too large" in child.stdout
    assert 20 == child.returncode


@pytest.mark.parametrize("number", FAILURES)
@pytest.mark.parametrize("call", ["fsync", "truncate", "replace"])
def test_a_download_on_a_failing_disk_may_pass(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """Each call of the system that a download makes, with each error of a failing mount."""
    url = origin.serve("/rows", ROWS, cut_at=9000, reset=False)

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    owner = Path if call == "replace" else os
    monkeypatch.setattr(owner, call, fail)
    with pytest.raises(TransientError, match=r"(FETCH-140|RUN-120) .*0000.*Change: ") as caught:
        fetch.fetch(Source(urls=(url,)), tmp_path, policy=LOOPBACK)

    assert 20 == caught.value.exit_code


def test_a_file_that_lies_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")

    with pytest.raises(TransientError, match=r"FETCH-140 .*/data"):
        fetch.fetch(Source(urls=("http://127.0.0.1:9/a",)), tmp_path / "data", policy=LOOPBACK)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Some network mounts refuse fsync of a folder; its files are synced all the same."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write(tmp_path / "a", b"whole")

    assert b"whole" == (tmp_path / "a").read_bytes()
