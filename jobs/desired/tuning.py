"""Desired state of a tuning Workspace, from it and its ConfigMap as the API server stores them.

Pure and deterministic: the revision ties a Job to its spec, the snapshot is the document that the
Job reads, and the plan says whether the run fits before a node is provisioned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import tuning.plan as plan
from jobs.api.kinds import Object
from tuning import files, presets, spec
from tuning.errors import Problem, SpecError
from tuning.plan import Plan
from tuning.plan.device import Device
from tuning.presets import Instance
from tuning.spec import Spec
from tuning.spec.workspace import ANNOTATION, Tuning

GIB = 1 << 30
MAX_NODES = 20_000  # values of a document: a second of the time that all Workspaces share
CONFIG_KEY = "training_config.yaml"
QUEUE = "kueue.x-k8s.io/queue-name"
PRIORITY = "kueue.x-k8s.io/priority-class"

_UNKNOWN_MODEL = "PLAN-107"  # its config must be downloaded first
_DOES_NOT_FIT = ("PLAN-102", "PLAN-106", "PLAN-12")  # prefixes: no GPU, old GPU, not enough memory
_RUN_GIB = 20  # of the run directory: data, packed data, logs
_PACKED_SHARE = 0.35  # of 16-bit weights: their copy in 4 bits, embeddings as they are
_LORA_SHARE = 0.02  # of the parameters: a generous guess where there is no plan
_IMAGE_GIB = 40  # of a node's disk: operating system and the engine's image


@dataclass(frozen=True)
class Adapter:
    """An adapter to serve: an image, or a volume that holds its folder."""

    name: str
    image: str | None = None
    volume: Object | None = None
    strength: float = 1.0
    pull_secrets: tuple[str, ...] = ()
    rank: int | None = None  # known for vLLM if this Workspace tuned it

    @property
    def folder(self) -> str:
        """Its path in the pod, if mounted or pulled; an image volume has it below `data`."""
        inner = "/data" if self.volume and "image" in self.volume else ""
        return f"/adapters/{self.name}{inner}"


@dataclass(frozen=True)
class Server:
    """Desired state of an inference server. Field names and values make the fingerprint."""

    base: str  # preset or org/model
    adapters: tuple[Adapter, ...]
    runtime: Literal["transformers", "vllm"] = "transformers"
    hub_secret: str | None = None
    key_secret: str | None = None
    public: bool = False  # exposed by a load balancer
    settings: tuple[tuple[str, str], ...] = ()  # vLLM command-line options
    note: str = ""  # fields of the Workspace without effect
    base_revision: str | None = None  # hub commit; None: the preset's, or main
    runtime_class: str | None = None
    priority_class: str | None = None

    @property
    def fingerprint(self) -> str:
        """Eight characters that change with whatever the pods are made from."""
        content = {k: v for k, v in asdict(self).items() if k not in ("public", "note")}
        # Fields that earlier operators did not have must not change the fingerprint of their pods.
        for name in ("base_revision", "runtime_class", "priority_class"):
            if content[name] is None:
                del content[name]
        for each in content["adapters"]:
            if each["rank"] is None:
                del each["rank"]
        return _short_hash(json.dumps(content, sort_keys=True))


@dataclass(frozen=True)
class Desired:
    """Desired state of one Workspace. `spec` is None if it is invalid; `problems` says why."""

    revision: str
    spec: Spec | None
    problems: tuple[Problem, ...] = ()
    missing_config_map: str | None = None  # name of a ConfigMap that does not exist (yet)
    config_digest: str = ""
    snapshot: str = ""
    plan: Plan | None = None
    plan_unknown: str = ""  # why there is no plan: the Job decides
    fit_problems: tuple[Problem, ...] = ()  # why it does not fit the GPU
    instance: Instance | None = None
    device: Device | None = None  # it will run on, where that is known
    gpus: int = 1  # of each pod
    nodes: int = 1  # machines, and so pods of the Job
    weights_bytes: int | None = None
    server: Server | None = None
    training_bytes: int | None = None  # of checkpoints, adapter and image, from the plan

    def run_bytes(self, *, cached: bool = False) -> int:
        """Size of the run volume; base weights, and packed ones, unless `cached` elsewhere."""
        weights = self.weights_bytes or 60 * GIB
        training = self.training_bytes or int(8 * _LORA_SHARE * weights)
        packed = int(_PACKED_SHARE * weights) if self.spec and self.spec.method == "qlora" else 0
        return _RUN_GIB * GIB + training + (0 if cached else weights + packed)

    @property
    def disk_bytes(self) -> int:
        """Disk of a node that is provisioned for this run."""
        return _IMAGE_GIB * GIB + self.run_bytes()

    @property
    def memory_bytes(self) -> int:
        """Memory request of the Job: a process a GPU, weights on their way there, what stays."""
        need = (2 + 4 * self.gpus) * GIB + int(1.2 * (self.weights_bytes or 12 * GIB))
        need += self.plan.fit.host_bytes if self.plan and self.plan.fit else 0
        if self.instance and self.instance.ram_bytes:
            return min(need, int(0.7 * self.instance.ram_bytes))
        return need


def revision(workspace: Object) -> str:
    """Eight characters that change with the Workspace's UID and its `tuning` section.

    Defaults are left out, so that new defaults in a newer operator rerun nothing.
    """
    tuning = workspace.get("tuning") or {}
    try:
        known = Tuning.model_validate(tuning).model_dump(by_alias=True, exclude_defaults=True)
    except ValueError:
        known = tuning
    if isinstance(known.get("method"), str):
        known["method"] = known["method"].lower()
    rerun = (workspace["metadata"].get("annotations") or {}).get(f"{ANNOTATION}rerun")
    parts = [rerun] if rerun else []
    return _short_hash(workspace["metadata"]["uid"], json.dumps(known, sort_keys=True), *parts)


def short_name(workspace: Object, suffix: str, *, longest: int = 63) -> str:
    """`<name>-<suffix>`, cut to `longest` characters; the suffix is unique to the UID."""
    name = workspace["metadata"]["name"][: longest - 1 - len(suffix)].rstrip("-")
    return f"{name}-{suffix}"


def node_count(workspace: Object) -> int:
    """On how many machines the Workspace tunes."""
    count = (workspace.get("resource") or {}).get("count")
    return count if isinstance(count, int) and workspace.get("tuning") else 1


def job_name(workspace: Object, revision: str) -> str:
    """Name of the Job of a revision. That of several pods is a Service's, too, which begins with a
    letter, and `<name>-<index>` a host's."""
    if node_count(workspace) == 1:
        return short_name(workspace, revision)
    name = short_name(workspace, revision, longest=57)
    return name if name[0].isalpha() else f"ws-{name}"


