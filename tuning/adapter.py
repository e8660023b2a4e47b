"""What an adapter is: a strict config parser, the finish gate, compatibility with a base.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`, and the tokenizer
files it was trained with. The config may come from strangers, and some of its keys make PEFT import
what they name; so it is read here, against a list of what we know, before any library sees it. The
parser and `inspect` need no torch.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuning import files, safetensors
from tuning.errors import DivergedError, Problem, SpecError, TuningError
from tuning.safetensors import Tensor

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
KNOWN_SUFFIXES = frozenset({".json", ".safetensors", ".jinja", ".model", ".txt", ".md"})

Unset = Literal[False] | None
"""What a key may say that we know and do not support."""
Nothing = dict[str, Any]  # narrowed by max_length=0 where it is used
_Empty = Field(default=None, max_length=0)


class _Config(BaseModel):
    """`adapter_config.json`, as PEFT 0.4 to 0.21 writes it. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    peft_type: Literal["LORA"]
    r: int = Field(gt=0, le=4096)
    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    target_modules: list[str] | str
    task_type: Literal["CAUSAL_LM"] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    use_rslora: bool = False
    use_dora: bool = False
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    inference_mode: bool = True
    peft_version: str | None = None
    bias: Literal["none"] = "none"
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    # Known to PEFT and not to us: they may be there, but must say nothing. `auto_mapping` and the
    # megatron keys name code to import.
    auto_mapping: Nothing | None = _Empty
    megatron_config: Nothing | None = _Empty
    megatron_core: Literal["megatron.core"] | None = None  # PEFT's default; unused without config
    fan_in_fan_out: Unset = None
    lora_bias: Unset = None
    use_qalora: Unset = None
    qalora_group_size: int | None = None
    ensure_weight_tying: Unset = None
    modules_to_save: list[str] | None = _Empty
    rank_pattern: Nothing | None = _Empty
    alpha_pattern: Nothing | None = _Empty
    loftq_config: Nothing | None = _Empty
    eva_config: Unset = None
    corda_config: Unset = None
    lora_ga_config: Unset = None
    velora_config: Unset = None
    monteclora_config: Unset = None
    kasa_config: Unset = None
    arrow_config: Unset = None
    use_bdlora: Unset = None
    alora_invocation_tokens: Unset = None
    layer_replication: Unset = None
    trainable_token_indices: Unset = None
    target_parameters: Unset = None


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds."""

    folder: Path
    config: dict[str, Any]  # what adapter_config.json sets, checked
    tensors: dict[str, Tensor]

    @property
    def rank(self) -> int:
        """The LoRA rank r."""
        return int(self.config["r"])

    @property
    def base_model(self) -> str | None:
        """The base model that the adapter names: a hub id or a name; None if it names none."""
        return self.config.get("base_model_name_or_path")

    @property
    def revision(self) -> str | None:
        """The revision of the base model, if the adapter names one."""
        return self.config.get("revision")

    @property
    def targets(self) -> tuple[str, ...]:
        """Last names of the adapted projections, sorted."""
        return tuple(sorted({name.rpartition(".")[2] for name in self.modules}))

    @property
    def modules(self) -> tuple[str, ...]:
        """Full names of the adapted projections in the base model, sorted."""
        return modules(self.tensors)

    @property
    def parameters(self) -> int:
        """How many numbers the adapter has."""
        return sum(tensor.count for tensor in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Size of the weights file."""
        return (self.folder / WEIGHTS).stat().st_size

    @property
    def sha256(self) -> str:
        """sha256 of the weights file, which is read for it."""
        return files.digest_file(self.folder / WEIGHTS)


def inspect(folder: Path) -> Adapter:
    """Read the adapter in `folder`: its config strictly, and of its weights the header alone.

    Raises SpecError with everything that is wrong: a file missing, a config key that is unknown or
    unsupported, a weights file that is damaged, or tensors that do not fit the config.
    """
    problems = []
    if not folder.is_dir():
        raise SpecError.at("MODEL-200", str(folder), "is no folder", "name an adapter's folder")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            what = f"has no {name}"
            problems.append(Problem("MODEL-201", str(folder), what, "name an adapter's folder"))
    if problems:
        raise SpecError(problems)
    config = parse((folder / CONFIG).read_bytes(), where=str(folder / CONFIG))
    tensors = header(folder / WEIGHTS)
    problems = mismatches(config, tensors, str(folder / WEIGHTS))
    if problems:
        raise SpecError(problems)
    return Adapter(folder, config, tensors)


