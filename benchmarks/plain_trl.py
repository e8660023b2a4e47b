"""The script that trl's and peft's documentation shows, for `cpu_compare.py` to measure.

    python benchmarks/plain_trl.py MODEL ROWS OUT STEPS [--packing LENGTH] [--float32]

Defaults are trl's, but for what has to be the same in a comparison: the number of steps, LoRA's
rank and projections, the learning rate, and one line of log a step. `--packing` is the one switch
that the documentation names for speed, with one row of LENGTH tokens a step. A test of equality
computes in `--float32` and gives ROWS as an Arrow file of tokens, in an order that both have. Times
go to OUT/laps.json, in seconds.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()

import argparse  # noqa: E402  # imports are part of what is measured
import json  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import transformers  # noqa: E402
from datasets import Dataset, load_dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

IMPORTED = time.monotonic()


class Steps(transformers.TrainerCallback):  # type: ignore[misc]
    """Notes when the first step ended."""

    first: float | None = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Once a step."""
        self.first = self.first or time.monotonic()


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--packing", type=int)
    parser.add_argument("--float32", action="store_true")
    given = parser.parse_args()
    options: dict[str, Any] = {}
    if given.packing:
        packed = {"packing": True, "max_length": given.packing, "per_device_train_batch_size": 1}
        options |= packed
    if given.float32:
        options |= {"bf16": False}
    steps = Steps()
    if given.rows.endswith(".arrow"):
        dataset = Dataset.from_file(given.rows)
        options |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    else:
        dataset = load_dataset("json", data_files=given.rows, split="train")
    read = time.monotonic()
    trainer = SFTTrainer(
        model=given.model,
        train_dataset=dataset,
        args=SFTConfig(
            output_dir=str(given.out),
            max_steps=given.steps,
            learning_rate=2e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            **options,
        ),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[steps],
    )
    built = time.monotonic()
    trainer.train()
    trainer.save_model(str(given.out))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    laps = {
        "import": IMPORTED - BEGAN,
        "read": read - IMPORTED,
        "load and tokenise": built - read,
        "step": (steps.first or built) - built,
        "first step": (steps.first or built) - BEGAN,
    }
    record = {
        "laps": laps,
        "losses": [entry["loss"] for entry in log],
        "tokens": log[-1]["num_tokens"],
    }
    (given.out / "laps.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
