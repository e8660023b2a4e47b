"""Models, data and outputs of this machine: taken where a person runs it, refused on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tuning import spec
from tuning.errors import SpecError
from tuning.spec import Destination, Overrides, Source, builder

SECRET = {"imagePushSecret": "login"}


def here(folder: Path, **changes: Any) -> Path:
    """A YAML whose places are beside it, and what they name."""
    for name in ("model", "rows"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "a.jsonl").touch()
    tuning = {
        "preset": {"name": "model"},
        "method": "lora",
        "input": {"urls": ["a.jsonl", "./rows", "org/name", "https://data.example.com/b"]},
        "output": {"image": "oci:out"},
    }
    document = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": "own"},
        "tuning": tuning | changes,
    }
    path = folder / "w.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_places_are_seen_from_the_files_folder(tmp_path: Path) -> None:
    """A folder with a model, a file, a folder, a dataset of the hub, a URL, a layout."""
    actual = spec.load(here(tmp_path))

    assert ("model", str(tmp_path / "model")) == (actual.preset, actual.base_model)
    urls = ("hf://datasets/org/name", "https://data.example.com/b")
    expected = Source(urls=urls, folder=tmp_path / "rows", files=(tmp_path / "a.jsonl",))
    assert expected == actual.source
    assert Destination(layout=tmp_path / "out") == actual.destination


def test_a_dump_reads_back_the_same_from_anywhere(tmp_path: Path) -> None:
    """Its paths are whole."""
    actual = spec.load(here(tmp_path))
    other = tmp_path / "elsewhere" / "spec.yaml"
    other.parent.mkdir()
    other.write_text(spec.dump(actual))

    assert actual == spec.load(other)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("dir:out", Destination(folder=Path("out"))),
        ("hf://org/name@v1", Destination(hub=("org/name", "v1"))),
    ],
)
def test_outputs_without_a_registry(tmp_path: Path, image: str, expected: Destination) -> None:
    """A folder, and a repository of the hub."""
    actual = spec.load(here(tmp_path, output={"image": image})).destination

    folder = tmp_path / expected.folder if expected.folder else None
    assert (folder, expected.hub) == (actual.folder, actual.hub)


def test_what_is_not_there_is_named_at_once(tmp_path: Path) -> None:
    """Model, data and output in one pass."""
    absent = {"urls": ["gone.jsonl", "~nobody/x"]}
    path = here(tmp_path, preset={"name": "./gone"}, input=absent, output={"image": "./out"})
    with pytest.raises(SpecError) as caught:
        spec.load(path)
    refused = [str(problem) for problem in caught.value.problems]

    assert 4 == len(refused), refused
    assert any("SPEC-124 tuning.preset.name" in each for each in refused)
    assert 2 == sum("is neither a file or folder here" in each for each in refused)
    assert any("write dir:./out for a plain folder" in each for each in refused)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preset": {"name": "/models/x"}}, "org/model of the hub"),
        ({"preset": {"name": "oci://registry.example.com/x:1"}}, "org/model of the hub"),
        ({"input": {"urls": ["a.jsonl"]}}, "does not see the files of your machine"),
        ({"input": {"urls": ["/data/a.jsonl"]}}, "does not see the files of your machine"),
        ({"input": {"urls": ["org/name"]}}, "does not see the files of your machine"),
        ({"output": {"image": "oci:out", **SECRET}}, "write registry.example.com/name:tag"),
        ({"output": {"image": "dir:out", **SECRET}}, "write registry.example.com/name:tag"),
        ({"output": {"image": "hf://org/name", **SECRET}}, "write registry.example.com/name:tag"),
    ],
)
def test_a_cluster_refuses_them_with_the_remedy(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """By what the operator reads, whatever lies on its own disk."""
    good = {
        "preset": {"name": "org/model"},
        "input": {"urls": ["https://data.example.com/b"]},
        "output": {"image": "registry.example.com/a:1", **SECRET},
    }
    text = here(tmp_path, **(good | changes)).read_text()
    for read in (spec.parse, spec.parse_workspace):
        with pytest.raises(SpecError) as caught:
            read(text, origin="Workspace")
        (refused,) = caught.value.problems
        assert words in str(refused)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("org/Model_1.5-Instruct", "rows.jsonl"),
        ("/", "https://data.example.com/" + "x" * 200 + ".jsonl?key=1"),
        ("./" + "ü" * 80, "hf://datasets/org/name@v1?config=a"),
        ("oci://registry.example.com/base:1", "..."),
    ],
)
def test_a_name_is_a_stable_label_of_model_and_data(model: str, data: str) -> None:
    """The same places have the same name; other data of the same file name has another."""
    name = builder.name_of(model, (data,))

    assert name == builder.name_of(model, (data,))
    assert name != builder.name_of(model, (f"other/{data}",))
    document = builder.workspace(
        "org/model", ("https://data.example.com/b",), "a.io/b:1", method="lora"
    )
    document["metadata"]["name"] = name
    assert name == spec.parse(yaml.safe_dump(document), origin="x").name


def test_a_command_line_is_a_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document that a YAML would have held; without an output, the run directory's image."""
    here(tmp_path)
    monkeypatch.chdir(tmp_path)
    actual = spec.from_command_line("model", ("a.jsonl",), overrides=Overrides(method="qlora"))

    assert ("qlora", Destination()) == (actual.method, actual.destination)
    again = tmp_path / "spec.yaml"
    again.write_text(spec.dump(actual))
    read = spec.load(again)
    assert (actual.source, actual.base_model) == (read.source, read.base_model)
