"""The pod of a Job, and the parts that it shares with an inference server's pod. Pure.

Both meet the *restricted* pod security standard, have no service-account token, and get Secrets as
read-only files of a projected volume.
"""

from __future__ import annotations

from typing import Any

from jobs.api.kinds import Object
from jobs.api.options import Options, for_device
from jobs.desired import names
from jobs.desired.tuning import GIB, Desired
from jobs.manifests import group
from tuning.spec.workspace import ANNOTATION

PORT = 8080
CONTAINER = "tuning"
# the engine's folders for whole Secrets
DATA_SECRET, TRACKER_SECRET = "/etc/tuning-data", "/etc/tuning-trackers"
SNAPSHOT, POLICY = f"{ANNOTATION}document", f"{ANNOTATION}policy"
DOCKER = ".dockerconfigjson"
HUB = "HF_TOKEN"
_NODE_NAME: Object = {"key": "metadata.name", "operator": "In"}
# A sidecar that goes on when the engine has ended keeps pod, Job and node: none is injected.
NO_SIDECAR_LABELS = {"sidecar.istio.io/inject": "false", "kuma.io/sidecar-injection": "disabled"}
NO_SIDECAR_ANNOTATIONS = {
    "sidecar.istio.io/inject": "false",  # until Istio 1.10
    "linkerd.io/inject": "disabled",
    "consul.hashicorp.com/connect-inject": "false",
    "vault.hashicorp.com/agent-inject": "false",
    "sidecar.opentelemetry.io/inject": "false",
}
_TOLERATIONS: list[Object] = [
    {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
    {"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"},
    {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},
    {"key": "kubernetes.azure.com/scalesetpriority", "operator": "Exists"},
]
_NO_GPU = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}


def spec(workspace: Object, desired: Desired, options: Options, *, claim: bool) -> Object:
    """The pod's spec. `claim`: the run directory is on a claim, else in an emptyDir."""
    options = for_device(options, desired.device)
    command = ["python", "-m", "tuning", "run", "-f", "/etc/tuning/workspace.yaml"]
    command += ["--run-dir", "/run/tuning"]
    command += ["--host", "0.0.0.0", "--port", str(PORT)]  # noqa: S104 the pod's own address
    command += ["--secrets", "/etc/tuning/secrets"]
    if options.policy:
        command += ["--policy", "/etc/tuning/policy.yaml"]
    command += group.arguments(workspace, desired)
    mounts, volumes = _volumes(workspace, desired, options, claim=claim)
    limits = resources(desired, options, claim=claim)
    ports = [{"name": "progress", "containerPort": PORT, "protocol": "TCP"}]
    container = container_spec(options, CONTAINER, command, mounts, limits, ports=ports)
    grace = options.grace_seconds
    spec = pod_spec(container, volumes, workspace, desired, options, grace=grace)
    return spec | {"restartPolicy": "Never"} | group.host_names(workspace, desired)


def container_spec(
    options: Options,
    name: str,
    command: list[str],
    mounts: list[Object],
    limits: Object,
    **more: Any,
) -> Object:
    """A container of the engine's image, unless `more` says otherwise, without privileges."""
    # Where NVIDIA's runtime is the default one, the image's `all` would show every GPU of the node.
    hidden = [] if options.gpu_resource in limits["limits"] else [_NO_GPU]
    return {
        "name": name,
        "image": options.image,
        "imagePullPolicy": options.image_pull_policy,
        "command": command,
        "env": [
            {"name": "HOME", "value": "/tmp"},  # noqa: S108 the pod's own
            {"name": "HF_HOME", "value": "/models"},
            *hidden,
            *({"name": key, "value": value} for key, value in sorted(options.environment.items())),
        ],
        "resources": limits,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
        **more,
    }


def policy_annotations(options: Options) -> dict[str, str]:
    """Annotations that hold the policy, and the files that it names."""
    if not options.policy:
        return {}
    files = {f"{POLICY}-{i}": text for i, text in enumerate(options.policy_files.values())}
    return {POLICY: options.policy, **files}


