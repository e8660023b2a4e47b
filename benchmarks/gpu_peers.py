"""Other tools on the ladder's rows, each in the interpreter where it is installed.

axolotl (Python 3.12 and its own pins of transformers and trl) and torchtune (whose last release
needs a torchao that torch 2.13 no longer runs) have no way here yet.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import gpu_plan
from benchmarks.gpu_plan import Case, shape
from benchmarks.gpu_rungs import TOKENIZER, Rung, Sizes, dataset, rate
from tuning.models.load import load_tokenizer
from tuning.plan.coefficients import Variant
from tuning.plan.speed import operations_per_token
from tuning.presets.config import facts

PEERS = ("unsloth",)  # asked for in this interpreter, if not named; trl is a rung of the ladder
PROGRAM = Path(__file__).with_name("peer_program.py")
LONGEST = {"cuda": 60.0, "cpu": 600.0}  # seconds of one


def save_base(preset: str, sizes: Sizes, folder: Path) -> None:
    """A model of random weights in bfloat16, with a tokenizer, as a folder."""
    config = gpu_plan.read(shape(Case(preset, Variant(device=sizes.device), 1, 1)))  # type: ignore[arg-type]
    with torch.device(sizes.device):
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder)
    load_tokenizer(TOKENIZER).save_pretrained(folder)


def compare(preset: str, sizes: Sizes, pythons: Mapping[str, str]) -> list[dict[str, Any]]:
    """What each of `pythons` (peer -> interpreter) reaches on packed chats; or its error."""
    known = facts(shape(Case(preset, Variant(device=sizes.device), 1, 1)))  # type: ignore[arg-type]
    assert known is not None
    limit, found = rate(sizes), []
    with tempfile.TemporaryDirectory() as scratch:
        folder, data = Path(scratch) / "base", Path(scratch) / "rows.jsonl"
        save_base(preset, sizes, folder)
        rows = dataset(Rung("peer"), sizes, known.vocab, long=False)
        rows.to_json(data)
        torch.cuda.empty_cache()
        lengths = [n for row in rows["seq_lengths"][-sizes.rows * sizes.timed :] for n in row]
        span = sum(n * n for n in lengths) / sum(lengths)
        work = operations_per_token(known, effective_length=span, rank=16)
        for name, python in pythons.items():
            made = _run(name, python, sizes, folder, data)
            if "error" not in made:
                speed = sum(lengths) / sum(made["seconds"])
                made |= {"tokens_per_second": speed, "limit_share": speed * work / limit}
            found.append({"rung": {"name": name, "method": "lora"}} | made)
    return found


def _run(name: str, python: str, sizes: Sizes, folder: Path, data: Path) -> dict[str, Any]:
    request = {
        "name": name, "model": str(folder), "data": str(data), "device": sizes.device,
        "length": sizes.length, "rows": sizes.rows, "steps": sizes.warm + sizes.timed,
        "timed": sizes.timed, "scratch": str(folder.parent / name),
    }  # fmt: skip
    asked, answer = folder.parent / f"{name}.json", folder.parent / f"{name}-result.json"
    asked.write_text(json.dumps(request))
    try:
        done = subprocess.run(
            [python, "-I", str(PROGRAM), str(asked), str(answer)],
            capture_output=True, text=True, timeout=LONGEST[sizes.device],
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {LONGEST[sizes.device]:.0f} s"}
    except OSError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no word"])[-1][:200]}
    result: dict[str, Any] = json.loads(answer.read_text())
    return result


def pythons(given: list[str]) -> dict[str, str]:
    """`NAME=INTERPRETER` of the command line; those not named are asked for in this one."""
    return dict.fromkeys(PEERS, sys.executable) | dict(value.split("=", 1) for value in given)
