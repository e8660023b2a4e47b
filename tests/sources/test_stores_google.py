"""Google Cloud Storage: signed URLs that Google's own library would have made.

The store on loopback judges a signature with google-cloud-storage, never with ours.
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from clouds import POD, Cloud
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from faults.proxy import Reply, Turn
from faults.web import Origin, Request
from google.cloud.storage import _signing
from google.oauth2 import service_account

from tuning.errors import RefusedError, SpecError
from tuning.network.policy import Policy
from tuning.network.retry import Patience
from tuning.sources import fetch, stores
from tuning.sources.http import Limits
from tuning.sources.local import File
from tuning.sources.stores import Keys, load_keys
from tuning.spec import Source, urls

ROWS = b"".join(b'{"prompt": "%d", "completion": "%d"}\n' % (n, n * n) for n in range(4000))
LOOPBACK = Policy(allow_hosts={"127.0.0.1"})
RETRY = Patience(tries=3, first=0.01, longest=0.02)
QUICK = Limits(connect=2, stall=2, retry=RETRY)
TOKEN, WHERE = "ya29.canary", "the Secret rows"


def key_file(**changes: Any) -> dict[str, Any]:
    """What Google gives who makes a key of a service account."""
    key = changes.pop("key", None) or rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return {
        "type": "service_account",
        "private_key_id": "canary",
        "private_key": pem.decode(),
        "client_email": "reader@rows.iam.gserviceaccount.com",
        "token_uri": "https://oauth2.googleapis.com/token",
    } | changes


@pytest.fixture(scope="module")
def account() -> dict[str, Any]:
    return key_file()


@dataclass
class Bucket:
    """A store of one bucket, `rows`, that a service account and a token may read."""

    origin: Origin
    account: dict[str, Any]

    def put(self, key: str, body: bytes, **options: Any) -> None:
        path = f"/rows/{key}"
        self.origin.serve(path, body, **options)
        good = self.origin._routes[path]

        def behave(request: Request) -> None:
            status, code = (200, "") if key.startswith("public/") else self.judge(request)
            if not code:
                return good(request)
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code>canary</Error>".encode()
            request.head(status, Content_Length=len(body))
            return request.body(body)

        self.origin.route(path, behave)

    def judge(self, request: Request) -> tuple[int, str]:
        """Google's status and code for what is wrong with a request, or no code."""
        told = request.headers.get("authorization", "")
        if told:
            return (200, "") if told == f"Bearer {TOKEN}" else (401, "AuthenticationRequired")
        asked = request.handler.path
        query = {name: values[0] for name, values in parse_qs(urlsplit(asked).query).items()}
        if "X-Goog-Signature" not in query:
            return 403, "AccessDenied"
        credentials = service_account.Credentials.from_service_account_info(self.account)
        good = _signing.generate_signed_url_v4(
            credentials,
            urlsplit(asked).path,
            int(query["X-Goog-Expires"]),
            api_access_endpoint=self.origin.url(""),
            _request_timestamp=query["X-Goog-Date"],
        )
        if good != self.origin.url(asked):
            return 403, "SignatureDoesNotMatch"
        return 200, ""

    def keys(self, **changes: str) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": self.origin.url(""), **changes}

    def by_account(self, **changes: Any) -> dict[str, str]:
        return self.keys(GOOGLE_APPLICATION_CREDENTIALS=json.dumps(self.account | changes))


@pytest.fixture
def bucket(account: dict[str, Any]) -> Iterator[Bucket]:
    with Origin() as server:
        yield Bucket(server, account)


def get(folder: Path, url: str, values: dict[str, str], policy: Policy = LOOPBACK) -> File:
    (file,) = fetch.fetch(
        Source(urls=(url,)), folder, policy=policy, keys=Keys(values, WHERE), limits=QUICK
    )
    return file


# -- what the text of a URL and of the keys mean ----------------------------------------------


def test_a_url_of_google_is_an_address() -> None:
    store = stores.of("gs://my.rows/a/b c.jsonl".replace(" ", "%20"), Keys())

    assert store and "https://storage.googleapis.com/my.rows/a/b%20c.jsonl" == store.address


def test_a_pattern_is_no_file() -> None:
    assert urls.NOT_ONE_FILE == urls.refusal("gs://rows/*.jsonl")
    assert urls.refusal("gs://rows/a.jsonl") is None


