"""Manifests of an inference server: Deployment and Service. Pure.

Our server pulls its adapters itself: it refuses one that cannot be pulled by name, and serves the
others. vLLM cannot: an init container pulls each adapter, so that a failure names the adapter.
"""

from __future__ import annotations

from jobs.api.kinds import DEPLOYMENT, SERVICE, Kind, Object
from jobs.api.options import Options, for_device
from jobs.desired import inference as desired_inference
from jobs.desired import names
from jobs.desired.tuning import GIB, Adapter, Desired, Server
from jobs.manifests import pod
from tuning import presets

PORT = 5000
PORTS = (("http", 80), ("torch", 29500))  # of the Service, as KAITO's
GRACE = 75  # seconds: 5 of new requests, 60 for what runs, and 10 to spare
PULLER = "pull-"  # prefix of the names of init containers
_PULLED = 20 * GIB  # for adapters that init containers pull
_SECRETS = "/etc/tuning/secrets"
_KEY = "API_KEY"
_RANK = 64  # --max-lora-rank for adapters of unknown rank


def deployment(workspace: Object, desired: Desired, options: Options, *, claim: bool) -> Object:
    """One pod that serves; never two at a time, as there may be only one GPU."""
    server = _server(desired)
    labels = names.labels(workspace, server.fingerprint, component="server")
    annotations = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    spec: Object = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": names.server_labels(workspace)},
        "progressDeadlineSeconds": 3600,
        "revisionHistoryLimit": 1,
        "template": {
            "metadata": {
                "labels": options.pod_labels | labels,
                "annotations": annotations | pod.policy_annotations(options),
            },
            "spec": _pod(workspace, desired, options, claim=claim),
        },
    }
    return _owned_object(workspace, server, DEPLOYMENT, spec)


def service(workspace: Object, desired: Desired) -> Object:
    """Ports 80 and 29500, both to the server's one port."""
    server = _server(desired)
    spec = {
        "type": "LoadBalancer" if server.public else "ClusterIP",
        "selector": names.server_labels(workspace),
        "ports": [
            {"name": name, "protocol": "TCP", "port": port, "targetPort": PORT}
            for name, port in PORTS
        ],
    }
    return _owned_object(workspace, server, SERVICE, spec)


def _owned_object(workspace: Object, server: Server, kind: Kind, spec: Object) -> Object:
    """An object with the Workspace's name, as in KAITO's quick start."""
    name, revision = workspace["metadata"]["name"], server.fingerprint
    return names.owned_object(workspace, kind, name, spec, revision=revision, component="server")


def service_matches(stored: Object, desired: Object) -> bool:
    """Whether a stored Service has the desired type, ports and selector; KAITO's selects its own
    pods."""
    spec, expected = stored["spec"], desired["spec"]
    ports = [[each.get(key) for key in ("port", "targetPort")] for each in spec.get("ports") or []]
    return (
        spec.get("selector") == expected["selector"]
        and (spec.get("type") == "LoadBalancer") == (expected["type"] == "LoadBalancer")
        and ports == [[each["port"], each["targetPort"]] for each in expected["ports"]]
    )


def _server(desired: Desired) -> Server:
    assert desired.server is not None
    return desired.server


