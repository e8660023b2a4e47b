"""What serves a Workspace, and what it says of itself: pure, no cluster."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from inference_workspaces import adapter, command, workspace
from kubernetes import client

from jobs import render
from jobs.api.kinds import DEPLOYMENT, JOB, NODE_CLAIM, Object
from jobs.api.options import Nodes, Options, Storage
from jobs.controller.decide import decide
from jobs.desired import inference as desired_inference
from jobs.desired import names
from jobs.desired import tuning as desired_tuning
from jobs.desired.tuning import Adapter, Server
from jobs.manifests import job as job_manifests
from jobs.manifests import server as server_manifests
from jobs.observed import objects, observe, status
from jobs.observed.phase import Observed, Phase, phase_of
from tuning.errors import SpecError

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DIGEST = "sha256:" + "ab" * 32
TYPES = {
    "Deployment": client.V1Deployment,
    "Service": client.V1Service,
    "NetworkPolicy": client.V1NetworkPolicy,
    "PersistentVolumeClaim": client.V1PersistentVolumeClaim,
}


def both(**inference: Any) -> Object:
    """Tuned, and to be served."""
    found = workspace()
    found["inference"] = inference
    found["tuning"] = {
        "preset": {"name": "phi-3-mini-4k-instruct"},
        "method": "qlora",
        "input": {"urls": ["https://data.example.com/train.jsonl"]},
        "output": {"image": "registry.example.com/team/a:1", "imagePushSecret": "push"},
    }
    return found


def observed_of(
    item: Object, *, pod: Object | None = None, made: bool = True, **more: Any
) -> Observed:
    """What an operator sees of `item`, with everything made as it should be."""
    desired = desired_inference.read(item, None, None)
    server = service = None
    if made and desired.server:
        server = server_manifests.deployment(item, desired, Options(), claim=False)
        service = server_manifests.service(item, desired)
    given: dict[str, Any] = {"storage": False, "server": server, "service": service} | more
    return Observed(item, desired, NOW, serving=True, pods=(pod,) if pod else (), **given)


def pod_in(
    state: Object, *, ready: bool = False, last: Object | None = None, **more: Any
) -> Object:
    container = {"name": "tuning", "state": state, "lastState": last or {}}
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    return {
        "metadata": {"name": "p", "uid": "1", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"nodeName": "n"},
        "status": {"conditions": conditions, "containerStatuses": [container]} | more,
    }


RUNNING: Object = {"running": {}}


def status_of(observed: Observed, options: Options | None = None) -> Object:
    options = options or Options()
    return status.status(observed, phase_of(observed, options), options)


def inference_ready(found: Object) -> tuple[str, str]:
    each = objects.condition({"status": found}, "InferenceReady")
    assert each is not None
    return each["status"], each["reason"]


# what is made


@pytest.mark.parametrize("runtime", ["transformers", "vllm"])
@pytest.mark.parametrize("cache", [None, "models"])
def test_objects_are_strict_and_pods_restricted(runtime: str, cache: str | None) -> None:
    """Nothing unknown in them; no root, no token, no Secret outside of files."""
    item = workspace(
        annotations={desired_inference.RUNTIME: runtime},
        adapters=[
            adapter("a", image="registry.example.com:5000/a:1", imagePullSecrets=["one", "two"]),
            adapter("b", volumeSource={"persistentVolumeClaim": {"claimName": "b"}}),
        ],
    )
    item["inference"]["preset"]["presetOptions"] = {"modelAccessSecret": "hub-s"}
    options = Options(vllm_image="vllm:1", storage=Storage(cache_claim=cache), policy="{}")
    desired = desired_inference.read(item, None, None)
    assert desired.server, desired.problems
    deployment = server_manifests.deployment(item, desired, options, claim=True)
    policy = job_manifests.server_policy(item, desired, options)
    for each in (deployment, server_manifests.service(item, desired), policy):
        TYPES[each["kind"]].model_validate(each)
    spec = deployment["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    for container in (*spec["containers"], *spec.get("initContainers", ())):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert ["ALL"] == container["securityContext"]["capabilities"]["drop"]
        assert "one" not in str(container["command"]) and "hub-s" not in str(container)
    mounted = [each["name"] for each in spec["containers"][0]["volumeMounts"]]
    assert set(mounted) <= {each["name"] for each in spec["volumes"]}
    ports = [port["port"] for port in policy["spec"]["egress"][1]["ports"]]
    assert [443, 5000] == ports


def test_the_server_pulls_and_weighs_the_adapters_itself() -> None:
    """Names, places and strengths as the Workspace says them; together called as it."""
    found = command(workspace(adapters=[adapter("a", "0.5"), adapter("b"), adapter("c", "0")]))
    given = [found[i + 1] for i, word in enumerate(found) if word == "--adapter"]
    where = "registry.example.com"
    assert [f"a={where}/a:1@0.5", f"b={where}/b:1", f"c={where}/c:1@0"] == given
    assert "wk" == found[found.index("--name") + 1]
    assert "phi-3-mini-4k-instruct" == found[found.index("--base-name") + 1]
    found = command(workspace(adapters=[adapter("wk"), adapter("b")]))
    assert "wk-all" == found[found.index("--name") + 1]


def test_only_a_key_opens_the_door_to_other_namespaces() -> None:
    """Without one: the namespace, and the operator. A load balancer without one is refused."""
    item = workspace()
    policy = job_manifests.server_policy(item, desired_inference.read(item, None, None), Options())
    assert {"podSelector": {}} in policy["spec"]["ingress"][0]["from"]
    item["metadata"]["annotations"] = {desired_inference.LOAD_BALANCER: "True"}
    assert ["SPEC-121"] == [p.code for p in desired_inference.read(item, None, None).problems]
    item["inference"]["apiKeySecret"] = "door"
    desired = desired_inference.read(item, None, None)
    policy = job_manifests.server_policy(item, desired, Options())
    assert "from" not in policy["spec"]["ingress"][0]
    assert "LoadBalancer" == server_manifests.service(item, desired)["spec"]["type"]
    found = command(item)
    assert "/etc/tuning/secrets/api/key" == found[found.index("--api-key-file") + 1]


def test_vllm_gets_a_module_for_each_adapter_and_room_for_their_rank() -> None:
    """Settings of the ConfigMap beat the bound; each image has its init container."""
    item = workspace(
        annotations={desired_inference.RUNTIME: "vllm"},
        config="mine",
        adapters=[adapter("a"), adapter("b")],
    )
    text = "vllm: {max-lora-rank: 100, enforce-eager: true, gpu-memory-utilization: 0.8}"
    config = {"metadata": {"name": "mine"}, "data": {desired_inference.CONFIG_KEY: text}}
    desired = desired_inference.read(item, config, None)
    assert desired.server, desired.problems
    options = Options(vllm_image="vllm:1")
    spec = server_manifests.deployment(item, desired, options, claim=False)["spec"]["template"][
        "spec"
    ]
    found = " ".join(spec["containers"][0]["command"])
    assert "--enable-lora --max-loras=2 --max-lora-rank=128" in found
    assert "--lora-modules a=/adapters/a b=/adapters/b" in found
    assert found.endswith("--enforce-eager --gpu-memory-utilization=0.8")
    assert ["pull-0", "pull-1"] == [each["name"] for each in spec["initContainers"]]
    broken = pod_in({}, initContainerStatuses=[
        {"name": "pull-1", "state": {"terminated": {"exitCode": 12, "message": "REG-1 x: 401"}}}
    ])  # fmt: skip
    observed = replace(observed_of(item, made=False), desired=desired, pods=(broken,))
    observed = replace(
        observed,
        server=server_manifests.deployment(item, desired, options, claim=False),
        service=server_manifests.service(item, desired),
    )
    found_status = status_of(observed, options)
    assert ("False", "AdapterRefused") == inference_ready(found_status)
    assert "b: REG-1" in found_status["failure"]["message"]


def command_of(item: Object, options: Options | None = None) -> str:
    """What the pod of a server runs."""
    desired = desired_inference.read(item, None, None)
    made = server_manifests.deployment(
        item, desired, options or Options(vllm_image="vllm:1"), claim=False
    )
    return " ".join(made["spec"]["template"]["spec"]["containers"][0]["command"])


@pytest.mark.parametrize("runtime", ["transformers", "vllm"])
def test_an_adapter_in_an_image_volume_lies_where_images_have_it(runtime: str) -> None:
    """Below data; a claim holds the folder itself."""
    image = adapter("a", volumeSource={"image": {"reference": "registry.example.com/a:1"}})
    claim = adapter("b", volumeSource={"persistentVolumeClaim": {"claimName": "b"}})
    item = workspace(annotations={desired_inference.RUNTIME: runtime}, adapters=[image, claim])

    found = command_of(item)

    assert "a=/adapters/a/data" in found
    assert "b=/adapters/b" in found and "/adapters/b/data" not in found


@pytest.mark.parametrize(("rank", "said"), [(8, 8), (128, 128), (200, 256), (None, 64)])
def test_vllm_is_prepared_for_the_rank_that_was_tuned(rank: int | None, said: int) -> None:
    """The Workspace knows what it made; another's adapter may be of any rank."""
    item = both()
    item["metadata"]["annotations"] = {desired_inference.RUNTIME: "vllm"}
    item["status"] = {"output": {"digest": DIGEST}, "plan": {"rank": rank} if rank else {}}

    assert f"--max-lora-rank={said}" in command_of(item)
    item["inference"] = {"adapters": [adapter("other")]}
    assert f"--max-lora-rank={max(said, 64)}" in command_of(item)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("LoraConfig: {use_dora: true}", "no DoRA adapters"),
        ("LoraConfig: {r: 1024}", "ranks up to 512"),
        ("ModelConfig: {new_special_tokens: <|a|>}", "no adapters with rows for new tokens"),
    ],
)
def test_what_vllm_cannot_serve_is_not_tuned_for_it(text: str, said: str) -> None:
    item = both()
    item["tuning"]["config"] = "mine"
    config = {
        "metadata": {"name": "mine"},
        "data": {"training_config.yaml": f"training_config: {{{text}}}"},
    }
    assert (
        desired_inference.check_inference(item, desired_tuning.read(item, config, None), None).spec
        is not None
    )
    item["metadata"]["annotations"] = {desired_inference.RUNTIME: "vllm"}

    found = desired_inference.check_inference(item, desired_tuning.read(item, config, None), None)

    assert found.spec is None and said in str(found.problems[0])


