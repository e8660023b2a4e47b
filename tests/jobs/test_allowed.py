"""What a cluster allows its Workspaces, and what has no effect: refused or said, never dropped."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cluster.world import workspace
from hypothesis import given, settings
from hypothesis import strategies as st
from kubernetes import client

from jobs.api.kinds import Object
from jobs.api.options import ClusterPolicy, Options, with_policy
from jobs.controller.decide import decide
from jobs.desired import allowed, names
from jobs.desired import inference as desired_inference
from jobs.desired import tuning as desired_tuning
from jobs.manifests import job as job_manifests
from jobs.manifests import server as server_manifests
from jobs.observed.objects import condition
from jobs.observed.phases import Observed
from tuning.errors import SpecError
from tuning.network.policy import Policy
from tuning.oci.policy import Trust

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CLAIM = {"persistentVolumeClaim": {"claimName": "data"}}
GEMMA = {"name": "gemma-3-4b-instruct"}
FOREIGN = {  # kind of volume -> a source that reaches what is not the namespace's
    "nfs": {"server": "nfs.corp", "path": "/home"},
    "cephfs": {"monitors": ["10.0.0.1"], "secretRef": {"name": "push"}},
    "azureFile": {"secretName": "push", "shareName": "all", "secretNamespace": "other"},
    "csi": {"driver": "secrets-store.csi.k8s.io", "nodePublishSecretRef": {"name": "push"}},
    "image": {"reference": "registry.corp/other/data:1", "pullPolicy": "Never"},
    "ephemeral": {
        "volumeClaimTemplate": {
            "spec": {"dataSourceRef": {"kind": "VolumeSnapshot", "name": "x", "namespace": "other"}}
        }
    },
    "emptyDir": {},
}
NEVER = {
    "secret": {"secretName": "push"},
    "projected": {"sources": [{"secret": {"name": "push"}}]},
    "downwardAPI": {"items": []},
    "hostPath": {"path": "/etc"},
    "glusterfs": {"endpoints": "x", "path": "y"},
    "iscsi": {"targetPortal": "10.0.0.1", "iqn": "x", "lun": 0},
    "flexVolume": {"driver": "x/y"},
    "portworxVolume": {"volumeID": "x"},
    "newerVolume": {},
}


def stored(**tuning: Any) -> Object:
    item = workspace("phi", "team", **tuning)
    item["metadata"] |= {"uid": "1-2-3", "generation": 1}
    return item


def serving(**inference: Any) -> Object:
    item = stored()
    del item["tuning"]
    return item | {"inference": {"preset": {"name": "phi-3-mini-4k-instruct"}} | inference}


def pod_of(item: Object, options: Options | None = None) -> Object:
    """The pod's spec of a Job or server, against the strict models."""
    options = options or Options()
    if item.get("tuning"):
        desired = desired_tuning.read(item, None, None)
        assert not desired.problems
        made = job_manifests.job(item, desired, options, claim=True, earlier=())
        client.V1Job.model_validate(made)
    else:
        desired = desired_inference.read(item, None, None)
        made = server_manifests.deployment(item, desired, options, claim=True)
        client.V1Deployment.model_validate(made)
    found: Object = made["spec"]["template"]["spec"]
    return found


def spec_valid(item: Object, options: Options | None = None) -> Object:
    """The condition SpecValid, and that nothing is created if it is False."""
    options = options or Options()
    serves = item.get("tuning") is None
    read = desired_inference.read if serves else desired_tuning.read
    observed = Observed(item, read(item, None, None), NOW, serving=serves)
    decision = decide(observed, options)
    assert decision.status is not None
    found = condition({"status": decision.status}, "SpecValid")
    assert found is not None
    assert found["status"] == "True" or not decision.create
    return found


