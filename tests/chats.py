"""Small tokenizers that behave like those of the presets: special tokens, BOS, white space."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

DATA = Path(__file__).parent / "fixtures"
CORPUS = [
    "Answer in short. Two plus two is four. Write code that returns one.",
    "def f():\n    return 1\n",
    "<think>\nso it is\n</think>\n\nThe user asks, the assistant answers: hello there.",
] * 20

PHI3 = "<|system|> <|user|> <|assistant|> <|end|>"
CHATML = "<|im_start|> <|endoftext|>"
THINK = "<think> </think> <tool_call> </tool_call>"
R1 = "<｜User｜> <｜Assistant｜>"
HARMONY = "<|start|> <|end|> <|message|> <|channel|> <|call|>"

# template -> kind of tokenizer, bos, eos, special tokens, added tokens that are not special
STYLES: dict[str, tuple[str, str | None, str, str, str]] = {
    "phi3": ("pieces", "<s>", "<|endoftext|>", PHI3, ""),
    "phi3_5": ("pieces", "<s>", "<|endoftext|>", PHI3, ""),
    "phi4": ("bytes", "<|endoftext|>", "<|im_end|>", "<|im_start|> <|im_sep|>", ""),
    "phi4_mini": ("bytes", "<|endoftext|>", "<|endoftext|>", PHI3, ""),
    "llama3_1": (
        "bytes",
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|> <|end_header_id|>",
        "",
    ),
    "mistral_v3": ("pieces", "<s>", "</s>", "[INST] [/INST]", ""),
    "chatml": ("bytes", None, "<|im_end|>", CHATML, ""),
    "chatml_marked": ("bytes", None, "<|im_end|>", CHATML, ""),
    "qwen2_5": ("bytes", None, "<|im_end|>", CHATML, ""),
    "qwen3": ("bytes", None, "<|im_end|>", CHATML, THINK),
    "gemma3": ("pieces", "<bos>", "<eos>", "<start_of_turn> <end_of_turn>", ""),
    "falcon_instruct": ("bytes", None, "<|endoftext|>", ">>QUESTION<<", ""),
    "deepseek_r1_distill": (
        "bytes",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        R1,
        "<think> </think>",
    ),
    "gptoss": ("bytes", "<|startoftext|>", "<|return|>", HARMONY, ""),
}


@cache
def _model(kind: str) -> str:
    """A small BPE: over bytes as GPT-2's, or over pieces with ▁ as sentencepiece's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "pieces"))
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        alphabet, special = pre_tokenizers.ByteLevel.alphabet(), []
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        alphabet = [chr(code) for code in range(33, 127)] + ["▁"]
        special = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tokenizer(style: str, *, template: bool = True) -> Any:
    """The tokenizer of a style, with its chat template."""
    kind, bos, eos, specials, added = STYLES[style]
    rstrip = style.startswith("phi3")  # as Phi-3's: markers swallow the white space behind them
    special = [AddedToken(word, rstrip=rstrip, normalized=False) for word in specials.split()]
    backend = Tokenizer.from_str(_model(kind))
    backend.add_special_tokens(special)
    if bos and style not in ("phi4", "phi4_mini"):
        backend.add_special_tokens([AddedToken(bos, normalized=False)])
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        additional_special_tokens=special,
    )
    made.add_tokens([AddedToken(word, normalized=False) for word in added.split()])
    if template:
        made.chat_template = (DATA / "templates" / f"{style}.jinja").read_text(encoding="utf-8")
    return made


def save(style: str, folder: Path, *, template: bool = True) -> Path:
    """A folder with nothing but the tokenizer of `style`."""
    tokenizer(style, template=template).save_pretrained(folder)
    return folder