def test_a_name_that_no_service_can_have_is_told() -> None:
    """Before the tuning: a Job may be called so."""
    item = both()
    item["metadata"]["name"] = "3b-chat"

    found = desired_inference.check_inference(item, desired_tuning.read(item, None, None), None)

    assert found.spec is None and "begin it with a letter" in str(found.problems[0])


def test_a_deployment_without_a_pod_says_why() -> None:
    """A quota or an admission rule, in the API server's words."""
    item = workspace()
    observed = observed_of(item)
    assert observed.server is not None
    refused = observed.server | {
        "status": {
            "conditions": [
                {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: none"}
            ]
        }
    }
    warning = observe._replica_failure(refused)

    found = status_of(replace(observed, server=refused, warning=warning))

    assert ("False", "PodRefused") == inference_ready(found)
    assert "exceeded quota" in found["failure"]["message"]


def settings(text: str) -> desired_tuning.Desired:
    """What is read from a Workspace for vLLM whose ConfigMap says this."""
    item = workspace(annotations={desired_inference.RUNTIME: "vllm"}, config="mine")
    config = {
        "metadata": {"name": "mine"},
        "data": {desired_inference.CONFIG_KEY: f"vllm: {{{text}}}"},
    }
    return desired_inference.read(item, config, None)


@pytest.mark.parametrize(
    "option",
    ["trust-remote-code", "trust_remote_code", "trust-remote", "tool-parser-plugin", "api-key",
     "worker-extension-cls", "middleware", "port", "-q", ""],
)  # fmt: skip
def test_vllm_gets_no_option_that_runs_code_or_opens_a_door(option: str) -> None:
    """Also not by an abbreviation: only what is on the list passes."""
    (problem,) = settings(f'"{option}": true').problems
    assert "SPEC-118" == problem.code
    assert "gpu-memory-utilization" in problem.change


def test_a_value_of_vllm_is_no_option() -> None:
    """Text that looks like an option stays in the word of its own option."""
    item = workspace(annotations={desired_inference.RUNTIME: "vllm"}, config="mine")
    desired = settings('enforce-eager: "--trust-remote-code", dtype: "--middleware=x"')
    assert desired.server
    made = server_manifests.deployment(item, desired, Options(vllm_image="vllm:1"), claim=False)
    words = made["spec"]["template"]["spec"]["containers"][0]["command"]
    assert ["--dtype=--middleware=x", "--enforce-eager=--trust-remote-code"] == words[-2:]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"annotations": {desired_inference.RUNTIME: "vllm"}}, "RuntimeUnavailable"),
        ({"annotations": {desired_inference.RUNTIME: "ollama"}}, "SpecInvalid"),
        ({"annotations": {desired_inference.RUNTIME: "vllm"}, "apiKeySecret": "door"},
         "SpecInvalid"),
        ({"annotations": {desired_inference.RUNTIME: "vllm"}, "adapters": [adapter("a", "0.5")]},
         "SpecInvalid"),
        ({"preset": None, "template": {"spec": {}}}, "SpecInvalid"),
        ({"adapters": [adapter("phi-3-mini-4k-instruct")]}, "SpecInvalid"),
        ({"adapters": [adapter("a", volumeSource={"hostPath": {"path": "/etc"}})]},
         "VolumeForbidden"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_with_its_reason(change: Any, reason: str) -> None:
    """Nothing is made of it."""
    item = workspace(**change)
    item["inference"] = {k: v for k, v in item["inference"].items() if v is not None}
    observed = observed_of(item, made=False)
    decision = decide(observed, Options())
    assert not decision.create
    assert decision.status is not None and "NotReady" == decision.status["state"]
    assert ("False", reason) == inference_ready(decision.status)


def test_what_does_not_fit_buys_no_machine() -> None:
    """The smallest machine that would do is named."""
    item = workspace(preset={"name": "phi-4"})
    item["resource"]["instanceType"] = "Standard_NV6ads_A10_v5"
    decision = decide(observed_of(item, made=False), Options(nodes=Nodes(provision=True)))
    assert decision.status is not None and not decision.create
    assert "DoesNotFit" == decision.status["failure"]["reason"]
    assert "Standard_" in decision.status["failure"]["hint"]


# what is told


@pytest.mark.parametrize(
    ("pod", "more", "state", "reason"),
    [
        (pod_in(RUNNING, ready=True), {}, "Ready", "WorkspaceInferenceStatusSuccess"),
        (pod_in(RUNNING, ready=True),
         {"server_report": {"refused": [{"name": "a", "reason": "rank"}]}}, "NotReady",
         "AdapterRefused"),
        (pod_in(RUNNING), {}, "Pending", "WorkspaceInferenceStatusPending"),
        (pod_in({"waiting": {"reason": "ErrImagePull", "message": "no"}}), {}, "NotReady",
         "ImagePullError"),
        (pod_in({"waiting": {"reason": "CrashLoopBackOff"}},
                last={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}), {}, "NotReady",
         "ContainerOOMKilled"),
        (pod_in({"waiting": {"reason": "CrashLoopBackOff"}},
                last={"terminated": {"exitCode": 12, "message": "HUB-1 phi: gated"}}), {},
         "NotReady", "ContainerCrashLoopBackOff"),
        (pod_in({}, conditions=[{"type": "PodScheduled", "status": "False"}]), {}, "NotReady",
         "Unschedulable"),
        (pod_in({"waiting": {"reason": "ContainerCreating"}}),
         {"warning": 'MountVolume.SetUp failed: secret "one" not found'}, "NotReady",
         "SecretNotFound"),
        (pod_in({}, reason="Evicted"), {}, "NotReady", "PodEvicted"),
        (pod_in(RUNNING, conditions=[{"type": "Ready", "status": "Unknown"}]), {}, "NotReady",
         "NodeLost"),
    ],
)  # fmt: skip
def test_inference_ready_tells_the_truth(pod: Object, more: Any, state: str, reason: str) -> None:
    """Each way in which a server does not answer has its own reason."""
    found = status_of(observed_of(workspace(adapters=[adapter("a")]), pod=pod, **more))
    assert state == found["state"], found
    ready = "True" if state == "Ready" else "False"
    assert (ready, reason) == inference_ready(found)
    assert ready == found["ready"]


def test_a_crash_tells_what_the_engine_said() -> None:
    """Exit code, its meaning, and the end of the log."""
    last = {"terminated": {"exitCode": 12, "message": "x" * 5000 + " HUB-1 phi: gated"}}
    found = status_of(observed_of(workspace(), pod=pod_in({"waiting": {}}, last=last)))
    assert "exit code 12 (AccessRefused)" in found["failure"]["message"]
    assert found["failure"]["message"].endswith("HUB-1 phi: gated")


def test_a_server_that_cannot_be_asked_is_taken_at_its_last_word() -> None:
    """No flapping while /readyz is out of reach."""
    item = workspace(adapters=[adapter("a")])
    pod = pod_in(RUNNING, ready=True)
    item["status"] = status_of(
        observed_of(item, pod=pod, server_report={"refused": [{"name": "a", "reason": "rank"}]})
    )
    assert "NotReady" == status_of(observed_of(item, pod=pod))["state"]
    assert "Ready" == status_of(observed_of(item, pod=pod, server_report={"refused": []}))["state"]


# one after the other


def test_everything_is_made_once_and_an_edit_changes_the_deployment() -> None:
    """Service and Deployment are called as the Workspace; another adapter is another pod."""
    item = workspace(adapters=[adapter("a")])
    first = decide(observed_of(item, made=False), Options())
    kinds = [kind.name for kind, _ in first.create]
    assert ["NetworkPolicy", "Service", "Deployment"] == kinds
    assert {"wk"} == {each["metadata"]["name"] for _, each in first.create}
    observed = observed_of(item, pod=pod_in(RUNNING, ready=True))
    assert not decide(observed, Options()).create
    edited = copy.deepcopy(item)
    edited["inference"]["adapters"].append(adapter("b"))
    observed = replace(observed_of(edited), server=observed.server)
    changed = {k.name: v for k, v in decide(observed, Options()).update}
    desired = desired_inference.read(edited, None, None)
    assert desired.server and desired.server.fingerprint == names.revision_of(changed["Deployment"])


def test_an_upgrade_restarts_no_server() -> None:
    """The fingerprint of what earlier operators knew stays what it was."""
    known = Server("phi-4", (Adapter("a", "r.example.com/a:1"),))

    assert "7ec93ce6" == known.fingerprint
    assert "7ec93ce6" != replace(known, base_revision="c" * 40).fingerprint


def test_what_was_trained_on_is_served() -> None:
    """The very commit, by both runtimes."""
    item = both()
    item["status"] = {"output": {"digest": DIGEST, "baseRevision": "c" * 40}}
    found = command(item)
    assert "c" * 40 == found[found.index("--base-revision") + 1]
    item["metadata"]["annotations"] = {desired_inference.RUNTIME: "vllm"}
    found = command(item, Options(vllm_image="vllm:1"))
    assert "c" * 40 == found[found.index("--revision") + 1]
    del item["tuning"]
    item["inference"] = {"preset": {"name": "phi-4"}}
    assert "c" * 40 not in command(item, Options(vllm_image="vllm:1"))


def test_a_service_of_kaitos_is_led_to_our_pod() -> None:
    """KAITO's selects the pod of its StatefulSet: requests would go nowhere."""
    item = workspace()
    observed = observed_of(item, pod=pod_in(RUNNING, ready=True))
    assert observed.service is not None
    kaitos = copy.deepcopy(observed.service)
    kaitos["spec"] |= {
        "selector": {"statefulset.kubernetes.io/pod-name": "wk-0"},
        "clusterIP": "10.0.0.7",
    }
    changed = {k.name: v for k, v in decide(
        replace(observed, service=kaitos), Options()).update}  # fmt: skip
    assert names.server_labels(item) == changed["Service"]["spec"]["selector"]
    assert "10.0.0.7" == changed["Service"]["spec"]["clusterIP"]
    assert not decide(observed, Options()).update


@pytest.mark.parametrize(
    ("annotations", "inference", "said"),
    [
        ({desired_inference.LOAD_BALANCER: "True"}, {}, "a load balancer exposes the server"),
        ({desired_inference.RUNTIME: "vlm"}, {}, "use transformers or vllm"),
        ({}, {"adapters": [adapter("tuned")]}, "the name tuned stands for more than one"),
    ],
)
def test_what_cannot_be_served_is_told_before_it_is_tuned(
    annotations: dict[str, str], inference: dict[str, Any], said: str
) -> None:
    """Not after the machine was paid for; vLLM's options may still come."""
    item = both(**inference)
    item["metadata"]["annotations"] = annotations
    tuned = desired_inference.check_inference(item, desired_tuning.read(item, None, None), None)
    assert tuned.spec is None
    assert said in " ".join(map(str, tuned.problems))
    item = both(config="later")
    item["metadata"]["annotations"] = {desired_inference.RUNTIME: "vllm"}
    assert (
        desired_inference.check_inference(item, desired_tuning.read(item, None, None), None).spec
        is not None
    )


@pytest.mark.parametrize(
    ("base", "runtime", "fits"),
    [
        ("llama-3.3-70b-instruct", "transformers", True),  # in 4 bits
        ("llama-3.3-70b-instruct", "vllm", False),  # which holds it as it is published
        ("gpt-oss-120b", "vllm", True),  # published in 4 bits: vLLM's to judge
    ],
)
def test_vllm_is_judged_by_what_vllm_holds(base: str, runtime: str, fits: bool) -> None:
    item = workspace(annotations={desired_inference.RUNTIME: runtime}, preset={"name": base})
    assert fits == (not desired_inference.read(item, None, None).fit_problems)


def test_the_administrators_environment_reaches_every_pod() -> None:
    """A proxy for registries, a mirror of the hub; nothing else can be put there."""
    options = Options.model_validate(
        {"environment": {"HTTPS_PROXY": "http://proxy.corp:3128"}, "vllmImage": "vllm:1"}
    )
    item = workspace(annotations={desired_inference.RUNTIME: "vllm"}, adapters=[adapter("a")])
    desired = desired_inference.read(item, None, None)
    pods = server_manifests.deployment(item, desired, options, claim=False)["spec"]["template"][
        "spec"
    ]
    tuned = both()
    job = job_manifests.job(
        tuned, desired_tuning.read(tuned, None, None), options, claim=False, earlier=()
    )
    for spec in (pods, job["spec"]["template"]["spec"]):
        for each in [*spec["containers"], *spec.get("initContainers", [])]:
            assert {"name": "HTTPS_PROXY", "value": "http://proxy.corp:3128"} in each["env"]
    with pytest.raises(ValueError, match="LD_PRELOAD"):
        Options.model_validate({"environment": {"LD_PRELOAD": "x"}})


def test_a_clouds_identity_reaches_every_pod() -> None:
    """By a service account and a label that webhooks look for; our own labels stay what they are,
    and Kubernetes' token stays away."""
    given = {"azure.workload.identity/use": "true", "kaito.sh/workspace": "another"}
    options = Options.model_validate({"serviceAccount": "tuning", "podLabels": given})
    item = workspace(adapters=[adapter("a")])
    desired = desired_inference.read(item, None, None)
    tuned = both()
    job = job_manifests.job(
        tuned, desired_tuning.read(tuned, None, None), options, claim=False, earlier=()
    )
    for made in (server_manifests.deployment(item, desired, options, claim=False), job):
        template = made["spec"]["template"]
        assert "tuning" == template["spec"]["serviceAccountName"]
        assert template["spec"]["automountServiceAccountToken"] is False
        labels = template["metadata"]["labels"]
        assert "true" == labels["azure.workload.identity/use"]
        assert "another" != labels["kaito.sh/workspace"]


def test_tune_then_serve_needs_nothing_but_an_empty_inference() -> None:
    """Preset and login from tuning, the adapter by the digest pushed; the machine stays."""
    item = both()
    item["status"] = {
        "state": "Running",
        "completionTime": "2026-01-01T00:00:00Z",
        "output": {"image": "registry.example.com/team/a:1", "digest": DIGEST},
        "outputs": [DIGEST],
        "conditions": [{"type": "WorkspaceSucceeded", "status": "True", "reason": "r",
                        "message": "m", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
    }  # fmt: skip
    found = command(item)
    assert f"tuned=registry.example.com/team/a@{DIGEST}" in found
    assert "--pull-secret" in found
    node_claim = {"metadata": {"name": "ws1-1", "creationTimestamp": "2026-01-01T00:00:00Z"}}
    options = Options(nodes=Nodes(provision=True))
    observed = observed_of(item, pod=pod_in(RUNNING, ready=True), node_claims=(node_claim,))
    decision = decide(observed, options)
    assert NODE_CLAIM not in [kind for kind, _ in decision.delete]
    assert decision.status is not None and "Ready" == decision.status["state"]
    assert objects.is_true({"status": decision.status}, "WorkspaceSucceeded")
    assert DIGEST == decision.status["output"]["digest"]


def test_before_another_tuning_the_server_stops() -> None:
    """It holds the GPU that the Job will need."""
    item = both()
    desired = observed_of(item).desired
    assert desired.server
    from jobs.desired import tuning as desired_tuning

    server = server_manifests.deployment(item, desired, Options(), claim=False)
    observed = Observed(item, desired_tuning.read(item, None, None), NOW, server=server)
    decision = decide(observed, Options())
    assert "replacing" == decision.phase.name
    assert [DEPLOYMENT] == [kind for kind, _ in decision.delete]
    assert JOB not in [kind for kind, _ in decision.create]


def test_render_prints_what_serves(tmp_path: Path) -> None:
    """Claim, policy, Service and Deployment, strict."""
    item = workspace(adapters=[adapter("a")])
    item["metadata"] = {"name": "wk"}
    file = tmp_path / "w.yaml"
    file.write_text(yaml.safe_dump(item))
    found = render.render(file, Options(), namespace="team")
    kinds = [each["kind"] for each in found]
    assert ["PersistentVolumeClaim", "NetworkPolicy", "Service", "Deployment"] == kinds
    for each in found:
        TYPES[each["kind"]].model_validate(each)


def test_render_prints_what_tunes_and_what_serves_afterwards(tmp_path: Path) -> None:
    item = both()
    file = tmp_path / "w.yaml"
    file.write_text(yaml.safe_dump(item))

    kinds = [each["kind"] for each in render.render(file, Options(), namespace="team")]

    assert "Job" in kinds and kinds.index("Job") < kinds.index("Deployment")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("tuning", "preset", "name"), "phi-3-mini-4k-instrukt", "phi-3-mini-4k-instruct"),
        (("resource", "instanceType"), "Standard_NC6_v3s", "Standard_NC6s_v3"),
        (
            ("metadata", "annotations"),
            {desired_inference.RUNTIME: "vllm"},
            "set the option vllmImage",
        ),
    ],
)
def test_render_tells_slips_of_the_pen(
    tmp_path: Path, path: tuple[str, ...], value: Any, said: str
) -> None:
    item = both()
    place = item
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "w.yaml"
    file.write_text(yaml.safe_dump(item))

    with pytest.raises(SpecError, match=said):
        render.render(file, Options(), namespace="team")


