"""Desired state of an inference server: what to serve, whether it fits, what is invalid. Pure."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import tuning.plan as plan
from jobs.api.kinds import Object
from jobs.desired import names
from jobs.desired import tuning as desired_tuning
from jobs.desired.tuning import Adapter, Desired, Server
from tuning import presets, spec
from tuning.errors import Problem, SpecError
from tuning.plan import inference as memory
from tuning.plan.device import Device
from tuning.presets import Instance
from tuning.spec import documents, reference
from tuning.spec.workspace import Inference, Workspace

RUNTIME, LOAD_BALANCER = "kaito.sh/runtime", "kaito.sh/enablelb"
CONFIG_KEY = "inference_config.yaml"
TUNED = "tuned"  # name of the adapter that the same Workspace tuned
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank
_RANK = 8  # assumed for an adapter that has not been inspected


def read(workspace: Object, config_map: Object | None, device: Device | None) -> Desired:
    """Desired server on `device` (None: unknown, unless the Workspace names an instance type)."""
    revision = desired_tuning.revision(workspace)
    try:
        document = json.dumps(desired_tuning.document(workspace), sort_keys=True)
        parsed = spec.parse_workspace(
            document, origin="Workspace", max_nodes=desired_tuning.MAX_NODES
        )
        name = parsed.resource.instance_type if parsed.resource else None
        instance = presets.instance(name) if name else None
        server = _server(workspace, parsed, config_map)
    except SpecError as error:
        section = "inference" if workspace.get("tuning") is None else "tuning"
        moved = {"tuning.preset.name": f"{section}.preset.name"}
        problems = tuple(replace(p, where=moved.get(p.where, p.where)) for p in error.problems)
        return Desired(revision, None, problems=problems)
    facts = _facts(server.base)
    gpus = _gpus(workspace, server, instance)
    weights = 2 * facts.parameters if facts else None
    here = plan.device_of(instance.name) if instance else device
    desired = Desired(revision, None, server=server, instance=instance, device=here, gpus=gpus)
    desired = replace(desired, weights_bytes=weights, training_bytes=0)
    if facts is None or here is None or here.kind != "cuda" or gpus == 0:
        return desired
    is_quantized = facts.stored != "16-bit" or "quantization" in dict(server.settings)
    if server.runtime == "vllm" and is_quantized:
        return desired  # only vLLM knows how much memory that takes
    try:
        _check_fit(server.base, server.runtime, len(server.adapters), here, gpus)
    except SpecError as error:
        change = "use a smaller model, or an instance type with more memory"
        where = "inference.preset.name"
        problems = tuple(replace(p, where=where, change=change) for p in error.problems)
        return replace(desired, fit_problems=problems)
    return desired


def check_inference(workspace: Object, tuned: Desired, device: Device | None) -> Desired:
    """`tuned` with the problems of its `inference`, found before a node is paid for.

    A missing ConfigMap of vLLM options is none: it may still be created.
    """
    if workspace.get("inference") is None or tuned.spec is None:
        return tuned
    desired = read(workspace, None, device)
    problems = tuple(problem for problem in desired.problems if problem.code != "SPEC-117")
    if desired.server and desired.server.runtime == "vllm":
        problems += _vllm_problems(tuned.spec.settings)
    if problems:
        return replace(tuned, spec=None, problems=problems)
    return replace(tuned, fit_problems=tuned.fit_problems or desired.fit_problems)


def _vllm_problems(settings: spec.Settings) -> tuple[Problem, ...]:
    """Settings of the adapter to tune that vLLM cannot serve."""
    problems, change = [], "or use the runtime transformers"
    if settings.dora:
        what = "vLLM serves no DoRA adapters"
        problems.append(Problem("SPEC-118", "LoraConfig.use_dora", what, f"remove it, {change}"))
    if settings.rank and settings.rank > VLLM_RANKS[-1]:
        what = f"vLLM serves ranks up to {VLLM_RANKS[-1]}"
        problems.append(Problem("SPEC-118", "LoraConfig.r", what, f"lower it, {change}"))
    if settings.new_tokens:
        what = "vLLM serves no adapters with rows for new tokens"
        where = "ModelConfig.new_special_tokens"
        problems.append(Problem("SPEC-118", where, what, f"remove it, {change}"))
    return tuple(problems)


def fit_hint(desired: Desired) -> str:
    """Names the smallest instance type of the same cloud that could serve it."""
    server = desired.server
    assert server is not None

    def check(instance: Instance) -> None:
        gpus = instance.gpus if server.runtime == "vllm" else 1
        here = plan.device_of(instance.name)
        _check_fit(server.base, server.runtime, len(server.adapters), here, gpus)

    return desired_tuning.instance_hint(
        desired.instance.cloud if desired.instance else "azure", check
    )


@lru_cache(maxsize=256)
def _check_fit(base: str, runtime: str, adapters: int, device: Device, gpus: int) -> None:
    """Raises SpecError if the weights and a useful context do not fit the GPUs.

    vLLM loads weights as they are published; our server quantizes to 4 bits if they do not fit.
    """
    facts = _facts(base)
    assert facts is not None
    parameters = adapters * _RANK * facts.adapter()
    together = replace(device, memory_bytes=device.memory_bytes * gpus)
    precision: memory.Precision = "auto"
    if runtime == "vllm":
        precision = "bfloat16" if device.bf16 else "float16"
    memory.planned(facts, together, adapter_numbers=parameters, precision=precision)


def _facts(base: str) -> presets.Facts | None:
    preset = presets.find(base)
    return preset.facts if preset else None


def _gpus(workspace: Object, server: Server, instance: Instance | None) -> int:
    """transformers loads the model on one GPU; vLLM spreads it over all of the node's."""
    requested = names.annotation(workspace, "gpus")
    if server.runtime == "vllm":
        return int(requested) if requested is not None else instance.gpus if instance else 1
    return min(1, int(requested)) if requested is not None else 1


