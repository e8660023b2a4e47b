"""Kernels, runs and plans on a real GPU: `make test-gpu`, meant for at most eight minutes
on an H200, and not run on one yet.

No network: models are random, of the shapes of presets. The record is one JSON file, named by
TUNING_GPU_RESULTS (benchmarks/results/gpu_suite.json). Sizes and assertions are in checks.py and
runs.py, which tests/fake_cuda and test_dry.py run in tiny form where there is no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as in training

from gpu import checks, runs
from gpu.checks import CARD

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
Recorded = Callable[[Callable[[], dict[str, Any]]], None]


@pytest.mark.parametrize("name", ["varlen", "sdpa", "rms_norm", "one_pass_head", "nf4"])
def test_kernels(name: str, recorded: Recorded) -> None:
    """Each kernel computes what its formula says, forward and backward."""
    recorded(partial(getattr(checks, name), CARD))


def test_a_run_that_stops_goes_on(recorded: Recorded, tmp_path: Path) -> None:
    """LoRA and QLoRA resume from a checkpoint with the losses of an undisturbed run."""
    recorded(partial(runs.resumed, CARD, tmp_path))


def test_fewer_rows_after_out_of_memory(recorded: Recorded, tmp_path: Path) -> None:
    """The allocator refuses, the placement shrinks, the run finishes."""
    recorded(partial(runs.out_of_memory, CARD, tmp_path))


def test_yaml_to_image_through_a_kill(recorded: Recorded, tmp_path: Path) -> None:
    """QLoRA of a model of Phi-3-mini's size, killed in the middle, ends in an image."""
    recorded(partial(runs.yaml_to_image, CARD, tmp_path))


def test_a_shared_model_trains_as_a_whole_one(recorded: Recorded, tmp_path: Path) -> None:
    """FSDP2 over one rank: the same losses, and what it costs in time."""
    recorded(partial(runs.shared, CARD, tmp_path))


def test_planned_memory_is_measured_memory(recorded: Recorded, tmp_path: Path) -> None:
    """Six ways to train stay within the plan's few percent."""
    recorded(partial(runs.planned_memory, tmp_path, dry=False))
