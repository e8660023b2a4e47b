"""SIGKILL at named points of a run: the same command again ends in the same bytes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults import jobs, kills
from faults.jobs import World
from faults.kills import Aim
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
