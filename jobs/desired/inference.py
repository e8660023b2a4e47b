"""A Workspace's `inference` -> what should be served, whether it fits, and what is wrong. Pure."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import yaml

from jobs.api.client import Object
from jobs.desired import names
from jobs.desired import tuning as desired
from jobs.desired.tuning import Adapter, Server, Wanted
from tuning import plan, presets, spec
from tuning.errors import Problem, SpecError
from tuning.plan import inference as memory
from tuning.plan.device import Device
from tuning.presets import Instance
from tuning.spec import reference
from tuning.spec.workspace import Inference, Workspace

RUNTIME, BALANCED = "kaito.sh/runtime", "kaito.sh/enablelb"
CONFIG_KEY = "inference_config.yaml"
FRESH = "tuned"  # name of the adapter that the same Workspace made
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM knows
_RANK = 8  # of an adapter that nobody has looked into: the least that is usual


def read(workspace: Object, config_map: Object | None, device: Device | None) -> Wanted:
    """What `workspace` wants served on `device` (None: unknown, unless it names a machine)."""
    revision = desired.revision(workspace)
    try:
        found = spec.parse_workspace(
            json.dumps(desired.document(workspace), sort_keys=True), origin="Workspace"
        )
        machine = _machine(found)
        server = _server(workspace, found, config_map)
    except SpecError as error:
        return Wanted(revision, None, problems=_placed(error, workspace))
    facts = _facts(server.base)
    gpus = _gpus(workspace, server, machine)
    wish = Wanted(
        revision,
        None,
        server=server,
        instance=machine,
        gpus=gpus,
        weights_bytes=2 * facts.parameters if facts else None,
        training_bytes=0,
    )
    here = plan.device_of(machine.name) if machine else device
    if facts is None or here is None or here.kind != "cuda" or gpus == 0:
        return wish
    vllm = server.runtime == "vllm"
    if vllm and (facts.stored != "16-bit" or "quantization" in dict(server.settings)):
        return wish  # how much that takes is vLLM's to know
    try:
        _fits(server.base, here, len(server.adapters), gpus, vllm)
    except SpecError as error:
        change = "use a smaller model, or a machine with more memory"
        where = "inference.preset.name"
        return replace(
            wish, misfit=tuple(replace(p, where=where, change=change) for p in error.problems)
        )
    return wish


def _placed(error: SpecError, workspace: Object) -> tuple[Problem, ...]:
    """The problems of `error` at the preset that is served, where only that is named."""
    if workspace.get("tuning") is not None:
        return error.problems
    moved = {"tuning.preset.name": "inference.preset.name"}
    return tuple(replace(p, where=moved.get(p.where, p.where)) for p in error.problems)


def ahead(workspace: Object, tuned: Wanted, device: Device | None) -> Wanted:
    """What `tuned` says, or what is wrong with what is to be served afterwards: better known before
    a machine is paid for. A ConfigMap of vLLM's options may come later."""
    if workspace.get("inference") is None or tuned.spec is None:
        return tuned
    wish = read(workspace, None, device)
    problems = tuple(problem for problem in wish.problems if problem.code != "SPEC-117")
    if wish.server and wish.server.runtime == "vllm":
        problems += _not_for_vllm(tuned.spec.settings)
    if problems:
        return replace(tuned, spec=None, problems=problems)
    return replace(tuned, misfit=wish.misfit) if wish.misfit and not tuned.misfit else tuned


def _not_for_vllm(settings: spec.Settings) -> tuple[Problem, ...]:
    """What of the adapter that is to be tuned vLLM cannot serve."""
    where, change = "LoraConfig", "or use the runtime transformers"
    found = []
    if settings.dora:
        what = "vLLM serves no adapter of DoRA"
        found.append(Problem("SPEC-118", f"{where}.use_dora", what, f"remove it, {change}"))
    if settings.rank and settings.rank > RANKS[-1]:
        what = f"vLLM serves ranks up to {RANKS[-1]}"
        found.append(Problem("SPEC-118", f"{where}.r", what, f"lower it, {change}"))
    return tuple(found)


