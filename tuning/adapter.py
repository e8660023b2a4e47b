"""LoRA adapters: a strict config parser, and the compatibility with a base model. No torch.

An adapter is a folder with `adapter_config.json`, `adapter_model.safetensors` and its tokenizer's
files. The config is untrusted, and some keys make PEFT import what they name, so it is checked here
against a list of known keys before any library reads it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuning import files, safetensors
from tuning.errors import Problem, SpecError
from tuning.safetensors import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"  # of PEFT before 0.7; never read

Unset = Literal[False] | None
"""The values of a key that is known and not supported."""
Nothing = dict[str, Any]  # narrowed by max_length=0 where it is used
_Empty = Field(default=None, max_length=0)
_Id = Annotated[int, Field(ge=0, lt=1 << 24)]
_Ids = Annotated[list[_Id], Field(min_length=1, max_length=1 << 16)]


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
    trainable_token_indices: _Ids | dict[str, _Ids] | None = None
    ensure_weight_tying: bool = False
    # Known to PEFT and not supported: they must be unset or empty. `auto_mapping` and the megatron
    # keys name code to import.
    auto_mapping: Nothing | None = _Empty
    megatron_config: Nothing | None = _Empty
    megatron_core: Literal["megatron.core"] | None = None  # PEFT's default; unused without config
    fan_in_fan_out: Unset = None
    lora_bias: Unset = None
    use_qalora: Unset = None
    qalora_group_size: int | None = None
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
    target_parameters: list[str] | None = None  # experts, and projections by their weight


@dataclass(frozen=True)
class Adapter:
    """The validated content of an adapter folder."""

    folder: Path
    config: dict[str, Any]  # what adapter_config.json sets, checked
    tensors: dict[str, Tensor]

    @property
    def rank(self) -> int:
        """The LoRA rank r."""
        return int(self.config["r"])

    @property
    def base_model(self) -> str | None:
        """The base model that the config names, a hub id or a path, or None.

        Of a path on this machine, the name that `tuning.json` records for it.
        """
        named: str | None = self.config.get("base_model_name_or_path")
        if named is None or not Path(named).is_absolute():
            return named
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            return str(files.read_json(self.folder / "tuning.json")["recipe"]["base_model"])
        return named

    @property
    def modules(self) -> tuple[str, ...]:
        """Full names of the adapted projections in the base model, sorted."""
        return modules(self.tensors)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens whose rows of the embedding it trains, ascending."""
        return _token_ids(self.config)

    @property
    def parameters(self) -> int:
        """How many numbers the adapter has."""
        return sum(tensor.count for tensor in self.tensors.values())

    @property
    def sha256(self) -> str:
        """sha256 of the weights file, which is read for it."""
        return files.digest_file(self.folder / WEIGHTS)


def inspect(folder: Path, *, where: str = "") -> Adapter:
    """Read and validate the adapter in `folder`: its config, and the header of its weights.

    Messages name it by `where`, the image that it came from, say. Raises SpecError with all
    problems: a missing file, weights as a pickle, an unknown or unsupported config key, a damaged
    weights file, or tensors that do not fit the config.
    """
    problems, where = [], where or str(folder)
    if not folder.is_dir():
        raise SpecError.at("MODEL-200", where, "is not a folder", "name an adapter's folder")
    for name in (CONFIG, WEIGHTS):
        if name == WEIGHTS and not (folder / name).exists() and (folder / PICKLE).exists():
            problems.append(pickled(where, PICKLE))
        elif not (folder / name).is_file():
            what = f"has no {name}"
            problems.append(Problem("MODEL-201", where, what, "name an adapter's folder"))
    if problems:
        raise SpecError(problems)
    config = parse((folder / CONFIG).read_bytes(), where=f"{where}/{CONFIG}")
    tensors = header(folder / WEIGHTS, where=f"{where}/{WEIGHTS}")
    problems = mismatches(config, tensors, f"{where}/{WEIGHTS}")
    if problems:
        raise SpecError(problems)
    return Adapter(folder, config, tensors)


