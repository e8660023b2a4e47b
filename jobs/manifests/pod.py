"""The pod of a Job, one container that runs the engine, and what it shares with a server's. Pure.

It passes the *restricted* pod security standard, has no service-account token, and gets Secrets as
read-only files in one projected volume, beside the document that it reads.
"""

from __future__ import annotations

from typing import Any

from jobs.api.client import Object
from jobs.api.options import Options, Storage
from jobs.desired import names
from jobs.desired.tuning import GIB, Wanted
from tuning.spec.workspace import ANNOTATION

PORT = 8080
CONTAINER = "tuning"
DATA_SECRET = "/etc/tuning-data"  # noqa: S105 a folder; the engine looks there
SNAPSHOT, POLICY = f"{ANNOTATION}document", f"{ANNOTATION}policy"
DOCKER = ".dockerconfigjson"
HUB = "HF_TOKEN"
RESTRICTED: Object = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
_VOLUMES = (  # that a tenant may name: none of them reads another's data or a Secret
    "azureFile",
    "cephfs",
    "configMap",
    "csi",
    "emptyDir",
    "ephemeral",
    "image",
    "nfs",
    "persistentVolumeClaim",
)


def forbidden_volume(workspace: Object, options: Options) -> tuple[str, str] | None:
    """(field, kind) of a volume that a Workspace must not name."""
    tuning, inference = workspace.get("tuning") or {}, workspace.get("inference") or {}
    asked = [(f"tuning.{each}", tuning.get(each)) for each in ("input", "output")]
    adapters = inference.get("adapters") or []
    asked += [(f"inference.adapters[{i}].source", a.get("source")) for i, a in enumerate(adapters)]
    allowed = (*_VOLUMES, "hostPath") if options.allow_host_path else _VOLUMES
    for where, part in asked:
        for kind in (part or {}).get("volumeSource") or {}:
            if kind not in allowed:
                return f"{where}.volumeSource", kind
    return None


def spec(workspace: Object, wanted: Wanted, options: Options, *, claim: bool) -> Object:
    """The pod's spec. `claim`: the run directory is on a claim, else in an emptyDir."""
    assert wanted.spec is not None
    mounts, volumes = _volumes(workspace, wanted, options, claim=claim)
    command = ["python", "-m", "tuning", "run", "-f", "/etc/tuning/workspace.yaml"]
    command += ["--run-dir", "/run/tuning", "--port", str(PORT)]
    command += ["--secrets", "/etc/tuning/secrets"]
    if options.policy:
        command += ["--policy", "/etc/tuning/policy.yaml"]
    container = {
        "name": CONTAINER,
        "image": options.image,
        "imagePullPolicy": options.image_pull_policy,
        "command": command,
        "env": [
            {"name": "HOME", "value": "/tmp"},  # noqa: S108 the pod's own
            {"name": "HF_HOME", "value": "/models"},
            *variables(options),
        ],
        "ports": [{"name": "progress", "containerPort": PORT, "protocol": "TCP"}],
        "resources": resources(wanted, options, claim=claim),
        "securityContext": dict(RESTRICTED),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }
    return around(
        container,
        volumes,
        workspace=workspace,
        wanted=wanted,
        options=options,
        grace=options.grace_seconds,
    ) | {"restartPolicy": "Never"}


def policy_notes(options: Options) -> dict[str, str]:
    """Annotations that hold the policy, and the files that it names."""
    if not options.policy:
        return {}
    files = {f"{POLICY}-{i}": text for i, text in enumerate(options.policy_files.values())}
    return {POLICY: options.policy, **files}


def policy_items(options: Options) -> list[Object]:
    """The same as files of a volume, beside each other."""
    if not options.policy:
        return []
    files = [field(f"{POLICY}-{i}", name) for i, name in enumerate(options.policy_files)]
    return [field(POLICY, "policy.yaml"), *files]


def variables(options: Options) -> list[Object]:
    """What the administrator puts into every pod's environment."""
    return [{"name": name, "value": value} for name, value in sorted(options.environment.items())]


def around(
    container: Object,
    volumes: list[Object],
    *,
    workspace: Object,
    wanted: Wanted,
    options: Options,
    grace: int,
) -> dict[str, Any]:
    """A pod's spec around its container: who it runs as, and on which nodes."""
    user = options.user_id
    pod: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user,
            "runAsGroup": user,
            "fsGroup": user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": _tolerations(options),
        "containers": [container],
        "volumes": volumes,
    }
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    if options.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in options.image_pull_secrets]
    if wanted_labels := node_labels(workspace, wanted, options):
        terms = [
            {"key": key, "operator": "In", "values": [value]}
            for key, value in sorted(wanted_labels.items())
        ]
        selector = {"nodeSelectorTerms": [{"matchExpressions": terms}]}
        pod["affinity"] = {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": selector}
        }
    return pod


