"""What evaluators and load generators ask of a real server: prompts' log-probabilities, usage,
health, keys that ask for nothing, and errors that name what to change."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import servers
import serving
import torch
from servers import Server

from tuning.models.load import load_tokenizer
from tuning.serve import schema
from tuning.serve.scoring import PromptScorer

TEXTS = ["What occupation does Tamsin Vale have?", "naïve 😀 text\n  two", "cat", "<|im_end|> x"]


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.random_adapter(serving.TINY, tmp_path_factory.mktemp("noise"), lora_alpha=256)


@pytest.fixture(scope="module")
def server(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = [
        *("--base", str(serving.TINY), "--base-name", "base", "--adapter", f"noise={noise}"),
        *("--context", "1024", "--concurrent", "4", "--queue", "8"),
    ]
    with servers.serving(tmp_path_factory.mktemp("server"), *arguments) as running:
        yield running


@pytest.fixture(scope="module")
def models(noise: Path) -> dict[str, Any]:
    """The same models by transformers and PEFT alone."""
    return {
        "base": serving.load(serving.TINY),
        "noise": serving.by_peft(serving.TINY, [noise], [1]),
    }


TOKENIZER = load_tokenizer(serving.TINY)


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


def scores(server: Server, prompt: Any, **more: Any) -> list[dict[str, Any]]:
    """The choices that answer a request for the log-probabilities of `prompt`."""
    body = {"model": "base", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0}
    status, answer, _ = server.ask("/v1/completions", body | more)
    assert 200 == status, answer
    return list(answer["choices"])


def check(choice: dict[str, Any], ids: list[int], model: Any, top: int = 1) -> None:
    """Compare a choice that echoes `ids` with what `model` gives."""
    told, own = choice["logprobs"], logprobs(model, ids)
    expected = [float(own[i, token]) for i, token in enumerate(ids[1:])]
    assert len(ids) <= len(told["tokens"]) == len(told["text_offset"])
    assert [None, *expected] == pytest.approx(told["token_logprobs"][: len(ids)], abs=1e-2)
    assert told["top_logprobs"][0] is None
    for row, token, logprob, likely in zip(
        own, ids[1:], told["token_logprobs"][1:], told["top_logprobs"][1:], strict=False
    ):
        # Tokens of the same text share an entry.
        assert max(1, top - 1) <= len(likely) <= top + 1
        assert float(row.max()) == pytest.approx(max(likely.values()), abs=1e-2)
        assert (int(row.argmax()) == token) == (logprob == max(likely.values()))


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("model", ["base", "noise"])
def test_the_prompts_logprobs_are_those_of_transformers(
    model: str, tokens: int, server: Server, models: dict[str, Any]
) -> None:
    """As lm-eval asks: texts and token ids, one and several, of the base and of an adapter."""
    ids = [TOKENIZER(text)["input_ids"] for text in TEXTS]
    for prompts in (TEXTS, ids):
        choices = scores(server, prompts, model=model, max_tokens=tokens, temperature=0)
        assert list(range(len(TEXTS))) == [choice["index"] for choice in choices]
        for choice, own, text in zip(choices, ids, TEXTS, strict=True):
            check(choice, own, models[model])
            assert len(own) + tokens == len(choice["logprobs"]["tokens"])
            shown = text if prompts is TEXTS else TOKENIZER.decode(own, skip_special_tokens=True)
            assert choice["text"].startswith(shown)
            assert (shown == choice["text"]) or tokens
    (single,) = scores(server, ids[0], model=model)
    check(single, ids[0], models[model])


def test_random_prompts_are_scored_beside_answers(server: Server, models: dict[str, Any]) -> None:
    """Many clients at once, prompts of 1 to 1,000 tokens in several passes, generated answers
    between them: each prompt has its own model's numbers, and each answer is unchanged."""
    rng, vocabulary = random.Random(7), len(TOKENIZER)
    asked: list[tuple[str, list[int], int]] = []
    for length in (1, 2, 31, 32, 33, 65, 300, 1000, *(rng.randint(2, 120) for _ in range(8))):
        ids = [rng.randrange(vocabulary) for _ in range(length)]
        asked.append((rng.choice(["base", "noise"]), ids, rng.choice([1, 2, 5])))
    chat = {"model": "noise", "messages": [{"role": "user", "content": "cat"}], "max_tokens": 40}
    alone = server.ask("/v1/chat/completions", chat)[1]["choices"]
    with ThreadPoolExecutor(8) as pool:
        beside = [pool.submit(server.ask, "/v1/chat/completions", chat) for _ in range(3)]
        jobs = [
            pool.submit(scores, server, ids, model=name, logprobs=top, max_tokens=1)
            for name, ids, top in asked
        ]
        for (name, ids, top), job in zip(asked, jobs, strict=True):
            check(job.result()[0], ids, models[name], top)
        assert all(alone == job.result()[1]["choices"] for job in beside)


