"""Base and adapter answer a question side by side.

The base is loaded once; the adapter is switched off for the base's answer. Answers are greedy, so
that the same question gets the same answer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from tuning import adapter as adapters
from tuning import files
from tuning.data import prompts, turn_ends
from tuning.data.chat_rewrites import as_trained
from tuning.data.tokenizer import own_template
from tuning.data.turn_ends import Ends
from tuning.errors import SpecError
from tuning.models import lora, new_tokens
from tuning.models.kernels import experts
from tuning.models.load import device_for, load_base, load_tokenizer
from tuning.models.survey import survey
from tuning.sources.base import weights_of

logger = logging.getLogger(__name__)

_NOT_FOR_PEFT = frozenset(
    {"peft_type", "peft_version", "base_model_name_or_path", "revision"}
    | {"exclude_modules", "layers_to_transform", "layers_pattern", "target_modules"}
    | {"target_parameters"}
)
Message = dict[str, str]
"""One turn: `{"role": "user" | "assistant" | "system", "content": text}`."""


class Session:
    """A base model, and an adapter on it if there is one, ready to answer."""

    def __init__(
        self,
        base: Path,
        adapter: Path | None = None,
        *,
        device: str | None = None,
        precision: str | None = None,
        quantisation: dict[str, Any] | None = None,
        max_new_tokens: int = 512,
        any_base: bool = False,
    ) -> None:
        """Load the base from its folder and put the adapter's folder on it.

        `device` (cpu, cuda) and `precision` default to what the machine has; `quantisation` as in a
        recipe loads the base in 4 bits. Raises SpecError if a folder is wrong, or the adapter does
        not fit the base, or (unless `any_base`) was trained on other weights.
        """
        device = device or device_for(base)
        template = None
        if adapter is not None:
            found = adapters.inspect(adapter)
            problems = adapters.misfits(found, files.read_json(base / "config.json"))
            if not any_base:
                problems += adapters.other_weights(found, lambda: weights_of(base))
            if problems:
                raise SpecError(problems)
            template = template_of(adapter)
        self.max_new_tokens = max_new_tokens
        self.tokenizer = load_tokenizer(base, chat_template=template)
        if adapter is not None and (own := own_template(self.tokenizer)):
            self.tokenizer.chat_template = as_trained(adapter, own)
        self.model = load_base(
            base,
            precision=precision or _precision(device),
            quantisation=quantisation,
            device=device,
        )
        if adapter is not None:
            new_tokens.extend_for(self.model, self.tokenizer, found)
            self.model = attach(self.model, found)
        self.model.eval()

    def ask(
        self, question: str, *, history: Sequence[Message] = (), compare: bool = False
    ) -> tuple[str, str | None]:
        """The tuned model's answer to `question` after the turns of `history`, and the base's.

        The base's is None unless `compare`. Without an adapter the first is the base's.
        """
        messages = [*history, {"role": "user", "content": question}]
        base = None
        if compare and isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                base = self._reply(messages)
        return self._reply(messages), base

    def _reply(self, messages: Sequence[Message]) -> str:
        return reply(self.model, self.tokenizer, messages, max_new_tokens=self.max_new_tokens)


def attach(base: Any, adapter: adapters.Adapter) -> PeftModel:
    """Put an inspected adapter on a loaded base model.

    PEFT gets the config that our parser checked, with the modules that the tensors name in place of
    patterns (which are a stranger's, and may take for ever), and reads only the safetensors file.
    """
    options = {k: v for k, v in adapter.config.items() if k not in _NOT_FOR_PEFT}
    change = f"use it with its own base model, {adapter.base_model}"
    found = survey(base)
    chosen, missing = adapters.places(adapter, found.linears, found.experts)
    if missing:  # PEFT would leave these out in silence
        what = f"does not fit the base model, which has no {missing[0]}"
        raise SpecError.at("MODEL-210", str(adapter.folder), what, change)
    new_tokens.widen(base, max(adapter.token_ids, default=-1) + 1)
    try:
        with lora.by_own_names():
            tuned = PeftModel.from_pretrained(
                base,
                adapter.folder,
                config=lora.config(options | {"inference_mode": True}, chosen, found),
                use_safetensors=True,
                low_cpu_mem_usage=True,
            )
        experts.read_packed(tuned)
        return tuned
    except (RuntimeError, ValueError, KeyError) as error:
        what = f"does not fit the base model: {str(error).splitlines()[0]}"
        raise SpecError.at("MODEL-210", str(adapter.folder), what, change) from error


def reply(loaded: Any, tokenizer: Any, messages: Sequence[Message], *, max_new_tokens: int) -> str:
    """What the loaded model answers to `messages`: greedy, at most `max_new_tokens` tokens.

    Raises SpecError if the tokenizer has no chat template, or one that refuses them.
    """
    named = loaded.generation_config.eos_token_id
    text, ends = prompts.question(tokenizer, own_template(tokenizer), messages, named=named)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    return continued(loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, ends=ends)


def continued(
    loaded: Any,
    tokenizer: Any,
    prompt: list[int],
    *,
    max_new_tokens: int,
    ends: Ends | None = None,
) -> str:
    """What the loaded model writes after the tokens `prompt`: greedy, special tokens left out."""
    ids = torch.tensor([prompt], device=loaded.device)
    ends = ends or ends_of(loaded, tokenizer)
    pad = tokenizer.pad_token_id
    with torch.no_grad():
        out = loaded.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(ends.certain) or None,
            stopping_criteria=[_Reached(ends, len(prompt))],
            pad_token_id=pad if pad is not None else tokenizer.eos_token_id,
        )
    answer = out[0, ids.shape[1] :].tolist()
    while answer and answer[-1] in ends.ids:  # an end need not be a special token
        answer.pop()
    text: str = tokenizer.decode(answer, skip_special_tokens=True)
    return text.strip()


class _Reached(transformers.StoppingCriteria):  # type: ignore[misc]
    """Stops where an answer ends in a token that does not always end one."""

    def __init__(self, ends: Ends, prompt: int) -> None:
        self._ends, self._prompt = ends, prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        done = [self._ends.reached(row[self._prompt :].tolist()) for row in input_ids]
        return torch.tensor(done, device=input_ids.device)


def stops(loaded: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer; see tuning/data/turn_ends.py."""
    return sorted(ends_of(loaded, tokenizer).ids)


def ends_of(loaded: Any, tokenizer: Any) -> Ends:
    """The ends of the model's answers: its own, and those that its template's turns have."""
    template = own_template(tokenizer)
    render = prompts.renderer(tokenizer, template) if template else None
    return turn_ends.of(tokenizer, render, loaded.generation_config.eos_token_id)


def template_of(adapter: Path) -> str | None:
    """The chat template that the adapter was trained with, if its folder has one."""
    path = adapter / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _precision(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float16"
    return "bfloat16"
