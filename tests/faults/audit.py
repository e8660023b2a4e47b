"""No run that says it succeeded is allowed to be wrong: an audit over run directories."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import safetensors.torch

from tuning import files


def finished(run: Path) -> list[dict[str, object]]:
    """The finish records in the journal of a run directory, newest last."""
    journal = run / "journal.jsonl"
    if not journal.exists():
        return []
    records = []
    for line in journal.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # what a kill has torn
        if (record["phase"], record["event"]) == ("finish", "end"):
            records.append(record["value"])
    return records


def check(runs: Iterable[Path]) -> int:
    """Assert that what each finished run says is so; gives how many there were."""
    count = 0
    for run in runs:
        found = finished(run)
        if not found:
            continue
        count += 1
        said = found[-1]
        recipe = files.read_json(run / "plan.json")["recipe"]
        weights = run / "adapter" / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(weights)
        training = said["training"]
        assert isinstance(training, dict)
        assert recipe["steps"] == training["steps"] == len(training["loss_by_step"]), run
        if (run / "metrics.jsonl").exists():  # else taken from the registry, trained elsewhere
            lines = (run / "metrics.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines]
            steps = [record["step"] for record in records if "eval_loss" not in record]
            assert list(range(1, recipe["steps"] + 1)) == steps, run
        assert all(tensor.isfinite().all() for tensor in tensors.values()), run
        assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name), run
        assert files.digest_file(weights) == training["adapter_sha256"], run
        index = files.read_json(run / "image" / "index.json")
        digest = said["digest"]
        assert isinstance(digest, str)
        assert digest == index["manifests"][0]["digest"], run
        blob = run / "image" / "blobs" / "sha256" / digest.removeprefix("sha256:")
        assert digest == f"sha256:{files.digest_file(blob)}", run
    return count
