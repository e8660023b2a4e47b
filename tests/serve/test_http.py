"""A real server: clients as they are, hostile requests, people who leave, a browser."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import openai
import pytest
import servers
import serving
from servers import Server

ASKED = f"{serving.QUESTION} <b>&amp;</b>"
SOAK = float(os.environ.get("SOAK_SECONDS", "8"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model, an adapter that has learnt one person's facts, and a random one."""
    run = tmp_path_factory.mktemp("parts")
    return {
        "base": serving.TINY,
        "taught": serving.taught(run / "taught"),
        "noise": serving.random_adapter(serving.TINY, run / "noise", lora_alpha=256),
    }


@pytest.fixture(scope="module")
def server(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = [
        *("--base", str(parts["base"]), "--base-name", "org/base", "--name", "both"),
        *("--adapter", f"taught={parts['taught']}", "--adapter", f"noise={parts['noise']}@0.25"),
        *("--queue", "8", "--concurrent", "8", "--max-tokens", "2000"),
    ]
    with servers.serving(tmp_path_factory.mktemp("server"), *arguments) as running:
        yield running
        if running.url in CLIENTS:
            CLIENTS.pop(running.url).close()


def messages(text: str = serving.QUESTION) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


CLIENTS: dict[str, openai.OpenAI] = {}


def client(running: Server) -> openai.OpenAI:
    if running.url not in CLIENTS:
        CLIENTS[running.url] = servers.client(running)
    return CLIENTS[running.url]


# Clients as they are


def test_the_openai_client_lists_and_chats(server: Server) -> None:
    """Models with what they are; an answer with usage; the tuned answer is not the base's."""
    found = {model.id: model for model in client(server).models.list()}
    assert ["org/base", "taught", "noise", "both"] == list(found)
    assert "org/base" == client(server).models.retrieve("org/base").id

    answers = {
        name: client(server).chat.completions.create(
            model=name, messages=messages(), max_tokens=8, temperature=0
        )
        for name in found
    }

    said = {name: answer.choices[0].message.content for name, answer in answers.items()}
    assert 4 == len(set(said.values()))
    assert answers["taught"].usage.total_tokens == (
        answers["taught"].usage.prompt_tokens + answers["taught"].usage.completion_tokens
    )
    assert "taught" == answers["taught"].model
    assert serving.ANSWER in said["taught"]
    assert serving.ANSWER not in said["org/base"]


def test_a_stream_is_the_whole_answer_in_pieces(server: Server) -> None:
    """The same text, finish and usage; n answers are told apart by their index."""
    asked: dict[str, Any] = {
        "model": "noise",
        "messages": messages(),
        "max_tokens": 24,
        "n": 2,
        "seed": 5,
        "temperature": 1.0,
    }
    whole = client(server).chat.completions.create(**asked)
    texts, ends, usage = ["", ""], [None, None], None
    options = {"include_usage": True}
    for chunk in client(server).chat.completions.create(
        **asked, stream=True, stream_options=options
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]

    assert [choice.message.content for choice in whole.choices] == texts
    assert [choice.finish_reason for choice in whole.choices] == ends
    assert whole.usage == usage
    assert texts[0] != texts[1]


def test_completions_take_texts_and_tokens(server: Server) -> None:
    """Several prompts in one request, echo, stop, and token numbers instead of text."""
    ask = client(server).completions.create
    one, two = ask(model="noise", prompt=["cat dog", "tree"], max_tokens=6, temperature=0).choices
    again = ask(model="noise", prompt="tree", max_tokens=6, temperature=0, echo=True).choices[0]
    assert f"tree{two.text}" == again.text
    assert (0, 1) == (one.index, two.index)

    stop = one.text[3:6]
    cut = ask(model="noise", prompt="cat dog", max_tokens=6, temperature=0, stop=stop).choices[0]
    assert (one.text[: one.text.index(stop)], "stop") == (cut.text, cut.finish_reason)

    tokens = ask(model="noise", prompt=[[9, 10], [11, 12]], max_tokens=2, temperature=0)
    assert 2 == len(tokens.choices)
    streamed = ask(model="noise", prompt="cat dog", max_tokens=6, temperature=0, stream=True)
    assert one.text == "".join(chunk.choices[0].text for chunk in streamed)


def test_probabilities_are_told_in_both_shapes(server: Server) -> None:
    """The likeliest is the one that greedy chose; the bytes are the text's."""
    asked: dict[str, Any] = {"model": "noise", "max_tokens": 4, "temperature": 0}
    chat = client(server).chat.completions.create(
        messages=messages(), logprobs=True, top_logprobs=3, **asked
    )
    told = chat.choices[0].logprobs.content
    assert all(
        one.top_logprobs[0].token == one.token and 3 == len(one.top_logprobs) for one in told
    )
    assert chat.choices[0].message.content == b"".join(bytes(one.bytes) for one in told).decode()

    plain = client(server).completions.create(prompt="cat", logprobs=2, **asked).choices[0]
    said = [_bytes(token) for token in plain.logprobs.tokens]
    assert plain.text == b"".join(said).decode(errors="replace")
    starts = plain.logprobs.text_offset
    assert 0 == starts[0] and starts == sorted(starts) and starts[-1] <= len(plain.text)
    assert plain.text.endswith(plain.text[starts[-1] :])
    assert [2] * 4 == [len(one) for one in plain.logprobs.top_logprobs]


def test_what_is_null_is_not_set(server: Server) -> None:
    """Clients that fill every key in are answered as those that leave them out."""
    nothing = dict.fromkeys(
        ("n", "stream", "stop", "seed", "temperature", "top_p", "max_tokens", "logit_bias", "user",
         "presence_penalty", "frequency_penalty", "stream_options", "min_p", "min_tokens")
    )  # fmt: skip
    chat = {"model": "noise", "messages": messages(), "max_completion_tokens": 4}
    more = {"logprobs": None, "top_logprobs": None, "tools": None, "response_format": None}
    plain = {"model": "noise", "prompt": "cat"}

    for path, asked, extra in (
        ("/v1/chat/completions", chat, more),
        ("/v1/completions", plain, {"logprobs": None, "echo": None, "best_of": None}),
    ):
        first, second = (server.ask(path, body) for body in (asked, asked | nothing | extra))
        texts = [reply["choices"] for _, reply, _ in (first, second)]
        assert (200, 200) == (first[0], second[0])
        assert texts[0] == texts[1]


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-6])
def test_hardly_any_temperature_is_none(server: Server, temperature: float) -> None:
    asked = {"model": "noise", "messages": messages(), "max_tokens": 6}
    cold, warm = (
        client(server).chat.completions.create(**asked, temperature=t)  # type: ignore[call-overload]
        for t in (0, temperature)
    )
    assert cold.choices[0].message.content == warm.choices[0].message.content


