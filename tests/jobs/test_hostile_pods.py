"""What a tenant's pod answers slows nobody else, and raises nothing."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hostile_pods import GOOD, HOSTILE, document, pod, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from kubernetes import client as official

from jobs.api import nesting
from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import WORKSPACE, Object
from jobs.observed import objects, poll, status
from jobs.observed.observe import _job_pods
from jobs.observed.poll import Poll
from jobs.observed.readiness import refused_adapters

MARGIN = 0.6  # seconds, for a busy machine
HEAD = ("a byte at a time", "a status line, then a header at a time", "endless headers")
HEAD = (*HEAD, "a header without end", "endless informational answers")  # the API server's to bound


def read(found: dict[str, Any] | None) -> None:
    """All that the operator does with a document."""
    if found is None:
        return
    refused_adapters(found, {})
    observed: Any = type("Observed", (), {"pods": (), "progress": found})
    json.dumps(status._progress(observed, None)).encode()


def timed(kind: str) -> tuple[str, float, object]:
    """The kind, how long one poll took, and what it raised or returned."""
    with serving(HOSTILE[kind]) as port:
        asked, start = Poll(port=port), time.monotonic()
        try:
            found = asked(pod())
            read(found)
        except Exception as error:
            return kind, 0.0, error
        return kind, time.monotonic() - start, found


def test_every_hostile_answer_ends_at_the_deadline_and_raises_nothing() -> None:
    """Slow, endless, deep, compressed, malformed: None or a harmless document, in time."""
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(timed, HOSTILE))

    assert [] == [each for each in results if isinstance(each[2], Exception)]
    assert [] == [each for each in results if each[1] > poll.DEADLINE + MARGIN]
    read_all = {kind for kind, _, found in results if found is not None}
    assert {"a list in a field", "a lone surrogate", "not a number"} <= read_all


def test_a_good_answer_is_read_in_each_form() -> None:
    """With a length, in chunks, or ended by the connection; IPv6 or not."""
    body = b'{"step": 3, "steps": 9}'
    forms = [
        GOOD,
        lambda c: c.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + body),
        lambda c: c.sendall(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n17\r\n" + body + b"\r\n0\r\n\r\n"
        ),
        lambda c: (
            c.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 23\r\n\r\n" + body),
            time.sleep(2),
        ),
    ]  # fmt: skip
    for form in forms:
        with serving(form) as port:
            assert {"step": 3, "steps": 9} == Poll(port=port)(pod())


def test_a_pod_that_fails_is_left_alone_for_a_minute() -> None:
    """No second request, whatever is reconciled meanwhile."""
    now, asked = [0.0], []

    def fetch(item: Object) -> object:
        asked.append(item)
        raise TimeoutError

    poll_pods = Poll(fetch=fetch, clock=lambda: now[0])
    for now[0] in (0.0, 1.0, 59.0):
        assert poll_pods(pod()) is None
    assert 1 == len(asked)
    now[0] = 61.0
    poll_pods(pod())
    assert 2 == len(asked)


@pytest.mark.parametrize("seconds", [0.4, 1.5])
def test_a_namespace_of_slow_pods_takes_a_tenth_of_a_worker(seconds: float) -> None:
    """A thousand of them in an hour; another namespace is polled as ever."""
    now, spent, others = [0.0], 0.0, 0

    def fetch(item: Object) -> object:
        if item["metadata"]["namespace"] == "team":
            return {"step": 1}
        now[0] += seconds
        raise TimeoutError

    poll_pods = Poll(fetch=fetch, clock=lambda: now[0])
    for number in range(36_000):
        now[0] = max(now[0], number / 10)
        before = now[0]
        poll_pods(pod(f"p{number % 1000}", "hostile"))
        spent += now[0] - before
        others += poll_pods(pod("good")) is not None
    assert 36_000 == others
    assert spent < 0.11 * 3600


def test_two_slow_exchanges_of_a_namespace_leave_the_other_workers_free() -> None:
    """Further pods of the namespace are not asked until one of them has ended."""
    go, asked = threading.Event(), []

    def fetch(item: Object) -> object:
        asked.append(item["metadata"]["name"])
        if item["metadata"]["namespace"] == "hostile":
            go.wait(10)
        return {}

    poll_pods = Poll(fetch=fetch)
    with ThreadPoolExecutor(3) as threads:
        slow = [threads.submit(poll_pods, pod(f"slow{i}", "hostile")) for i in range(2)]
        time.sleep(0.4)
        assert poll_pods(pod("third", "hostile")) is None
        assert {} == poll_pods(pod("good"))
        go.set()
        assert [{}, {}] == [each.result() for each in slow]
    assert {} == poll_pods(pod("third", "hostile"))
    assert ["slow0", "slow1", "good", "third"] == asked


def api(port: int) -> Cluster:
    """A client of an "API server" that passes a pod's response on."""
    settings = official.Configuration(host=f"http://127.0.0.1:{port}")
    settings.retries = 0
    return Cluster(official.ApiClient(settings))


