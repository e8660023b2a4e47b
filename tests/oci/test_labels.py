"""Labels, token for token, for the chat templates of the presets.

`data/labels/*.txt` hold what a person checked: the text that the tokens spell, the trained ones in
⟦ ⟧. `data/templates/*.jinja` are the templates as the models ship them.
"""

from __future__ import annotations

import random
from typing import Any

import chats
import pytest

from tuning.data.chat import ChatTemplate
from tuning.data.encode import Encoded, Encoder
from tuning.data.formats import Conversation, Fault, Pair, Text, Tokens
from tuning.data.preview import token_flags

SYSTEM = {"role": "system", "content": "Answer in short."}
CHAT: list[dict[str, Any]] = [
    SYSTEM,
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Write code."},
    {"role": "assistant", "content": "def f():\n    return 1  # 🙂\n"},
]
THOUGHT: list[dict[str, Any]] = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "<think>\nso it is\n</think>\n\n4"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "<think>\nyes\n</think>\n\nYes."},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]
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
FIELD: list[dict[str, Any]] = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "so it is"},
]
CASES = {
    **{style: (style, Conversation(CHAT, (2, 4))) for style in chats.STYLES},
    "qwen3-reasoning": ("qwen3", Conversation(THOUGHT, (1, 3))),
    "deepseek_r1_distill-reasoning": ("deepseek_r1_distill", Conversation(THOUGHT, (1, 3))),
    "qwen3-reasoning-field": ("qwen3", Conversation(FIELD, (1,))),
    "gptoss-reasoning-field": ("gptoss", Conversation(FIELD, (1,))),
    "qwen2_5-tools": ("qwen2_5", Conversation(CALLED, (1, 3), TOOLS)),
    "llama3_1-tools": ("llama3_1", Conversation(CALLED, (1, 3), TOOLS)),
    "gptoss-tools": ("gptoss", Conversation(CALLED, (1, 3), TOOLS)),
    "chatml-last-turn-only": ("chatml", Conversation(CHAT, (4,))),
    "chatml_marked-last-turn-only": ("chatml_marked", Conversation(CHAT, (4,))),
}


def encoder(style: str, *, template: str | None = "", train_on: Any = "assistant") -> Encoder:
    """`template`: "" for the model's own, None for none."""
    tokenizer = chats.tokenizer(style)
    text = tokenizer.chat_template if template == "" else template
    return Encoder(tokenizer, ChatTemplate(tokenizer, text) if text else None, train_on=train_on)


def shown(style: str, encoded: Encoded | Fault) -> str:
    """What the tokens spell, the trained ones in ⟦ ⟧."""
    assert isinstance(encoded, Encoded), encoded
    tokenizer = chats.tokenizer(style)
    text, run, trained = "", list[int](), False
    for token, flag in [*zip(encoded.ids, token_flags(encoded), strict=True), (None, None)]:
        if flag is not trained:
            spelled = tokenizer.decode(run, clean_up_tokenization_spaces=False) if run else ""
            text += f"⟦{spelled}⟧" if trained else spelled
            run, trained = [], flag
        run.append(token)
    return text


@pytest.mark.parametrize("case", CASES)
def test_hand_checked(case: str) -> None:
    """The trained tokens are the ones a person marked."""
    style, conversation = CASES[case]

    (encoded,) = encoder(style).encode([conversation])

    expected = (chats.DATA / "labels" / f"{case}.txt").read_text(encoding="utf-8")
    assert expected == shown(style, encoded)


@pytest.mark.parametrize("style", chats.STYLES)
def test_same_alone_and_in_a_crowd(style: str) -> None:
    """A conversation gets the same labels whatever was seen before it."""
    crowd = [
        Conversation(CHAT[1:3], (1,)),
        Conversation(CHAT, (2, 4)),
        Conversation(
            [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "b "}], (1,)
        ),
    ]
    alone = [encoder(style).encode([conversation])[0] for conversation in crowd]

    made = encoder(style)

    assert alone == made.encode(crowd)
    assert alone[::-1] == made.encode(crowd[::-1])


@pytest.mark.parametrize("style", chats.STYLES)
def test_ids_are_the_templates(style: str) -> None:
    """The ids are those that the tokenizer itself makes of the rendered conversation."""
    tokenizer = chats.tokenizer(style)
    if style in ("qwen3", "gptoss"):
        pytest.skip("trained with another template, or with a fixed date")

    (encoded,) = encoder(style).encode([Conversation(CHAT[1:3], (1,))])

    expected = tokenizer.apply_chat_template(CHAT[1:3], tokenize=True, return_dict=False)
    expected += [tokenizer.eos_token_id] if style == "falcon_instruct" else []
    assert isinstance(encoded, Encoded)
    assert expected == encoded.ids


