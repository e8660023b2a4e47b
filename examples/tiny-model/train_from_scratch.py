"""Train the chat model of this folder from random weights, on a world that is made up.

The world (world.py, world.yaml) has 240 islanders with eight facts each. The model learns them,
to hear the same question in a dozen phrasings, and to say so when it does not know a name.
Fine-tuning then teaches it new people. No network, no downloaded text; one seed decides everything.

    python train_from_scratch.py [--out FOLDER] [--steps N] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world import SEED, Message, World

HERE = Path(__file__).parent
VOCABULARY = 1728  # room for every word of the world; a multiple of 64
RATE = 2e-3
QUESTIONS = 64  # a training step
TURNS = (1, 1, 2, 4)  # questions in a conversation, step by step
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Roles are system, user and assistant, not ' + message['role']) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' + message['content'] + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the world's words; any UTF-8 text can be written with it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(world), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def texts(world: World) -> Iterator[str]:
    """What the tokenizer learns its words from: many messages, the system ones too."""
    for _ in range(20_000):
        yield from (message["content"] for message in world.conversation(turns=2))


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights; every size is a multiple of 64, so that NF4 can pack each projection."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, chats: list[list[Message]]) -> dict[str, Any]:
    """Padded tensors of shape (chats, longest); labels are what the assistant says."""
    ids = tokenizer.apply_chat_template(
        chats, padding=True, return_tensors="pt", padding_side="right"
    )
    tokens = ids["input_ids"]
    begin, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", EOS])
    labels = torch.full_like(tokens, -100)
    speaking = torch.zeros(len(tokens), dtype=torch.bool)
    for column in range(tokens.shape[1]):
        here = tokens[:, column]
        labels[:, column] = torch.where(speaking, here, -100)
        speaking = (speaking & (here != end)) | (here == begin)
    return {"input_ids": tokens, "attention_mask": ids["attention_mask"], "labels": labels}


def answer_loss(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy of the labelled tokens; logits are computed for those alone."""
    hidden = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    wanted = batch["labels"][:, 1:]
    spoken = wanted != -100
    logits = model.lm_head(hidden[:, :-1][spoken])
    return torch.nn.functional.cross_entropy(logits, wanted[spoken])


def train(model: LlamaForCausalLM, tokenizer: Any, world: World, steps: int) -> None:
    """AdamW with warm-up and cosine, 64 questions a step."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), fused=True)
    started = time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = RATE * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        turns = TURNS[step % len(TURNS)]
        chats = [world.conversation(turns) for _ in range(QUESTIONS // turns)]
        loss = answer_loss(model, encode(tokenizer, chats))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            seconds = time.monotonic() - started
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)


def name_the_tokenizer_for_all(file: Path) -> None:
    """Give its class the name that transformers 4 knows, too (vLLM and others still use that)."""
    record = json.loads(file.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    record.pop("backend", None)
    file.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def main() -> None:
    """Make the world, the tokenizer and the model; train; write the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=SEED)
    asked = parser.parse_args()

    torch.manual_seed(asked.seed)
    world = World(asked.seed)
    tokenizer = make_tokenizer(world)
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, world, steps=asked.steps)

    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
    )
    model.save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)
    name_the_tokenizer_for_all(asked.out / "tokenizer_config.json")


if __name__ == "__main__":
    main()