def _pod(workspace: Object, desired: Desired, options: Options, *, claim: bool) -> Object:
    server, options = _server(desired), for_device(options, desired.device)
    vllm = server.runtime == "vllm"
    mounts, volumes = pod.shared_volumes(workspace, desired, options, claim=claim, tmp="8Gi")
    if options.storage.cached:  # there is no run directory
        volumes[:] = [each for each in volumes if each["name"] != "run"]
    if sources := _files(server, options):
        volumes.append({"name": "files", "projected": {"defaultMode": 0o440, "sources": sources}})
        mounts.append({"name": "files", "mountPath": "/etc/tuning", "readOnly": True})
    for i, adapter in enumerate(server.adapters):
        if adapter.volume:
            volumes.append({"name": f"adapter-{i}", **adapter.volume})
            path = f"/adapters/{adapter.name}"
            mounts.append({"name": f"adapter-{i}", "mountPath": path, "readOnly": True})
    command = _vllm(desired, server) if vllm else _command(workspace, server, options)
    disk = _PULLED if vllm and server.adapters else 0
    limits = pod.resources(desired, options, claim=claim, disk=disk)
    more = {"ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}]}
    more |= _probes(vllm=vllm)
    container = pod.container_spec(options, pod.CONTAINER, command, mounts, limits, **more)
    spec = pod.pod_spec(container, volumes, workspace, desired, options, grace=GRACE)
    if vllm:
        container["image"] = options.vllm_image
        if server.hub_secret:  # the path of a file: the token itself is in no environment
            path = f"{_SECRETS}/hub/{pod.HUB}"
            container["env"].append({"name": "HF_TOKEN_PATH", "value": path})
        _add_pullers(spec, server, options)
    return spec


def _probes(*, vllm: bool) -> Object:
    """Our server answers while it loads the model; vLLM does not."""

    def get(path: str, **more: int) -> Object:
        return {"httpGet": {"path": path, "port": PORT, "scheme": "HTTP"}, **more}

    if vllm:
        return {
            "startupProbe": get("/health", periodSeconds=10, failureThreshold=360),
            "readinessProbe": get("/health", periodSeconds=5, timeoutSeconds=5),
            "livenessProbe": get("/health", periodSeconds=20, timeoutSeconds=10),
        }
    return {
        "readinessProbe": get("/readyz", periodSeconds=3, timeoutSeconds=5),
        "livenessProbe": get(
            "/healthz", initialDelaySeconds=60, periodSeconds=20, timeoutSeconds=10,
            failureThreshold=6,
        ),
    }  # fmt: skip


def _command(workspace: Object, server: Server, options: Options) -> list[str]:
    base = desired_inference.base_name(server.base)
    command = ["python", "-m", "tuning", "serve", "--base", server.base, "--base-name", base]
    if server.base_revision:
        command += ["--base-revision", server.base_revision]
    command += ["--name", _combined_name(workspace, server)]
    for each in server.adapters:
        source = each.folder if each.volume else str(each.image)
        command += ["--adapter", f"{each.name}={source}{_strength(each)}"]
    command += ["--host", "0.0.0.0", "--port", str(PORT)]  # noqa: S104 the pod's own address
    command += ["--any-host"]  # only the network policy knows who may come
    if any(each.pull_secrets for each in server.adapters):
        command += ["--pull-secret", f"{_SECRETS}/pull"]
    if server.hub_secret:
        command += ["--hub-token-file", f"{_SECRETS}/hub/{pod.HUB}"]
    if server.key_secret:
        command += ["--api-key-file", f"{_SECRETS}/api/key"]
    if options.policy:
        command += ["--policy", "/etc/tuning/policy.yaml"]
    return command


def _combined_name(workspace: Object, server: Server) -> str:
    """Model name of all adapters together: the Workspace's, unless another model has it."""
    taken, name = {desired_inference.base_name(server.base)}, workspace["metadata"]["name"]
    if len(server.adapters) > 1:
        taken |= {each.name for each in server.adapters}
    return f"{name}-all" if name in taken else str(name)


def _strength(adapter: Adapter) -> str:
    if adapter.strength == 1:
        return ""
    return "@" + (f"{adapter.strength:.6f}".rstrip("0").rstrip(".") or "0")


def _files(server: Server, options: Options) -> list[Object]:
    """Sources of /etc/tuning: the policy, and Secrets by their use."""
    sources: list[Object] = []
    if options.policy:
        sources.append({"downwardAPI": {"items": pod.policy_items(options)}})
    pull = dict.fromkeys(secret for each in server.adapters for secret in each.pull_secrets)
    sources += [pod.secret(name, pod.DOCKER, f"pull/{i}") for i, name in enumerate(pull)]
    if server.hub_secret:
        sources.append(pod.secret(server.hub_secret, pod.HUB, "hub"))
    if server.key_secret:
        sources.append(pod.secret(server.key_secret, _KEY, "api", file="key"))
    return sources


def _vllm(desired: Desired, server: Server) -> list[str]:
    """vLLM's command."""
    preset = presets.find(server.base)
    model = preset.hub_id if preset else server.base
    name = desired_inference.base_name(server.base)
    command = ["vllm", "serve", model, "--served-model-name", name]
    if revision := server.base_revision or (preset.revision if preset else None):
        command += ["--revision", revision]
    command += ["--host", "0.0.0.0", "--port", str(PORT)]  # noqa: S104 the pod's own address
    settings = dict(server.settings)
    if desired.gpus > 1 and "tensor-parallel-size" not in settings:
        command += ["--tensor-parallel-size", str(desired.gpus)]
    max_rank = settings.pop("max-lora-rank", None)
    if server.adapters:
        count = settings.pop("max-loras", str(len(server.adapters)))
        rank = _max_rank(server, max_rank)
        command += ["--enable-lora", f"--max-loras={count}", f"--max-lora-rank={rank}"]
        command += ["--lora-modules", *(f"{a.name}={a.folder}" for a in server.adapters)]
    for key, value in settings.items():
        if value != "false":
            # One argument: a value must not pass for another option.
            command.append(f"--{key}" if value == "true" else f"--{key}={value}")
    return command


def _max_rank(server: Server, setting: str | None) -> int:
    """The rank that vLLM supports for the setting, else for the known ranks of the adapters."""
    known = [each.rank or _RANK for each in server.adapters]
    minimum = int(setting) if setting else max(known)
    ranks = desired_inference.VLLM_RANKS
    return next((rank for rank in ranks if rank >= minimum), ranks[-1])


def _add_pullers(spec: Object, server: Server, options: Options) -> None:
    """Add an init container for each adapter that is an image; vLLM loads adapters from folders."""
    (container,) = spec["containers"]
    spec["volumes"].append({"name": "adapters", "emptyDir": {"sizeLimit": pod.size(_PULLED)}})
    images = [each for each in server.adapters if each.image]
    mounts = [m for m in container["volumeMounts"] if m["name"] in ("tmp", "files")]
    mounts.append({"name": "adapters", "mountPath": "/adapters"})
    container["volumeMounts"] += [
        {
            "name": "adapters",
            "mountPath": f"/adapters/{a.name}",
            "subPath": a.name,
            "readOnly": True,
        }
        for a in images
    ]
    arguments = ["--pull-secret", f"{_SECRETS}/pull"] if any(a.pull_secrets for a in images) else []
    arguments += ["--policy", "/etc/tuning/policy.yaml"] if options.policy else []
    spec["initContainers"] = [
        pod.container_spec(
            options,
            f"{PULLER}{i}",
            ["python", "-m", "tuning", "pull", str(a.image), f"/adapters/{a.name}", *arguments],
            [*mounts],
            {
                "requests": {"cpu": "1", "memory": "512Mi"},
                "limits": {"memory": pod.size(2 * GIB)},
            },
        )
        for i, a in enumerate(images)
    ]
