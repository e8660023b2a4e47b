"""A config of axolotl or LLaMA-Factory -> a Workspace and its settings.

What becomes of each key is data: `configs/imports/*.yaml`. Every key of the input that is set is
written, or noted with what becomes of it; what cannot be meant here stops the translation. The
order of its keys says nothing: they are taken in that of the table.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from tuning.errors import Problem, SpecError
from tuning.spec import assignments, builder, documents, fields, keys, mixture, reader, urls
from tuning.spec import places as places_
from tuning.spec.assignments import LISTS, Assignment
from tuning.spec.coercion import Invalid, coerce, items_of
from tuning.spec.documents import Document
from tuning.spec.findings import shown, spelled
from tuning.spec.keys import same
from tuning.spec.values import Overrides

PEERS = ("axolotl", "llamafactory")
_CODE = "SPEC-125"


@dataclass
class Translation:
    """What was read of a config so far."""

    model: str = ""
    method: str = ""
    data: list[str] = field(default_factory=list)
    settings: dict[str, Assignment] = field(default_factory=dict)  # SECTION.KEY -> its value
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, where: str, what: str, change: str) -> None:
        """Add a problem that stops the translation."""
        self.problems.append(Problem(_CODE, where, what, change))


def translate(
    path: Path, *, data: tuple[str, ...], output: str, beside: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """The documents for the config at `path`, and notes on what differs.

    `data` replaces the config's, places are seen from `beside`. Raises SpecError with all problems.
    """
    everything = documents.read(reader.read_file(path), origin=path.name)
    first = everything[0] if everything else Document({})
    value: dict[str, Any] = first.value if isinstance(first.value, dict) else {}
    table = _table_of(value, path.name)
    found = Translation(problems=first.findings.in_order())
    _translate_all({k: v for k, v in value.items() if k != table["data"]}, table["keys"], found)
    if data:
        found.data += data
        _replaced(value, table, found)
    else:
        found.data += _data(value, table, found, path.parent, beside)
    if not found.method:
        found.notes.append(table["without_method"])
    if not found.model:
        found.refuse(path.name, "names no base model", "add its base model, and import it again")
    if not found.data and not found.problems:
        found.refuse(path.name, "names no data", "give --data FILE, a URL or ORG/NAME")
    if found.problems:
        raise SpecError(found.problems)
    _see_from(beside, found)
    return _documents(found, output, beside), found.notes


def _table_of(value: dict[str, Any], origin: str) -> dict[str, Any]:
    for peer in PEERS:
        table: dict[str, Any] = keys.data(f"imports/{peer}.yaml")
        if all(value.get(each) is not None for each in table["recognised_by"]):
            return table
    what = "is no config of axolotl (base_model, datasets) or LLaMA-Factory (model_name_or_path)"
    raise SpecError.at(_CODE, origin, what, "name one of theirs; `tuning init` writes a new one")


def _translate_all(
    given: dict[Any, Any], rows: dict[str, Any], found: Translation, within: str = ""
) -> None:
    """Translate the keys in the order of the table: of two for one target, the later row counts."""
    unknown = sorted(map(str, given.keys() - rows.keys()))
    for name in [*(each for each in rows if each in given), *unknown]:
        _translate(within + name, given.get(name), rows.get(name), found)


def _translate(name: str, value: Any, row: dict[str, Any] | None, found: Translation) -> None:
    """Write the key `name` into `found`, or note what becomes of it."""
    if value is None or value in ("", [], {}):
        return
    if row is None:
        found.notes.append(f"{name}: is not known here, and left out")
        return
    if "drop" in row:
        found.notes.append(f"{name}: left out; {row['drop']}")
        return
    written = value
    if (values := row.get("values")) is not None:
        word = str(value).lower()
        if word in values:
            written = values[word]
        elif row.get("strict"):
            allowed = ", ".join(values)
            found.refuse(
                name, f"is {shown(value)}, which has no counterpart here", f"use {allowed}"
            )
            return
        elif "how" not in row:
            found.notes.append(f"{name}: {shown(value)} is left out; it has no counterpart here")
            return
    if "note" in row and value is not False:
        found.notes.append(f"{name}: {row['note']}")
    if written is None or "to" not in row:
        return
    match row["to"]:
        case "model":
            found.model = str(written)
        case "method":
            found.method = str(written)
        case target:
            _assign(name, target, _by(row.get("how"), written), found)
            for other, more in row.get("also", {}).items():
                _assign(name, other, more, found)


def _by(how: str | None, value: Any) -> Any:
    if how == "remainder":  # a share to hold out -> the share to train on
        return round(1 - value, 6) if isinstance(value, (int, float)) and value < 1 else None
    if how == "names":
        return [each.strip() for each in items_of(value) if isinstance(each, str)]
    return value


def _assign(name: str, target: str, value: Any, found: Translation) -> None:
    """Set SECTION.KEY, if its value is allowed; else a note."""
    section, _, bare = target.partition(".")
    key = keys.sections()[section][bare]
    if value is None:
        found.notes.append(f"{name}: left out; only a share of the rows, below 1, can be held out")
        return
    if any(same(value, each) for each in key.unset):
        found.notes.append(f"{name}: {target} {value} counts as not set: the plan decides")
        return
    try:
        if key.type not in ("parts", "trackers"):
            coerce(key, value)
    except Invalid as error:
        found.notes.append(f"{name}: left out; {target} {error.what} ({error.change})")
        return
    before = found.settings.get(target)
    if before is not None and key.type in LISTS:
        value = list(dict.fromkeys([*items_of(before.value), *items_of(value)]))
    elif before is not None and not same(before.value, value):
        other = f"not {shown(before.value)} by {before.written}"
        found.notes.append(f"{name}: {target} is {shown(value)} by it, {other}")
    found.settings[target] = Assignment(key, value, name)


def _data(
    value: dict[str, Any], table: dict[str, Any], found: Translation, folder: Path, beside: Path
) -> list[str]:
    """The places of the data: axolotl's list of datasets, or names in a dataset_info.json.

    Columns of single datasets become those of parts of a mixture, of all alike those of the data.
    """
    name = table["data"]
    named = value.get(name)
    if "datasets" not in table:
        return _listed_data(value, items_of(named) if named else [], found, folder)
    places: list[str] = []
    columns: list[dict[str, Any]] = []
    rows = table["datasets"]
    for i, each in enumerate(named if isinstance(named, list) else []):
        where = spelled((name, i))
        if not isinstance(each, dict) or not isinstance(each.get("path"), str):
            found.refuse(where, "has no path", "write `path:` with a file or ORG/NAME")
            continue
        place = _place(
            each["path"], each.get("name"), each.get("split"), each.get("revision"), found
        )
        places.append(places_.named_from(beside, place))
        own = Translation(notes=found.notes, problems=found.problems)
        rest = {key: inner for key, inner in each.items() if key not in rows}
        _translate_all(rest, rows["keys"], own, f"{where}.")
        columns.append({key: one.value for key, one in own.settings.items()})
    if all(each == columns[0] for each in columns):
        for target, column in columns[0].items() if columns else ():
            _assign(name, target, column, found)
    else:
        parts = [
            {"path": _pattern(place)} | {target.partition(".")[2]: each for target, each in own}
            for place, own in zip(places, map(dict.items, columns), strict=True)
        ]
        _assign(name, mixture.KEY, parts, found)
    return places


def _pattern(place: str) -> str:
    """What names the files of `place` in a mixture."""
    if "://" in place or not fields.is_here(place):
        return place
    return f"{Path(place)}/*" if fields.is_folder(place) else str(Path(place))


def _replaced(value: dict[str, Any], table: dict[str, Any], found: Translation) -> None:
    """A note that data of the command line replaces the config's."""
    if value.get(table["data"]):
        columns = ", columns too" if "datasets" in table else ""
        found.notes.append(f"{table['data']}: left out{columns}; --data is in its place")