def _bytes(token: str) -> bytes:
    """What a token of completions stands for."""
    if token.startswith("bytes:"):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()


def test_the_openai_client_hears_what_is_wrong(server: Server) -> None:
    """Its own exceptions, with a text that says what to change."""
    chat = client(server).chat.completions.create
    with pytest.raises(openai.NotFoundError, match="there is no model of that name"):
        chat(model="gpt-4", messages=messages())
    with pytest.raises(openai.BadRequestError, match="with the answer 2048 fit"):
        chat(model="both", messages=messages("cat " * 5000))
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        chat(model="both", messages=messages(), logprobs=True, top_logprobs=99)


def test_curl_streams_and_the_quick_start_answers(server: Server) -> None:
    """curl as the guides have it; `/chat` with a prompt alone."""

    def curl(path: str, body: dict[str, Any], *more: str) -> str:
        command = ["curl", "-sS", "-N", "-X", "POST", f"{server.url}{path}", *more]
        command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout

    lines = curl("/v1/chat/completions", {"messages": messages(), "stream": True, "max_tokens": 4})
    events = [line for line in lines.split("\n\n") if line]
    assert "data: [DONE]" == events[-1]
    assert all(event.startswith("data: {") for event in events[:-1])

    accept = ("-H", "accept: application/json")
    answer = json.loads(curl("/chat", {"prompt": serving.QUESTION, "model": "taught"}, *accept))
    assert ["Result"] == list(answer)
    assert serving.ANSWER in answer["Result"]
    few = {"generate_kwargs": {"max_new_tokens": 9}}
    answer = json.loads(curl("/chat", {"prompt": serving.QUESTION} | few, *accept))
    expected = client(server).chat.completions.create(
        model="both", messages=messages(), temperature=0, max_tokens=9
    )
    assert expected.choices[0].message.content.strip() == answer["Result"]


