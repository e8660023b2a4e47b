"""What is created to serve a Workspace: Deployment, Service, network policy. Pure.

The server pulls its adapters itself, not an init container: one that cannot be had is refused by
name, and the others are served. vLLM knows no such thing, so that there an init container pulls
each adapter, and names the one that keeps the pod from starting.
"""

from __future__ import annotations

from jobs.api.client import DEPLOYMENT, SERVICE, Object
from jobs.api.options import Options
from jobs.desired import inference, names
from jobs.desired.tuning import GIB, Adapter, Server, Wanted
from jobs.manifests import pod
from jobs.manifests.pod import RESTRICTED
from tuning import presets

PORT = 5000
PORTS = (("http", 80), ("torch", 29500))  # of the Service, as KAITO's
GRACE = 75  # seconds: 5 of new requests, 60 for what runs, and 10 to spare
PULLER = "pull-"  # how init containers are called that fetch an adapter
_PULLED = 20 * GIB  # of adapters that init containers fetch for vLLM
_SECRETS = "/etc/tuning/secrets"
_KEY = "API_KEY"
_RANK = 64  # the highest rank that vLLM is prepared for, where max-lora-rank says nothing


def name(workspace: Object) -> str:
    """Of Deployment, Service and policy: the Workspace's, as in KAITO's quick start."""
    return str(workspace["metadata"]["name"])


def deployment(workspace: Object, wanted: Wanted, options: Options, *, claim: bool) -> Object:
    """One pod that serves; never two at a time, for there may be one GPU."""
    server = _server(wanted)
    labels = names.labels(workspace, server.fingerprint, component="server")
    template: Object = {
        "metadata": {"labels": options.pod_labels | labels},
        "spec": _pod(workspace, wanted, options, claim=claim),
    }
    notes = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    notes |= pod.policy_notes(options)
    template["metadata"]["annotations"] = notes
    return {
        "apiVersion": DEPLOYMENT.api_version,
        "kind": DEPLOYMENT.name,
        "metadata": _metadata(workspace, server),
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": names.server_labels(workspace)},
            "progressDeadlineSeconds": 3600,
            "revisionHistoryLimit": 1,
            "template": template,
        },
    }


def service(workspace: Object, wanted: Wanted) -> Object:
    """Ports 80 and 29500, both to the server's one port."""
    server = _server(wanted)
    ports = [
        {"name": each, "protocol": "TCP", "port": port, "targetPort": PORT} for each, port in PORTS
    ]
    return {
        "apiVersion": SERVICE.api_version,
        "kind": SERVICE.name,
        "metadata": _metadata(workspace, server),
        "spec": {
            "type": "LoadBalancer" if server.public else "ClusterIP",
            "selector": names.server_labels(workspace),
            "ports": ports,
        },
    }


def leads_to(service: Object, wish: Object) -> bool:
    """Whether a Service of the API server's does what `wish` says: kind, ports, and to which pods.

    One that KAITO's controller made leads to a pod of KAITO's.
    """
    found, wanted = service["spec"], wish["spec"]
    ports = [[each.get(key) for key in ("port", "targetPort")] for each in found.get("ports") or []]
    return (
        found.get("selector") == wanted["selector"]
        and (found.get("type") == "LoadBalancer") == (wanted["type"] == "LoadBalancer")
        and ports == [[each["port"], each["targetPort"]] for each in wanted["ports"]]
    )


def _server(wanted: Wanted) -> Server:
    assert wanted.server is not None
    return wanted.server


def _metadata(workspace: Object, server: Server) -> Object:
    return {
        "name": name(workspace),
        "namespace": workspace["metadata"]["namespace"],
        "labels": names.labels(workspace, server.fingerprint, component="server"),
        "ownerReferences": names.owner(workspace),
    }


