"""Signals, full disks, full memory, hangs, changed specs: each ends as promised, and goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from faults import jobs
from faults.jobs import World
from faults.kills import Aim, released
from faults.proxy import Turn
from faults.web import Request

from tuning.pipeline import outcome
from tuning.training import checkpoint

TRAIN, DATA, PARENT = "tuning.training.train", "tuning.data", "tuning"
STEP = r"metrics\.jsonl a"


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Callable[..., Path]
) -> Iterator[World]:
    with jobs.world(tmp_path_factory.mktemp("stops"), tiny_base("llama")) as made:
        yield made


@pytest.fixture(scope="module")
def clean(world: World) -> tuple[str, str]:
    """Adapter and digest of a run that nothing disturbs."""
    return jobs.result(world.run("clean"))


TERMS: dict[str, Aim | str] = {  # in the order of a run's life
    "fetch": "a silent server",
    "tokenise": Aim("os.rename", r"rows\.arrow", DATA, act="term"),
    "start of training": Aim("os.rename", r"log/train\.json", PARENT, after=True, act="term"),
    "load": Aim("open", r"/generation_config\.json", TRAIN, act="term"),
    "step": Aim("open", STEP, TRAIN, act="term"),
    "save": Aim("os.rename", r"MANIFEST\.json", TRAIN, act="term"),
    "export": Aim("os.rename", r"\.adapter\.tmp ", TRAIN, act="term"),
    "package": Aim("os.rename", r"image/blobs/sha256/\w", PARENT, act="term"),
    "push": "a silent registry",
}
LONG = {"max_steps": 60}  # so many that a training does not end between a signal and its arrival


@pytest.mark.timeout(900)
def test_a_run_stopped_in_every_phase_says_75_and_ends_in_the_same_bytes(world: World) -> None:
    """SIGTERM in each phase of one run in turn, also while servers are silent; then the end."""
    for phase, struck in TERMS.items():
        marker = world.folder / f"{phase}.struck"
        if isinstance(struck, Aim):
            ended = world.run("stopped", aim=struck, how={"marker": marker}, **LONG)
        elif phase == "fetch":
            with silent_server(world, marker):
                ended = world.run("stopped", **LONG)
        else:
            world.proxy.spoil(silent_registry(world, marker), method="PUT", path="/blobs/uploads")
            ended = world.run("stopped", **LONG)
            world.proxy.mend()

        assert marker.exists(), (phase, ended)
        print(f"{phase}: {time.time() - marker.stat().st_mtime:.1f} s from the signal to the end")
        assert 75 == ended.status, (phase, ended)
        assert "run the same command again" in ended.err

    clean = jobs.result(world.run("clean-long", **LONG))
    assert clean == jobs.result(world.run("stopped", **LONG))


@contextmanager
def silent_server(world: World, marker: Path) -> Iterator[None]:
    """Half of the rows, the signal, and then nothing."""

    def behave(request: Request) -> None:
        request.head(200, Content_Length=len(world.rows))
        request.body(world.rows[:1000])
        marker.touch()
        world.runs[-1].send(signal.SIGTERM)
        request.stall()

    world.web.route(jobs.ROWS, behave)
    try:
        yield
    finally:
        world.web.serve(jobs.ROWS, world.rows)


def silent_registry(world: World, marker: Path) -> Callable[[Turn], None]:
    """A registry that takes an upload and never answers."""

    def fault(turn: Turn) -> None:
        _ = turn.body
        marker.touch()
        run = world.runs[-1]
        run.send(signal.SIGTERM)
        run.process.wait(60)
        turn.reset()

    return fault


def can_unshare() -> bool:
    """Whether this machine lets a test have its own process numbers."""
    tried = ["unshare", "--fork", "--pid", "--mount-proc", "true"]
    return shutil.which("unshare") is not None and subprocess.run(tried).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="needs the right to make a PID namespace (root)")
def test_as_the_first_process_of_a_container_it_stops_as_anywhere(
    world: World, clean: tuple[str, str]
) -> None:
    """PID 1 gets no signal it has no handler for: SIGTERM ends it with 75, and it goes on."""
    command = [*map(str, world.command("first"))]
    alone = ["unshare", "--fork", "--pid", "--mount-proc", sys.executable, "-m", "tuning", *command]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        alone, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=quiet
    ) as outer:
        deadline = time.monotonic() + 200
        while (now := outcome.progress(world.folder / "first")) is None or now["step"] < 2:
            assert time.monotonic() < deadline and outer.poll() is None
            time.sleep(0.02)
        (first,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        outer.communicate(timeout=60)

    assert 75 == outer.returncode
    assert clean == jobs.result(world.run("first"))


def test_of_two_runs_in_one_directory_the_second_is_refused(world: World) -> None:
    """Exit 20 at once, naming the first, which is not disturbed; a dead owner's lock is free."""
    first = world.start("twice", aim=Aim("os.rename", r"spec\.yaml", PARENT, act="hang"))
    lock = world.folder / "twice" / ".lock"
    deadline = time.monotonic() + 60
    while not (lock.exists() and lock.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)

    second = world.start("twice").end()
    first.send(signal.SIGKILL)
    first.end()

    assert 20 == second.status
    assert f"another run is using this run directory (pid {first.process.pid} on" in second.err
    released(world.folder / "twice")