def policy_items(options: Options) -> list[Object]:
    """The same as files of a downward API volume."""
    if not options.policy:
        return []
    files = [field(f"{POLICY}-{i}", name) for i, name in enumerate(options.policy_files)]
    return [field(POLICY, "policy.yaml"), *files]


def pod_spec(
    container: Object,
    volumes: list[Object],
    workspace: Object,
    desired: Desired,
    options: Options,
    *,
    grace: int,
) -> Object:
    """A pod's spec: its container, user, nodes, and `grace`, the seconds that it has to stop."""
    user = options.user_id
    pod: Object = {
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
        "tolerations": [*_TOLERATIONS, *map(dict, options.nodes.tolerations)],
        "containers": [container],
        "volumes": volumes,
    }
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    if options.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in options.image_pull_secrets]
    for field, value in (
        ("runtimeClassName", names.annotation(workspace, "runtime-class") or options.runtime_class),
        (
            "priorityClassName",
            names.annotation(workspace, "priority-class") or options.priority_class,
        ),
    ):
        if value:
            pod[field] = value
    affinity = group.affinity(workspace, desired)
    if nodes := _node_affinity(workspace, desired, options):
        affinity |= {"nodeAffinity": nodes}
    return pod | ({"affinity": affinity} if affinity else {})


def _node_affinity(workspace: Object, desired: Desired, options: Options) -> Object:
    """The nodes that the Workspace requires, and those that it prefers."""
    labels = names.node_selector(workspace)
    if names.provisions_node(desired, options):
        labels |= {names.WORKSPACE_LABEL: workspace["metadata"]["name"]}
        labels |= {names.NAMESPACE_LABEL: workspace["metadata"]["namespace"]}
    affinity: Object = {}
    if labels:
        terms = [
            {"key": key, "operator": "In", "values": [value]}
            for key, value in sorted(labels.items())
        ]
        selector = {"nodeSelectorTerms": [{"matchExpressions": terms}]}
        affinity["requiredDuringSchedulingIgnoredDuringExecution"] = selector
    if preferred := (workspace.get("resource") or {}).get("preferredNodes"):
        affinity["preferredDuringSchedulingIgnoredDuringExecution"] = [
            {"weight": 100, "preference": {"matchFields": [_NODE_NAME | {"values": [name]}]}}
            for name in preferred
        ]
    return affinity


def resources(desired: Desired, options: Options, *, claim: bool, disk: int = 0) -> Object:
    """Requests that leave room on the node; no CPU limit, which would only slow the run.

    `disk`: bytes of emptyDirs beside the run directory.
    """
    # emptyDirs count as ephemeral storage of the pod
    run = disk + (0 if claim else desired.run_bytes(cached=options.storage.cached))
    requests = {"cpu": "2", "memory": size(desired.memory_bytes)}
    requests["ephemeral-storage"] = size(2 * GIB + run)
    limits = {"memory": size(2 * desired.memory_bytes), "ephemeral-storage": size(8 * GIB + run)}
    if desired.instance and desired.instance.ram_bytes:
        limits["memory"] = size(int(0.9 * desired.instance.ram_bytes))
    if desired.gpus:
        requests[options.gpu_resource] = limits[options.gpu_resource] = str(desired.gpus)
    return {"requests": requests, "limits": limits}


