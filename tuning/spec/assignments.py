"""`--set KEY=VALUE`: keys of the ConfigMap, from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from tuning.errors import SpecError
from tuning.spec import config, documents, keys
from tuning.spec.coercion import items_of
from tuning.spec.documents import Document
from tuning.spec.findings import Findings, did_you_mean, shorten, shown
from tuning.spec.keys import Key, same

# Written with commas: target_modules=q_proj,v_proj
LISTS = ("names", "numbers", "tokens", "trackers")
# Options of the command line that people take for keys
_OPTIONS = {
    "method": "--method",
    "instance": "--instance",
    "instance_type": "--instance",
    "output": "-o",
    **dict.fromkeys(("model", "base_model", "preset"), "MODEL, or --base-model beside -f FILE"),
    **dict.fromkeys(("data", "dataset", "datasets"), "DATA, or --data beside -f FILE"),
}


@dataclass(frozen=True)
class Assignment:
    """A key, its value as YAML reads it, and how the command line named the key."""

    key: Key
    value: Any
    written: str


def read(texts: tuple[str, ...], findings: Findings) -> list[Assignment]:
    """The assignments in `texts`; problems go to `findings`, under what was written."""
    assigned = []
    for i, text in enumerate(texts):
        name, equals, value = (part.strip() for part in text.partition("="))
        path = ("--set", i)
        findings.named[path] = f"--set {shorten(name)}"
        if not equals or not name:
            what = f"{shown(text)} is not KEY=VALUE"
            findings.add("SPEC-109", path, what, "write it as in --set learning_rate=1e-4")
        elif not value:
            what = "has no value (a variable of the shell that is not set gives none)"
            findings.add("SPEC-109", path, what, f"write a value, or {shorten(name)}=null for none")
        elif (key := _key(name, path, findings)) is not None:
            try:
                assigned.append(Assignment(key, _value(key, value), findings.named[path]))
                _refuse_second(assigned, path, findings)
            except SpecError:
                what = f"{shown(value)} is not a value"
                change = "write it as in YAML, in quotes where it has : or # or brackets"
                findings.add("SPEC-109", path, what, change)
    return assigned


def _refuse_second(assigned: list[Assignment], path: tuple[str, int], findings: Findings) -> None:
    """A finding if the last of `assigned` gives a key of another one another value."""
    *others, last = assigned
    if any(each.key == last.key and not same(each.value, last.value) for each in others):
        findings.add("SPEC-108", path, "is given twice, with two values", "keep one of the two")


def _key(name: str, path: tuple[str, int], findings: Findings) -> Key | None:
    """The key that `name` or SECTION.NAME means; of several sections, where it has most effect."""
    sections = keys.sections()
    section, _, bare = name.rpartition(".")
    if section and section not in sections:
        findings.add("SPEC-111", path, "unknown section", did_you_mean(section, sections))
        return None
    rows = [sections[section]] if section else list(sections.values())
    named = [each[bare] for each in rows if bare in each]
    if not named:
        option = _OPTIONS.get(bare.lower())
        change = f"give {option}" if option else config.nearest_key(section, bare)
        findings.add("SPEC-111", path, "unknown key", change)
        return None
    return min(named, key=lambda key: get_args(keys.Use).index(key.use))


def _value(key: Key, text: str) -> Any:
    inner = documents.read(f"value: {text}", origin="--set")[0]
    value = inner.at("value")
    if inner.findings.in_order() or inner.value.keys() != {"value"}:
        raise SpecError([])
    if key.type in LISTS and isinstance(value, str) and "," in value:
        return [each.strip() for each in items_of(value)]
    return value


def apply(assigned: list[Assignment], content: Document) -> None:
    """Write `assigned` into the sections of `content`, in the place of what sets the same.

    What two of them set otherwise stays a contradiction, as in a file.
    """
    root = content.at(config.ROOT)
    if not isinstance(root, dict):
        return  # a problem of the file, which is reported as such
    replaced = {each.key.setting for each in assigned} - {None}
    for section, before in root.items():
        known = keys.sections().get(section, {})
        for name in list(before) if isinstance(before, dict) else ():
            if name in known and known[name].setting in replaced:
                del before[name]
    for each in assigned:
        key, path = each.key, (config.ROOT, each.key.section, each.key.name)
        if not isinstance(rows := root.setdefault(key.section, {}) or {}, dict):
            continue  # likewise
        root[key.section] = rows | {key.name: each.value}
        content.findings.named[path] = each.written
        honoured = key.use in ("honoured", "translated") and each.value is not None
        if honoured and any(same(each.value, unset) for unset in key.unset):
            content.findings.note(path, f"{shown(each.value)} counts as not set: the plan decides")
