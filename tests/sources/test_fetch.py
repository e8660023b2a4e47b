"""Fetch: every file once, whole, verified and ours by name; every fault with its answer."""

from __future__ import annotations

import gzip
import hashlib
import ipaddress
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faults.web import Origin, Request

from tuning.errors import DataError, RefusedError, SpecError, Stopped, TransientError, TuningError
from tuning.network.policy import Policy, is_public, load_headers, place
from tuning.network.retry import Patience
from tuning.sources import fetch
from tuning.sources.http import Limits
from tuning.sources.local import File
from tuning.spec import Source

ROWS = b"".join(b'{"prompt": "%d", "completion": "%d"}\n' % (n, n * n) for n in range(4000))
SECRET = "sig=s3cr3t-canary"
LOOPBACK = Policy(allow_hosts={"127.0.0.1"})
RETRY = Patience(tries=3, first=0.01, longest=0.02)
QUICK = Limits(connect=2, stall=0.4, slow_window=0.5, retry=RETRY)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as server:
        yield server


def get(folder: Path, *urls: str, policy: Policy = LOOPBACK, **options: Any) -> tuple[File, ...]:
    options = {"limits": QUICK, **options}
    return fetch.fetch(Source(urls=urls), folder, policy=policy, **options)


# -- the good way -------------------------------------------------------------------------------


def test_every_url_becomes_one_file_under_our_own_name(origin: Origin, tmp_path: Path) -> None:
    """Equal base names, queries and hostile server names decide nothing; the order is kept."""
    other = ROWS[::-1]
    urls = (
        origin.serve("/one/train.parquet", ROWS) + f"?download=true&{SECRET}",
        origin.serve("/two/train.parquet", other),
        origin.serve("/three", ROWS, Content_Disposition='attachment; filename="../../etc/cron"'),
    )

    found = get(tmp_path / "data", *urls)

    assert ["0000", "0001", "0002"] == [file.path.name for file in found]
    assert [sha(ROWS), sha(other), sha(ROWS)] == [file.sha256 for file in found]
    assert [ROWS, other, ROWS] == [file.path.read_bytes() for file in found]
    assert [len(ROWS)] * 3 == [file.size for file in found]
    assert urls[0].partition("?")[0] + "?<redacted>" == found[0].shown
    assert {"identity"} == {headers["accept-encoding"] for _, headers in origin.requests}
    on_disk = b"".join(p.read_bytes() for p in (tmp_path / "data").glob("*.json"))
    assert SECRET.encode() not in on_disk


def test_a_finished_fetch_run_again_asks_for_nothing(origin: Origin, tmp_path: Path) -> None:
    urls = (origin.serve("/a", ROWS), origin.serve("/b", ROWS))
    first = get(tmp_path, *urls)

    asked = len(origin.requests)
    assert first == get(tmp_path, *urls)
    assert asked == len(origin.requests)


def test_a_file_damaged_since_then_is_fetched_again(origin: Origin, tmp_path: Path) -> None:
    urls = (origin.serve("/a", ROWS), origin.serve("/b", ROWS))
    damaged, _ = get(tmp_path, *urls)
    damaged.path.write_bytes(b"X" + ROWS[1:])

    found = get(tmp_path, *urls)

    assert ROWS == found[0].path.read_bytes()
    assert [2, 1] == [len(origin.asked(path)) for path in ("/a", "/b")]


def test_a_source_with_fewer_urls_leaves_nothing_of_the_others(
    origin: Origin, tmp_path: Path
) -> None:
    a, b = origin.serve("/a", ROWS), origin.serve("/b", ROWS)
    get(tmp_path, a, b)

    get(tmp_path, a)

    assert ["0000", "0000.json"] == sorted(path.name for path in tmp_path.iterdir())


def test_progress_counts_the_bytes_of_all_files(origin: Origin, tmp_path: Path) -> None:
    told: list[tuple[float, float | None]] = []
    urls = (origin.serve("/a", ROWS), origin.serve("/b", ROWS))

    get(tmp_path, *urls, progress=lambda done, total, note: told.append((done, total)))

    assert (2 * len(ROWS), 2 * len(ROWS)) == told[-1]
    assert sorted(done for done, _ in told) == [done for done, _ in told]


def test_check_looks_without_downloading(origin: Origin, tmp_path: Path) -> None:
    url = origin.serve("/a", ROWS)

    (seen,) = fetch.check(Source(urls=(url,)), policy=LOOPBACK, limits=QUICK, head=100)

    assert (url, len(ROWS), ROWS[:100]) == (seen.shown, seen.size, seen.head)


def test_check_names_every_url_that_cannot_be_had(origin: Origin) -> None:
    urls = (origin.answer("/a", 404), origin.serve("/b", ROWS), origin.answer("/c", 503))

    with pytest.raises(RefusedError) as caught:
        fetch.check(
            Source(urls=urls), policy=LOOPBACK, limits=replace(QUICK, retry=Patience(tries=1))
        )

    assert ["FETCH-110", "FETCH-130"] == [problem.code for problem in caught.value.problems]


# -- resume -------------------------------------------------------------------------------------


def test_a_stopped_fetch_goes_on_where_it_was(origin: Origin, tmp_path: Path) -> None:
    """SIGTERM is a flag: the fetch ends with 75, and the next one asks for the rest only."""
    half = len(ROWS) // 2
    stop = threading.Event()

    def first_half_then_silence(request: Request) -> None:
        if request.count == 1:
            request.head(200, Content_Length=len(ROWS), ETag='"v1"')
            request.body(ROWS[:half])
            stop.set()
            request.stall()
            return
        start = int(request.headers["range"].removeprefix("bytes=").rstrip("-"))
        span = f"bytes {start}-{len(ROWS) - 1}/{len(ROWS)}"
        request.head(206, Content_Length=len(ROWS) - start, Content_Range=span, ETag='"v1"')
        request.body(ROWS[start:])

    url = origin.route("/a", first_half_then_silence)
    with pytest.raises(Stopped) as caught:
        get(tmp_path, url, stop=stop.is_set)
    assert 75 == caught.value.exit_code

    (file,) = get(tmp_path, url)

    assert ROWS == file.path.read_bytes()
    assert '"v1"' == origin.asked("/a")[1]["if-range"]


