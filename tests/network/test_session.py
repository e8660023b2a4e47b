"""One HTTP session: the environment's proxies, what is sent by itself, and failures by kind."""

import socket
import ssl
import threading
from collections.abc import Iterator

import pytest
from urllib3 import exceptions

from tuning.network.session import Session, Unreachable, environment_proxy, unreachable

PROXY = "http://proxy.corp:3128"


@pytest.fixture
def requests() -> Iterator[tuple[str, list[bytes]]]:
    """A server on loopback that answers 200 to anything, and the requests it received."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    data = connection.recv(65536)
                    while data.endswith(b"\r\n\r\n") and b"Content-Length" in data:
                        data += connection.recv(65536)
                    seen.append(data)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", seen
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("https://registry.example/v2/", PROXY),
        ("http://registry.example/v2/", None),  # there is one for https alone
        ("https://other.corp/v2/", None),
        ("https://corp/v2/", None),
        ("https://notcorp/v2/", PROXY),
        ("https://10.1.2.3:5000/v2/", None),
        ("https://11.1.2.3:5000/v2/", PROXY),
        ("https://localhost:5000/v2/", None),
    ],
)
def test_no_proxy_holds_domains_and_networks(
    monkeypatch: pytest.MonkeyPatch, url: str, proxy: str | None
) -> None:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", PROXY)
    monkeypatch.setenv("no_proxy", ".corp, 10.0.0.0/8")

    assert proxy == environment_proxy(url)


def test_a_proxy_s_login_goes_to_the_proxy(requests: tuple[str, list[bytes]]) -> None:
    """Its password may be escaped."""
    host, seen = requests

    session = Session(proxy=lambda url: f"http://me:a%40b@{host}")
    answer = session.request("GET", "http://registry.example/v2/")

    assert (200, {}) == (answer.status, answer.json())
    assert seen[0].startswith(b"GET http://registry.example/v2/ HTTP/1.1\r\n")
    assert b"proxy-authorization: basic bwu6yubi\r\n" in seen[0].lower()


def test_a_form_is_encoded(requests: tuple[str, list[bytes]]) -> None:
    host, seen = requests

    Session().request("POST", f"http://{host}/token", form={"scope": "a b"})

    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert b"Content-Type: application/x-www-form-urlencoded" in head
    assert b"scope=a+b" == body


@pytest.mark.parametrize(
    ("url", "headers", "kind"),
    [
        ("http://127.0.0.1:1/", {}, "connect"),
        ("http://127.0.0.1:port/", {}, "url"),
        (f"https://{'a' * 64}.example/", {}, "url"),
        ("http://127.0.0.1:1/", {"X-Key": "s3cret\r\n"}, "header"),
        ("ftp://127.0.0.1/", {}, "url"),
    ],
)
def test_failures_have_kinds(url: str, headers: dict[str, str], kind: str) -> None:
    with pytest.raises(Unreachable) as caught:
        Session(proxy=lambda url: None).request("GET", url, headers=headers)

    assert kind == caught.value.kind
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (exceptions.SSLError(ssl.SSLEOFError(8, "EOF")), "broken", ""),
        (exceptions.SSLError(ssl.SSLError(1, "x")), "tls", "handshake failed"),
        (exceptions.ProtocolError("cut"), "broken", ""),
        (ValueError("Invalid header value b's3cret'"), "header", ""),
        (UnicodeError("label too long"), "url", ""),
        (ConnectionResetError(104, "reset"), "broken", ""),
    ],
)
def test_errors_are_classified_and_never_quoted(error: Exception, kind: str, reason: str) -> None:
    failure = unreachable(error)

    assert (kind, reason) == (failure.kind, failure.reason)
