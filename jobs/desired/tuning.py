"""A Workspace and its ConfigMap, as the cluster stores them -> what should run.

Pure, and the same for the same objects: the revision says which Job belongs to which spec, the
snapshot is the document that the Job reads, and the plan says whether it fits, before anything is
bought.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from jobs.api.client import Object
from tuning import files, plan, presets, spec
from tuning.errors import Problem, SpecError
from tuning.plan import Plan
from tuning.plan.device import Device
from tuning.presets import Instance
from tuning.spec import Spec
from tuning.spec.workspace import ANNOTATION, Tuning

GIB = 1 << 30
MIB = 1 << 20
CONFIG_KEY = "training_config.yaml"
QUEUE = "kueue.x-k8s.io/queue-name"
PRIORITY = "kueue.x-k8s.io/priority-class"

_UNKNOWN_MODEL = "PLAN-107"  # its shape is not known without the network
_DOES_NOT_FIT = ("PLAN-102", "PLAN-106", "PLAN-12")  # prefixes: no GPU, old GPU, not enough memory
_RUN_GIB = 20  # run directory: data, packed data, logs
_LORA_SHARE = 0.02  # of the parameters, where there is no plan; generous
_IMAGE_GIB = 40  # of a bought machine's disk: operating system and the engine's image


@dataclass(frozen=True)
class Adapter:
    """An adapter to be served: an image, or a volume that holds its folder."""

    name: str
    image: str | None = None
    volume: Object | None = None
    strength: float = 1.0
    pull_secrets: tuple[str, ...] = ()
    rank: int | None = None  # where vLLM has to know it, and this Workspace has made it

    @property
    def folder(self) -> str:
        """Where the pod finds it, if it is a volume or was pulled: in an image below `data`."""
        inner = "/data" if self.volume and "image" in self.volume else ""
        return f"/adapters/{self.name}{inner}"


@dataclass(frozen=True)
class Server:
    """What is to be served, and how."""

    base: str  # preset or org/model
    adapters: tuple[Adapter, ...]
    runtime: Literal["transformers", "vllm"] = "transformers"
    hub_secret: str | None = None
    key_secret: str | None = None
    public: bool = False  # by a load balancer
    settings: tuple[tuple[str, str], ...] = ()  # of vLLM, as options of its command line
    note: str = ""  # what of the Workspace has no effect
    base_revision: str | None = None  # commit of the hub; None: the preset's, or main

    @property
    def fingerprint(self) -> str:
        """Eight characters that change with what the pods are made from."""
        told = {k: v for k, v in asdict(self).items() if k not in ("public", "note")}
        if self.base_revision is None:  # unknown to servers that an earlier operator started
            del told["base_revision"]
        for each in told["adapters"]:
            if each["rank"] is None:  # nor this
                del each["rank"]
        return _short(json.dumps(told, sort_keys=True))


@dataclass(frozen=True)
class Wanted:
    """What one Workspace asks for. `spec` is None when it cannot run; `problems` says why."""

    revision: str
    spec: Spec | None
    problems: tuple[Problem, ...] = ()
    missing_config: str | None = None  # a ConfigMap that is not there (yet)
    config_digest: str = ""
    snapshot: str = ""
    plan: Plan | None = None
    unknown: str = ""  # why there is no plan: the Job decides
    misfit: tuple[Problem, ...] = ()
    instance: Instance | None = None
    gpus: int = 1
    weights_bytes: int | None = None
    server: Server | None = None  # what is to be served
    training_bytes: int | None = None  # checkpoints, adapter and image, as the plan says

    def run_bytes(self, *, cached: bool = False) -> int:
        """Size of the run volume, which also keeps the base weights unless a cache does."""
        weights = self.weights_bytes or 60 * GIB
        training = self.training_bytes or int(8 * _LORA_SHARE * weights)
        return _RUN_GIB * GIB + training + (0 if cached else weights)

    @property
    def disk_bytes(self) -> int:
        """Disk of a machine that is bought for this run."""
        return _IMAGE_GIB * GIB + self.run_bytes()

    @property
    def memory_bytes(self) -> int:
        """Main memory that the Job asks for: weights pass through it on their way to the GPU."""
        need = 6 * GIB + int(1.2 * (self.weights_bytes or 12 * GIB))
        if self.instance and self.instance.ram_bytes:
            return min(need, int(0.7 * self.instance.ram_bytes))
        return need


def revision(workspace: Object) -> str:
    """Eight characters that change with the Workspace's UID and with what it wants tuned.

    Defaults do not count, so that a newer operator with more of them reruns nothing.
    """
    tuning = workspace.get("tuning") or {}
    try:
        known = Tuning.model_validate(tuning).model_dump(by_alias=True, exclude_defaults=True)
    except ValueError:
        known = tuning
    if isinstance(known.get("method"), str):
        known["method"] = known["method"].lower()
    again = (workspace["metadata"].get("annotations") or {}).get(f"{ANNOTATION}rerun")
    parts = [again] if again else []
    return _short(workspace["metadata"]["uid"], json.dumps(known, sort_keys=True), *parts)


def short_name(workspace: Object, suffix: str) -> str:
    """`<name>-<suffix>`, cut to 63 characters: the suffix already tells UIDs apart."""
    return f"{workspace['metadata']['name'][: 62 - len(suffix)].rstrip('-')}-{suffix}"


def identity(workspace: Object) -> str:
    """Eight characters for the Workspace's UID: one of the same name made later has others."""
    return _short(workspace["metadata"]["uid"])


