"""Token ids that the base model's embedding has no row for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tuning.data.__main__ import work
from tuning.data.first_rows import check_file
from tuning.data.formats import Columns
from tuning.data.vocabulary import Vocabulary, embedding_rows
from tuning.errors import DataError

TINY = Path(__file__).parents[2] / "examples" / "tiny-model"
ROWS = 1728


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer of more tokens than its embedding has rows."""
    folder = tmp_path_factory.mktemp("base") / "grown"
    shutil.copytree(TINY, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<t{n}>" for n in range(60)])
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) > ROWS
    return folder


def chat(answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": answer},
        ]
    }


REFUSED = {
    "an added token in an answer": (chat("<t59>"), 'token 1733, "<t59>"', "DATA-254"),
    "in a question": (
        {"prompt": "<t58>?", "completion": "Yes."},
        'token 1732, "<t58>"',
        "DATA-254",
    ),
    "in running text": ({"text": "So <t57> is."}, 'token 1731, "<t57>"', "DATA-254"),
    "a ready-made token": ({"input_ids": [1, ROWS]}, f"token {ROWS}", "DATA-254"),
    "far beyond": ({"input_ids": [1, 2**40]}, f"token {2**40}", "DATA-254"),
    "a negative token": ({"input_ids": [1, -100]}, "input_ids holds -100", "DATA-247"),
    "a label that is another token": (
        {"input_ids": [1, 5], "labels": [-100, 6]},
        "labels[1] is 6",
        "DATA-247",
    ),
    "a negative label": (
        {"input_ids": [1, 5], "labels": [-1, 5]},
        "labels[0] is -1",
        "DATA-247",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_id_without_a_row_in_the_embedding_is_refused_before_training(
    name: str, grown: Path, tmp_path: Path
) -> None:
    """By `check`, and by the step that preview and run share, with line, token and row count."""
    row, says, code = REFUSED[name]
    sound = {key: value for key, value in row.items() if key != "labels"} | {
        key: fine for key, fine in {"input_ids": [1, 2], "text": "a", "prompt": "a"}.items()
        if key in row
    }  # fmt: skip
    sound = chat("Yes.") if "messages" in row else sound
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (sound, row, sound)))

    with pytest.raises(DataError) as checked:
        check_file(
            path,
            "rows.jsonl",
            columns=Columns(),
            extension=None,
            vocabulary=Vocabulary(embedding_rows(grown), grown),
        )
    with pytest.raises(DataError) as tokenised:
        _tokenise(path, grown, tmp_path / "out")

    for refused in (checked, tokenised):
        (problem,) = refused.value.problems
        assert (code, "rows.jsonl line 2") == (problem.code, problem.where)
        assert says in problem.what
        assert code != "DATA-254" or f"{ROWS} rows" in problem.what


def test_a_larger_tokenizer_is_fine_where_no_row_uses_the_rest(grown: Path, tmp_path: Path) -> None:
    """An added pad token, or padding to a round number, costs nothing."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(chat("Yes.")) + "\n")

    done = _tokenise(path, grown, tmp_path / "out")

    assert 1 == done["rows"]


def test_the_embedding_of_a_wrapped_or_unknown_model_is_known(tmp_path: Path) -> None:
    """Of a text model in a larger one, and of a family without a preset; else nothing is said."""
    cases = (
        ({"model_type": "x", "vocab_size": 7}, 7),
        ({"model_type": "x", "text_config": {"vocab_size": 9}}, 9),
        ({"model_type": "x"}, None),
        ([], None),
    )
    for config, expected in cases:
        (tmp_path / "config.json").write_text(json.dumps(config))

        assert expected == embedding_rows(tmp_path)


def _tokenise(path: Path, base: Path, out: Path) -> dict[str, Any]:
    file = {"path": str(path), "shown": "rows.jsonl"}
    return work(
        {"step": "tokenise", "files": [file], "base": str(base), "out": str(out), "settings": {}}
    )