LOW = [
    *"abc xyz",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "é",
    "🙂",
    "日本",
    "'",
    "</",
    "<b>",
    "[x]",
    "\r\n",
    "user:",
]
UP = [word.upper() for word in LOW]


@pytest.mark.parametrize("style", chats.STYLES)
def test_every_word_of_an_answer_and_none_of_a_question(style: str) -> None:
    """Answers in small letters and questions in capitals are told apart, whatever is in them."""
    draw = random.Random(style)
    tokenizer = chats.tokenizer(style)

    def words(alphabet: list[str]) -> str:
        text = "".join(draw.choice(alphabet) for _ in range(draw.randint(1, 25)))
        return text if text.strip() else alphabet[0]

    for _ in range(40):
        messages = [{"role": "system", "content": words(UP)}] * draw.randint(0, 1)
        for _ in range(draw.randint(1, 3)):
            messages += [{"role": "user", "content": words(UP)}]
            messages += [{"role": "assistant", "content": words(LOW)}]
        answers = tuple(i for i, m in enumerate(messages) if m["role"] == "assistant")

        (encoded,) = encoder(style).encode([Conversation(messages, answers)])

        assert isinstance(encoded, Encoded)
        trained = [t for t, flag in zip(encoded.ids, token_flags(encoded), strict=True) if flag]
        text = tokenizer.decode(trained, clean_up_tokenization_spaces=False)
        for marker in [*tokenizer.added_tokens_encoder, "final" if style == "gptoss" else "<s>"]:
            text = text.replace(marker, "")
        expected = "".join(messages[index]["content"] for index in answers)
        assert "".join(expected.split()) == "".join(text.split())


def test_reasoning_that_is_left_out_is_refused() -> None:
    """A template that drops words of a trained turn, and that trl does not know, is no good."""
    template = chats.tokenizer("qwen3").chat_template + " "

    (refused,) = encoder("qwen3", template=template).encode([CASES["qwen3-reasoning"][1]])

    assert isinstance(refused, Fault)
    assert "DATA-231" == refused.code


def test_reasoning_of_the_last_turn_needs_no_variant() -> None:
    """The last turn shows its reasoning even in a template that leaves it out of earlier ones."""
    template = chats.tokenizer("qwen3").chat_template + " "

    (encoded,) = encoder("qwen3", template=template).encode([Conversation(THOUGHT[:2], (1,))])

    assert shown("qwen3", encoded).rstrip().endswith("⟦<think>\nso it is\n</think>\n\n4<|im_end|>⟧")


@pytest.mark.parametrize("roles", ["user tool assistant", "user assistant tool assistant"])
def test_a_message_that_the_template_leaves_out(roles: str) -> None:
    """Phi-3's template prints no tool messages: such a row is refused, not cut in silence."""
    messages = [{"role": role, "content": f"words of {role}"} for role in roles.split()]

    (refused,) = encoder("phi3").encode([Conversation(messages, (len(messages) - 1,))])

    assert isinstance(refused, Fault)
    assert "DATA-231" == refused.code
    assert "role tool" in refused.what


def test_tools_that_the_template_leaves_out() -> None:
    """Tools that the model would never see are refused."""
    (refused,) = encoder("chatml").encode([Conversation(CHAT[1:3], (1,), TOOLS)])

    assert isinstance(refused, Fault)
    assert ("DATA-231", True) == (refused.code, '"add"' in refused.what)


def test_what_the_template_refuses() -> None:
    """The template's own words reach the person."""
    turns = [CHAT[2], CHAT[1], CHAT[2]]

    (refused,) = encoder("gemma3").encode([Conversation(turns, (0, 2))])

    assert isinstance(refused, Fault)
    assert "DATA-232" == refused.code
    assert "roles must alternate" in refused.what


def test_special_token_typed_by_a_user() -> None:
    """C34: it would end the turn."""
    turns = [{"role": "user", "content": "say <|im_end|>"}, CHAT[2]]

    (refused,) = encoder("chatml").encode([Conversation(turns, (1,))])

    assert isinstance(refused, Fault)
    assert ("DATA-233", True) == (refused.code, '"<|im_end|>"' in refused.what)


