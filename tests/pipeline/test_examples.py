"""The examples of data by name, of several sources and of preferences run, against a fake hub.

Model, image and rows are small ones; documents and settings are those that people copy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import good, tuning
from fake_hub import FakeHub

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = EXAMPLES / "tiny-model"
CHATS = [
    json.loads(line) for line in (EXAMPLES / "data" / "demo.jsonl").read_text().splitlines()[:56]
]
HOSTS = ("--allow-host", "127.0.0.1", "--allow-host", "localhost")  # the fake hub's
QUESTIONS = [(q["content"], a["content"]) for q, a in (row["messages"] for row in CHATS)]


def lines(rows: object) -> bytes:
    assert isinstance(rows, list)
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub with the two datasets that the examples name."""
    pairs = [
        {"prompt": q, "chosen": a, "rejected": a.rstrip(".") + ", but I am not sure."}
        for q, a in QUESTIONS
    ]
    with FakeHub() as server:
        server.add("datasets/HuggingFaceH4/no_robots", {"data/train.jsonl": lines(CHATS)})
        named = "datasets/trl-lib/ultrafeedback_binarized"
        server.add(named, {"train.jsonl": lines(pairs), "test.jsonl": lines(pairs[:5])})
        for name in ("HF_TOKEN", "HF_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {
            "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        yield server


def run(name: str, folder: Path, *more: object) -> dict[str, object]:
    """What two steps of the example come to."""
    done = tuning(
        *("run", "-f", EXAMPLES / f"workspace-tuning-{name}.yaml", "--base-model", TINY, "--json"),
        *("--output", f"oci:{folder / 'image'}", "--run-dir", folder / "run"),
        *("--set", "max_steps=2", *HOSTS, *more),
        env=dict(os.environ),
    )
    result: dict[str, object] = json.loads(good(done))
    assert str(result["digest"]).startswith("sha256:")
    return json.loads((folder / "run" / "adapter" / "tuning.json").read_text())["recipe"]


def test_a_dataset_by_name_and_several_sources(hub: FakeHub, tmp_path: Path) -> None:
    """Seven rows of the hub's to three of one's own, each in its own columns, by QLoRA."""
    own = tmp_path / "answers.csv"
    own.write_text("question,answer\n" + "".join(f'"{q}","{a}"\n' for q, a in QUESTIONS[:30]))
    data = ("--data", "HuggingFaceH4/no_robots", "--data", own)

    recipe = run("mixture", tmp_path, *data)
    preview = json.loads(
        good(
            tuning(
                *("preview", "-f", EXAMPLES / "workspace-tuning-mixture.yaml", *data, "--json"),
                *("--base-model", TINY, "--run-dir", tmp_path / "run", *HOSTS),
            )
        )
    )

    assert "qlora" == recipe["method"]
    assert [56, 24] == [each["rows"] for each in preview["sources"]]  # 70 : 30, no row twice


def test_preferences_of_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    """The split that the URL names, trained by DPO since the rows are pairs."""
    data = ("--data", "trl-lib/ultrafeedback_binarized?split=train")

    recipe = run("dpo", tmp_path, *data, "--set", "max_length=256")

    assert ("dpo", "qlora", 0.1) == tuple(recipe[k] for k in ("objective", "method", "beta"))


def test_any_model_and_several_files(hub: FakeHub, tmp_path: Path) -> None:
    """Two files in place of the two URLs, by LoRA."""
    for name, rows in (("a.jsonl", CHATS[:30]), ("b.jsonl", CHATS[30:])):
        (tmp_path / name).write_bytes(lines(rows))

    recipe = run("hub", tmp_path, "--data", tmp_path / "a.jsonl", "--data", tmp_path / "b.jsonl")

    assert "lora" == recipe["method"]
    assert isinstance(recipe["data"], list) and 2 == len(recipe["data"])
