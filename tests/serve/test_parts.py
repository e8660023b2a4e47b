"""The parts of a server that need no model: names, memory, words, stop strings, sampling."""

from __future__ import annotations

import contextlib
import random
import resource
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chats
import fake_driver
import gpu_machines
import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file

from tuning import files
from tuning.console import Console
from tuning.errors import SpecError, UsageError
from tuning.plan import device, inference, torch_build
from tuning.presets import load
from tuning.serve import adapter_specs, attention, options, rendering, responses, sampling, server
from tuning.serve.adapter_specs import AdapterSpec
from tuning.serve.detokenizer import Detokenizer, vocabulary_decoder
from tuning.serve.rendering import NotRendered, Renderer, template_problem
from tuning.serve.sampling import Sampler, Sampling
from tuning.serve.tokenizer import ChatTokenizer

TINY = Path("examples/tiny-model")
GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=oci:x", AdapterSpec("a", "oci:x")),
        ("a=x@0.5", AdapterSpec("a", "x", 0.5)),
        ("a=x@1", AdapterSpec("a", "x", 1.0)),
        ("org/a.b=reg:5000/x:v1@0", AdapterSpec("org/a.b", "reg:5000/x:v1", 0.0)),
        ("a=reg/x@sha256:12ab", AdapterSpec("a", "reg/x@sha256:12ab")),
        ("a=reg/x@sha256:12ab@0.25", AdapterSpec("a", "reg/x@sha256:12ab", 0.25)),
        ("a=b=c", AdapterSpec("a", "b=c")),
    ],
)
def test_an_adapter_is_a_name_a_place_and_a_strength(text: str, expected: AdapterSpec) -> None:
    """A digest is no strength."""
    assert expected == adapter_specs.parse(text)


@pytest.mark.parametrize("text", ["a", "=x", "a=", "a b=x", "-a=x", "a=x@1.5", "a=x@1.2.3"])
def test_a_word_that_is_no_adapter_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="SERVE-101"):
        adapter_specs.parse(text)


def test_names_that_cannot_be_told_apart_are_refused_together() -> None:
    """Two adapters of one name, one that is called as the base, one as all together."""
    names = (("a", "x"), ("a", "y"), ("base", "z"), ("tuned", "z"))
    specs = [AdapterSpec(name, source) for name, source in names]

    with pytest.raises(UsageError) as caught:
        adapter_specs.check(specs, base="base", combined="tuned")

    assert ["a", "base", "tuned"] == [p.what.split()[2] for p in caught.value.problems]
    alone = [AdapterSpec("tuned", "x")]  # the combined model is the same one
    adapter_specs.check(alone, base="base", combined="tuned")


def test_the_command_line_becomes_options() -> None:
    """A folder is called as its last part, never as its path; a wrong precision is named."""
    found = options.options(
        str(TINY), adapters=["a=x@0.5"], base_name=None, precision="4bit", weights=lambda: TINY
    )

    assert ("tiny-model", (AdapterSpec("a", "x", 0.5),)) == (found.base, found.adapters)
    with pytest.raises(UsageError, match="SERVE-106 --precision"):
        options.options("x", adapters=[], base_name=None, precision="8bit", weights=lambda: TINY)


CONFIGS = {
    entry["name"]: entry["config"]
    for path in Path("configs/presets").glob("*.yaml")
    for entry in load.table(path)
}


def hold(name: str, gib: float, *, bf16: bool = True, **asked: Any) -> inference.Holding:
    """How a card of so many free GiB holds a preset."""
    card = device.Device("cuda", "card", 1, int(gib * GIB), bf16)
    return inference.hold(TINY, CONFIGS[name], card, **asked)


@pytest.mark.parametrize(
    ("gib", "bits", "least"),
    [(8, 4, 4096), (16, 4, 4096), (24, 16, 16_000), (80, 16, 131_072)],
)
def test_weights_are_held_in_the_most_bits_that_leave_room(
    gib: float, bits: int, least: int
) -> None:
    """An 8-billion model on cards from 8 to 80 GiB."""
    found = hold("llama-3.1-8b-instruct", gib)

    assert (bits == 4) == (found.quantisation is not None)
    assert least <= found.context <= found.room.cache_tokens


def test_what_memory_cannot_hold_is_refused_with_the_arithmetic() -> None:
    """Every way that was tried is named; experts are packed in 4 bits as well."""
    with pytest.raises(SpecError, match=r"SERVE-110 .*16 bits needs .*4 bits needs"):
        hold("llama-3.1-8b-instruct", 4)
    assert hold("gpt-oss-20b", 24).quantisation is not None
    with pytest.raises(SpecError, match=r"SERVE-110 .*4 bits needs"):
        hold("gpt-oss-120b", 24)
    with pytest.raises(SpecError, match="SERVE-110"):
        hold("llama-3.1-8b-instruct", 16, context=131_072)