def test_a_killed_fetch_goes_on_where_it_was_safe(origin: Origin, tmp_path: Path) -> None:
    """SIGKILL in the middle of the body leaves a part that the next run completes."""
    arrived = threading.Event()
    big = ROWS * 40  # 6 MB

    def slow_first(request: Request) -> None:
        match = request.headers.get("range", "bytes=0-").removeprefix("bytes=").rstrip("-")
        start = int(match)
        span = f"bytes {start}-{len(big) - 1}/{len(big)}"
        more = {"Content_Range": span} if start else {}
        request.head(206 if start else 200, Content_Length=len(big) - start, ETag='"x"', **more)
        if request.count == 1:
            request.body(big[: 5 << 20])
            arrived.set()
            request.stall()
        request.body(big[start:])

    url = origin.route("/a", slow_first)
    code = (
        "import sys; from pathlib import Path; from tuning.sources import download, fetch\n"
        "from tuning.network.policy import Policy\n"
        "from tuning.spec import Source\n"
        "download.DURABLE_EVERY = 1 << 20\n"
        "fetch.fetch(Source(urls=(sys.argv[1],)), Path(sys.argv[2]),"
        " policy=Policy(allow_hosts={'127.0.0.1'}))"
    )
    child = subprocess.Popen([sys.executable, "-c", code, url, str(tmp_path)])
    record = tmp_path / "0000.part.json"
    assert arrived.wait(60)
    while not record.exists() or json.loads(record.read_bytes())["size"] < 3 << 20:
        assert child.poll() is None
    child.kill()
    child.wait()

    (file,) = get(tmp_path, url)

    assert sha(big) == file.sha256
    assert 3 << 20 <= int(origin.asked("/a")[-1]["range"].removeprefix("bytes=").rstrip("-"))


def test_a_part_of_another_url_is_not_used(origin: Origin, tmp_path: Path) -> None:
    broken = origin.serve("/a", ROWS, cut_at=1000, cuts=99, ranges=False)
    with pytest.raises(TransientError):
        get(tmp_path, broken)

    (file,) = get(tmp_path, origin.serve("/b", ROWS[::-1]))

    assert ROWS[::-1] == file.path.read_bytes()
    assert "range" not in origin.asked("/b")[0]


# -- faults: each row of the table is one ----------------------------------------------------------


def slow(request: Request) -> None:
    request.head(200, Content_Length=len(ROWS))
    while not request.released.wait(0.1):
        request.body(b"x")


def silent_body(request: Request) -> None:
    request.head(200, Content_Length=len(ROWS), ETag='"v"')
    request.body(ROWS[:100])
    request.stall()


def announced_too_much(request: Request) -> None:
    request.head(200, Content_Length=len(ROWS) + 1)
    request.body(ROWS)


def announced_too_little(request: Request) -> None:
    request.head(200, Content_Length=len(ROWS) - 100)
    request.body(ROWS)


def without_length(request: Request) -> None:
    request.head(200)
    request.body(ROWS[:5000])


def cut_chunks(request: Request) -> None:
    request.head(200, Transfer_Encoding="chunked")
    request.body(b"%x\r\n%s\r\n" % (5000, ROWS[:5000]))


def endless(request: Request) -> None:
    request.head(200, Transfer_Encoding="chunked")
    while True:
        request.body(b"%x\r\n%s\r\n" % (len(ROWS), ROWS))


def chained(request: Request) -> None:
    body = gzip.compress(gzip.compress(ROWS))
    request.head(200, Content_Length=len(body), Content_Encoding="gzip, gzip")
    request.body(body)


LOGIN = b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>"

# id, how the server behaves, code, exit code, words that must be in the message
FAULTS: list[tuple[str, Callable[[Origin], str], str, int, str]] = [
    ("F1", lambda o: o.answer("/f", 404), "FETCH-110", 12, "no such file (404)"),
    ("F2", lambda o: o.answer("/f", 410), "FETCH-110", 12, "gone (410)"),
    ("F3-401", lambda o: o.answer("/f", 401), "FETCH-111", 12, "expired"),
    ("F3-403", lambda o: o.answer("/f", 403), "FETCH-111", 12, "expired"),
    ("F4", lambda o: o.answer("/f", 500), "FETCH-130", 20, "500"),
    ("F10", lambda o: o.route("/f", silent_body), "FETCH-133", 20, "at byte 100"),
    ("F11", lambda o: o.route("/f", slow), "FETCH-134", 20, "bytes came in"),
    ("F13", lambda o: o.route("/f", announced_too_much), "FETCH-135", 20, f"{len(ROWS)} of"),
    ("F14", lambda o: o.route("/f", announced_too_little), "FETCH-135", 20, "bytes"),
    ("F15-closed", lambda o: o.route("/f", without_length), "FETCH-119", 12, "5000 bytes came"),
    ("F15-chunked", lambda o: o.route("/f", cut_chunks), "FETCH-135", 20, "after 5000 bytes"),
    ("F18", lambda o: o.serve("/f", ROWS) + "#sha256=" + "0" * 64, "FETCH-121", 10, sha(ROWS)),
    ("F19", lambda o: o.serve("/f", ROWS * 3), "FETCH-122", 10, "more than 300,000 bytes"),
    ("F20", lambda o: o.route("/f", endless), "FETCH-122", 10, "more than 300,000 bytes"),
    ("F22", lambda o: o.route("/f", chained), "FETCH-118", 12, "Content-Encoding"),
    ("F22-br", lambda o: o.serve("/f", ROWS, Content_Encoding="br"), "FETCH-118", 12, "br"),
    ("F23", lambda o: o.answer("/f", 302, Location="/f"), "FETCH-113", 12, "more than 5 times"),
    ("F25", lambda o: o.answer("/f", 302, Location="http://10.0.0.1/x"), "FETCH-115", 12, "must"),
    ("F26", lambda o: o.serve("/f", LOGIN), "FETCH-112", 12, "<!DOCTYPE html"),
    ("F26-xml", lambda o: o.serve("/f", b"<?xml version='1.0'?><Error/>"), "FETCH-112", 12, "XML"),
    ("F27", lambda o: o.serve("/f", b""), "FETCH-120", 10, "is empty"),
    ("F27-204", lambda o: o.answer("/f", 204), "FETCH-120", 10, "is empty"),
]


