"""The base model as a plan needs it; combinations of model, method and device that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tuning import files, presets
from tuning.errors import Problem, SpecError
from tuning.plan import backends, device, gpu_problems, sizing, verdict
from tuning.plan.coefficients import Coefficients
from tuning.plan.device import Device
from tuning.plan.verdict import CHANGE_MODEL, Verdict
from tuning.presets import stored
from tuning.spec import Spec

IMAGE = "oci:"  # before the name of an image that holds a base model
DRAFT_LENGTH = 2048  # before the data was read

# Classes whose output layer has a bias, which peft drops where rows of it are trained.
BIASED_HEADS = frozenset(
    {"bert", "bert-generation", "big_bird", "camembert", "codegen", "ctrl", "data2vec-text"}
    | {"electra", "ernie", "git", "gptj", "megatron-bert", "modernbert-decoder", "phi", "rembert"}
    | {"roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta"}
    | {"xlm-roberta-xl", "xlnet", "xmod"}
)
LARGEST_ON_CPU = 10**9  # parameters; a step of a larger model takes minutes on a CPU


@dataclass(frozen=True)
class Base:
    """A base model as a plan needs it; `facts` is None for an unknown family."""

    name: str  # hub id, or "local"
    revision: str
    facts: presets.Facts | None
    config: dict[str, Any] = field(default_factory=dict)  # config.json, where it was read
    simulated: Coefficients | None = None  # memory coefficients, for a model outside the presets
    unsized: str = ""  # why it could not be simulated
    verdict: Verdict | None = None  # how it is adapted, where that was asked of its class

    def sized(self, device: Device) -> sizing.Model | None:
        """The coefficients to estimate its memory on `device` with; None where there are none."""
        if self.simulated is not None:
            return sizing.Model(self.facts, self.simulated)
        if device.kind != "cuda" or stored.kept(self.config):  # no preset leaves out those
            return None
        return sizing.model(self.facts)

    @property
    def stored(self) -> str:
        """How its weights are published: "16-bit", "fp8", ..."""
        return self.facts.stored if self.facts else stored.of(self.config)

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        if self.facts:
            return self.facts.context
        return int(self.config.get("max_position_embeddings", DRAFT_LENGTH))

    @property
    def packing(self) -> tuple[bool, str]:
        """Whether packed rows stay apart, and why."""
        if self.facts:
            return self.facts.packing_safe, self.facts.packing_reason
        return (self.kind or presets.Class()).packs

    @property
    def reached(self) -> Verdict | None:
        """What LoRA reaches in it, as far as that is known without the weights."""
        if self.verdict is not None or self.facts is None:
            return self.verdict
        linears = sum(linear.layers for linear in self.facts.linears)
        return Verdict(linears, sum(x.layers * x.copies for x in self.facts.experts), 1.0)

    @property
    def kind(self) -> presets.Class | None:
        """What was measured of its class, or found on the model; None if nothing was."""
        known = presets.class_of(self.config)
        if self.verdict is None or (known and known.architecture):
            return known
        return replace(known or presets.Class(), attention=self.verdict.attention[0])


def base_of(spec: Spec, config: dict[str, Any], *, revision: str) -> Base:
    """The base model of `spec`, whose parsed config.json is `config`.

    Raises SpecError for an impossible config.
    """
    facts = presets.facts(config)
    return Base(_name(spec, facts), revision, facts, config)


def _name(spec: Spec, facts: presets.Facts | None) -> str:
    """The base model's name in the adapter: the hub id that the spec names.

    Weights of a folder or an image whose shape differs from the preset's go by the folder's or
    image's own name.
    """
    model = spec.base_model or spec.preset
    in_folder = Path(model).is_dir()
    if not in_folder and not model.startswith(IMAGE):
        preset = presets.find(model)
        return preset.hub_id if preset else model
    try:
        preset = presets.find(spec.preset)
    except SpecError:
        if spec.overrides.base_model:  # somebody wrote it, with an error
            raise
        preset = None  # called as the folder is
    if preset is None:
        return spec.preset
    if _shape(facts) == _shape(preset.facts):
        return preset.hub_id
    return Path(model).resolve().name if in_folder else model.removeprefix(IMAGE).removeprefix("//")


def _shape(facts: presets.Facts | None) -> tuple[int, ...] | None:
    """The sizes that differ between models of different sizes and families."""
    if facts is None:
        return None
    widths = (facts.hidden, facts.intermediate, facts.layers, facts.heads, facts.kv_heads)
    return (*widths, facts.head_dim, facts.vocab)


class Unknown(SpecError):
    """The base model's shape is not known without the network."""


def known_base(spec: Spec) -> Base:
    """The base model of a local folder or a preset, without the network.

    Raises Unknown for any other, SpecError.
    """
    name = spec.base_model or spec.preset
    if name.startswith(IMAGE):  # an image with the preset's weights
        name = spec.preset
    folder = Path(name)
    if spec.base_model and folder.is_dir():
        try:
            config = files.read_json(folder / "config.json")
        except (OSError, ValueError) as error:
            raise SpecError.at(
                "PLAN-108",
                str(folder / "config.json"),
                f"cannot be read ({error.__class__.__name__})",
                "name a folder with config.json, *.safetensors and a tokenizer",
            ) from None
        return base_of(spec, config, revision="local")
    if preset := presets.find(name):
        revision = spec.settings.revision or preset.revision
        found = verdict.of_preset(preset.name)
        return Base(preset.hub_id, revision, preset.facts, preset.config, verdict=found)
    raise Unknown.at(
        "PLAN-107",
        name,
        "is not among the presets, so its shape is not known without the network",
        "plan with --base-model FOLDER, or let `run` fetch its config first",
    )