def test_a_prompt_that_fills_the_context_is_scored(server: Server, models: dict[str, Any]) -> None:
    """1,024 tokens of 1,024 with max_tokens 0; one more is too long."""
    ids = [5 + number % 100 for number in range(1024)]
    (choice,) = scores(server, ids)
    check(choice, ids, models["base"])
    assert "length" == choice["finish_reason"]
    body = {"prompt": [*ids, 5], "echo": True, "logprobs": 1, "max_tokens": 0}
    status, answer, _ = server.ask("/v1/completions", body)
    assert (400, "prompt") == (status, answer["error"]["param"])


def test_the_token_that_ends_an_answer_is_told(server: Server, models: dict[str, Any]) -> None:
    """lm-eval drops the last log-probability as that of the generated token, so it is there even
    if the answer is empty."""
    ids = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": serving.QUESTION}], add_generation_prompt=True
    )["input_ids"]
    (choice,) = scores(server, ids, max_tokens=64, temperature=0)
    told = choice["logprobs"]["tokens"]
    answer = serving.generate(models["base"], ids, len(told) - len(ids))
    assert "stop" == choice["finish_reason"]
    assert TOKENIZER.convert_ids_to_tokens(answer[-1]) == told[-1]

    (empty,) = scores(server, [*ids, *answer[:-1]], max_tokens=1, temperature=0)
    assert "stop" == empty["finish_reason"]
    assert told == empty["logprobs"]["tokens"]
    check(empty, [*ids, *answer[:-1]], models["base"])


def test_offsets_place_each_token_in_the_text(server: Server) -> None:
    """Every prompt token begins where its offset says; the answer's follow the prompt."""
    text = "cat dog  the tree\nWhat occupation?"
    (choice,) = scores(server, text, max_tokens=3, temperature=0)
    starts, count = choice["logprobs"]["text_offset"], len(TOKENIZER(text)["input_ids"])
    shown = [choice["text"][starts[i] : starts[i + 1]] for i in range(count)]
    assert choice["logprobs"]["tokens"][:count] == shown
    assert len(text) == starts[count] <= min(starts[count:])


def test_a_streamed_echo_is_the_whole_in_pieces(server: Server) -> None:
    """The prompt with its log-probabilities first, for each prompt and choice."""
    body = {"model": "noise", "prompt": TEXTS[:2], "echo": True, "logprobs": 2, "max_tokens": 4}
    body |= {"temperature": 0, "n": 2}
    whole = server.ask("/v1/completions", body)[1]["choices"]
    texts, told = [""] * 4, [{key: [] for key in whole[0]["logprobs"]} for _ in whole]
    for event in events(server, "/v1/completions", body):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            for key, values in choice["logprobs"].items():
                told[choice["index"]][key] += values

    assert [choice["text"] for choice in whole] == texts
    for choice, streamed in zip(whole, told, strict=True):
        for key in ("tokens", "text_offset"):
            assert choice["logprobs"][key] == streamed[key]
        scores = pytest.approx(streamed["token_logprobs"], abs=1e-3)  # batches differ
        assert choice["logprobs"]["token_logprobs"] == scores


def test_too_many_scores_are_refused_in_words(server: Server) -> None:
    """What would be hundreds of megabytes names what to lower; max_tokens 0 wants echo."""
    ids = [[5] * 900] * 12
    body = {"prompt": ids, "n": 1, "echo": True, "logprobs": 20, "max_tokens": 1}
    assert 900 * 12 * 21 < schema.MAX_SCORES  # passes
    assert 200 == server.ask("/v1/completions", body, seconds=120)[0]
    status, answer, _ = server.ask("/v1/completions", body | {"prompt": [[5] * 900] * 30})
    assert 400 == status
    assert "logprobs" in answer["error"]["message"]
    status, answer, _ = server.ask("/v1/completions", {"prompt": "cat", "max_tokens": 0})
    assert (400, True) == (status, "echo" in answer["error"]["message"])


def test_logits_of_a_long_prompt_are_made_in_small_parts() -> None:
    """Whatever a family does behind its decoder is done; 32 rows at most at once."""
    model, rows = serving.load(serving.TINY), []

    class Request:
        unscored = 100

        def score(self, logits: torch.Tensor) -> None:
            rows.append(logits)
            self.unscored -= len(logits)

    head, seen = model.get_output_embeddings(), []
    head.register_forward_hook(lambda _, __, output: seen.append(output.shape[-2]))
    scorer, request = PromptScorer(model), Request()
    ids = torch.arange(5, 106)[None]
    scorer.expect([None, request])
    with torch.no_grad():
        model(input_ids=ids, logits_to_keep=1)
        scorer.score([(request, ids.shape[1])])
        expected = model(input_ids=ids).logits[0, :-1].float()
    scorer.remove()

    assert torch.allclose(expected, torch.cat(rows), atol=1e-4)
    assert [1, 32, 32, 32, 4] == seen[:5]