def identity(workspace: Object) -> str:
    """Eight characters of the Workspace's UID: another Workspace of this name has others."""
    return _short_hash(workspace["metadata"]["uid"])


def _short_hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def read(workspace: Object, config_map: Object | None, device: Device | None) -> Desired:
    """Desired state on `device` (None: unknown, unless the Workspace names an instance type)."""
    documents = [json.dumps(document(workspace), sort_keys=True)]
    if config_map:
        meta = {key: config_map["metadata"].get(key) for key in ("name", "namespace")}
        plain = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta}
        documents.append(json.dumps(plain | {"data": config_map.get("data") or {}}, sort_keys=True))
    desired = _read("\n---\n".join(documents), device)
    name = (workspace.get("tuning") or {}).get("config")
    is_missing = any(problem.code == "SPEC-117" for problem in desired.problems)
    if is_missing and config_map is None and name:
        desired = replace(desired, missing_config_map=name)
    digest = _config_digest(config_map)
    return replace(desired, revision=revision(workspace), config_digest=digest)


def read_brief(workspace: Object, config_map: Object | None) -> Desired:
    """Desired state without spec and plan, for a run that has been started or has ended."""
    name = (workspace.get("resource") or {}).get("instanceType")
    try:
        instance = presets.instance(name) if name else None
    except SpecError:
        instance = None
    digest = _config_digest(config_map)
    return Desired(
        revision(workspace),
        None,
        config_digest=digest,
        instance=instance,
        nodes=node_count(workspace),
    )