def test_what_kaito_has_tuned_is_not_tuned_again() -> None:
    """Its status knows no revision of ours; an edit makes a run, as ever."""
    item = both()
    del item["inference"]
    done = {"type": "WorkspaceSucceeded", "status": "True", "reason": "workspaceSucceeded"}
    times = {"message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    item["status"] = {"conditions": [done | times]}
    desired = desired_tuning.read(item, None, None)

    decision = decide(Observed(item, desired, NOW), Options())

    assert not decision.create
    assert decision.status is not None
    assert (desired.revision, "Succeeded") == tuple(
        decision.status[key] for key in ("revision", "state")
    )
    item["status"] = decision.status
    assert not decide(Observed(item, desired, NOW), Options()).create
    item["tuning"]["input"]["urls"] = ["https://data.example.com/other.jsonl"]
    edited = desired_tuning.read(item, None, None)
    assert decide(Observed(item, edited, NOW, storage=False), Options()).create


# -- what was edited, refused or lost -------------------------------------------------------------


def test_a_key_that_is_taken_away_closes_the_door() -> None:
    """The network policy follows an edit, before the Deployment does; and nothing else changes."""
    item = workspace(apiKeySecret="key")
    observed = observed_of(item)
    policy = job_manifests.server_policy(item, observed.desired, Options()) | {
        "spec": {"ingress": []}
    }
    policy["spec"] = job_manifests.server_policy(item, observed.desired, Options())["spec"]
    del item["inference"]["apiKeySecret"]
    edited = replace(observed, desired=desired_inference.read(item, None, None), policy=policy)

    found = decide(edited, Options())

    kinds = [kind.name for kind, _ in found.update]
    assert ["NetworkPolicy", "Service", "Deployment"] == kinds
    assert "from" in found.update[0][1]["spec"]["ingress"][0]


def test_a_policy_that_was_changed_is_mended_alone() -> None:
    """Ready stays Ready, and an upgrade's other image waits for an edit."""
    item = workspace()
    observed = observed_of(item, pod=pod_in(RUNNING, ready=True))
    policy = job_manifests.server_policy(item, observed.desired, Options())
    opened = policy | {"spec": policy["spec"] | {"ingress": [{}]}}
    newer = Options(image="engine:2")

    for options in (Options(), newer):
        mended = decide(replace(observed, policy=opened), options)
        whole = decide(replace(observed, policy=policy), options)

        assert [("NetworkPolicy", policy["spec"])] == [
            (kind.name, item["spec"]) for kind, item in mended.update
        ]
        assert "ready" == mended.phase.name == whole.phase.name
        assert () == whole.update == whole.create
    gone = decide(replace(observed, policy="missing"), Options())
    assert ["NetworkPolicy"] == [kind.name for kind, _ in gone.create]


def node_claim(number: int, *, late: bool = False, **labels: str) -> Object:
    """A NodeClaim that is on its way, or was not launched in time."""
    made = "2025-12-31T00:00:00Z" if late else "2026-01-01T00:00:00Z"
    return {"metadata": {"name": f"ws1-{number}", "creationTimestamp": made, "labels": labels}}


BUYS = Options(nodes=Nodes(provision=True))


def test_a_server_without_a_machine_gives_back_what_failed_and_an_edit_asks_anew() -> None:
    item = workspace()
    item["status"] = {
        "nodeAttempts": 3,
        "revision": desired_tuning.revision(item),
        "observedGeneration": 1,
    }
    observed = observed_of(item, made=False, node_claims=(node_claim(3, late=True),))

    found = decide(observed, BUYS)

    assert "unprovisioned" == found.phase.name and found.requeue_after == 60
    assert ["ws1-3"] == [each["metadata"]["name"] for _, each in found.delete]
    item["metadata"]["generation"] = 2
    assert "provisioning" == decide(replace(observed, node_claims=()), BUYS).phase.name


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"method": "lorra"}, "invalid"),
        ({"preset": {"name": "llama-3.3-70b-instruct"}}, "unfit"),
    ],
)
def test_no_machine_is_kept_for_what_cannot_run(change: dict[str, Any], word: str) -> None:
    item = both()
    item["resource"]["instanceType"] = "Standard_NV36ads_A10_v5"
    item["tuning"] |= change
    item["status"] = {"revision": "x"}
    observed = Observed(
        item, desired_tuning.read(item, None, None), NOW, node_claims=(node_claim(1),)
    )

    found = decide(observed, BUYS)

    assert (word, 1) == (found.phase.name, len(found.delete))
    item["metadata"]["annotations"] = {"tuning.kaito.sh/keep-node": "true"}
    assert () == decide(observed, BUYS).delete


