"""What is created for a Workspace, against the typed models of the newest client: no cluster."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.world import config_map, workspace
from kubernetes import client

from jobs import render
from jobs.api import cel, crd
from jobs.api.options import Nodes, Options, Storage, load, with_policy
from jobs.desired import allowed, names
from jobs.desired import tuning as desired_tuning
from jobs.manifests import job as job_manifests
from jobs.manifests import pod
from jobs.observed import site
from tuning.errors import REASONS, RETRYABLE, SpecError
from tuning.pipeline.options import JOB_DATA_SECRET, JOB_TRACKER_SECRET

UID = "11111111-2222-3333-4444-555555555555"
ROOT = Path(__file__).parents[2]
STRICT = {
    "Job": client.V1Job,
    "PersistentVolumeClaim": client.V1PersistentVolumeClaim,
    "NetworkPolicy": client.V1NetworkPolicy,
    "CustomResourceDefinition": client.V1CustomResourceDefinition,
    "Deployment": client.V1Deployment,
    "Role": client.V1Role,
    "ClusterRole": client.V1ClusterRole,
    "RoleBinding": client.V1RoleBinding,
    "ClusterRoleBinding": client.V1ClusterRoleBinding,
    "ServiceAccount": client.V1ServiceAccount,
    "ConfigMap": client.V1ConfigMap,
    "Namespace": client.V1Namespace,
}


def stored(name: str = "phi", **tuning: Any) -> dict[str, Any]:
    found = workspace(name, "team", **tuning)
    found["metadata"] |= {"uid": UID, "generation": 1}
    return found


def job_of(item: dict[str, Any], options: Options | None = None, *, claim: bool = True) -> Any:
    desired = desired_tuning.read(item, None, None)
    assert desired.spec is not None, desired.problems
    return job_manifests.job(item, desired, options or Options(), claim=claim, earlier=())


def strict(item: dict[str, Any]) -> None:
    """Unknown fields, wrong types and missing fields are refused at every depth."""
    STRICT[item["kind"]].model_validate(item)


def random_workspace(chance: random.Random) -> dict[str, Any]:
    pick = chance.choice
    inputs = [
        {"urls": ["https://data.example.com/a.jsonl", "http://data.example.com:8000/b.jsonl"]},
        {"image": "registry.example.com:5000/data:1", "imagePullSecrets": ["one", "two"]},
        {"volumeSource": {"persistentVolumeClaim": {"claimName": "data"}}},
    ]
    image = {"image": f"localhost:{chance.randint(1024, 65000)}/a:1", "imagePushSecret": "push"}
    volume = {"volumeSource": {"persistentVolumeClaim": {"claimName": "out"}}}
    item = stored(
        pick(["a", "x" * 63, "phi-3"]),
        method=pick(["lora", "QLoRA"]),
        preset={
            "name": pick(["phi-3-mini-4k-instruct", "org/some-model", "phi-4"]),
            **({"presetOptions": {"modelAccessSecret": "hub"}} if chance.random() < 0.5 else {}),
        },
        input=pick(inputs),
        output=pick([image, volume, image | volume]),
    )
    if chance.random() < 0.5:
        item["resource"] = {"labelSelector": {"matchLabels": {"gpu": "yes", "kaito.sh/x": "y"}}}
    if chance.random() < 0.5:
        item["metadata"]["labels"] = {desired_tuning.QUEUE: "team-queue", "other": "label"}
    return item


def test_200_random_workspaces_give_strict_and_restricted_objects() -> None:
    """Every object passes the strict models, every pod the restricted security standard."""
    chance = random.Random(7)
    for _ in range(200):
        item = random_workspace(chance)
        options = Options(
            nodes=Nodes(provision=chance.random() < 0.5),
            storage=Storage(cache_claim=chance.choice([None, "models"])),
            policy=chance.choice([None, "data: {}\n"]),
        )
        desired = desired_tuning.read(item, None, None)
        assert desired.spec is not None, desired.problems
        claim = chance.random() < 0.5
        found = job_manifests.job(
            item, desired, options, claim=claim, earlier=("sha256:" + "0" * 64,)
        )
        strict(found)
        strict(job_manifests.run_claim(item, desired, options))
        strict(job_manifests.network_policy(item, desired, options))
        restricted(found["spec"]["template"]["spec"])
        assert len(found["metadata"]["name"]) <= 63
        assert all(len(v) <= 63 for v in found["metadata"]["labels"].values())
        assert "other" not in found["metadata"]["labels"]


def restricted(spec: dict[str, Any]) -> None:
    """The pod security standard *restricted*, and what else a run must not have."""
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & spec.keys()
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True and context["runAsUser"] > 0
    assert {"type": "RuntimeDefault"} == context["seccompProfile"]
    kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"projected", "emptyDir", "persistentVolumeClaim"}
    (container,) = spec["containers"]
    assert {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    } == container["securityContext"]
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    assert {"memory", "ephemeral-storage"} <= limits.keys() and "cpu" in requests
    assert not {"env" for each in container["env"] if "valueFrom" in each}


def test_secrets_are_files_and_nothing_else() -> None:
    """Names of Secrets stand in the projected volume only, each by its use."""
    item = stored(
        preset={"name": "phi-4", "presetOptions": {"modelAccessSecret": "hub-s"}},
        input={"image": "registry.example.com/data:1", "imagePullSecrets": ["pull-a", "pull-b"]},
    )
    spec = job_of(item)["spec"]["template"]["spec"]
    (projected,) = [v["projected"] for v in spec["volumes"] if "projected" in v]
    paths = {
        source["secret"]["name"]: source["secret"]["items"][0]["path"]
        for source in projected["sources"]
        if "secret" in source
    }
    assert {
        "push": "secrets/push/.dockerconfigjson",
        "pull-a": "secrets/pull/.dockerconfigjson",
        "pull-b": "secrets/pull/1/.dockerconfigjson",
        "hub-s": "secrets/hub/HF_TOKEN",
    } == paths
    assert "hub-s" not in str(spec["containers"])


def test_the_data_secret_is_mounted_whole_where_the_engine_looks() -> None:
    """Its keys are nobody's to list: names of hosts, or of an object store. Only URLs need it."""
    item = stored(input={"urls": ["s3://rows/a.jsonl"]})
    item["metadata"].setdefault("annotations", {})["tuning.kaito.sh/data-secret"] = "rows"

    pod = job_of(item)["spec"]["template"]["spec"]

    (volume,) = [v for v in pod["volumes"] if v["name"] == "data-secret"]
    assert "rows" == volume["secret"]["secretName"]
    (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "data-secret"]
    assert (str(JOB_DATA_SECRET), True) == (mount["mountPath"], mount["readOnly"])


