"""A kill at any moment leaves a whole checkpoint; a damaged one is put aside, never trusted."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch

from tuning.training import checkpoint

RUN = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4


def contents(step: int) -> Iterator[tuple[str, bytes]]:
    yield "weights.safetensors", b"w" * 3000 + bytes([step])
    yield "optimizer.safetensors", b"o" * 5000 + bytes([step])
    yield "state.json", json.dumps({"step": step}).encode()


def save(root: Path, step: int, run_id: str = RUN) -> checkpoint.Checkpoint:
    return checkpoint.save(root, run_id=run_id, step=step, contents=contents(step))


def in_a_process_that_dies(at: int, work: Callable[[], object]) -> bool:
    """Run `work` in a forked process killed at its `at`-th fsync; False if it ended before."""
    child = os.fork()
    if child == 0:
        fsync, calls = os.fsync, iter(range(1, 10_000))

        def deadly(handle: int) -> None:
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(handle)

        os.fsync = deadly
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    """Saved, found again with its content, and only the last two are kept."""
    for step in (2, 4, 6):
        save(tmp_path, step)

    found = checkpoint.newest(tmp_path, run_id=RUN)

    assert found is not None and 6 == found.step
    assert dict(contents(6)) == {name: found.read(name) for name, _ in contents(6)}
    assert [f"{RUN[:12]}-00000004", f"{RUN[:12]}-00000006"] == sorted(
        p.name for p in tmp_path.iterdir()
    )


def test_a_kill_at_any_write_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """SIGKILL at every fsync of a save: always the old or the new one, and the next save works."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    kills = 0
    for at in range(1, 100):
        if not in_a_process_that_dies(at, lambda: save(tmp_path, 3)):
            break
        kills += 1

        found = checkpoint.newest(tmp_path, run_id=RUN)

        assert found is not None and found.step in (2, 3)
        assert not (tmp_path / checkpoint.QUARANTINE).exists()
        assert not list(tmp_path.glob(f"{checkpoint.SCRATCH}*"))
    assert kills > 10
    assert 3 == checkpoint.newest(tmp_path, run_id=RUN).step  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [*dict(contents(0)), checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_checkpoint_is_put_aside_and_named(
    name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One byte wrong in any file: the checkpoint before it is used, the log says which and why."""
    save(tmp_path, 1)
    path = save(tmp_path, 2).folder / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes(data[:-1] if damage == "cut" else flipped)

    found = checkpoint.newest(tmp_path, run_id=RUN)

    # a flipped byte between the manifest's values changes nothing it says
    if damage == "cut" and name == checkpoint.MANIFEST:
        assert found is not None and 2 == found.step  # only its final newline was cut
    else:
        assert found is not None and 1 == found.step
        assert [path.parent.name] == [p.name for p in (tmp_path / "quarantine").iterdir()]
        assert f"checkpoint {path.parent.name} is damaged" in caplog.text


def test_an_unexpected_file_is_damage(tmp_path: Path) -> None:
    """A pickle slipped into a checkpoint is not opened; the checkpoint is put aside."""
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return os.mkdir, (str(marker),)

    root = tmp_path / "checkpoints"
    save(root, 1)
    folder = save(root, 2).folder
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Payload()))

    found = checkpoint.newest(root, run_id=RUN)

    assert found is not None and 1 == found.step
    assert not marker.exists()


def test_a_checkpoint_of_another_run_is_never_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither by its name, nor renamed."""
    save(tmp_path, 5, OTHER)

    assert checkpoint.newest(tmp_path, run_id=RUN) is None
    assert "left alone, of another recipe: fedcba987654-00000005" in caplog.text

    (tmp_path / "fedcba987654-00000005").rename(tmp_path / f"{RUN[:12]}-00000005")

    assert checkpoint.newest(tmp_path, run_id=RUN) is None
    assert (tmp_path / "quarantine" / f"{RUN[:12]}-00000005").is_dir()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """A save that fails half-way leaves nothing behind and the one before as it was."""
    save(tmp_path, 1)

    def full() -> Iterator[tuple[str, bytes]]:
        yield next(contents(2))
        raise OSError(errno.ENOSPC, "no space left")

    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(tmp_path, run_id=RUN, step=2, contents=full())

    assert [f"{RUN[:12]}-00000001"] == [p.name for p in tmp_path.iterdir()]
    assert 1 == checkpoint.newest(tmp_path, run_id=RUN).step  # type: ignore[union-attr]


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none", run_id=RUN) is None


def test_random_numbers_go_on_where_they_were() -> None:
    """Python, numpy and torch draw the same numbers after a restore, through JSON."""

    def draw() -> list[float]:
        numpy_draw = numpy.random.default_rng  # the legacy generator is what libraries use
        assert numpy_draw is not None
        return [random.random(), random.gauss(0, 1), numpy.random.rand(), torch.rand(1).item()]

    random.gauss(0, 1)  # leaves one number in store
    state = json.loads(checkpoint.pack_json(checkpoint.capture_random()))
    first = draw()
    draw()

    checkpoint.restore_random(state)

    assert first == draw()


def test_an_optimizer_comes_back_bit_for_bit() -> None:
    """State and groups through bytes: the next step is the same."""

    def made() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1, betas=(0.8, 0.97))

    def step(layer: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    layer, optimizer = made()
    step(layer, optimizer)
    tensors, record = checkpoint.split_optimizer(optimizer.state_dict())
    weights = checkpoint.pack_tensors(dict(layer.named_parameters()))
    data, text = checkpoint.pack_tensors(tensors), checkpoint.pack_json(record)
    step(layer, optimizer)

    other, again = made()
    other.load_state_dict(checkpoint.unpack_tensors(weights))
    stored = checkpoint.unpack_tensors(data)
    again.load_state_dict(checkpoint.join_optimizer(stored, json.loads(text)))
    step(other, again)

    assert torch.equal(layer.weight, other.weight)
    assert (0.8, 0.97) == again.param_groups[0]["betas"]


def test_progress_after_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    """Lines of lost steps and a torn last line go; the rest stays as it was."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')

    checkpoint.truncate_lines(path, step=2)

    assert '{"step": 1}\n{"step": 2}\n' == path.read_text()


@pytest.mark.parametrize("inner", list(itertools.permutations(["exp_avg", "exp_avg_sq", "step"])))
def test_every_rank_gathers_an_optimizer_s_tensors_in_one_order(inner: tuple[str, ...]) -> None:
    """Ranks that share a model gather tensor after tensor. A safetensors file gives its tensors in
    another order in each process, so that after a resume one rank's first moments met another's
    second ones."""
    kept = {name: torch.full((2,), float(i)) for i, name in enumerate(sorted(inner))}
    state = {
        "state": {number: {name: kept[name] for name in inner} for number in (10, 9, 0)},
        "param_groups": [{"params": [0, 9, 10], "betas": (0.9, 0.999)}],
    }
    tensors, record = checkpoint.split_optimizer(state)
    assert sorted(tensors) == list(tensors) and 9 == len(tensors)
    joined = checkpoint.join_optimizer(dict(reversed(tensors.items())), record)
    assert list(tensors) == list(checkpoint.split_optimizer(joined)[0])