EC = ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"GOOGLE_APPLICATION_CREDENTIALS": "/canary.json"}, "is not a key file of Google's"),
        ({"GOOGLE_APPLICATION_CREDENTIALS": '["canary"]'}, "is not a key file of Google's"),
        (
            {"GOOGLE_APPLICATION_CREDENTIALS": '{"type": "authorized_user", "x": "canary"}'},
            "GOOGLE_OAUTH_ACCESS_TOKEN to what `gcloud auth print-access-token` prints",
        ),
        (
            {"GOOGLE_APPLICATION_CREDENTIALS": '{"type": "service_account", "private_key": "x"}'},
            "no readable private key",
        ),
        ({"GOOGLE_APPLICATION_CREDENTIALS": json.dumps(key_file(key=EC))}, "no RSA key"),
        ({"GOOGLE_OAUTH_ACCESS_TOKEN": "canary\r\nX-Evil: 1"}, "contains a line break"),
        ({"STORAGE_EMULATOR_HOST": "localhost:9023"}, "STORAGE_EMULATOR_HOST is not a URL"),
    ],
)
def test_keys_that_cannot_be_meant_are_refused_before_a_request(
    values: dict[str, str], said: str
) -> None:
    with pytest.raises(SpecError, match=f"FETCH-107 .*{said}") as caught:
        stores.of("gs://rows/a", Keys(values, WHERE))

    assert "canary" not in str(caught.value)


def test_in_the_environment_the_key_file_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, account: dict[str, Any]
) -> None:
    """As Google's own tools have it; in a Secret it is the file itself."""
    (tmp_path / "key.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    store = stores.of("gs://rows/a", stores.load_keys(None))
    assert store and "X-Goog-Signature=" in store.signed({}).url

    (tmp_path / "GOOGLE_APPLICATION_CREDENTIALS").write_text(json.dumps(account, indent=2))
    store = stores.of("gs://rows/a", stores.load_keys(tmp_path))
    assert store and "X-Goog-Signature=" in store.signed({}).url


def test_a_path_that_leads_nowhere_disturbs_only_who_asks_google(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere.json")

    keys = stores.load_keys(None)

    assert stores.of("s3://rows/a", keys)
    with pytest.raises(SpecError, match="FETCH-107 the environment"):
        stores.of("gs://rows/a", keys)


# -- what the store lets in -------------------------------------------------------------------


@pytest.mark.parametrize("key", ["rows.jsonl", "a%20b/c+d%C3%A4~(1)'=&@:,.jsonl"])
def test_a_service_account_opens_a_private_bucket(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    """Also where the name has characters that are spelled in several ways."""
    caplog.set_level(logging.DEBUG)
    found = urls.in_store(f"gs://rows/{key}")
    assert found
    bucket.put(found[2], ROWS)

    file = get(tmp_path, f"gs://rows/{key}", bucket.by_account())

    written = b"".join(path.read_bytes() for path in tmp_path.glob("*.json"))
    assert (ROWS, f"gs://rows/{key}") == (file.path.read_bytes(), file.shown)
    assert b"X-Goog" not in written and "X-Goog" not in caplog.text


def test_a_transfer_that_breaks_off_goes_on_with_the_rest(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("a", ROWS, cut_at=50_000, reset=False)

    file = get(tmp_path, "gs://rows/a", bucket.by_account())

    first, second = bucket.origin.asked("/rows/a")
    assert ROWS == file.path.read_bytes()
    assert "bytes=50000-" == second["range"] and "range" not in first


def test_what_is_stored_compressed_comes_as_it_is(bucket: Bucket, tmp_path: Path) -> None:
    """Unpacked on the way it would have no length, and nothing could go on."""
    packed = gzip.compress(ROWS)
    bucket.put("a", packed, Content_Encoding="gzip")

    file = get(tmp_path, "gs://rows/a", bucket.by_account())

    assert "gzip" == bucket.origin.asked("/rows/a")[0]["accept-encoding"]
    assert packed == file.path.read_bytes()


def test_the_same_url_in_another_store_is_another_file(
    bucket: Bucket, tmp_path: Path, account: dict[str, Any]
) -> None:
    """Who corrects the keys gets the right store's file, not what is there already."""
    bucket.put("a", ROWS)
    get(tmp_path, "gs://rows/a", bucket.by_account())
    with Origin() as server:
        other = Bucket(server, account)
        other.put("a", ROWS[:100])

        assert 100 == get(tmp_path, "gs://rows/a", other.by_account()).size


def test_an_access_token_opens_it_too(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("a", ROWS)

    assert len(ROWS) == get(
        tmp_path, "gs://rows/a", bucket.keys(GOOGLE_OAUTH_ACCESS_TOKEN=TOKEN)
    ).size  # fmt: skip


def test_a_public_object_needs_no_key(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("public/a", ROWS)

    assert len(ROWS) == get(tmp_path, "gs://rows/public/a", bucket.keys()).size
    assert "authorization" not in bucket.origin.asked("/rows/public/a")[0]


def test_check_sees_size_and_first_bytes(bucket: Bucket) -> None:
    bucket.put("a", ROWS)

    (seen,) = fetch.check(
        Source(urls=("gs://rows/a",)), policy=LOOPBACK, keys=Keys(bucket.by_account()), head=100
    )

    assert ("gs://rows/a", len(ROWS), ROWS[:100]) == (seen.shown, seen.size, seen.head)


# -- refusals in words ------------------------------------------------------------------------


def test_a_key_of_another_account_is_named(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("a", ROWS)
    values = bucket.by_account(private_key=key_file()["private_key"])

    with pytest.raises(RefusedError, match=r"FETCH-111 .*does not fit its service acc") as caught:
        get(tmp_path, "gs://rows/a", values)

    assert f"GOOGLE_APPLICATION_CREDENTIALS of {WHERE}" in str(caught.value)
    assert "canary" not in str(caught.value) and 1 == len(bucket.origin.asked("/rows/a"))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"GOOGLE_OAUTH_ACCESS_TOKEN": "ya29.old"}, "renew GOOGLE_OAUTH_ACCESS_TOKEN"),
        ({}, "is not public, or not there, and there is no key"),
    ],
)
def test_what_is_private_is_told(
    bucket: Bucket, tmp_path: Path, values: dict[str, str], said: str
) -> None:
    bucket.put("a", ROWS)

    with pytest.raises(RefusedError, match=f"FETCH-111 .*{said}"):
        get(tmp_path, "gs://rows/a", bucket.keys(**values))


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "NoSuchKey", "FETCH-110 .*no such object"),
        (404, "NoSuchBucket", "FETCH-110 .*no such bucket"),
        (403, "AccessDenied", "FETCH-111 .*Storage Object Viewer.* to reader@rows"),
        (400, "ExpiredToken", "FETCH-111 .*set the clock"),
        (400, "UserProjectMissing", "FETCH-111 .*requester-pays"),
    ],
)
def test_googles_codes_have_words_of_ours(
    bucket: Bucket, tmp_path: Path, status: int, code: str, said: str
) -> None:
    bucket.origin.answer("/rows/a", status, f"<Error><Code>{code}</Code></Error>".encode())

    with pytest.raises(RefusedError, match=said):
        get(tmp_path, "gs://rows/a", bucket.by_account())


