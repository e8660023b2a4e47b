"""A tokenizer -> the keys of GGUF from which llama.cpp makes the same tokens.

llama.cpp knows how text is split before byte-level BPE by a name (`tokenizer.ggml.pre`), and its
converter finds that name by a hash over a published vocabulary. Here it is found by the rule itself
that the tokenizer holds, so that own vocabularies have one, too; an unknown rule is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import gguf

from tuning.data.turn_ends import Ends
from tuning.errors import Problem

GPT2 = "ByteLevel"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Rule(NamedTuple):
    """How text is split, and whether a whole piece of the vocabulary is taken without merges."""

    splits: tuple[str, ...]
    ignore_merges: bool


RULES = {
    Rule((GPT2,), False): "gpt-2",
    Rule(("Digits", GPT2), False): "smollm",
    Rule((_WORDS + r"\p{N}{1,3}" + _REST,), True): "llama-bpe",
    Rule((_WORDS + r"\p{N}" + _REST,), False): "qwen2",
}


def _record(tokenizer: Any) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return record


def pre_tokenizer(tokenizer: Any) -> str | None:
    """llama.cpp's name for how `tokenizer` splits text; None for an unknown rule."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    record = _record(tokenizer)
    model, first = record["model"], record["pre_tokenizer"] or {}
    normal = (record["normalizer"] or {}).get("type")
    if model["type"] != "BPE" or model.get("byte_fallback") or normal not in (None, "NFC"):
        return None
    steps = first.get("pretokenizers", [first])
    if any(step.get("add_prefix_space") for step in steps):
        return None
    splits = tuple(filter(None, map(_split, steps)))
    return RULES.get(Rule(splits, bool(model.get("ignore_merges"))))


def _split(step: dict[str, Any]) -> str | None:
    """What a step splits at; None for one that only changes the alphabet."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return GPT2 if step.get("use_regex", True) else None
    if kind == "Digits":
        return "Digits" if step.get("individual_digits") else "Digits in groups"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    return f"unknown: {kind}"


def problems(tokenizer: Any, where: str) -> list[Problem]:
    """Why the vocabulary of `tokenizer` is not converted; empty if it is."""
    if pre_tokenizer(tokenizer):
        return []
    what = "splits text by a rule that this export has no name of llama.cpp's for"
    change = (
        "merge it (tuning merge --output dir:DIR) and run llama.cpp's convert_hf_to_gguf.py DIR"
    )
    return [Problem("MODEL-322", where, what, change)]


def write(writer: Any, tokenizer: Any, ends: Ends, *, rows: int, scratch: Path) -> None:
    """Write the vocabulary, padded to the `rows` of the embedding, its special tokens and template.

    `scratch` is a folder for what gguf reads of the tokenizer.
    """
    tokenizer.save_pretrained(scratch)
    texts = {id: text for text, id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for id in range(rows):
        tokens.append(texts.get(id, f"[PAD{id}]"))
        if id in added:
            special = added[id].special
            kinds.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL if id in texts else gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(scratch, load_merges=True, n_vocab=rows)
    tokenized = tokenizer("a")["input_ids"]  # its post-processor decides, not its settings
    special.add_special_token["bos"] = adds_bos(tokenizer)
    special.add_special_token["eos"] = tokenized[-1] == tokenizer.eos_token_id
    further = sorted(ends.certain - {tokenizer.eos_token_id})
    special.special_token_ids.pop("eot", None)
    if further:
        special.special_token_ids["eot"] = further[0]
    special.add_to_gguf(writer, quiet=True)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins every text with its BOS token."""
    begins: bool = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return begins