@pytest.mark.parametrize(
    ("conversation", "where"),
    [
        (
            Conversation(
                [
                    CHAT[1],
                    {"role": "assistant", "content": "4", "reasoning_content": "a<|im_end|>"},
                ],
                (1,),
            ),
            "message 1",
        ),
        (
            Conversation(
                [
                    CHAT[1],
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [
                            {"function": {"name": "add", "arguments": {"a": "<|im_start|>system"}}}
                        ],
                    },
                ],
                (1,),
            ),
            "message 1",
        ),
        (Conversation(CHAT[1:3], (1,), [{"name": "add<|im_end|>"}]), "tools"),
    ],
)
def test_a_special_token_beside_the_content(conversation: Conversation, where: str) -> None:
    """C34: reasoning, arguments and schemas stand in the text as well."""
    (refused,) = encoder("qwen3").encode([conversation])

    assert isinstance(refused, Fault)
    assert ("DATA-233", True) == (refused.code, refused.what.startswith(where))


def test_one_prompt_that_talks_of_a_special_token_turns_no_template_off() -> None:
    """Raw is what most prompts begin as; the one row is refused."""
    pairs = [Pair(f"What is {n}?", "one", "", raw=True) for n in range(5)]
    pairs.append(Pair("What does <|im_end|> do?", "It ends a turn.", "", raw=True))

    *good, refused = encoder("chatml").encode(pairs)

    assert all(isinstance(each, Encoded) for each in good)
    assert isinstance(refused, Fault) and "DATA-233" == refused.code


def test_train_on_all() -> None:
    """Every token is trained when asked for."""
    (encoded,) = encoder("chatml", train_on="all").encode([Conversation(CHAT, (2, 4))])

    assert isinstance(encoded, Encoded)
    assert [0, len(encoded.ids)] == encoded.trained


PAIR = Pair("2 + 2?", " 4", "2 + 2?", raw=True)
ASKED = "<|im_start|>user<|im_sep|>a<|im_end|>"
ALPACA = Pair("Add.\n\n2 + 2", "4", "### Instruction:\nAdd.\n\n2 + 2\n\n### Response:\n")


@pytest.mark.parametrize(
    ("style", "template", "example", "expected"),
    [
        ("llama3_1", None, Text("Two plus two"), "<|begin_of_text|>⟦Two plus two<|eot_id|>⟧"),
        ("llama3_1", None, PAIR, "<|begin_of_text|>2 + 2?⟦ 4<|eot_id|>⟧"),
        (
            "falcon_instruct",
            None,
            Pair("Answer: ", "four", "Answer: ", raw=True),
            "Answer:⟦ four<|endoftext|>⟧",
        ),
        ("falcon_instruct", None, PAIR, "2 + 2?⟦ 4<|endoftext|>⟧"),
        (
            "falcon_instruct",
            None,
            ALPACA,
            "### Instruction:\nAdd.\n\n2 + 2\n\n### Response:\n⟦4<|endoftext|>⟧",
        ),
        (
            "phi4",
            "",
            PAIR,
            "<|im_start|>user<|im_sep|>2 + 2?<|im_end|><|im_start|>assistant"
            "<|im_sep|>⟦4<|im_end|>⟧",
        ),
        (
            "phi4",
            "",
            Pair(ASKED, "b", ASKED, raw=True),
            f"{ASKED}⟦b<|im_end|>⟧",
        ),
        ("chatml", "", Text("Two<|im_end|>"), "⟦Two<|im_end|>⟧"),
    ],
)
def test_pairs_and_text(style: str, template: str | None, example: Any, expected: str) -> None:
    """Pairs train the completion and its end, texts everything; BOS comes once."""
    (encoded,) = encoder(style, template=template).encode([example])

    assert expected == shown(style, encoded)


def test_conversation_without_a_template() -> None:
    """The message says where to give one."""
    (refused,) = encoder("chatml", template=None).encode([Conversation(CHAT, (2, 4))])

    assert isinstance(refused, Fault)
    assert ("DATA-244", True) == (refused.code, "ModelConfig.chat_template" in refused.change)


def test_token_ids_out_of_range() -> None:
    """Ids of another tokenizer are found before a GPU meets them."""
    (refused,) = encoder("chatml").encode([Tokens([1, 10**6], (0, 2))])

    assert isinstance(refused, Fault)
    assert "DATA-247" == refused.code
