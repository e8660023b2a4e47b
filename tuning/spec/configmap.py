"""The ConfigMap that `tuning.config` names, and its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuning.errors import SpecError
from tuning.spec import assignments, builder, config, documents, places, rules
from tuning.spec.assignments import Assignment
from tuning.spec.documents import Document
from tuning.spec.findings import Findings, shown
from tuning.spec.values import Method, Settings

# KAITO's own ConfigMaps: all defaults; they need not be in the file.
TEMPLATES: dict[str, Method] = {"lora-params-template": "lora", "qlora-params-template": "qlora"}
_TEXT = ("data", config.FILE)


@dataclass(frozen=True)
class ConfigMap:
    """The ConfigMap, if the file has it, with its settings and findings."""

    settings: Settings = Settings()  # noqa: RUF009 it is frozen
    document: Document | None = None
    content: Any = None  # what training_config.yaml holds
    assigned: bool = False  # the command line set keys of it
    findings: tuple[Findings, ...] = ()

    def located(self, beside: Path | None) -> ConfigMap:
        """The ConfigMap with the place of its start adapter; see `places.start_adapter`."""
        if (named := self.settings.start_adapter) is None:
            return self
        path = (config.ROOT, "ModelConfig", "start_adapter")
        found = places.start_adapter(named, beside, self.findings[-1], path)
        return replace(self, settings=replace(self.settings, start_adapter=found))


def read(
    everything: list[Document],
    workspace: Document,
    *,
    origin: str,
    assigned: list[Assignment],
    read_template: Callable[[str], str | None],
) -> ConfigMap:
    """The ConfigMap that `tuning.config` of `workspace` names, among all documents of the file,
    with what the command line `assigned`; one of its own where there is none."""
    name = workspace.at("tuning", "config")
    if assigned and (not name or name in TEMPLATES) and isinstance(workspace.at("tuning"), dict):
        name = f"{workspace.at('metadata', 'name')}-settings"
        workspace.value["tuning"]["config"] = name
        everything = [*everything, Document(builder.config_map(name, {}))]
    if not isinstance(name, str) or not name:
        return ConfigMap()
    named = workspace.at("tuning", "method")
    method = rules.method(named, Findings({})) if isinstance(named, str) else None
    document = _find(everything, workspace, name, method)
    if document is None:
        return ConfigMap()
    outer = document.findings
    outer.prefix = f"ConfigMap {shown(name)[1:-1]}: "
    text = _text(document, outer)
    if text is None:
        return ConfigMap(document=document, findings=(outer,))
    try:
        inside = documents.inner(text, document, _TEXT, origin=f"{origin} {outer.prefix}")
    except SpecError as error:
        outer.take(_TEXT, error)
        return ConfigMap(document=document, findings=(outer,))
    content = inside[0] if inside else Document()
    content.findings.prefix = outer.prefix
    assignments.apply(assigned, content)
    settings = config.read(
        content.value, content.findings, name=name, method=method, read_template=read_template
    )
    return ConfigMap(settings, document, content.value, bool(assigned), (outer, content.findings))


def _find(
    everything: list[Document], workspace: Document, name: str, method: Method | None
) -> Document | None:
    namespace = workspace.at("metadata", "namespace")
    named = [
        d
        for d in everything
        if d.at("kind") == "ConfigMap"
        and d.at("metadata", "name") == name
        and d.at("metadata", "namespace")
        in (None, namespace, namespace or d.at("metadata", "namespace"))
    ]
    findings, path = workspace.findings, ("tuning", "config")
    if len(named) == 1:
        return named[0]
    if named:
        findings.add("SPEC-103", path, f"two ConfigMaps are called {shown(name)}", "keep one")
    elif name not in TEMPLATES:
        where = namespace if isinstance(namespace, str) else "default"
        what = f"ConfigMap '{name[:253]}' specified in 'config' not found in namespace '{where}'"
        change = "put the ConfigMap into the same file, after a line ---, or remove config"
        findings.add("SPEC-117", path, what, change)
    elif conflict := config.contradiction(method, TEMPLATES[name] == "qlora", None, name):
        findings.add("SPEC-108", path, conflict[0], "remove config: the defaults suit the method")
    return None


def _text(document: Document, findings: Findings) -> str | None:
    data = document.at("data")
    content = data.get(config.FILE) if isinstance(data, dict) else None
    if isinstance(content, str):
        for other in sorted(data.keys() - {config.FILE}):
            findings.note(("data", other), "ignored; only training_config.yaml is read")
        return content
    if content is None:
        what = f"missing field(s): {config.FILE} in ConfigMap"
        findings.add("SPEC-112", _TEXT, what, f"add `{config.FILE}: |` below `data:`")
    else:
        change = f"write `{config.FILE}: |`, with the bar"
        findings.add("SPEC-113", _TEXT, f"is {shown(content)}, expected a string", change)
    return None
