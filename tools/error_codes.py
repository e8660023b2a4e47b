"""The catalogue of error codes: configs/errors.yaml as a page, and what the code raises, by ast."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tuning import errors

ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r"[A-Z]+-\d{3}")
ROOMS = {
    "BASE": "Base models: files and weights",
    "DATA": "Training data",
    "FETCH": "Downloads of data",
    "HUB": "The Hugging Face hub",
    "IMAGE": "Images on disk",
    "JOB": "The operator",
    "MODEL": "Models and adapters",
    "PLAN": "Plans",
    "REG": "Registries and logins",
    "RUN": "Runs",
    "SERVE": "Serving",
    "SIGN": "Signatures",
    "SPEC": "Workspaces, configuration, presets",
    "TRAIN": "Training",
    "TRACK": "Trackers",
    "USE": "The command line",
}
INTRODUCTION = """# Errors and exit codes

Every error reads `CODE-nnn where: what is wrong. Change: what to do.` All problems of one input are
reported in one pass. URLs lose their user info and query; values of secrets are never shown.

| exit code | meaning | in a Job |
|---|---|---|
| 0 | adapter finished, pushed, verified; a server stopped by a signal | Complete |
| 1 | a bug of ours; the traceback is kept in the run directory | fails |
| 2 | the command line is wrong | fails |
| 10 | the data is unusable | fails |
| 11 | the spec or config is wrong, or nothing fits the GPU | fails |
| 12 | registry, hub or data host refused: login, permission, tag conflict | fails |
| 13 | training diverged: non-finite loss, gradient or weight | fails |
| 14 | out of memory after the automatic fallbacks | fails |
| 20 | transient: network, server error, disk full, run directory locked, hang | retried, counted |
| 75 | stopped by SIGTERM or SIGINT with its state saved | retried, not counted |
| 137, 139, 143 | killed from outside | retried, counted |

A run that failed leaves its journal, and its log in `log/`, in the run directory.

## Codes

A code means one thing, for ever. Each has an example; what to do stands after `Change:`. The exit
code is in brackets. Made by `make docs` from `configs/errors.yaml`.
"""


@cache
def catalogue() -> dict[str, dict[str, Any]]:
    """Each code with exit code, meaning and example."""
    text = (ROOT / "configs" / "errors.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return found


def page() -> str:
    """docs/errors.md."""
    lines, codes = [INTRODUCTION], catalogue()
    for prefix, title in ROOMS.items():
        lines.append(f"### {prefix}: {title}\n")
        for code in sorted(code for code in codes if code.partition("-")[0] == prefix):
            entry = codes[code]
            exits = str(entry["exit"]).strip("[]").replace(", ", " or ")
            more = f"  \n  {entry['do']}" if "do" in entry else ""
            shown = f"``{example(code, entry)}``"
            lines.append(f"- **{code}** ({exits}): {entry['means']}  \n  {shown}{more}")
        lines.append("")
    return "\n".join(lines)


def example(code: str, entry: dict[str, Any]) -> str:
    """The message of `code` as a person sees it."""
    parts = (re.sub("[«»]", "", entry[part]) for part in ("where", "what", "change"))
    return str(errors.Problem(code, *parts))


@dataclass(frozen=True)
class Site:
    """A place in the code that names an error code."""

    place: str
    exit_code: int | None  # of the error's class, if the call shows it
    templates: frozenset[str]  # texts of its function, of its module's constants, of its helper


@cache
def sites() -> dict[str, list[Site]]:
    """Every place in tuning/ and jobs/ that names a code, by code."""
    paths = sorted([*(ROOT / "tuning").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")])
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    helpers: dict[str, set[str]] = {}  # texts of the functions that are given a code
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef) and "code" in {arg.arg for arg in _arguments(node)}:
            helpers.setdefault(node.name, set()).update(_templates(node, deep=True))
    found: dict[str, list[Site]] = {}
    for path, tree in trees.items():
        constants = {text for node in tree.body for text in _templates(node, deep=False)}
        for node, function, call in _codes(tree, tree, None):
            helper = getattr(call and call.func, "attr", getattr(call and call.func, "id", ""))
            texts = constants.union(_templates(function, deep=True), helpers.get(helper, ()))
            place = f"{path.relative_to(ROOT)}:{node.lineno}"
            site = Site(place, _exit_code(call), frozenset(texts))
            found.setdefault(str(node.value), []).append(site)
    return found


def _arguments(function: ast.FunctionDef) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def pattern(text: str) -> str:
    """`text` with every example value, or expression, as one empty hole."""
    return re.sub("(«»)+", "«»", re.sub("«[^»]*»", "«»", text)).rstrip(" .")


def _codes(
    node: ast.AST, function: ast.AST, call: ast.Call | None
) -> Iterator[tuple[ast.Constant, ast.AST, ast.Call | None]]:
    """Each code below `node` that is no docstring, with its function and the call it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            if CODE.fullmatch(child.value):
                yield child, function, call
        elif isinstance(child, ast.FunctionDef):
            yield from _codes(child, child, None)
        else:
            yield from _codes(child, function, child if isinstance(child, ast.Call) else call)


def _exit_code(call: ast.Call | None) -> int | None:
    method = call.func if call else None
    if isinstance(method, ast.Attribute) and method.attr == "at":
        kind = getattr(errors, getattr(method.value, "id", ""), None)
        return getattr(kind, "exit_code", None)
    return None


def _templates(node: ast.AST, *, deep: bool) -> Iterator[str]:
    """The texts in `node`; of a module's statements (not `deep`) those of assignments alone."""
    if not deep and not isinstance(node, ast.Assign | ast.AnnAssign):
        return
    for each in ast.walk(node):
        if isinstance(each, ast.Constant | ast.JoinedStr | ast.BinOp) and _is_text(each):
            yield pattern(_template(each))


def _is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and (_is_text(node.left) or _is_text(node.right))
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


def _template(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_template, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return "«»"
