"""`DatasetConfig.sources`: what is read and refused of it, and which part a file belongs to."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.errors import SpecError
from tuning.spec.findings import Findings
from tuning.spec.mixture import assign, read
from tuning.spec.values import Part

AT = ("DatasetConfig", "sources")


def refused(value: Any) -> list[str]:
    findings = Findings({})
    read(value, AT, findings)
    return [f"{p.code} {p.where}: {p.what}" for p in findings.in_order()]


def test_parts_are_read_with_their_amount_and_columns() -> None:
    """null is not there; whole numbers are weights as well."""
    findings = Findings({})
    parts = [
        {"path": "hf://datasets/org/name", "weight": 70, "rows": None},
        {"path": "*.csv", "rows": 1000, "context_column": "q", "response_column": "a"},
    ]

    assert (
        Part("hf://datasets/org/name", 70.0),
        Part("*.csv", rows=1000, context_column="q", response_column="a"),
    ) == read(parts, AT, findings)
    assert (Part("a"), Part("b", rows=1)) == read(
        [{"path": "a"}, {"path": "b", "rows": 1}], AT, findings
    )
    assert [] == findings.in_order()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.csv", 'SPEC-113 DatasetConfig.sources: is "a.csv", expected'),
        ([], "SPEC-113 DatasetConfig.sources: lists 0 parts"),
        ([{"path": str(n)} for n in range(101)], "SPEC-113 DatasetConfig.sources: lists 101 parts"),
        (["a.csv"], 'SPEC-113 DatasetConfig.sources[0]: is "a.csv"'),
        ([{"weight": 1}], "SPEC-112 DatasetConfig.sources[0]: has no path"),
        ([{"path": 7}], "SPEC-113 DatasetConfig.sources[0].path: is 7"),
        ([{"path": "a\nb"}], "SPEC-113 DatasetConfig.sources[0].path: is"),
        ([{"path": "a", "wieght": 1}], "SPEC-111 DatasetConfig.sources[0].wieght: unknown key"),
        ([{"path": "a", 7: 1}], "SPEC-111 DatasetConfig.sources[0].7: unknown key"),
        ([{"path": "a", "weight": 0}], "SPEC-104 DatasetConfig.sources[0].weight: is 0"),
        ([{"path": "a", "weight": True}], "SPEC-104 DatasetConfig.sources[0].weight: is true"),
        ([{"path": "a", "weight": "1"}], "SPEC-104 DatasetConfig.sources[0].weight: is"),
        ([{"path": "a", "weight": float("nan")}], "SPEC-104 DatasetConfig.sources[0].weight: is"),
        ([{"path": "a", "rows": 0.5}], "SPEC-104 DatasetConfig.sources[0].rows: is 0.5"),
        ([{"path": "a", "rows": -1}], "SPEC-104 DatasetConfig.sources[0].rows: is -1"),
        ([{"path": "a", "rows": 1, "weight": 1}], "SPEC-108 DatasetConfig.sources[0].rows: has a"),
        ([{"path": "a"}, {"path": "a"}], "SPEC-108 DatasetConfig.sources[1].path: is the path of"),
        ([{"path": "a", "weight": 1}, {"path": "b"}], "SPEC-112 DatasetConfig.sources[1]: has no"),
        ([{"path": "a", "messages_column": []}], "SPEC-113 DatasetConfig.sources[0].messages_c"),
    ],
)
def test_a_wrong_part_is_refused_at_its_place(value: Any, expected: str) -> None:
    """Each with what is there and what should be."""
    (problem,) = refused(value)

    assert problem.startswith(expected), problem


def test_all_wrong_parts_are_told_at_once() -> None:
    """Also several keys of one."""
    found = refused([{"weight": -1, "rows": "x"}, 5, {"path": "a", "colour": 1}])

    assert 6 == len(found)


FILES = [
    ("https://x.org/a.jsonl#sha256=" + 64 * "0", "https://x.org/a.jsonl"),
    ("hf://datasets/org/name?config=en", "hf://datasets/org/name/en/train-0.parquet"),
    ("hf://datasets/org/name?config=de", "hf://datasets/org/name/de/train-0.parquet"),
    ("", "/data/own.csv"),
    ("", "other[1].csv"),
]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["*"], [0, 0, 0, 0, 0]),
        (["https://x.org/a.jsonl", "*.csv", "*"], [0, 2, 2, 1, 1]),
        (["a.jsonl", "hf://datasets/org/name?config=en", "*"], [0, 1, 2, 2, 2]),
        (["en/*.parquet", "own.csv", "other[1].csv", "*"], [3, 0, 3, 1, 2]),
        (["data/own.csv", "*"], [1, 1, 1, 0, 1]),
        (["hf://*", "*.csv", "https://*"], [2, 0, 0, 1, 1]),
    ],
)
def test_a_file_belongs_to_the_first_part_that_names_it(
    paths: list[str], expected: list[int]
) -> None:
    """By the URL as it is written, by its name or the end of it, or by a pattern."""
    assert expected == assign([Part(path) for path in paths], FILES)


def test_what_belongs_to_nothing_is_told_with_what_there_is() -> None:
    """Files without a part and parts without a file, in one pass; a part of a name is none."""
    with pytest.raises(SpecError) as refusal:
        assign([Part("wn.csv"), Part("a.jsonl"), Part("*.txt")], FILES)

    words = [str(problem) for problem in refusal.value.problems]
    assert 3 == len(words)
    assert words[0].startswith(
        'SPEC-123 DatasetConfig.sources[0].path: names "wn.csv", and no file'
    )
    assert "/data/own.csv" in words[0]
    assert words[1].startswith('SPEC-123 DatasetConfig.sources[2].path: names "*.txt"')
    assert words[2].startswith("SPEC-123 DatasetConfig.sources: names no part for hf://datasets")
    assert not any("sha256" in each for each in words)


@given(st.lists(st.text("ab/.*?[]", min_size=1, max_size=5), min_size=1, max_size=5, unique=True))
def test_names_are_themselves_whatever_is_in_them(names: list[str]) -> None:
    """A path that is a file's name names that file, if no earlier part does."""
    for number, name in enumerate(names):
        assert [0] == assign([Part(name)], [("", name)])
        with contextlib.suppress(SpecError):  # a part without a file
            found = assign([Part(each) for each in names], [("", each) for each in names])
            assert found[number] <= number
