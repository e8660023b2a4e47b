"""The same command again, after something has changed or gone; and short runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import good, tuning, workspace

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY, DEMO = EXAMPLES / "tiny-model", EXAMPLES / "data" / "demo.jsonl"
ROWS = DEMO.read_text().splitlines(keepends=True)


def run(folder: Path, data: Path, **settings: Any) -> dict[str, Any]:
    """A short run in `folder`, with its summary."""
    chosen = {"max_steps": 2, "packing": False} | settings
    file = workspace(folder / "again.yaml", settings=chosen)
    done = tuning(
        *("run", "-f", file, "--base-model", TINY, "--data", data, "--run-dir", folder / "run"),
        *("--output", f"oci:{folder / 'image'}", "--json"),
    )
    summary: dict[str, Any] = json.loads(good(done))
    return summary


def test_rows_of_a_folder_that_change_are_trained(tmp_path: Path) -> None:
    """A folder is looked into at every start, as a file is; what did not change is not redone."""
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "a.jsonl").write_text("".join(ROWS[:40]))
    first = run(tmp_path, rows)
    assert first == run(tmp_path, rows)

    (rows / "a.jsonl").write_text("".join(ROWS[40:90]))
    changed = run(tmp_path, rows)
    (rows / "b.jsonl").write_text("".join(ROWS[90:120]))
    more = run(tmp_path, rows)

    assert 3 == len({each["run_id"] for each in (first, changed, more)})
    assert 3 == len({each["digest"] for each in (first, changed, more)})


def test_what_went_missing_is_made_again(tmp_path: Path) -> None:
    """The output, the data, the adapter: no success is told that is not there."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(ROWS[:40]))
    first = run(tmp_path, data)

    shutil.rmtree(tmp_path / "image")
    assert first["digest"] == run(tmp_path, data)["digest"]
    assert (tmp_path / "image" / "index.json").is_file()

    shutil.rmtree(tmp_path / "run" / "data")
    assert first["digest"] != run(tmp_path, data, learning_rate=0.002)["digest"]
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "image")
    assert first["digest"] == run(tmp_path, data)["digest"]


@pytest.mark.parametrize("settings", [{"max_steps": 1}, {"max_steps": 3, "eval_steps": 2}])
def test_short_runs_and_looks_at_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    """One step learns something; without held-out rows there is nothing to evaluate."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(ROWS[:10]))

    assert settings["max_steps"] == run(tmp_path, data, **settings)["training"]["steps"]


def test_held_out_loss_is_the_mean_of_a_token_however_rows_are_batched(tmp_path: Path) -> None:
    """Batches are no unit: the machine that sizes them does not change the number."""
    long = {"role": "assistant", "content": "one two three four five six " * 12}
    rows = [json.loads(line) for line in ROWS[:30]]
    for row in rows[::3]:
        row["messages"][-1] = long
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for micro, accumulation in ((1, 4), (4, 1)):
        folder = tmp_path / str(micro)
        folder.mkdir()
        batch = {
            "per_device_train_batch_size": micro,
            "per_device_eval_batch_size": micro,
            "gradient_accumulation_steps": accumulation,
        }
        file = workspace(folder / "w.yaml", settings={"max_steps": 2, "packing": False} | batch)
        found.append(_held_out(folder, file, data))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def _held_out(folder: Path, file: Path, data: Path) -> float:
    """The base's loss on the rows held out."""
    document, config = yaml.safe_load_all(file.read_text())
    sections = yaml.safe_load(config["data"]["training_config.yaml"])
    sections["training_config"]["DatasetConfig"] = {"train_test_split": 0.6}
    config["data"]["training_config.yaml"] = yaml.safe_dump(sections)
    file.write_text(yaml.safe_dump_all([document, config]))
    done = tuning(
        *("run", "-f", file, "--base-model", TINY, "--data", data, "--run-dir", folder / "run"),
        *("--output", f"oci:{folder / 'image'}", "--json"),
    )
    loss: float = json.loads(good(done))["training"]["eval_loss_before"]
    return loss