def pickled(where: str, name: str) -> Problem:
    """The problem of weights that are a pickle, the file `name`."""
    what = f"has no {WEIGHTS}, only a pickle ({name}), which can run code and is not read"
    change = "where you trust it, load it with PEFT and save it again: save_pretrained(DIR)"
    return Problem("MODEL-201", where, what, change)


def has_local_base(folder: Path) -> bool:
    """Whether the adapter in `folder` records that its base was a local folder."""
    try:
        return ":" in files.read_json(folder / "tuning.json")["recipe"]["base_revision"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def write_config(folder: Path, target: Path, *, base_model: str) -> None:
    """Write the config of the adapter in `folder` to `target`, with `base_model` as its base."""
    config = files.read_json(folder / CONFIG)
    files.write_json(target, config | {"base_model_name_or_path": base_model})


def parse(data: bytes, *, where: str = CONFIG) -> dict[str, Any]:
    """The content of an `adapter_config.json` without PEFT's defaults.

    Raises SpecError with all keys that are unknown, would run code, or are not supported.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SpecError.at("MODEL-202", where, f"is not JSON: {error}", "fetch it again") from None
    if not isinstance(record, dict):
        raise SpecError.at("MODEL-202", where, "is not a JSON object", "fetch it again")
    try:
        config = _Config.model_validate(record)
    except ValidationError as error:
        raise SpecError(
            Problem("MODEL-203", f"{where} {key}", what, "use a plain LoRA adapter")
            for key, what in sorted({(str(e["loc"][0]), _message(e)) for e in error.errors()})
        ) from None
    return config.model_dump(exclude_defaults=True)


def _message(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "is not a known key"
    if error["type"] == "missing":
        return "is missing"
    value = error["input"]
    shown = value if isinstance(value, bool | int | float | str | None) else type(value).__name__
    return f"is {str(shown)[:80]!r}, which is not supported"


def header(path: Path, *, where: str = "") -> dict[str, Tensor]:
    """The tensors that a safetensors file says it holds; no weights are read.

    Raises SpecError if the file is damaged or cut.
    """
    try:
        return safetensors.read_header(path)
    except ValueError as error:
        what, change = f"is damaged: it {error}", "fetch or train it again"
        raise SpecError.at("MODEL-204", where or str(path), what, change) from None


INNER = ".base_layer"  # in the name of the inner one of two adapted parameters of a module
_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?"
)


def _parts(name: str) -> tuple[str, str]:
    """`base_model.model.M.lora_A.weight` -> (M, lora_A); ("", "") for other names."""
    match = _NAME.fullmatch(name)
    return (match["module"], match["part"]) if match else ("", "")


_ROWS = re.compile(r"base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta")


def rows_of(name: str) -> str | None:
    """The embedding or output layer of which the tensor `name` holds trained rows; else None."""
    match = _ROWS.fullmatch(name)
    return match["module"] if match else None


def _token_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    listed = config.get("trainable_token_indices") or ()
    lists = listed.values() if isinstance(listed, dict) else [listed]
    return tuple(sorted({id for ids in lists for id in ids}))


def modules(tensors: Iterable[str]) -> tuple[str, ...]:
    """Full names of the projections that the tensors adapt, sorted."""
    return tuple(sorted({module for module, _ in map(_parts, tensors)} - {""}))


def mismatches(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> list[Problem]:
    """A problem for each tensor whose name or shape does not fit the config."""
    by_module: dict[str, dict[str, Tensor]] = {}
    problems = []
    for name, tensor in tensors.items():
        module, part = _parts(name)
        if rows_of(name):
            trained = tensor.shape[0] if len(tensor.shape) == 2 else None
            if trained != len(_token_ids(config)):
                problems.append((name, "does not fit trainable_token_indices"))
        elif not module:
            problems.append((name, "is not a LoRA tensor"))
        by_module.setdefault(module, {})[part] = tensor
    by_module.pop("", None)
    if _token_ids(config) and not any(map(rows_of, tensors)):
        problems.append(("", "lacks the rows of trainable_token_indices"))
    if not by_module:
        problems.append(("", "holds no LoRA tensors"))
    expected = {"lora_A", "lora_B"} | (
        {"lora_magnitude_vector"} if config.get("use_dora") else set()
    )
    rank, mixed = config["r"], bool(config.get("target_parameters"))
    for module, parts in by_module.items():
        if set(parts) != expected:
            problems.append((module, f"has {sorted(parts)}, not {sorted(expected)}"))
            continue
        a, b = parts["lora_A"].shape, parts["lora_B"].shape
        several = mixed and len(a) == len(b) == 2 and a[0] == b[1] and a[0] % rank == 0
        if not several and (len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank):
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
        # An untrusted pattern is never run: its matching time has no bound.
        return True
    holders = [name.rpartition(".")[0] for name in config.get("target_parameters") or ()]
    module = module.replace(INNER, "")
    return any(module == name or module.endswith(f".{name}") for name in [*targets, *holders])


def places(
    adapter: Adapter, linears: Iterable[str], experts: Iterable[str]
) -> tuple[dict[str, str], list[str]]:
    """Full name of each linear layer and expert parameter of the base that is adapted -> the module
    that names its tensors; and the adapter's modules that the base lacks.

    Adapters of parameters of one module are nested: that of its last parameter is the outermost.
    """
    known, found, missing = set(linears), {}, []
    nested: dict[str, int] = {}
    for module in adapter.modules:
        if module in known:
            found[module] = module
        else:
            outer = module.replace(INNER, "")
            nested[outer] = nested.get(outer, 0) + 1
    named = tuple(adapter.config.get("target_parameters") or ())
    parameters = [n for n in experts if n.endswith(tuple(f".{end}" for end in named)) or n in named]
    for outer, depth in nested.items():
        inside = [name for name in parameters if name.rpartition(".")[0] == outer]
        if len(inside) == depth:
            found |= {name: outer + INNER * (depth - 1 - i) for i, name in enumerate(inside)}
        else:
            missing.append(outer)
    return found, missing


def other_base(adapter: Adapter, base: str | None) -> list[Problem]:
    """A problem if the adapter names another base model than the hub id `base`.

    None, for a folder, matches every name. Case does not matter, as on hubs.
    """
    named = adapter.base_model
    if base is None or named is None or named.casefold() == base.casefold():
        return []
    what = f"is made for {named}, not for {base}"
    change = f"use {named}, or if both are the same add --any-base (pull: leave out --base)"
    return [Problem("MODEL-207", str(adapter.folder), what, change)]


def other_weights(adapter: Adapter, weights: Callable[[], str | None]) -> list[Problem]:
    """A problem if the adapter records that it was trained on other weights than `weights`.

    `weights` is asked for the base's identity (sources.base.weights_of) only if one is recorded.
    Weights of the same shapes and another training give nonsense, in silence.
    """
    try:
        recorded = files.read_json(adapter.folder / "tuning.json").get("base_weights")
    except (OSError, ValueError, AttributeError):
        return []
    here = weights() if recorded else None
    if here is None or recorded == here:
        return []
    what = f"was trained on other weights ({str(recorded)[:19]}) than the base has ({here[:19]})"
    named = f", {adapter.base_model}" if adapter.base_model else ""
    change = f"use its own base model{named}, or if both are the same add --any-base"
    return [Problem("MODEL-213", str(adapter.folder), what, change)]


def misfits(adapter: Adapter, base_config: Mapping[str, Any]) -> list[Problem]:
    """Problems of `adapter` with the base model that has this `config.json`.

    Checks the number of layers, and the hidden width that a projection reads or writes.
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
        size = tensor.shape[1] if reads or rows_of(name) else tensor.shape[0] if writes else width
        if width is not None and size != width:
            what = f"is made for width {size}; the base model has {width}"
            problems.append((module or name, what))
    named = f", {adapter.base_model}" if adapter.base_model else ""
    change = f"use the adapter with its own base model{named}"
    return [Problem("MODEL-206", module, what, change) for module, what in problems]


_READS = frozenset(
    {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"}
    | {"gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h"}
)
_WRITES = frozenset({"o_proj", "down_proj", "fc2", "dense_4h_to_h"})
