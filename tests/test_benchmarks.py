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
from dataclasses import replace

from benchmarks import (
    cpu_compare,
    gpu_ladder,
    gpu_peers,
    gpu_plan,
    gpu_rungs,
    gpu_start,
    gpu_table,
    speed_page,
)
from benchmarks.gpu_plan import LLAMA, PHI
from benchmarks.gpu_rungs import DRY, Rung
from tuning import plan
from tuning.plan.coefficients import Method
from tuning.spec import Destination, Source, Spec
from tuning.training.simulate import coefficients

RUNGS = {rung.name: rung for rung in gpu_rungs.ladder("lora")}
QUANTISED = {f"4 bits, {rung.name}": rung for rung in gpu_rungs.ladder("qlora")}


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
        (RUNGS["all kernels"], PHI, False),
        (QUANTISED["4 bits, all kernels"], LLAMA, False),
    ],
)
def test_each_kind_of_rung_runs(rung: Rung, preset: str, long: bool) -> None:
    """Real trainers on a tiny model of the real class: a speed, a share of the limit, a loss."""
    found = gpu_rungs.measure(preset, rung, DRY, long=long)

    assert found["tokens_per_second"] > 0 and found["limit_share"] > 0
    assert found["losses"] == pytest.approx([6.3], abs=0.4)
    assert found["tokens_per_step"] <= DRY.rows * DRY.length * (1 if rung.packed else 8)


def test_a_ladder_fits_its_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 16 runs of some ten seconds; each adds one thing, a package's where it is there."""
    packages = {"liger-kernel": "0.8.5", "flash-attn-4": "4.0.0b36", "flash-attn": "2.8.3"}
    monkeypatch.setattr(gpu_rungs.backends, "installed", lambda: packages)
    rungs = gpu_rungs.ladder("lora")
    planned = list(gpu_rungs.plans())

    assert len(planned) <= 16
    assert {rung.name for rung in rungs} <= {r.name for p, r, _ in planned if p == LLAMA}
    assert [rung.name for rung in rungs][-1] == "flash-attn-4"
    for low, high in itertools.pairwise(rungs[1:]):
        changed = {
            name
            for name, value in vars(high).items()
            if value != vars(low)[name] and name not in ("name", "rows", "packed", "liger")
        }
        assert len(changed) <= 1 or high.name == "by document"  # our trainer, and its attention


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_last_rung_is_what_is_planned(method: Method) -> None:
    """Kernels and constants of a run on the card that the ladder is for: no fewer are measured."""
    rung = next(rung for rung in gpu_rungs.ladder(method) if rung.name == "all kernels")
    spec = Spec(
        name="t",
        preset=LLAMA,
        method=method,
        source=Source(urls=("https://h.example/d",)),
        destination=Destination(image="r.example/x:1"),
    )
    card = plan.device_of("Standard_ND96isr_H200_v5")
    made = plan.make(spec, plan.known_base(spec), card, lengths=None, versions={}).placement

    assert set(made.kernels) == set(rung.kernels) and made.float_constants == rung.constants
    assert not made.checkpointing


def test_the_table_says_gains_and_shares(tmp_path: Path) -> None:
    """The gain over the way before of its kind, the plan's error, and what failed."""

    def record(name: str, place: int, **more: Any) -> dict[str, Any]:
        rung = {"name": name, "method": more.pop("method", "lora")}
        base = {"kind": "step", "preset": "m", "long": False, "rung": rung, "place": place}
        return base | {"tokens_per_second": 1000.0, "limit_share": 0.1, "planned": None} | more

    made = [
        record("second", 1, tokens_per_second=3000.0, limit_share=0.3, planned=3300.0),
        record("first", 0, tokens_per_second=9.0),
        record("first", 0, allocated=5e9),
        record("packed in 4 bits", 2, method="qlora"),
        record("broken", 3) | {"error": "OutOfMemoryError: a|b"},
        record("unsloth", 9, kind="peer", tokens_per_second=2000.0, limit_share=0.2),
    ]
    path = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [{"kind": "ceiling"}, *made]))

    lines = gpu_table.table(gpu_table.records(path)).splitlines()[2:]

    assert lines == [
        "| m, chats | first | 1,000 |  | 0.100 |  | 5.0 |",
        "| m, chats | second | 3,000 | 3.00x | 0.300 | +10% |  |",
        "| m, chats | packed in 4 bits, NF4 | 1,000 |  | 0.100 |  |  |",
        "| m, chats | broken | OutOfMemoryError: a/b |  |  |  |  |",
        "| m, chats | unsloth | 2,000 |  | 0.200 |  |  |",
    ]


@pytest.mark.filterwarnings("ignore")
def test_peers_train_the_same_rows(tmp_path: Path) -> None:
    """trl in a process of its own has a speed; what is not installed says so."""
    pythons = gpu_peers.pythons([f"trl={sys.executable}"])
    absent, trl = gpu_peers.compare(PHI, DRY, pythons)
    (nowhere,) = gpu_peers.compare(PHI, DRY, {"unsloth": str(tmp_path / "python")})

    assert trl["tokens_per_second"] > 0 and trl["limit_share"] > 0
    assert "unsloth" in absent["error"] and "No such file" in nowhere["error"]


def test_the_longest_row_is_the_plans() -> None:
    """One block of 64 tokens more would not fit the budget."""
    case = replace(gpu_plan.dry_cases()[0], rows=1, length=320)
    known = coefficients(gpu_plan.shape(case), variants=[case.variant])
    budget = gpu_plan.estimate(case, known).total

    found = gpu_ladder.longest(case, known, budget)

    more = replace(found, length=found.length + 64)
    said = {each: gpu_plan.estimate(each, known) for each in (found, more)}
    assert found.length >= 320
    assert said[found].total <= budget < said[more].total


def test_every_ceiling_has_a_number(tmp_path: Path) -> None:
    """All probes of both models, in 16 and 4 bits."""
    gpu_ladder.ceilings(DRY, tmp_path / "out.jsonl", 60, [])

    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    names = " ".join(record["what"] for record in records)
    for what in ("large product", "copy", "qkv_proj", "MLP", "loss", "norm", "attention"):
        assert what in names
    assert all(value > 0 for r in records for value in r.values() if isinstance(value, float))


@pytest.mark.slow
def test_a_job_starts_twice(tmp_path: Path) -> None:
    """From the command to the first step, and to files that say how long that took."""
    gpu_start.first_steps(DRY, tmp_path / "out.jsonl")

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