def test_an_edit_to_something_invalid_stops_the_old_job_first() -> None:
    """It would go on paid for, and push what nobody wants any more."""
    item = both()
    item["tuning"]["method"] = "lorra"
    old = {"metadata": {"name": "wk-old"}}

    found = decide(
        Observed(item, desired_tuning.read(item, None, None), NOW, previous_job=old), Options()
    )

    assert "replacing" == found.phase.name
    assert ["wk-old"] == [each["metadata"]["name"] for _, each in found.delete]


def test_a_run_without_its_pods_digest_is_served_by_its_tag() -> None:
    item = both()
    (fresh,) = desired_inference._tuned_adapter(item, vllm=False)
    assert "registry.example.com/team/a:1" == fresh.image


def test_a_lost_machine_is_asked_for_where_its_volume_is() -> None:
    """The zone is remembered for as long as there is a run volume."""
    item = both()
    item["status"] = {"zone": "eastus-2", "revision": desired_tuning.revision(item)}
    desired = desired_tuning.read(item, None, None)
    observed = Observed(item, desired, NOW, run_claim={"metadata": {"name": "c"}})

    ((_, claim),) = decide(observed, BUYS).create
    zones = {each["key"]: each["values"] for each in claim["spec"]["requirements"]}
    assert ["eastus-2"] == zones["topology.kubernetes.io/zone"]

    ((_, claim),) = decide(replace(observed, run_claim=None), BUYS).create
    assert "topology.kubernetes.io/zone" not in str(claim)
    here = node_claim(1, **{"topology.kubernetes.io/zone": "eastus-1"})
    told_now = status.status(replace(observed, node_claims=(here,)), Phase("running"), BUYS)
    assert "eastus-1" == told_now["zone"]


def test_what_was_refused_stays_told_until_it_is_made() -> None:
    """No flapping between "is being made" and the reason, look by look."""
    item = both()
    first = Observed(item, desired_tuning.read(item, None, None), NOW)
    refused = Phase("refused", objects.Cause("Forbidden", "exceeded quota: jobs"))
    item["status"] = status.status(first, refused, Options())

    again = decide(Observed(item, first.desired, NOW), Options())

    assert "creating" == again.phase.name and 1 <= len(again.create)
    assert again.status == item["status"]


def test_any_new_value_of_rerun_is_another_run() -> None:
    item = both()
    before = desired_tuning.revision(item)
    item["metadata"]["annotations"] = {"tuning.kaito.sh/rerun": "2"}
    again = desired_tuning.revision(item)
    assert before != again
    assert () == desired_tuning.read(item, None, None).problems
    item["metadata"]["annotations"] = {"other": "2"}
    assert before == desired_tuning.revision(item)
