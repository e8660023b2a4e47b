"""Request bodies: OpenAI's completions and chat completions, and KAITO's `/chat`.

Unknown keys and unsupported values are rejected: an answer that ignored half of a request would be
wrong. What changes nothing is allowed: null, keys about the caller (`user`, `metadata`, ...), and
keys of OpenAI's and vLLM's APIs at their defaults. pydantic's own JSON parser limits the depth and
rejects NaN.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from tuning.data.turn_ends import Ends

MAX_CHOICES = 128  # answers to one request: prompts times n
MAX_SCORES = 1 << 19  # log-probabilities of prompts in one response
MAX_TURNS = 1024
MIN_PENALTY = 0.01  # logits divided by less overflow
NO_TEMPLATES = "templates come with the model, never with a request"
TEMPLATE_KEYS = frozenset({"chat_template", "chat_template_kwargs", "chat_template_args"})
IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
    | {"prompt_cache_retention", "parallel_tool_calls", "request_id", "session_id", "cache_salt"}
)
# Keys that this server does not have, and their values that ask for nothing.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "modalities": (["text"],),
    "logit_bias": ({},),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "include_reasoning": (True,),
    "priority": (0,),
}
# What to write where a value may be of several types: pydantic tells of each by itself.
WANTED = {
    "prompt": f"write a text, a list of token numbers, or a list of 1 to {MAX_CHOICES} of these",
    "stop": "write a text of 1 to 200 characters, or a list of at most 8 of them",
    "content": f"write a text, or a list of at most {MAX_TURNS:,} parts of type text",
    "eos_token_id": "write a token number, or a list of at most 16 of them",
}

Name = Annotated[str, StringConstraints(max_length=256)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Token = Annotated[int, Field(ge=0)]
Ids = Annotated[list[Token], Field(min_length=1, fail_fast=True)]  # else an error per element
Real = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """Rejects unknown keys; null stands for a key that is not set. Errors never show values."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, record: Any) -> Any:
        if not isinstance(record, dict):
            return record
        return {key: value for key, value in record.items() if value is not None}


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False  # vLLM's


class Generation(Strict):
    """The keys that chat completions and completions share."""

    model: Name | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    temperature: Real | None = Field(default=None, ge=0, le=2)
    top_p: Real | None = Field(default=None, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=8, fail_fast=True)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    presence_penalty: Real = Field(default=0, ge=-2, le=2)
    frequency_penalty: Real = Field(default=0, ge=-2, le=2)
    # vLLM's extensions of OpenAI's API
    top_k: int | None = Field(default=None, ge=-1, le=1 << 20)
    min_p: Real = Field(default=0, ge=0, le=1)
    repetition_penalty: Real | None = Field(default=None, ge=MIN_PENALTY, le=10)
    min_tokens: int = Field(default=0, ge=0, le=1 << 20)
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_defaults(cls, record: Any) -> Any:
        if not isinstance(record, dict):
            return record
        return {
            key: value
            for key, value in record.items()
            if key not in IGNORED and value not in DEFAULTS.get(key, ())
        }

    @model_validator(mode="after")
    def _stream_options_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def streams_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def streams_each_usage(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats


class TextPart(Strict):
    """A text part of a message, the only supported type."""

    type: Literal["text"]
    text: str


class Function(Strict):
    """A function and its arguments, as JSON."""

    name: Name
    arguments: str = ""


class ToolCall(Strict):
    """A tool call of an earlier answer."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_TURNS, fail_fast=True)] | None = (
        None
    )
    name: Name | None = None
    tool_call_id: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TURNS)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    annotations: Any = None  # of an earlier answer that a client sends back

    @property
    def turn(self) -> dict[str, Any]:
        """The message as data hold it; what renders it makes template input of it."""
        return {"content": None} | self.model_dump(exclude={"annotations"}, exclude_none=True)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)]


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _top_with_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        return self

    @property
    def requested_logprobs(self) -> int | None:
        """Most likely tokens to report; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
    )
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = None
    max_tokens: int | None = Field(default=None, ge=0, le=1 << 20)
    add_special_tokens: Literal[True] = True

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is not supported, unless it is n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 goes with echo: true")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [token for token in self.prompt if isinstance(token, int)]
        return [tokens] if tokens else [one for one in self.prompt if not isinstance(one, int)]


class GenerateKwargs(Strict):
    """KAITO's `generate_kwargs`."""

    max_length: int | None = Field(default=None, ge=1, le=1 << 20)  # including the prompt
    max_new_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    min_length: int = Field(default=0, ge=0, le=1 << 20)
    do_sample: bool = False
    temperature: Real = Field(default=1, gt=0, le=2)
    top_k: int = Field(default=10, ge=0, le=1 << 20)
    top_p: Real = Field(default=1, gt=0, le=1)
    typical_p: Real = Field(default=1, gt=0, le=1)
    repetition_penalty: Real = Field(default=1, ge=MIN_PENALTY, le=10)
    num_beams: Literal[1] = 1
    early_stopping: bool = False
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    pad_token_id: Any = None  # answers are not padded
    eos_token_id: Token | Annotated[list[Token], Field(max_length=16, fail_fast=True)] | None = None

    @property
    def ends(self) -> Ends | None:
        """Tokens that end an answer instead of the model's own."""
        if isinstance(self.eos_token_id, int):
            return Ends(frozenset({self.eos_token_id}))
        return Ends(frozenset(self.eos_token_id)) if self.eos_token_id else None


class QuickStartRequest(Strict):
    """`POST /chat`, as in KAITO's quick start and transformers runtime."""

    prompt: str | None = None
    messages: Messages | None = None
    model: Name | None = None
    return_full_text: bool = False
    clean_up_tokenization_spaces: bool = False
    prefix: Annotated[str, StringConstraints(max_length=100_000)] | None = None
    handle_long_generation: Any = None
    generate_kwargs: GenerateKwargs = GenerateKwargs()


class ApiError(Exception):
    """An error response: HTTP status, message, and the parameter at fault."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


Body = TypeVar("Body", bound=Strict)


def parse(model: type[Body], body: bytes) -> Body:
    """Parse a request body. Raises ApiError with every problem, without values."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
    lines = dict.fromkeys(_line(problem) for problem in problems[:20])
    first = problems[0]["loc"]
    raise ApiError(400, "; ".join(lines)[:2000], param=str(first[0])[:80] if first else None)


def _line(problem: Any) -> str:
    """A problem as the client reads it: where, and what to write."""
    path = problem["loc"][:6]
    union = next((at for at, part in enumerate(path) if part in WANTED), None)
    if union is not None and len(path) > union + 1:
        path, what = path[: union + 1], WANTED[path[union]]
    elif problem["type"] == "extra_forbidden":
        what = _about_key(str(path[-1]))
    elif problem["type"] in ("too_short", "too_long"):
        limits = problem["ctx"]
        fewest, most = limits.get("min_length"), limits.get("max_length")
        what = f"write a list of at most {most:,}" if most else f"write a list of {fewest} or more"
    elif problem["type"] == "missing":
        what = "is missing"
    else:
        what = problem["msg"].removeprefix("Value error, ")
    where = ".".join(str(part)[:40] for part in path)
    return f"{where}: {what}" if where else what


def _about_key(key: str) -> str:
    if key in TEMPLATE_KEYS:
        return NO_TEMPLATES
    if key in DEFAULTS:
        return "not supported here; vLLM may (a Workspace's annotation kaito.sh/runtime: vllm)"
    return "unknown key"
