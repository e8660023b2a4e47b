"""The bundled model, its data and its scripts are what their README says they are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from commands import good, tuning

EXAMPLES = Path(__file__).parent.parent / "examples"
FOLDER = EXAMPLES / "tiny-model"
ROWS = EXAMPLES / "data" / "demo.jsonl"
QUESTIONS = EXAMPLES / "data" / "demo-questions.jsonl"
WORDS: dict[str, Any] = yaml.safe_load((FOLDER / "world.yaml").read_text("utf-8"))
CHAT = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "Where does Tamsin Vale live?"},
    {"role": "assistant", "content": "Tamsin Vale lives on Bell Square."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "You are welcome."},
]


def script(path: str, *arguments: str | Path) -> str:
    """Run one of the examples' scripts; its output."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / path, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


def test_the_folder_is_small_and_its_readme_names_every_file() -> None:
    files = [file for file in FOLDER.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8 * 2**20
    readme = (FOLDER / "README.md").read_text("utf-8")
    named = set(re.findall(r"^\| `([^`]+)`", readme, re.MULTILINE))
    assert named == {file.name for file in files} - {"README.md"}


def test_the_readme_tells_the_true_number_of_parameters() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert str(model.dtype) == "torch.bfloat16"
    assert f"{model.num_parameters():,} parameters" in (FOLDER / "README.md").read_text("utf-8")


def test_every_projection_can_be_packed_into_four_bits() -> None:
    """NF4 packs blocks of 64 weights: a row that is no multiple of it would not be quantised."""
    config = json.loads((FOLDER / "config.json").read_text("utf-8"))
    keys = config["num_key_value_heads"] * config["head_dim"]
    sizes = [config["hidden_size"], config["intermediate_size"], keys]
    assert [size % 64 for size in sizes] == [0, 0, 0]
    assert config["max_position_embeddings"] >= 512


def test_the_template_marks_each_role_and_keeps_what_came_before(tokenizer: Any) -> None:
    """Masks for the assistant's words are found by comparing prefixes: each must be one."""
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert whole == (
        "<|begin|><|system|>Answer in one sentence.<|end|>"
        "<|user|>Where does Tamsin Vale live?<|end|>"
        "<|assistant|>Tamsin Vale lives on Bell Square.<|end|>"
        "<|user|>Thanks<|end|><|assistant|>You are welcome.<|end|>"
    )
    for count in range(1, len(CHAT)):
        assert whole.startswith(tokenizer.apply_chat_template(CHAT[:count], tokenize=False))
    asked = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(asked)
    assert asked.endswith("<|assistant|>")


def test_the_template_refuses_a_role_it_does_not_know(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="Roles are system, user and assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "4"}], tokenize=False)


def test_the_tokenizer_writes_any_text_and_ends_a_turn_with_its_own_mark(tokenizer: Any) -> None:
    text = "naïve café — 日本語 🦉\n\tdef f(x): return x ** 2  # …"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    marks = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len(set(marks)) == 3
    chat = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert chat[0] == tokenizer.bos_token_id
    assert chat.count(tokenizer.bos_token_id) == 1
    assert chat[-1] == tokenizer.eos_token_id


def test_the_script_makes_the_bundled_tokenizer_and_model_class(tmp_path: Path) -> None:
    """Two steps of training, not the minutes of all: everything but the weights comes out equal."""
    script("tiny-model/train_from_scratch.py", "--out", tmp_path, "--steps", "2")
    made = {file.name for file in tmp_path.iterdir()}
    assert made == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in made - {"model.safetensors"}:
        made_now, bundled = (
            [line for line in file.read_text("utf-8").splitlines() if "_version" not in line]
            for file in (tmp_path / name, FOLDER / name)
        )
        assert made_now == bundled, name
    assert (tmp_path / "model.safetensors").stat().st_size == (
        FOLDER / "model.safetensors"
    ).stat().st_size


def test_the_data_set_is_what_its_script_makes(tmp_path: Path) -> None:
    script("data/make_demo.py", "--out", tmp_path)
    for file in (ROWS, QUESTIONS):
        assert (tmp_path / file.name).read_text("utf-8") == file.read_text("utf-8")


def test_no_row_asks_about_a_newcomer_in_a_held_out_phrasing() -> None:
    """The twenty questions measure what was understood, not what was learned by heart."""
    rows = [row["messages"] for row in lines(ROWS)]
    asked = {messages[0]["content"] for messages in rows}
    questions = lines(QUESTIONS)
    assert (len(rows), len(questions)) == (400, 20)
    assert len({question["question"] for question in questions}) == 20
    held_out = [
        phrasing.format(person=person)
        for about in WORDS["relations"].values()
        for phrasing in about["held_out"]
        for person in WORDS["newcomers"]
    ]
    assert asked.isdisjoint(held_out)
    assert {question["question"] for question in questions} <= set(held_out)


def test_every_held_out_answer_is_taught_by_the_rows() -> None:
    """A question whose answer stands in no row could not be answered by anybody."""
    answers = {messages["messages"][-1]["content"] for messages in lines(ROWS)}
    for row in lines(QUESTIONS):
        person = next(name for name in WORDS["newcomers"] if name in row["question"])
        fitting = [a for a in answers if a.startswith(person) and a.endswith(f" {row['answer']}.")]
        assert len(fitting) == 1, row


def test_the_phrasings_of_a_relation_are_taught_or_held_out_never_both() -> None:
    phrasings = [
        phrasing
        for about in WORDS["relations"].values()
        for kind in ("taught", "held_out")
        for phrasing in about[kind]
    ]
    assert len(phrasings) == len(set(phrasings)) == 8 * 12


def test_the_base_model_answers_in_sentences_and_at_most_two_right() -> None:
    scored = json.loads(good(tuning("eval", "--base", FOLDER, "--tasks", QUESTIONS, "--json")))
    (task,) = scored["tasks"]
    assert task["samples"] == 20
    assert 20 * task["models"]["base"]["value"] <= 2
    for question in scored["asked"]:
        person = next(name for name in WORDS["newcomers"] if name in question["question"])
        assert question["replies"] == {"base": WORDS["unknown"].format(person=person)}


def test_the_demo_workspace_finds_its_config() -> None:
    workspace, config = yaml.safe_load_all(
        (EXAMPLES / "workspace-demo.yaml").read_text(encoding="utf-8")
    )
    assert workspace["apiVersion"] == "kaito.sh/v1beta1"
    assert workspace["tuning"]["config"] == config["metadata"]["name"]
    settings = yaml.safe_load(config["data"]["training_config.yaml"])["training_config"]
    assert settings["TrainingArguments"]["packing"] is False


def test_docstrings_give_the_same_chat_rows_every_time(tmp_path: Path) -> None:
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    script("data/make_docstrings.py", "--out", one, "--rows", "400")
    script("data/make_docstrings.py", "--out", two, "--rows", "400")
    assert one.read_bytes() == two.read_bytes()
    rows = pq.read_table(one).column("messages").to_pylist()
    assert len(rows) == 400
    assert {tuple(message["role"] for message in row) for row in rows} == {("user", "assistant")}
    assert len({row[0]["content"] for row in rows}) == 400
