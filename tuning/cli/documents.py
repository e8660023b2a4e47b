"""The commands that write or describe a Workspace YAML: init, import, schema."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tuning.cli import options as option
from tuning.cli import words
from tuning.cli.app import app
from tuning.errors import TuningError, UsageError, printable

WrittenFile = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="File to write.")]
_WHERE = "oci:DIR, dir:DIR, hf://ORG/NAME or an image in a registry."
_PLACES = {
    "tuning.preset.name": "--model",
    "tuning.input": "--data",
    "tuning.method": "--method",
    "tuning.output.image": "--where",
}
_PUSH = (
    "imagePushSecret is the Secret with the registry's login on a cluster: write its name. Here, "
    "docker's own login or --push-secret FILE is used."
)
_CLUSTER = (
    "To run it on a cluster: data and output must be in places that a Job sees (https://, s3://, "
    "gs://, az://, hf://, or a volumeSource; an image in a registry)."
)


@app.command()
def init(
    file: WrittenFile = Path("workspace.yaml"),
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Preset, org/model of the hub, or folder."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="DATA", help="File, URL, folder, or ORG/NAME; repeatable."),
    ] = None,
    where: Annotated[str | None, typer.Option(metavar="WHERE", help=_WHERE)] = None,
    method: option.TuningMethod = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; take the defaults.")] = False,
) -> None:
    """Ask for model, data and output, look at the machine, and write a Workspace YAML."""
    from tuning import presets
    from tuning import spec as specs
    from tuning.plan import device
    from tuning.spec import builder, fields, places, reader, writer

    def workspace(model: str, data: Sequence[str], where: str = "oci:adapter") -> dict[str, Any]:
        """The document; raises SpecError where it could not be read."""
        named, *rows = (places.named_from(file.parent, each) for each in (model, *data))
        value = builder.workspace(named, tuple(rows), where, method=chosen)
        read = json.loads(json.dumps(value))
        reader.read([read], beside=file.parent, overrides=specs.Overrides())
        if not fields.is_here(model):
            presets.find(model, where="--model")
        return value

    words.options(_PLACES)
    _check_free(file)
    here = device.detect()
    chosen = method or ("qlora" if here.kind == "cuda" else "lora")
    some = data or ["https://data.example/rows.jsonl"]
    if model is None:
        asked = "Model (preset, org/model or folder)"
        model = _answer(asked, "--model", None, yes, lambda given: workspace(given, some))
    elif data is None:
        workspace(model, some)  # before the next question
    named = places.named_from(file.parent, model)
    if data is None:
        asked = "Data (file, URL, folder or ORG/NAME)"
        data = [_answer(asked, "--data", None, yes, lambda given: workspace(named, [given]))]
    data = [places.named_from(file.parent, each) for each in data]
    default = f"oci:{builder.name_of(named, tuple(data)).rpartition('-')[0]}-adapter"
    asked = f"Where to put the adapter ({_WHERE[:-1]})"
    where = where or _answer(asked, "--where", default, yes, _check_where)
    _check_where(where)
    value = workspace(named, data, where)
    comments = [
        "Which model, which data, where to push: see docs/config-keys.md for what can be set.",
        f"What would be done on this machine, and why: tuning plan -f {file}",
        f"To do it, and to go on where it stopped: tuning run -f {file}",
        f"This machine: {here}.",
        *([] if method else [_why(chosen)]),
        *([_PUSH] if "imagePushSecret" in value["tuning"]["output"] else []),
        "Local folders and files are seen from this file's folder.",
        _CLUSTER,
    ]
    _write(file, writer.text([value], comments))


def _why(method: str) -> str:
    if method == "qlora":
        return "method qlora: a 4-bit base, which takes a quarter of the memory; or lora: 16 bits."
    return "method lora: a 16-bit base; or qlora: 4 bits, which takes a quarter of the memory."


def _answer(
    question: str, flag: str, default: str | None, yes: bool, check: Callable[[str], object]
) -> str:
    """What the user answers, asked again until `check` raises no TuningError.

    Without a terminal, or with --yes, the default. Raises UsageError.
    """

    def checked(given: str) -> str:
        try:
            check(given)
        except TuningError as error:
            raise typer.BadParameter(str(words.told(error))) from None
        return given

    if not yes and sys.stdin.isatty():
        return str(typer.prompt(question, default=default, err=True, value_proc=checked))
    if default is None:
        what = "is not given, and there is nobody to ask"
        raise UsageError.at("USE-106", flag, what, f"give {flag}, or use a terminal without --yes")
    return default


@app.command("import")
def import_(
    config: Annotated[Path, typer.Argument(help="Config of axolotl or LLaMA-Factory.")],
    file: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="File to write [default: stdout]."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="DATA", help="Data instead of the config's; repeatable."),
    ] = None,
    where: Annotated[
        str | None, typer.Option(metavar="WHERE", help=f"{_WHERE[:-1]} [default: oci:adapter].")
    ] = None,
) -> None:
    """Translate a config of axolotl or LLaMA-Factory, with notes on what differs."""
    from tuning.spec import imports, writer

    if file is not None:
        _check_free(file)
    if where is not None:
        _check_where(where)
    beside = file.parent if file else Path()
    documents, notes = imports.translate(
        config, data=tuple(data or ()), output=where or "oci:adapter", beside=beside
    )
    for note in notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    head = [f"Translated from {config.name} by `tuning import`.", *map(printable, notes), _CLUSTER]
    text = writer.text(documents, head)
    if file is None:
        print(text, end="")
    else:
        _write(file, text)


def _check_where(where: str) -> None:
    """Raise SpecError for what is no place of an adapter."""
    from tuning.errors import SpecError
    from tuning.spec import fields
    from tuning.spec.findings import Findings

    findings = Findings({})
    fields.check_output(where, ("--where",), findings)
    if problems := findings.in_order():
        raise SpecError(problems)


def _check_free(file: Path) -> None:
    if str(file).startswith(("oci:", "dir:", "hf:")):  # `run -o` means those
        what, change = "is a place for the adapter, not a file", "give it with --where"
        raise UsageError.at("USE-107", str(file), what, change)
    if file.exists():
        what, change = "exists already, and is not overwritten", "give another name with -o"
        raise UsageError.at("USE-107", str(file), what, change)


def _write(file: Path, text: str) -> None:
    from tuning import files

    try:
        files.write(file, text)
    except OSError as error:
        what = f"cannot be written: {(error.strerror or 'refused').lower()}"
        raise UsageError.at("USE-107", str(file), what, "give a file in another folder") from None
    print(file)
    print(f"next: tuning plan -f {file}", file=sys.stderr)


@app.command()
def schema(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="workspace, config or plan.")
    ] = "workspace",
) -> None:
    """Print a JSON schema: of a Workspace YAML, of its settings, or of `plan --json`."""
    from tuning import spec as specs
    from tuning.cli import tables
    from tuning.spec import keys
    from tuning.spec.schema import config_schema

    schemas: dict[str, Any] = {
        "workspace": specs.json_schema,
        "config": config_schema,
        "plan": lambda: keys.data("plan.schema.json"),
    }
    if name not in schemas:
        what, change = "is no schema", f"name {', '.join(schemas)}"
        raise UsageError.at("USE-108", name, what, change)
    tables.print_json(schemas[name]())