@pytest.mark.parametrize(
    ("behave", "code", "exit_code", "words"),
    [row[1:] for row in FAULTS],
    ids=[r[0] for r in FAULTS],
)
def test_a_fault_ends_with_its_code_and_leaves_no_file(
    origin: Origin,
    tmp_path: Path,
    behave: Callable[[Origin], str],
    code: str,
    exit_code: int,
    words: str,
) -> None:
    """The message says what is wrong, never the URL's query; no half file gets a name."""
    url, _, fragment = behave(origin).partition("#")
    url += f"?{SECRET}" + (f"#{fragment}" if fragment else "")
    policy = replace(LOOPBACK, max_file_bytes=300_000)

    with pytest.raises(TuningError) as caught:
        get(tmp_path, url, policy=policy)

    assert [code] == [problem.code for problem in caught.value.problems]
    assert exit_code == caught.value.exit_code
    assert words in str(caught.value)
    assert "input.urls[0]" in str(caught.value)
    assert "s3cr3t" not in str(caught.value)
    assert not (tmp_path / "0000").exists()


def test_f5_a_server_that_recovers_is_waited_for(origin: Origin, tmp_path: Path) -> None:
    def behave(request: Request) -> None:
        if request.count <= 2:
            request.head(503, Content_Length=0)
        else:
            request.head(200, Content_Length=len(ROWS))
            request.body(ROWS)

    (file,) = get(tmp_path, origin.route("/f", behave))

    assert (ROWS, 3) == (file.path.read_bytes(), len(origin.requests))


@pytest.mark.parametrize("after", ["0", "Wed, 21 Oct 2015 07:28:00 GMT", "soon"])
def test_f6_a_server_that_asks_for_time_gets_it(origin: Origin, tmp_path: Path, after: str) -> None:
    def behave(request: Request) -> None:
        if request.count == 1:
            request.head(429, Content_Length=0, Retry_After=after)
        else:
            request.head(200, Content_Length=len(ROWS))
            request.body(ROWS)

    (file,) = get(tmp_path, origin.route("/f", behave))

    assert ROWS == file.path.read_bytes()


def test_f7_a_host_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(RefusedError, match=r"FETCH-117 .*there is no host data.example"):
        get(tmp_path, "https://data.example/x", resolve=unknown)


def test_an_impossible_host_name_is_an_invalid_url(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"FETCH-128 .*is an invalid URL"):
        get(tmp_path, f"https://{'a' * 64}.example/x")


@pytest.mark.parametrize("host", ["huggingface.co", "storage.googleapis.com"])
def test_f7_a_host_that_is_surely_there_means_no_dns(tmp_path: Path, host: str) -> None:
    """No reason to give up, nor to look for a slip of the pen."""

    def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(TransientError, match=r"FETCH-131 .*cannot look up"):
        get(tmp_path, f"https://{host}/x", resolve=unknown)