def _config_digest(config_map: Object | None) -> str:
    content = ((config_map or {}).get("data") or {}).get(CONFIG_KEY)
    return files.digest(str(content).encode()) if content is not None else ""


def document(workspace: Object) -> Object:
    """The Workspace as its author wrote it, with no annotations but ours and KAITO's."""
    meta = workspace["metadata"]
    kept = {k: meta[k] for k in ("name", "namespace") if k in meta}
    annotations = meta.get("annotations") or {}
    ours = {k: v for k, v in annotations.items() if k.startswith((ANNOTATION, "kaito.sh/"))}
    if ours:
        kept["annotations"] = ours
    rest = {k: workspace[k] for k in ("resource", "tuning", "inference") if k in workspace}
    head = {"apiVersion": workspace["apiVersion"], "kind": "Workspace", "metadata": kept}
    return head | rest


@lru_cache(maxsize=128)
def _read(text: str, device: Device | None) -> Desired:
    """Everything that does not depend on the UID; cached, as reconciles are frequent."""
    try:
        parsed = spec.parse(text, origin="Workspace", max_nodes=MAX_NODES)
        instance = presets.instance(parsed.instance) if parsed.instance else None
    except SpecError as error:
        return Desired("", None, problems=error.problems)
    annotations: dict[str, Any] = parsed.document["metadata"].get("annotations") or {}
    gpus = annotations.get(f"{ANNOTATION}gpus")
    desired = Desired(
        revision="",
        spec=parsed,
        snapshot=spec.dump(parsed),
        instance=instance,
        device=plan.planned_device(parsed, device) if parsed.instance or device else None,
        gpus=int(gpus) if gpus is not None else instance.gpus if instance else 1,
        nodes=parsed.nodes,
        weights_bytes=_weights(parsed),
    )
    if instance is None and (device is None or desired.gpus == 0):
        return replace(desired, plan_unknown="the nodes do not say which GPU they have")
    try:
        assert desired.device is not None
        drafted = plan.draft(parsed, here=desired.device)
    except SpecError as error:
        return _without_plan(desired, error)
    placement = drafted.placement
    used = desired.gpus if gpus is not None else placement.ranks // placement.nodes
    training = plan.disk_bytes(drafted.recipe, plan.known_base(parsed))
    return replace(desired, plan=drafted, gpus=used, training_bytes=training)


def _without_plan(desired: Desired, error: SpecError) -> Desired:
    """`desired` with the reason why no plan was made: unknown model, too small a GPU, bad spec."""
    codes = {problem.code for problem in error.problems}
    if codes == {_UNKNOWN_MODEL}:
        return replace(desired, plan_unknown=error.problems[0].what)
    if all(code.startswith(_DOES_NOT_FIT) for code in codes):
        return replace(desired, fit_problems=error.problems)
    return replace(desired, spec=None, problems=error.problems)


def _weights(parsed: Spec) -> int | None:
    """Bytes of the stored base weights, if the model is known."""
    try:
        facts = plan.known_base(parsed).facts
    except SpecError:
        return None
    return 2 * facts.parameters if facts else None


@lru_cache(maxsize=256)
def fit_hint(snapshot: str, cloud: str) -> str:
    """Names the smallest instance type of `cloud` on which the spec fits."""
    parsed = spec.parse(snapshot, origin="Workspace")
    return instance_hint(
        cloud, lambda i: plan.draft(replace(parsed, instance=i.name), here=plan.device_of(i.name))
    )


def instance_hint(cloud: str, check: Callable[[Instance], object]) -> str:
    """Names the instance type with the least GPU memory for which `check` raises no SpecError."""
    offered = [each for each in presets.instances() if each.cloud == cloud and not each.retired]
    for instance in sorted(offered, key=lambda i: (i.memory_bytes * i.gpus, i.gpus)):
        with suppress(SpecError):
            check(instance)
            return f"use {instance.name} or larger"
    return "no known instance type fits"
