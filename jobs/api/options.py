"""The operator's options, which the administrator sets: one YAML file, every key optional."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from tuning import presets
from tuning.errors import Problem, SpecError
from tuning.network.policy import Policy
from tuning.plan import prices
from tuning.plan.device import Device
from tuning.plan.prices import Prices
from tuning.spec import policy_file

DAY = 24 * 3600
# Bytes of a pod's annotations: the API server takes 256 KiB, and webhooks add theirs.
MAX_ANNOTATIONS = (256 - 8) * 1024


def _build(name: str) -> str:
    if name not in (known := [engine.name for engine in presets.engines()]):
        raise ValueError(f"no build of torch; use {', '.join(known)}")
    return name


_BESIDE = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
Build = Annotated[str, AfterValidator(_build)]
_Variable = Literal["HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "HF_ENDPOINT"]


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
    )


class NodeClass(_Part):
    """Karpenter's class of the nodes that are provisioned."""

    group: str = "karpenter.azure.com"
    """API group: karpenter.azure.com, karpenter.k8s.aws, kaito.sh, ..."""
    kind: str = "AKSNodeClass"
    """Kind: AKSNodeClass, EC2NodeClass, KaitoNodeClass, ..."""
    name: str = "default"
    """Name of the object."""


class Nodes(_Part):
    """Where Jobs run."""

    provision: bool = False
    """True: provision a node for each Workspace with an instanceType (Karpenter's NodeClaim)."""
    node_class: NodeClass = NodeClass()
    """Class of the nodes that are provisioned."""
    launch_seconds: int = Field(300, ge=1)
    """Seconds in which the cloud must launch a node."""
    register_seconds: int = Field(900, ge=1)
    """Seconds in which a launched node must become ready."""
    per_namespace: int | None = Field(None, ge=1)
    """Limit of nodes for all Workspaces of a namespace together; further Workspaces wait."""
    attempts: int = Field(3, ge=1)
    """How often a node is requested before the Workspace fails with the cloud's message."""
    tolerations: tuple[dict[str, str], ...] = ()
    """Tolerations of the Job, beside those for GPU taints."""


class Storage(_Part):
    """Where the run directory and the base weights are stored."""

    run_volume: Literal["auto", "claim", "ephemeral"] = "auto"
    """auto: a claim if there is a default storage class, else an emptyDir, lost with the pod."""
    storage_class: str | None = None
    """Storage class of the claim; the cluster's default if not set."""
    access_mode: Literal["ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"] = "ReadWriteOnce"
    """How the claim is mounted. A run on several machines has a claim only with ReadWriteMany."""
    shared_class: str | None = None
    """Storage class, of ReadWriteMany, for the claims of runs on several machines. Without it, and
    with another accessMode, their pods have emptyDirs: a run whose first pod is lost starts from
    the beginning."""
    cache_claim: str | None = None
    """A claim in each namespace with Workspaces, which share base weights in it."""
    cache_host_path: str | None = None
    """A folder of the node for shared base weights. It must exist on each node and be writable for
    userId, and the namespace must not enforce the restricted pod security standard."""

    @property
    def cached(self) -> bool:
        """Whether base weights are stored outside of the run volume."""
        return bool(self.cache_claim or self.cache_host_path)

    def for_nodes(self, count: int) -> Storage:
        """The same for a run on `count` machines: its claim must be mounted on each of them."""
        if count == 1 or self.access_mode == "ReadWriteMany":
            return self
        shared: dict[str, Any] = {"run_volume": "ephemeral"}
        if self.shared_class and self.run_volume != "ephemeral":
            shared = {"storage_class": self.shared_class, "access_mode": "ReadWriteMany"}
        return self.model_copy(update=shared)


class Prometheus(_Part):
    """Who may read the metrics of Jobs and servers, beside the operator."""

    namespace: str | None = None
    """Namespace of Prometheus. If set, the network policies of Jobs let its pods in at port 8080,
    which also shows the run's report, and those of servers at port 5000; nobody otherwise."""
    pod_labels: dict[str, str] = Field({"app.kubernetes.io/name": "prometheus"}, min_length=1)
    """Labels of Prometheus' pods in that namespace."""