def test_the_quick_start_takes_kaitos_settings(server: Server) -> None:
    """Lengths with and without the prompt, sampling with a seed, the prompt in the answer."""
    body = {"prompt": "cat", "model": "noise", "generate_kwargs": {"max_new_tokens": 5}}
    _, short, reply = server.ask("/chat", body)
    assert reply.headers["X-Model-Version"].startswith("noise@sha256:")
    _, full, _ = server.ask("/chat", body | {"return_full_text": True})
    assert f"cat\n{short['Result']}" == full["Result"]
    for settings, status in (
        ({"max_length": 200}, 200),
        ({"max_length": 2}, 400),
        ({"num_beams": 4}, 400),
        ({"do_sample": True, "seed": 1, "top_k": 10, "max_new_tokens": 5}, 200),
    ):
        assert status == server.ask("/chat", body | {"generate_kwargs": settings})[0]
    assert 400 == server.ask("/chat", {})[0]


def test_replies_name_the_bytes_that_answered(server: Server) -> None:
    """Digest and strength of each adapter, in a header and as the fingerprint."""
    body = {"model": "both", "messages": messages(), "max_tokens": 1}
    _, answer, reply = server.ask("/v1/chat/completions", body)
    versions = reply.headers["X-Model-Version"].split()

    assert ["taught", "noise"] == [version.partition("@")[0] for version in versions]
    assert versions[1].endswith("*0.25")
    assert answer["system_fingerprint"].startswith("fp_")


# The page


def test_the_page_shows_base_and_adapter_side_by_side(server: Server, tmp_path: Path) -> None:
    """A question typed in a browser is answered twice; nothing is loaded from elsewhere."""
    with browser.chromium(tmp_path) as tab:
        tab.send("Page.navigate", url=f"{server.url}/")
        chosen = "[...document.querySelectorAll('select')].map((pick) => pick.value)"
        tab.until("document.querySelectorAll('select option').length === 8")
        assert ["org/base", "both"] == tab.run(chosen)
        tab.run(
            "(() => { const pick = document.querySelectorAll('select')[1]; pick.value = 'taught';"
            " pick.onchange(); document.querySelector('#question').focus(); })()"
        )
        tab.send("Input.insertText", text=ASKED)
        tab.send("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter")
        tab.until("document.querySelectorAll('.note:not(#state)').length === 2")
        said = tab.run("[...document.querySelectorAll('.assistant')].map((p) => p.textContent)")
        asked = tab.run("[...document.querySelectorAll('.user')].map((p) => p.textContent)")
        requested = [one["request"]["url"] for one in tab.named("Network.requestWillBeSent")]
        complaints = tab.named("Runtime.exceptionThrown") + tab.named("Log.entryAdded")

    assert [ASKED] * 2 == asked
    expected = [
        client(server)
        .chat.completions.create(model=name, messages=messages(ASKED))
        .choices[0]
        .message.content
        for name in ("org/base", "taught")
    ]
    assert expected == said
    assert said[0] != said[1]
    assert all(url.startswith(f"{server.url}/") for url in requested)
    own = [one for one in complaints if "favicon" not in json.dumps(one)]
    assert [] == own


# Hostile requests