def _volumes(
    workspace: Object, desired: Desired, options: Options, *, claim: bool
) -> tuple[list[Object], list[Object]]:
    """(mounts, volumes) of the pod."""
    tuning = workspace["tuning"]
    mounts, volumes = shared_volumes(workspace, desired, options, claim=claim, tmp="4Gi")
    files = {"defaultMode": 0o440, "sources": _files(desired, options)}
    volumes.append({"name": "files", "projected": files})
    mounts.append({"name": "files", "mountPath": "/etc/tuning", "readOnly": True})
    mounts.append({"name": "run", "mountPath": "/run/tuning", **group.run_folder(desired)})
    parsed = desired.spec
    assert parsed is not None
    for name, whole, used, path in (
        ("data-secret", parsed.data_secret, parsed.source.urls, DATA_SECRET),
        ("tracker-secret", parsed.tracker_secret, parsed.settings.report_to, TRACKER_SECRET),
    ):
        if whole and used:  # all keys: some are names of hosts
            volumes.append({"name": name, "secret": {"secretName": whole, "defaultMode": 0o440}})
            mounts.append({"name": name, "mountPath": path, "readOnly": True})
    if source := tuning["input"].get("volumeSource"):
        volumes.append({"name": "data", **source})
        path = _mount_path(source, "/data")
        mounts.append({"name": "data", "mountPath": path, "readOnly": True})
    if target := tuning["output"].get("volumeSource"):
        volumes.append({"name": "output", **target})
        mounts.append({"name": "output", "mountPath": _mount_path(target, "/output")})
    return mounts, volumes


def shared_volumes(
    workspace: Object, desired: Desired, options: Options, *, claim: bool, tmp: str
) -> tuple[list[Object], list[Object]]:
    """(mounts, volumes) of /tmp, /dev/shm, /models, and the run volume, which is not mounted."""
    storage = options.storage
    run: Object = {"emptyDir": {"sizeLimit": size(desired.run_bytes(cached=storage.cached))}}
    if claim:
        run = {"persistentVolumeClaim": {"claimName": names.claim_name(workspace)}}
    volumes: list[Object] = [
        {"name": "run", **run},
        {"name": "tmp", "emptyDir": {"sizeLimit": tmp}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
    ]
    models: Object = {"name": "run", "mountPath": "/models", "subPath": "models"}
    if storage.cached:
        models = {"name": "models", "mountPath": "/models"}
    if storage.cache_claim:
        cache = {"claimName": storage.cache_claim}
        volumes.append({"name": "models", "persistentVolumeClaim": cache})
    elif storage.cache_host_path:  # a folder that the kubelet creates would be root's
        folder = {"path": storage.cache_host_path, "type": "Directory"}
        volumes.append({"name": "models", "hostPath": folder})
    mounts: list[Object] = [
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 the pod's own
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 the pod's own
        models,
    ]
    return mounts, volumes


def _mount_path(volume: Object, usual: str) -> str:
    """Where the engine expects a volume: a folder of the node has the same path in the pod."""
    return str(volume["hostPath"]["path"]) if "hostPath" in volume else usual


def _files(desired: Desired, options: Options) -> list[Object]:
    """Sources of /etc/tuning: the document, the policy, and Secrets by their use."""
    parsed = desired.spec
    assert parsed is not None
    items = [field(SNAPSHOT, "workspace.yaml"), *policy_items(options)]
    sources: list[Object] = [{"downwardAPI": {"items": items}}]
    if parsed.destination.push_secret:
        sources.append(secret(parsed.destination.push_secret, DOCKER, "push"))
    for i, name in enumerate(parsed.source.pull_secrets):
        sources.append(secret(name, DOCKER, "pull" if i == 0 else f"pull/{i}"))
    if parsed.hub_secret:
        sources.append(secret(parsed.hub_secret, HUB, "hub"))
    return sources


def field(annotation: str, path: str) -> Object:
    """An annotation of the pod as a file."""
    return {"path": path, "fieldRef": {"fieldPath": f"metadata.annotations['{annotation}']"}}


def secret(name: str, key: str, use: str, *, file: str | None = None) -> Object:
    """A key of a Secret as a file in the folder of its use below /etc/tuning/secrets."""
    path = f"secrets/{use}/{file or key}"
    return {"secret": {"name": name, "items": [{"key": key, "path": path}]}}


def size(count: int) -> str:
    """Bytes as a Kubernetes quantity, rounded up to whole GiB."""
    return f"{-(-count // GIB)}Gi"