REPORTS = """
training_config:
  TrainingArguments:
    report_to: {}
    mlflow_tracking_uri: http://mlflow.mlops:5000
    wandb_base_url: https://wandb.example.com:8443
"""


@pytest.mark.parametrize(
    ("report_to", "ports", "mounted"),
    [("[mlflow, wandb]", [443, 5000, 8443], True), ("none", [443], False)],
)
def test_a_job_reaches_its_trackers_with_their_secret(
    report_to: str, ports: list[int], mounted: bool
) -> None:
    """The whole Secret is where the engine looks, and the ports of its trackers are let out."""
    item = stored(config="settings")
    item["metadata"].setdefault("annotations", {})["tuning.kaito.sh/tracker-secret"] = "logins"
    settings = config_map("settings", "team", REPORTS.format(report_to))
    desired = desired_tuning.read(item, settings, None)
    assert desired.spec is not None, desired.problems
    job = job_manifests.job(item, desired, Options(), claim=True, earlier=())
    policy = job_manifests.network_policy(item, desired, Options())

    strict(job)
    spec = job["spec"]["template"]["spec"]
    found = [v["secret"]["secretName"] for v in spec["volumes"] if v["name"] == "tracker-secret"]
    assert (["logins"] if mounted else []) == found
    places = [m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "tracker-secret"]
    expected = [(str(JOB_TRACKER_SECRET), True)] if mounted else []
    assert expected == [(m["mountPath"], m["readOnly"]) for m in places]
    assert ports == [port["port"] for port in policy["spec"]["egress"][1]["ports"]]


def test_the_failure_policy_is_the_table_of_exit_codes() -> None:
    """What would fail again fails now; a stop or a disruption costs no try."""
    spec = job_of(stored())["spec"]
    disruption, stopped, permanent = spec["podFailurePolicy"]["rules"]
    assert "DisruptionTarget" == disruption["onPodConditions"][0]["type"]
    assert [75] == stopped["onExitCodes"]["values"]
    assert [1, 2, 10, 11, 12, 13, 14] == permanent["onExitCodes"]["values"]
    assert set(REASONS) == {0, 75, 20} | set(permanent["onExitCodes"]["values"])
    assert {20, 75} == RETRYABLE
    assert ("Ignore", "Ignore", "FailJob") == tuple(
        rule["action"] for rule in (disruption, stopped, permanent)
    )
    assert "Failed" == spec["podReplacementPolicy"]
    assert "Never" == spec["template"]["spec"]["restartPolicy"]


