"""An adapter, its base or the merged model as a folder of GGUF files with Ollama's Modelfile."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from safetensors import safe_open

from tuning import adapter as adapters
from tuning import files, safetensors
from tuning.adapter import Adapter
from tuning.data import prompts, turn_ends
from tuning.data.chat_rewrites import as_trained
from tuning.data.tokenizer import own_template
from tuning.errors import Problem, SpecError
from tuning.models import generate, merge, unpacked
from tuning.models.gguf_files import families, modelfile, vocabulary
from tuning.models.load import load_tokenizer, read_config
from tuning.sources.base import weights_of

ADAPTER, BASE, MERGED, MODELFILE = "adapter.gguf", "base.gguf", "model.gguf", "Modelfile"
_TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FILE_TYPES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}


def export(
    base: Path,
    adapter: Path,
    target: Path,
    *,
    merged: bool = False,
    with_base: bool = False,
    method: str | None = None,
    any_base: bool = False,
) -> list[Path]:
    """Write the new folder `target` and return its files.

    It holds `adapter.gguf` (and `base.gguf` with `with_base`), or with `merged` `model.gguf`, in
    which the adapter is part of the weights; and a Modelfile. `method` is for merging, see
    `merge.merge`. Raises SpecError with all reasons why these cannot be converted, or do not fit
    each other; then there is no `target`.
    """
    found = adapters.inspect(adapter)
    record = files.read_json(base / "config.json")
    config = read_config(base)
    tokenizer = load_tokenizer(base, chat_template=generate.template_of(adapter))
    if own := own_template(tokenizer):
        tokenizer.chat_template = as_trained(adapter, own)
    problems = adapters.misfits(found, record) + families.problems(config, str(base))
    if not any_base:
        problems += adapters.other_weights(found, lambda: weights_of(base))
    if merged or with_base:
        problems += vocabulary.problems(tokenizer, str(base)) + _unreadable(base, merged)
    problems += [] if merged else _inexpressible(found)
    if problems:
        raise SpecError(problems)
    with files.making(target) as made:
        made.mkdir()
        if merged:
            with tempfile.TemporaryDirectory(prefix=".merging-", dir=made.parent) as scratch:
                whole = Path(scratch) / "merged"
                merge.merge(base, adapter, whole, method=method, any_base=any_base)
                tokenizer = load_tokenizer(whole, chat_template=tokenizer.chat_template)
                _write_model(whole, tokenizer, made / MERGED, found.base_model)
        else:
            _write_adapter(found, config, made / ADAPTER)
        if with_base and not merged:
            _write_model(base, tokenizer, made / BASE, found.base_model)
        text = _modelfile(found, tokenizer, base, merged=merged, with_base=with_base)
        files.write(made / MODELFILE, text)
        names = sorted(path.name for path in made.iterdir())
    return [target / name for name in names]


def _inexpressible(adapter: Adapter) -> list[Problem]:
    """What an adapter in GGUF cannot hold."""
    change = "add --merged (without --with-base)"
    facts = {
        "is a DoRA adapter": adapter.config.get("use_dora"),
        "trains rows of tokens": adapter.token_ids,
        "adapts experts": adapter.config.get("target_parameters"),
    }
    return [
        Problem("MODEL-323", str(adapter.folder), f"{fact}, which llama.cpp does not load", change)
        for fact, is_so in facts.items()
        if is_so
    ]


def _unreadable(base: Path, merged: bool) -> list[Problem]:
    """Weights that are stored in other types than GGUF has; merging unpacks them."""
    kinds = {
        t.dtype for path in unpacked.paths(base) for t in safetensors.read_header(path).values()
    }
    others = sorted(kinds - set(_STORED))
    if merged or not others:
        return []
    what = f"stores weights as {', '.join(others)}, which base.gguf cannot hold"
    return [Problem("MODEL-323", str(base), what, "add --merged (instead of --with-base)")]


def _write_adapter(adapter: Adapter, config: Any, path: Path) -> None:
    """Write the LoRA matrices, as float32 as llama.cpp's converter does, in its names."""
    names, where = families.Names(config), str(adapter.folder)
    rank, alpha = adapter.rank, float(adapter.config["lora_alpha"])
    if adapter.config.get("use_rslora"):
        alpha *= rank**0.5  # llama.cpp divides by the rank, not by its root
    writer = _writer(path, config, adapter.base_model)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    with safe_open(adapter.folder / adapters.WEIGHTS, framework="pt") as weights:
        for module in adapter.modules:
            stem, name = f"base_model.model.{module}", f"{module}.weight"
            b = weights.get_tensor(f"{stem}.lora_B.weight").float()
            a = weights.get_tensor(f"{stem}.lora_A.weight").float()
            known = names(name, where)
            writer.add_tensor(f"{known}.lora_a", a.numpy())
            writer.add_tensor(f"{known}.lora_b", families.changed(name, b, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_model(folder: Path, tokenizer: Any, path: Path, name: str | None) -> None:
    """Write the model in `folder`, a tensor at a time, in the types that it is stored in."""
    config, record = read_config(folder), files.read_json(folder / "config.json")
    headers = {
        name: tensor
        for each in unpacked.paths(folder)
        for name, tensor in safetensors.read_header(each).items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    names = families.Names(config)
    types = {tensor: _type(headers[tensor]) for tensor in headers}
    extra = dict(families.frequency_factors(config))
    writer = _writer(path, config, name)
    writer.add_type(gguf.GGUFType.MODEL)
    families.write_settings(writer, config)
    matrices = [types[tensor] for tensor in headers if len(headers[tensor].shape) > 1]
    writer.add_file_type(_FILE_TYPES[max(set(matrices), key=matrices.count)])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    rows = headers["model.embed_tokens.weight"].shape[0]
    with tempfile.TemporaryDirectory() as scratch:
        ends = _ends(folder, tokenizer)
        vocabulary.write(writer, tokenizer, ends, rows=rows, scratch=Path(scratch))
    for tensor, values in extra.items():
        writer.add_tensor_info(tensor, values.shape, np.dtype(np.float32), values.nbytes)
    for tensor, header in headers.items():
        kind = types[tensor]
        size = header.count * kind.itemsize
        known = names(tensor, str(folder))
        writer.add_tensor_info(known, header.shape, np.dtype(np.float32), size, _TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in extra.values():
        writer.write_tensor_data(values.numpy())
    lazy = unpacked.tensors(folder, record, torch.float32)
    for tensor in headers:
        values = families.changed(tensor, lazy[tensor][:], config).to(types[tensor])
        writer.write_tensor_data(values.contiguous().view(torch.uint8).numpy())
    writer.close()


def _type(header: safetensors.Tensor) -> torch.dtype:
    """The type in GGUF: vectors are float32, as llama.cpp takes no others."""
    return torch.float32 if len(header.shape) < 2 else _STORED[header.dtype]


def _writer(path: Path, config: Any, name: str | None) -> Any:
    arch = gguf.MODEL_ARCH_NAMES[families.ARCHITECTURES[config.model_type]]
    writer = gguf.GGUFWriter(path, arch)
    if name:
        writer.add_name(name)
    return writer


def _render(tokenizer: Any) -> turn_ends.Render | None:
    template = own_template(tokenizer)
    return prompts.renderer(tokenizer, template) if template else None


def _ends(folder: Path, tokenizer: Any) -> turn_ends.Ends:
    """The ends of an answer: those of the model's generation config, and of the template."""
    named: Mapping[str, Any] = {}
    if (folder / "generation_config.json").is_file():
        named = transformers.GenerationConfig.from_pretrained(folder).to_dict()
    return turn_ends.of(tokenizer, _render(tokenizer), named.get("eos_token_id"))


def _modelfile(
    adapter: Adapter, tokenizer: Any, base: Path, *, merged: bool, with_base: bool
) -> str:
    named = adapter.base_model or base.name
    note = f"An adapter of {named}{', merged into it' if merged else ''}."
    if not merged and not with_base:
        note += f"\n{BASE} is not here: put a GGUF of {named} beside this file, or name it in FROM."
    if not merged and _is_packed(adapter):
        note += "\nIt was trained on 4-bit weights: a merged export answers nearer to the training."
    stops = [tokenizer.convert_ids_to_tokens(id) for id in sorted(_ends(base, tokenizer).certain)]
    return modelfile.text(
        model=f"./{MERGED if merged else BASE}",
        adapter=None if merged else f"./{ADAPTER}",
        render=_render(tokenizer),
        stops=stops,
        bos=tokenizer.bos_token or "",
        adds_bos=vocabulary.adds_bos(tokenizer),
        note=note,
    )


def _is_packed(adapter: Adapter) -> bool:
    try:
        return bool(files.read_json(adapter.folder / "tuning.json")["recipe"]["quantisation"])
    except (OSError, ValueError, LookupError, TypeError):
        return False