def parse(data: bytes, *, where: str = CONFIG) -> dict[str, Any]:
    """The content of an `adapter_config.json`: what it sets beyond PEFT's defaults.

    Raises SpecError with all that is wrong: keys that are unknown, that would run code, or that ask
    for what we do not support.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SpecError.at("MODEL-202", where, f"is no JSON: {error}", "fetch it again") from None
    if not isinstance(record, dict):
        raise SpecError.at("MODEL-202", where, "is no JSON object", "fetch it again")
    try:
        config = _Config.model_validate(record)
    except ValidationError as error:
        raise SpecError(
            Problem("MODEL-203", f"{where} {key}", what, "use a plain LoRA adapter")
            for key, what in sorted({(_key(e["loc"]), _saying(e)) for e in error.errors()})
        ) from None
    return config.model_dump(exclude_defaults=True)


def _key(loc: tuple[int | str, ...]) -> str:
    return str(loc[0]) if loc else ""


def _saying(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "is no key that we know"
    if error["type"] == "missing":
        return "is missing"
    value = error["input"]
    shown = value if isinstance(value, bool | int | float | str | None) else type(value).__name__
    return f"is {str(shown)[:80]!r}, which is not supported"


def header(path: Path) -> dict[str, Tensor]:
    """The tensors that a safetensors file says it holds; no weights are read.

    Raises SpecError if the file is damaged or cut.
    """
    try:
        return safetensors.read_header(path)
    except ValueError as error:
        what = f"is damaged: it {error}"
        raise SpecError.at("MODEL-204", str(path), what, "fetch or train it again") from None


_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?"
)


def _parts(name: str) -> tuple[str, str]:
    """`base_model.model.M.lora_A.weight` -> (M, lora_A); ("", "") if it is no such name."""
    match = _NAME.fullmatch(name)
    return (match["module"], match["part"]) if match else ("", "")


def modules(tensors: Iterable[str]) -> tuple[str, ...]:
    """Full names of the projections that tensors with these names adapt, sorted."""
    return tuple(sorted({module for module, _ in map(_parts, tensors)}))


def mismatches(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> list[Problem]:
    """Where names and shapes are not those of a LoRA adapter with this config."""
    found: dict[str, dict[str, Tensor]] = {}
    problems = []
    for name, tensor in tensors.items():
        module, part = _parts(name)
        if not module:
            problems.append((name, "is no LoRA tensor"))
        found.setdefault(module, {})[part] = tensor
    found.pop("", None)
    if not found:
        problems.append(("", "holds no LoRA tensors"))
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if config.get("use_dora") else set())
    rank = config["r"]
    for module, parts in found.items():
        if set(parts) != wanted:
            problems.append((module, f"has {sorted(parts)}, not {sorted(wanted)}"))
            continue
        a, b = parts["lora_A"].shape, parts["lora_B"].shape
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            problems.append((module, f"has shapes {a} and {b}, which do not fit rank {rank}"))
        if not _targeted(module, config):
            problems.append((module, "is not among target_modules"))
    change = "fetch or train it again"
    return [
        Problem("MODEL-205", f"{where} {name}".strip(), what, change) for name, what in problems
    ]


def _targeted(module: str, config: Mapping[str, Any]) -> bool:
    targets = config["target_modules"]
    if isinstance(targets, str):
        # A pattern from a stranger is never run: it could take for ever.
        return True
    return any(module == name or module.endswith(f".{name}") for name in targets)


def stranger(adapter: Adapter, base: str | None) -> list[Problem]:
    """Why `adapter` is not for the base model with this hub id; empty if it is, or nobody says.

    A folder has no such name (None). Names are compared as hubs do, in any case.
    """
    named = adapter.base_model
    if base is None or named is None or named.casefold() == base.casefold():
        return []
    what = f"is made for {named}, not for {base}"
    change = f"use {named}, or say --any-base if the two are the same model"
    return [Problem("MODEL-207", str(adapter.folder), what, change)]


def misfits(adapter: Adapter, base_config: Mapping[str, Any]) -> list[Problem]:
    """Why `adapter` cannot be put on the base model with this `config.json`; empty if it can.

    Judges what a config tells: the number of layers, and the width of the hidden state where a
    projection reads or writes it.
    """
    text = base_config.get("text_config") or base_config
    layers = text.get("num_hidden_layers") or text.get("n_layer")
    width = text.get("hidden_size") or text.get("n_embd")
    problems = []
    for name, tensor in adapter.tensors.items():
        module, part = _parts(name)
        last = module.rpartition(".")[2]
        number = next((int(piece) for piece in module.split(".") if piece.isdigit()), None)
        if layers is not None and number is not None and number >= layers:
            problems.append((module, f"is in layer {number}; the base model has {layers}"))
        reads, writes = part == "lora_A" and last in _READS, part == "lora_B" and last in _WRITES
        size = tensor.shape[1] if reads else tensor.shape[0] if writes else width
        if width is not None and size != width:
            problems.append((module, f"is made for width {size}; the base model has {width}"))
    change = f"use the adapter with its own base model{_named(adapter)}"
    return [Problem("MODEL-206", module, what, change) for module, what in problems]


_READS = frozenset(
    {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"}
    | {"gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h"}
)
_WRITES = frozenset({"o_proj", "down_proj", "fc2", "dense_4h_to_h"})


def _named(adapter: Adapter) -> str:
    return f", {adapter.base_model}" if adapter.base_model else ""


def finish(
    target: Path,
    *,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    save_tokenizer: Callable[[Path], object],
    step: int,
    steps: int,
) -> Adapter:
    """Put a trained adapter in place at `target`, if it is one: the finish gate.

    The step count is reached, every tensor is finite, at least one `lora_B` is not zero, and what
    was written reads back as the adapter of `config`. Whatever fails, nothing is at `target` that
    was not there before. The same tensors and config always give the same bytes. Raises
    DivergedError, SpecError, or TuningError for an unfinished training.
    """
    from safetensors.torch import save

    _gate(tensors, step=step, steps=steps)
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        save_tokenizer(scratch)
        for path in scratch.rglob("*"):
            if path.suffix not in KNOWN_SUFFIXES:
                raise AssertionError(f"unexpected file {path.name} beside the tokenizer")
        files.write_json(scratch / CONFIG, dict(config))
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        files.write(scratch / WEIGHTS, save(ready, metadata={"format": "pt"}))
        inspect(scratch)
        if target.exists():
            shutil.rmtree(target)
        files.replace_folder(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return inspect(target)


def _gate(tensors: Mapping[str, torch.Tensor], *, step: int, steps: int) -> None:
    if step != steps:
        what = f"training ended at step {step} of {steps}"
        raise TuningError.at("TRAIN-150", "adapter", what, "run the same command again")
    broken = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if broken:
        raise DivergedError.at(
            "TRAIN-132",
            "adapter",
            f"{len(broken)} of {len(tensors)} tensors are not finite, the first {broken[0]}",
            "lower learning_rate, or look at the rows of the last steps",
        )
    changed = any(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name)
    if steps > 0 and not changed:
        raise DivergedError.at(
            "TRAIN-133",
            "adapter",
            "every lora_B is zero: training changed nothing",
            "check that learning_rate is not 0 and that the rows have answers to learn",
        )


def config_of(
    lora: Mapping[str, Any], *, base_name: str, base_revision: str | None
) -> dict[str, Any]:
    """`adapter_config.json` of a LoRA config (PEFT's `to_dict`): only what a reader needs, sorted.

    No local path gets in: `base_name` replaces whatever folder the base was loaded from.
    """
    alpha = float(lora["lora_alpha"])
    hub_revision = base_revision if base_revision and ":" not in base_revision else None
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": hub_revision,
        "r": lora["r"],
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,  # some readers want an int
        "lora_dropout": lora["lora_dropout"],
        "use_rslora": lora["use_rslora"],
        "use_dora": lora["use_dora"],
        "target_modules": sorted(lora["target_modules"]),
        "layers_to_transform": lora["layers_to_transform"],
        "bias": "none",
        "inference_mode": True,
        "peft_version": lora["peft_version"],
    }
    exclude = lora["exclude_modules"]
    if exclude:
        record["exclude_modules"] = exclude if isinstance(exclude, str) else sorted(exclude)
    return {name: value for name, value in record.items() if value is not None}
