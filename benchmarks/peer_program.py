"""Trains the ladder's rows with another tool, in the interpreter where that is installed.

    /path/to/its/python peer_program.py REQUEST.json RESULT.json

Imports nothing of this project. The tool makes the model with LoRA its own way; the loop is trl's,
which both ways build on, with packing and without checkpointing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

RANK = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trl(request: dict[str, Any]) -> tuple[Any, Any]:
    """transformers and peft as they are."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.bfloat16
    ).to(request["device"])
    options = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"])
    return get_peft_model(model, options), tokenizer


def unsloth(request: dict[str, Any]) -> tuple[Any, Any]:
    """unsloth's model and LoRA, as its documentation has them."""
    made = importlib.import_module("unsloth").FastLanguageModel
    model, tokenizer = made.from_pretrained(
        request["model"], max_seq_length=request["length"], load_in_4bit=False
    )
    tuned = made.get_peft_model(
        model, r=RANK, lora_alpha=2 * RANK, lora_dropout=0, target_modules=PROJECTIONS,
        use_gradient_checkpointing=False,
    )  # fmt: skip
    return tuned, tokenizer


def train(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step after the warm ones, and torch's peak allocation."""
    tuned, tokenizer = {"trl": trl, "unsloth": unsloth}[request["name"]](request)
    import datasets
    import torch
    import transformers
    from trl import SFTConfig, SFTTrainer

    ends: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if request["device"] == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    trainer = SFTTrainer(
        model=tuned,
        args=SFTConfig(
            output_dir=request["scratch"], use_cpu=request["device"] == "cpu", bf16=True,
            per_device_train_batch_size=request["rows"], max_steps=request["steps"],
            max_length=request["length"], packing=True, learning_rate=1e-5, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True,
            gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=datasets.load_dataset("json", data_files=request["data"], split="train"),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    seconds = [b - a for a, b in itertools.pairwise(ends)][-request["timed"] :]
    cuda = request["device"] == "cuda"
    return {
        "seconds": seconds,
        "allocated": torch.cuda.max_memory_allocated() if cuda else None,
        "version": importlib.metadata.version(request["name"]),
    }


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(train(asked)))