class ClusterPolicy(_Part):
    """What Workspaces may use of the cluster: the section `cluster` of the policy file."""

    volumes: tuple[
        Literal["azureFile", "cephfs", "csi", "emptyDir", "ephemeral", "image", "nfs"], ...
    ] = ()
    """Kinds of volumeSource beside persistentVolumeClaim, and configMap for what is read. Each lets
    the authors of Workspaces reach what is not their namespace's."""
    namespaces: tuple[str, ...] = ()
    """Namespaces whose pods may be reached at every port: those of registries and object stores in
    the cluster. In all other namespaces the ports are those of URLs and images, 443, and
    egressPorts; a port is that of the pod, not of its Service."""
    runtime_classes: tuple[str, ...] = ()
    """RuntimeClasses that a Workspace may choose with the annotation runtime-class."""
    priority_classes: tuple[str, ...] = ()
    """PriorityClasses that a Workspace may choose with the annotation priority-class."""


class Options(_Part):
    """All options."""

    image: str = "tuning:latest"
    """The engine's image, best by digest: what every Job runs."""
    images: dict[Build, str] = {}
    """The engine's images by their build of torch (cu126, cu130). A Job gets the newest that has
    kernels for the planned GPU and runs with the nodes' driver, the oldest where the driver is not
    known; `image` where none does, and where the GPU is not known."""
    vllm_image: str | None = None
    """vLLM's image, for Workspaces with the annotation `kaito.sh/runtime: vllm`, best by digest;
    such Workspaces are refused if it is not set."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """Pull policy of these images."""
    image_pull_secrets: tuple[str, ...] = ()
    """Secrets with which the engine's image is pulled, in the Workspaces' namespaces."""
    namespaces: tuple[str, ...] = ()
    """Namespaces to watch; all of them if empty."""
    gpu_resource: str = "nvidia.com/gpu"
    """Resource name of a GPU in pods."""
    nodes: Nodes = Nodes()
    """Where Jobs run."""
    storage: Storage = Storage()
    """Where the run directory and the base weights are stored."""
    backoff_limit: int = Field(3, ge=0)
    """Number of pods that may fail for a transient reason."""
    beside_kaito: Literal["refuse", "opt-in"] = "refuse"
    """If KAITO's controller runs, too: do not start, or reconcile only Workspaces with the
    annotation `tuning.kaito.sh/opt-in: "true"`."""
    deadline_seconds: int | None = Field(None, ge=1)
    """Deadline of a Job in seconds."""
    keep_seconds: int = Field(7 * DAY, ge=0)
    """Seconds until a finished Job and its log are deleted; the status stays."""
    stuck_seconds: int = Field(900, ge=1)
    """Seconds that a provisioned node, or a pod without its image or Secret, may wait before the
    Workspace fails."""
    grace_seconds: int = Field(120, ge=10)
    """Seconds that a pod has to save its state when it is stopped."""
    network_policy: bool = True
    """Whether each Job gets a NetworkPolicy."""
    environment: dict[_Variable, str] = {}
    """Environment variables of every pod of a Workspace: HTTPS_PROXY, HTTP_PROXY and NO_PROXY
    for registries and the hub (data obey the policy's proxy), HF_ENDPOINT for a mirror of the hub.
    A proxy's port must be in egressPorts."""
    service_account: str | None = None
    """Service account of these pods in each Workspace's namespace, for a cloud's workload identity;
    the namespace's `default` if not set. Kubernetes' own token is never mounted."""
    pod_labels: dict[str, str] = {}
    """Additional labels of these pods, such as `azure.workload.identity/use: "true"`."""
    egress_ports: tuple[int, ...] = ()
    """Egress ports of pods, beside 443, DNS and those of their URLs and images."""
    runtime_class: str | None = None
    """RuntimeClass of these pods, such as `nvidia`; the node's default if not set."""
    priority_class: str | None = None
    """PriorityClass of these pods; the cluster's default if not set."""
    operator_namespace: str = "tuning-system"
    """Namespace of the operator: only its pods may read a Job's progress."""
    prometheus: Prometheus = Prometheus()
    """Who may read the metrics of Jobs and servers, beside the operator."""
    allow_host_path: bool = False
    """Whether a Workspace may name a folder of the node as its volume."""
    user_id: int = Field(10001, ge=1)
    """User and group of the Job."""
    cluster: ClusterPolicy = ClusterPolicy()
    """What Workspaces may use of the cluster; the section `cluster` of --policy replaces it."""
    prices: Prices = Prices()
    """What machines cost; the section `prices` of --policy replaces it."""
    policy: str | None = None
    """Text of the policy file for Jobs; set from --policy."""
    policy_files: dict[str, str] = {}
    """Certificates and public keys that the policy names; set from the files beside it."""


def for_device(options: Options, device: Device | None) -> Options:
    """`options` with the engine's image for `device`: the newest of `images` that runs there.

    Where the driver is not known, the oldest with kernels for the GPUs: it runs on more drivers.
    """
    kinds = device.capabilities if device else ()
    builds = presets.engine_builds(*kinds, cuda=device.cuda) if device and kinds else []
    fitting = [options.images[build] for build in builds if build in options.images]
    if not fitting:
        return options
    image = fitting[-1] if device and device.cuda else fitting[0]
    return options.model_copy(update={"image": image})


def with_policy(options: Options, path: Path) -> Options:
    """`options` with the policy file at `path`, and the certificates and public keys beside it that
    it names, which are sent to each Job. Files with an absolute path must be in the image.

    Raises SpecError for an invalid policy, and for files that cannot be sent.
    """
    Policy.load(path)
    cluster = policy_file.section(path, "cluster", ClusterPolicy)
    text = path.read_text(encoding="utf-8")
    contents, problems = {}, []
    for name in _named(yaml.safe_load(text) or {}):
        if name.startswith("/"):
            continue
        try:
            content = (path.parent / name).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            what, change = f"names {name}, which is no text file beside it", "put it there"
        else:
            if "PRIVATE KEY" not in content and _BESIDE.fullmatch(name):
                contents[name] = content
                continue
            what = f"names {name}, which cannot be sent to Jobs"
            change = "put private keys and files in folders into the image, by absolute path"
        problems.append(Problem("JOB-105", str(path), what, change))
    total = len(text.encode()) + sum(map(len, contents.values()))
    if total > MAX_ANNOTATIONS:
        sizes = ", ".join(f"{name} {len(content):,}" for name, content in contents.items())
        what = (
            f"takes {total:,} bytes with its files ({sizes}); {MAX_ANNOTATIONS:,} travel to a Job"
        )
        change = "put large bundles into the engine's image, and name them by absolute path"
        problems.append(Problem("JOB-115", str(path), what, change))
    if problems:
        raise SpecError(problems)
    update: dict[str, Any] = {"policy": text, "policy_files": contents}
    for name, part in (("cluster", cluster), ("prices", prices.load(path))):
        if part.model_fields_set:
            update[name] = part
    return options.model_copy(update=update)


def _named(policy: dict[str, Any]) -> Iterator[str]:
    """The files that a policy names; malformed sections are reported by the engine."""

    def section(parent: Any, key: str) -> dict[str, Any]:
        value = parent.get(key)
        return value if isinstance(value, dict) else {}

    if bundle := section(policy, "data").get("caBundle"):
        yield str(bundle)
    registry = section(policy, "registry")
    if isinstance(keys := registry.get("keys"), list):
        yield from map(str, keys)
    hosts = section(registry, "hosts")
    for name in hosts:
        host = section(hosts, name)
        yield from (str(host[key]) for key in ("ca", "clientCert", "clientKey") if host.get(key))


def load(path: Path | None) -> Options:
    """The options in the YAML file at `path`; the defaults for None.

    Raises SpecError with all problems of the file.
    """
    if path is None:
        return Options()
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Options.model_validate({} if document is None else document)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        what = f"cannot be read ({type(error).__name__})"
        raise SpecError.at("JOB-101", str(path), what, "give a YAML file") from None
    except ValidationError as error:
        problems = [
            Problem("JOB-102", ".".join(map(str, e["loc"])), e["msg"], f"correct {path.name}")
            for e in error.errors(include_input=False, include_url=False)
        ]
        raise SpecError(problems) from None