CHANGES: dict[str, Any] = {
    "base_model": "other/model",
    "base_revision": "sha256:1",
    "data": ("0" * 64,),
    "method": "qlora",
    "rank": 16,
    "learning_rate": 1e-4,
    "max_length": 128,
    "global_batch": 8,
    "steps": 9,
    "seed": 8,
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_recipe_never_goes_on_from_the_old_checkpoint(field: str, tmp_path: Path) -> None:
    """One field of ten changed: another run id, for which the old checkpoint is not there."""
    old = tiny_runs.recipe()
    new = replace(old, **{field: CHANGES[field]})
    checkpoint.save(tmp_path, run_id=old.run_id, step=4, contents=[("state.json", b"{}")])

    assert old.run_id != new.run_id
    assert checkpoint.newest(tmp_path, run_id=new.run_id) is None
    assert checkpoint.newest(tmp_path, run_id=old.run_id) is not None


def test_a_changed_spec_trains_anew_in_the_same_directory(
    world: World, clean: tuple[str, str]
) -> None:
    """Killed after a checkpoint, learning rate changed: a new run from step 0, and no mixture."""
    ended = world.run("changed", aim=Aim("open", STEP, TRAIN, nth=3))
    assert -signal.SIGKILL == ended.status
    (old,) = (world.folder / "changed" / "checkpoints").iterdir()

    other = world.run("changed", learning_rate=0.002)

    adapter, _ = jobs.result(other)
    summary = json.loads(other.out)
    assert adapter != clean[0]
    assert summary["training"]["resumed_from"] is None
    assert not old.name.startswith(summary["run_id"][:12])
    log = (world.folder / "changed" / "log" / "train.log").read_text()
    assert f"left alone, of another recipe: {old.name}" in log


OTHERWISE: dict[str, dict[str, Any]] = {  # how a person changes each of these
    "method": {"method": "qlora"},
    "rank": {"lora": {"r": 4}},
    "learning_rate": {"learning_rate": 0.002},
    "max_length": {"max_length": 128},
    "global_batch": {"gradient_accumulation_steps": 2},
    "steps": {"max_steps": 7},
    "seed": {"seed": 8},
    "packing": {"packing": False},
}


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("field", [*OTHERWISE, "data", "base_revision"])
def test_a_spec_changed_in_any_field_trains_anew(
    field: str, world: World, clean: tuple[str, str], tiny_base: Any
) -> None:
    """Killed in mid-training, then edited: the run ends as one that was never anything else."""
    changes = OTHERWISE.get(field, {})
    if field == "data":
        world.web.serve("/other.jsonl", world.rows.replace(b"cat", b"dog"))
        changes = {"url": "/other.jsonl"}
    elif field == "base_revision":
        changes = {"base": tiny_base("llama", seed=5)}
    name = f"edited-{field.replace('_', '-')}"
    ended = world.run(name, aim=Aim("open", STEP, TRAIN, nth=3))
    assert -signal.SIGKILL == ended.status

    edited = world.run(name, **changes)
    from_nothing = world.run(f"{name}-anew", **changes)

    assert json.loads(edited.out)["training"]["resumed_from"] is None
    assert jobs.result(from_nothing) == jobs.result(edited)
    assert clean[0] != jobs.result(edited)[0]


BATCH = {"packing": False, "per_device_train_batch_size": 4}


def test_out_of_memory_goes_on_with_smaller_pieces(world: World) -> None:
    """Two MemoryErrors: half the rows, then a quarter, from the last checkpoint; one run id."""
    ended = world.run("memory", aim=Aim("open", STEP, TRAIN, nth=3, act="memory"), **BATCH)

    jobs.result(ended)
    summary = json.loads(ended.out)
    assert 4 == summary["training"]["resumed_from"]
    found = world.journal("memory", "oom")
    (global_rows,) = {int(a) * int(b) for a, b in (ways(r["way"]) for r in found)}
    assert [4, 2] == [int(ways(record["way"])[0]) for record in found]
    assert all("TRAIN-140" in record["message"] for record in found)
    assert "out of memory before, so now 1 x 4" in ended.err or global_rows > 4
    assert summary["run_id"] == recipe_id(world, "memory")


def ways(text: str) -> tuple[str, str]:
    match = re.match(r"(\d+) x (\d+) rows", text)
    assert match
    return match[1], match[2]


def recipe_id(world: World, name: str) -> str:
    from tuning import files
    from tuning.plan import recipe_from_json

    return recipe_from_json(files.read_json(world.folder / name / "plan.json")["recipe"]).run_id


IMPATIENT = """
import sys
from functools import partial
from tuning import cli
from tuning.pipeline import options, watchdog
dog = partial(watchdog.Watchdog, floor=2.0, factor=1.0)
options.Options = partial(options.Options, watchdog=dog)
sys.argv[0] = "tuning"
sys.exit(cli.main())
"""


def test_a_hang_ends_with_the_stack_and_the_next_run_goes_on(
    world: World, clean: tuple[str, str]
) -> None:
    """A training that stands still: its stack in the log, exit 20, and then the same bytes."""
    how = {"start": ("-c", IMPATIENT)}
    ended = world.run("hung", aim=Aim("open", STEP, TRAIN, nth=4, act="hang"), how=how)

    assert 20 == ended.status, ended
    assert "RUN-112" in ended.err
    log = world.folder / "hung" / "log" / "train.log"
    assert str(log) in ended.err
    stacks = log.read_text().rpartition("Current thread")[2]
    assert "on_log" in stacks or "_write" in stacks
    assert clean == jobs.result(world.run("hung"))


def test_a_full_disk_keeps_the_last_checkpoint(world: World, clean: tuple[str, str]) -> None:
    """Nothing fits any more after the first save: exit 20; with room again, the same bytes."""
    with small_disk(world.folder / "full", megabytes=24):
        filler = world.folder / "full" / "lost+found"
        aim = Aim("os.rename", r"optimizer\.safetensors ", TRAIN, nth=2, act="fill")
        ended = world.run("full", aim=aim, how={"marker": filler})
        (kept,) = (world.folder / "full" / "checkpoints").iterdir()
        assert kept.name.endswith("-00000002")
        filler.unlink()
        again = world.run("full")

        assert 20 == ended.status, ended
        assert "no space left on the device" in ended.err
        assert clean == jobs.result(again)
        assert 2 == json.loads(again.out)["training"]["resumed_from"]
        shutil.copytree(world.folder / "full", world.folder / "full-copy")
    world.folders[world.folders.index(world.folder / "full")] = world.folder / "full-copy"


@contextmanager
def small_disk(folder: Path, *, megabytes: int) -> Iterator[None]:
    """A file system of its own at `folder`; the test is skipped where that is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
