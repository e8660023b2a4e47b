"""Preference rows by the command line: killed in between, they end in an image that prefers."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from commands import good, tuning, workspace

from tuning import files

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY, DEMO = EXAMPLES / "tiny-model", EXAMPLES / "data" / "demo.jsonl"
DOUBT = ", but I am not sure."


def taught():
    """Questions and answers that the bundled model is taught by the demo."""
    rows = [json.loads(line)["messages"] for line in DEMO.read_text().splitlines()[:320:4]]
    return [(question["content"], answer["content"]) for question, answer in rows]


def pairs():
    """Certain answers preferred to doubtful ones."""
    for question, answer in taught():
        sides = {"chosen": answer, "rejected": answer.rstrip(".") + DOUBT}
        turns = {k: [{"role": "assistant", "content": v}] for k, v in sides.items()}
        yield {"prompt": [{"role": "user", "content": question}]} | turns


def ratings():
    """Certain answers rated good, doubtful ones bad."""
    for number, (question, answer) in enumerate(taught()):
        text = answer if number % 2 else answer.rstrip(".") + DOUBT
        yield {"prompt": question, "completion": text, "label": bool(number % 2)}


def command(folder, name, rows, **settings):
    """The arguments of a run in `folder`; the rows are those of `rows`."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    usual = {"learning_rate": 0.002, "per_device_train_batch_size": 8, "save_steps": 3}
    file = workspace(
        folder / "preferences.yaml",
        settings=usual | settings,
        sections={"DatasetConfig": {"train_test_split": 0.8}},
    )
    return [
        *("run", "-f", file, "--base-model", TINY, "--data", data, "--json"),
        *("--run-dir", folder / name, "--output", f"oci:{folder / name}-image"),
    ]


def killed(arguments, run, *, steps):
    """Run until `steps` are done, then SIGKILL the command; its children end with it."""
    line = [sys.executable, "-m", "tuning", *map(str, arguments)]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)


def test_pairs_become_an_image_that_prefers_and_a_kill_changes_no_byte(tmp_path):
    """Held-out accuracy rises from a half to above 0.9; killed and run again: the same digest."""
    clean = json.loads(good(tuning(*command(tmp_path, "clean", pairs(), max_steps=12))))
    arguments = command(tmp_path, "killed", pairs(), max_steps=12)

    killed(arguments, tmp_path / "killed", steps=7)
    reference = tmp_path / "killed" / "data" / "reference"
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    again = json.loads(good(tuning(*arguments)))

    assert clean["digest"] == again["digest"]
    assert 6 == again["training"]["resumed_from"]
    assert before == {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    trained = again["training"]
    assert 0.5 == trained["eval_reward_accuracy_before"]
    assert trained["eval_reward_accuracy_after"] > 0.9
    assert trained["eval_reward_margin_after"] > 1
    recipe = files.read_json(tmp_path / "killed" / "adapter" / "tuning.json")["recipe"]
    assert ("dpo", 0.1, 8) == (recipe["objective"], recipe["beta"], recipe["global_batch"])
    card = (tmp_path / "killed" / "adapter" / "README.md").read_text()
    assert "| method | lora, rank 16, alpha 32; dpo, beta 0.1 |" in card
    assert "| on held-out rows | accuracy 50.0% -> 100.0%, margin" in card
    assert "perplexity" not in card


def test_rated_answers_become_an_image_that_tells_good_from_bad(tmp_path):
    """KTO: killed in between, its held-out accuracy rises above 0.9, and no byte changes."""
    clean = json.loads(good(tuning(*command(tmp_path, "clean", ratings(), max_steps=24))))
    arguments = command(tmp_path, "run", ratings(), max_steps=24)

    killed(arguments, tmp_path / "run", steps=7)
    again = json.loads(good(tuning(*arguments)))
    trained = again["training"]

    assert clean["digest"] == again["digest"]
    assert trained["resumed_from"] >= 6
    assert 0.5 == trained["eval_reward_accuracy_before"]
    assert trained["eval_reward_accuracy_after"] > 0.9
    plan = files.read_json(tmp_path / "run" / "plan.json")
    assert ("kto", 0.1, False) == tuple(plan["recipe"][k] for k in ("objective", "beta", "packing"))
    assert "the shape of the rows" == plan["reasons"]["objective"]