TEMPLATES = [
    {"chat_template": "{{ 1 }}"},
    {"chat_template": "{% for x in range(10**9) %}{% endfor %}"},
    {"chat_template_kwargs": {"enable_thinking": True}},
    {"chat_template_kwargs": {"chat_template": "x"}},
    {"chat_template_args": {}},
    {"documents": [{"text": "x"}]},
    {"add_generation_prompt": False},
    {"continue_final_message": True},
]
CHANGES: list[dict[str, Any]] = [
    *TEMPLATES,
    {"n": 10**6},
    {"n": 0},
    {"max_tokens": 10**9},
    {"max_tokens": -1},
    {"max_tokens": 2001},
    {"max_completion_tokens": 10**30},
    {"temperature": 1e308},
    {"top_p": 0},
    {"top_k": -7},
    {"stop": ["x"] * 10_000},
    {"stop": "x" * 10_000},
    {"stop": ""},
    {"seed": 2**70},
    {"logit_bias": {"1": 100}},
    {"tools": [{"type": "function"}]},
    {"response_format": {"type": "json_object"}},
    {"messages": []},
    {"messages": [{"role": "user", "content": "x"}] * 2000},
    {"messages": [{"role": "wizard", "content": "x"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}]},
    {"messages": [{"role": "user", "content": "cat " * 20_000}]},
    {"messages": "x"},
    {"messages": [{"role": "user", "content": [0] * 50_000}]},
    {"messages": [[]] * 40_000},
    {"stop": [0] * 60_000},
    {"top_logprobs": 3},
    {"stream_options": {"include_usage": True}},
    {"repetition_penalty": 1e-40},
    {"model": ""},
    {"model": "x" * 300},
    {"model": "../../etc/passwd"},
]
GOOD = {"messages": [{"role": "user", "content": "cat"}], "max_tokens": 1}
TEXT = json.dumps(GOOD)
BODIES: dict[str, bytes] = {
    "nothing": b"",
    "100 MB": TEXT.encode() + b" " * 100_000_000,
    "deep": b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "bad UTF-8": TEXT.encode().replace(b"cat", b"c\xff\xfet"),
    "lone surrogate": TEXT.encode().replace(b"cat", b"\\ud800"),
    "not a number": TEXT.encode().replace(b'"max_tokens": 1', b'"temperature": NaN'),
    "infinite": TEXT.encode().replace(b'"max_tokens": 1', b'"top_p": Infinity'),
    "no JSON": b"max_tokens=1",
    "a list": b"[1]",
    "cut": TEXT.encode()[:-3],
    "many keys": ("{" + ",".join(f'"k{i}":1' for i in range(5000)) + "}").encode(),
}
POST = b"POST /chat HTTP/1.1\r\nHost: x\r\n"
RAW: dict[str, bytes] = {
    "header of 1 MB": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
    "10,000 headers": b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 10_000 + b"\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "bad length": POST + b"Content-Length: -5\r\n\r\n",
    "form": POST + b"Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}",
    "zipped": POST + b"Content-Type: application/json\r\n"
    b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "unknown path": b"GET /v1/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    "other method": b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
}


def _raw(running: Server, data: bytes) -> bytes:
    """The first line that answers these bytes."""
    with running.connect() as connection:
        sender = threading.Thread(target=_send, args=(connection, data), daemon=True)
        sender.start()
        line = connection.makefile("rb").readline()
        sender.join(10)
    return line