@pytest.mark.parametrize("kind", [*FOREIGN, *NEVER])
@pytest.mark.parametrize("place", ["input", "output", "adapter"])
def test_a_volume_that_is_not_the_namespaces_is_refused_with_reason_and_remedy(
    kind: str, place: str
) -> None:
    """For data, the adapter, and adapters to serve; before anything is created."""
    volume = {"volumeSource": {kind: (FOREIGN | NEVER)[kind]}}
    item = stored(**{place: volume}) if place != "adapter" else serving()
    if place == "adapter":
        item["inference"]["adapters"] = [{"source": {"name": "a"} | volume}]

    found = spec_valid(item)

    assert ("False", "VolumeForbidden") == (found["status"], found["reason"])
    assert kind in found["message"] and "volumeSource" in found["message"]
    assert "persistentVolumeClaim" in found["message"]


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_policy_allows_more_kinds(kind: str) -> None:
    """Each by its name; what no volume of that kind could be written to stays refused."""
    options = Options(cluster=ClusterPolicy(volumes=(kind,)))
    volume = {"volumeSource": {kind: FOREIGN[kind]}}

    assert "True" == spec_valid(stored(input=volume), options)["status"]
    written = spec_valid(stored(output=volume), options)
    assert ("False" if kind == "image" else "True") == written["status"]


def test_secrets_are_no_volume_under_any_policy(tmp_path: Path) -> None:
    """The policy file says so, with the kinds that it may name."""
    for kind in ("secret", "projected", "downwardAPI", "hostPath"):
        policy = tmp_path / "policy.yaml"
        policy.write_text(f"cluster: {{volumes: [{kind}]}}")
        with pytest.raises(SpecError, match="'azureFile'"):
            with_policy(Options(), policy)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([*FOREIGN, *NEVER]), st.sets(st.sampled_from([*FOREIGN])))
def test_no_other_kind_is_allowed_by_the_policy(kind: str, more: set[Any]) -> None:
    """Exactly those that it lists."""
    options = Options(cluster=ClusterPolicy(volumes=tuple(more)))
    item = stored(input={"volumeSource": {kind: {}}})

    assert (kind not in more) == bool(allowed.problems(item, options))


@pytest.mark.parametrize(
    ("place", "volume", "said"),
    [
        ("input", {"persistentVolumeClaim": {}}, "needs claimName"),
        ("input", {"persistentVolumeClaim": "data"}, "needs claimName"),
        ("input", {"persistentVolumeClaim": {"claimName": "../other"}}, "not a valid name"),
        ("input", {"persistentVolumeClaim": {"claimName": "a", "subPath": "../.."}}, "subPath"),
        ("input", {"persistentVolumeClaim": {"claimName": "a"}, "configMap": {}}, "more than one"),
        ("input", {"configMap": {"items": []}}, "needs name"),
        ("output", {"persistentVolumeClaim": {"claimName": "a", "readOnly": True}}, "written"),
    ],
)
def test_a_claim_that_no_pod_could_mount_is_refused_before_a_node(
    place: str, volume: Any, said: str
) -> None:
    """The API server, or the end of the training, would find out later."""
    found = spec_valid(stored(**{place: {"volumeSource": volume}}))

    assert "False" == found["status"] and said in found["message"]


def test_an_adapter_is_not_written_to_a_config_map() -> None:
    found = spec_valid(stored(output={"volumeSource": {"configMap": {"name": "a"}}}))

    assert "cannot be written" in found["message"]
    assert (
        "True" == spec_valid(stored(input={"volumeSource": {"configMap": {"name": "a"}}}))["status"]
    )
    assert (
        "True"
        == spec_valid(stored(input={"volumeSource": CLAIM}, output={"volumeSource": CLAIM}))[
            "status"
        ]
    )


# wishes


