"""What follows training once the adapter is in place: answers to questions, and samples.

Nothing here can lose the adapter: what fails is a line for the user and a traceback in the log.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tuning.errors import Stopped
from tuning.models import generate, shards
from tuning.training import evaluation

logger = logging.getLogger(__name__)

ANSWER_TOKENS = 64
SHARED_TOKENS = 16  # where ranks share the model, which gather all of it for each token
SAMPLES = 3

T = TypeVar("T")


def attempt(what: str, work: Callable[[], T], lost: list[str]) -> T | None:
    """The result of `work`; None, and a line in `lost`, if it fails with anything but a signal."""
    try:
        return work()
    except Stopped:
        raise
    except Exception as error:  # out of memory, a template, a kernel: the adapter is finished
        logger.exception("%s", what)
        cause = (str(error).splitlines() or [""])[0][:200]
        lost.append(f"{what} ({type(error).__name__}: {cause})")
        return None


def samples(tuned: Any, tokenizer: Any, rows: Any) -> str:
    """Answers to the first of `rows`, the evaluation split, as lines of JSON."""
    made = []
    if rows is not None:
        made = evaluation.samples(tuned, tokenizer, rows, number=SAMPLES, tokens=_tokens(tuned))
    return "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in made)


def ask(tuned: Any, tokenizer: Any, questions: Sequence[str]) -> list[dict[str, str]]:
    """Answers of the base and of the tuned model to each question."""
    answers = []
    for question in questions:
        turns = [{"role": "user", "content": question}]
        with tuned.disable_adapter():
            base = generate.reply(tuned, tokenizer, turns, max_new_tokens=_tokens(tuned))
        reply = generate.reply(tuned, tokenizer, turns, max_new_tokens=_tokens(tuned))
        answers.append({"question": question, "base": base, "tuned": reply})
    return answers


def _tokens(tuned: Any) -> int:
    """How long an answer is at most."""
    return SHARED_TOKENS if shards.is_split(tuned) else ANSWER_TOKENS
