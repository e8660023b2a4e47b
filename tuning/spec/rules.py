"""Rules for a Workspace beyond the types of its fields, with KAITO's messages where it has them.

The same rules apply to a file, at admission and at each reconcile. Rules add to the findings: all
problems are reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from pydantic import BaseModel

from tuning.spec import adapters, fields, keys
from tuning.spec.findings import Findings, Path, did_you_mean, nearest, shown
from tuning.spec.ignored import ignored
from tuning.spec.values import Method
from tuning.spec.workspace import (
    ANNOTATION,
    LABEL,
    SUBDOMAIN,
    DataDestination,
    DataSource,
    Metadata,
    Resource,
    Workspace,
)


def check(
    workspace: Workspace,
    findings: Findings,
    *,
    own_input: bool,
    own_output: bool,
    allow_hosts: Collection[str],
    here: bool = False,
) -> None:
    """All rules for `workspace`; `own_input` and `own_output`: the command line replaces them.

    `here`: it runs on this machine, so that model, data and output may be places of it.
    """
    _check_metadata(workspace.metadata, findings)
    _check_version(workspace, (), findings, beta=workspace.api_version.endswith("v1beta1"))
    if workspace.resource:
        _check_resource(workspace.resource, findings, tuning=workspace.tuning is not None)
    neither = workspace.tuning is None and workspace.inference is None
    if neither and not findings.blames(("tuning",)) and not findings.blames(("inference",)):
        what = "Either Inference or Tuning must be specified, not neither"
        findings.add(
            "SPEC-112", ("tuning",), what, 'add "tuning" with preset, method, input and output'
        )
    if tuning := workspace.tuning:
        method(tuning.method, findings)
        fields.check_preset(tuning.preset, ("tuning", "preset"), findings, here=here)
        if tuning.config:
            fields.check_name(
                tuning.config, SUBDOMAIN, 253, ("tuning", "config"), findings, "ConfigMap"
            )
        if not own_input:
            _check_input(tuning.input, findings, allow_hosts, here=here)
        if not own_output:
            _check_output(tuning.output, findings, here=here)
    if workspace.inference:
        adapters.check(workspace.inference, findings, workspace.tuning)
    for where, text in ignored(workspace):
        findings.note(where, text)


def method(text: str, findings: Findings) -> Method | None:
    """The method that `text` names, in any case."""
    match text.lower():
        case "lora":
            return "lora"
        case "qlora":
            return "qlora"
    hint = nearest(text, ("lora", "qlora"))
    change = 'use "lora" or "qlora"' + (f' (did you mean "{hint}"?)' if hint else "")
    findings.add("SPEC-104", ("tuning", "method"), f"invalid value: {shown(text)}", change)
    return None


def _check_metadata(metadata: Metadata, findings: Findings) -> None:
    fields.check_name(metadata.name, LABEL, 63, ("metadata", "name"), findings, "Workspace")
    if metadata.namespace is not None:
        fields.check_name(
            metadata.namespace, LABEL, 63, ("metadata", "namespace"), findings, "namespace"
        )
    for full, value in (metadata.annotations or {}).items():
        if not full.startswith(ANNOTATION):
            continue
        name, path = full.removeprefix(ANNOTATION), ("metadata", "annotations", full)
        known = keys.our_annotations()
        if name not in known:
            findings.add("SPEC-111", path, "unknown annotation", did_you_mean(name, known))
        elif not known[name].allows(value):
            findings.add("SPEC-104", path, f"is {shown(value)}", f"use {known[name].allowed}")
        elif name == "base-image":
            fields.check_image(value, path, findings, "base-image")
    ours = metadata.annotations or {}
    if ours.get(f"{ANNOTATION}image-index") == "true" and f"{ANNOTATION}base-image" in ours:
        path = ("metadata", "annotations", f"{ANNOTATION}base-image")
        what = "cannot be combined with image-index: a base image is for one platform"
        findings.add("SPEC-108", path, what, "remove one of the two")


def _check_version(part: BaseModel, path: Path, findings: Findings, *, beta: bool) -> None:
    """Fields that only v1beta1 has are unknown in v1alpha1."""
    for name, field in type(part).model_fields.items():
        value, here = getattr(part, name), (*path, field.alias or name)
        extra = field.json_schema_extra
        if value is not None and not beta and isinstance(extra, dict) and "x-kaito-since" in extra:
            what = "unknown in kaito.sh/v1alpha1"
            findings.add("SPEC-111", here, what, "set apiVersion to kaito.sh/v1beta1")
        elif isinstance(value, BaseModel):
            _check_version(value, here, findings, beta=beta)
        elif isinstance(value, list):
            for i, each in enumerate(value):
                if isinstance(each, BaseModel):
                    _check_version(each, (*here, i), findings, beta=beta)


def _check_resource(resource: Resource, findings: Findings, *, tuning: bool) -> None:
    if tuning and resource.partition:
        what = "GPU partitioning is not supported for tuning workloads"
        findings.add("SPEC-118", ("resource", "partition"), what, "remove it")
    instance, path = resource.instance_type, ("resource", "instanceType")
    if instance is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", instance):
        change = (
            "write a name such as Standard_NC24ads_A100_v4 (`python -m tuning presets --instances`)"
        )
        findings.add(
            "SPEC-104", path, f"is {shown(instance)}, which is not an instance type", change
        )
    for i, name in enumerate(resource.preferred_nodes or []):
        fields.check_name(name, SUBDOMAIN, 253, ("resource", "preferredNodes", i), findings, "node")
    selector = resource.label_selector
    for i, each in enumerate((selector.match_expressions if selector else None) or []):
        if each.operator != "In" or len(each.values or []) != 1:
            what = "Only allow matchLabels or 'IN' matchExpression"
            at = ("resource", "labelSelector", "matchExpressions", i)
            findings.add("SPEC-118", at, what, "use In with one value, or matchLabels")


def _check_input(
    source: DataSource | None, findings: Findings, allow_hosts: Collection[str], *, here: bool
) -> None:
    path = ("tuning", "input")
    if source is None:
        if findings.blames(path):
            return
        change = "add urls, volumeSource or image, or give --data"
        findings.add("SPEC-112", path, "missing field(s): tuning.Input", change)
        return
    count = sum(
        each is not None for each in (source.urls or None, source.volume_source, source.image)
    )
    if count > 1 or (count == 0 and not findings.blames(path)):
        what = "Exactly one of URLs, Volume, or Image must be specified"
        change = "keep one" if count else "add one"
        findings.add("SPEC-116", path, what, f"{change} of urls, volumeSource and image")
    for i, url in enumerate(source.urls or []):
        fields.check_url(url, (*path, "urls", i), findings, allow_hosts, here=here)
    if here and sum(map(fields.is_folder, source.urls or [])) > 1:
        change = "give one folder; files and URLs may stand beside it"
        findings.add("SPEC-109", (*path, "urls"), "names several folders", change)
    if source.volume_source is not None:
        fields.check_volume(source.volume_source, (*path, "volumeSource"), findings)
    if source.image is not None:
        fields.check_image(source.image, (*path, "image"), findings, "input")
    for i, secret in enumerate(source.image_pull_secrets or []):
        fields.check_secret(secret, (*path, "imagePullSecrets", i), findings)


def _check_output(output: DataDestination | None, findings: Findings, *, here: bool) -> None:
    path = ("tuning", "output")
    hint = "add image with imagePushSecret, or volumeSource, or give --output oci:DIR"
    if output is None:
        if not findings.blames(path):
            findings.add("SPEC-112", path, "missing field(s): tuning.Output", hint)
        return
    if output.image is None and output.volume_source is None and not findings.blames(path):
        findings.add("SPEC-116", path, "Exactly one of Volume or Image must be specified", hint)
    if output.volume_source is not None:
        fields.check_volume(output.volume_source, (*path, "volumeSource"), findings, written=True)
    if here and output.image is not None and fields.is_local_output(output.image):
        fields.check_output(output.image, (*path, "image"), findings)
    elif output.image is not None:
        if output.image_push_secret is None and not findings.blames(path):
            what = "Must specify imagePushSecret with destination image"
            change = "name the Secret with the registry's login, or give --output on your machine"
            findings.add("SPEC-112", (*path, "imagePushSecret"), what, change)
        fields.check_image(output.image, (*path, "image"), findings, "output")
    if output.image_push_secret is not None:
        fields.check_secret(output.image_push_secret, (*path, "imagePushSecret"), findings)