def resources(wanted: Wanted, options: Options, *, claim: bool, disk: int = 0) -> Object:
    """Requests that leave room on the machine; no CPU limit, which would only slow the run.

    `disk`: bytes of emptyDirs beside the run directory that may be filled.
    """
    memory = size(wanted.memory_bytes)
    # an emptyDir counts as the pod's own disk
    run = disk + (0 if claim else wanted.run_bytes(cached=options.storage.cached))
    requests = {"cpu": "2", "memory": memory, "ephemeral-storage": size(2 * GIB + run)}
    limits = {
        "memory": size(2 * wanted.memory_bytes),
        "ephemeral-storage": size(8 * GIB + run),
    }
    if wanted.instance and wanted.instance.ram_bytes:
        limits["memory"] = size(int(0.9 * wanted.instance.ram_bytes))
    if wanted.gpus:
        requests[options.gpu_resource] = limits[options.gpu_resource] = str(wanted.gpus)
    return {"requests": requests, "limits": limits}


def _tolerations(options: Options) -> list[Object]:
    usual: list[Object] = [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"},
        {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "kubernetes.azure.com/scalesetpriority", "operator": "Exists"},
    ]
    return usual + [dict(each) for each in options.nodes.tolerations]


def node_labels(workspace: Object, wanted: Wanted, options: Options) -> dict[str, str]:
    """Labels that a node must carry: the Workspace's, and ours on a machine that we bought."""
    meta = workspace["metadata"]
    ours = {names.WORKSPACE_LABEL: meta["name"], names.NAMESPACE_LABEL: meta["namespace"]}
    return names.selected(workspace) | (ours if names.bought(wanted, options) else {})


def _volumes(
    workspace: Object, wanted: Wanted, options: Options, *, claim: bool
) -> tuple[list[Object], list[Object]]:
    """(mounts, volumes) of the pod."""
    tuning, storage = workspace["tuning"], options.storage
    run: Object = {"emptyDir": {"sizeLimit": size(wanted.run_bytes(cached=storage.cached))}}
    if claim:
        run = {"persistentVolumeClaim": {"claimName": names.claim_name(workspace)}}
    volumes: list[Object] = [
        {"name": "files", "projected": {"defaultMode": 0o440, "sources": _files(wanted, options)}},
        {"name": "run", **run},
        {"name": "tmp", "emptyDir": {"sizeLimit": "4Gi"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
    ]
    mounts: list[Object] = [
        {"name": "files", "mountPath": "/etc/tuning", "readOnly": True},
        {"name": "run", "mountPath": "/run/tuning", "subPath": "run"},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 the pod's own
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 the pod's own
    ]
    mounts.append(weights(storage, volumes))
    asked = wanted.spec
    if asked and asked.data_secret and asked.source.urls:  # all its keys: some are hosts' names
        secret = {"secretName": asked.data_secret, "defaultMode": 0o440}
        volumes.append({"name": "data-secret", "secret": secret})
        mounts.append({"name": "data-secret", "mountPath": DATA_SECRET, "readOnly": True})
    if source := tuning["input"].get("volumeSource"):
        volumes.append({"name": "data", **source})
        path = _mount_path(source, "/data")
        mounts.append({"name": "data", "mountPath": path, "readOnly": True})
    if target := tuning["output"].get("volumeSource"):
        volumes.append({"name": "output", **target})
        mounts.append({"name": "output", "mountPath": _mount_path(target, "/output")})
    return mounts, volumes


def weights(storage: Storage, volumes: list[Object]) -> Object:
    """Where base weights are mounted: a cache, whose volume is added, or part of the run volume."""
    if storage.cache_claim:
        claim = {"claimName": storage.cache_claim}
        volumes.append({"name": "models", "persistentVolumeClaim": claim})
    elif storage.cache_host_path:
        # A folder that the kubelet made would be root's.
        folder = {"path": storage.cache_host_path, "type": "Directory"}
        volumes.append({"name": "models", "hostPath": folder})
    if storage.cached:
        return {"name": "models", "mountPath": "/models"}
    return {"name": "run", "mountPath": "/models", "subPath": "models"}


def _mount_path(volume: Object, usual: str) -> str:
    """Where the engine looks for a volume: a folder of the node has the same path in the pod."""
    return str(volume["hostPath"]["path"]) if "hostPath" in volume else usual


def _files(wanted: Wanted, options: Options) -> list[Object]:
    """What stands below /etc/tuning: the document, the policy, and Secrets by their use."""
    assert wanted.spec is not None
    asked = wanted.spec
    items = [field(SNAPSHOT, "workspace.yaml"), *policy_items(options)]
    sources: list[Object] = [{"downwardAPI": {"items": items}}]
    if asked.destination.push_secret:
        sources.append(secret(asked.destination.push_secret, DOCKER, "push"))
    for i, name in enumerate(asked.source.pull_secrets):
        sources.append(secret(name, DOCKER, "pull" if i == 0 else f"pull/{i}"))
    if asked.hub_secret:
        sources.append(secret(asked.hub_secret, HUB, "hub"))
    return sources


def field(annotation_: str, path: str) -> Object:
    """An annotation of the pod as a file."""
    return {"path": path, "fieldRef": {"fieldPath": f"metadata.annotations['{annotation_}']"}}


def secret(name: str, key: str, use: str, *, file: str | None = None) -> Object:
    """A key of a Secret as a file below /etc/tuning/secrets/, in the folder of its use."""
    path = f"secrets/{use}/{file or key}"
    return {"secret": {"name": name, "items": [{"key": key, "path": path}]}}


def size(count: int) -> str:
    """Bytes as a quantity, rounded up to whole GiB."""
    return f"{-(-count // GIB)}Gi"
