"""Quantised bases through the command line: trained as what they stand for, or refused at once."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import commands
import pytest
import quantised_bases
import torch
import transformers
from faults import jobs
from faults.jobs import World
from faults.kills import Aim

Build = Callable[..., Path]
TRAIN = "tuning.training.train"
BITSANDBYTES = {"quant_method": "bitsandbytes"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base: Build) -> Iterator[World]:
    """A server with rows and a registry; all runs left behind are audited."""
    with jobs.world(tmp_path_factory.mktemp("quantised"), tiny_base("llama")) as made:
        yield made


def four_bits(base: Path, folder: Path) -> Path:
    """`base` as transformers and bitsandbytes publish it in 4 bits."""
    packing = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=packing, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def first_loss(world: World, name: str) -> float:
    """The loss of the first step, before anything was learned."""
    lines = (world.folder / name / "metrics.jsonl").read_text().splitlines()
    return float(next(json.loads(line)["loss"] for line in lines))


@pytest.mark.slow
def test_an_fp8_base_is_trained_as_the_16_bit_one_it_stands_for(
    world: World, tiny_base: Build, tmp_path: Path
) -> None:
    """Killed at a checkpoint and resumed, it ends in the bytes of a run that nothing disturbs."""
    held, plain = quantised_bases.pair(tiny_base("ministral3"), tmp_path, "tensor")
    saved = Aim("os.rename", r"MANIFEST\.json", TRAIN, after=True)

    killed = world.run("killed", base=held, aim=saved)
    again, undisturbed = (jobs.result(world.run(name, base=held)) for name in ("killed", "clean"))
    other = jobs.result(world.run("plain", base=plain))

    assert -signal.SIGKILL == killed.status
    assert again == undisturbed
    assert other[1] != again[1]  # the base is another one
    assert first_loss(world, "plain") == pytest.approx(first_loss(world, "clean"), rel=1e-4)


def test_a_base_published_in_4_bits_is_trained_with_qlora(
    world: World, tiny_base: Build, tmp_path: Path
) -> None:
    """From the YAML to the image; the plan says whose 4 bits they are."""
    base = four_bits(tiny_base("llama"), tmp_path / "base")

    jobs.result(world.run("four", base=base, method="qlora"))

    plan = json.loads((world.folder / "four" / "plan.json").read_text())
    assert {"type": "nf4", "double": True}.items() <= plan["recipe"]["quantisation"].items()
    assert "the base is published so" == plan["reasons"]["quant_type"]


def with_config(base: Path, folder: Path, **changes: Any) -> Path:
    """`base` with another quantization_config."""
    shutil.copytree(base, folder)
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": changes}))
    return folder


@pytest.mark.parametrize(
    ("command", "said", "method", "reason", "change"),
    [
        ("plan", {"quant_method": "gptq", "bits": 4}, "lora", "gptq", "use the 16-bit weights"),
        (
            "check",
            BITSANDBYTES | {"load_in_8bit": True},
            "qlora",
            "8-bit",
            "use the 16-bit weights",
        ),
        ("plan", BITSANDBYTES | {"load_in_4bit": True}, "lora", "in 4 bits", "method to qlora"),
        ("run", BITSANDBYTES | {"load_in_4bit": True}, "lora", "in 4 bits", "method to qlora"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_what_to_use(
    command: str,
    said: dict[str, Any],
    method: str,
    reason: str,
    change: str,
    tiny_base: Build,
    tmp_path: Path,
) -> None:
    """By each command, before anything is fetched; of a family with a preset, or any other."""
    family = "qwen3" if command == "run" else "granite"
    base = with_config(tiny_base(family), tmp_path / "base", **said)
    file = commands.workspace(tmp_path / "w.yaml", method=method)

    done = commands.tuning(command, "-f", file, "--base-model", base, cwd=tmp_path)

    assert 11 == done.returncode, done.stderr
    assert reason in done.stderr and change in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*/data/*"))