def _listed_data(
    value: dict[str, Any], names: list[Any], found: Translation, folder: Path
) -> list[str]:
    """The files and datasets that LLaMA-Factory's dataset_info.json lists under `names`."""
    listed = folder / str(value.get("dataset_dir") or "data")
    info = listed / "dataset_info.json"
    try:
        known = json.loads(info.read_bytes()) if names else {}
    except (OSError, ValueError):
        known = {}
    places = []
    for each in (str(name).strip() for name in names):
        entry = known.get(each) if isinstance(known, dict) else None
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str):
            places.append(str((listed / entry["file_name"]).absolute()))
        elif isinstance(entry, dict) and isinstance(entry.get("hf_hub_url"), str):
            places.append(_place(entry["hf_hub_url"], entry.get("subset"), None, None, found))
        elif urls.dataset(f"hf://datasets/{each}"):
            places.append(each)
        else:
            what = f"{shown(each)} is not in {info}"
            found.refuse("dataset", what, "name the data with --data FILE, a URL or ORG/NAME")
    return places


def _place(path: str, config: Any, split: Any, revision: Any, found: Translation) -> str:
    """A dataset's URL with its config, split and revision; a file's path as it is."""
    at = f"@{revision}" if revision else ""
    if "://" in path or urls.dataset(f"hf://datasets/{path}{at}") is None:
        return path
    if isinstance(split, str) and "[" in split:
        found.notes.append(f"split {split}: all of its rows are used")
        split = split.partition("[")[0]
    chosen = {"config": config, "split": None if split == "train" else split}
    query = urlencode({k: str(v) for k, v in chosen.items() if v}, quote_via=quote, safe="+")
    url = f"hf://datasets/{path}{at}" + (f"?{query}" if query else "")
    return url if at or query else path


def _see_from(beside: Path, found: Translation) -> None:
    """Say what is a file or folder of this machine as the documents in `beside` have to."""
    found.model = places_.named_from(beside, found.model)
    found.data = [places_.named_from(beside, each) for each in found.data]
    for target in ("ModelConfig.start_adapter", "ModelConfig.chat_template"):
        if (given := found.settings.get(target)) is not None:
            value = places_.named_from(beside, str(given.value))
            found.settings[target] = replace(given, value=value)


def _documents(found: Translation, output: str, beside: Path) -> list[dict[str, Any]]:
    """The Workspace and its ConfigMap, after they were read as `plan` reads them."""
    workspace = builder.workspace(
        found.model, tuple(found.data), output, method=found.method or "lora"
    )
    written = [workspace]
    assigned = list(found.settings.values())
    if assigned:
        content = Document({"training_config": {}})
        assignments.apply(assigned, content)
        name = workspace["tuning"]["config"] = f"{workspace['metadata']['name']}-settings"
        written.append(builder.config_map(name, content.value["training_config"]))
    read = reader.read(copy.deepcopy(written), beside=beside, overrides=Overrides())
    found.notes += [note for note in read.notes if note not in found.notes]
    return written
