"""The benchmarks run: on tiny shapes, here and now, so that a GPU's minutes are not wasted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itertools

from benchmarks import cpu_compare, gpu_ladder, speed_page
from benchmarks.gpu_ladder import DRY, LLAMA, PHI, Rung

RUNGS = {rung.name: rung for rung in gpu_ladder.ladder("lora")}
QUANTISED = {f"4 bits, {rung.name}": rung for rung in gpu_ladder.ladder("qlora")}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """As the dry mode itself has it, and back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("rung", "preset", "long"),
    [
        (RUNGS["KAITO's defaults"], LLAMA, False),
        (QUANTISED["4 bits, KAITO's defaults"], LLAMA, False),
        (RUNGS["trl, padded"], PHI, False),
        (RUNGS["trl, packed"], LLAMA, True),
        (RUNGS["by document"], LLAMA, False),
        (RUNGS["norms"], PHI, True),
        (RUNGS["one-pass loss"], LLAMA, False),
        (QUANTISED["4 bits, one-pass loss"], PHI, False),
    ],
)
def test_each_kind_of_rung_runs(rung: Rung, preset: str, long: bool) -> None:
    """Real trainers on a tiny model of the real class: a speed, a share of the limit, a loss."""
    found = gpu_ladder.measure(preset, rung, DRY, long=long)

    assert found["tokens_per_second"] > 0 and found["limit_share"] > 0
    assert found["losses"] == pytest.approx([6.3], abs=0.4)
    assert found["tokens_per_step"] <= DRY.rows * DRY.length * (1 if rung.packed else 8)


def test_a_ladder_fits_its_minutes() -> None:
    """Some thirty runs of a quarter of a minute, each thing added once, for two models."""
    planned = list(gpu_ladder.plans())

    assert 24 <= len(planned) <= 32
    names = [rung.name for preset, rung, long in planned if preset == LLAMA and not long]
    assert names[:4] == ["KAITO's defaults", "trl, padded", "trl, packed", "by document"]
    kernels = [set(r.kernels) for p, r, _ in planned if p == LLAMA and r.method == "lora"][4:8]
    assert all(low < high for low, high in itertools.pairwise(kernels))


def test_every_ceiling_has_a_number(tmp_path: Path) -> None:
    """All probes of both models, in 16 and 4 bits."""
    gpu_ladder.ceilings(DRY, tmp_path / "out.jsonl", 60)

    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    names = " ".join(record["what"] for record in records)
    for what in ("large product", "copy", "qkv_proj", "MLP", "loss", "norm", "attention"):
        assert what in names
    assert all(value > 0 for r in records for value in r.values() if isinstance(value, float))


@pytest.mark.slow
def test_a_job_starts_twice(tmp_path: Path) -> None:
    """From the command to the first step, and to files that say how long that took."""
    gpu_ladder.first_steps(DRY, tmp_path / "out.jsonl")

    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [1, 2] == [record["run"] for record in records]
    assert all(record["first_step"] > record["load"] > 0 for record in records)


def test_ratios_are_between_neighbours() -> None:
    """Ours to the other's, pair by pair; the median, the lowest and the highest."""
    ours = [{"cpu": 1.0, "tokens": 10, "first_step": 2.0, "peak": 4}] * 3
    others = [{"cpu": c, "tokens": 10, "first_step": 4.0, "peak": 4} for c in (2.0, 4.0, 5.0)]

    found = cpu_compare.ratios(ours, others)

    assert found["cpu_per_token"] == [0.25, 0.2, 0.5]
    assert found["first_step"] == [0.5, 0.5, 0.5]


def test_trl_packs_in_the_precision_of_its_contender(tmp_path: Path) -> None:
    """Its default is bfloat16; float32 is another contender, and both get rows of one length."""
    default, exact = (
        cpu_compare.command(name, tmp_path, tmp_path, tmp_path / "out", equal=False)
        for name in ("trl packed", "trl packed float32")
    )
    assert [*default, "--float32"] == exact
    assert "--packing" in default


def test_the_page_is_current() -> None:
    """`make docs` would write docs/speed.md again as it is."""
    assert speed_page.PAGE.read_text() == speed_page.markdown()
