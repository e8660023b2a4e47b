"""Parts of the report that list: settings with reasons, commands for the adapter, what happened."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from tuning.pipeline import model_card
from tuning.pipeline.report.markup import section, table, text
from tuning.pipeline.report.record import Record, Value

MODULE = ["python", "-m", "tuning"]


def settings(record: Record) -> str:
    """Each decided value with its reason, and the rest of the recipe."""
    values = record.recipe | (record.plan.get("placement") or {})
    reasons = record.plan.get("reasons") or {}
    shown = {name: _shown(name, value) for name, value in values.items()}
    chosen = ((_spaced(name), shown.get(name), why) for name, why in reasons.items())
    rest = [(_spaced(name), value) for name, value in shown.items() if name not in reasons]
    more = table(("", ""), rest, kind="facts")
    folded = f"<details><summary>All other values</summary>{more}</details>\n" if rest else ""
    return section("Settings", table(("setting", "value", "why"), chosen, kind="wide"), folded)


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _shown(name: str, value: Any) -> str:
    match value:
        case None:
            return {"objective": "sft", "targets": "all"}.get(name, "")
        case bool():
            return "yes" if value else "no"
        case dict():
            return ", ".join(f"{k} {_shown(k, v)}" for k, v in value.items())
        case list():
            return ", ".join(_shown(name, each) for each in value)
        case float():
            return f"{value:g}"
        case int():
            return f"{value:,}"
        case _:
            return str(value)


def commands(record: Record) -> str:
    """The adapter's digest, and how to fetch, serve and try it."""
    built, pushed = record.value("package").get("digest"), record.value("push")
    if not built or not record.value("train"):
        return ""
    facts = [("image digest", built), ("run id", record.plan.get("run_id"))]
    facts += [("delivered to", where) for where in _places(pushed)]
    lines = "".join(
        f"<dt>{text(title)}</dt><dd><pre>{text(shlex.join(words))}</pre></dd>"
        for title, words in _commands(record, built, pushed)
    )
    return section("Use it", table(("", ""), facts, kind="facts"), f"<dl>{lines}</dl>\n")


def _places(pushed: Value) -> list[str]:
    folder = pushed.get("folder")
    return [*pushed.get("references", ()), *([f"dir:{folder}"] if folder else [])]


def _commands(record: Record, digest: str, pushed: Value) -> Iterator[tuple[str, list[str]]]:
    """What each command is for, and its words."""
    references = pushed.get("references") or []
    images = [each for each in references if not each.startswith("hf://")]
    plain = ["--insecure"] if pushed.get("insecure") else []
    folder = pushed.get("folder")
    if images:
        adapter = _by_digest(images[0], digest)
        yield "Pull it", [*MODULE, "pull", adapter, "adapter", *plain]
    elif folder:
        adapter, plain = folder, []
    elif references:
        name, _, revision = references[0].removeprefix("hf://").partition("@")
        which = ["--revision", revision] if revision else []
        adapter, plain = "./adapter", []
        yield "Download it", ["hf", "download", name, *which, "--local-dir", adapter]
    else:
        adapter, plain = f"oci:{record.folder.absolute() / 'image'}", []
        yield "Unpack it", [*MODULE, "pull", adapter, "adapter"]
    revision = record.recipe.get("base_revision", ":")
    pinned = [] if ":" in revision else ["--base-revision", revision]
    yield (
        "Serve it, OpenAI's API and a page",
        [
            *(*MODULE, "serve", "--base", record.base, *pinned),
            *("--adapter", f"adapter={adapter}", *plain),
        ],
    )
    yield (
        "Talk to it beside its base",
        [*(*MODULE, "chat", "--base", record.base, "--adapter", adapter, "--compare", *plain)],
    )


def _by_digest(reference: str, digest: str) -> str:
    """The reference of the very image: of a registry by its digest; a layout holds one image."""
    if reference.startswith("oci:"):
        return reference
    name = reference.partition("@")[0]
    path, slash, last = name.rpartition("/")
    return f"{path}{slash}{last.partition(':')[0]}@{digest}"


def events(record: Record) -> str:
    """What happened beside the plan: starts, failures, fallbacks, skipped rows, warnings."""
    rows = []
    for number, each in enumerate(record.journal):
        for what in _told(each, first=number == 0):
            rows.append((each["at"][:19].replace("T", " "), each["phase"], what))
    return section("What happened", table(("time (UTC)", "phase", "event"), rows, kind="wide"))


def _told(record: Value, *, first: bool) -> Iterator[str]:
    """What a record of the journal means to a reader; nothing for an ordinary one."""
    match record["event"]:
        case "begin":
            yield "started" if first else "started again"
        case "note":
            yield str(record.get("text"))
        case "oom":
            yield f"out of memory with {record.get('way')}: goes on with a smaller placement"
        case "killed":
            yield f"tried again: {record.get('message')}"
        case "lost":
            yield f"waited for another machine: {record.get('message')}"
        case "damaged":
            yield f"{record.get('path')} was damaged and is made again"
        case "fail":
            yield f"ended with exit code {record.get('code')}: {record.get('message')}"
        case "end":
            yield from _results(record["phase"], record["value"])


def _results(phase: str, value: Value) -> Iterator[str]:
    """What is worth telling of a phase's result."""
    if phase in ("tokenise", "pack"):
        for why, count in (value.get("dropped") or {}).items():
            yield f"{count:,} rows were left out: {why}"
        over = value.get("over_length") or {}
        if over.get("rows"):
            ways = ", ".join(
                f"{over[n]:,} {n}" for n in ("truncated", "split", "dropped") if over[n]
            )
            yield f"{over['rows']:,} rows were too long: {ways}"
    if phase == "train" and (stopped := value.get("stopped")):
        yield f"stopped early {model_card.stopped_text(stopped, value['steps'])}"
    if phase == "finish":
        yield "finished"