def test_preferred_nodes_are_preferred() -> None:
    """Beside the labels that are required, for a Job and a server."""
    for item in (stored(), serving()):
        item["resource"] |= {"preferredNodes": ["gpu-1", "gpu-2.corp"]}
        affinity = pod_of(item)["affinity"]["nodeAffinity"]

        (terms,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert "apps" == terms["matchExpressions"][0]["key"]
        preferred = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
        fields = [each["preference"]["matchFields"][0] for each in preferred]
        assert [["gpu-1"], ["gpu-2.corp"]] == [each["values"] for each in fields]
        assert {"metadata.name"} == {each["key"] for each in fields}


def test_a_preferred_node_has_the_name_of_a_node() -> None:
    item = stored()
    item["resource"] |= {"preferredNodes": ["Not A Node"]}

    assert "resource.preferredNodes[0]" in spec_valid(item)["message"]


def said(item: Object, *, options: Options | None = None) -> str:
    found = spec_valid(item, options)
    assert "True" == found["status"], found
    return str(found["message"])


def test_what_has_no_effect_is_named_in_the_status() -> None:
    """Reserved labels, KAITO's fields and annotations, secrets for nothing; served or tuned."""
    item = stored(
        preset={"name": "phi-4", "accessMode": "private"},
        output={"volumeSource": CLAIM, "imagePushSecret": "push"},
    )
    item["resource"] = {
        "labelSelector": {
            "matchLabels": {"gpu": "yes", "kaito.sh/workspace": "x"},
            "matchExpressions": [
                {"key": "karpenter.kaito.sh/y", "operator": "In", "values": ["z"]}
            ],
        }
    }
    item["metadata"]["annotations"] = {
        "kaito.sh/node-class-name": "gold",
        "kaito.sh/bypass-resource-checks": "true",
        "kaito.sh/runtime": "vllm",
        "example.com/other": "x",
    }
    message = said(item)

    for each in (
        "kaito.sh/workspace is reserved",
        "karpenter.kaito.sh/y is reserved",
        "node-class-name",
        "bypass-resource-checks",
        "has no effect without inference",
        "accessMode",
        "tuning.output.imagePushSecret",
    ):
        assert each in message, each
    assert "gpu" not in message and "example.com" not in message
    served = serving(
        adapters=[{"source": {"name": "a", "volumeSource": CLAIM, "imagePullSecrets": ["x"]}}],
        config="vllm-options",
    )
    served["resource"]["labelSelector"]["matchLabels"]["kaito.sh/x"] = "y"
    message = said(served)
    assert "kaito.sh/x is reserved" in message and "inference.config" in message
    assert "inference.adapters[0].source.imagePullSecrets" in message
    assert "the Workspace is valid" == said(stored())


def test_the_message_stays_while_the_job_runs() -> None:
    """Then the spec is not read again."""
    item = stored(preset={"name": "phi-4", "accessMode": "private"})
    first = said(item)
    desired = desired_tuning.read_brief(item, None)
    stored_condition = {"type": "SpecValid", "status": "True", "reason": "SpecValid"}
    stored_condition |= {"message": first, "lastTransitionTime": "2026-01-01T00:00:00Z"}
    item["status"] = {"revision": desired.revision, "conditions": [stored_condition]}
    meta = {"name": "j", "uid": "j", "creationTimestamp": "2026-01-01T00:00:00Z"}
    decision = decide(Observed(item, desired, NOW, job={"metadata": meta}), Options())

    assert decision.status is not None
    assert first == (condition({"status": decision.status}, "SpecValid") or {})["message"]


# classes


def test_classes_are_the_administrators_and_those_of_their_list(tmp_path: Path) -> None:
    """Options for all pods; an annotation for one of the policy's."""
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "data: {allowHosts: [minio.store]}\nregistry: {provenance: 'off'}\n"
        "cluster: {runtimeClasses: [gvisor], priorityClasses: [low, high]}\n"
    )
    options = with_policy(Options(runtime_class="nvidia"), policy)
    Policy.load(policy), Trust.load(policy)  # the engine reads its own sections of it
    for item in (stored(), serving()):
        pod = pod_of(item, options)
        assert ("nvidia", None) == (pod["runtimeClassName"], pod.get("priorityClassName"))
        item["metadata"]["annotations"] = {
            "tuning.kaito.sh/runtime-class": "gvisor",
            "tuning.kaito.sh/priority-class": "high",
        }
        assert "True" == spec_valid(item, options)["status"]
        pod = pod_of(item, options)
        assert ("gvisor", "high") == (pod["runtimeClassName"], pod["priorityClassName"])


