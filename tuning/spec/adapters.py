"""Rules for `inference`, with KAITO's messages; those of its updates always apply."""

from __future__ import annotations

import math

from tuning.spec import fields
from tuning.spec.findings import Findings, Path, shown
from tuning.spec.workspace import SUBDOMAIN, Adapter, Inference, Tuning


def check(inference: Inference, findings: Findings, tuning: Tuning | None = None) -> None:
    """All rules for `inference`; beside `tuning`, the base is the model that it tunes."""
    path: Path = ("inference",)
    if tuning is not None:
        _check_beside(inference, tuning, path, findings)
    elif inference.preset is None and inference.template is None:
        what = "Preset or Template must be specified"
        findings.add("SPEC-112", path, what, 'add "preset" with the name of the base model')
    if inference.preset and inference.template is not None:
        what = "Preset and Template cannot be set at the same time"
        findings.add("SPEC-116", path, what, "keep one of the two")
    if inference.preset:
        fields.check_preset(inference.preset, (*path, "preset"), findings)
    if inference.api_key_secret is not None:
        fields.check_secret(inference.api_key_secret, (*path, "apiKeySecret"), findings)
    adapters = inference.adapters or []
    if len(adapters) > 10:
        what = "Number of Adapters exceeds the maximum limit, maximum of 10 allowed"
        findings.add("SPEC-104", (*path, "adapters"), what, "keep ten")
    seen: set[str] = set()
    for i, adapter in enumerate(adapters):
        _check_adapter(adapter, (*path, "adapters", i), findings, seen)


def _check_beside(inference: Inference, tuning: Tuning, path: Path, findings: Findings) -> None:
    if inference.template is not None:
        what = "Template cannot be combined with Tuning: the tuned model is served"
        findings.add("SPEC-116", (*path, "template"), what, "remove it")
    preset = inference.preset
    if preset and preset.name.lower() != tuning.preset.name.lower():
        what = f"is {shown(preset.name)}, but {shown(tuning.preset.name)} is tuned"
        change = 'leave "preset" out, or serve the other model with a Workspace of its own'
        findings.add("SPEC-108", (*path, "preset", "name"), what, change)


def _check_adapter(adapter: Adapter, path: Path, findings: Findings, seen: set[str]) -> None:
    source, at = adapter.source, (*path, "source")
    if source is None or (source.image is None) == (source.volume_source is None):
        what = "Either Image or Volume must be specified for adapter source"
        findings.add("SPEC-116", at, what, "add one of image and volumeSource")
    if source is None:
        return
    if source.urls:
        what = "URLs are not supported as adapter source"
        findings.add("SPEC-118", (*at, "urls"), what, "use image or volumeSource")
    if not source.name:
        what = "Name of Adapter field must be specified"
        findings.add(
            "SPEC-112", (*at, "name"), what, "add a name; requests choose an adapter by it"
        )
    else:
        fields.check_name(source.name, SUBDOMAIN, 253, (*at, "name"), findings, "adapter")
        if source.name in seen:
            what = f"Duplicate adapter source name found: {shown(source.name)}"
            findings.add("SPEC-104", (*at, "name"), what, "give each adapter a name of its own")
        seen.add(source.name)
    if source.image is not None:
        fields.check_image(source.image, (*at, "image"), findings, "adapter")
    if source.volume_source is not None:
        fields.check_volume(source.volume_source, (*at, "volumeSource"), findings)
    for i, secret in enumerate(source.image_pull_secrets or []):
        fields.check_secret(secret, (*at, "imagePullSecrets", i), findings)
    if adapter.strength is not None:
        _check_strength(adapter.strength, source.name or "", (*path, "strength"), findings)


def _check_strength(text: str, name: str, path: Path, findings: Findings) -> None:
    try:
        strength = float(text) if text[:1].isdigit() else math.nan  # the CRD refuses ".5"
    except ValueError:
        strength = math.nan
    if 0 <= strength <= 1:
        return
    what = f"Strength value for Adapter '{name[:60]}' must be between 0 and 1"
    if math.isnan(strength):
        what = f"Invalid strength value for Adapter '{name[:60]}': {shown(text)}"
    findings.add("SPEC-104", path, what, 'write a number in quotes, such as "0.5"')
