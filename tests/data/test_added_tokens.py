"""New tokens in the data: one number each, trained like others, and what does not work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import tuning, workspace

from tuning.data import tokenise
from tuning.data.tokenizer import load_tokenizer
from tuning.errors import DataError, SpecError

Build = Callable[..., Path]
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|stop|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def rows(
    base: Path, out: Path, messages: list[tuple[str, str]], **settings: Any
) -> list[list[Any]]:
    """The text of each token, and whether it is trained, of conversations."""
    file = out.with_suffix(".jsonl")
    lines = (
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in messages
    )
    file.write_text("\n".join(map(json.dumps, lines)))
    request = {
        "files": [{"path": str(file), "shown": "rows.jsonl"}],
        "base": str(base),
        "out": str(out),
        "settings": settings,
        "processes": 1,
    }
    tokenise.run(request)
    shown = json.loads((out / "preview.json").read_text())
    return [row["tokens"] for row in shown]


def test_a_new_token_is_one_and_trained_where_it_is_said(tiny_base: Build, tmp_path: Path) -> None:
    """In a question it is read, in an answer learnt; without the key it is some pieces."""
    said = [("cat <|a b|>", "tree <|a b|>!")]

    (row,) = rows(tiny_base("llama"), tmp_path / "new", said, new_tokens=["<|a b|>"])
    (pieces,) = rows(tiny_base("llama"), tmp_path / "old", said)

    assert [False, True] == [trained for text, trained in row if text == "<|a b|>"]
    assert not [text for text, _ in pieces if text == "<|a b|>"]


def test_tokens_that_a_template_writes_are_special(tiny_base: Build, tmp_path: Path) -> None:
    """Also those that it puts together; a text that holds one is refused, as it would end a turn.
    All others are part of what is said."""
    base, new = tiny_base("llama"), ["<|user|>", "<|assistant|>", "<|stop|>", "<|say|>"]

    tokenizer = load_tokenizer(base, new, CHATML)
    (row,) = rows(
        base, tmp_path / "a", [("cat", "<|say|> dog")], new_tokens=new, chat_template=CHATML
    )

    ids = tokenizer.convert_tokens_to_ids(new)
    special = [tokenizer.added_tokens_decoder[id].special for id in ids]
    assert [True, True, True, False] == special
    assert "<|say|> dog" == tokenizer.decode(
        tokenizer("<|assistant|><|say|> dog<|stop|>")["input_ids"], skip_special_tokens=True
    )
    assert ["<|say|>", " dog", "<|stop|>"] == [text for text, trained in row if trained]
    with pytest.raises(DataError, match=r"DATA-233 .*<\|stop\|>"):
        rows(base, tmp_path / "b", [("<|stop|>", "x")], new_tokens=new, chat_template=CHATML)


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("<|im_end|>", r"DATA-257 .*is token \d+ of the base model already.*remove it"),
        ("dog", r"DATA-257 .*\"dog\" is token"),
        ("naïve:", r"DATA-258 .*would be shown as .*write it in ASCII"),
        ("é", r"DATA-25[78] "),
    ],
)
def test_a_token_that_does_not_work_is_refused(token: str, words: str, tiny_base: Build) -> None:
    """One that exists, by its number; one that a decoder of bytes would show as another."""
    with pytest.raises(SpecError, match=words):
        load_tokenizer(tiny_base("llama"), ["<|ok|>", token])


@pytest.mark.parametrize("token", ["<|数 字|>", "→ order", "<|a|>", "!!??;;", "Order-No."])
def test_texts_of_any_script_come_back(token: str, tiny_base: Build) -> None:
    """Read as one token, and shown as they were written."""
    tokenizer = load_tokenizer(tiny_base("llama"), [token])

    ids = tokenizer(f"cat {token} dog")["input_ids"]

    assert 1 == ids.count(tokenizer.convert_tokens_to_ids(token))
    assert f"cat {token} dog" == tokenizer.decode(ids)


def test_only_new_tokens_get_rows(tiny_base: Build, tmp_path: Path) -> None:
    """A token of the tokenizer behind the embedding's last row is refused as before."""
    base = shutil.copytree(tiny_base("llama"), tmp_path / "base")
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<|gap|>"])
    tokenizer.save_pretrained(base)

    (row,) = rows(base, tmp_path / "a", [("cat", "<|new|>")], new_tokens=["<|new|>"])
    assert "<|new|>" in [text for text, trained in row if trained]
    with pytest.raises(DataError, match=r"DATA-254 .*<\|gap\|>"):
        rows(base, tmp_path / "b", [("cat", "<|gap|>")], new_tokens=["<|new|>"])


def test_check_refuses_a_token_of_a_base_at_hand(tiny_base: Build, tmp_path: Path) -> None:
    """In seconds, before anything is trained."""
    sections = {"ModelConfig": {"new_special_tokens": ["<|fine|>", "<|im_start|>"]}}
    path = workspace(tmp_path / "ws.yaml", sections=sections)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    options = ("--base-model", tiny_base("llama"), "--data", tmp_path / "rows.jsonl")

    done = tuning("check", "-f", path, *options, "--output", f"oci:{tmp_path / 'out'}")

    assert 11 == done.returncode
    assert "DATA-257" in done.stderr and "<|im_start|>" in done.stderr
    assert "<|fine|>" not in done.stderr