def test_the_snapshot_is_read_back_as_the_same_spec() -> None:
    """What the pod's annotation holds is what the operator planned, ConfigMap included."""
    from tuning import spec

    text = "training_config:\n  TrainingArguments:\n    seed: 7\n"
    item, config = stored(config="mine"), config_map("mine", "team", text)
    desired = desired_tuning.read(item, config, None)
    assert desired.spec is not None
    earlier = ("sha256:" + "1" * 64,)  # pushed before: the engine may replace it
    found = job_manifests.job(item, desired, Options(), claim=True, earlier=earlier)
    snapshot = found["spec"]["template"]["metadata"]["annotations"][pod.SNAPSHOT]
    again = spec.parse(snapshot, origin="annotation")
    assert 7 == again.settings.seed
    assert replace(desired.spec.destination, earlier=earlier) == again.destination


def test_a_job_name_tells_uids_and_edits_apart_and_nothing_else() -> None:
    """Stable under defaults, status, labels and case of the method; new for a UID or an edit."""
    item = stored()
    same = copy.deepcopy(item)
    same["metadata"] |= {"labels": {"a": "b"}, "resourceVersion": "9"}
    same["status"] = {"state": "Failed"}
    same["tuning"]["method"] = "QLORA"
    same["tuning"]["preset"] = {**same["tuning"]["preset"], "accessMode": "public"}
    assert desired_tuning.revision(item) == desired_tuning.revision(same)
    other = copy.deepcopy(item)
    other["metadata"]["uid"] = UID.replace("1", "9")
    edited = stored(config="other")
    assert 3 == len({desired_tuning.revision(each) for each in (item, other, edited)})


@pytest.mark.parametrize("kind", ["hostPath", "secret", "projected", "iscsi"])
def test_a_tenant_names_no_volume_of_others(kind: str) -> None:
    """The node's disk and Secrets are no data source."""
    item = stored(input={"volumeSource": {kind: {"path": "/etc", "secretName": "x"}}})
    assert [("tuning.input.volumeSource", kind)] == allowed.forbidden_volumes(item, Options())


def test_the_run_volume_is_as_large_as_the_plan_says() -> None:
    """Weights unless a cache keeps them, more for a larger rank; a bought disk holds all of it."""

    def size(options: Options | None = None, rank: int = 8, model: str = "phi-4") -> int:
        text = f"training_config:\n  LoraConfig: {{r: {rank}, lora_alpha: {rank}}}\n"
        item = stored(config="mine", preset={"name": model})
        desired = desired_tuning.read(item, config_map("mine", "team", text), None)
        claim = job_manifests.run_claim(item, desired, options or Options())
        return int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi"))

    cached = Options(storage=Storage(cache_claim="models"))
    # two bytes of each of 14.7 billion parameters, and QLoRA's packed copy of them
    assert 36 <= size() - size(cached) <= 39
    assert size() < size(rank=256)
    assert size(model="phi-3-mini-4k-instruct") < size()


def test_the_network_policy_closes_metadata_services() -> None:
    """Out to the ports of data and registry, in from the operator only."""
    item = stored(input={"urls": ["https://d.example.com:8443/a.jsonl"]})
    desired = desired_tuning.read(item, None, None)
    spec = job_manifests.network_policy(item, desired, Options())["spec"]
    closed = {each for to in spec["egress"][1]["to"] for each in to["ipBlock"]["except"]}
    assert {"169.254.0.0/16", "168.63.129.16/32", "fd00:ec2::254/128"} <= closed
    assert [443, 8443] == [port["port"] for port in spec["egress"][1]["ports"]]
    assert [{"protocol": "TCP", "port": 8080}] == spec["ingress"][0]["ports"]


