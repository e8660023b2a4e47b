"""How many of a file's questions does a model answer right, with and without an adapter?

Each line of the file is `{"question": ..., "answer": ...}`; an answer is right when the model's
reply has the expected words in it. Replies are greedy, so the same model always scores the same.

    python examples/score.py examples/tiny-model examples/data/demo-questions.jsonl
    python examples/score.py examples/tiny-model examples/data/demo-questions.jsonl --adapter DIR
"""

from __future__ import annotations

import argparse
import json
import os
import re
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS = ("base", "tuned")


@dataclass(frozen=True)
class Question:
    """A question, the words its answer must have, and what each model replied."""

    question: str
    answer: str
    replies: dict[str, str]

    def right(self, model: str) -> bool:
        """Whether the expected words stand in the reply, as whole words, in any case."""
        words = rf"(?<!\w){re.escape(self.answer.casefold())}(?!\w)"
        return re.search(words, self.replies[model].casefold()) is not None


def reply(model: Any, tokenizer: Any, question: str) -> str:
    """The model's greedy answer to one question, at most 48 tokens."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    made = model.generate(**inputs, do_sample=False, max_new_tokens=48)
    return str(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def ask(base: Path, file: Path, adapter: Path | None = None) -> list[Question]:
    """Put every question of `file` to the base model and, with an adapter, to the tuned one."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    asked = []
    for line in file.read_text("utf-8").splitlines():
        row = json.loads(line)
        replies = {}
        with model.disable_adapter() if adapter is not None else nullcontext():
            replies["base"] = reply(model, tokenizer, row["question"])
        if adapter is not None:
            replies["tuned"] = reply(model, tokenizer, row["question"])
        asked.append(Question(row["question"], row["answer"], replies))
    return asked


def as_json(asked: list[Question]) -> str:
    """Counts, and every question with its replies."""
    models = [model for model in MODELS if model in asked[0].replies]
    counts = {model: sum(question.right(model) for question in asked) for model in models}
    record = {"questions": len(asked), "right": counts, "asked": [asdict(q) for q in asked]}
    return json.dumps(record, indent=2, ensure_ascii=False)


def as_table(asked: list[Question]) -> Table:
    """One line a question; the footer counts the right answers."""
    models = [model for model in MODELS if model in asked[0].replies]
    table = Table(show_footer=True)
    table.add_column("question", footer="right")
    for model in models:
        count = sum(question.right(model) for question in asked)
        table.add_column(model, footer=f"{count}/{len(asked)}")
    for question in asked:
        cells = [
            f"[{'green' if question.right(model) else 'red'}]{question.replies[model]}"
            for model in models
        ]
        table.add_row(question.question, *cells)
    return table


def main() -> None:
    """Read the command line, ask, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path, help="folder of the base model")
    parser.add_argument("questions", type=Path, help="file of questions, one JSON object a line")
    parser.add_argument("--adapter", type=Path, help="folder of a PEFT adapter")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args()
    asked = ask(given.base, given.questions, given.adapter)
    if given.json:
        print(as_json(asked))
    else:
        Console().print(as_table(asked))


if __name__ == "__main__":
    main()