@pytest.mark.parametrize("name", ["runtime-class", "priority-class"])
def test_a_class_that_the_policy_does_not_list_is_refused(name: str) -> None:
    """A tenant must not preempt others, nor leave a sandbox."""
    item = stored()
    item["metadata"]["annotations"] = {f"tuning.kaito.sh/{name}": "system-node-critical"}
    found = spec_valid(item, Options(cluster=ClusterPolicy(priority_classes=("low",))))

    assert ("False", "ClassForbidden") == (found["status"], found["reason"])
    assert "system-node-critical" in found["message"] and "administrator" in found["message"]


def test_a_server_of_an_earlier_operator_is_not_started_again() -> None:
    """Its fingerprint counts a class only where there is one."""
    item = serving()
    plain = desired_inference.read(item, None, None).server
    item["metadata"]["annotations"] = {"tuning.kaito.sh/priority-class": "high"}
    other = desired_inference.read(item, None, None).server

    assert plain and other and plain.fingerprint != other.fingerprint
    assert "class" not in json.dumps(sorted(k for k in vars(plain) if vars(plain)[k] is not None))


# egress


@pytest.mark.parametrize("item", [stored(), serving()], ids=["job", "server"])
def test_pods_of_the_cluster_are_reached_by_selector_too(item: Object) -> None:
    """On the same ports as addresses; in the policy's namespaces at every port."""
    options = Options(cluster=ClusterPolicy(namespaces=("registry", "minio")))
    if item.get("tuning"):
        desired = desired_tuning.read(item, None, None)
        policy = job_manifests.network_policy(item, desired, options)
    else:
        desired = desired_inference.read(item, None, None)
        policy = job_manifests.server_policy(item, desired, options)
    client.V1NetworkPolicy.model_validate(policy)
    _, addresses, pods, *namespaces = policy["spec"]["egress"]

    assert addresses["ports"] == pods["ports"]
    assert [{"namespaceSelector": {}}] == pods["to"]
    found = [each["to"][0]["namespaceSelector"]["matchLabels"] for each in namespaces]
    assert [{"kubernetes.io/metadata.name": name} for name in ("registry", "minio")] == found
    assert all("ports" not in each for each in namespaces)


# gated bases


@pytest.mark.parametrize(
    "item", [stored(preset=GEMMA), serving(preset=GEMMA)], ids=["tune", "serve"]
)
def test_a_gated_base_without_a_token_is_refused_before_a_node(item: Object) -> None:
    """With where to accept the licence and where to name the Secret; not where it may be had."""
    section = "tuning" if "tuning" in item else "inference"
    found = spec_valid(item)

    assert ("False", "BaseModelGated") == (found["status"], found["reason"])
    assert "https://huggingface.co/google/gemma-3-4b-it" in found["message"]
    assert f"{section}.preset.presetOptions.modelAccessSecret" in found["message"]
    mirror = Options.model_validate({"environment": {"HF_ENDPOINT": "https://hub.corp"}})
    cached = Options.model_validate({"storage": {"cacheClaim": "models"}})
    for options in (mirror, cached):
        assert not allowed.problems(item, options)
    item[section]["preset"] = GEMMA | {"presetOptions": {"modelAccessSecret": "hub"}}
    assert not allowed.problems(item, Options())


@pytest.mark.parametrize("name", ["google/gemma-3-4b-it", "GEMMA-3-4B-instruct"])
def test_it_is_gated_under_each_of_its_names(name: str) -> None:
    """The hub's, and the preset's in any case; what is not gated needs nothing."""
    assert ["JOB-106"] == [
        p.code for p in allowed.problems(stored(preset={"name": name}), Options())
    ]
    assert not allowed.problems(stored(preset={"name": "org/unknown"}), Options())


def test_the_labels_that_choose_a_node_are_those_that_are_not_reserved() -> None:
    item = stored()
    item["resource"]["labelSelector"]["matchLabels"] |= {"kaito.sh/workspace": "x", "gpu": "a"}

    assert {"apps": "phi", "gpu": "a"} == names.node_selector(item)
