"""What the kernel says of its kills for want of memory, wherever it says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuning.pipeline import memory_kills

POD = "/kubepods.slice/pod1/container1"
# /proc/self/cgroup, and the file that counts for it
MACHINES = {
    "v2, in a container's namespace": ("0::/\n", "sys/fs/cgroup/memory.events"),
    "v2, on a host": ("0::/user.slice/run-1\n", "sys/fs/cgroup/user.slice/run-1/memory.events"),
    "v2, the host's path in a container": (f"0::{POD}\n", "sys/fs/cgroup/memory.events"),
    "v2, above the namespace": ("0::/../sibling\n", "sys/fs/cgroup/memory.events"),
    "v1": (f"4:memory:{POD}\n0::/\n", f"sys/fs/cgroup/memory{POD}/memory.oom_control"),
    "v1, in a container": (f"4:memory:{POD}\n", "sys/fs/cgroup/memory/memory.oom_control"),
    "v1, with others": (
        "3:cpu,memory:/a\n",
        "sys/fs/cgroup/cpu,memory/a/memory.oom_control",
    ),
    "no count but the machine's": ("0::/\n", "proc/vmstat"),
    "no cgroups": (None, "proc/vmstat"),
}


@pytest.mark.parametrize("name", MACHINES)
def test_the_count_of_the_own_cgroup_is_read(name: str, tmp_path: Path) -> None:
    """cgroup v2 and v1, seen from the host and from inside of a container."""
    cgroup, counter = MACHINES[name]
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "vmstat").write_text("nr_free_pages 5\noom_kill 70\n")
    if cgroup is not None:
        (tmp_path / "proc" / "self" / "cgroup").write_text(cgroup)
    file = tmp_path / counter
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("low 0\noom 9\noom_kill 3\noom_group_kill 8\n")
    before = memory_kills.count(tmp_path)
    file.write_text("low 0\noom 9\noom_kill 4\noom_group_kill 8\n")

    assert (3, 4) == (before, memory_kills.count(tmp_path))


def test_a_machine_that_says_nothing_has_no_kills(tmp_path: Path) -> None:
    """No /proc, or files without the count: never an error, and never a kill."""
    assert 0 == memory_kills.count(tmp_path)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_bytes(b"0::/\xff\n4:memory\nrubbish\n")
    (tmp_path / "sys" / "fs" / "cgroup").mkdir(parents=True)
    (tmp_path / "sys" / "fs" / "cgroup" / "memory.events").write_text("oom_kill many\n")

    assert 0 == memory_kills.count(tmp_path)
