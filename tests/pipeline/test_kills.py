"""SIGKILL at named points of a run: the same command again ends in the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from faults import jobs, kills
from faults.jobs import World
from faults.kills import Aim, Run, released
from faults.web import Request

SAVED = r"/checkpoints/\.tmp-\S+ \S+/checkpoints/\w+-\d+ "
TRAIN, DATA, PARENT = "tuning.training.train", "tuning.data", "tuning"

# In the order of a run's life, so that one directory can suffer all of them, one after the other.
BOUNDARIES: dict[str, Aim | tuple[str, str]] = {
    "spec parsed": Aim("open", r"/\.lock ", PARENT),
    "lock taken": Aim("os.rename", r"spec\.yaml", PARENT),
    "fetch start": Aim("open", r"\.part ", PARENT),
    "fetched half": ("GET", jobs.ROWS),
    "fetch renamed": Aim("os.rename", r"\.part ", PARENT, after=True),
    "validated": Aim("subprocess.Popen", "tokenise.json", PARENT),
    "tokenising": Aim("os.rename", r"rows\.arrow", DATA),
    "tokenised": Aim("os.rename", r"tokenise\.result", DATA, after=True),
    "packed": Aim("os.rename", r"packed\.json", DATA, after=True),
    "planned": Aim("os.rename", r"/plan\.json", PARENT),
    "base loaded": Aim("open", r"/generation_config\.json", TRAIN),
    "first step": Aim("open", r"metrics\.jsonl a", TRAIN, after=True),
    "mid step": Aim("open", r"metrics\.jsonl a", TRAIN, seconds=0.02),
    "checkpoint half": Aim("os.rename", r"optimizer\.safetensors ", TRAIN),
    "checkpoint complete": Aim("os.rename", r"MANIFEST\.json", TRAIN, after=True),
    "checkpoint renamed": Aim("os.rename", SAVED, TRAIN, after=True),
    "checkpoint pruned": Aim("os.rename", r"\.tmp-old-", TRAIN, after=True),
    "adapter exported": Aim("os.rename", r"\.adapter\.tmp \S+/adapter ", TRAIN, after=True),
    "trained": Aim("os.rename", r"adapter/tuning\.json", PARENT),
    "layer built": Aim("os.rename", r"image/blobs/sha256/\w", PARENT, after=True),
    "image built": Aim("os.rename", r"image/index\.json", PARENT, after=True),
    "blob uploaded": ("PUT", "/blobs/uploads/"),
    "manifest by digest": ("PUT", "/manifests/sha256:"),
    "tag written": ("PUT", "/manifests/v1"),
}


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Callable[..., Path]
) -> Iterator[World]:
    """A server with rows, a tiny base and a registry; all runs left behind are audited."""
    folder = tmp_path_factory.mktemp("kills")
    with jobs.world(folder, tiny_base("llama")) as made:
        yield made


@pytest.fixture(scope="module")
def clean(world: World) -> tuple[str, str]:
    """Adapter and digest of a run that nothing disturbs."""
    return jobs.result(world.run("clean"))


def kill(world: World, name: str, boundary: str) -> None:
    """Run `name` until it is killed at the boundary, and assert that it was."""
    struck = BOUNDARIES[boundary]
    if isinstance(struck, Aim):
        ended = world.run(name, aim=struck)
    elif struck[0] == "GET":
        with half_served(world):
            ended = world.run(name)
    else:
        kills.killing(world.proxy, world.runs, method=struck[0], path=struck[1])
        ended = world.run(name)
        world.proxy.mend()
    assert -signal.SIGKILL == ended.status, (boundary, ended)


@contextmanager
def half_served(world: World) -> Iterator[None]:
    """The rows come by half, then the run is killed; later they come whole."""

    def behave(request: Request) -> None:
        request.head(200, Content_Length=len(world.rows), ETag='"half"')
        request.body(world.rows[: len(world.rows) // 2])
        world.runs[-1].send(signal.SIGKILL)

    world.web.route(jobs.ROWS, behave)
    try:
        yield
    finally:
        world.web.serve(jobs.ROWS, world.rows)


@pytest.mark.timeout(900)
def test_a_run_killed_everywhere_ends_in_the_same_adapter_and_image(
    world: World, clean: tuple[str, str]
) -> None:
    """One directory, killed at each boundary in turn, ends with the bytes of a clean run."""
    for boundary in BOUNDARIES:
        kill(world, "killed", boundary)

    assert clean == jobs.result(world.run("killed"))
    assert not (world.folder / "killed" / "checkpoints" / "quarantine").exists()


FILES = ("weights", "optimizer", "trainer_state", "state", "MANIFEST")
INSIDE = {
    f"{name} {when}": Aim(
        event, rf"/checkpoints/\.tmp-\S+/\.?{name}\.\w+", TRAIN, nth=nth, after=after
    )
    for name in FILES
    for when, event, nth, after in (
        ("begun", "open", 1, False),
        ("half written", "open", 1, True),
        ("not yet named", "os.rename", 2, False),
        ("named", "os.rename", 2, True),
    )
}


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("place", INSIDE)
def test_a_run_killed_inside_a_save_goes_on(
    place: str, world: World, clean: tuple[str, str]
) -> None:
    """At the beginning, inside and at the end of each file of a checkpoint: always the same."""
    for number in range(int(os.environ.get("SOAK", "1"))):
        name = f"{place.replace(' ', '-').lower().replace('_', '-')}-{number}"
        ended = world.run(name, aim=INSIDE[place])
        assert -signal.SIGKILL == ended.status
        assert clean == jobs.result(world.run(name)), name


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_run_killed_once_ends_in_the_same_adapter_and_image(
    boundary: str, world: World, clean: tuple[str, str]
) -> None:
    """Each boundary for itself, as often as SOAK says: `make soak N=50`."""
    for number in range(int(os.environ.get("SOAK", "1"))):
        name = f"{boundary.replace(' ', '-')}-{number}"
        kill(world, name, boundary)
        assert clean == jobs.result(world.run(name)), name


@pytest.mark.timeout(900)
def test_kills_at_random_times_end_in_the_same_bytes(world: World) -> None:
    """Of the parent, and of one of two ranks."""
    assert 2 <= random_kills(world, None, 2, count=2, seed=2)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_hundreds_of_random_kills_end_in_one_digest(world: World, clean: tuple[str, str]) -> None:
    """SOAK_KILLS of them, half of the parent, half of a child or one of two ranks."""
    wanted, done, seed = int(os.environ.get("SOAK_KILLS", "200")), 0, 100
    one_of_two: tuple[str, str] | None = None
    while done < wanted:
        seed += 1
        ranks = 1 + seed % 2
        if ranks == 2 and one_of_two is None:
            one_of_two = jobs.result(world.start("two-clean", how={"more": TWO}).end())
        expected = clean if ranks == 1 else one_of_two
        done += random_kills(world, expected, ranks, count=4, seed=seed)
        print(f"{done} kills, seed {seed}, {ranks} ranks: one digest", flush=True)


TWO = ("--ranks", "2")


def random_kills(
    world: World, expected: tuple[str, str] | None, ranks: int, *, count: int, seed: int
) -> int:
    """Kill a run `count` times, in turn its parent and a training child, then compare its bytes.

    Returns how many kills struck a living process. Without `expected`, an undisturbed run of as
    many ranks is made first.
    """
    chance, struck = random.Random(seed), 0
    how = {"more": TWO} if ranks == 2 else {}
    if expected is None:
        expected = jobs.result(world.start(f"two-{seed}", how=how).end())
    name = f"random-{seed}"
    for number in range(40):
        run = world.start(name, how=how)
        if struck < count:
            child = (seed + number) % 2 == 0
            struck += strike(run, chance, child=child)
        ended = run.end()
        released(world.folder / name)
        if ended.status == 0 and struck >= count:
            assert expected == jobs.result(ended), (seed, ended.err)
            return struck
        assert ended.status in (0, -signal.SIGKILL, 137), ended
        if ended.status == 0:  # faster than the kill: once more from nothing
            shutil.rmtree(world.folder / name)
    raise AssertionError("the kills never struck")


def strike(run: Run, chance: random.Random, *, child: bool) -> int:
    """SIGKILL the parent of a run at a random time, or one of its training children."""
    deadline = time.monotonic() + chance.uniform(0, 12 if not child else 6)
    victims = [run.process.pid]
    while run.process.poll() is None:
        if child:
            victims = training_children(run.process.pid)
            if not victims:
                deadline = max(deadline, time.monotonic() + chance.uniform(0, 1))
        if victims and time.monotonic() >= deadline:
            with suppress(ProcessLookupError):
                os.kill(chance.choice(victims), signal.SIGKILL)
                return 1
        time.sleep(0.02)
    return 0


def training_children(parent: int) -> list[int]:
    """Children of `parent` that train: also those that still load."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            stat = (path / "stat").read_text().rpartition(")")[2].split()
            if int(stat[1]) == parent and stat[0] != "Z" and TRAIN.encode() in words:
                found.append(int(path.name))
    return found
