"""`new_special_tokens` and `start_adapter` of the ConfigMap: what is taken, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning import spec
from tuning.errors import SpecError

WORKSPACE: dict[str, Any] = {
    "apiVersion": "kaito.sh/v1beta1",
    "kind": "Workspace",
    "metadata": {"name": "mine"},
    "tuning": {
        "preset": {"name": "phi-4"},
        "method": "lora",
        "config": "mine",
        "input": {"urls": ["https://data.example.com/a.jsonl"]},
        "output": {"image": "registry.example.com/a/b:1", "imagePushSecret": "login"},
    },
}


def document(section: str = "ModelConfig", /, **keys: Any) -> str:
    """A Workspace with these keys of a section of its ConfigMap."""
    # JSON: safe_dump leaves texts such as 0E0 bare, which YAML 1.2 reads as numbers
    content = json.dumps({"training_config": {section: keys}}, ensure_ascii=False)
    config = {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "mine"}}
    return yaml.safe_dump_all([WORKSPACE, config | {"data": {"training_config.yaml": content}}])


def parsed(**model: Any) -> spec.Settings:
    return spec.parse(document(**model), origin="ws.yaml").settings


def refusal(**model: Any) -> str:
    with pytest.raises(SpecError) as caught:
        parsed(**model)
    (problem,) = caught.value.problems
    return str(problem)


WORDS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=30)


@settings(max_examples=30)
@given(st.lists(WORDS, min_size=1, max_size=20, unique=True))
def test_printable_texts_become_tokens_in_their_order(words: list[str]) -> None:
    """Of any script, with any signs."""
    assert tuple(words) == parsed(new_special_tokens=words).new_tokens


def test_one_token_needs_no_list() -> None:
    """As for other keys that hold names."""
    assert ("<|a b|>",) == parsed(new_special_tokens="<|a b|>").new_tokens
    assert parsed().new_tokens is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "SPEC-104 .*lists 0 tokens"),
        ([f"<{n}>" for n in range(1001)], "SPEC-104 .*lists 1,001 tokens.*list 1 to 1000"),
        (["<a>", "<b>", "<a>"], 'SPEC-104 .*lists "<a>" 2 times'),
        (["<a>", ""], "SPEC-104 .*is empty or white space"),
        (["\u2003\t"], "SPEC-104 .*is empty or white space"),
        (["<a> "], 'SPEC-104 .*white space at an end.*write "<a>"'),
        (["<a>\n<b>"], "SPEC-104 .*control characters"),
        (["x" * 101], "SPEC-104 .*too long"),
        ([5], "SPEC-113 .*holds 5, expected texts"),
        ([True], "SPEC-113 .*expected texts"),
        ([["<a>"]], "SPEC-113 .*holds a list"),
        ({"<a>": 1}, "SPEC-113 .*holds a mapping"),
    ],
)
def test_what_cannot_be_a_token_is_refused(value: Any, words: str) -> None:
    """One problem with its place and what to write."""
    found = refusal(new_special_tokens=value)

    assert re.search(words, found), found
    assert "training_config.ModelConfig.new_special_tokens" in found


@pytest.mark.parametrize("named", ["registry.example.com/a/b:1", "oci://localhost:5000/b:1"])
def test_a_cluster_goes_on_from_an_image(named: str) -> None:
    """With or without the scheme that base models of images have."""
    assert named.removeprefix("oci://") == parsed(start_adapter=named).start_adapter


@pytest.mark.parametrize("named", ["/mnt/adapter", "adapter", "./a", "~/a", "oci:out", "a/b:1"])
def test_a_cluster_refuses_a_folder(named: str) -> None:
    """A Job does not see the folders of its author; nor is a name without a registry an image."""
    found = refusal(start_adapter=named)

    assert "SPEC-122" in found
    assert "write an image with its registry" in found and "on a cluster" in found


@pytest.mark.parametrize("named", ["registry.example.com/A:1", "oci://<registry>/a:1"])
def test_a_wrong_reference_is_refused(named: str) -> None:
    """As in other places that name an image."""
    assert refusal(start_adapter=named).startswith(("SPEC-106", "SPEC-114"))


def test_a_folder_is_seen_from_the_yaml(tmp_path: Path) -> None:
    """On one's own machine: a folder, a layout, one image of a layout; written out in full."""
    for name in ("adapter", "layout"):
        (tmp_path / name).mkdir()
    names = {
        "adapter": f"{tmp_path}/adapter",
        str(tmp_path / "adapter"): f"{tmp_path}/adapter",
        "oci:layout": f"oci:{tmp_path}/layout",
        "oci:layout:v2": f"oci:{tmp_path}/layout:v2",
        "registry.example.com/a:1": "registry.example.com/a:1",
    }
    path = tmp_path / "ws.yaml"
    for named, expected in names.items():
        path.write_text(document(start_adapter=named))
        actual = spec.load(path)
        assert expected == actual.settings.start_adapter
        path.write_text(spec.dump(actual))
        assert expected == spec.load(path).settings.start_adapter

    path.write_text(document(start_adapter="adaptor"))
    with pytest.raises(SpecError, match=r'SPEC-122 .*"adaptor" is no folder here'):
        spec.load(path)


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("ModelConfig", "add_new_tokens", "ModelConfig.new_special_tokens"),
        ("TrainingArguments", "additional_special_tokens", "ModelConfig.new_special_tokens"),
        ("LoraConfig", "lora_model_dir", "ModelConfig.start_adapter"),
        ("TrainingArguments", "adapter_name_or_path", "ModelConfig.start_adapter"),
        ("LoraConfig", "new_special_tokens", "ModelConfig"),
    ],
)
def test_names_of_other_tools_lead_to_ours(section: str, key: str, meant: str) -> None:
    """A key that axolotl or LLaMA-Factory has is answered with the one that does the same."""
    with pytest.raises(SpecError) as caught:
        spec.parse(document(section, **{key: "x"}), origin="ws.yaml")

    assert meant in str(caught.value)