# -- where a signature may go -----------------------------------------------------------------


def test_a_redirect_does_not_carry_the_signature(bucket: Bucket, tmp_path: Path) -> None:
    with Origin() as other:
        there = other.serve("/blob", ROWS)
        bucket.origin.route("/rows/a", lambda r: r.head(307, Location=there, Content_Length=0))

        get(tmp_path, "gs://rows/a", bucket.by_account())

        assert "X-Goog-Signature" in bucket.origin.requests[0][0]
        assert "X-Goog" not in other.requests[0][0]


def test_a_signed_url_does_not_cross_the_network_readably(
    tmp_path: Path, account: dict[str, Any]
) -> None:
    values = {
        "STORAGE_EMULATOR_HOST": "http://gcs.example",
        "GOOGLE_APPLICATION_CREDENTIALS": json.dumps(account),
    }

    with pytest.raises(SpecError, match="FETCH-106"):
        get(tmp_path, "gs://rows/a", values, Policy())


# -- who is logged in, instead of a key ---------------------------------------------------------


def google_service() -> Cloud:
    """Tokens for who said `gcloud auth application-default login`, and for a federated pod."""

    def give(form: dict[str, Any], turn: Turn) -> Any:
        user = {"grant_type": "refresh_token", "client_id": "gcloud", "refresh_token": "1//canary"}
        if "audience" in form:
            good = (form["audience"], form["subjectToken"]) == ("//iam/providers/p", POD)
            return {"access_token": "federated", "expires_in": 60} if good else Reply(400)
        if not user.items() <= form.items():
            return Reply(400, [], b'{"error": "invalid_grant", "error_description": "canary"}')
        return {"access_token": TOKEN, "expires_in": 3600}

    def act(form: dict[str, Any], turn: Turn) -> Any:
        if turn.seen.headers["authorization"] != "Bearer federated":
            return Reply(403, [], b'{"error": {"status": "PERMISSION_DENIED"}}')
        return {"accessToken": TOKEN, "expireTime": "2030-01-01T00:00:00Z"}

    return Cloud(token=give, **{"reader@rows.iam:generateAccessToken": act})