def test_f7_a_name_service_that_is_down_is_worth_another_run(tmp_path: Path) -> None:
    def down(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    with pytest.raises(TransientError, match=r"FETCH-131 .*cannot look up data.example"):
        get(tmp_path, "https://data.example/x", resolve=down)


def test_f8_a_refused_connection_is_worth_another_run(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]

    with pytest.raises(TransientError, match=r"FETCH-131 .*Connection refused"):
        get(tmp_path, f"http://127.0.0.1:{port}/x")


def test_f9_a_host_that_does_not_answer_is_worth_another_run(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        fillers = []
        try:
            for _ in range(8):  # until the queue is full, and the kernel drops what comes
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
                fillers.append(filler)
            limits = replace(QUICK, connect=0.3, retry=Patience(tries=1))
            with pytest.raises(TransientError, match=r"FETCH-132 .*does not answer"):
                get(tmp_path, f"http://127.0.0.1:{port}/x", limits=limits)
        finally:
            for filler in fillers:
                filler.close()


@pytest.mark.parametrize("at", [0, 1, len(ROWS) // 2, len(ROWS) - 1])
@pytest.mark.parametrize("reset", [True, False])
def test_f12_a_broken_transfer_costs_nothing_but_the_rest(
    origin: Origin, tmp_path: Path, at: int, reset: bool
) -> None:
    (file,) = get(tmp_path, origin.serve("/f", ROWS, cut_at=at, reset=reset))

    assert ROWS == file.path.read_bytes()
    again = origin.asked("/f")[1]
    if not reset:  # a RST may lose bytes that were on the way
        assert (f"bytes={at}-" if at else None) == again.get("range")


def test_f12_many_resets_are_survived_while_there_is_progress(
    origin: Origin, tmp_path: Path
) -> None:
    (file,) = get(tmp_path, origin.serve("/f", ROWS, cut_at=len(ROWS) // 10, cuts=99))

    assert ROWS == file.path.read_bytes()
    assert RETRY.tries < len(origin.requests)


@pytest.mark.parametrize("honest", [True, False])
def test_f16_a_file_that_changes_between_ranges_is_begun_again(
    origin: Origin, tmp_path: Path, honest: bool
) -> None:
    """Also where the server ignores If-Range and sends the rest of the new version."""
    new = ROWS.upper()

    def behave(request: Request) -> None:
        if request.count == 1:
            request.head(200, Content_Length=len(ROWS), ETag='"old"')
            request.body(ROWS[:1000])
            request.reset()
        elif "range" in request.headers and not honest:
            span = f"bytes 1000-{len(new) - 1}/{len(new)}"
            request.head(206, Content_Length=len(new) - 1000, Content_Range=span, ETag='"new"')
            request.body(new[1000:])
        else:
            request.head(200, Content_Length=len(new), ETag='"new"')
            request.body(new)

    (file,) = get(tmp_path, origin.route("/f", behave))

    assert new == file.path.read_bytes()


def test_f17_a_server_without_ranges_is_asked_for_all_of_it(origin: Origin, tmp_path: Path) -> None:
    (file,) = get(tmp_path, origin.serve("/f", ROWS, cut_at=1000, ranges=False))

    assert ROWS == file.path.read_bytes()


def test_f21_compressed_data_is_kept_as_it_came(origin: Origin, tmp_path: Path) -> None:
    """Nothing is decoded here, so that a bomb is as small on the disk as it was on the way."""
    bomb = gzip.compress(bytes(50_000_000), 9)
    url = origin.serve("/f", bomb, Content_Encoding="gzip")

    (file,) = get(tmp_path, url, policy=replace(LOOPBACK, max_file_bytes=1_000_000))

    assert bomb == file.path.read_bytes()


def test_f28_a_url_given_twice_is_refused(tmp_path: Path) -> None:
    urls = ("https://data.example/a", "https://data.example/b", "HTTPS://Data.example:443/a")

    with pytest.raises(SpecError, match=r"FETCH-102 input.urls\[2\] .*the same as urls\[0\]"):
        get(tmp_path, *urls)


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for `name`, and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30"
    names = f"-subj /CN={name} -addext subjectAltName=DNS:{name} -keyout {key} -out {cert}"
    subprocess.run(["openssl", *f"{options} {names}".split()], check=True, capture_output=True)
    return cert, key


def secure(cert: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


def test_f30_tls_is_verified_against_name_and_authority(tmp_path: Path) -> None:
    """Self-signed and wrong names are refused; the policy's CA opens its own hosts, by SNI."""
    cert, key = certificate(tmp_path, "data.example")
    policy = Policy(allow_hosts={"data.example", "other.example"})
    with Origin(tls=secure(cert, key)) as origin:
        origin.serve("/f", ROWS)
        options: dict[str, Any] = {"resolve": lambda host, port: ["127.0.0.1"]}
        good, wrong = (origin.url("/f", host=f"{name}.example") for name in ("data", "other"))

        with pytest.raises(RefusedError, match=r"FETCH-116 .*TLS: self-signed certificate"):
            get(tmp_path / "a", good, policy=policy, **options)
        known = replace(policy, ca_bundle=cert)
        with pytest.raises(RefusedError, match=r"FETCH-116 .*Hostname mismatch"):
            get(tmp_path / "b", wrong, policy=known, **options)
        (file,) = get(tmp_path / "c", good, policy=known, **options)

        assert ROWS == file.path.read_bytes()


def test_f24_https_never_leads_to_plain_http(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "data.example")
    policy = Policy(allow_hosts={"data.example"}, ca_bundle=cert)
    with Origin(tls=secure(cert, key)) as origin:
        origin.answer("/f", 302, Location="http://data.example/f")

        with pytest.raises(RefusedError, match=r"FETCH-114 .*from https to plain http"):
            get(
                tmp_path / "x",
                origin.url("/f", host="data.example"),
                policy=policy,
                resolve=lambda host, port: ["127.0.0.1"],
            )


def test_the_problems_of_all_urls_come_in_one_error(origin: Origin, tmp_path: Path) -> None:
    """What is final decides the exit code, since another try would not help."""
    urls = (
        origin.answer("/a", 404),
        origin.serve("/b", ROWS),
        origin.answer("/c", 503),
        origin.serve("/d", LOGIN),
    )

    with pytest.raises(RefusedError) as caught:
        get(tmp_path, *urls)

    found = [(problem.code, problem.where.split()[0]) for problem in caught.value.problems]
    assert [("FETCH-110", "input.urls[0]"), ("FETCH-130", "input.urls[2]")] == found[:2]
    assert ("FETCH-112", "input.urls[3]") in found


def test_a_disk_without_room_is_told_before_a_byte_is_written(
    origin: Origin, tmp_path: Path
) -> None:
    def petabyte(request: Request) -> None:
        request.head(200, Content_Length=1 << 50)
        request.body(b"x")
        request.stall()

    policy = replace(LOOPBACK, max_file_bytes=1 << 60, max_total_bytes=1 << 60)
    with pytest.raises(SpecError, match=r"FETCH-136 .*needs .* bytes in .* are free"):
        get(tmp_path, origin.route("/f", petabyte), policy=policy)


def test_all_files_together_are_capped(origin: Origin, tmp_path: Path) -> None:
    urls = (origin.serve("/a", ROWS), origin.serve("/b", ROWS))

    with pytest.raises(DataError, match=r"FETCH-122 .*all files together"):
        get(tmp_path, *urls, policy=replace(LOOPBACK, max_total_bytes=len(ROWS) + 1))


def test_a_fetch_ends_at_its_total_time_out(origin: Origin, tmp_path: Path) -> None:
    with pytest.raises(TransientError, match=r"FETCH-137"):
        get(tmp_path, origin.serve("/a", ROWS), limits=replace(QUICK, total=-1))


# -- checksums ----------------------------------------------------------------------------------


def test_a_checksum_in_the_fragment_is_checked_and_not_sent(origin: Origin, tmp_path: Path) -> None:
    (file,) = get(tmp_path, origin.serve("/a", ROWS) + f"#sha256={sha(ROWS).upper()}")

    assert sha(ROWS) == file.sha256
    assert [("/a")] == [path for path, _ in origin.requests]


def test_a_damaged_transfer_is_tried_once_more(origin: Origin, tmp_path: Path) -> None:
    def behave(request: Request) -> None:
        request.head(200, Content_Length=len(ROWS))
        request.body(ROWS if request.count > 1 else b"X" + ROWS[1:])

    (file,) = get(tmp_path, origin.route("/a", behave) + f"#sha256={sha(ROWS)}")

    assert ROWS == file.path.read_bytes()


def test_a_checksum_stands_in_for_a_length(origin: Origin, tmp_path: Path) -> None:
    url = origin.route("/a", without_length)

    (file,) = get(tmp_path, f"{url}#sha256={sha(ROWS[:5000])}")

    assert 5000 == file.size


def test_no_log_holds_a_query(
    origin: Origin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even where everything is logged: a signed URL is a key."""
    caplog.set_level("DEBUG")
    get(tmp_path / "a", origin.serve("/a", ROWS, cut_at=100) + f"?{SECRET}")
    with pytest.raises(RefusedError):
        get(tmp_path / "b", origin.answer("/b", 404) + f"?{SECRET}")

    assert "input.urls[0]" in caplog.text
    assert "s3cr3t" not in caplog.text


def test_an_answer_that_is_malformed_logs_no_query(
    origin: Origin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """urllib3 would warn of it with the URL."""

    def malformed(request: Request) -> None:
        request.body(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nno colon here\r\n\r\n123456789")
        request.handler.close_connection = True

    get(tmp_path, origin.route("/a", malformed) + f"?{SECRET}")

    assert "s3cr3t" not in caplog.text


def test_a_header_that_is_none_is_told_without_its_value(tmp_path: Path) -> None:
    """A key in two lines, say: http.client's own error shows it."""
    headers = {"127.0.0.1": {"X-Key": "one\ns3cr3t"}}

    with pytest.raises(SpecError, match=r"FETCH-107 input.urls\[0\]") as caught:
        get(tmp_path, "http://127.0.0.1:9/a", credentials=headers)

    assert "s3cr3t" not in str(caught.value)


def test_another_version_with_weak_tags_is_known_by_its_time(
    origin: Origin, tmp_path: Path
) -> None:
    """The server ignores If-Range and sends the rest of the new version."""

    def changing(request: Request) -> None:
        version = 1 if request.count == 1 else 2
        body = ROWS if version == 1 else ROWS[::-1]
        told = {"ETag": f'W/"{version}"', "Last_Modified": f"Mon, 0{version} Jun 2026 07:00:00 GMT"}
        if "range" in request.headers:
            start = int(request.headers["range"].removeprefix("bytes=").rstrip("-"))
            where = f"bytes {start}-{len(body) - 1}/{len(body)}"
            request.head(206, Content_Length=len(body) - start, Content_Range=where, **told)
            request.body(body[start:])
        else:
            request.head(200, Content_Length=len(body), **told)
            request.body(body[:5000] if version == 1 else body)

    (file,) = get(tmp_path, origin.route("/a", changing))

    assert ROWS[::-1] == file.path.read_bytes()


def test_a_policy_may_ask_for_checksums(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"FETCH-105"):
        get(tmp_path, "http://127.0.0.1/a", policy=replace(LOOPBACK, require_checksums=True))


@pytest.mark.parametrize("fragment", ["sha256=abc", "row=5", "sha256=" + "g" * 64, "md5=0"])
def test_a_fragment_that_is_no_checksum_is_refused(tmp_path: Path, fragment: str) -> None:
    with pytest.raises(SpecError, match=r"FETCH-103"):
        get(tmp_path, f"http://127.0.0.1/a#{fragment}")


# -- S1, S2: where a connection may go ------------------------------------------------------------

# 64 ways to name an address that a job must not reach
_FORBIDDEN = """
127.0.0.1 127.1.2.3 127.255.255.254 0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 172.16.0.1
172.31.255.255 192.168.0.1 192.168.255.255 169.254.169.254 169.254.0.1 169.254.170.2
100.64.0.1 100.100.100.200 100.127.255.255 168.63.129.16 192.0.0.192 192.0.0.1 192.0.2.1
198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1 192.88.99.1 224.0.0.1 239.255.255.250
240.0.0.1 255.255.255.255 ::1 :: fe80::1 febf::1 fc00::1 fd00::1 fd00:ec2::254 fd20:ce::254
ff02::1 ff05::1 fec0::1 2001:db8::1 3fff::1 100::1 4000::1 5f00::1 ::127.0.0.1
::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:0:127.0.0.1 64:ff9b::7f00:1
64:ff9b::a9fe:a9fe 64:ff9b:1::a00:1 2002:7f00:1:: 2002:a00:1::1 2002:a9fe:a9fe::1
2001:0:4136:e378:8000:63bf:3fff:fdd2 2001::1 2001:2::1 2001:10::1 ::a9fe:a9fe
2001:db8:ffff::1 fd12:3456:789a::1
"""
FORBIDDEN = _FORBIDDEN.split()


class Listener:
    """A port that counts who connects: nobody may."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]

    def connections(self) -> int:
        self.socket.setblocking(False)
        count = 0
        try:
            while True:
                self.socket.accept()[0].close()
                count += 1
        except BlockingIOError:
            return count


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """Every connection that the code would make goes to the listener, whatever its address."""
    listener = Listener()
    connect = socket.create_connection

    def divert(address: tuple[str, int], *rest: Any, **more: Any) -> socket.socket:
        opened = address[0] in ("127.0.0.1", "93.184.216.34")
        port = address[1] if opened and address[1] not in (80, 443) else listener.port
        return connect(("127.0.0.1", port), *rest, **more)

    monkeypatch.setattr(socket, "create_connection", divert)
    yield listener
    listener.socket.close()


def literal(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def test_sixty_four_addresses_are_forbidden() -> None:
    assert (64, 64) == (len(FORBIDDEN), len(set(FORBIDDEN)))
    assert [] == [a for a in FORBIDDEN if is_public(ipaddress.ip_address(a))]


def test_the_cluster_s_own_api_server_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a cluster numbers its services as if they were public."""
    address = ipaddress.ip_address("93.184.216.34")
    assert is_public(address)

    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", str(address))

    assert not is_public(address)


def test_no_literal_address_is_reached(listener: Listener, tmp_path: Path) -> None:
    for address in FORBIDDEN:
        with pytest.raises(SpecError, match=r"FETCH-101"):
            get(tmp_path, f"http://{literal(address)}/x", policy=Policy())

    assert 0 == listener.connections()


def test_no_name_leads_to_a_forbidden_address(listener: Listener, tmp_path: Path) -> None:
    """Every address of a name is checked before the first is used."""
    for address in FORBIDDEN:
        with pytest.raises(SpecError, match=r"FETCH-104 .*is not on the public internet"):
            get(
                tmp_path,
                "http://data.example/x",
                policy=Policy(),
                resolve=lambda host, port, a=address: ["93.184.216.34", a],
            )

    assert 0 == listener.connections()


def test_no_redirect_leads_to_a_forbidden_address(
    listener: Listener, origin: Origin, tmp_path: Path
) -> None:
    """Neither to a literal nor to a name; the public first hop is the only connection."""
    for number, address in enumerate(FORBIDDEN):
        spelled = origin.answer(f"/l{number}", 302, Location=f"http://{literal(address)}/x")
        named = origin.answer(f"/n{number}", 302, Location="http://inside.example/x")
        for url in (spelled, named):
            with pytest.raises(RefusedError, match=r"FETCH-115"):
                get(
                    tmp_path,
                    url.replace("127.0.0.1", "data.example"),
                    policy=Policy(),
                    resolve=lambda host, port, a=address: [
                        "93.184.216.34" if host == "data.example" else a
                    ],
                )

    assert 0 == listener.connections()
    assert 2 * len(FORBIDDEN) == len(origin.requests)


def test_no_name_changes_its_address_after_the_check(
    listener: Listener, origin: Origin, tmp_path: Path
) -> None:
    """Rebinding: the second look-up of a name is checked like the first, and nothing is resolved
    between check and connection."""
    for number, address in enumerate(FORBIDDEN):
        answers = iter([["93.184.216.34"], [address], [address]])
        origin.answer(f"/r{number}", 302, Location=f"http://data.example:{listener.port}/x")
        with pytest.raises(RefusedError, match=r"FETCH-115"):
            get(
                tmp_path,
                origin.url(f"/r{number}", host="data.example"),
                policy=Policy(),
                resolve=lambda host, port, a=answers: next(a),
            )

    assert 0 == listener.connections()


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://data.example/x", "gopher://data.example/", "data:text/plain,x",
        "jar:http://data.example/x!/y", "//data.example/x", "http:\\\\data.example\\x",
        "http://data.example\\@10.0.0.1/x", "http://user@data.example/x",
        "http://user:password@data.example/x", "http://data.example/x\r\nHost: y",
        "http://data.example/\tx", "http://dätä.example/x", "http://data.example/%2e%2e/x",
        "http://data.example/%2E%2e%2fx", "http://2130706433/x", "http://0x7f000001/x",
        "http://127.1/x", "http://0177.0.0.1/x", "http://localhost/x", "http://a.localhost/x",
        "http://metadata.google.internal/x", "http:///x", "",
    ],
)  # fmt: skip
def test_no_strange_url_is_asked_for(listener: Listener, tmp_path: Path, url: str) -> None:
    with pytest.raises(SpecError, match=r"FETCH-101"):
        get(tmp_path, url, policy=Policy())

    assert 0 == listener.connections()


def test_the_environment_opens_no_proxy(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    assert ROWS == get(tmp_path, origin.serve("/a", ROWS))[0].path.read_bytes()


def test_the_policy_opens_a_proxy(origin: Origin, tmp_path: Path) -> None:
    """The proxy gets the whole URL, and names that only it can resolve."""
    origin.route("http://data.example/x", lambda request: (
        request.head(200, Content_Length=len(ROWS)), request.body(ROWS),
    )[0])  # fmt: skip
    policy = Policy(proxy=origin.url(""))

    (file,) = get(tmp_path, "http://data.example/x", policy=policy)

    assert ROWS == file.path.read_bytes()


def test_an_allowed_host_opens_itself_but_no_metadata(origin: Origin, tmp_path: Path) -> None:
    origin.serve("/a", ROWS)
    policy = Policy().with_hosts(["Store.Example"])
    url = origin.url("/a", host="store.example")

    (file,) = get(tmp_path, url, policy=policy, resolve=lambda host, port: ["127.0.0.1"])
    assert ROWS == file.path.read_bytes()
    for address in ("169.254.169.254", "168.63.129.16", "fd00:ec2::254", "::ffff:169.254.169.254"):
        with pytest.raises(SpecError, match=r"FETCH-104"):
            get(tmp_path / "b", url, policy=policy, resolve=lambda h, p, a=address: [a])


@pytest.mark.parametrize(
    ("entry", "url", "address", "opened"),
    [
        ("10.0.0.0/8", "http://10.1.2.3/x", "10.1.2.3", True),
        ("10.0.0.0/8", "http://store.example/x", "10.1.2.3", True),
        ("10.0.0.0/8", "http://store.example/x", "192.168.0.1", False),
        ("*.corp.example", "http://a.corp.example/x", "10.1.2.3", True),
        ("*.corp.example", "http://corp.example.evil.example/x", "10.1.2.3", False),
        ("store.example:9000", "http://store.example:9000/x", "10.1.2.3", True),
        ("store.example:9000", "http://store.example/x", "10.1.2.3", False),
        ("10.1.2.3", "http://store.example/x", "10.1.2.3", False),
        ("[fd00::1]:9000", "http://[fd00::1]:9000/x", "fd00::1", True),
    ],
)
def test_what_an_entry_of_allowed_hosts_opens(
    entry: str, url: str, address: str, opened: bool
) -> None:
    policy = Policy(allow_hosts={entry})
    _, host, port = place(url)

    assert opened == policy.allows(host, port, address)
    assert policy.refusal(url) is None


def test_plain_http_to_public_hosts_can_be_closed(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"FETCH-108"):
        get(tmp_path, "http://data.example/x", policy=Policy(plain_http=False))


# -- credentials ----------------------------------------------------------------------------------


def test_credentials_go_to_their_host_only(origin: Origin, tmp_path: Path) -> None:
    """A redirect to another host gets none, as a content network must not see the token."""
    with Origin() as other:
        there = other.serve("/blob", ROWS).replace("127.0.0.1", "cdn.example")
        origin.answer("/a", 302, Location=there)
        policy = Policy(allow_hosts={"127.0.0.1", "cdn.example"})

        get(
            tmp_path,
            origin.url("/a"),
            policy=policy,
            credentials={"127.0.0.1": {"Authorization": "Bearer canary"}},
            resolve=lambda host, port: ["127.0.0.1"],
        )

        assert "Bearer canary" == origin.asked("/a")[0]["authorization"]
        assert "authorization" not in other.asked("/blob")[0]


def test_credentials_do_not_cross_the_network_readably(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"FETCH-106") as caught:
        get(
            tmp_path,
            "http://data.example/x",
            policy=Policy(),
            credentials={"data.example": {"Authorization": "Bearer canary"}},
        )

    assert "canary" not in str(caught.value)


def test_headers_are_read_from_a_mounted_secret(tmp_path: Path) -> None:
    (tmp_path / "Data.example").write_text("Authorization: Bearer a:b\n\nX-Team: 7\n")
    (tmp_path / "store.example_9000").write_text("X-Key: k")
    (tmp_path / "..data").mkdir()

    assert {
        "data.example": {"Authorization": "Bearer a:b", "X-Team": "7"},
        "store.example:9000": {"X-Key": "k"},
    } == load_headers(tmp_path)


def test_a_broken_secret_is_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "data.example").write_text("X-Key: k\nBearer s3cr3t\n")

    with pytest.raises(SpecError, match=r"FETCH-107 .*data.example line 2") as caught:
        load_headers(tmp_path)

    assert "s3cr3t" not in str(caught.value)


# -- the policy file ----------------------------------------------------------------------------


def test_the_policy_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "data:\n  allowHosts: [Minio.corp, 10.0.0.0/8]\n  plainHttp: false\n"
        "  proxy: http://proxy.corp:3128\n  noProxy: ['*.corp']\n  caBundle: corp.pem\n"
        "  maxFileSize: 10GiB\n  maxTotalSize: 1 TB\n  requireChecksums: true\n"
    )

    assert Policy(
        allow_hosts=frozenset({"minio.corp", "10.0.0.0/8"}),
        plain_http=False,
        proxy="http://proxy.corp:3128",
        no_proxy=frozenset({"*.corp"}),
        ca_bundle=tmp_path / "corp.pem",
        max_file_bytes=10 << 30,
        max_total_bytes=10**12,
        require_checksums=True,
    ) == Policy.load(path)


@pytest.mark.parametrize("text", ["", "data:\n", "data: {}\n"])
def test_an_empty_policy_file_is_the_default(tmp_path: Path, text: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)

    assert Policy() == Policy.load(path)


def test_all_problems_of_a_policy_file_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("data:\n  allowHost: [a]\n  maxFileSize: many\n  proxy: proxy.corp\nnet: {}\n")

    with pytest.raises(SpecError) as caught:
        Policy.load(path)

    text = str(caught.value)
    assert 4 == len(caught.value.problems)
    assert (
        'data.allowHost: is not a key of the policy file. Change: did you mean "allowHosts"' in text
    )


# -- local files, folders, images ---------------------------------------------------------------


def test_local_files_are_hashed_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(ROWS)

    found = fetch.fetch(Source(files=(path,)), tmp_path / "data", policy=Policy())

    assert (File(path, str(path), sha(ROWS), len(ROWS)),) == found
    assert not (tmp_path / "data").exists()
    assert found[0] == File.from_json(json.loads(json.dumps(found[0].to_json())))


def test_local_files_that_cannot_be_used_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()

    with pytest.raises(DataError) as caught:
        files = (tmp_path / "none", tmp_path / "empty", tmp_path)
        fetch.fetch(Source(files=files), tmp_path / "data", policy=Policy())

    assert ["FETCH-123", "FETCH-120", "FETCH-123"] == [p.code for p in caught.value.problems]


def test_a_local_file_named_twice_is_refused(tmp_path: Path) -> None:
    """By itself, or by the folder that it is in: its rows would count twice."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(ROWS)
    for source in (Source(files=(file, file)), Source(files=(file,), folder=tmp_path)):
        with pytest.raises(SpecError, match=r"FETCH-102 .*is the same file as"):
            fetch.fetch(source, tmp_path / "data", policy=Policy())


def test_a_folder_lists_its_data_by_name(tmp_path: Path) -> None:
    """Hidden files, mounted-volume machinery, companions and special files are left out."""
    names = ("b.jsonl", "a.parquet", "sub/c.csv", ".hidden", "sub/.git/x", "README.md", "LICENSE")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(ROWS)
    (tmp_path / "inside").symlink_to("b.jsonl")
    os.mkfifo(tmp_path / "pipe")

    found = fetch.fetch(Source(folder=tmp_path), tmp_path / "data", policy=Policy())

    shown = [str(Path(file.shown).relative_to(tmp_path)) for file in found]
    assert ["a.parquet", "b.jsonl", "inside", "sub/c.csv"] == shown


@pytest.mark.parametrize(
    ("within", "ending", "names"),
    [
        (None, None, ["train/a.jsonl", "train/c.csv"]),  # the test split is left out
        ("test", None, ["test/b.jsonl"]),  # unless it is asked for
        ("train", None, ["train/a.jsonl", "train/c.csv"]),
        ("train/c.csv", None, ["train/c.csv"]),
        ("data/train/c.csv", None, ["train/c.csv"]),  # as KAITO means it
        ("data", None, ["train/a.jsonl", "train/c.csv"]),
        (None, "jsonl", ["train/a.jsonl"]),
        ("train", "jsonl", ["train/a.jsonl"]),
        (None, "parquet", ["train/a.jsonl", "train/c.csv"]),  # what they are
    ],
)
def test_a_part_of_a_folder_or_image(
    tmp_path: Path, within: str | None, ending: str | None, names: list[str]
) -> None:
    """dataset_path and dataset_extension; companions of a saved dataset never count."""

    def fill(folder: Path) -> None:
        for name in ("train/a.jsonl", "train/c.csv", "test/b.jsonl", "train/dataset_info.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(ROWS)

    fill(tmp_path / "data")
    folder = Source(folder=tmp_path / "data", within=within, ending=ending)
    image = Source(image="registry.example/rows:1", within=within, ending=ending)

    local = fetch.fetch(folder, tmp_path / "1", policy=Policy())
    pulled = fetch.fetch(
        image, tmp_path / "2", policy=Policy(), pull_image=lambda reference, target: fill(target)
    )

    assert names == [str(Path(file.shown).relative_to(tmp_path / "data")) for file in local]
    assert names == [file.shown.partition(":/data/")[2] for file in pulled]


def test_a_file_among_urls_is_named_by_its_last_part(origin: Origin, tmp_path: Path) -> None:
    """As KAITO's dataset_path names what lies under /mnt/data."""
    urls = tuple(origin.serve(f"/{name}", ROWS) for name in ("a.jsonl", "b%20c.jsonl"))

    (file,) = fetch.fetch(Source(urls=urls, within="b c.jsonl"), tmp_path, policy=LOOPBACK)
    with pytest.raises(SpecError, match=r'FETCH-126 .*names "c.jsonl".*a.jsonl, b c.jsonl'):
        fetch.check(Source(urls=urls, within="c.jsonl"), policy=LOOPBACK)

    assert file.shown.endswith("b%20c.jsonl")


def test_a_mounted_config_map_is_read_through_its_links(tmp_path: Path) -> None:
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..2026" / "rows.jsonl").write_bytes(ROWS)
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "rows.jsonl").symlink_to("..data/rows.jsonl")

    (file,) = fetch.fetch(Source(folder=tmp_path), tmp_path / "data", policy=Policy())

    assert f"{tmp_path}/rows.jsonl" == file.shown


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("token")
    (tmp_path / "in" / "rows.jsonl").symlink_to("../secret")

    with pytest.raises(DataError, match=r"FETCH-125"):
        fetch.fetch(Source(folder=tmp_path / "in"), tmp_path / "data", policy=Policy())


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"FETCH-124"):
        fetch.fetch(Source(folder=tmp_path), tmp_path / "data", policy=Policy())
    with pytest.raises(DataError, match=r"FETCH-123 .*does not exist"):
        fetch.fetch(Source(folder=tmp_path / "none"), tmp_path / "data", policy=Policy())


def test_an_image_is_pulled_once(tmp_path: Path) -> None:
    pulled: list[str] = []

    def pull(reference: str, folder: Path) -> None:
        pulled.append(reference)
        (folder / "rows.jsonl").write_bytes(ROWS)

    for _ in range(2):
        source = Source(image="registry.example/rows:1")
        (file,) = fetch.fetch(source, tmp_path, policy=Policy(), pull_image=pull)
        assert ("registry.example/rows:1:/data/rows.jsonl", sha(ROWS)) == (file.shown, file.sha256)

    assert ["registry.example/rows:1"] == pulled


def test_a_broken_pull_leaves_nothing_behind_as_finished(tmp_path: Path) -> None:
    def broken(reference: str, folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise TransientError.at("REG-1", reference, "broke", "again")

    def good(reference: str, folder: Path) -> None:
        (folder / "rows.jsonl").write_bytes(ROWS)

    source = Source(image="registry.example/rows:1")
    with pytest.raises(TransientError):
        fetch.fetch(source, tmp_path, policy=Policy(), pull_image=broken)

    (file,) = fetch.fetch(source, tmp_path, policy=Policy(), pull_image=good)

    assert "rows.jsonl" == file.path.name


def test_fetch_loads_no_torch_and_no_hub() -> None:
    code = (
        "import sys, tuning.sources.fetch, tuning.sources.base\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'huggingface_hub', 'oras')))"
    )

    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode


# -- the hub ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("hf://datasets/org/rows/data/a.jsonl", "/datasets/org/rows/resolve/main/data/a.jsonl"),
        ("hf://datasets/org/rows@v1.0/a.jsonl", "/datasets/org/rows/resolve/v1.0/a.jsonl"),
        ("hf://datasets/org/rows@refs%2Fpr%2F1/a.csv", None),
        ("hf://org/model/a.jsonl", "/org/model/resolve/main/a.jsonl"),
    ],
)
def test_files_of_the_hub_come_through_its_resolve_addresses(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, path: str | None
) -> None:
    """hf:// is the hub's address spelled short: HF_ENDPOINT, checksums and policy hold as ever."""
    path = path or "/datasets/org/rows/resolve/refs%2Fpr%2F1/a.csv"
    served = origin.serve(path, b"x" * 100)
    monkeypatch.setenv("HF_ENDPOINT", served.removesuffix(path))

    (file,) = get(tmp_path, f"{url}#sha256={sha(b'x' * 100)}")

    assert (served, 100) == (file.shown, file.size)
    with pytest.raises(SpecError, match="FETCH-101"):
        get(tmp_path / "b", url, policy=Policy())


@pytest.mark.parametrize(
    "url",
    [
        "hf://datasets/o/n/../../x",
        "hf://datasets/o/n/%2e%2e/x",
        "hf://datasets/o/n@..%2Fx/a",
        "hf://u:p@h/o/n/a?b",
        "hf://",
    ],
)
def test_what_is_no_file_of_the_hub_is_refused(tmp_path: Path, url: str) -> None:
    """Too few parts, climbing, a query: refused by its text, without a connection."""
    with pytest.raises(SpecError, match="FETCH-101"):
        get(tmp_path, url)