def _server(workspace: Object, parsed: Workspace, config_map: Object | None) -> Server:
    """The server that `inference` describes. Raises SpecError."""
    inference = parsed.inference
    assert inference is not None
    preset = inference.preset or (parsed.tuning.preset if parsed.tuning else None)
    annotations: dict[str, str] = workspace["metadata"].get("annotations") or {}
    _check_support(parsed, annotations)
    assert preset is not None
    vllm = annotations.get(RUNTIME) == "vllm"
    options = preset.preset_options
    tuned = parsed.tuning.preset.preset_options if parsed.tuning else None
    secret = options.model_access_secret if options else None
    adapters = (*_tuned_adapter(workspace, vllm=vllm), *_adapters(inference))
    _check_adapters(preset.name, adapters, vllm)
    notes = [f"{spec.spelled(path)}: {text}" for path, text in spec.ignored(parsed)]
    if inference.config and not vllm:
        notes.append("inference.config is for the runtime vllm and has no effect")
    return Server(
        base=preset.name,
        adapters=adapters,
        runtime="vllm" if vllm else "transformers",
        hub_secret=secret or (tuned.model_access_secret if tuned else None),
        key_secret=inference.api_key_secret,
        public=annotations.get(LOAD_BALANCER, "").lower() == "true",
        base_revision=_trained_on(workspace, preset.name),
        settings=_settings(inference.config, config_map) if vllm else (),
        note="; ".join(notes),
        runtime_class=names.annotation(workspace, "runtime-class"),
        priority_class=names.annotation(workspace, "priority-class"),
    )


def _check_support(parsed: Workspace, annotations: dict[str, str]) -> None:
    """Raises SpecError for the first thing in the Workspace that is not supported."""
    inference, resource = parsed.inference, parsed.resource
    assert inference is not None
    if not parsed.metadata.name[:1].isalpha():
        what = "starts with a digit, which is invalid for the name of a Service"
        raise SpecError.at("SPEC-104", "metadata.name", what, "begin it with a letter")
    if not inference.preset and not parsed.tuning:
        what, change = "pod templates are not supported", "apply it as a Deployment, or use preset"
        raise SpecError.at("SPEC-118", "inference.template", what, change)
    if resource and resource.count != 1:
        what, change = "a Workspace is served by one node", "set it to 1"
        change += ", or serve the adapter with a Workspace of its own" if parsed.tuning else ""
        raise SpecError.at("SPEC-118", "resource.count", what, change)
    if resource and resource.partition:
        what = "GPU partitions are not supported for inference"
        raise SpecError.at("SPEC-118", "resource.partition", what, "remove it")
    runtime = annotations.get(RUNTIME)
    if runtime not in (None, "vllm", "transformers"):
        raise SpecError.at("SPEC-104", RUNTIME, f"is {runtime[:40]!r}", "use transformers or vllm")
    if runtime == "vllm" and inference.api_key_secret is not None:
        what = "vLLM protects only some of its paths, and reads its key from the environment"
        change = "use the runtime transformers, or remove the key and put a proxy in front"
        raise SpecError.at("SPEC-118", "inference.apiKeySecret", what, change)
    if annotations.get(LOAD_BALANCER, "").lower() == "true" and inference.api_key_secret is None:
        what = "a load balancer exposes the server to everybody, and there is no API key"
        raise SpecError.at(
            "SPEC-121", LOAD_BALANCER, what, "name a Secret in inference.apiKeySecret"
        )


