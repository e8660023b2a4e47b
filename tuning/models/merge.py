"""Base and adapter -> one full model: the adapter's change added to the weights it was trained on.

An adapter of QLoRA was trained on the base packed in 4 bits, so that is what it is added to, after
it is unpacked: added to the published weights it would answer otherwise than it was trained to.
The result is a folder of safetensors that any server loads without knowing of adapters.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tuning import adapter as adapters
from tuning import files
from tuning.adapter import Adapter
from tuning.errors import SpecError, TuningError
from tuning.models import four_bit, generate, new_tokens
from tuning.models.load import DTYPES, device_for, load_base, load_tokenizer
from tuning.sources import verify
from tuning.sources.base import weights_of

SHARD = "4GB"  # of one weights file
TOKENIZER = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"}
)
Value = dict[str, Any]


def merge(
    base: Path,
    adapter: Path,
    target: Path,
    *,
    method: str | None = None,
    device: str | None = None,
    any_base: bool = False,
) -> Value:
    """Put the model of `base` with `adapter` in it into the new folder `target`.

    `method` (lora, qlora) is for adapters without a tuning.json, which tells it. Gives what was
    done: method, precision, tensors changed, bytes. Raises SpecError for folders that do not fit
    each other (unless `any_base`, a base of other weights too), or a weight that is no number
    afterwards; then there is no `target`.
    """
    found = adapters.inspect(adapter)
    problems = adapters.misfits(found, files.read_json(base / "config.json"))
    if not any_base:
        problems += adapters.other_weights(found, lambda: weights_of(base))
    if problems:
        raise SpecError(problems)
    made = _made(found, method, files.read_json(base / "config.json"))
    device = device or device_for(base)
    with files.making(target) as scratch:
        tokenizer = load_tokenizer(base, chat_template=generate.template_of(adapter))
        merged = _merged(base, found, made, device, tokenizer)
        scratch.mkdir()
        _name_ends(merged, tokenizer)
        merged.save_pretrained(scratch, safe_serialization=True, max_shard_size=SHARD)
        _companions(base, adapter, scratch)
        verify.verify(scratch)
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    return made | {"modules": len(found.modules), "bytes": size, "base_model": found.base_model}


def _made(found: Adapter, method: str | None, config: Value) -> Value:
    """How the adapter was trained: its recipe's method, packing of the base, and precision; where
    it says none, that of the base, whose config.json is `config`."""
    try:
        recipe = files.read_json(found.folder / "tuning.json")["recipe"]
        said = {name: recipe[name] for name in ("method", "quantisation", "precision")}
    except (OSError, ValueError, KeyError, TypeError):
        stored = config.get("dtype") or config.get("torch_dtype")
        precision = stored if stored in DTYPES else "bfloat16"
        said = {"method": None, "quantisation": None, "precision": precision}
    if method and said["method"] and method != said["method"]:
        what = f"was trained with {said['method']}, not with {method}"
        raise SpecError.at("MODEL-305", str(found.folder), what, "leave --method out")
    chosen = said["method"] or method
    if chosen is None:
        what = "does not say whether it was trained with lora or qlora (it has no tuning.json)"
        raise SpecError.at("MODEL-302", str(found.folder), what, "say --method lora or qlora")
    packing = said["quantisation"]
    if chosen == "qlora" and packing is None:
        packing = {"type": "nf4", "double": True, "compute": "bfloat16"}
    return {"method": chosen, "quantisation": packing, "precision": said["precision"]}


def _merged(base: Path, found: Adapter, made: Value, device: str, tokenizer: Any) -> Any:
    """The full model, in 16 bits, with the adapter in its weights, its tokens in `tokenizer`."""
    precision, packing = made["precision"], made["quantisation"]
    loaded = load_base(base, precision=precision, quantisation=packing, device=device)
    if getattr(loaded, "is_quantized", False):
        loaded = four_bit.unpacked(loaded, DTYPES[precision])
        # how 4 bits were read, which has no reverse, must not be undone as it is saved
        loaded._weight_conversions = [
            each
            for each in loaded._weight_conversions
            if not any(hasattr(step, "hf_quantizer") for step in getattr(each, "operations", ()))
        ]
        # its config would call the saved weights 4-bit ones
        for config in {id(c): c for c in (loaded.config, loaded.config.get_text_config())}.values():
            if hasattr(config, "quantization_config"):
                del config.quantization_config
    new_tokens.extend_for(loaded, tokenizer, found)
    try:
        merged = generate.attach(loaded, found).merge_and_unload(safe_merge=True)
    except ValueError as error:  # of safe_merge: a weight that is no number
        what = f"cannot be merged: {str(error).splitlines()[0]}"
        raise SpecError.at("MODEL-303", str(found.folder), what, "train it again") from error
    names = [name for name, _ in merged.named_parameters()]
    kept = sorted(name for name in names if "lora_" in name or "token_adapter" in name)
    if kept:
        what = f"left {kept[0]} beside the weights"
        raise TuningError.at("MODEL-304", str(found.folder), what, "report it with the adapter")
    return merged


def _name_ends(merged: Any, tokenizer: Any) -> None:
    """Let the model's generation config name every token that ends an answer of the adapter."""
    ends = sorted(generate.ends_of(merged, tokenizer).certain)
    if ends:
        merged.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


def _companions(base: Path, adapter: Path, target: Path) -> None:
    """What belongs to the weights: the base's files, the adapter's tokenizer where it has one."""
    for path in sorted(base.iterdir()):
        known = path.name in verify.COMPANIONS or path.name.startswith(("LICENSE", "NOTICE"))
        fresh = not (target / path.name).exists()
        if path.is_file() and known and fresh and path.name != verify.INDEX:
            shutil.copyfile(path, target / path.name)
    for path in sorted(adapter.iterdir()):
        if path.name in TOKENIZER:
            shutil.copyfile(path, target / path.name)
    if (target / "chat_template.jinja").exists():
        (target / "chat_template.json").unlink(missing_ok=True)  # the same, of an older kind