def person(cloud: Cloud, **changes: str) -> dict[str, str]:
    """What gcloud writes."""
    given = {"client_id": "gcloud", "client_secret": "canary", "refresh_token": "1//canary"}
    uri = {"token_uri": f"http://{cloud.host}/token"}
    return {"type": "authorized_user", **given, **uri, **changes}


def federated(cloud: Cloud, file: Path, **changes: Any) -> dict[str, Any]:
    """What `gcloud iam workload-identity-pools create-cred-config` writes."""
    acts = f"http://{cloud.host}/v1/projects/-/serviceAccounts/reader@rows.iam:generateAccessToken"
    return {
        "type": "external_account",
        "audience": "//iam/providers/p",
        "token_url": f"http://{cloud.host}/token",
        "credential_source": {"file": str(file), "format": {"type": "text"}},
        "service_account_impersonation_url": acts,
    } | changes


def logged_in(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, path: Path | None = None) -> Keys:
    """The keys of an environment that names `path`, or nothing."""
    for name in ("GOOGLE_OAUTH_ACCESS_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    if path:
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.origin.url(""))
    return load_keys(None, LOOPBACK)


def fetched(folder: Path, url: str, keys: Keys) -> File:
    (file,) = fetch.fetch(Source(urls=(url,)), folder, policy=LOOPBACK, keys=keys, limits=QUICK)
    return file


def test_gclouds_default_login_opens_a_private_bucket(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Found where gcloud keeps it; nobody is asked for what everybody may read."""
    caplog.set_level(logging.DEBUG)
    bucket.put("a.jsonl", ROWS)
    bucket.put("public/b.jsonl", ROWS)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    with google_service() as cloud:
        path = tmp_path / "application_default_credentials.json"
        path.write_text(json.dumps(person(cloud)))
        keys = logged_in(bucket, monkeypatch)

        assert len(ROWS) == fetched(tmp_path / "1", "gs://rows/public/b.jsonl", keys).size
        assert [] == cloud.seen
        assert len(ROWS) == fetched(tmp_path / "2", "gs://rows/a.jsonl", keys).size
    assert "canary" not in caplog.text


def test_a_federated_pod_acts_as_its_service_account(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("a.jsonl", ROWS)
    (tmp_path / "token").write_text(POD)
    with google_service() as cloud:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(federated(cloud, tmp_path / "token")))
        keys = logged_in(bucket, monkeypatch, path)

        assert len(ROWS) == fetched(tmp_path / "1", "gs://rows/a.jsonl", keys).size


def test_a_login_that_has_ended_is_said_so(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("a.jsonl", ROWS)
    with google_service() as cloud:
        path = tmp_path / "person.json"
        path.write_text(json.dumps(person(cloud, refresh_token="old")))
        keys = logged_in(bucket, monkeypatch, path)
        with pytest.raises(RefusedError) as caught:
            fetched(tmp_path / "1", "gs://rows/a.jsonl", keys)

    told = str(caught.value)
    assert "FETCH-111 input.urls[0] gs://rows/a.jsonl: Google refuses the identity" in told
    assert "(invalid_grant)" in told and "gcloud auth application-default login" in told
    assert "canary" not in told


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_url": "https://evil.example/token"}, "token_url that is not Google's"),
        ({"credential_source": {"url": "http://169.254.169.254/"}}, "credential_source.file"),
        ({"credential_source": {"file": "/t", "format": {"type": "json"}}}, "token in JSON"),
        ({"service_account_impersonation_url": "https://evil.example/x"}, "not Google's"),
    ],
)
def test_a_federation_that_leads_elsewhere_is_refused(
    bucket: Bucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    said: str,
) -> None:
    """Before a word of the pod's token goes anywhere."""
    with google_service() as cloud:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(federated(cloud, tmp_path / "token", **changes)))
        keys = logged_in(bucket, monkeypatch, path)
        if "token_url" in changes:  # no emulator's: its token would not be sent there
            with pytest.raises(RefusedError):
                fetched(tmp_path / "1", "gs://rows/a.jsonl", keys)
        else:
            with pytest.raises(SpecError, match=f"FETCH-107.*{said}"):
                fetched(tmp_path / "1", "gs://rows/a.jsonl", keys)
        assert [] == cloud.seen
