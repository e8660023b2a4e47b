"""Headers of others: any text in, a value or NotHttp out; and bodies of odd servers."""

from __future__ import annotations

import datetime
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning import safetensors
from tuning.errors import TransientError, TuningError
from tuning.network import answer, federation, retry
from tuning.network.answer import NotHttp, Range
from tuning.network.policy import Policy
from tuning.network.retry import Again, Patience
from tuning.network.session import Session, Unreachable
from tuning.oci.registry import resolve
from tuning.oci.registry.wire import Remote
from tuning.sources import fetch
from tuning.sources.http import Item, Limits, Web
from tuning.spec import Source, reference

SILLY = ("\u00b2", "9" * 5000, "-1", "+5", "1_0", "\u0663", "0x10", "", " ", "5;", "1e3", "5, 6")
# Text of a header: what servers send by mistake, with digits of all kinds.
TEXT = st.text(st.characters(max_codepoint=255), max_size=40) | st.sampled_from(SILLY)
RANGES = st.builds(
    "{} {}-{}/{}".format, st.sampled_from(("bytes", "Bytes", "rows")), TEXT, TEXT, TEXT
)
LOOPBACK = Policy(allow_hosts={"127.0.0.1"})
ONCE = Limits(connect=2, stall=0.5, retry=Patience(tries=1))


@given(length=TEXT, coding=TEXT, span=TEXT | RANGES, kind=TEXT)
def test_any_header_of_a_body_is_a_value_or_not_http(
    length: str, coding: str, span: str, kind: str
) -> None:
    headers = {
        "content-length": length,
        "transfer-encoding": coding,
        "content-range": span,
        "content-type": kind,
    }
    for parse in (
        answer.content_length,
        answer.is_chunked,
        answer.content_range,
        answer.body_range,
    ):
        try:
            value = parse(headers)
        except NotHttp as fault:
            assert str(fault).isascii()
        else:
            assert value is None or isinstance(value, int | Range)


@given(first=st.integers(0, 1 << 40), size=st.integers(1, 1 << 40), more=st.integers(0, 9))
def test_a_valid_range_is_read_as_it_is_meant(first: int, size: int, more: int) -> None:
    end = first + size
    headers = {
        "content-range": f"bytes {first}-{end - 1}/{end + more}",
        "content-length": str(size),
    }

    assert Range(first, end, end + more) == answer.body_range(headers)


@pytest.mark.parametrize("text", SILLY)
def test_a_length_of_other_digits_is_a_fault_not_no_length(text: str) -> None:
    with pytest.raises(NotHttp):
        answer.content_length({"content-length": text})


@given(text=TEXT | st.datetimes().map(str) | st.integers().map(str))
def test_any_retry_after_is_seconds_or_none(text: str) -> None:
    seconds = retry.retry_after({"retry-after": text})

    assert seconds is None or seconds >= 0


@given(modified=TEXT, date=TEXT)
def test_any_date_of_a_version_is_read(modified: str, date: str) -> None:
    assert answer.modified_long_ago({"last-modified": modified, "date": date}) in (None, modified)


def test_a_file_of_this_very_second_has_no_version_by_its_date() -> None:
    """Another one may be written in the same second, with the same Last-Modified."""
    now = "Sun, 29 Nov 2026 08:00:00 GMT"

    assert answer.modified_long_ago({"last-modified": now, "date": now}) is None
    before = "Sun, 29 Nov 2026 07:59:59 GMT"
    assert before == answer.modified_long_ago({"last-modified": before, "date": now})


@given(location=TEXT | st.sampled_from(("http://[bad", "//[", "http://h:99999999/", "http://h:x/")))
def test_any_redirect_of_a_data_host_or_registry_is_a_url_or_a_typed_error(location: str) -> None:
    web, item = Web(LOOPBACK), Item(0, "http://127.0.0.1:9/a")
    remote = Remote(reference.parse("127.0.0.1:9/team/rows:1"))
    for follow in (
        lambda: web._follow(item, item.url, location),
        lambda: remote.absolute(location),
    ):
        try:
            assert isinstance(follow(), str)
        except (TuningError, Again) as error:
            assert "127.0.0.1:9" in str(error)


