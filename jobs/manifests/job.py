"""What is created for a Workspace: Job, run volume, network policy, machine. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from jobs.api.client import CLAIM, JOB, NETWORK_POLICY, NODE_CLAIM, Object
from jobs.api.options import Options
from jobs.desired import names
from jobs.desired.names import CONFIG_ANNOTATION, NAMESPACE_LABEL, UID_LABEL, WORKSPACE_LABEL
from jobs.desired.tuning import PRIORITY, QUEUE, Wanted, identity
from jobs.manifests import pod
from jobs.manifests import server as serving
from tuning import spec as specs
from tuning.errors import REASONS, RETRYABLE
from tuning.spec import Spec, reference

# Cloud metadata services: nothing that a run needs, and everything that a thief wants.
_METADATA = (
    "169.254.0.0/16",
    "168.63.129.16/32",
    "100.100.100.200/32",
    "192.0.0.192/32",
)
_METADATA6 = ("fe80::/10", "fd00:ec2::254/128")


def job(
    workspace: Object, wanted: Wanted, options: Options, *, claim: bool, earlier: tuple[str, ...]
) -> Object:
    """The Job of one revision. `earlier`: digests that this Workspace pushed before, which the
    engine may replace. `claim`: the run directory is on a claim, else in an emptyDir."""
    found = _child(
        workspace,
        JOB.api_version,
        JOB.name,
        names.job_name(workspace, wanted),
        revision=wanted.revision,
        spec={
            "backoffLimit": options.backoff_limit,
            "podFailurePolicy": {"rules": _failure_rules()},
            "podReplacementPolicy": "Failed",
            "template": {
                "metadata": {
                    "labels": options.pod_labels | names.labels(workspace, wanted.revision),
                    "annotations": _annotations(wanted, options, earlier),
                },
                "spec": pod.spec(workspace, wanted, options, claim=claim),
            },
        },
    )
    found["metadata"]["annotations"] = {CONFIG_ANNOTATION: wanted.config_digest}
    given = workspace["metadata"].get("labels") or {}
    found["metadata"]["labels"] |= {k: given[k] for k in (QUEUE, PRIORITY) if k in given}
    deadline = names.annotation(workspace, "deadline-seconds") or options.deadline_seconds
    if deadline:
        found["spec"]["activeDeadlineSeconds"] = int(deadline)
    return found


def _failure_rules() -> list[Object]:
    """From the engine's exit codes: what would fail again fails now, what was stopped is free."""
    permanent = sorted(code for code in REASONS if code and code not in RETRYABLE)

    def on(action: str, codes: list[int]) -> Object:
        which = {"containerName": pod.CONTAINER, "operator": "In", "values": codes}
        return {"action": action, "onExitCodes": which}

    disruption = {"type": "DisruptionTarget", "status": "True"}
    return [
        {"action": "Ignore", "onPodConditions": [disruption]},
        on("Ignore", [75]),
        on("FailJob", permanent),
    ]


def _annotations(wanted: Wanted, options: Options, earlier: tuple[str, ...]) -> dict[str, str]:
    """The document, as the first try saw it, and the policy: files in the pod, by downward API."""
    assert wanted.spec is not None
    text = wanted.snapshot
    if earlier:
        document = wanted.spec.document | {"status": {"outputs": list(earlier)}}
        text = specs.dump(replace(wanted.spec, document=document))
    found = {pod.SNAPSHOT: text, "karpenter.sh/do-not-disrupt": "true"}
    found["cluster-autoscaler.kubernetes.io/safe-to-evict"] = "false"
    return found | pod.policy_notes(options)


def run_claim(workspace: Object, wanted: Wanted, options: Options) -> Object:
    """The claim of the run directory: one a Workspace, so that an edited spec finds it again."""
    storage = options.storage
    spec: dict[str, Any] = {
        "accessModes": [storage.access_mode],
        "resources": {"requests": {"storage": pod.size(wanted.run_bytes(cached=storage.cached))}},
    }
    if storage.storage_class:
        spec["storageClassName"] = storage.storage_class
    return _child(workspace, CLAIM.api_version, CLAIM.name, names.claim_name(workspace), spec=spec)


