"""How often the kernel has killed a process of ours because memory ran out.

A SIGKILL alone says nothing: administrators, node shutdowns and other programs send it too. The
kernel counts those of its own: `oom_kill` in the cgroup's `memory.events` (cgroup v2) or
`memory.oom_control` (v1), and for the whole machine in /proc/vmstat, which is asked where no cgroup
of ours has a count. A counter covers the children, which live in the same cgroup.
"""

from __future__ import annotations

import re
from pathlib import Path

_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def count(root: Path = Path("/")) -> int:
    """The kills so far; a later call gives more if there were any. `root`: of proc and sys."""
    found = [n for path in _counters(root) if (n := _number(path)) is not None]
    if found:
        return sum(found)
    return _number(root / "proc" / "vmstat") or 0


def _counters(root: Path) -> list[Path]:
    """The files that may count for this process's cgroup, in the order of /proc/self/cgroup.

    Within a container the path there may be the host's, while the mount shows the container's own
    cgroup as its top, so that is looked at where the path is not found.
    """
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return []
    mount, chosen = root / "sys" / "fs" / "cgroup", []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        if number == "0" and not controllers:
            tops, file = (mount, mount / "unified"), "memory.events"
        elif "memory" in controllers.split(","):
            tops, file = (mount / controllers, mount / "memory"), "memory.oom_control"
        else:
            continue
        places = [top / own.strip("/") for top in tops] + list(tops)
        chosen += [place / file for place in places if (place / file).is_file()][:1]
    return chosen


def _number(path: Path) -> int | None:
    try:
        found = _COUNT.search(path.read_text(errors="replace"))
    except OSError:
        return None
    return int(found[1]) if found else None
