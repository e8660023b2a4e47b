"""`check` says what a run would only say after its downloads, from headers and small files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from commands import good, tuning
from fake_hub import FakeHub
from safetensors.torch import load_file, save_file

from tuning.models.load import load_tokenizer

Build = Callable[..., Path]
CHATS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A hub without models."""
    with FakeHub() as running:
        yield running


@pytest.fixture
def base(tiny_base: Build, tmp_path: Path) -> Path:
    """A copy of a model outside the presets, to harm."""
    return Path(shutil.copytree(tiny_base("olmo2"), tmp_path / "base"))


@pytest.fixture(scope="module")
def remembered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What earlier checks of this module found."""
    return tmp_path_factory.mktemp("cache")


def checked(
    model: object,
    tmp_path: Path,
    hub: FakeHub | None = None,
    row: Any = None,
    *more: object,
    cache: Path | None = None,
) -> CompletedProcess[str]:
    """`tuning check` of `model` and a file with one row."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row or {"messages": CHATS}) + "\n")
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"} if hub else {}
    homes = {"HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(cache or tmp_path / "cache")}
    return tuning(
        "check", model, rows, "-o", f"dir:{tmp_path / 'out'}", *more,
        env=os.environ | homes | online,
    )  # fmt: skip


def harm(base: Path, *, shape: bool = False) -> None:
    """Take one weight away, or a row of it."""
    tensors = load_file(base / "model.safetensors")
    weight = tensors.pop(WEIGHT)
    if shape:
        tensors[WEIGHT] = weight[1:].contiguous()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def test_weights_of_a_folder_are_compared_once(base: Path, tmp_path: Path) -> None:
    """Whole ones with their number; a second check remembers that, until a file is another."""
    first, second = (checked(base, tmp_path) for _ in range(2))
    assert "tensors, all that its class has" in good(first)
    assert "tensors, all that its class has" in good(second)
    assert ("Comparing" in first.stderr, "Comparing" in second.stderr) == (True, False)
    harm(base)
    third = checked(base, tmp_path)
    assert (third.returncode, third.stdout) == (11, "")
    assert f"MODEL-119 {base}: lacks 1 weights of its class, such as {WEIGHT}" in third.stderr


def test_weights_at_the_hub_are_compared_without_them(
    base: Path, tmp_path: Path, hub: FakeHub
) -> None:
    """Beside what is wrong with the data, in one pass."""
    harm(base, shape=True)
    hub.add("org/model", base)
    size = (base / "model.safetensors").stat().st_size
    done = checked("org/model", tmp_path, hub, {"nothing": "known"})

    assert f"org/model: has 1 weights of another shape than its class, such as {WEIGHT}" in (
        done.stderr
    )
    assert "rows.jsonl line 1" in done.stderr
    assert hub.sent < size


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_conversations_need_a_chat_template(
    where: str, base: Path, tmp_path: Path, hub: FakeHub, remembered: Path
) -> None:
    """Of a base without one only other rows can be trained, or with a template of the user's."""
    (base / "chat_template.jinja").unlink()
    hub.add("org/model", base)
    model = base if where == "folder" else "org/model"
    refused = checked(model, tmp_path, hub, cache=remembered)
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")

    assert 10 == refused.returncode, refused.stderr
    assert "conversation" in refused.stderr
    assert "DATA-244" in refused.stderr
    assert "but the base model has no chat template" in refused.stderr
    good(checked(model, tmp_path, hub, {"text": "a"}, cache=remembered))
    own = ("--set", f"chat_template={template}")
    good(checked(model, tmp_path, hub, {"messages": CHATS}, *own, cache=remembered))
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": template.read_text()})
    )
    hub.add("org/model", base)
    good(checked(model, tmp_path, hub, cache=remembered))


def changed(path: Path, **values: Any) -> None:
    """Write `values` into the JSON file at `path`; None removes one."""
    record = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}))


NOBODY = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
NOBODY += "{% endfor %}"


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("config.json", {"hidden_act": "bogus"}, "MODEL-103 "),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: is no JSON object"),
        ("tokenizer_config.json", '{"a":', "tokenizer_config.json: is no JSON object"),
        ("tokenizer_config.json", {"chat_template": 5}, "has a chat template that is no text"),
        ("tokenizer.json", "{}", "download its tokenizer's files again"),
        ("chat_template.jinja", "{% for m in messages %}{{m", "DATA-245"),
        ("chat_template.jinja", NOBODY, "DATA-231"),
        ("chat_template.jinja", "", "DATA-244"),
    ],
)
def test_what_a_run_would_meet_in_small_files_is_said_before(
    file: str, values: Any, words: str, base: Path, tmp_path: Path, remembered: Path
) -> None:
    """Values that no model can be made of, broken tokenizers, templates that show no answer."""
    if "chat_template" in values:
        (base / "chat_template.jinja").unlink()
    if isinstance(values, str):
        (base / file).write_text(values)
    else:
        changed(base / file, **values)
    done = checked(base, tmp_path, cache=remembered)

    assert done.returncode in (10, 11), done.stdout
    assert words in done.stderr
    assert "take a base model with tokenizer.json." not in done.stderr or "{}" == values


@pytest.mark.parametrize("kind", ["named", "one of another name", "folder", "processor"])
def test_a_base_with_templates_elsewhere_is_trained_with_one(
    kind: str, base: Path, tmp_path: Path, remembered: Path
) -> None:
    """The named "default", else the first, or a processor's; the adapter has that one alone."""
    text = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    other = {"name": "rag", "template": "x"}
    if kind == "named":
        both = [other, {"name": "default", "template": text}]
        changed(base / "tokenizer_config.json", chat_template=both)
    elif kind == "one of another name":
        one = [{"name": "tool_use", "template": text}]
        changed(base / "tokenizer_config.json", chat_template=one)
    elif kind == "folder":
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates" / "tool_use.jinja").write_text(text)
    else:
        (base / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    good(checked(base, tmp_path, cache=remembered))
    out = tmp_path / "o"
    if kind == "folder":  # a whole run
        steps = ("--set", "max_steps=1", "--set", "learning_rate=0.001", "--run-dir")
        rows = tmp_path / "rows.jsonl"
        good(tuning("run", base, rows, "-o", f"dir:{out}", *steps, tmp_path / "run"))
    else:
        load_tokenizer(base).save_pretrained(out)  # as training saves it

    assert text == (out / "chat_template.jinja").read_text()
    assert not (out / "additional_chat_templates").exists()