def _pod(workspace: Object, wanted: Wanted, options: Options, *, claim: bool) -> Object:
    server, storage = _server(wanted), options.storage
    run: Object = {"emptyDir": {"sizeLimit": pod.size(wanted.run_bytes(cached=storage.cached))}}
    if claim:
        run = {"persistentVolumeClaim": {"claimName": names.claim_name(workspace)}}
    volumes: list[Object] = [
        {"name": "tmp", "emptyDir": {"sizeLimit": "8Gi"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
        {"name": "run", **run},
    ]
    mounts: list[Object] = [
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 the pod's own
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 the pod's own
        pod.weights(storage, volumes),
    ]
    if storage.cached:
        volumes[:] = [each for each in volumes if each["name"] != "run"]
    if sources := _files(server, options):
        volumes.append({"name": "files", "projected": {"defaultMode": 0o440, "sources": sources}})
        mounts.append({"name": "files", "mountPath": "/etc/tuning", "readOnly": True})
    for i, adapter in enumerate(server.adapters):
        if adapter.volume:
            volumes.append({"name": f"adapter-{i}", **adapter.volume})
            path = f"/adapters/{adapter.name}"
            mounts.append({"name": f"adapter-{i}", "mountPath": path, "readOnly": True})
    vllm = server.runtime == "vllm"
    container: Object = {
        "name": pod.CONTAINER,
        "image": options.vllm_image if vllm else options.image,
        "imagePullPolicy": options.image_pull_policy,
        "command": _vllm(wanted, server) if vllm else _command(workspace, server, options),
        "env": _environment(options, token=vllm and server.hub_secret is not None),
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": pod.resources(
            wanted, options, claim=claim, disk=_PULLED if vllm and server.adapters else 0
        ),
        "securityContext": dict(RESTRICTED),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
        **_probes(vllm=vllm),
    }
    found = pod.around(
        container, volumes, workspace=workspace, wanted=wanted, options=options, grace=GRACE
    )
    if vllm:
        _with_pullers(found, server, options)
    return found


def _environment(options: Options, *, token: bool = False) -> list[Object]:
    found = [
        {"name": "HOME", "value": "/tmp"},  # noqa: S108 the pod's own
        {"name": "HF_HOME", "value": "/models"},
        *pod.variables(options),
    ]
    if token:  # the place of a file: the token itself is in no environment
        found.append({"name": "HF_TOKEN_PATH", "value": f"{_SECRETS}/hub/{pod.HUB}"})
    return found


def _probes(*, vllm: bool) -> Object:
    """Ours answers while it loads; vLLM answers nothing until it has loaded."""

    def asks(path: str, **more: int) -> Object:
        return {"httpGet": {"path": path, "port": PORT, "scheme": "HTTP"}, **more}

    if vllm:
        return {
            "startupProbe": asks("/health", periodSeconds=10, failureThreshold=360),
            "readinessProbe": asks("/health", periodSeconds=5, timeoutSeconds=5),
            "livenessProbe": asks("/health", periodSeconds=20, timeoutSeconds=10),
        }
    return {
        "readinessProbe": asks("/readyz", periodSeconds=3, timeoutSeconds=5),
        "livenessProbe": asks(
            "/healthz", initialDelaySeconds=60, periodSeconds=20, timeoutSeconds=10,
            failureThreshold=6,
        ),
    }  # fmt: skip


def _command(workspace: Object, server: Server, options: Options) -> list[str]:
    base = inference.base_name(server.base)
    found = ["python", "-m", "tuning", "serve", "--base", server.base, "--base-name", base]
    if server.base_revision:
        found += ["--base-revision", server.base_revision]
    found += ["--name", _together(workspace, server)]
    for each in server.adapters:
        where = each.folder if each.volume else str(each.image)
        found += ["--adapter", f"{each.name}={where}{_strength(each)}"]
    found += ["--host", "0.0.0.0", "--port", str(PORT)]  # noqa: S104 the pod's own address
    if any(each.pull_secrets for each in server.adapters):
        found += ["--pull-secret", f"{_SECRETS}/pull"]
    if server.hub_secret:
        found += ["--hub-token-file", f"{_SECRETS}/hub/{pod.HUB}"]
    if server.key_secret:
        found += ["--api-key-file", f"{_SECRETS}/api/key"]
    if options.policy:
        found += ["--policy", "/etc/tuning/policy.yaml"]
    return found


def _together(workspace: Object, server: Server) -> str:
    """What all adapters together are called: as the Workspace, unless another model is."""
    taken, found = {inference.base_name(server.base)}, name(workspace)
    if len(server.adapters) > 1:
        taken |= {each.name for each in server.adapters}
    return f"{found}-all" if found in taken else found


def _strength(adapter: Adapter) -> str:
    if adapter.strength == 1:
        return ""
    return "@" + (f"{adapter.strength:.6f}".rstrip("0").rstrip(".") or "0")


def _files(server: Server, options: Options) -> list[Object]:
    """What stands below /etc/tuning: the policy, and Secrets by their use."""
    found: list[Object] = []
    if options.policy:
        found.append({"downwardAPI": {"items": pod.policy_items(options)}})
    secrets = dict.fromkeys(one for each in server.adapters for one in each.pull_secrets)
    found += [pod.secret(one, pod.DOCKER, f"pull/{i}") for i, one in enumerate(secrets)]
    if server.hub_secret:
        found.append(pod.secret(server.hub_secret, pod.HUB, "hub"))
    if server.key_secret:
        found.append(pod.secret(server.key_secret, _KEY, "api", file="key"))
    return found


# vLLM


def _vllm(wanted: Wanted, server: Server) -> list[str]:
    preset = presets.find(server.base)
    model = preset.hub_id if preset else server.base
    given = dict(server.settings)
    known = [each.rank for each in server.adapters if each.rank]
    usual = _RANK if len(known) < len(server.adapters) else 0
    asked = int(given.pop("max-lora-rank", max([usual, *known])))
    rank = next((each for each in inference.RANKS if each >= asked), inference.RANKS[-1])
    found = ["vllm", "serve", model, "--served-model-name", inference.base_name(server.base)]
    if revision := server.base_revision or (preset.revision if preset else None):
        found += ["--revision", revision]
    found += ["--host", "0.0.0.0", "--port", str(PORT)]  # noqa: S104 the pod's own address
    if wanted.gpus > 1 and "tensor-parallel-size" not in given:
        found += ["--tensor-parallel-size", str(wanted.gpus)]
    if server.adapters:
        count = given.pop("max-loras", str(len(server.adapters)))
        found += ["--enable-lora", f"--max-loras={count}", f"--max-lora-rank={rank}"]
        found += ["--lora-modules", *(f"{a.name}={a.folder}" for a in server.adapters)]
    for key, value in given.items():
        if value != "false":
            # in one word: a value must not be able to pass for another option
            found.append(f"--{key}" if value == "true" else f"--{key}={value}")
    return found


def _with_pullers(spec: Object, server: Server, options: Options) -> None:
    """An init container for each adapter that is an image; vLLM finds folders."""
    (container,) = spec["containers"]
    spec["volumes"].append({"name": "adapters", "emptyDir": {"sizeLimit": pod.size(_PULLED)}})
    keep = {"name": "adapters", "mountPath": "/adapters"}
    images = [each for each in server.adapters if each.image]
    shared = [m for m in container["volumeMounts"] if m["name"] in ("tmp", "files")]
    container["volumeMounts"] += [
        keep | {"mountPath": f"/adapters/{a.name}", "subPath": a.name, "readOnly": True}
        for a in images
    ]
    policy = ["--policy", "/etc/tuning/policy.yaml"] if options.policy else []
    secret = ["--pull-secret", f"{_SECRETS}/pull"] if any(a.pull_secrets for a in images) else []
    pull = ["python", "-m", "tuning", "pull"]
    spec["initContainers"] = [
        {
            "name": f"{PULLER}{i}",
            "image": options.image,
            "imagePullPolicy": options.image_pull_policy,
            "command": [*pull, str(a.image), f"/adapters/{a.name}", *secret, *policy],
            "env": _environment(options),
            "resources": {
                "requests": {"cpu": "1", "memory": "512Mi"},
                "limits": {"memory": pod.size(2 * GIB)},
            },
            "securityContext": dict(RESTRICTED),
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": [*shared, keep],
        }
        for i, a in enumerate(images)
    ]
