"""Training, evaluation, answers, merging and serving on a CUDA device give what the CPU gives.

Mixing tensors of both fails on the fake device as on a GPU, so a program that ends well has left
none behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_cuda.worker import Worker

PLACES = ("cpu", "cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the programs' files go."""
    return str(tmp_path_factory.mktemp("fake-cuda"))


@pytest.mark.parametrize("name", ["varlen", "sdpa", "rms_norm", "one_pass_head", "nf4"])
def test_the_checks_of_kernels_run(name: str, worker: Worker) -> None:
    """The GPU suite's code and its references are right before a GPU's minutes are spent."""
    assert worker.call("programs.check", name=name)


@pytest.mark.parametrize("name", [pytest.param("resumed", marks=pytest.mark.slow), "out_of_memory"])
def test_the_checks_of_runs_run(name: str, worker: Worker, tmp_path: Path) -> None:
    """Checkpoints hold the device's state; a device that is full is recognised and survived."""
    assert worker.call("programs.check", name=name, folder=str(tmp_path))


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "qlora", "packing": True, "held_out": 1},
        {"method": "lora", "precision": "float16", "packing": False, "held_out": 0},
    ],
    ids=["qlora bf16 packed", "lora fp16 padded"],
)
def test_training_is_that_of_the_cpu(recipe: dict[str, Any], worker: Worker, folder: str) -> None:
    """Losses at each step and the evaluation split's, to rounding; nothing is lost afterwards."""
    cpu, cuda = (
        worker.call("programs.trained", folder=folder, place=place, **recipe) for place in PLACES
    )

    assert cuda["loss_by_step"] == pytest.approx(cpu["loss_by_step"], rel=0.02)
    for name in ("eval_loss_before", "eval_loss_after"):
        assert cuda[name] == (cpu[name] and pytest.approx(cpu[name], rel=0.02))
    assert [] == cuda["lost"] and len(cuda["samples"]) == len(cpu["samples"])
    assert cuda["attention"] == cpu["attention"] and cuda["peak_memory_bytes"]


def test_answers_are_those_of_the_cpu(worker: Worker, folder: str) -> None:
    """With the adapter and without."""
    cpu, cuda = (worker.call("programs.answers", folder=folder, place=p) for p in PLACES)

    assert cpu == cuda and cuda[0] != cuda[1]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_merged_weights_are_those_of_the_cpu(method: str, worker: Worker, folder: str) -> None:
    """Byte for byte."""
    cpu, cuda = (
        worker.call("programs.merged", folder=folder, place=p, method=method) for p in PLACES
    )

    assert cpu == cuda


def test_the_server_answers_as_on_the_cpu(worker: Worker, folder: str) -> None:
    """Base and adapter in one batch, in transformers' continuous batching."""
    cpu, cuda = (worker.call("programs.served", folder=folder, place=p) for p in PLACES)

    assert cpu == cuda and "Batched" == cuda["runner"]


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (9, 0)])
def test_no_card_writes_out_all_scores(capability: tuple[int, int], worker: Worker) -> None:
    """A row without padding has no mask; the kernel of the card is used all the same."""
    kernels = worker.call("programs.one_document", capability=list(capability))

    expected = "flash" if capability >= (8, 0) else "efficient"
    assert {f"fake_cuda::{expected}_attention": 2} == kernels