def device_of(instance: str, nodes: int = 1) -> Device:
    """The device of `nodes` machines of a type. Raises SpecError for an unknown one."""
    machine = presets.instance(instance)
    return Device(
        kind="cuda",
        name=machine.gpu.name,
        count=machine.gpus,
        memory_bytes=machine.memory_bytes,
        bf16=machine.gpu.bf16,
        capability=machine.gpu.capability,
        origin=machine.name,
        gpu=machine.gpu,
        nodes=nodes,
        host_bytes=machine.ram_bytes,
        network=machine.network,
    )


def planned_device(spec: Spec, here: Device | None = None) -> Device:
    """The machines that `spec` names, or as many as it asks for of the one that is `here`.

    With no more GPUs than it takes of each. `here` None: what is found on this machine. Raises
    SpecError.
    """
    if spec.instance:
        planned = device_of(spec.instance, spec.nodes)
    else:
        here = here or device.detect()
        planned = replace(here, nodes=max(here.nodes, spec.nodes))
    if planned.kind == "cuda" and spec.gpus:
        return replace(planned, count=min(planned.count, spec.gpus))
    return planned


def refuse_unsupported(spec: Spec, base: Base, device: Device) -> None:
    """Raise SpecError, with all problems, for an unsupported model, method and device."""
    problems = []
    if base.facts and not (answer := presets.support(base.facts, spec.method)).supported:
        problems.append(Problem("PLAN-101", base.name, answer.reason, answer.change))
    elif not base.facts and (reason := stored.refusal(base.stored, spec.method)):
        change = stored.remedy(base.stored, base.name)
        problems.append(Problem("PLAN-101", base.name, reason, change))
    if base.kind and base.kind.refused:
        reason = f"is of a class that {base.kind.refused}"
        problems.append(Problem("PLAN-101", base.name, reason, CHANGE_MODEL))
    elif base.kind and base.kind.four_bit and spec.method == "qlora":
        reason = f"is of a class that {base.kind.four_bit}"
        problems.append(Problem("PLAN-101", base.name, reason, "use method lora"))
    elif base.verdict:
        dora = bool(spec.settings.dora)
        if refused := base.verdict.refusal(dora=dora, kind=base.kind):
            problems.append(Problem("PLAN-101", base.name, *refused))
    if device.kind == "cpu" and base.facts and base.facts.parameters > LARGEST_ON_CPU:
        billions = base.facts.parameters / 1e9
        reason = device.no_gpu or "there is none here"
        change = device.remedy or "run on a machine with an NVIDIA GPU and its driver"
        problems.append(
            Problem(
                "PLAN-102",
                base.name,
                f"has {billions:.1f} billion parameters and needs a GPU; {reason}",
                f"{change}, or plan for one with --instance",
            )
        )
    problems += gpu_problems.problems(device, spec.method)
    if problem := backends.unsuited(spec.settings.attention, device, base.facts, base.kind):
        problems.append(problem)
    problems += _unknown_modules(spec, base)
    kind = base.facts.model_type if base.facts else base.config.get("model_type")
    if spec.settings.new_tokens and kind in BIASED_HEADS:
        what = f"are set, and the output layer of {base.name} has a bias, without which peft trains"
        change = "leave them out, or choose another base model"
        problems.append(Problem("PLAN-118", "ModelConfig.new_special_tokens", what, change))
    if problems:
        raise SpecError(problems)


def _unknown_modules(spec: Spec, base: Base) -> Iterator[Problem]:
    """Targets and exclusions that match no projection of the model by their suffix, as in PEFT.

    A name with a layer number is checked later, on the loaded model.
    """
    names = [linear.name for linear in base.facts.linears] if base.facts else []
    known = sorted({name.rpartition(".")[2] for name in names})
    s = spec.settings
    if base.facts and (beyond := [n for n in s.layers or () if n >= base.facts.layers]):
        what = f"names layer {beyond[0]}, and {base.name} has {base.facts.layers}, from 0"
        yield Problem("PLAN-113", "LoraConfig.layers_to_transform", what, "name layers that exist")
    for key, listed in (
        ("target_modules", s.target_modules or ()),
        ("exclude_modules", s.exclude_modules or ()),
    ):
        for part in listed:
            skipped = part in ("all-linear", "") or any(x.isdigit() for x in part.split("."))
            if known and not skipped and part.rpartition(".")[2] not in known:
                what = f"names {part!r}, which is not an attention or MLP projection of {base.name}"
                change = f"use some of {', '.join(known)}"
                change += ", or leave it out: all are trained" if key == "target_modules" else ""
                yield Problem("PLAN-111", f"LoraConfig.{key}", what, change)
    targets = set(known) if s.target_modules is None else {*s.target_modules}
    targets = set(known) if "all-linear" in targets else {t.rpartition(".")[2] for t in targets}
    if targets & set(known) and targets <= set(s.exclude_modules or ()):
        what = f"leaves nothing of {base.name} to train"
        yield Problem("PLAN-111", "LoraConfig.exclude_modules", what, "exclude fewer of them")
