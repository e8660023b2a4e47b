"""Spec -> YAML in normal form, and the hash of what decides the adapter."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from tuning import files
from tuning.spec import config
from tuning.spec.configmap import ConfigMap
from tuning.spec.values import Method, Spec

_KUBECTL = "kubectl.kubernetes.io/last-applied-configuration"
_METADATA = ("name", "namespace", "labels", "annotations")  # the rest is the cluster's
_PLACES = {  # keys that name a file or a folder -> the setting that holds its text, or its place
    ("ModelConfig", "chat_template"): "chat_template",
    ("TrainingArguments", "chat_template_path"): "chat_template",
    ("ModelConfig", "start_adapter"): "start_adapter",
}


def dump(spec: Spec) -> str:
    """`spec` as a YAML file: the Workspace, and the ConfigMap if there is one.

    With the same overrides it reads back as the same spec. It holds no Secret, but the data URLs
    with their queries: write it where only the user can read it.
    """
    overrides = [f"{name}={value!r}" for name, value in asdict(spec.overrides).items() if value]
    head = [f"the command line also said: {', '.join(overrides)}"] if overrides else []
    return text([spec.document] if spec.config is None else [spec.document, spec.config], head)


def text(parts: list[dict[str, Any]], comments: list[str]) -> str:
    """A YAML file of the documents `parts`, after a head of comments."""
    head = "".join(f"# {' '.join(each.split())}\n" for each in comments)
    return head + yaml.dump_all(
        parts, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20
    )


def digest(spec: Spec) -> str:
    """sha256 of what in `spec` may decide the adapter: not its name, resource and output.

    The key of phases before the recipe is complete; from then on it is the recipe's hash.
    """
    decides = {
        "preset": spec.preset,
        "base_model": spec.base_model,
        "method": spec.method,
        "source": asdict(spec.source),
        "settings": asdict(spec.settings),
    }
    return files.digest(files.canonical(plain(decides)))


class _Dumper(yaml.SafeDumper):
    """Strings of several lines as block scalars, so that a ConfigMap stays readable."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def plain(value: Any) -> Any:
    """`value` with lists for tuples and text for paths, ready for canonical JSON."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def normalised(value: dict[str, Any], method: Method) -> dict[str, Any]:
    """The Workspace in a fixed order, without status and fields of the cluster."""
    metadata = {k: v for k, v in value["metadata"].items() if k in _METADATA}
    if _KUBECTL in metadata.get("annotations", {}):
        kept = {k: v for k, v in metadata["annotations"].items() if k != _KUBECTL}
        metadata["annotations"] = kept
    normal = {"apiVersion": value["apiVersion"], "kind": "Workspace", "metadata": metadata}
    normal |= {k: value[k] for k in ("resource", "tuning", "inference") if k in value}
    normal["tuning"] = value["tuning"] | {"method": method}
    return normal


def normalised_config(config_map: ConfigMap) -> dict[str, Any] | None:
    """The ConfigMap with the fields that are read; a template's file becomes its text, and a
    folder's name its whole path."""
    document = config_map.document
    if document is None:
        return None
    text, settings = document.at("data", config.FILE), config_map.settings
    named = settings.chat_template is not None or settings.start_adapter is not None
    if named or config_map.assigned:
        content = copy.deepcopy(config_map.content)
        sections = content[config.ROOT]
        for (section, name), setting in _PLACES.items():
            if (sections.get(section) or {}).get(name) is not None:
                sections[section][name] = getattr(settings, setting)
        text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    metadata = {k: document.at("metadata", k) for k in ("name", "namespace")}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {k: v for k, v in metadata.items() if v is not None},
        "data": {config.FILE: text},
    }
