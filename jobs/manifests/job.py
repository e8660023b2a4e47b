"""Manifests of a tuning Workspace: Job, run volume, network policies, NodeClaim. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import replace
from urllib.parse import urlsplit

from jobs.api.kinds import CLAIM, JOB, NETWORK_POLICY, NODE_CLAIM, Object
from jobs.api.options import MAX_ANNOTATIONS, Options
from jobs.desired import names
from jobs.desired.names import CONFIG_ANNOTATION, NAMESPACE_LABEL, UID_LABEL, WORKSPACE_LABEL
from jobs.desired.tuning import PRIORITY, QUEUE, Desired, identity
from jobs.manifests import group, pod
from jobs.manifests import server as server_manifests
from tuning import spec as specs
from tuning.errors import REASONS, RETRYABLE, Problem
from tuning.spec import Spec, reference

# Cloud metadata services, which hand out the node's credentials.
_METADATA = (
    "169.254.0.0/16",
    "168.63.129.16/32",
    "100.100.100.200/32",
    "192.0.0.192/32",
)
_METADATA6 = ("fe80::/10", "fd00:ec2::254/128")


def job(
    workspace: Object, desired: Desired, options: Options, *, claim: bool, earlier: tuple[str, ...]
) -> Object:
    """The Job of one revision. `earlier`: digests that this Workspace pushed before, which the
    engine may replace. `claim`: the run directory is on a claim, else in an emptyDir."""
    spec: Object = {
        "backoffLimit": options.backoff_limit,
        "podFailurePolicy": {"rules": _failure_rules()},
        "podReplacementPolicy": "Failed",
        "template": {
            "metadata": {
                "labels": pod.NO_SIDECAR_LABELS
                | options.pod_labels
                | names.labels(workspace, desired.revision),
                "annotations": pod_annotations(desired, options, earlier)
                | group.topology(workspace),
            },
            "spec": pod.spec(workspace, desired, options, claim=claim),
        },
    }
    if desired.nodes > 1:
        spec |= group.job_fields(desired, options)
    deadline = names.annotation(workspace, "deadline-seconds") or options.deadline_seconds
    if deadline:
        spec["activeDeadlineSeconds"] = int(deadline)
    name = names.job_name(workspace, desired)
    item = names.owned_object(workspace, JOB, name, spec, revision=desired.revision)
    item["metadata"]["annotations"] = {CONFIG_ANNOTATION: desired.config_digest}
    labels = workspace["metadata"].get("labels") or {}
    item["metadata"]["labels"] |= {k: labels[k] for k in (QUEUE, PRIORITY) if k in labels}
    return item


def _failure_rules() -> list[Object]:
    """From the engine's exit codes: permanent errors fail the Job, stops are not counted."""
    permanent = sorted(code for code in REASONS if code and code not in RETRYABLE)

    def on(action: str, codes: list[int]) -> Object:
        match = {"containerName": pod.CONTAINER, "operator": "In", "values": codes}
        return {"action": action, "onExitCodes": match}

    disruption = {"type": "DisruptionTarget", "status": "True"}
    return [
        {"action": "Ignore", "onPodConditions": [disruption]},
        on("Ignore", [75]),
        on("FailJob", permanent),
    ]


def pod_annotations(desired: Desired, options: Options, earlier: tuple[str, ...]) -> dict[str, str]:
    """The pod's annotations: the document, which all retries share, and the policy's files."""
    assert desired.spec is not None
    snapshot = desired.snapshot
    if earlier:
        document = desired.spec.document | {"status": {"outputs": list(earlier)}}
        snapshot = specs.dump(replace(desired.spec, document=document))
    return {
        pod.SNAPSHOT: snapshot,
        "karpenter.sh/do-not-disrupt": "true",
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        **pod.NO_SIDECAR_ANNOTATIONS,
        **pod.policy_annotations(options),
    }


def size_problem(desired: Desired, options: Options, earlier: tuple[str, ...]) -> Problem | None:
    """Set if the document and the policy are too large for the annotations in which they travel:
    a larger Job is invalid for ever."""
    sizes = {
        k: len(k) + len(v.encode()) for k, v in pod_annotations(desired, options, earlier).items()
    }
    total, document = sum(sizes.values()), sizes[pod.SNAPSHOT]
    if total <= MAX_ANNOTATIONS:
        return None
    policy = sum(count for key, count in sizes.items() if key.startswith(pod.POLICY))
    beside = f", beside {policy:,} bytes of the policy and its files" if policy else ""
    what = f"is {document:,} bytes{beside}; {MAX_ANNOTATIONS:,} bytes travel to a Job"
    if policy > document:
        change = "ask the administrator to put the policy's certificates into the engine's image"
    else:
        change = "name fewer URLs, or a folder of a bucket, a volume or an image as the input"
    return Problem("JOB-114", "Workspace", what, change)


def run_claim(workspace: Object, desired: Desired, options: Options) -> Object:
    """The claim of the run directory: one per Workspace, which later revisions reuse."""
    storage = options.storage.for_nodes(desired.nodes)
    spec: Object = {
        "accessModes": [storage.access_mode],
        "resources": {"requests": {"storage": pod.size(desired.run_bytes(cached=storage.cached))}},
    }
    if storage.storage_class:
        spec["storageClassName"] = storage.storage_class
    return names.owned_object(workspace, CLAIM, names.claim_name(workspace), spec)


