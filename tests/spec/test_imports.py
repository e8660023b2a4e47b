"""A config of another tool is translated key by key, whatever the order of its keys."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuning.spec import imports, keys

ROOT = Path(__file__).parents[2]
FIXTURES = sorted((ROOT / "tests" / "fixtures" / "imports").glob("*.y*ml"))
AXOLOTL = {"base_model": "org/model", "datasets": [{"path": "org/rows"}]}
FACTORY = {"model_name_or_path": "org/model", "dataset": "org/rows"}
PAIRS: list[tuple[dict[str, Any], dict[str, Any], str, Any]] = [
    (AXOLOTL, {"adapter": "lora", "load_in_4bit": True}, "method", "qlora"),
    (AXOLOTL, {"adapter": "lora", "load_in_8bit": True}, "method", "lora"),
    (AXOLOTL, {"rl_beta": 0.2, "dpo_beta": 0.3}, "beta", 0.3),
    (
        AXOLOTL,
        {"wandb_project": "mine", "mlflow_tracking_uri": "https://mlflow.example.com"},
        "report_to",
        ["wandb", "mlflow"],
    ),
    (FACTORY, {"finetuning_type": "lora", "quantization_bit": 4}, "method", "qlora"),
    (FACTORY, {"packing": True, "neat_packing": False}, "packing", True),
    (
        FACTORY,
        {"add_tokens": "<a>,<b>", "add_special_tokens": "<b>,<c>"},
        "new_special_tokens",
        ["<a>", "<b>", "<c>"],
    ),
]


def translated(value: dict[str, Any], folder: Path, **more: Any) -> tuple[Any, list[str]]:
    """The documents for a config with these keys in this order, and the notes."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    asked: dict[str, Any] = {"data": (), "output": "oci:out", "beside": Path()} | more
    return imports.translate(path, **asked)


def shuffled(value: Any, draw: random.Random) -> Any:
    """The mapping with its keys in another order, also those of the mappings in it."""
    if isinstance(value, list):
        return [shuffled(each, draw) for each in value]
    if not isinstance(value, dict):
        return value
    return {name: shuffled(value[name], draw) for name in draw.sample(list(value), len(value))}


def written(documents: list[dict[str, Any]], name: str) -> Any:
    """The method, or the value of the setting `name`."""
    if name == "method":
        return documents[0]["tuning"]["method"]
    text = documents[1]["data"]["training_config.yaml"]
    sections = yaml.safe_load(text)["training_config"].values()
    return next((rows[name] for rows in sections if name in rows), None)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_the_order_of_keys_says_nothing(path: Path, tmp_path: Path) -> None:
    """Documents and notes are the same, to the letter."""
    value = yaml.safe_load(path.read_text()) | {"of_tomorrow": 1, "another": 2}
    data = ("org/rows",) if "dataset" in value else ()
    expected = translated(value, tmp_path, data=data)

    for seed in range(12):
        assert expected == translated(shuffled(value, random.Random(seed)), tmp_path, data=data)


@pytest.mark.parametrize(("of", "both", "name", "expected"), PAIRS, ids=lambda each: str(each)[:40])
def test_two_keys_for_one_setting_agree_in_either_order(
    of: dict[str, Any], both: dict[str, Any], name: str, expected: Any, tmp_path: Path
) -> None:
    """What refines counts, lists are put together, and a value that another replaces is noted."""
    found = [
        translated({k: both[k] for k in order} | of, tmp_path)
        for order in (list(both), list(both)[::-1])
    ]

    assert found[0] == found[1]
    assert expected == written(found[0][0], name)
    assert (name == "beta") == any("not 0.2 by rl_beta" in note for note in found[0][1])


@pytest.mark.parametrize("peer", imports.PEERS)
def test_every_pair_of_keys_with_one_target_is_tried(peer: str) -> None:
    """A new row for a target that has one already needs a line in PAIRS."""
    rows: dict[str, Any] = keys.data(f"imports/{peer}.yaml")["keys"]
    targets: dict[str, set[str]] = {}
    for name, row in rows.items():
        for target in (row.get("to"), *row.get("also", {})):
            targets.setdefault(target, set()).add(name)
    tried = {name for _, both, *_ in PAIRS for name in both}
    several = {n for t, names in targets.items() if t and len(names) > 1 for n in names}

    # a tracker's project is named by either
    assert several <= tried | {"mlflow_experiment_name"}


def test_columns_of_single_datasets_are_those_of_parts(tmp_path: Path) -> None:
    """Of all alike, they are the data's."""
    own = {"field_instruction": "question", "field_output": "answer"}
    first, second = {"path": "org/pairs", **own}, {"path": "org/chats", "field_messages": "turns"}
    mixed, _ = translated(AXOLOTL | {"datasets": [first, second]}, tmp_path)
    alike, _ = translated(AXOLOTL | {"datasets": [first, second | own]}, tmp_path)
    same, _ = translated(AXOLOTL | {"datasets": [first, first | {"path": "org/more"}]}, tmp_path)

    columns = {"context_column": "question", "response_column": "answer"}
    parts = [{"path": "org/pairs", **columns}, {"path": "org/chats", "messages_column": "turns"}]
    assert parts == written(mixed, "sources")
    assert [parts[0], parts[1] | columns] == written(alike, "sources")
    assert (None, "question") == (written(same, "sources"), written(same, "context_column"))


def test_places_are_said_as_the_written_file_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, data and start adapter of this machine become whole paths for another folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "started", "more"):
        Path(name).mkdir()
    Path("rows.csv").touch()
    given = {"base_model": "base", "lora_model_dir": "./started"}
    datasets = [{"path": "./rows.csv", "field_output": "a"}, {"path": "more"}]
    documents, _ = translated(given | {"datasets": datasets}, tmp_path, beside=Path("sub"))
    named, notes = translated(
        given | {"datasets": datasets}, tmp_path, beside=Path("sub"), data=("rows.csv",)
    )

    assert str(tmp_path / "base") == documents[0]["tuning"]["preset"]["name"]
    assert str(tmp_path / "started") == written(documents, "start_adapter")
    places = [str(tmp_path / name) for name in ("rows.csv", "more")]
    assert places == documents[0]["tuning"]["input"]["urls"]
    paths = [part["path"] for part in written(documents, "sources")]
    assert [places[0], f"{places[1]}/*"] == paths
    assert places[:1] == named[0]["tuning"]["input"]["urls"]
    assert "datasets: left out, columns too; --data is in its place" in notes
    assert json.dumps(named).count("sources") == 0