def network_policy(workspace: Object, wanted: Wanted, options: Options) -> Object:
    """In: the operator, to the progress port. Out: DNS, and the ports of data, hub and registry."""
    assert wanted.spec is not None
    spec = {
        "podSelector": {"matchLabels": {WORKSPACE_LABEL: workspace["metadata"]["name"]}},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {"from": [_operator(options)], "ports": [{"protocol": "TCP", "port": pod.PORT}]}
        ],
        "egress": _egress(_ports(wanted.spec), options),
    }
    name = names.job_name(workspace, wanted)
    return _child(
        workspace,
        NETWORK_POLICY.api_version,
        NETWORK_POLICY.name,
        name,
        revision=wanted.revision,
        spec=spec,
    )


def server_policy(workspace: Object, wanted: Wanted, options: Options) -> Object:
    """In: the namespace, or everybody where a key is asked for. Out: as a Job."""
    server = wanted.server
    assert server is not None
    port = {"ports": [{"protocol": "TCP", "port": serving.PORT}]}
    near = [{"podSelector": {}}, _operator(options)]
    images = [each.image for each in server.adapters]
    spec = {
        "podSelector": {"matchLabels": names.server_labels(workspace)},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [port if server.key_secret else {"from": near, **port}],
        "egress": _egress(_registries(images), options),
    }
    name, kind = serving.name(workspace), NETWORK_POLICY
    return _child(workspace, kind.api_version, kind.name, name, spec=spec)


def _operator(options: Options) -> Object:
    return {
        "namespaceSelector": {
            "matchLabels": {"kubernetes.io/metadata.name": options.operator_namespace}
        },
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "tuning-operator"}},
    }


def _egress(more: set[int], options: Options) -> list[Object]:
    ports = sorted({443, *more, *options.egress_ports})
    everywhere = [
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": list(_METADATA)}},
        {"ipBlock": {"cidr": "::/0", "except": list(_METADATA6)}},
    ]
    return [
        {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]},
        {"to": everywhere, "ports": [{"protocol": "TCP", "port": port} for port in ports]},
    ]


def _ports(spec: Spec) -> set[int]:
    """TCP ports of the data's URLs and of the registries."""
    found = set()
    for url in spec.source.urls:
        parts = urlsplit(url)
        found.add(parts.port or (80 if parts.scheme.lower() == "http" else 443))
    return found | _registries([spec.source.image, spec.destination.image])


def _registries(images: Iterable[str | None]) -> set[int]:
    found: set[int] = set()
    for image in images:
        if image:
            host = reference.parse(image).registry
            port = urlsplit(f"//{host}").port
            found |= {port} if port else ({80} if _local(host) else set())
    return found


def _local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return False


def node_claim(
    workspace: Object, wanted: Wanted, options: Options, *, attempt: int, zone: str | None = None
) -> Object:
    """The machine for this run. Cluster-scoped: a finalizer on the Workspace sees to its end."""
    assert wanted.instance is not None
    meta, node_class = workspace["metadata"], options.nodes.node_class
    requirements = {
        "karpenter.sh/nodepool": "kaito",
        "node.kubernetes.io/instance-type": wanted.instance.name,
        "kubernetes.io/os": "linux",
    }
    if zone:
        requirements[names.ZONE] = zone
    return {
        "apiVersion": NODE_CLAIM.api_version,
        "kind": NODE_CLAIM.name,
        "metadata": {
            "name": f"ws{identity(workspace)}{wanted.revision}-{attempt}",
            "labels": names.selected(workspace)
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
            "resources": {"requests": {"storage": pod.size(wanted.disk_bytes)}},
            "expireAfter": "Never",
        },
    }


def _child(
    workspace: Object, version: str, kind: str, name: str, *, revision: str = "", spec: Object
) -> Object:
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": workspace["metadata"]["namespace"],
            "labels": names.labels(workspace, revision or None),
            "ownerReferences": names.owner(workspace),
        },
        "spec": spec,
    }
