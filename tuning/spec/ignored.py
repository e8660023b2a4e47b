"""Fields of a valid Workspace without effect: those of KAITO, and those for another case."""

from __future__ import annotations

from collections.abc import Iterator

from tuning.spec.findings import Path, shorten
from tuning.spec.workspace import RESERVED_LABELS, DataSource, LabelSelector, Preset, Workspace

_KAITO = "kaito.sh/"  # prefix of KAITO's annotations
_SERVING = ("kaito.sh/enablelb", "kaito.sh/runtime")  # those that the operator reads


def ignored(workspace: Workspace) -> Iterator[tuple[Path, str]]:
    """Path and explanation of each."""
    for name in workspace.metadata.annotations or {}:
        path = ("metadata", "annotations", name)
        if name in _SERVING and workspace.inference is None:
            yield path, "has no effect without inference"
        elif name.startswith(_KAITO) and name not in _SERVING:
            yield path, "has no effect here; the administrator's options decide about nodes"
    if workspace.resource and workspace.resource.label_selector:
        yield from _reserved_labels(workspace.resource.label_selector)
    tuning, inference = workspace.tuning, workspace.inference
    if tuning:
        yield from _preset(tuning.preset, ("tuning", "preset"))
        if tuning.input:
            yield from _pull_secrets(tuning.input, ("tuning", "input"))
        if tuning.output and tuning.output.image_push_secret and not tuning.output.image:
            yield ("tuning", "output", "imagePushSecret"), "has no effect without image"
    if inference:
        if inference.preset:
            yield from _preset(inference.preset, ("inference", "preset"))
        for i, adapter in enumerate(inference.adapters or []):
            if adapter.source:
                yield from _pull_secrets(adapter.source, ("inference", "adapters", i, "source"))


def _reserved_labels(selector: LabelSelector) -> Iterator[tuple[Path, str]]:
    path = ("resource", "labelSelector")
    keys = [*(selector.match_labels or {}), *(e.key for e in selector.match_expressions or [])]
    for key in keys:
        if key.startswith(RESERVED_LABELS):
            yield path, f"{shorten(key)} is reserved, and does not choose a node"


def _preset(preset: Preset, path: Path) -> Iterator[tuple[Path, str]]:
    options = preset.preset_options
    if (options and (options.image or options.image_pull_secrets)) or (
        preset.access_mode == "private"
    ):
        yield path, "accessMode, image and imagePullSecrets are ignored; weights come from the hub"


def _pull_secrets(source: DataSource, path: Path) -> Iterator[tuple[Path, str]]:
    if source.image_pull_secrets and not source.image:
        yield (*path, "imagePullSecrets"), "has no effect without image"
