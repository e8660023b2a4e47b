"""Examples -> token ids and the ranges of them that are trained.

A token is trained when it holds characters of a trained span: no word of an answer goes untaught
because a tokenizer joins its beginning to the end of the header ("Answer: " and "four" are ":" and
" four"). Only markers that swallow the white space behind them, as Phi-3's do, stay what they are.
Offsets are the tokenizer's raw ones: its post-processor, which trims white space off them and adds
special tokens, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

from tuning.data.chat import Rendered, Template
from tuning.data.formats import Conversation, Example, Fault, Pair, Text, Tokens
from tuning.data.skeleton import Spans


@dataclass(frozen=True)
class Encoded:
    """One row; `trained` holds [start, end) pairs of token indices, flat and in order."""

    ids: list[int]
    trained: list[int]


@dataclass(frozen=True)
class _Job:
    text: str
    spans: Spans
    bare: bool  # no template wrote it: it gets what the tokenizer puts before, and an end


class Encoder:
    """A tokenizer made ready for many rows."""

    def __init__(
        self, tokenizer: Any, template: Template | None, *, train_on: Literal["assistant", "all"]
    ) -> None:
        self._template = template
        self._all = train_on == "all"
        self._fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._fast.post_processor = None
        self._fast.no_truncation()
        self._fast.no_padding()
        self._size = self._fast.get_vocab_size(with_added_tokens=True)
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        before = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
        self._before: list[int] = list(whole[:before])
        self._after: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._added = set(tokenizer.added_tokens_decoder)
        self._openers = tuple(filter(None, tokenizer.all_special_tokens))
        self.raw_pairs: bool | None = None  # decided by the first rows that may be

    def encode(self, examples: Sequence[Example]) -> list[Encoded | Fault]:
        """Ids and trained ranges of each example, or why there are none."""
        self.decide(examples)
        jobs: list[_Job | Encoded | Fault | None] = [self._job(example) for example in examples]
        chats = [self._conversation(e) for e, job in zip(examples, jobs, strict=True) if not job]
        if chats:
            assert self._template is not None
            shown = iter(self._template.render(chats))
            jobs = [job or self._shown(next(shown)) for job in jobs]
        texts = [job.text for job in jobs if isinstance(job, _Job)]
        encodings = iter(self._fast.encode_batch(texts, add_special_tokens=False))
        return [
            self._encoded(job, next(encodings)) if isinstance(job, _Job) else job
            for job in jobs
            if job is not None
        ]

    @property
    def notes(self) -> dict[str, int]:
        """What the chat template did that a person may not expect, and to how many rows."""
        return self._template.notes if self._template else {}

    @property
    def pairs_are_chats(self) -> bool:
        """Whether pairs are written as a user turn and an assistant turn."""
        return self._template is not None and not self.raw_pairs

    def decide(self, examples: Sequence[Example]) -> None:
        """Prompts that begin with special tokens are rendered already: no template goes around
        them. It takes most of the first rows: one that merely talks of such a token is refused."""
        raw = [example for example in examples if isinstance(example, Pair) and example.raw]
        if raw and self.raw_pairs is None:
            opened = sum(pair.prompt.lstrip().startswith(self._openers) for pair in raw)
            self.raw_pairs = opened > len(raw) / 2

    def _conversation(self, example: Example) -> Conversation:
        if isinstance(example, Pair):
            return example.as_conversation()
        assert isinstance(example, Conversation)
        return example

    def _job(self, example: Example) -> _Job | Encoded | Fault | None:
        """What is known without the chat template; None for what goes through it."""
        if isinstance(example, Tokens):
            return self._checked(example)
        if isinstance(example, Text):
            return _Job(example.text, [(0, len(example.text))], bare=True)
        if isinstance(example, Pair) and not self.pairs_are_chats:
            text = example.bare + example.completion
            return _Job(text, [(0 if self._all else len(example.bare), len(text))], bare=True)
        if self._template is None:
            return Fault(
                "DATA-244",
                "is a conversation, but the base model has no chat template",
                "set ModelConfig.chat_template, or take the model's instruct variant",
            )
        return None

    def _shown(self, shown: Rendered | Fault) -> _Job | Fault:
        if isinstance(shown, Fault):
            return shown
        spans = [(0, len(shown.text))] if self._all else shown.spans
        return _Job(shown.text, spans, bare=False)

    def _checked(self, tokens: Tokens) -> Encoded | Fault:
        least, worst = min(tokens.input_ids), max(tokens.input_ids)
        if worst >= self._size or least < 0:
            worst = least if least < 0 else worst
            what = f"input_ids holds {worst}, but the tokenizer has {self._size} tokens"
            change = "tokenise with the base model's own tokenizer, or give the text"
            return Fault("DATA-247", what, change)
        trained = [0, len(tokens.input_ids)] if self._all else list(tokens.trained)
        return Encoded(tokens.input_ids, trained)

    def _encoded(self, job: _Job, encoding: Any) -> Encoded:
        ids: list[int] = encoding.ids
        trained: list[int] = []
        for start, end in job.spans:
            first, last = self._token_range(encoding, ids, start, end)
            if first < last:
                if trained and trained[-1] >= first:
                    trained[-1] = last
                else:
                    trained += (first, last)
        if not job.bare:
            return Encoded(ids, trained)
        before = [] if ids[: len(self._before)] == self._before else self._before
        after = [] if ids[-1:] == self._after else self._after
        shift = len(before)
        trained = [position + shift for position in trained]
        if trained and trained[-1] == shift + len(ids):
            trained[-1] += len(after)
        return Encoded(before + ids + after, trained)

    def _token_range(self, encoding: Any, ids: list[int], start: int, end: int) -> tuple[int, int]:
        """The tokens that hold characters of [start, end)."""
        at, first = start, None
        while at < end and (first := encoding.char_to_token(at)) is None:
            at += 1
        if first is None:
            return 0, 0
        if ids[first] in self._added and encoding.token_to_chars(first)[0] < start:
            first += 1
        at, last = end - 1, None
        while at >= start and (last := encoding.char_to_token(at)) is None:
            at -= 1
        assert last is not None
        while last + 1 < len(ids) and encoding.token_to_chars(last + 1)[0] < end:
            last += 1  # the bytes of one character are several tokens
        return first, last + 1
