"""What a model is measured on: files of questions, read, and names of lm-eval's tasks.

`eval` takes them from the command line, a run from `--evaluate` or its Workspace's annotation.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuning.errors import DataError, UsageError

ENDINGS = (".jsonl", ".json")  # of files of questions; other words are lm-eval's
ANNOTATION = "metadata.annotations.tuning.kaito.sh/evaluate"
_CHANGE = 'write {"question": "...", "answer": "..."}'


@dataclass(frozen=True)
class Tasks:
    """What is asked: files of questions, already read, and tasks of lm-eval."""

    questions: Sequence[tuple[str, Sequence[tuple[str, str]]]]  # name of the file, its pairs
    named: Sequence[str] = ()  # names, or YAML files
    python: str = ""  # which has lm-eval
    more: Sequence[str] = ()  # options of lm-eval

    def to_json(self) -> dict[str, Any]:
        """For requests to child processes: `Tasks(**record)` is the inverse."""
        return asdict(self)


def split(listed: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files of questions and names for lm-eval among words that commas may separate."""
    words = [word.strip() for each in listed for word in each.split(",") if word.strip()]
    questions = [word for word in words if Path(word).suffix in ENDINGS]
    return questions, [word for word in words if word not in questions]


def read(
    listed: Sequence[str],
    *,
    where: str,
    folder: Path = Path(),
    limit: int | None = None,
    lm_eval: Path | None = None,
    more: Sequence[str] = (),
) -> Tasks:
    """The tasks that the option or annotation `where` lists; files are seen from `folder`.

    Raises DataError for files of questions, UsageError for names without an lm-eval.
    """
    questions, named = split(listed)
    pairs = [(name, read_questions(folder / name, limit)) for name in questions]
    return Tasks(pairs, named, lm_eval_python(lm_eval, where) if named else "", more)


def refuse_names(listed: Sequence[str]) -> None:
    """Raise UsageError for names in the annotation's list, if there is no lm-eval."""
    if split(listed)[1]:
        lm_eval_python(None, ANNOTATION)


def read_questions(file: Path, limit: int | None = None) -> list[tuple[str, str]]:
    """The questions of a file with the words of their answers. Raises DataError with all faults."""
    found: list[tuple[str, str]] = []
    problems: list[DataError] = []
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read as text ({type(error).__name__})"
        raise DataError.at("SERVE-131", str(file), what, "name a JSONL file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair = row["question"], row["answer"]
        except (ValueError, LookupError, TypeError):
            pair = None, None
        if all(isinstance(each, str) and each.strip() for each in pair):
            found.append((str(pair[0]), str(pair[1])))
        else:
            what = "is no question with the words of its answer"
            problems.append(DataError.at("SERVE-131", f"{file} line {number}", what, _CHANGE))
    if problems:
        raise DataError([each for error in problems for each in error.problems])
    if not found:
        raise DataError.at("SERVE-131", str(file), "holds no question", f"{_CHANGE} a line")
    return found[:limit]


def lm_eval_python(given: Path | None, where: str = "--tasks") -> str:
    """The Python that has lm-eval: `given`, or this one. Raises UsageError."""
    if given is not None:
        return str(given)
    if importlib.util.find_spec("lm_eval") is None:
        what = "tasks by name are lm-eval's, which is not installed"
        change = "pip install 'lm-eval[api]', or name the Python that has it with --lm-eval"
        if where != "--tasks":  # of `eval`, which alone has the option
            change = "pip install 'tuning-jobs[eval]', or name a file of questions (.jsonl)"
        raise UsageError.at("SERVE-132", where, what, change)
    return sys.executable