@pytest.mark.parametrize("precision", ["auto", "4bit", "bfloat16"])
def test_what_is_published_in_4_bits_is_held_so(precision: inference.Precision) -> None:
    """On a card with room for 16 bits as well: nothing better can be made of it."""
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = CONFIGS["llama-3.1-8b-instruct"] | {"quantization_config": said}
    card = device.Device("cuda", "card", 1, 80 * GIB, True)

    found = inference.hold(TINY, config, card, precision=precision)

    assert found.quantisation is not None and found.weights < 7 * GIB
    assert "as published" in found.reason


def test_fp8_is_held_in_16_bits() -> None:
    """Which it is unpacked to; a card with room for the file alone gets 4 bits."""
    assert hold("ministral-3-8b-instruct", 80).weights > 15 * GIB
    assert hold("ministral-3-8b-instruct", 14).quantisation is not None


def test_a_card_without_bfloat16_computes_in_float16() -> None:
    assert "float16" == hold("phi-3-mini-4k-instruct", 16, bf16=False).precision


def test_the_weights_counted_are_those_of_the_model(tmp_path: Path) -> None:
    """The bundled model: its file, less the header, in twice the width."""
    here = replace(device.cpu(), memory_bytes=8 * GIB)
    found = inference.hold(TINY, files.read_json(TINY / "config.json"), here)

    assert "float32" == found.precision
    held = sum(tensor.numel() for tensor in load_file(TINY / "model.safetensors").values())
    assert 4 * held == pytest.approx(found.weights, rel=0.01)


def test_a_shape_nobody_has_read_is_held_by_the_size_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    config = {"model_type": "new", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100}

    found = inference.hold(tmp_path, config, replace(device.cpu(), memory_bytes=8 * GIB))

    assert (1000 // 2 * 4, 2048) == (found.weights, found.context)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_models.build_tokenizer("chatml")


TEXTS = ["one two three.", "naïve café – 東京 🙂🙃", "a\n\n b  c", "🙂" * 5, ""]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_in_whole_characters_and_completely(text: str, tokenizer: Any) -> None:
    """The pieces together are what the tokenizer makes of all tokens; none ends in a half."""
    ids = tokenizer(text)["input_ids"]
    detokenizer = Detokenizer(tokenizer.decode)

    pieces = [*map(detokenizer.add, ids), detokenizer.end()]

    assert tokenizer.decode(ids) == "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_ends_is_shown_broken(tokenizer: Any) -> None:
    """Half of a character at the end of an answer is not held back for ever."""
    ids = tokenizer("🙂")["input_ids"][:2]
    detokenizer = Detokenizer(tokenizer.decode)

    assert "\ufffd" in "".join([*map(detokenizer.add, ids), detokenizer.end()])


def test_nothing_of_a_stop_string_is_ever_written() -> None:
    """Whatever the pieces are, the text ends before the first stop string, and early enough."""
    rng, alphabet = random.Random(5), "ab "
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(30))
        stops = ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 4))) for _ in range(2)]
        detokenizer, said = Detokenizer(lambda ids: "".join(map(chr, ids)), stops), ""
        for letter in text:
            said += detokenizer.add(ord(letter))
            assert not any(stop in said for stop in stops)
            if detokenizer.stopped:
                break
        said += detokenizer.end()
        ends = sorted((text.find(stop) + len(stop), text.find(stop)) for stop in stops)
        complete = [(end, start) for end, start in ends if start >= 0]
        assert text[: complete[0][1]] == said if complete else text == said


def draw(settings: Sampling, logits: torch.Tensor, times: int = 400) -> Counter[int]:
    sampler = Sampler(settings, [0], frozenset({1}))
    return Counter(sampler.sample(logits, int(logits.argmax())) for _ in range(times))


LOGITS = torch.tensor([0.0, 3.0, 2.0, 1.0, -20.0])


def test_without_a_temperature_the_likeliest_is_chosen() -> None:
    assert {1} == set(draw(Sampling(), LOGITS, 3))


def test_sampling_is_what_was_asked_for() -> None:
    """Only the tokens that top-k, top-p and min-p leave, about as often as they are likely."""
    assert {1, 2} == set(draw(Sampling(temperature=1, top_k=2, seed=1), LOGITS))
    assert {1, 2} == set(draw(Sampling(temperature=1, top_p=0.7, seed=1), LOGITS))
    assert {1, 2, 3} == set(draw(Sampling(temperature=1, min_p=0.1, seed=1), LOGITS))
    shares = draw(Sampling(temperature=1, seed=1), LOGITS, 2000)
    assert shares[1] / 2000 == pytest.approx(float(LOGITS.softmax(-1)[1]), abs=0.04)


