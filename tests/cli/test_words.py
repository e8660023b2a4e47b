"""A mistake is told with the options of the command that was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import workspace

from tuning.cli import options, words
from tuning.errors import Problem, SpecError
from tuning.spec import Overrides

COLUMNS = "DatasetConfig: messages_column, or context_column and response_column"
WITHOUT_A_FILE = [
    ("TrainingArguments.max_length", "leave it out", "--set max_length", "leave it out"),
    (
        "",
        "set TrainingArguments.max_length to 512 or less",
        "",
        "give --set max_length=512 or less",
    ),
    (
        "row 1",
        "set DatasetConfig.response_column to the column that holds the answer",
        "row 1",
        "give --set response_column=VALUE, the column that holds the answer",
    ),
    (
        "row 1",
        f"name yours in {COLUMNS}",
        "row 1",
        "name yours with --set messages_column=VALUE, or --set context_column=VALUE and "
        "--set response_column=VALUE",
    ),
    (
        "line 2",
        "fill the columns, or name them in DatasetConfig (messages_column, objective)",
        "line 2",
        "fill the columns, or name them with --set messages_column=VALUE, --set objective=VALUE",
    ),
    ("", "use LoraConfig.target_modules: all-linear", "", "use --set target_modules=all-linear"),
    ("", "leave out TrainingArguments.packing", "", "leave out --set packing"),
    (
        "ConfigMap m-settings: training_config.LoraConfig.r",
        "set tuning.method to qlora",
        "--set r",
        "give --method qlora",
    ),
    ("input.urls[0] https://a.io/b.csv", "check it", "DATA https://a.io/b.csv", "check it"),
    ("tuning.preset.name", "see README.md", "MODEL", "see README.md"),
    ("resource.instanceType (line 4)", "name tuning.method: lora", "--instance", ...),
]


def refusals(model: str | None = "org/model", **more: Any) -> list[str]:
    """What is wrong with a command line, as people read it."""
    given: dict[str, Any] = dict.fromkeys(
        ("dataset", "file", "base_model", "data", "instance", "output", "method", "assigned")
    )
    if model:
        given["dataset"] = ["org/rows"]
    with pytest.raises(SpecError) as caught:
        options.spec_of(model, **(given | more))
    return [str(problem) for problem in words.told(caught.value).problems]


@pytest.mark.parametrize(("where", "change", "place", "expected"), WITHOUT_A_FILE)
def test_without_a_file_places_are_options(
    where: str, change: str, place: str, expected: Any
) -> None:
    """Also those of rooms that know of no command line."""
    words.remember(Overrides(), has_file=False)
    error = words.told(SpecError([Problem("PLAN-103", where, "is wrong", change)]))

    (problem,) = error.problems
    assert place == problem.where
    assert expected in (problem.change, ...)


def test_a_file_keeps_its_places_but_for_what_the_command_replaced(tmp_path: Path) -> None:
    """`--set max_length` is none of the file's lines, its learning rate is one."""
    words.remember(Overrides(set=("max_length=4",)), has_file=True)
    problems = [Problem("P", f"TrainingArguments.{key}", "", "") for key in ("max_length", "seed")]
    found = words.told(SpecError(problems)).problems
    assert ["--set max_length", "TrainingArguments.seed"] == [each.where for each in found]

    where = "ConfigMap settings: training_config.LoraConfig.r (line 4)"
    (own,) = words.told(SpecError([Problem("P", where, "in ConfigMap 'settings'", "")])).problems
    assert (where, "in ConfigMap 'settings'") == (own.where, own.what)

    (refused,) = refusals(None, file=workspace(tmp_path / "w.yaml"), instance="H100")
    assert "SPEC-304 --instance: " in refused
    assert "presets --instances` lists" in refused


def test_all_is_told_at_once_and_names_no_document_that_nobody_wrote() -> None:
    """An unknown machine type beside a mistake of the settings."""
    instance, key = refusals(instance="H100", method="lora", assigned=["load_in_4bit=true"])

    assert "SPEC-304 --instance: " in instance
    assert "SPEC-108 --set load_in_4bit: " in key
    assert "ConfigMap" not in key
    assert key.endswith("remove it, or give --method qlora.")


@pytest.mark.parametrize("output", ["sftp:foo", "sftp://host/foo", "file:x", "name:tag"])
def test_an_output_of_an_unknown_kind_is_refused_before_any_registry(output: str) -> None:
    """Docker Hub is written in full."""
    (refused,) = refusals(output=output)

    assert "SPEC-109 --output: " in refused
    assert "is no kind of place" in refused