def smallest(wish: Wanted) -> str | None:
    """The machine type of the same cloud with the least GPU memory that could serve it."""
    assert wish.server is not None
    cloud = wish.instance.cloud if wish.instance else "azure"
    offered = [m for m in presets.instances() if m.cloud == cloud and not m.retired]
    for machine in sorted(offered, key=lambda m: (m.memory_bytes * m.gpus, m.gpus)):
        vllm = wish.server.runtime == "vllm"
        here, gpus = plan.device_of(machine.name), machine.gpus if vllm else 1
        try:
            _fits(wish.server.base, here, len(wish.server.adapters), gpus, vllm)
        except SpecError:
            continue
        return machine.name
    return None


@lru_cache(maxsize=256)
def _fits(base: str, here: Device, adapters: int, gpus: int, vllm: bool) -> None:
    """Raises SpecError if the weights and a decent context do not fit the GPUs.

    vLLM holds weights as they are published; our server takes 4 bits where those do not fit.
    """
    facts = _facts(base)
    assert facts is not None
    each = sum(linear.inputs + linear.outputs for linear in facts.linears)
    numbers = adapters * _RANK * facts.layers * each
    together = replace(here, memory_bytes=here.memory_bytes * gpus)
    precision: memory.Precision = "auto"
    if vllm:
        precision = "bfloat16" if here.bf16 else "float16"
    memory.planned(facts, together, adapter_numbers=numbers, precision=precision)


def _facts(base: str) -> presets.Facts | None:
    found = presets.find(base)
    return found.facts if found else None


def _machine(found: Workspace) -> Instance | None:
    name = found.resource.instance_type if found.resource else None
    return presets.instance(name) if name else None


def _gpus(workspace: Object, server: Server, machine: Instance | None) -> int:
    """transformers holds the model on one GPU; vLLM spreads it over all of the machine."""
    asked = names.annotation(workspace, "gpus")
    if server.runtime == "vllm":
        return int(asked) if asked is not None else machine.gpus if machine else 1
    return min(1, int(asked)) if asked is not None else 1


def _server(workspace: Object, found: Workspace, config_map: Object | None) -> Server:
    """Raises SpecError."""
    inference = found.inference
    assert inference is not None
    if not found.metadata.name[:1].isalpha():
        what = "begins with a digit, and a Service cannot be called so"
        raise _wrong("SPEC-104", "metadata.name", what, "begin it with a letter")
    preset = inference.preset or (found.tuning.preset if found.tuning else None)
    if preset is None:
        what = "a pod template of your own is not served by this operator"
        raise _wrong(
            "SPEC-118", "inference.template", what, "apply it as a Deployment, or use preset"
        )
    if found.resource and found.resource.count != 1:
        what, change = "one node serves a Workspace", "set it to 1"
        raise _wrong("SPEC-118", "resource.count", what, change)
    if found.resource and found.resource.partition:
        what = "shares of a GPU are not served by this operator"
        raise _wrong("SPEC-118", "resource.partition", what, "remove it")
    notes: dict[str, str] = workspace["metadata"].get("annotations") or {}
    vllm = notes.get(RUNTIME) == "vllm"
    if notes.get(RUNTIME) not in (None, "vllm", "transformers"):
        what = f"is {notes[RUNTIME][:40]!r}"
        raise _wrong("SPEC-104", RUNTIME, what, "use transformers or vllm")
    if vllm and inference.api_key_secret is not None:
        what = "vLLM guards only a part of its paths, and takes its key from the environment"
        change = "use the runtime transformers, or leave the key out and put a proxy before it"
        raise _wrong("SPEC-118", "inference.apiKeySecret", what, change)
    public = notes.get(BALANCED, "").lower() == "true"
    if public and inference.api_key_secret is None:
        what = "a load balancer lets everybody in, and there is no key"
        raise _wrong("SPEC-121", BALANCED, what, "name a Secret in inference.apiKeySecret")
    options = preset.preset_options
    tuned = found.tuning.preset.preset_options if found.tuning else None
    secret = options.model_access_secret if options else None
    adapters = (*_fresh(workspace, vllm=vllm), *_adapters(inference))
    _check(preset.name, adapters, vllm)
    ignored = inference.config and not vllm
    return Server(
        base=preset.name,
        adapters=adapters,
        runtime="vllm" if vllm else "transformers",
        hub_secret=secret or (tuned.model_access_secret if tuned else None),
        key_secret=inference.api_key_secret,
        public=public,
        base_revision=_trained_on(workspace, preset.name),
        settings=_settings(inference.config, config_map) if vllm else (),
        note="inference.config is for the runtime vllm and has no effect" if ignored else "",
    )