def test_a_seed_gives_the_same_tokens_again() -> None:
    settings = Sampling(temperature=1.5, seed=11)

    first, second = (
        [sampler.sample(LOGITS, 1) for _ in range(30)]
        for sampler in (Sampler(settings, [0], frozenset()), Sampler(settings, [0], frozenset()))
    )

    assert first == second


def test_penalties_and_a_least_length_change_the_likeliest() -> None:
    """A token that was there is put back; an end comes not before its time."""
    sampler = Sampler(Sampling(frequency_penalty=1.5), [0], frozenset())
    assert [1, 2, 1] == [sampler.sample(LOGITS, 1) for _ in range(3)]
    sampler = Sampler(Sampling(repetition_penalty=4.0), [1], frozenset())
    assert 2 == sampler.sample(LOGITS, 1)
    sampler = Sampler(Sampling(min_tokens=2), [0], frozenset({1}))
    assert [2, 2, 1] == [sampler.sample(LOGITS, 1) for _ in range(3)]


def test_probabilities_are_the_models_own() -> None:
    """Those of the token and of the likeliest, whatever was asked of sampling."""
    choice = sampling.with_logprobs(LOGITS, 2, 2)

    assert float(LOGITS.log_softmax(-1)[2]) == choice.logprob
    assert [1, 2] == [token for token, _ in choice.top]
    assert sampling.SampledToken(2, None, ()) == sampling.with_logprobs(LOGITS, 2, None)


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    with contextlib.closing(Renderer()) as running:
        yield running


PLAIN: Any = {"add_generation_prompt": True, "special_tokens": {}}
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 10000000000 }}", "too much memory"),
        ("{{ 10 ** (10 ** 10) }}", "too"),
        ("{{ 'x' | center(1000000000) }}", "too much memory"),
        ("{{ 'a' | indent(1000000000) }}", "too much memory"),
        ("{{ 'a'.ljust(1000000000) }}", "too much memory"),
        ("{{ '%999999999d' % 1 }}", "too much memory"),
        (DOUBLING, "too much memory"),
        ("{% for i in range(99999) %}" + "x" * 90_000 + "{% endfor %}", "too"),
        (LOOPS, "too long"),
        ("{{ 1 // 0 }}", "does not take a question"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ ''.__class__.__mro__ }}", "does not take a question"),
        ("{% for", "is wrong"),
        ("x" * 200_000, "200,000 characters"),
    ],
)
def test_an_untrusted_template_that_takes_too_much_is_refused(
    renderer: Renderer, template: str, reason: str
) -> None:
    """It runs in a subprocess with limits of time and memory."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    assert reason in (template_problem(template, renderer, {}) or "")

    assert time.monotonic() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    assert "hi" == renderer("hi", [{"role": "user", "content": ""}], **PLAIN)


@pytest.mark.parametrize(
    "path", sorted(Path("tests/fixtures/templates").glob("*")), ids=lambda p: p.name
)
def test_the_templates_of_real_models_are_trusted(renderer: Renderer, path: Path) -> None:
    words = {"bos_token": "<s>", "eos_token": "</s>"}
    assert template_problem(path.read_text(), renderer, words) is None


def test_a_template_that_wants_a_system_turn_is_trusted(renderer: Renderer) -> None:
    template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
        "{% for m in messages %}{{ m.content * 2 }}{% endfor %}"
    )
    assert template_problem(template, renderer, {}) is None
    with pytest.raises(NotRendered, match="system first"):
        renderer(
            template,
            [{"role": "user", "content": "x"}],
            **PLAIN,
        )


def test_a_process_that_ended_meanwhile_is_started_again(renderer: Renderer) -> None:
    """By the system, for memory, while nobody asked: no request is to blame."""
    turns = [{"role": "user", "content": "hi"}]
    renderer("{{ messages[0].content }}", turns, **PLAIN)
    assert renderer._process
    renderer._process.kill()
    renderer._process.wait()

    assert "hi" == renderer("{{ messages[0].content }}", turns, **PLAIN)


def test_a_template_that_is_late_again_and_again_is_not_asked_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Others are answered at once meanwhile."""
    monkeypatch.setattr(rendering, "RENDER_SECONDS", 0.5)
    turns = [{"role": "user", "content": "hi"}]
    with contextlib.closing(Renderer()) as apart:
        for _ in range(rendering.MAX_LATE):
            with pytest.raises(rendering.TooCostly):
                apart(LOOPS, turns, **PLAIN)
        start = time.monotonic()
        with pytest.raises(rendering.TooCostly):
            apart(LOOPS, turns, **PLAIN)
        assert time.monotonic() - start < 0.4
        monkeypatch.setattr(rendering, "RENDER_SECONDS", 5.0)
        assert "hi" == apart("hi", turns, **PLAIN)


