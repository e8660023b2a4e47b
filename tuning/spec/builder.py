"""Documents that a command writes: a Workspace, and a ConfigMap for its settings."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import yaml

from tuning.spec import config, fields, urls

_LONGEST = 63  # characters of a DNS label


def workspace(model: str, data: tuple[str, ...], output: str, *, method: str) -> dict[str, Any]:
    """The Workspace that tunes `model` on `data` for `output`; without data, no input.

    An image gets the name of a Secret, which a local run does not read.
    """
    tuning: dict[str, Any] = {"preset": {"name": model}, "method": method}
    if data:
        tuning["input"] = {"urls": list(data)}
    tuning["output"] = {"image": output}
    if not fields.is_local_output(output):
        tuning["output"]["imagePushSecret"] = "registry-login"
    return {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": name_of(model, data)},
        "tuning": tuning,
    }


def config_map(name: str, sections: dict[str, Any]) -> dict[str, Any]:
    """The ConfigMap `name` with these sections."""
    text = yaml.safe_dump({config.ROOT: sections}, sort_keys=False, allow_unicode=True)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {config.FILE: text},
    }


def name_of(model: str, data: tuple[str, ...]) -> str:
    """A DNS label for a run: what model and data are called, and a hash of both in full.

    The same model and data have the same name, also after a change of settings or output.
    """
    places = [model, *(each if urls.of_data(each) else str(Path(each).absolute()) for each in data)]
    mark = hashlib.sha256("\0".join(places).encode()).hexdigest()[:6]
    words = "-".join(_label(each) for each in (model, *data[:1]))
    return f"{words[: _LONGEST - len(mark) - 1].strip('-') or 'run'}-{mark}"


def _label(place: str) -> str:
    """The last part of a path or a URL, without its ending, in small letters and digits."""
    last = re.split(r"[?#]", place)[0].rstrip("/").rpartition("/")[2]
    stem = re.sub(r"\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|zst)\b", "", last)
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40].strip("-")
