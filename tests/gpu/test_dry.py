"""The checks of the GPU suite that start processes or need no card, in tiny form on a CPU.

The others run in tests/fake_cuda, on the fake device.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from gpu import checks, runs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CPU = replace(checks.TINY, device="cpu")


def test_yaml_to_image_through_a_kill_runs(tmp_path: Path) -> None:
    """The command line, SIGKILL and the same command again."""
    found = runs.yaml_to_image(CPU, tmp_path)

    assert CPU.steps == len(found["losses"]) and 2 <= found["killed_at_step"] <= CPU.steps


def test_a_shared_model_trains_as_a_whole_one(tmp_path: Path) -> None:
    """Both ways, in 16 and in 4 bits."""
    found = runs.shared(CPU, tmp_path)

    assert {"whole", "shared"} == set(found[CPU.methods[0]])


def test_planned_memory_runs(tmp_path: Path) -> None:
    """Two ways to train, estimated and measured."""
    assert 2 == runs.planned_memory(tmp_path, dry=True)["summary"]["cases"]