# Usage


def events(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a stream."""
    asked = json.dumps(body | {"stream": True}).encode()
    request = urllib.request.Request(f"{server.url}{path}", asked, servers.JSON)
    with urllib.request.urlopen(request, timeout=60) as reply:
        lines = [line for line in reply.read().decode().split("\n\n") if line]
    assert "data: [DONE]" == lines.pop()
    return [json.loads(line.removeprefix("data: ")) for line in lines]


CHAT = {"model": "noise", "messages": [{"role": "user", "content": "cat"}]}
PLAIN = {"model": "noise", "prompt": "cat dog"}
BOTH = pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", PLAIN)]
)


@BOTH
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_of_several_answers_is_counted_once(
    stream: bool, path: str, body: dict[str, Any], server: Server
) -> None:
    """In usage and in the metrics; several prompts are added up."""

    def measured(**more: Any) -> tuple[dict[str, int], float]:
        before = server.metric("tuning_serve_tokens_total")
        asked = body | {"max_tokens": 3, "ignore_eos": True} | more
        if stream:
            asked["stream_options"] = {"include_usage": True}
            usage = events(server, path, asked)[-1]["usage"]
        else:
            usage = server.ask(path, asked)[1]["usage"]
        assert server.idle()
        return usage, server.metric("tuning_serve_tokens_total") - before

    one, counted = measured()
    assert one["total_tokens"] == one["prompt_tokens"] + 3 == counted
    four, counted = measured(n=4)
    assert (one["prompt_tokens"], 12) == (four["prompt_tokens"], four["completion_tokens"])
    assert four["total_tokens"] == counted
    if "prompt" in body:
        several, counted = measured(prompt=["cat dog", "cat dog", "tree"], n=2)
        ids = [TOKENIZER(text)["input_ids"] for text in ("cat dog", "cat dog", "tree")]
        assert (sum(map(len, ids)), 18) == (several["prompt_tokens"], several["completion_tokens"])
        assert several["total_tokens"] == counted


@BOTH
def test_usage_goes_along_with_a_stream(path: str, body: dict[str, Any], server: Server) -> None:
    """Each chunk has the counts so far if asked, null without; none without include_usage."""
    asked = body | {"max_tokens": 5, "n": 2, "ignore_eos": True}
    each = {"include_usage": True, "continuous_usage_stats": True}
    counts = [event["usage"] for event in events(server, path, asked | {"stream_options": each})]
    generated = [usage["completion_tokens"] for usage in counts]
    assert sorted(generated) == generated and 10 == generated[-1] == generated[-2]
    assert len(set(generated)) > 4
    assert 1 == len({usage["prompt_tokens"] for usage in counts})

    last = {"include_usage": True, "continuous_usage_stats": None}
    *others, final = events(server, path, asked | {"stream_options": last})
    assert {None} == {event["usage"] for event in others}
    assert counts[-1] == final["usage"]
    alone = {"continuous_usage_stats": True}
    for options in (None, alone):
        assert all(
            "usage" not in event
            for event in events(server, path, asked | {"stream_options": options})
        )


@BOTH
def test_ignore_eos_answers_at_full_length(path: str, body: dict[str, Any], server: Server) -> None:
    """As load generators ask: exactly max_tokens, finish length; false changes nothing."""
    asked = body | {"model": "base", "max_tokens": 200, "temperature": 0}
    answer = server.ask(path, asked | {"ignore_eos": True})[1]
    assert (200, "length") == (
        answer["usage"]["completion_tokens"],
        answer["choices"][0]["finish_reason"],
    )
    usual = server.ask(path, asked)[1]
    assert usual["choices"] == server.ask(path, asked | {"ignore_eos": False})[1]["choices"]
    if "messages" in body:
        assert 200 > usual["usage"]["completion_tokens"]


# Health, and keys that ask for nothing


def test_health_is_vllms(server: Server) -> None:
    """200 without a body or a key, to GET and HEAD; not counted as an unknown route."""
    status, text, _ = server.ask("/health")
    assert (200, b"") == (status, text)
    request = urllib.request.Request(f"{server.url}/health", method="HEAD")
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert 200 == reply.status
    assert b'route="/health"' in server.ask("/metrics")[1]
    assert 405 == server.ask("/health", {})[0]


OPTIONAL = {
    "/v1/chat/completions": (schema.ChatRequest, CHAT | {"max_tokens": 2}),
    "/v1/completions": (schema.CompletionRequest, PLAIN | {"max_tokens": 2}),
    "/chat": (schema.QuickStartRequest, {"model": "noise", "prompt": "cat"}),
}


@pytest.mark.parametrize("path", OPTIONAL)
def test_null_is_allowed_for_every_optional_key(path: str, server: Server) -> None:
    """Those of the schema, in nested objects too, and those that only other servers know."""
    kind, body = OPTIONAL[path]
    nulls = {name: None for name, field in kind.model_fields.items() if not field.is_required()}
    nulls |= dict.fromkeys((*schema.DEFAULTS, *schema.IGNORED, "guided_decoding_backend"))
    if path == "/chat":
        few = dict.fromkeys(schema.GenerateKwargs.model_fields) | {"max_new_tokens": 2}
        body = body | {"generate_kwargs": few}
    status, answer, _ = server.ask(path, nulls | body)
    assert 200 == status, answer
    if path == "/v1/chat/completions":
        fields = dict.fromkeys(schema.Message.model_fields)
        messages = [fields | message for message in CHAT["messages"]]
        assert 200 == server.ask(path, body | {"messages": messages})[0]


@BOTH
def test_defaults_of_other_servers_are_allowed(
    path: str, body: dict[str, Any], server: Server
) -> None:
    """Keys of OpenAI and vLLM that ask for nothing; what asks for something is refused by name."""
    nothing = {key: values[0] for key, values in schema.DEFAULTS.items() if values}
    short = body | {"max_tokens": 2}
    assert 200 == server.ask(path, short | nothing | {"user": "me", "request_id": "1"})[0]
    for change in (
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"guided_json": {}},
        {"stop_token_ids": [3]},
        {"logit_bias": {"1": 100}},
        {"skip_special_tokens": False},
    ):
        status, answer, _ = server.ask(path, short | change)
        (key,) = change
        assert (400, key) == (status, answer["error"]["param"])
        assert "kaito.sh/runtime: vllm" in answer["error"]["message"]


# Errors that name what to change

LIMITS = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/completions": ("max_tokens",),
}


@BOTH
def test_an_answer_that_is_too_long_for_the_context_is_named(
    path: str, body: dict[str, Any], server: Server
) -> None:
    """The key as the client wrote it, the context and what it leaves; not the prompt."""
    for key in LIMITS[path]:
        for tokens in (1024, 4000):
            status, answer, _ = server.ask(path, body | {key: tokens})
            error = answer["error"]
            assert (400, key, "context_length_exceeded") == (status, error["param"], error["code"])
            assert key in error["message"] and "1,024" in error["message"]
            left = int(error["message"].rpartition(" ")[2].replace(",", ""))
            assert 200 == server.ask(path, body | {key: min(left, 9)})[0]
        status, answer, _ = server.ask(path, body | {key: 5000})
        assert (400, key) == (status, answer["error"]["param"])
        assert "4,096" in answer["error"]["message"]
    quick = {"prompt": "cat", "generate_kwargs": {"max_new_tokens": 4000}}
    assert "max_new_tokens" in server.ask("/chat", quick)[1]["error"]["message"]


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        ("/v1/completions", {"prompt": []}, "prompt: write a text"),
        ("/v1/completions", {"prompt": [[]]}, "prompt: write a text"),
        ("/v1/completions", {"prompt": None}, "prompt: is missing"),
        ("/v1/completions", {"prompt": ["cat"] * 200}, "1 to 128"),
        ("/v1/completions", {"stop": [1, 2]}, "stop: write a text"),
        ("/v1/completions", {"stop": ["x"] * 9}, "at most 8"),
        ("/v1/chat/completions", {"messages": []}, "messages: write a list of 1 or more"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content: write a text",
        ),
        ("/v1/chat/completions", {"tools": [1]}, "tools: not supported"),
    ],
)
def test_an_error_of_a_list_says_what_to_write(
    path: str, change: dict[str, Any], words: str, server: Server
) -> None:
    """In a few words, each thing once, without the validator's own."""
    body = CHAT if "chat" in path else PLAIN
    status, answer, _ = server.ask(path, body | change)
    message = answer["error"]["message"]
    assert 400 == status
    assert words in message
    assert "validation" not in message and "constrained" not in message
    assert message.count(words.partition(":")[0] + ":") <= 1


def test_more_answers_than_ever_fit_are_refused_for_good(server: Server) -> None:
    """12 run or wait at most: 13 are a mistake (400), and no reason to try again (429)."""
    status, answer, _ = server.ask("/v1/chat/completions", CHAT | {"n": 13, "max_tokens": 1})
    assert (400, "n") == (status, answer["error"]["param"])
    assert "12" in answer["error"]["message"]
    assert 200 == server.ask("/v1/chat/completions", CHAT | {"n": 12, "max_tokens": 1})[0]
