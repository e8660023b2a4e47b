"""A file -> Spec."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from tuning.errors import Problem, SpecError
from tuning.spec import assignments, builder, configmap, documents, places, rules, shape, writer
from tuning.spec.configmap import ConfigMap
from tuning.spec.documents import Document
from tuning.spec.findings import Findings, nearest, shown
from tuning.spec.values import Destination, Overrides, Source, Spec
from tuning.spec.workspace import ANNOTATION, Workspace

_NO_OVERRIDES = Overrides()


def load(path: Path, *, overrides: Overrides = _NO_OVERRIDES) -> Spec:
    """The Workspace in the file at `path`, with its ConfigMap and the command line's overrides.

    Raises SpecError with all problems of the file.
    """
    everything = documents.read(read_file(path), origin=path.name)
    return _read(everything, path.name, overrides, path.parent)


def from_command_line(
    model: str,
    data: tuple[str, ...],
    *,
    overrides: Overrides,
    needs_data: bool = True,
) -> Spec:
    """The Workspace of a command line without a file: `tuning run MODEL DATA --output WHERE`.

    Paths are seen from the working directory. Without an output, the image stays in the run
    directory. Raises SpecError with all problems.
    """
    output = overrides.output
    own = f"oci:{Path('runs') / builder.name_of(model, data) / 'image'}"  # until a run names it
    value = builder.workspace(
        model, data, own if output is None else output, method=overrides.method or "lora"
    )
    document = Document(value)
    named = document.findings.named
    named["tuning", "preset", "name"] = "MODEL"
    for i in range(len(data)):
        named["tuning", "input", "urls", i] = "DATA" if len(data) == 1 else f"DATA {i + 1}"
    spec = _read([document], "the command line", overrides, Path(), needs_data=needs_data)
    return replace(spec, destination=Destination()) if output is None else spec


def read_file(path: Path) -> str:
    """The text of the file at `path`, or of the standard input for `-`. Raises SpecError."""
    try:
        return _read_text(path)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise SpecError([_unreadable(path, error)]) from None


def parse(
    text: str,
    *,
    origin: str,
    overrides: Overrides = _NO_OVERRIDES,
    max_nodes: int = documents.MAX_NODES,
) -> Spec:
    """The Workspace in `text`; `origin` names it in errors. No file is read.

    Raises SpecError with all problems of the text.
    """
    everything = documents.read(text, origin=origin, max_nodes=max_nodes)
    return _read(everything, origin, overrides, None)


def parse_workspace(text: str, *, origin: str, max_nodes: int = documents.MAX_NODES) -> Workspace:
    """The Workspace in `text` as it is written, with tuning, inference or both.

    Raises SpecError with all problems of the text.
    """
    everything = documents.read(text, origin=origin, max_nodes=max_nodes)
    document = _the_workspace(everything, origin)
    workspace = shape.read(document)
    if workspace:
        rules.check(workspace, document.findings, own_input=False, own_output=False, allow_hosts=())
    problems = list(document.findings.in_order())
    if workspace is None or problems:
        raise SpecError(problems)
    return workspace


def _read(
    everything: list[Document],
    origin: str,
    overrides: Overrides,
    beside: Path | None,
    *,
    needs_data: bool = True,
) -> Spec:
    """`beside` is the folder from which places of this machine are seen; None: not on it."""
    document = _the_workspace(everything, origin)
    findings = document.findings
    command_line = Findings({})
    places.check(overrides, command_line)
    assigned = assignments.read(overrides.set, command_line)
    if beside is not None:
        places.localise(document, beside)
    if overrides.method is not None:
        _replace_method(document, overrides.method)
    workspace = shape.read(document)
    if workspace:
        rules.check(
            workspace,
            findings,
            own_input=bool(overrides.data) or not (needs_data or document.at("tuning", "input")),
            own_output=overrides.output is not None,
            allow_hosts=overrides.allow_hosts,
            here=beside is not None,
        )
    config = configmap.read(
        everything,
        document,
        origin=origin,
        assigned=assigned,
        read_template=lambda name: _read_beside(beside, name),
    )
    config = config.located(beside)
    problems = [p for each in (command_line, findings, *config.findings) for p in each.in_order()]
    if workspace is None or problems:
        raise SpecError(problems)
    if workspace.tuning is None:
        what = 'the Workspace has no "tuning", so there is nothing to tune'
        change = 'add "tuning" with preset, method, input and output'
        raise SpecError.at("SPEC-112", origin, what, change)
    notes = _notes_on_others([d for d in everything if d not in (document, config.document)])
    notes += [n for each in (command_line, findings, *config.findings) for n in each.notes]
    return _spec(workspace, document, config, overrides, notes)


def read(values: list[dict[str, Any]], *, beside: Path, overrides: Overrides) -> Spec:
    """The Workspace among the documents `values`, which a command made. Raises SpecError."""
    return _read([Document(value) for value in values], "the file", overrides, beside)


def _replace_method(document: Document, method: str) -> None:
    """Write --method into the Workspace, without KAITO's template for another method."""
    tuning = document.at("tuning")
    if isinstance(tuning, dict):
        tuning["method"] = method
        document.findings.named["tuning", "method"] = "--method"
        if configmap.TEMPLATES.get(str(tuning.get("config")), method) != method.lower():
            del tuning["config"]


