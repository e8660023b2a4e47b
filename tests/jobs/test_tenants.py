"""Who may write Workspaces in one namespace gets nothing of another, nor of the cluster."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

import pytest
from cluster.world import config_map, workspace

from jobs.api.kinds import CONFIG_MAP, Object
from jobs.api.options import Nodes, Options
from jobs.desired import allowed, names
from jobs.desired import tuning as desired_tuning
from jobs.manifests import job as job_manifests
from jobs.manifests import pod

OPTIONS = Options(image="registry.internal/tuning@sha256:" + "0" * 64, nodes=Nodes(provision=True))
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
OUR_LABELS = {
    "app.kubernetes.io/name",
    "app.kubernetes.io/instance",
    "app.kubernetes.io/component",
    "app.kubernetes.io/part-of",
    "app.kubernetes.io/managed-by",
    "app.kubernetes.io/version",
    "kaito.sh/workspace",
    names.REVISION_LABEL,
}
KUEUE = {desired_tuning.QUEUE, desired_tuning.PRIORITY}
POD_ANNOTATIONS = {
    pod.SNAPSHOT,
    "karpenter.sh/do-not-disrupt",
    "cluster-autoscaler.kubernetes.io/safe-to-evict",
    *pod.NO_SIDECAR_ANNOTATIONS,
}
VOLUME = ("tuning", "input")

ATTACKS: list[tuple[tuple[str, ...], Any]] = [
    # another namespace's names
    (("tuning", "output", "imagePushSecret"), "victim/push"),
    (("tuning", "output", "imagePushSecret"), "../push"),
    (("tuning", "output", "imagePushSecret"), "push\n      namespace: victim"),
    (("tuning", "preset", "presetOptions"), {"modelAccessSecret": "victim/hub"}),
    (VOLUME, {"image": "r.example.com/data:1", "imagePullSecrets": ["victim/pull"]}),
    (("tuning", "config"), "victim/config"),
    # what a namespace has that its users may not read, and what is the node's
    (VOLUME, {"volumeSource": {"secret": {"secretName": "push"}}}),
    (VOLUME, {"volumeSource": {"projected": {"sources": [{"secret": {"name": "push"}}]}}}),
    (VOLUME, {"volumeSource": {"projected": {"sources": [{"serviceAccountToken": {}}]}}}),
    (VOLUME, {"volumeSource": {"hostPath": {"path": "/"}}}),
    (("tuning", "output"), {"volumeSource": {"hostPath": {"path": "/etc/kubernetes"}}}),
    (VOLUME, {"volumeSource": {"flexVolume": {"driver": "x/y"}}}),
    (VOLUME, {"volumeSource": {"gitRepo": {"repository": "git@x:y"}}}),
    (VOLUME, {"volumeSource": {"local": {"path": "/"}}}),
    (VOLUME, {"volumeSource": {"iscsi": {"targetPortal": "10.0.0.1", "iqn": "x", "lun": 0}}}),
    (VOLUME, {"volumeSource": {"rbd": {"image": "x", "monitors": ["10.0.0.1"]}}}),
    (VOLUME, {"volumeSource": {"emptyDir": {}, "name": "files"}}),
    # labels and annotations that others act upon
    (("metadata", "labels"), {"kaito.sh/workspace": "victim"}),
    (("metadata", "labels"), {"app.kubernetes.io/name": "tuning-operator"}),
    (("metadata", "labels"), {"azure.workload.identity/use": "true"}),
    (("metadata", "labels"), {"sidecar.istio.io/inject": "true"}),
    (("metadata", "annotations"), {"container.apparmor.security.beta.kubernetes.io/tuning": "x"}),
    (("metadata", "annotations"), {pod.POLICY: "network: {allow: ['*']}"}),
    (("metadata", "annotations"), {pod.SNAPSHOT: "apiVersion: v1"}),
    (("metadata", "annotations"), {"kaito.sh/node-class-name": "gold"}),
    (("resource", "labelSelector"), {"matchLabels": {"kaito.sh/workspace": "victim"}}),
    (("resource", "labelSelector"), {"matchLabels": {"kaito.sh/workspacenamespace": "victim"}}),
    # fields of a pod that a Workspace does not have
    (("tuning", "serviceAccountName"), "tuning-operator"),
    (("tuning", "priorityClassName"), "system-node-critical"),
    (("tuning", "runtimeClassName"), "privileged"),
    (("tuning", "podSpec"), {"hostNetwork": True}),
    (("tuning", "env"), [{"name": "LD_PRELOAD", "value": "/data/x.so"}]),
    # a place of the cluster as a data source
    (VOLUME, {"urls": ["https://kubernetes.default.svc@169.254.169.254/latest"]}),
    (VOLUME, {"urls": ["file:///etc/tuning/secrets/push/.dockerconfigjson"]}),
]


def rendered(item: Object) -> list[Object] | None:
    """Everything that would be made, or None where the Workspace is refused."""
    config = (item.get("tuning") or {}).get("config")
    given = config_map(config, "team", "training_config: {}") if config else None
    desired = desired_tuning.read(item, given, None)
    if desired.spec is None or allowed.forbidden_volumes(item, OPTIONS):
        return None
    return [
        job_manifests.node_claim(item, desired, OPTIONS, attempt=1),
        job_manifests.run_claim(item, desired, OPTIONS),
        job_manifests.network_policy(item, desired, OPTIONS),
        job_manifests.job(item, desired, OPTIONS, claim=True, earlier=()),
    ]


def attacked(path: tuple[str, ...], value: Any) -> Object:
    item = workspace("mine", "team")
    item["metadata"] |= {"uid": "1-2-3", "generation": 1}
    place = item
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return item


@pytest.mark.parametrize(("path", "value"), ATTACKS, ids=lambda each: json.dumps(each)[:60])
def test_an_attack_is_refused_or_comes_to_nothing(path: tuple[str, ...], value: Any) -> None:
    """What is made has our names, labels, image, command and machine class, in its namespace."""
    objects = rendered(attacked(path, value))
    if objects is None:
        return
    for each in objects:
        meta = each["metadata"]
        assert meta.get("namespace", "team") == "team"
        assert NAME.fullmatch(meta["name"])
    claim, _, policy, job = objects
    assert OPTIONS.nodes.node_class.model_dump() == claim["spec"]["nodeClassRef"]
    assert "mine" == claim["metadata"]["labels"]["kaito.sh/workspace"]
    assert "team" == claim["metadata"]["labels"]["kaito.sh/workspacenamespace"]
    assert {"matchLabels": {"kaito.sh/workspace": "mine"}} == policy["spec"]["podSelector"]
    template = job["spec"]["template"]
    assert job["metadata"]["labels"].keys() <= OUR_LABELS | KUEUE
    assert template["metadata"]["labels"].keys() == OUR_LABELS | pod.NO_SIDECAR_LABELS.keys()
    assert template["metadata"]["labels"].items() >= pod.NO_SIDECAR_LABELS.items()
    assert template["metadata"]["annotations"].keys() == POD_ANNOTATIONS
    untouched = rendered(attacked(("metadata", "generation"), 1))
    assert untouched is not None
    usual, found = untouched[-1]["spec"]["template"]["spec"], template["spec"]
    assert usual.keys() == found.keys()
    for key in usual.keys() - {"containers", "volumes", "affinity"}:
        assert usual[key] == found[key]
    for key in ("image", "command", "env", "securityContext", "ports"):
        assert usual["containers"][0][key] == found["containers"][0][key]
    for volume in found["volumes"]:
        assert volume.keys() - {"name"} <= {"projected", "emptyDir", "persistentVolumeClaim"}


@pytest.mark.parametrize(("path", "value"), ATTACKS[:17] + ATTACKS[-7:])
def test_and_what_names_others_is_refused_by_name(path: tuple[str, ...], value: Any) -> None:
    """References beyond the namespace, volumes of the node, unknown fields, forbidden places."""
    assert rendered(attacked(path, value)) is None


@pytest.mark.parametrize(
    "name", ["../../victim/configmaps/x", "..", ".", "a/b", "a?watch=1", "a%2fb"]
)
def test_a_name_leads_to_no_other_object(name: str) -> None:
    """The name of a ConfigMap is read before the spec is judged: it stays one step of the path."""
    found = CONFIG_MAP.path("team", name)
    rest = found.removeprefix("/api/v1/namespaces/team/configmaps/")

    assert found != rest
    assert not set("/?") & set(rest)
    assert rest.strip(".")
    assert name == unquote(rest)


def test_a_pod_of_another_namespace_wakes_nobody_there() -> None:
    """A label is a hint to look again, in the namespace of the object that carries it."""
    from jobs.controller.watch import key_of_owned

    item = {"metadata": {"namespace": "team", "labels": {"kaito.sh/workspace": "victim"}}}
    assert ("team", "victim") == key_of_owned(item)