def test_a_bought_machine_is_what_the_workspace_names() -> None:
    """Type, labels, taint, disk from the model, and no disruption, also while it waits."""
    item = stored()
    desired = desired_tuning.read(item, None, None)
    options = Options(nodes=Nodes(provision=True))
    claim = job_manifests.node_claim(item, desired, options, attempt=1)
    wants = {each["key"]: each["values"] for each in claim["spec"]["requirements"]}
    assert ["Standard_NC24ads_A100_v4"] == wants["node.kubernetes.io/instance-type"]
    assert "true" == claim["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"]
    assert "Gi" in claim["spec"]["resources"]["requests"]["storage"]
    spec = job_manifests.job(item, desired, options, claim=True, earlier=())["spec"]["template"][
        "spec"
    ]
    terms = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    keys = {e["key"] for e in terms["nodeSelectorTerms"][0]["matchExpressions"]}
    assert {"apps", names.WORKSPACE_LABEL, names.NAMESPACE_LABEL} == keys


def test_nodes_say_which_gpu_they_have() -> None:
    """By the labels of NVIDIA's operator, also for a GPU that is in no table."""

    def node(**labels: str) -> dict[str, Any]:
        named = {f"nvidia.com/{k.replace('__', '.')}": v for k, v in labels.items()}
        return {"metadata": {"name": "n", "labels": named}}

    known = node(gpu__product="NVIDIA-A100-SXM4-80GB", gpu__memory="81920", gpu__count="4")
    odd = node(gpu__product="X9", gpu__memory="1024")
    odd["metadata"]["labels"] |= {
        "nvidia.com/cuda.compute.major": "9",
        "nvidia.com/cuda.compute.minor": "0",
    }
    found = site.device_of_nodes([node(), odd, known])
    assert found is not None
    assert (4, 81920 << 20, True) == (found.count, found.memory_bytes, found.bf16)
    assert "X9" == site.device_of_nodes([odd]).name  # type: ignore[union-attr]
    assert site.device_of_nodes([node(gpu__product="unknown")]) is None


# the CRD and the files of configs/deploy


def test_the_crd_is_structural_and_described() -> None:
    """Typed, without references, and a sentence for each field of the spec."""
    strict(crd.definition())
    missing = []

    def walk(node: dict[str, Any], path: str) -> None:
        assert "type" in node, path
        assert not {"$ref", "anyOf", "const", "title"} & node.keys(), path
        for name, each in node.get("properties", {}).items():
            if "description" not in each and path != "" and "conditions" not in path:
                missing.append(f"{path}.{name}")
            walk(each, f"{path}.{name}")
        if "items" in node:
            walk(node["items"], f"{path}[]")

    for version in ("v1alpha1", "v1beta1"):
        walk(crd.schema(version), "")
    assert [] == missing
    alpha, beta = (crd.schema(v)["properties"]["resource"]["properties"] for v in
                   ("v1alpha1", "v1beta1"))  # fmt: skip
    assert "partition" not in alpha and "partition" in beta
    assert "default" in alpha["instanceType"] and "default" not in beta["instanceType"]


def test_every_rule_has_its_place() -> None:
    """A rule for a field that is gone would be an error, not a silence."""
    for path in (*cel.RULES, *cel.BETA_RULES):
        node = crd.schema("v1beta1")
        for step in path:
            node = node["items"] if step == "*" else node["properties"][step]
        assert node["x-kubernetes-validations"]


