"""Training and serving show a conversation in the same tokens, and answers end where training ends.

Every chat template of the fixtures, and templates that end turns in unusual places.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import chats
import pytest
import transformers
from tokenizers import AddedToken

from tuning.data import chat_rewrites, prompts
from tuning.data.chat import ChatTemplate
from tuning.data.encode import Encoded, Encoder
from tuning.data.formats import Columns, Conversation, detect, to_example
from tuning.models import generate
from tuning.serve import schema
from tuning.serve.detokenizer import Detokenizer
from tuning.serve.engine import Job
from tuning.serve.rendering import Renderer
from tuning.serve.sampling import SampledToken, Sampler, Sampling
from tuning.serve.tokenizer import ChatTokenizer

G, E = "{% generation %}", "{% endgeneration %}"
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": 2}'},
}
PARTS = [{"type": "text", "text": "2 + 2?"}, {"type": "text", "text": "In words."}]
FOUR = {"role": "assistant", "content": "four"}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "rounds": [
        {"role": "system", "content": "Answer in short."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Write code."},
        {"role": "assistant", "content": "def f():\n    return 1"},
    ],
    "several text parts": [
        {"role": "user", "content": PARTS},
        {"role": "assistant", "content": [*PARTS, {"type": "text", "text": ""}]},
        {"role": "user", "content": PARTS[:1]},
        FOUR,
    ],
    "names": [{"role": "user", "content": "2 + 2?", "name": "Tamsin"}, FOUR],
    "developer": [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": "2 + 2?"},
        FOUR,
    ],
    "null content and a call": [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "4", "tool_call_id": "call00001", "name": "add"},
        FOUR,
    ],
    "reasoning": [
        {"role": "user", "content": "2 + 2?"},
        FOUR | {"reasoning_content": "so it is"},
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "adds",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


def other(answer: str, tail: str = "") -> str:
    """A template of its own for answers; other turns as in Phi-3's."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\n' }}"
        + answer
        + "{% else %}{{ '<|' + m.role + '|>\n' + m.content + '"
        + ("<|end|>\n" if "end" not in tail else "\n")
        + "' }}{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )


UNUSUAL = {
    "the end outside of the block": other(G + "{{ m.content }}" + E + "{{ '<|end|>\n' }}"),
    "a new line and the end outside": other(G + "{{ m.content }}" + E + "{{ '\n<|end|>\n' }}"),
    "the end and a new line inside": other(G + "{{ m.content + '<|end|>\n' }}" + E),
    "several blocks": other(G + "{{ m.content }}" + E + G + "{{ ' ' }}" + E + "{{ '<|end|>\n' }}"),
    "stripped content": other(G + "{{ m.content.strip() }}" + E + "{{ '<|end|>\n' }}"),
    "the next role's marker": other("{{ m.content }}", "no end"),
    "the next role's marker after a block": other(G + "{{ m.content }}" + E, "no end"),
    "eos behind the last answer only": other(
        "{{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}"
    ),
}


def unusual(name: str) -> Any:
    tokenizer = chats.tokenizer("phi3_5", template=False)
    tokenizer.chat_template = UNUSUAL[name]
    return tokenizer


def tokenizer_of(name: str) -> Any:
    return chats.tokenizer(name) if name in chats.STYLES else unusual(name)


