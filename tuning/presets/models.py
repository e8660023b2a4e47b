"""Base models known by name: hub id, revision, licence and shape."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tuning.errors import SpecError
from tuning.presets.architecture import Facts
from tuning.presets.config import facts
from tuning.presets.load import CONFIGS, entries, record, table

_CHOICES = "a name that `python -m tuning presets` lists"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.A)


@dataclass(frozen=True)
class Preset:
    """One base model of `configs/presets`, pinned to a commit of the hub."""

    name: str
    family: str  # the file of `configs/presets` that it is in
    hub_id: str
    revision: str  # commit, 40 hexadecimal digits
    licence: str
    gated: bool  # the hub requires a token of an account that accepted the licence
    published: int | None  # parameters in the files of the hub, as it counts them
    unread: int  # those of them that transformers' class leaves out
    aliases: tuple[str, ...]
    image: str | None  # oci://REFERENCE with the weights, in place of the hub
    config: dict[str, Any] = field(hash=False)  # what its config.json says of the shape
    facts: Facts


@cache
def all() -> tuple[Preset, ...]:
    """Every preset, by file and then as the file orders them."""
    return tuple(_preset(value, where=f"configs/presets: {value['name']}") for value in entries())


def find(name: str, *, where: str = "tuning.preset.name") -> Preset | None:
    """The preset of this name, alias or hub id, in any case.

    None for any other `org/model`, which may exist on the hub. Raises SpecError for other names,
    with the nearest one; `where` is the place that the error names.
    """
    key = name.strip().lower()
    by_name = _by_name()
    if key in by_name:
        return by_name[key]
    if reason := _not_offered().get(key):
        raise SpecError.at(
            "SPEC-303", where, f'"{name}" {reason}; no job here can tune it', f"use {_CHOICES}"
        )
    if _HUB_ID.fullmatch(name.strip()) and ".." not in name:
        return None
    raise SpecError.at(
        "SPEC-302",
        where,
        f'Unsupported tuning preset name "{name}"',
        f"{nearest(key, by_name)}use {_CHOICES}; or an org/model of the hub, or a folder",
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean "x" or "y"? Or ` for the nearest known names; empty if none is near."""
    spelled = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), spelled, n=2, cutoff=0.6)
    names = " or ".join(f'"{spelled[one]}"' for one in near)
    return f"did you mean {names}? Or " if near else ""


@cache
def _by_name() -> dict[str, Preset]:
    return {
        key.lower(): preset
        for preset in all()
        for key in (preset.name, preset.hub_id, *preset.aliases)
    }


@cache
def _not_offered() -> dict[str, str]:
    return dict(table(CONFIGS / "not_offered.yaml"))


def _preset(value: Any, *, where: str) -> Preset:
    fields = record(
        value,
        where=where,
        required={
            "name": str,
            "family": str,
            "hub_id": str,
            "revision": str,
            "licence": str,
            "config": dict,
        },
        optional={
            "gated": bool,
            "published": int,
            "unread": int,
            "aliases": list,
            "image": str,
        },
    )
    shape = facts(fields["config"])
    if shape is None:
        what = f"has model_type {fields['config']['model_type']}, and nobody has counted it"
        change = f"run `python -m tuning.training.simulate --write {fields['name']}`"
        raise SpecError.at("SPEC-301", where, what, change)
    fields["gated"], fields["unread"] = bool(fields["gated"]), fields["unread"] or 0
    fields["aliases"] = tuple(fields["aliases"] or ())
    return Preset(**fields, facts=shape)