def _short(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def read(workspace: Object, config_map: Object | None, device: Device | None) -> Wanted:
    """What `workspace` wants on `device` (None: unknown, unless it names an instance type)."""
    documents = [json.dumps(document(workspace), sort_keys=True)]
    if config_map:
        documents.append(json.dumps(_config_document(config_map), sort_keys=True))
    name = (workspace.get("tuning") or {}).get("config")
    found = _read("\n---\n".join(documents), device)
    if found.spec is None and config_map is None and name and "SPEC-117" in _codes(found):
        found = replace(found, missing_config=name)
    return replace(found, revision=revision(workspace), config_digest=_config_digest(config_map))


def glance(workspace: Object, config_map: Object | None) -> Wanted:
    """The same without reading the spec and planning: for a run that is on its way, or over."""
    name = (workspace.get("resource") or {}).get("instanceType")
    try:
        machine = presets.instance(name) if name else None
    except SpecError:
        machine = None
    digest = _config_digest(config_map)
    return Wanted(revision(workspace), None, config_digest=digest, instance=machine)


def _config_digest(config_map: Object | None) -> str:
    content = ((config_map or {}).get("data") or {}).get(CONFIG_KEY)
    return files.digest(str(content).encode()) if content is not None else ""


def _codes(wanted: Wanted) -> list[str]:
    return [problem.code for problem in wanted.problems]


def document(workspace: Object) -> Object:
    """The Workspace as a person would have written it, with what is ours of the annotations."""
    meta = workspace["metadata"]
    kept = {k: meta[k] for k in ("name", "namespace") if k in meta}
    ours = {k: v for k, v in (meta.get("annotations") or {}).items() if k.startswith(ANNOTATION)}
    if ours:
        kept["annotations"] = ours
    rest = {k: workspace[k] for k in ("resource", "tuning", "inference") if k in workspace}
    head = {"apiVersion": workspace["apiVersion"], "kind": "Workspace", "metadata": kept}
    return head | rest


def _config_document(config_map: Object) -> Object:
    meta = config_map["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": meta["name"], "namespace": meta.get("namespace")},
        "data": config_map.get("data") or {},
    }