def network_policy(workspace: Object, desired: Desired, options: Options) -> Object:
    """In: the operator and Prometheus, to the progress port. Out: DNS, and the ports of data, hub,
    registries, trackers. Pods of one Job reach each other on all ports: collective communication
    uses any."""
    assert desired.spec is not None
    spec = _policy_spec(
        {WORKSPACE_LABEL: workspace["metadata"]["name"]},
        {"from": _readers(options), "ports": [{"protocol": "TCP", "port": pod.PORT}]},
        _ports(desired.spec),
        options,
    )
    if desired.nodes > 1:
        peers = [{"podSelector": {"matchLabels": group.peers(workspace, desired)}}]
        spec["ingress"].append({"from": peers})
        spec["egress"].append({"to": peers})
    name = names.job_name(workspace, desired)
    return names.owned_object(workspace, NETWORK_POLICY, name, spec, revision=desired.revision)


def server_policy(workspace: Object, desired: Desired, options: Options) -> Object:
    """In: the namespace, or everybody if an API key is required. Out: as for a Job."""
    server = desired.server
    assert server is not None
    ingress: Object = {"ports": [{"protocol": "TCP", "port": server_manifests.PORT}]}
    if not server.key_secret:
        ingress["from"] = [{"podSelector": {}}, *_readers(options)]
    ports = _registry_ports(each.image for each in server.adapters)
    spec = _policy_spec(names.server_labels(workspace), ingress, ports, options)
    return names.owned_object(workspace, NETWORK_POLICY, workspace["metadata"]["name"], spec)


def _policy_spec(
    labels: dict[str, str], ingress: Object, ports: set[int], options: Options
) -> Object:
    """Spec of a network policy: egress to DNS, and on `ports` everywhere but metadata services."""
    everywhere = [
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": list(_METADATA)}},
        {"ipBlock": {"cidr": "::/0", "except": list(_METADATA6)}},
    ]
    tcp = [
        {"protocol": "TCP", "port": port} for port in sorted({443, *ports, *options.egress_ports})
    ]
    return {
        "podSelector": {"matchLabels": labels},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [ingress],
        "egress": [
            {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]},
            {"to": everywhere, "ports": tcp},
            # Some network plugins never match pods by their address.
            {"to": [{"namespaceSelector": {}}], "ports": tcp},
            *({"to": [_namespace(name)]} for name in options.cluster.namespaces),
        ],
    }


def _namespace(name: str) -> Object:
    """All pods of a namespace, as the peer of a network policy."""
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _readers(options: Options) -> list[Object]:
    """The pods that read progress and metrics: the operator's, and Prometheus' if it is named."""
    readers = [(options.operator_namespace, {"app.kubernetes.io/name": "tuning-operator"})]
    if options.prometheus.namespace:
        readers.append((options.prometheus.namespace, options.prometheus.pod_labels))
    return [_namespace(name) | {"podSelector": {"matchLabels": labels}} for name, labels in readers]


def _ports(spec: Spec) -> set[int]:
    """TCP ports of the data's URLs, of the trackers and of the registries."""
    settings = spec.settings
    trackers = filter(None, (settings.mlflow_uri, settings.wandb_url) if settings.report_to else ())
    urls = [urlsplit(url) for url in (*spec.source.urls, *trackers)]
    ports = {url.port or (80 if url.scheme.lower() == "http" else 443) for url in urls}
    return ports | _registry_ports([spec.source.image, spec.destination.image])


def _registry_ports(images: Iterable[str | None]) -> set[int]:
    ports: set[int] = set()
    for image in images:
        if image:
            host = reference.parse(image).registry
            port = urlsplit(f"//{host}").port
            ports |= {port} if port else ({80} if _is_private(host) else set())
    return ports


def _is_private(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return False


def node_claim(
    workspace: Object,
    desired: Desired,
    options: Options,
    *,
    attempt: int,
    number: int = 0,
    zone: str | None = None,
) -> Object:
    """Karpenter's request for a node; cluster-scoped, so that a finalizer must delete it. `number`
    tells those of one attempt from each other, where the run has several nodes."""
    assert desired.instance is not None
    suffix = f"{number}-{attempt}" if desired.nodes > 1 else f"{attempt}"
    meta, node_class = workspace["metadata"], options.nodes.node_class
    requirements = {
        "karpenter.sh/nodepool": "kaito",
        "node.kubernetes.io/instance-type": desired.instance.name,
        "kubernetes.io/os": "linux",
    }
    labels = names.node_selector(workspace)
    if zone := zone or labels.get(names.ZONE):
        requirements[names.ZONE] = zone
    return {
        "apiVersion": NODE_CLAIM.api_version,
        "kind": NODE_CLAIM.name,
        "metadata": {
            "name": f"ws{identity(workspace)}{desired.revision}-{suffix}",
            "labels": labels
            | {
                "karpenter.sh/nodepool": "kaito",
                WORKSPACE_LABEL: meta["name"],
                NAMESPACE_LABEL: meta["namespace"],
                "app.kubernetes.io/managed-by": "tuning-operator",
                UID_LABEL: meta["uid"],
            },
            "annotations": {"karpenter.sh/do-not-disrupt": "true"},
        },
        "spec": {
            "nodeClassRef": node_class.model_dump(),
            "requirements": [
                {"key": key, "operator": "In", "values": [value]}
                for key, value in requirements.items()
            ],
            "taints": [{"key": "sku", "value": "gpu", "effect": "NoSchedule"}],
            "resources": {"requests": {"storage": pod.size(desired.disk_bytes)}},
            "expireAfter": "Never",
        },
    }
