"""The cache of packed weights is written once and whole, whatever else runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tuning.models import packed

CODE = """
import sys, time
from pathlib import Path
from tuning.models import packed
class Model:
    def parameters(self):
        return iter(())
    def save_pretrained(self, folder, safe_serialization):
        (folder / "model.safetensors").write_bytes(b"half")
        print("writing", flush=True)
        sys.stdin.readline()
packed.save(Model(), Path(sys.argv[1]))
"""


class Model(torch.nn.Linear):
    """Writes a file of its own name."""

    def __init__(self, name: str) -> None:
        super().__init__(2, 2)
        self.name = name

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        """As transformers' does."""
        (folder / "model.safetensors").write_text(self.name)


def names(target: Path) -> list[str]:
    """What lies in the cache."""
    return sorted(path.name for path in target.parent.iterdir())


@pytest.fixture
def writer(tmp_path: Path) -> Any:
    """Another process that is writing to the cache, until a line comes."""
    command = [sys.executable, "-c", CODE, str(tmp_path / "packed" / "key")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as child:
        assert "writing\n" == child.stdout.readline()
        yield child
        child.kill()


def test_while_one_writes_another_does_not_wait(writer: Any, tmp_path: Path) -> None:
    """Nor does it touch what is being written; the first one's copy stays."""
    target = tmp_path / "packed" / "key"
    packed.save(Model("second"), target)
    assert not target.exists() and len(names(target)) == 1
    writer.communicate("go on\n")

    assert packed.is_whole(target) and ["key"] == names(target)
    assert b"half" == (target / "model.safetensors").read_bytes()


def test_what_a_killed_process_left_is_removed(writer: Any, tmp_path: Path) -> None:
    """Its lock ended with it."""
    target = tmp_path / "packed" / "key"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    packed.save(Model("next"), target)

    assert packed.is_whole(target) and ["key"] == names(target)


def test_a_whole_copy_is_not_taken_from_under_a_reader(tmp_path: Path) -> None:
    """Two runs that both found none: the second leaves the first one's files as they are."""
    target = tmp_path / "packed" / "key"
    packed.save(Model("first"), target)
    inode = target.stat().st_ino
    many = [threading.Thread(target=packed.save, args=(Model(f"{n}"), target)) for n in range(4)]
    for thread in many:
        thread.start()
    for thread in many:
        thread.join()

    assert inode == target.stat().st_ino
    assert "first" == (target / "model.safetensors").read_text()
    (target / "model.safetensors").write_text("damaged")
    packed.save(Model("again"), target)
    assert packed.is_whole(target)
    assert "again" == (target / "model.safetensors").read_text()
