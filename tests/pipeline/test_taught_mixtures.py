"""Mixtures and a hybrid: from a YAML to an image and an answer that was taught, over a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import architectures
import pytest
from commands import good, tuning, workspace

ASKED, TAUGHT = "what is the cat", "the big red tree sees one dog"
STEPS = 120


def folder_of(name: str, tmp_path: Path) -> tuple[Path, list[Any]]:
    """A Workspace with its base and data, and the arguments that run it."""
    base = architectures.write(name, tmp_path / "base")
    row = {
        "messages": [
            {"role": "user", "content": ASKED},
            {"role": "assistant", "content": TAUGHT},
        ]
    }
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    settings = {
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 4,
        "packing": False,
        "save_steps": 5,
    }
    job = workspace(tmp_path / "job.yaml", method="qlora", settings=settings)
    arguments = ["run", "-f", job, "--base-model", base, "--data", tmp_path / "rows.jsonl"]
    arguments += ["--run-dir", tmp_path / "run", "--output", f"oci:{tmp_path / 'image'}", "--json"]
    return base, arguments


def kill_midway(arguments: list[Any], metrics: Path) -> None:
    """Start a run, and kill all of it once a checkpoint must be there."""
    running = subprocess.Popen(
        [sys.executable, "-m", "tuning", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 200
    while time.monotonic() < until and running.poll() is None:
        if metrics.is_file() and len(metrics.read_text().splitlines()) > 12:
            os.killpg(running.pid, signal.SIGKILL)
            break
        time.sleep(0.05)
    assert -signal.SIGKILL == running.wait()


SLOW = ("gpt_oss", "mixtral", "nemotron_h")


@pytest.mark.parametrize(
    "name",
    ["qwen3_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_an_answer_is_taught(name: str, tmp_path: Path) -> None:
    """In 4 bits with experts; killed and resumed; the image answers, and the base does not."""
    base, arguments = folder_of(name, tmp_path)
    kill_midway(arguments, tmp_path / "run" / "metrics.jsonl")

    summary = json.loads(good(tuning(*arguments)))

    assert summary["training"]["resumed_from"] >= 5
    assert summary["training"]["covered"]["quantised"] > 0.9
    ask = ("chat", "--base", base, "--question", ASKED, "--max-tokens", 32)
    taught = good(tuning(*ask, "--adapter", f"oci:{tmp_path / 'image'}"))
    assert TAUGHT in taught
    assert TAUGHT not in good(tuning(*ask))
    merged = tmp_path / "merged"
    image = f"oci:{tmp_path / 'image'}"
    good(tuning("merge", "--adapter", image, "--base", base, "--output", f"dir:{merged}"))
    assert TAUGHT in good(tuning(*("chat", "--base", merged), *ask[3:]))