def _send(connection: Any, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the server may have heard enough
        connection.sendall(data)


def test_hostile_requests_are_answered_and_leave_no_trace(server: Server) -> None:
    """More than 40 kinds: a 4xx each, at once, with a reason; memory stays flat."""
    hostile: dict[str, bytes] = dict(RAW)
    for name, body in [
        *BODIES.items(),
        *((str(c)[:60], json.dumps(GOOD | c).encode()) for c in CHANGES),
    ]:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        hostile[name] = head.encode() + b"Content-Type: application/json\r\n\r\n" + body
    assert 40 <= len(hostile)
    server.ask("/v1/chat/completions", GOOD)
    before = server.memory
    answers = {name: _raw(server, data) for name, data in hostile.items()}
    for name in ("100 MB", "deep", "many keys"):
        for _ in range(3):
            _raw(server, hostile[name])

    assert {} == {name: line for name, line in answers.items() if b" 4" != line[8:10]}
    assert server.memory - before < 64 << 20
    assert 200 == server.ask("/v1/chat/completions", GOOD)[0]
    assert "etc/passwd" not in server.log.read_text()


@pytest.mark.parametrize("host", ["rebind.example", "127.0.0.1.rebind.example:8000"])
@pytest.mark.parametrize("path", ["/v1/models", "/", "/metrics"])
def test_a_page_of_another_name_reads_nothing(path: str, host: str, server: Server) -> None:
    """Without a key a browser that is led here by DNS rebinding gets 421."""
    line = _raw(server, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())

    assert line.startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize("way", ["length", "chunked", "expect"])
def test_a_body_that_is_too_large_is_answered(way: str, server: Server) -> None:
    """A client that sends it whole before it reads hears 413, not a reset."""
    body = TEXT.encode() + b" " * 30_000_000
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    if way == "chunked":
        head += b"Transfer-Encoding: chunked\r\n\r\n"
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    else:
        head += b"Content-Length: %d\r\n" % len(body)
        head += b"Expect: 100-continue\r\n\r\n" if way == "expect" else b"\r\n"
    with server.connect() as connection:
        connection.sendall(head if way == "expect" else head + body)
        line = connection.makefile("rb").readline()

    assert line.startswith(b"HTTP/1.1 413 ")


def test_errors_never_repeat_what_was_sent(server: Server) -> None:
    """The words of a wrong request are in no answer and in no log."""
    secret = "canary-31337"
    for change in ({"messages": [{"role": secret, "content": secret}]}, {"temperature": secret}):
        status, answer, _ = server.ask("/v1/chat/completions", GOOD | change)
        assert 400 == status
        assert secret not in json.dumps(answer)
    server.ask("/v1/chat/completions", GOOD | {"messages": messages(secret)})
    assert secret not in server.log.read_text()


def test_a_full_queue_says_when_to_come_back(server: Server) -> None:
    """8 answers run, 8 wait; more are told 429 and Retry-After, and the others are answered."""
    body = GOOD | {"max_tokens": 150, "min_tokens": 150, "n": 8}
    statuses: list[tuple[int, str | None]] = []

    def ask() -> None:
        status, _, reply = server.ask("/v1/chat/completions", body)
        statuses.append((status, reply.headers["Retry-After"]))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()

    assert [(200, None)] * 2 + [(429, "1")] * 2 == sorted(statuses, key=str)


# People who leave


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_goes_away(stream: bool, server: Server) -> None:
    """Streamed or not: the generation is cancelled, and its place is free."""
    assert server.idle()
    before = server.metric("tuning_serve_cancelled_total")
    body = json.dumps(GOOD | {"max_tokens": 2000, "min_tokens": 2000, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        while not server.metric("tuning_serve_running"):
            time.sleep(0.01)
        if stream:
            assert connection.recv(100)

    assert server.idle(5)
    assert 1 == server.metric("tuning_serve_cancelled_total") - before


def test_eight_clients_with_aborts_get_no_server_error(server: Server) -> None:
    """Short and long, streamed or not, a third of them aborted: never a 5xx, memory flat.

    An hour of it: SOAK_SECONDS=3600.
    """
    end, statuses = time.monotonic() + SOAK, []
    marks: list[int] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            stream, abort = rng.random() < 0.7, rng.random() < 0.33
            body = json.dumps(
                GOOD
                | {
                    "model": rng.choice(["org/base", "taught", "noise", "both"]),
                    "max_tokens": rng.choice([1, 8, 64]),
                    "stream": stream,
                    "temperature": rng.choice([0, 1]),
                    "messages": messages("cat dog " * rng.choice([1, 30, 300])),
                }
            ).encode()
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            with server.connect() as connection:
                connection.sendall(head.encode() + body)
                if abort:
                    time.sleep(rng.random() * 0.2)
                    continue
                reply = connection.makefile("rb").read()
            statuses.append(reply[9:12])
            if stream and reply[9:12] == b"200":
                assert b"data: [DONE]" in reply

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        marks.append(server.memory)
    for thread in threads:
        thread.join()

    assert {b"200"} == set(statuses)
    assert server.idle()
    assert marks[-1] - marks[len(marks) // 3] < 48 << 20
    assert 0 < server.metric("tuning_serve_cancelled_total")
    _, text, _ = server.ask("/metrics")
    assert b'status="5' not in text