@lru_cache(maxsize=128)
def _read(text: str, device: Device | None) -> Wanted:
    """Everything that does not depend on the object's UID; cached, for reconciles are many."""
    try:
        found = spec.parse(text, origin="Workspace")
        machine = presets.instance(found.instance) if found.instance else None
    except SpecError as error:
        return Wanted("", None, problems=error.problems)
    annotations: dict[str, Any] = found.document["metadata"].get("annotations") or {}
    gpus = annotations.get(f"{ANNOTATION}gpus")
    wanted = Wanted(
        revision="",
        spec=found,
        snapshot=spec.dump(found),
        instance=machine,
        gpus=int(gpus) if gpus is not None else machine.gpus if machine else 1,
        weights_bytes=_weights(found),
    )
    if machine is None and (device is None or wanted.gpus == 0):
        return replace(wanted, unknown="the nodes do not say which GPU they have")
    try:
        drafted = plan.draft(found, here=device or plan.device_of(found.instance or ""))
    except SpecError as error:
        return _refused(wanted, error)
    used = wanted.gpus if gpus is not None else drafted.placement.ranks
    training = plan.disk_bytes(drafted.recipe, plan.known_base(found))
    return replace(wanted, plan=drafted, gpus=used, training_bytes=training)


def _refused(wanted: Wanted, error: SpecError) -> Wanted:
    """What a refusal of the plan means: unknown, too small a machine, or a wrong spec."""
    codes = {problem.code for problem in error.problems}
    if codes == {_UNKNOWN_MODEL}:
        return replace(wanted, unknown=error.problems[0].what)
    if all(code.startswith(_DOES_NOT_FIT) for code in codes):
        return replace(wanted, misfit=error.problems)
    return replace(wanted, spec=None, problems=error.problems)


def _weights(found: Spec) -> int | None:
    """Bytes of the base weights as they are stored, where the model is known."""
    try:
        facts = plan.known_base(found).facts
    except SpecError:
        return None
    return 2 * facts.parameters if facts else None


@lru_cache(maxsize=256)
def smallest_fit(snapshot: str, cloud: str) -> str | None:
    """The machine type of `cloud` with the least GPU memory on which the spec would fit."""
    found = spec.parse(snapshot, origin="Workspace")
    offered = [m for m in presets.instances() if m.cloud == cloud and not m.retired]
    for machine in sorted(offered, key=lambda m: (m.memory_bytes * m.gpus, m.gpus)):
        try:
            plan.draft(replace(found, instance=machine.name), here=plan.device_of(machine.name))
        except SpecError:
            continue
        return machine.name
    return None


def device_of_nodes(nodes: list[Object]) -> Device | None:
    """The GPU of the largest node that says which one it has, by NVIDIA's labels."""
    found = [device for node in nodes if (device := _device_of_node(node)) is not None]
    return max(found, key=lambda d: (d.memory_bytes, d.count), default=None)


def _device_of_node(node: Object) -> Device | None:
    labels = node["metadata"].get("labels") or {}
    product, memory = labels.get("nvidia.com/gpu.product"), labels.get("nvidia.com/gpu.memory")
    if product is None:
        return None
    try:
        gpu = presets.gpu(product)
    except SpecError:
        gpu = None
    size = int(memory) * MIB if memory and memory.isdigit() else gpu.memory_bytes if gpu else None
    capability = _capability(labels) or (gpu.capability if gpu else None)
    if size is None or capability is None:
        return None
    count = labels.get("nvidia.com/gpu.count", "1")
    return Device(
        kind="cuda",
        name=gpu.name if gpu else product,
        count=int(count) if count.isdigit() else 1,
        memory_bytes=size,
        bf16=capability >= (8, 0),
        capability=capability,
        origin=f"node {node['metadata']['name']}",
        gpu=gpu,
    )


def _capability(labels: dict[str, str]) -> tuple[int, int] | None:
    pair = [labels.get(f"nvidia.com/cuda.compute.{part}", "") for part in ("major", "minor")]
    return (int(pair[0]), int(pair[1])) if all(part.isdigit() for part in pair) else None