def trained(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> Any:
    """The row as it is trained (or its fault), its messages, and the template's notes."""
    row = {"messages": messages} | ({"tools": tools} if tools else {})
    example = to_example(row, detect(row, Columns()))
    assert isinstance(example, Conversation)
    template = ChatTemplate(tokenizer, tokenizer.chat_template)
    (encoded,) = Encoder(tokenizer, template, train_on="assistant").encode([example])
    return encoded, template.notes


def answers(encoded: Encoded) -> list[tuple[int, int]]:
    return list(zip(encoded.trained[::2], encoded.trained[1::2], strict=True))


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    with contextlib.closing(Renderer()) as apart:
        yield apart


def served(tokenizer: Any, renderer: Renderer, eos: int | None = None) -> ChatTokenizer:
    """What the server makes of the tokenizer for an adapter that was trained here."""
    model = SimpleNamespace(generation_config=transformers.GenerationConfig(eos_token_id=eos))
    text = chat_rewrites.training_text(tokenizer.chat_template)
    return ChatTokenizer(tokenizer, model, renderer, template=text)


def requested(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as the server's schema reads them."""
    return [schema.Message.model_validate(message).turn for message in messages]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", [*chats.STYLES, *UNUSUAL])
def test_training_and_serving_show_the_same_tokens(
    name: str, conversation: str, renderer: Renderer
) -> None:
    """Before each answer the row has the very tokens of the server's prompt, and of `chat`'s."""
    tokenizer, messages = tokenizer_of(name), CONVERSATIONS[conversation]
    tools = TOOLS if "call" in conversation else None
    encoded, notes = trained(tokenizer, messages, tools)
    if not isinstance(encoded, Encoded):  # no such turns in this template: nothing is trained
        assert encoded.code in ("DATA-231", "DATA-232")
        assert conversation in ("null content and a call", "reasoning")
        assert name not in ("qwen3", "gptoss")
        return
    chat = served(tokenizer, renderer)
    local = prompts.Prompts(
        tokenizer,
        prompts.renderer(tokenizer, chat_rewrites.training_text(tokenizer.chat_template)),
        named=None,
    )
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]

    for index, (start, _) in zip(turns, answers(encoded), strict=True):
        asked = requested(messages[:index])
        text = chat.render(asked, tools)
        ids = chat.encode_chat(text)
        if any("open an answer" in note for note in notes):  # said: the prompt has <think>
            assert name == "deepseek_r1_distill"
            ids = ids[:start]
        assert ids == encoded.ids[:start]
        assert text == local.text(asked, tools)


def scripted(vocabulary: int, script: list[int]) -> Any:
    """A real model whose logits are forced: it says `script`, whatever it is asked."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.said = 0
    plain = model.forward

    def forward(*args: Any, **options: Any) -> Any:
        out = plain(*args, **options)
        out.logits[:, -1, script[model.said % len(script)]] = 1e4
        model.said += 1
        return out

    model.forward = forward
    return model


@pytest.mark.parametrize("name", [*chats.STYLES, *UNUSUAL])
def test_generation_stops_where_training_ended(name: str, renderer: Renderer) -> None:
    """Whoever says what was trained is stopped at its last token, by `chat` and by the server."""
    tokenizer = tokenizer_of(name)
    encoded, notes = trained(tokenizer, CONVERSATIONS["rounds"])
    spans = answers(encoded)
    open_ended = [note for note in notes if "only the last answer" in note]
    assert bool(open_ended) == (name == "falcon_instruct")

    chat = served(tokenizer, renderer)
    for start, end in spans[-1:] if open_ended else spans:
        answer = encoded.ids[start:end]
        first = next(n for n, token in enumerate(answer) if token in chat.ends.ids)
        model = scripted(len(tokenizer), [*answer, *answer])

        said = generate.continued(model, tokenizer, encoded.ids[:start], max_new_tokens=200)

        assert model.said == first + 1 <= len(answer)
        assert tokenizer.decode(answer, skip_special_tokens=True).strip() == said
        job = asked(chat, answer)
        for token in answer[: first + 1]:
            assert job.finish is None
            job.take(token, SampledToken(token, 0.0, ()))
        assert "stop" == job.finish
    ids = set(generate.stops(scripted(len(tokenizer), [0]), tokenizer))
    assert chat.ends.ids == ids
    assert all(encoded.ids[end - 1] in ids for _, end in (spans[-1:] if open_ended else spans))


def asked(chat: ChatTokenizer, answer: list[int]) -> Job:
    return Job(
        prompt=[0],
        limit=200,
        weights=(),
        ends=chat.ends.ids,
        sampler=Sampler(Sampling(), [0], chat.ends.ids),
        detokenizer=Detokenizer(chat.decode),
        answer_ends=chat.ends if chat.ends.inner else None,
    )


def test_the_analysis_of_gpt_oss_is_not_the_end_of_its_answer(renderer: Renderer) -> None:
    """Analysis ends in the marker that ends an earlier answer; the answer goes on behind it."""
    tokenizer = chats.tokenizer("gptoss")
    text = (
        "<|channel|>analysis<|message|>so it is<|end|><|start|>assistant"
        "<|channel|>final<|message|>four<|end|>"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    model = scripted(len(tokenizer), ids)

    said = generate.continued(model, tokenizer, [5, 6], max_new_tokens=200)

    assert len(ids) == model.said
    assert said.endswith("finalfour")
    job = asked(served(tokenizer, renderer), ids)
    for token in ids:
        assert job.finish is None
        job.take(token, SampledToken(token, 0.0, ()))
    assert "stop" == job.finish


def test_a_special_token_that_nothing_names_ends_an_answer(renderer: Renderer) -> None:
    """An added token with special: true counts, though it is no eos, pad or extra token; so does
    one without it, and every end that the generation config names."""
    for special in (True, False):
        tokenizer = chats.tokenizer("phi3", template=False)
        tokenizer.add_tokens([AddedToken("<|stop|>", special=special, normalized=False)])
        template = chats.tokenizer("phi3").chat_template
        tokenizer.chat_template = template.replace("<|end|>", "<|stop|>")
        assert tokenizer.convert_tokens_to_ids("<|stop|>") not in tokenizer.all_special_ids
        named = tokenizer.convert_tokens_to_ids("<|user|>")

        ends = served(tokenizer, renderer, eos=named).ends

        words = set(tokenizer.convert_ids_to_tokens(sorted(ends.ids)))
        assert {"<|stop|>", "<|endoftext|>", "<|user|>"} == words
        encoded, _ = trained(tokenizer, CONVERSATIONS["rounds"])
        for start, end in answers(encoded):
            said = generate.continued(
                scripted(len(tokenizer), encoded.ids[start:end]), tokenizer, [5], max_new_tokens=99
            )
            assert "stop" not in said


def test_llama_3_stops_at_the_end_of_a_turn_and_at_the_end_of_the_text(renderer: Renderer) -> None:
    """A base's eos is the end of the text; its template's is <|eot_id|>."""
    tokenizer = chats.tokenizer("llama3_1")
    tokenizer.add_special_tokens({"eos_token": "<|end_of_text|>"})

    words = tokenizer.convert_ids_to_tokens(sorted(served(tokenizer, renderer).ends.ids))

    assert {"<|eot_id|>", "<|end_of_text|>"} == set(words)


@pytest.mark.parametrize("name", [name for name in UNUSUAL if "next" not in name][:-1])
def test_an_end_outside_of_the_generation_block_is_trained(name: str) -> None:
    """Behind every answer; nothing is appended and nothing is said."""
    tokenizer = unusual(name)
    encoded, notes = trained(tokenizer, CONVERSATIONS["rounds"])

    ends = [tokenizer.convert_ids_to_tokens(encoded.ids[end - 1]) for _, end in answers(encoded)]

    assert ["<|end|>", "<|end|>"] == ends
    assert not notes
    text = tokenizer.apply_chat_template(CONVERSATIONS["rounds"], tokenize=False)
    assert encoded.ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_call_of_a_tool_ends_where_the_tool_answers() -> None:
    """In a template whose roles' markers end turns, a call ends in that of the tool."""
    tokenizer = chats.tokenizer("phi3", template=False)
    tokenizer.add_tokens([AddedToken("<|observation|>", special=True, normalized=False)])
    tokenizer.add_tokens(["<call>", "</call>"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role if m.role != 'tool' else 'observation' }}|>\n"
        "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    encoded, _ = trained(tokenizer, CONVERSATIONS["null content and a call"], TOOLS)

    ends = [tokenizer.convert_ids_to_tokens(encoded.ids[end - 1]) for _, end in answers(encoded)]

    assert ["<|observation|>", "<|endoftext|>"] == ends
    stops = generate.stops(scripted(len(tokenizer), [0]), tokenizer)
    assert set(tokenizer.convert_tokens_to_ids(ends)) <= set(stops)


def test_a_system_message_that_a_template_refuses_opens_the_first_question(
    renderer: Renderer,
) -> None:
    """In training and in serving; also where the template leaves it out, or moves it."""
    plain = (
        "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + plain
    for template in (plain, refusing):
        tokenizer = chats.tokenizer("phi3_5", template=False)
        tokenizer.chat_template = template

        text = served(tokenizer, renderer).render(CONVERSATIONS["rounds"][:2])

        assert "<|user|>Answer in short.\n\n2 + 2?<|end|><|assistant|>" == text


def test_ends_are_reached_once() -> None:
    """No token but the last one ends an answer; an inner end does only behind its opener."""
    ends = prompts.Ends(frozenset({1, 2}), inner=frozenset({2}), opener=(7, 8))

    assert ends.reached([5, 1]) and ends.reached([7, 8, 5, 2]) and ends.reached([5, 2, 7, 8, 2])
    assert not ends.reached([]) and not ends.reached([1, 5]) and not ends.reached([7, 8, 2, 5, 2])
    assert dataclasses.replace(ends, inner=frozenset()).reached([2])