def _the_workspace(everything: list[Document], origin: str) -> Document:
    workspaces = [d for d in everything if d.at("kind") == "Workspace"]
    if len(workspaces) == 1:
        return workspaces[0]
    if workspaces:
        lines = " and ".join(str(d.lines.get((), 0)) for d in workspaces)
        _refuse_file(
            origin, f"holds {len(workspaces)} Workspaces, in lines {lines}", "keep one a file"
        )
    close = [d for d in everything if _could_be_meant(d, alone=len(everything) == 1)]
    if len(close) == 1:
        return close[0]  # the models report what is wrong with it
    kinds = [str(d.at("kind") or "no kind") for d in everything]
    holds = f"holds {', '.join(map(shown, kinds))}" if kinds else "is empty"
    change = "write a document with apiVersion: kaito.sh/v1beta1 and kind: Workspace"
    _refuse_file(origin, f"{holds}, but no Workspace", change)


def _could_be_meant(document: Document, *, alone: bool) -> bool:
    """Whether the author may have meant `document` as a Workspace."""
    kind, version = document.at("kind"), document.at("apiVersion")
    if not isinstance(kind, str):
        return alone and isinstance(document.value, dict)
    ours = isinstance(version, str) and version.startswith("kaito.sh/")
    return kind not in ("ConfigMap", "Secret") and (ours or bool(nearest(kind, ["Workspace"])))


def _refuse_file(origin: str, what: str, change: str) -> NoReturn:
    raise SpecError.at("SPEC-103", origin, what, change)


def _notes_on_others(others: list[Document]) -> list[str]:
    """A note for each other document of the file, which has no effect."""
    notes = []
    for each in others:
        kind, name = each.at("kind"), each.at("metadata", "name")
        if kind == "Secret":
            notes.append("Secret: not read; a local run takes logins from --push-secret FILE")
        elif kind == "ConfigMap":
            notes.append(f"ConfigMap {shown(name)}: ignored, tuning.config does not name it")
        else:
            notes.append(f"document of kind {shown(kind)}: ignored")
    return notes


def _read_text(path: Path) -> str:
    """The text of a file. Raises SpecError if it is too large."""
    stdin = contextlib.nullcontext(sys.stdin.buffer)
    with stdin if str(path) == "-" else path.open("rb") as file:
        data = file.read(documents.MAX_BYTES + 1)
    if len(data) > documents.MAX_BYTES:
        raise documents.too_large(path.name)
    return data.decode()


def _read_beside(folder: Path | None, name: str) -> str | None:
    """The text of a chat template, relative to the folder of the YAML; None if unreadable."""
    if folder is None:
        return None
    try:
        return _read_text(folder / name)
    except (OSError, UnicodeDecodeError, ValueError, SpecError):
        return None


def _unreadable(path: Path, error: Exception) -> Problem:
    if isinstance(error, FileNotFoundError):
        return Problem("SPEC-101", str(path), "no such file", "check the path after -f")
    if isinstance(error, OSError):
        what = (error.strerror or "cannot be read").lower()
        return Problem(
            "SPEC-101", str(path), f"cannot be read: {what}", "give a YAML file after -f"
        )
    return Problem("SPEC-102", str(path), "is not UTF-8", "save it as UTF-8")


def _spec(
    workspace: Workspace,
    document: Document,
    config: ConfigMap,
    overrides: Overrides,
    notes: list[str],
) -> Spec:
    tuning = workspace.tuning
    assert tuning is not None
    method = rules.method(tuning.method, document.findings)
    assert method is not None
    options = tuning.preset.preset_options
    annotations = workspace.metadata.annotations or {}
    cluster_notes = tuple(notes)
    if workspace.inference:
        notes.append("inference: ignored by a tuning run")
    if overrides.data:
        source = places.source_of(overrides.data)
    else:
        source = places.source(tuning.input, notes) if tuning.input else Source()
    if source.folder or not overrides.data:
        source = replace(
            source, within=config.settings.dataset_path, ending=config.settings.dataset_extension
        )
    evaluate = tuple(filter(None, annotations.get(f"{ANNOTATION}evaluate", "").split(",")))
    source = replace(source, apart=tuple(n for n in evaluate if n.endswith((".jsonl", ".json"))))
    destination = places.destination(
        tuning.output, overrides.output, notes, annotations, workspace.status
    )
    preset, own_model = places.own_base(tuning.preset.name)
    gpus = annotations.get(f"{ANNOTATION}gpus")
    yaml_instance = workspace.resource.instance_type if workspace.resource else None
    return Spec(
        name=workspace.metadata.name,
        preset=preset,
        method=method,
        source=source,
        destination=destination,
        base_model=overrides.base_model or own_model,
        instance=overrides.instance or yaml_instance,
        nodes=workspace.resource.count if workspace.resource else 1,
        gpus=int(gpus) if gpus is not None else None,
        namespace=workspace.metadata.namespace,
        hub_secret=options.model_access_secret if options else None,
        data_secret=annotations.get(f"{ANNOTATION}data-secret"),
        tracker_secret=annotations.get(f"{ANNOTATION}tracker-secret"),
        evaluate=evaluate,
        settings=config.settings,
        notes=tuple(notes),
        cluster_notes=cluster_notes,
        document=writer.normalised(document.value, method),
        config=writer.normalised_config(config),
        overrides=overrides,
    )