def _fresh(workspace: Object, *, vllm: bool) -> tuple[Adapter, ...]:
    """The adapter that this Workspace has made, by its digest."""
    output = (workspace.get("tuning") or {}).get("output") or {}
    status = workspace.get("status") or {}
    made = status.get("output") or {}
    rank = (status.get("plan") or {}).get("rank") if vllm else None
    if image := output.get("image"):
        name = reference.parse(image)
        if digest := made.get("digest"):  # unknown where the pod that knew it was lost
            name = replace(name, tag=None, digest=digest)
        secret = output.get("imagePushSecret")
        secrets = (secret,) if secret else ()
        return (Adapter(FRESH, str(name), pull_secrets=secrets, rank=rank),)
    if volume := output.get("volumeSource"):
        return (Adapter(FRESH, volume=volume, rank=rank),)
    return ()


def _trained_on(workspace: Object, base: str) -> str | None:
    """The commit of `base` that this Workspace's adapter was trained on; None where it comes from
    an image, not from the hub."""
    preset = presets.find(base)
    if not workspace.get("tuning") or (preset and preset.image):
        return None
    made = (workspace.get("status") or {}).get("output") or {}
    found: str | None = made.get("baseRevision")
    return found


def _adapters(inference: Inference) -> tuple[Adapter, ...]:
    found = []
    for each in inference.adapters or []:
        source = each.source
        assert source is not None and source.name  # a rule of the spec
        strength = 1.0 if each.strength is None else float(each.strength)
        secrets = tuple(source.image_pull_secrets or ())
        found.append(Adapter(source.name, source.image, source.volume_source, strength, secrets))
    return tuple(found)


def _check(base: str, adapters: tuple[Adapter, ...], vllm: bool) -> None:
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
    """What the base model is called in requests."""
    found = presets.find(base)
    return found.name if found else base


def _settings(name: str | None, config_map: Object | None) -> tuple[tuple[str, str], ...]:
    """The options of vLLM in the ConfigMap."""
    if not name:
        return ()
    where = f"ConfigMap {name}"
    text = ((config_map or {}).get("data") or {}).get(CONFIG_KEY)
    if text is None:
        what = "is not there" if config_map is None else f"has no key {CONFIG_KEY}"
        raise _wrong("SPEC-117", where, what, "create it; it goes on by itself")
    try:
        document: Any = yaml.safe_load(text)
        given = (document or {}).get("vllm") or {}
        items = tuple(
            sorted((str(key).replace("_", "-"), _option(value)) for key, value in given.items())
        )
    except (yaml.YAMLError, AttributeError, TypeError):
        raise _wrong("SPEC-113", where, "holds no map `vllm` of options", "mend it") from None
    for key, value in items:
        if key == "max-lora-rank" and not value.isdecimal():
            raise _wrong("SPEC-113", where, f"{key} is {value[:40]!r}", "write a whole number")
        if key not in _VLLM_OPTIONS:
            what = f"the option {key[:40]!r} is not one that a Workspace may set"
            raise _wrong("SPEC-118", where, what, f"use {', '.join(_VLLM_OPTIONS)}")
    return items


# A list of what is allowed: others run code of the model's or of a plugin, or open a door.
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


def _wrong(code: str, where: str, what: str, change: str) -> SpecError:
    return SpecError.at(code, where, what, change)
