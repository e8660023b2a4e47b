"""What a valid Workspace asks for that this cluster does not allow or have, before a node is paid
for: kinds of volumes, classes of pods, a token for a gated base model, an image of vLLM. Pure.
"""

from __future__ import annotations

from jobs.api.kinds import Object
from jobs.api.options import Options
from jobs.desired import names
from jobs.desired.inference import RUNTIME
from tuning import presets
from tuning.errors import Problem, SpecError
from tuning.spec.workspace import ANNOTATION

REASONS = {  # code -> reason of the condition SpecValid
    "JOB-103": "VolumeForbidden",
    "JOB-104": "RuntimeUnavailable",
    "JOB-106": "BaseModelGated",
    "JOB-117": "ClassForbidden",
}
_READ, _WRITTEN = ("configMap", "persistentVolumeClaim"), ("persistentVolumeClaim",)
_READ_ONLY = ("configMap", "image")
_SECRETS = ("secret", "projected", "downwardAPI")  # that no policy allows
_WHY = {
    "hostPath": "it is a folder of the node",
    "image": "it is pulled with the login of the node",
    "ephemeral": "it may be filled from another volume, and is deleted with the pod",
    "emptyDir": "it is empty at the start, and deleted with the pod",
    **dict.fromkeys(_SECRETS, "it shows Secrets, or what the cluster keeps about the pod"),
}
_SERVER = "it names a server, an account or a Secret of its own, past the claims of the namespace"


def problems(workspace: Object, options: Options) -> tuple[Problem, ...]:
    """All of them."""
    found = [
        *_volumes(workspace, options),
        *_classes(workspace, options),
        *_gated(workspace, options),
    ]
    annotations = workspace["metadata"].get("annotations") or {}
    vllm = annotations.get(RUNTIME) == "vllm" and workspace.get("inference") is not None
    if vllm and not options.vllm_image:
        what = "the operator has no image of vLLM"
        change = "set the option vllmImage, or use the runtime transformers"
        found.append(Problem("JOB-104", RUNTIME, what, change))
    return tuple(found)


def forbidden_volumes(workspace: Object, options: Options) -> list[tuple[str, str]]:
    """(field, kind) of each volume that the Workspace must not use."""
    tuning, inference = workspace.get("tuning") or {}, workspace.get("inference") or {}
    parts = [(f"tuning.{each}", tuning.get(each)) for each in ("input", "output")]
    adapters = inference.get("adapters") or []
    parts += [(f"inference.adapters[{i}].source", a.get("source")) for i, a in enumerate(adapters)]
    more = [*options.cluster.volumes, *(["hostPath"] if options.allow_host_path else [])]
    found = []
    for where, part in parts:
        allowed = {*_READ, *more}
        if where == "tuning.output":
            allowed = {*_WRITTEN, *more} - {*_READ_ONLY}
        volume = (part or {}).get("volumeSource") or {}
        found += [(f"{where}.volumeSource", kind) for kind in volume if kind not in allowed]
    return found


def _volumes(workspace: Object, options: Options) -> list[Problem]:
    found = []
    for where, kind in forbidden_volumes(workspace, options):
        shown = kind[:40]
        if where == "tuning.output.volumeSource" and kind in _READ_ONLY:
            what = f"a volume of the kind {shown} cannot be written"
            change = "use persistentVolumeClaim"
        else:
            what = f"a volume of the kind {shown} is not allowed: {_WHY.get(kind, _SERVER)}"
            change = f"use persistentVolumeClaim{_remedy(kind)}"
        found.append(Problem("JOB-103", where, what, change))
    return found


def _remedy(kind: str) -> str:
    if kind in _SECRETS:
        return "; Secrets are named in imagePushSecret, imagePullSecrets and modelAccessSecret"
    if kind == "hostPath":
        return ", or ask the administrator for the option allowHostPath"
    return ", or ask the administrator to allow it in the policy (cluster.volumes)"


def _classes(workspace: Object, options: Options) -> list[Problem]:
    """Classes that the Workspace chooses, of those that the policy lists."""
    found = []
    for name, listed, key in (
        ("runtime-class", options.cluster.runtime_classes, "cluster.runtimeClasses"),
        ("priority-class", options.cluster.priority_classes, "cluster.priorityClasses"),
    ):
        value = names.annotation(workspace, name)
        if value is not None and value not in listed:
            what = f"is {value[:60]}, which the policy does not list"
            change = f"use one of {', '.join(listed)}" if listed else "remove it"
            change += f", or ask the administrator to add it to {key}"
            found.append(Problem("JOB-117", f"{ANNOTATION}{name}", what, change))
    return found


def _gated(workspace: Object, options: Options) -> list[Problem]:
    """A preset that the hub gives to some accounts only, and no token to ask for it.

    A mirror may give it to everybody, and a cache may hold it already.
    """
    if "HF_ENDPOINT" in options.environment or options.storage.cached:
        return []
    sections = [each for each in ("tuning", "inference") if workspace.get(each) is not None]
    named = [(each, workspace[each].get("preset") or {}) for each in sections]
    if any((preset.get("presetOptions") or {}).get("modelAccessSecret") for _, preset in named[:1]):
        return []
    section, preset = named[0] if named else ("", {})
    try:
        known = presets.find(str(preset.get("name") or ""))
    except SpecError:  # unknown: a problem of the spec
        return []
    if known is None or not known.gated or known.image:
        return []
    what = f"{known.hub_id} is gated, and there is no access token"
    change = (
        f"accept its licence at https://huggingface.co/{known.hub_id}, then name a Secret with a "
        f"token of the same account (key HF_TOKEN) in {section}.preset.presetOptions."
        "modelAccessSecret"
    )
    return [Problem("JOB-106", f"{section}.preset.name", what, change)]