def test_a_text_from_apart_is_the_tokenizers_own(renderer: Renderer, tokenizer: Any) -> None:
    turns = [{"role": "user", "content": 'ä "😀" <|x|>'}, {"role": "assistant", "content": "4"}]
    for ask in (True, False):
        own = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
        assert own == renderer(
            tokenizer.chat_template,
            turns,
            add_generation_prompt=ask,
            special_tokens=tokenizer.special_tokens_map,
        )


@pytest.mark.parametrize("style", ["chatml", "phi3", "gemma3"])
def test_tokens_are_told_by_their_bytes(style: str) -> None:
    """Of bytes and of pieces: joined they are the text, half characters and spaces too."""
    tokenizer = chats.tokenizer(style)
    spelled = vocabulary_decoder(tokenizer)
    text = "Two plus two 😀 ä\n  four"

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    words = [spelled(word) for word in tokenizer.convert_ids_to_tokens(ids)]

    assert text == b"".join(words).decode().removeprefix(" ")
    assert any(len(word) == 1 and word[0] > 127 for word in words)  # a part of a character


def test_half_characters_are_told_as_openai_tells_them() -> None:
    """By their bytes, which joined are the character; offsets count whole ones."""
    words = [b"\xf0\x9f", b"\x98\x80", b" a"]
    chosen = [sampling.SampledToken(i, -1.0, ((i, -1.0), (0, -2.0))) for i in range(3)]

    chat = responses.chat_logprobs(chosen, words.__getitem__)
    plain = responses.completion_logprobs(chosen, words.__getitem__)

    assert chat and plain
    names = ["bytes:\\xf0\\x9f", "bytes:\\x98\\x80", " a"]
    assert names == [one["token"] for one in chat["content"]] == plain["tokens"]
    assert "😀 a" == b"".join(bytes(one["bytes"]) for one in chat["content"]).decode()
    assert [0, 0, 1] == plain["text_offset"]
    words[1] = b"!"  # the character never ends
    broken = responses.completion_logprobs(chosen, words.__getitem__)
    assert broken and [0, 0, 2] == broken["text_offset"]
    assert [1, 2, 2] == [len(one) for one in plain["top_logprobs"]]


def test_the_base_models_own_template_is_bounded_too(
    monkeypatch: pytest.MonkeyPatch, renderer: Renderer
) -> None:
    """A loop without an end is refused in time, and the server renders on."""
    looping = chats.tokenizer("chatml")
    looping.chat_template = LOOPS
    ended = SimpleNamespace(generation_config=transformers.GenerationConfig(eos_token_id=0))
    monkeypatch.setattr(rendering, "RENDER_SECONDS", 0.5)
    chat = ChatTokenizer(looping, ended, renderer)

    with pytest.raises(rendering.TooCostly, match="too long"):
        chat.render([{"role": "user", "content": "hi"}])

    assert "hi" == renderer("hi", [], **PLAIN)


def test_each_request_attends_to_itself() -> None:
    """Pieces of prompts by themselves; single tokens together, as long as their keys are few."""
    queries = [0, 1, 2, 34, 35, 36, 37, 41]
    keys = [0, 100, 200, 300, 400, 500, 600, 700]

    def shown(together: int) -> list[tuple[int, ...]]:
        found = attention.blocks(queries, keys, together)
        return [(q.start, q.stop, k.start, k.stop) for q, k in found]

    assert [
        (0, 2, 0, 200),
        (2, 34, 200, 300),
        (34, 36, 300, 500),
        (36, 37, 500, 600),
        (37, 41, 600, 700),
    ] == shown(200)
    assert 7 == len(shown(0))


def test_keys_are_read_one_a_line_and_short_ones_are_refused(tmp_path: Path) -> None:
    """An old and a new key hold side by side."""
    path = tmp_path / "key"
    path.write_text(f"{'a' * 32}\n\n  {'b' * 32}  \n")
    assert (b"a" * 32, b"b" * 32) == options.read_keys(path)
    for text in ("", "short\n"):
        path.write_text(text)
        with pytest.raises(SpecError, match="SERVE-103"):
            options.read_keys(path)
    with pytest.raises(SpecError, match="SERVE-103"):
        options.read_keys(tmp_path / "none")


def test_a_server_refuses_a_gpu_that_torch_cannot_use_before_it_loads_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build of torch for CUDA 13 has no kernels for a V100: one line, and what to install."""
    fake_driver.install(gpu_machines.MACHINES["v100"][0], tmp_path, monkeypatch)
    build = torch_build.TorchBuild("2.13.0+cu130", (13, 0))
    monkeypatch.setattr(torch_build, "installed", lambda: build)
    options = SimpleNamespace(weights=lambda: TINY)

    with pytest.raises(SpecError, match=r"PLAN-116 V100-SXM2-16GB: .*TORCH_INDEX=cu126"):
        server._make(options, Console())  # type: ignore[arg-type]
