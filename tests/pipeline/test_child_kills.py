"""A training child that is killed: by the kernel for want of memory, or by somebody else."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import jobs
from faults.jobs import World
from faults.kills import Aim

TRAIN, STEP = "tuning.training.train", r"metrics\.jsonl a"


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Callable[..., Path]
) -> Iterator[World]:
    with jobs.world(tmp_path_factory.mktemp("child-kills"), tiny_base("llama")) as made:
        yield made


@pytest.fixture(scope="module")
def clean(world: World) -> tuple[str, str]:
    """Adapter and digest of a run that nothing disturbs."""
    return jobs.result(world.run("clean"))


IN_CGROUP = """
import os, sys
from tuning import cli
with open(os.environ["CGROUP"] + "/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
sys.argv[0] = "tuning"
sys.exit(cli.main())
"""


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cgroup with 2 GiB of memory, for `IN_CGROUP`; skips where none can be made."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.split(":", 2)[2] for line in lines if ":memory:" in line), "/")
    folder = Path(f"/sys/fs/cgroup/memory{own}") / f"tuning-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(2 << 30))
    except OSError:
        pytest.skip("a cgroup with a memory limit takes root and cgroup v1")
    monkeypatch.setenv("CGROUP", str(folder))
    try:
        yield
    finally:
        folder.rmdir()


@pytest.mark.usefixtures("small_memory")
def test_a_child_killed_by_the_kernel_is_out_of_memory_and_remembered(world: World) -> None:
    """Kills by the kernel: exit 14 saying what was tried; the next start goes on there."""
    one = {"packing": False, "per_device_train_batch_size": 1}
    aim = Aim("open", STEP, TRAIN, nth=1, act="exhaust")
    ended = world.run("killed", aim=aim, how={"start": ("-c", IN_CGROUP)}, **one)
    again = world.run("killed", **one)

    assert 14 == ended.status, ended
    tried = len(world.journal("killed", "oom"))
    assert "out of memory with each of: " in ended.err
    assert tried == len(re.findall(r"\d+ x \d+ rows", ended.err.rpartition("each of: ")[2]))
    assert "with gradient checkpointing. Change: " in ended.err
    assert "RUN-111" in world.journal("killed", "oom")[0]["message"]
    assert "out of memory before, so now" in again.err
    jobs.result(again)


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("SIGBUS", "SIGSEGV", "SIGABRT")]


@pytest.mark.parametrize("name", ["SIGKILL", *OTHERS])
def test_a_child_killed_by_somebody_goes_on_with_the_same_placement(
    name: str, world: World, clean: tuple[str, str]
) -> None:
    """No signal alone means out of memory: from the last checkpoint, with the same pieces."""
    ended = world.run(f"struck-{name.lower()}", aim=Aim("open", STEP, TRAIN, nth=3, act=name))

    assert clean == jobs.result(ended)
    assert [] == world.journal(f"struck-{name.lower()}", "oom")
    assert 2 == len(world.journal(f"struck-{name.lower()}", "killed"))
    assert f"killed by {name}; trying again" in ended.err


def test_a_child_killed_each_time_ends_the_run_and_the_next_one_goes_on(
    world: World, clean: tuple[str, str]
) -> None:
    """After four kills somebody has to look: 137, and the placement stays."""
    ended = world.run("ever-struck", aim=Aim("open", STEP, TRAIN, nth=1, act="SIGKILL"))

    assert 137 == ended.status, ended
    assert "RUN-111" in ended.err and "memory" not in ended.err
    assert 3 == len(world.journal("ever-struck", "killed"))
    assert clean == jobs.result(world.run("ever-struck"))
