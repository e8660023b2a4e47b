"""Request bodies: OpenAI's completions and chat completions, and KAITO's `/chat`.

Unknown keys and unsupported values are rejected: an answer that ignored half of a request would be
wrong. Keys that change nothing here (`user`, `metadata`, ...) are allowed. pydantic's own JSON
parser limits the depth and rejects NaN.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from tuning.data.turn_ends import Ends

MAX_CHOICES = 16  # answers to one request: prompts times n
MAX_TURNS = 1024
MIN_PENALTY = 0.01  # logits divided by less overflow
NO_TEMPLATES = "templates come with the model, never with a request"
TEMPLATE_KEYS = frozenset({"chat_template", "chat_template_kwargs", "chat_template_args"})

Name = Annotated[str, StringConstraints(max_length=256)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Token = Annotated[int, Field(ge=0)]
Ids = Annotated[list[Token], Field(min_length=1, fail_fast=True)]  # else an error per element
Real = Annotated[float, Field(allow_inf_nan=False)]


def _null_means(default: Any) -> BeforeValidator:
    """OpenAI allows null for many keys; it means their default."""
    return BeforeValidator(lambda value: default if value is None else value)


class Strict(BaseModel):
    """Rejects unknown keys; errors never show values."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Generation(Strict):
    """The keys that chat completions and completions share."""

    model: Name | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    temperature: Real | None = Field(default=None, ge=0, le=2)
    top_p: Real | None = Field(default=None, gt=0, le=1)
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), _null_means(1)] = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=8, fail_fast=True)] | None = None
    stream: Annotated[bool, _null_means(False)] = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    presence_penalty: Annotated[Real, Field(ge=-2, le=2), _null_means(0)] = 0
    frequency_penalty: Annotated[Real, Field(ge=-2, le=2), _null_means(0)] = 0
    # vLLM's extensions of OpenAI's API
    top_k: int | None = Field(default=None, ge=-1, le=1 << 20)
    min_p: Annotated[Real, Field(ge=0, le=1), _null_means(0)] = 0
    repetition_penalty: Real | None = Field(default=None, ge=MIN_PENALTY, le=10)
    min_tokens: Annotated[int, Field(ge=0, le=1 << 20), _null_means(0)] = 0
    # ignored
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # unsupported: must be empty
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

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
    # keys of an earlier answer that a client sends back
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Any = None

    @property
    def turn(self) -> dict[str, Any]:
        """The message as data hold it; what renders it makes template input of it."""
        written = self.model_dump(exclude={"refusal", "audio", "function_call", "annotations"})
        return {"content": None} | {k: v for k, v in written.items() if v is not None}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)]


class TextFormat(Strict):
    """The only supported response format."""

    type: Literal["text"]


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    logprobs: Annotated[bool, _null_means(False)] = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=8, fail_fast=True)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = None

    @model_validator(mode="after")
    def _top_with_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
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
    echo: Annotated[bool, _null_means(False)] = False
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

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
        problems = error.errors(include_url=False, include_context=False, include_input=False)
    lines = []
    for problem in problems[:20]:
        where = ".".join(str(part)[:40] for part in problem["loc"][:6])
        what = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            what = NO_TEMPLATES if where in TEMPLATE_KEYS else "unknown key"
        lines.append(f"{where}: {what}" if where else what)
    first = problems[0]["loc"]
    raise ApiError(400, "; ".join(lines)[:2000], param=str(first[0])[:80] if first else None)
