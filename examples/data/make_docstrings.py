"""Build a data set of chat rows from the docstrings that every Python installation has.

Sources are parsed, never imported: the standard library first, then what is installed beside it,
in alphabetical order, so the same installation always gives the same file. Each public module,
class and function with a docstring is one question, and the docstring's first paragraph the answer;
when those are used up, the next round asks for them in another form.

    python make_docstrings.py --out docstrings.parquet [--rows 10000]
"""

from __future__ import annotations

import argparse
import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
SKIPPED = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__"}
FORMS = {
    "module": (
        "What is the Python module {name} for?",
        "Explain the module {name} in a sentence or two.",
        "When would I import {name}?",
        "Describe the module {name}.",
    ),
    "class": (
        "What is the Python class {name} for?",
        "Explain the class {name} in a sentence or two.",
        "When would I use the class {name}?",
        "Describe the class {name}.",
    ),
    "function": (
        "What does the Python function {name} do?",
        "Explain {name}() in a sentence or two.",
        "What happens when I call {name}()?",
        "Describe the function {name}.",
    ),
}
SHORTEST, LONGEST = 20, 1200  # characters of an answer that can teach something
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

Documented = tuple[str, str, str]  # kind, dotted name, first paragraph


def source_files() -> Iterator[tuple[str, Path]]:
    """Dotted module name and file, the standard library before the installed packages."""
    paths = sysconfig.get_paths()
    for root in dict.fromkeys((Path(paths["stdlib"]), Path(paths["purelib"]))):
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            if SKIPPED.isdisjoint(parts) and all(part.isidentifier() for part in parts):
                yield ".".join(parts).removesuffix(".__init__"), file


def documented(module: str, file: Path) -> Iterator[Documented]:
    """What one source file documents; nothing when it cannot be read as Python."""
    try:
        with warnings.catch_warnings(action="ignore"):  # old escapes in other people's sources
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    if not any(part.startswith("_") for part in module.split(".")):
        yield from below(tree, "module", module)


def below(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, kind: str, name: str
) -> Iterator[Documented]:
    """The node itself and the public classes and functions defined in it."""
    answer = first_paragraph(ast.get_docstring(node))
    if answer is not None:
        yield kind, name, answer
    if kind == "function":
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from below(child, "class", f"{name}.{child.name}")
        elif isinstance(child, FUNCTIONS) and not child.name.startswith("_"):
            yield from below(child, "function", f"{name}.{child.name}")


def first_paragraph(docstring: str | None) -> str | None:
    """The first paragraph on one line; None when it says too little or too much."""
    words = " ".join((docstring or "").strip().split("\n\n")[0].split())
    return words if SHORTEST <= len(words) <= LONGEST and ">>>" not in words else None


def everything() -> Iterator[Documented]:
    """Each documented thing once: a second docstring of the same name or words is left out."""
    names, answers = set(), set()
    for module, file in source_files():
        for kind, name, answer in documented(module, file):
            if name not in names and answer not in answers:
                names.add(name)
                answers.add(answer)
                yield kind, name, answer


def conversations(things: Iterator[Documented]) -> Iterator[list[dict[str, str]]]:
    """Rows of two messages; round after round, each thing in another form of question."""
    seen: list[Documented] = []
    for number in range(len(FORMS["module"])):
        for index, (kind, name, answer) in enumerate(things if number == 0 else seen):
            if number == 0:
                seen.append((kind, name, answer))
            forms = FORMS[kind]
            question = forms[(index + number) % len(forms)].format(name=name)
            yield [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]


def main() -> None:
    """Write the file; say how many rows it has."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the parquet file to write")
    parser.add_argument("--rows", type=int, default=10_000)
    given = parser.parse_args()
    rows = list(islice(conversations(everything()), given.rows))
    if len(rows) < given.rows:
        sys.exit(f"this Python has docstrings for {len(rows)} rows, fewer than {given.rows}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"messages": pa.array(rows, MESSAGES)})
    pq.write_table(table, given.out, compression="zstd")
    print(f"{given.out}: {len(rows)} rows, {given.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
