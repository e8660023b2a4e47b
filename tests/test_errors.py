"""Errors: one line each, all of them, nothing secret."""

import difflib
import re
from pathlib import Path

import error_codes
import pytest
from hypothesis import given
from hypothesis.strategies import text

from tuning import errors
from tuning.errors import DataError, Killed, Problem, SpecError, TuningError


def test_a_problem_reads_as_code_place_fault_and_remedy():
    """The text is `CODE-nnn where: what. Change: what to do.` with one full stop each."""
    error = SpecError.at("SPEC-104", "tuning.method", 'is "lorra".', 'use "lora" or "qlora"')

    assert str(error) == 'SPEC-104 tuning.method: is "lorra". Change: use "lora" or "qlora".'


def test_many_problems_of_one_code_are_counted_after_twenty():
    """Twenty of a code are shown, the rest counted; other codes are not pushed out."""
    problems = [Problem("DATA-201", f"line {n}", "is bad", "mend it") for n in range(33)]
    error = DataError([*problems, Problem("DATA-202", "file", "is bad", "mend it")])

    lines = str(error).splitlines()

    assert len(lines) == 22
    assert lines[-1] == "DATA-201: the same in 13 more places."
    assert any(line.startswith("DATA-202") for line in lines)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (
            "GET https://acct.blob.example/d/t.parquet?sv=1&sig=SECRET failed",
            "GET https://acct.blob.example/d/t.parquet?<redacted> failed",
        ),
        ("https://user:SECRET@host.example/a", "https://host.example/a"),
        ("s3://key:SECRET@bucket/x?token=SECRET#f", "s3://bucket/x?<redacted>#f"),
        ("no link, 1 < 2 ? yes", "no link, 1 < 2 ? yes"),
    ],
)
def test_urls_lose_their_secrets(text, clean):
    """User info and query go, scheme, host and path stay."""
    assert clean == errors.redact(text)
    assert "SECRET" not in str(SpecError.at("SPEC-1", text, text, text))


@pytest.mark.parametrize("kind", [k for k in TuningError.__subclasses__() if k is not Killed])
def test_an_error_survives_the_way_through_a_result_file(kind):
    """Kind, exit code and problems come back as they went."""
    error = kind.at("X-1", "here", "broken", "mend")

    back = errors.from_json(error.to_json())

    assert (type(error), error.problems) == (type(back), back.problems)


def test_exit_codes_are_the_published_ones():
    """Other people's tools rely on these numbers."""
    kinds = [kind for kind in TuningError.__subclasses__() if kind is not Killed]
    codes = {kind.__name__: kind.exit_code for kind in kinds}

    assert codes == {
        "UsageError": 2,
        "DataError": 10,
        "SpecError": 11,
        "RefusedError": 12,
        "DivergedError": 13,
        "OutOfMemoryError": 14,
        "TransientError": 20,
        "Stopped": 75,
    }


def test_the_catalogue_has_every_code_that_is_raised():
    """No code without a meaning, no meaning without a code."""
    codes = set(error_codes.catalogue())

    assert set(error_codes.sites()) == codes
    assert set(error_codes.ROOMS) == {code.partition("-")[0] for code in codes}


def test_each_example_is_a_message_that_the_code_makes():
    """Its words are those of a template at one of the code's raise sites."""
    sites, wrong = error_codes.sites(), []
    for code, entry in error_codes.catalogue().items():
        texts = {text for site in sites[code] for text in site.templates} | {"«»"}
        for part in ("what", "change"):
            if error_codes.pattern(entry[part]) not in texts:
                near = difflib.get_close_matches(entry[part], texts, n=2, cutoff=0.3)
                wrong.append(f"{code} {part}: {entry[part]!r} is not of {near}")

    assert not wrong, "\n".join(wrong)


def test_each_code_ends_with_its_exit_code():
    """The class that a code is raised with has the exit code of the catalogue."""
    sites = error_codes.sites()
    for code, entry in error_codes.catalogue().items():
        known = entry["exit"] if isinstance(entry["exit"], list) else [entry["exit"]]
        raised = {site.exit_code for site in sites[code]} - {None}

        assert raised <= set(known), code


@given(text())
def test_no_text_of_others_commands_the_terminal(words):
    """Whatever a server or a file is called: no escapes, direction marks or lone surrogates."""
    shown = str(SpecError.at("SPEC-1", words, f"{words}\x1b[2J\udcff\u202e", words))

    shown.encode()
    assert not [c for c in shown if not c.isprintable() and c not in "\n\t\u00a0\u202f\u3000"]
    assert r"\x1b[2J\udcff\u202e" in shown


@pytest.mark.parametrize("words", ["schön", "名前", "a\tb\nc", "1 000", "🙂", "\\x1b"])
def test_text_of_all_languages_stays(words):
    """Only what cannot be printed is escaped."""
    assert words == errors.printable(words)


def test_a_code_stands_once_in_the_table() -> None:
    """YAML would silently keep the second of two entries, and a code would mean two things."""
    text = (Path(__file__).parents[1] / "configs" / "errors.yaml").read_text()
    codes = re.findall(r"^([A-Z]+-\d+):", text, re.M)

    assert sorted(set(codes)) == sorted(codes)