def test_the_proxied_answer_of_a_pod_has_the_same_bounds() -> None:
    """Body, nesting and time, where only the API server reaches the pods."""

    def proxied(kind: str) -> tuple[str, float, str]:
        with serving(HOSTILE[kind]) as port:
            start, error = time.monotonic(), ""
            with api(port) as cluster:
                try:
                    read(Poll(fetch=lambda p: cluster.proxy_get(p, 1, "/", seconds=0.8))(pod()))
                except Exception as raised:
                    error = repr(raised)
            return kind, time.monotonic() - start, error

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(proxied, HOSTILE.keys() - set(HEAD)))

    assert [] == [each for each in results if each[2] or each[1] > 1.6 + MARGIN]
    with serving(GOOD) as port, api(port) as cluster:
        assert {"step": 3, "steps": 9} == cluster.proxy_get(pod(), 5000, "/readyz")
    with (
        serving(lambda c: c.sendall(b"HTTP/1.1 403 No\r\n\r\n{}")) as port,
        api(port) as cluster,
        pytest.raises(ApiError),
    ):
        cluster.proxy_get(pod(), 5000, "/readyz")


def test_a_client_closes_what_it_kept_open() -> None:
    """At the end of its block, not when the collector comes."""
    ended = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        connection.settimeout(20)
        if connection.recv(1) == b"":
            ended.set()

    with serving(answer) as port:
        with api(port) as cluster:
            assert {} == cluster.get(WORKSPACE, "a", "b")
            assert not ended.is_set()
        assert ended.wait(10)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet='[]{}",:\\1e9 \n\ud800a', max_size=4096), st.integers(0, 4096))
def test_no_termination_message_breaks_a_reconcile(text: str, depth: int) -> None:
    """A container may write anything of 4 kB there."""
    for message in (text, "[" * depth, '{"reason":' + "[" * depth + "]" * depth + "}"):
        state = {"terminated": {"exitCode": 10, "message": message}}
        ended = {
            "metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"},
            "status": {"containerStatuses": [{"name": "tuning", "state": state}]},
        }
        failure = objects.failure({"metadata": {}}, (ended,))
        assert failure.message and failure.message.isprintable()


DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(DOCUMENTS, st.booleans())
def test_bounding_the_nesting_changes_no_ordinary_document(value: Any, ascii_only: bool) -> None:
    """Whatever brackets, quotes and backslashes its strings hold."""
    text = json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    try:
        text.decode()
    except UnicodeDecodeError:
        return
    assert value == nesting.loads_untrusted(text)


@pytest.mark.parametrize("depth", [99, 100, 990, 1000, 5000, 9999])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_one_object_that_is_nested_too_deeply_hides_no_other(depth: int, opening: str) -> None:
    """A list of Workspaces is read with the others whole, and the deep part of that one as null."""
    closing = "]" if opening == "[" else "}"
    deep = opening * depth + "null" + closing * depth
    good = {"metadata": {"name": "good", "namespace": "team"}}
    page = f"""{{"metadata": {{"resourceVersion": "1"}}, "items": [
        {{"metadata": {{"name": "deep"}}, "tuning": {{"input": {{"volumeSource": {deep}}}}}}},
        {json.dumps(good)}]}}"""

    with serving(document(page.encode())) as port:
        first, second = api(port).find(WORKSPACE)

    assert good == second
    assert "deep" == first["metadata"]["name"]
    assert depth > 990 or json.dumps(first)


def test_only_pods_that_the_job_controls_are_asked() -> None:
    """A label, or an owner that does not control it, makes nobody's pod ours."""

    def owned(name: str, *owners: Object) -> Object:
        meta = {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z"}
        return {"metadata": meta | {"ownerReferences": list(owners)}}

    pods = [
        owned("ours", {"uid": "job", "controller": True}),
        owned("beside", {"uid": "job"}),
        owned("another's", {"uid": "other", "controller": True}, {"uid": "job"}),
        owned("nobody's"),
    ]
    cluster: Any = type("C", (), {"find": lambda *_, **__: pods})()
    job = {"metadata": {"name": "j", "namespace": "team", "uid": "job"}}

    assert ["ours"] == [each["metadata"]["name"] for each in _job_pods(cluster, job)]