def _tuned_adapter(workspace: Object, *, vllm: bool) -> tuple[Adapter, ...]:
    """The adapter that this Workspace tuned, by its digest if known."""
    output = (workspace.get("tuning") or {}).get("output") or {}
    status = workspace.get("status") or {}
    rank = (status.get("plan") or {}).get("rank") if vllm else None
    if image := output.get("image"):
        name = reference.parse(image)
        if digest := (status.get("output") or {}).get("digest"):  # unknown if the pod was lost
            name = replace(name, tag=None, digest=digest)
        secret = output.get("imagePushSecret")
        return (Adapter(TUNED, str(name), pull_secrets=(secret,) if secret else (), rank=rank),)
    if volume := output.get("volumeSource"):
        return (Adapter(TUNED, volume=volume, rank=rank),)
    return ()


def _trained_on(workspace: Object, base: str) -> str | None:
    """The hub commit of `base` that the adapter was tuned on; None for a base from an image."""
    preset = presets.find(base)
    if not workspace.get("tuning") or (preset and preset.image):
        return None
    found: str | None = ((workspace.get("status") or {}).get("output") or {}).get("baseRevision")
    return found


def _adapters(inference: Inference) -> tuple[Adapter, ...]:
    adapters = []
    for each in inference.adapters or []:
        source = each.source
        assert source is not None and source.name  # a rule of the spec
        strength = 1.0 if each.strength is None else float(each.strength)
        secrets = tuple(source.image_pull_secrets or ())
        adapters.append(Adapter(source.name, source.image, source.volume_source, strength, secrets))
    return tuple(adapters)


def _check_adapters(base: str, adapters: tuple[Adapter, ...], vllm: bool) -> None:
    """Raises SpecError for names that are not unique, and for strengths with vLLM."""
    problems, taken = [], {base_name(base)}
    for each in adapters:
        if each.name in taken:
            what = f"the name {each.name} stands for more than one model"
            problems.append(Problem("SPEC-104", "inference.adapters", what, "choose another name"))
        taken.add(each.name)
        if vllm and each.strength != 1:
            what = "Runtime validation: vLLM does not support adapter strength"
            change = f"remove the strength of {each.name}, or use the runtime transformers"
            problems.append(Problem("SPEC-118", "inference.adapters", what, change))
    if problems:
        raise SpecError(problems)


def base_name(base: str) -> str:
    """Model name of the base model in requests."""
    preset = presets.find(base)
    return preset.name if preset else base


def _settings(name: str | None, config_map: Object | None) -> tuple[tuple[str, str], ...]:
    """The vLLM options in the ConfigMap. Raises SpecError."""
    if not name:
        return ()
    where = f"ConfigMap {name}"
    text = ((config_map or {}).get("data") or {}).get(CONFIG_KEY)
    if text is None:
        what = "does not exist" if config_map is None else f"has no key {CONFIG_KEY}"
        raise SpecError.at("SPEC-117", where, what, "create it; the server then starts")
    options = _vllm_options(str(text), where)
    if options is None:
        what = "has no map `vllm` of options"
        raise SpecError.at("SPEC-113", where, what, "correct it")
    items = tuple(
        sorted((str(key).replace("_", "-"), _option(value)) for key, value in options.items())
    )
    for key, value in items:
        if key == "max-lora-rank" and not value.isdecimal():
            what = f"{key} is {value[:40]!r}"
            raise SpecError.at("SPEC-113", where, what, "write a whole number")
        if key not in _VLLM_OPTIONS:
            what = f"the option {key[:40]!r} is not allowed in a Workspace"
            raise SpecError.at("SPEC-118", where, what, f"use {', '.join(_VLLM_OPTIONS)}")
    return items


@lru_cache(maxsize=64)
def _vllm_options(text: str, where: str) -> dict[str, Any] | None:
    """The map `vllm` in the text of a ConfigMap; None for another document. Raises SpecError."""
    parsed = documents.read(text, origin=where, max_nodes=desired_tuning.MAX_NODES)
    if problems := [each for document in parsed for each in document.findings.in_order()]:
        raise SpecError(problems)
    whole = parsed[0].value if parsed else {}
    options = (whole.get("vllm") or {}) if isinstance(whole, dict) else None
    return options if isinstance(options, dict) else None


# An allowlist: other options run code of a model or plugin, or open a port.
_VLLM_OPTIONS = (
    "block-size",
    "cpu-offload-gb",
    "dtype",
    "enable-auto-tool-choice",
    "enable-chunked-prefill",
    "enable-prefix-caching",
    "enforce-eager",
    "fully-sharded-loras",
    "gpu-memory-utilization",
    "kv-cache-dtype",
    "max-cpu-loras",
    "max-logprobs",
    "max-lora-rank",
    "max-loras",
    "max-model-len",
    "max-num-batched-tokens",
    "max-num-seqs",
    "pipeline-parallel-size",
    "quantization",
    "reasoning-parser",
    "seed",
    "swap-space",
    "tensor-parallel-size",
    "tool-call-parser",
)


def _option(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    return json.dumps(value, sort_keys=True)