@given(seconds=st.recursive(st.none() | st.floats() | st.integers() | st.text(), st.lists))
@settings(max_examples=50)
def test_any_lifetime_of_a_token_is_a_time(seconds: object) -> None:
    assert isinstance(federation.until(seconds), float)
    assert isinstance(federation.until(10**400), float)
    federation._seconds_until(seconds)


@given(
    data=st.binary(max_size=80), header=st.dictionaries(st.text(max_size=3), st.none() | st.text())
)
def test_any_bytes_are_tensors_or_a_value_error(data: bytes, header: dict[str, object]) -> None:
    for text in (data, json.dumps(header).encode()):
        try:
            assert isinstance(safetensors.parse_header(text), dict)
        except ValueError as error:
            assert str(error)


# -- real sockets -------------------------------------------------------------------------------


@contextmanager
def saying(*answers: bytes) -> Iterator[str]:
    """A server that says these bytes, one answer a connection, the last one again and again."""
    listener, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def run() -> None:
        count = 0
        while not over.is_set():
            connection, _ = listener.accept()
            with connection:
                if not over.is_set() and connection.recv(65536):
                    connection.sendall(answers[min(count, len(answers) - 1)])
                    count += 1

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    host = f"127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield host
    finally:
        over.set()
        socket.create_connection(listener.getsockname()).close()
        thread.join(5)
        listener.close()


def said(body: bytes = b"", status: int = 200, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Fine", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


BROKEN = {
    "chunks that are cut": said(b"5\r\nab", Transfer_Encoding="chunked"),
    "a last chunk that is cut": said(b"0002\r\nab\r\n000", Transfer_Encoding="chunked"),
    "chunks without ends": said(b"2\r\nabxx0\r\n\r\n", Transfer_Encoding="chunked"),
    "negative chunks": said(b"-2\r\nab\r\n0\r\n\r\n", Transfer_Encoding="chunked"),
    "a body that is cut": said(b"ab", Content_Length="5"),
    "a silly length": said(b"ab", Content_Length="\u00b2"),
    "a length of 5,000 digits": said(b"ab", Content_Length="9" * 5000),
    "two codings": said(b"2\r\nab\r\n0\r\n\r\n", Transfer_Encoding="gzip, chunked"),
    "an invalid redirect": said(status=302, Location="http://[bad", Content_Length="0"),
    "a silly time to wait": said(status=503, Retry_After="\u00b2", Content_Length="0"),
    "no HTTP": b"ab",
    "nothing": b"",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_ends_check_fetch_and_pull_with_20(tmp_path: Path, name: str) -> None:
    """`check`, the download and a registry say which host it is, and that it may pass."""
    with saying(BROKEN[name]) as host:
        source = Source(urls=(f"http://{host}/rows",))
        remote = Remote(reference.parse(f"{host}/team/rows:1"), patience=Patience(tries=1))
        for work in (
            lambda: fetch.check(source, policy=LOOPBACK, limits=ONCE),
            lambda: fetch.fetch(source, tmp_path, policy=LOOPBACK, limits=ONCE),
            lambda: resolve(remote),
        ):
            with pytest.raises((TransientError, Again)) as caught:
                remote.persist(work)

            assert host in str(caught.value)


NOT_JSON = (b"", b"\xff", b"<html>", b"[" * 100_000, b'{"a":', b"null", b"[]")


@pytest.mark.parametrize("body", NOT_JSON)
def test_a_token_service_that_answers_no_json_is_worth_another_try(body: bytes) -> None:
    sent = said(body, Content_Length=str(len(body)))
    with saying(sent) as host, pytest.raises(TransientError, match="REG-151"):
        federation.answer("Entra", Session().request, "POST", f"http://{host}/token")


def test_an_endless_answer_of_a_token_service_is_not_read_to_its_end() -> None:
    sent = said(b"x" * (answer.LARGEST_DOCUMENT + 9))
    with saying(sent) as host, pytest.raises(Unreachable, match="more than"):
        Session().request("GET", f"http://{host}/token")


def test_dates_are_read_in_all_their_forms() -> None:
    """A date of the year 1 or 9999 overflows in some time zones."""
    for year in (1, 9999):
        when = datetime.datetime(year, 1, 1).strftime("%a, %d %b %Y 00:00:00 +1400")
        retry.retry_after({"retry-after": when})