def _rendered(folder: str) -> list[dict[str, Any]]:
    import shutil

    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed: the kustomizations are not rendered here")
    done = subprocess.run(
        ["kubectl", "kustomize", str(ROOT / "configs/deploy" / folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return [each for each in yaml.safe_load_all(done.stdout) if each]


@pytest.mark.parametrize("folder", [".", "namespaced", "provisioning"])
def test_deployments_pass_the_strict_models(folder: str) -> None:
    """And the operator's own pods are restricted, with two replicas."""
    found = _rendered(folder)
    for each in found:
        strict(each)
    (deployment,) = [each for each in found if each["kind"] == "Deployment"]
    assert 2 == deployment["spec"]["replicas"]
    spec = deployment["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
    (options,) = [each for each in found if each["kind"] == "ConfigMap"]
    given = yaml.safe_load(options["data"]["options.yaml"])
    assert Options.model_validate(given).nodes.provision is (folder == "provisioning")


@pytest.mark.parametrize("folder", [".", "namespaced", "provisioning"])
def test_no_role_says_more_than_it_must(folder: str) -> None:
    """No wildcard, no Secret, no pods/exec, no impersonation, nothing that makes rights."""
    for role in (each for each in _rendered(folder) if each["kind"] in ("Role", "ClusterRole")):
        for rule in role["rules"]:
            assert "*" not in (*rule["apiGroups"], *rule["resources"], *rule["verbs"])
            assert not {"secrets", "pods/exec", "roles"} & set(rule["resources"])
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])
            if "nodes" in rule["resources"]:
                assert ["list"] == rule["verbs"]


# the command line


def test_render_prints_what_would_be_created(tmp_path: Path) -> None:
    """Claim, policy and Job of an example, strict."""
    text = (ROOT / "examples/workspace-tuning-config.yaml").read_text()
    file = tmp_path / "workspace.yaml"
    file.write_text(text)
    found = render.render(file, Options(), namespace="team")
    assert ["PersistentVolumeClaim", "NetworkPolicy", "Job"] == [each["kind"] for each in found]
    for each in found:
        strict(each)
        assert "team" == each["metadata"]["namespace"]


def test_options_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    """All problems of the file in one pass."""
    file = tmp_path / "options.yaml"
    file.write_text("imagee: x\nnodes: {launchSeconds: 0}\n")
    with pytest.raises(SpecError) as caught:
        load(file)
    assert {"imagee", "nodes.launchSeconds"} == {p.where for p in caught.value.problems}


def test_files_that_the_policy_names_travel_with_it(tmp_path: Path) -> None:
    """A CA and a cosign key, as annotations that are mounted beside it; never a private key."""
    policy = tmp_path / "policy.yaml"
    text = (
        "data: {caBundle: corp.pem}\nregistry: {signatures: require, keys: [cosign.pub, /in.pub]}"
    )
    policy.write_text(text)
    (tmp_path / "corp.pem").write_text("-----BEGIN CERTIFICATE-----")
    (tmp_path / "cosign.pub").write_text("-----BEGIN PUBLIC KEY-----")
    options = with_policy(Options(), policy)
    template = job_of(stored(), options)["spec"]["template"]
    notes = template["metadata"]["annotations"]
    (projected,) = [v["projected"] for v in template["spec"]["volumes"] if "projected" in v]
    (items,) = [s["downwardAPI"]["items"] for s in projected["sources"] if "downwardAPI" in s]
    mounted = {item["path"]: notes[item["fieldRef"]["fieldPath"].split("'")[1]] for item in items}
    del mounted["workspace.yaml"]
    assert {
        "policy.yaml": text,
        "corp.pem": "-----BEGIN CERTIFICATE-----",
        "cosign.pub": "-----BEGIN PUBLIC KEY-----",
    } == mounted

    (tmp_path / "corp.pem").write_text("-----BEGIN PRIVATE KEY-----")
    (tmp_path / "cosign.pub").unlink()
    with pytest.raises(SpecError, match="JOB-105") as caught:
        with_policy(Options(), policy)
    assert 2 == len(caught.value.problems)
    policy.write_text("data: {alowHosts: [x]}")
    with pytest.raises(SpecError, match="allowHosts"):
        with_policy(Options(), policy)


def test_the_cluster_side_loads_no_torch() -> None:
    """The operator's image has none."""
    rooms = "jobs.controller.operator, jobs.render, jobs.__main__"
    code = f"import sys, {rooms}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "False" == done.stdout.strip()


def test_annotations_change_what_the_cluster_does() -> None:
    """GPUs and deadline, checked by the spec: a wrong value never reaches a manifest."""
    item = stored()
    item["metadata"]["annotations"] = {
        "tuning.kaito.sh/gpus": "0",
        "tuning.kaito.sh/deadline-seconds": "3600",
        "kubectl.kubernetes.io/last-applied-configuration": "{}",
    }
    found = job_of(item)
    assert 3600 == found["spec"]["activeDeadlineSeconds"]
    resources = found["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert "nvidia.com/gpu" not in resources["limits"]
    assert "last-applied" not in str(found)
    item["metadata"]["annotations"]["tuning.kaito.sh/deadline-seconds"] = "soon"
    assert ["SPEC-104"] == [p.code for p in desired_tuning.read(item, None, None).problems]


def test_every_gpu_of_the_machine_or_as_many_as_the_plan_uses() -> None:
    """A machine's count where there is no plan; the plan's ranks where there is one."""
    item = stored(preset={"name": "org/some-model"})
    item["resource"]["instanceType"] = "Standard_NC48ads_A100_v4"
    desired = desired_tuning.read(item, None, None)
    assert desired.plan is None and "PLAN" not in desired.plan_unknown and desired.plan_unknown
    assert 2 == desired.gpus
    planned = desired_tuning.read(stored(), None, None)
    assert planned.plan is not None
    assert planned.plan.placement.ranks == planned.gpus
