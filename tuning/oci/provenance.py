"""Run directory -> a provenance statement: its inputs, where and when it ran, what it used.

It has what an image's digest must not cover (times, machine, speed), as an in-toto Statement with
SLSA provenance as its predicate, and is attached to the image by its digest. URLs lose their
queries; prompts and answers are not in it.

Formats: in-toto Statement v1, SLSA Provenance v1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import tuning
from tuning import files
from tuning.errors import redact

MEDIA_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
EVALUATION = "https://tuning.kaito.sh/evaluation/v1"  # predicate: {"tasks"} of evaluation.json
PREDICATE_KEY = "in-toto.io/predicate-type"
FILE = "provenance.json"
MOST = 100  # tasks of an attached evaluation that are shown
_TRAINED = ("steps", "seconds", "tokens", "tokens_per_second", "peak_memory_bytes", "resumed_from")
_LOSSES = ("loss_first", "loss_last", "eval_loss_before", "eval_loss_after")
Value = dict[str, Any]


def write(run: Path, *, digest: str, name: str) -> bytes:
    """Write the statement for the image with this digest into the run directory `run`.

    What it is made of stays the same, so that repeating the command changes nothing. `name`: the
    image's repository, or the run's name.
    """
    new = statement(run, _subject(digest, name))
    files.write_json(run / FILE, new)
    return files.canonical(new)


def evaluation(record: Value, *, digest: str, name: str) -> bytes:
    """A statement of what was measured, from an `evaluation.json`; no question or answer in it."""
    return files.canonical(
        {
            "_type": STATEMENT,
            "subject": _subject(digest, name),
            "predicateType": EVALUATION,
            "predicate": {"tasks": record["tasks"]},
        }
    )


def measured(statement: bytes) -> list[Value]:
    """The tasks in an untrusted statement of `evaluation`; those that are not in its form are
    left out."""
    try:
        tasks = files.parse_json(statement)["predicate"]["tasks"]
        return [found for each in tasks[:MOST] if (found := _task(each))]
    except (ValueError, LookupError, TypeError, RecursionError):
        return []


def _task(each: Value) -> Value | None:
    try:
        models = {
            str(name): {
                part: None if value[part] is None else float(value[part])
                for part in ("value", "low", "high")
            }
            for name, value in each["models"].items()
        }
        names = {name: str(each[name]) for name in ("task", "metric")}
        samples = None if each["samples"] is None else int(each["samples"])
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return None
    complete = all(value["value"] is not None for value in models.values())
    return {**names, "samples": samples, "models": models} if complete else None


def _subject(digest: str, name: str) -> list[Value]:
    return [{"name": name, "digest": {"sha256": digest.removeprefix("sha256:")}}]


def statement(run: Path, subject: list[Value]) -> Value:
    """The statement about `subject`, from the run directory `run`."""
    plan = files.read_json(run / "plan.json")
    recipe = plan["recipe"]
    lines = (run / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    journal = [files.parse_json(line.encode()) for line in lines]
    trained = _last(journal, "train")
    return {
        "_type": STATEMENT,
        "subject": subject,
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": "https://tuning.kaito.sh/run/v1",
                "externalParameters": _inputs(run / "spec.yaml"),
                "internalParameters": {
                    "recipe": _clean(recipe),
                    "placement": plan["placement"],
                    "device": plan["device"],
                },
                "resolvedDependencies": [*_dependencies(recipe), *_datasets(run)],
            },
            "runDetails": {
                "builder": {
                    "id": "https://tuning.kaito.sh/engine",
                    "version": {"tuning": tuning.__version__, **recipe["versions"]},
                },
                "metadata": {
                    "invocationId": plan["run_id"],
                    "startedOn": _time(journal[0]["at"]),
                    "finishedOn": _time(_ended(journal, "package") or journal[-1]["at"]),
                },
                "tuning_planned": {**(plan.get("speed") or {}), "memory": plan.get("memory")},
                "tuning_measured": {
                    name: trained[name] for name in (*_TRAINED, *_LOSSES) if name in trained
                },
            },
        },
    }


def _inputs(path: Path) -> Value:
    """Workspace, ConfigMap and notes of the command line, URLs without queries."""
    text = path.read_text(encoding="utf-8")
    comments = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    documents = [each for each in yaml.safe_load_all(text) if each]
    return {"documents": _clean(documents), "notes": _clean(comments)}


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _clean(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def _dependencies(recipe: Value) -> list[Value]:
    kind, _, revision = str(recipe["base_revision"]).rpartition(":")
    name = recipe["base_model"]
    base: Value = {"uri": f"pkg:huggingface/{name}", "digest": {"gitCommit": revision}}
    if kind == "sha256":  # of the files in a folder or an image
        base = {"name": name, "digest": {"sha256": revision}}
    data = [{"name": "data", "digest": {"sha256": digest}} for digest in recipe["data"]]
    if going_on := recipe.get("start_adapter"):
        data.append({"name": "start adapter", "digest": {"sha256": going_on}})
    return [base, *data]


def _datasets(run: Path) -> list[Value]:
    """The datasets of the hub, as the adapter's `tuning.json` lists them."""
    written = run / "adapter" / "tuning.json"
    listed = files.read_json(written).get("datasets", []) if written.exists() else []
    return [
        {
            "uri": f"hf://datasets/{each['name']}@{each['revision']}",
            "name": f"config {each['config']}, split {'+'.join(each['splits'])}",
            "digest": {"gitCommit": each["revision"]},
        }
        for each in listed
    ]


def _last(journal: list[Value], phase: str) -> Value:
    """The phase's latest result."""
    ends = [r for r in journal if (r["phase"], r["event"]) == (phase, "end")]
    value: Value = ends[-1]["value"] if ends else {}
    return value


def _ended(journal: list[Value], phase: str) -> str | None:
    ends = [str(r["at"]) for r in journal if (r["phase"], r["event"]) == (phase, "end")]
    return ends[-1] if ends else None


def _time(text: str) -> str:
    """A time of the journal, which is in UTC, as RFC 3339 with Z."""
    return text.replace("+00:00", "Z")
