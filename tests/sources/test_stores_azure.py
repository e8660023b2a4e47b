"""Azure Blob Storage: read from Azurite, Microsoft's emulator, which judges every signature."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from azurite import ACCOUNT, KEY, Azurite
from clouds import POD, Cloud
from faults.proxy import Reply, Turn
from faults.web import Origin
from registries import Certificate

from tuning.errors import RefusedError, SpecError
from tuning.network.policy import Policy
from tuning.network.retry import Patience
from tuning.sources import fetch, stores
from tuning.sources.http import Limits, Web
from tuning.sources.local import File
from tuning.sources.stores import Keys, load_keys
from tuning.spec import Source, urls

ROWS = b"".join(b'{"prompt": "%d", "completion": "%d"}\n' % (n, n * n) for n in range(4000))
LOOPBACK = Policy(allow_hosts={"127.0.0.1"})
RETRY = Patience(tries=3, first=0.01, longest=0.02)
QUICK = Limits(connect=2, stall=5, retry=RETRY)
WHERE = "the Secret rows"


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with Azurite(tmp_path_factory.mktemp("azurite")) as running:
        running.put("rows", "a.jsonl", ROWS)
        running.put("open", "a.jsonl", ROWS, public="blob")
        yield running


def get(folder: Path, url: str, values: dict[str, str], **more: Any) -> File:
    policy = more.pop("policy", LOOPBACK)
    (file,) = fetch.fetch(
        Source(urls=(url,)), folder, policy=policy, keys=Keys(values, WHERE), limits=QUICK, **more
    )
    return file


# -- what the text of a URL and of the keys mean ----------------------------------------------


@pytest.mark.parametrize(
    ("values", "address"),
    [
        ({"AZURE_STORAGE_ACCOUNT_NAME": "me1"}, "https://me1.blob.core.windows.net/rows/a/b%20c"),
        ({"AZURE_STORAGE_ACCOUNT": "me1"}, "https://me1.blob.core.windows.net/rows/a/b%20c"),
        (
            {
                "AZURE_STORAGE_CONNECTION_STRING": "DefaultEndpointsProtocol=https;"
                f"AccountName=me1;AccountKey={KEY};EndpointSuffix=core.chinacloudapi.cn"
            },
            "https://me1.blob.core.chinacloudapi.cn/rows/a/b%20c",
        ),
        (
            {"AZURE_STORAGE_CONNECTION_STRING": "BlobEndpoint=https://blobs.corp:10000/me1/"},
            "https://blobs.corp:10000/me1/rows/a/b%20c",
        ),
    ],
)
def test_a_url_of_azure_is_an_address_of_its_account(values: dict[str, str], address: str) -> None:
    store = stores.of("az://rows/a/b%20c", Keys(values))

    assert store is not None and address == store.address


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "needs the name of the storage account"),
        ({"AZURE_STORAGE_ACCOUNT_NAME": "evil.example/"}, "not a storage account's name"),
        (
            {"AZURE_STORAGE_ACCOUNT_NAME": "me1", "AZURE_STORAGE_KEY": "canary!"},
            "not a storage account's key",
        ),
        (
            {"AZURE_STORAGE_ACCOUNT_NAME": "me1", "AZURE_STORAGE_SAS_TOKEN": "canary"},
            "not a shared",
        ),
        (
            {"AZURE_STORAGE_ACCOUNT_NAME": "me1", "AZURE_STORAGE_SAS_TOKEN": "sig=a#b"},
            "not a shared",
        ),
        ({"AZURE_STORAGE_CONNECTION_STRING": "canary"}, "is not a connection string"),
        ({"AZURE_STORAGE_CONNECTION_STRING": "BlobEndpoint=blobs:10000"}, "is not a URL"),
        (
            {
                "AZURE_STORAGE_CONNECTION_STRING": "AccountName=me1",
                "AZURE_STORAGE_ACCOUNT": "you2",
            },
            "name two accounts",
        ),
        (
            {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=me1;EndpointSuffix=evil.example/x?"},
            "EndpointSuffix",
        ),
    ],
)
def test_keys_that_cannot_be_meant_are_refused_before_a_request(
    values: dict[str, str], said: str
) -> None:
    """They become part of a host's name, or of a query."""
    with pytest.raises(SpecError, match=f"FETCH-107 .*{said}") as caught:
        stores.of("az://rows/a", Keys(values))

    assert "canary" not in str(caught.value)


def test_a_folder_is_no_file() -> None:
    assert urls.NOT_ONE_FILE == urls.refusal("az://rows/folder/")
    assert urls.refusal("az://rows/a.jsonl") is None


# -- what Azurite lets in ---------------------------------------------------------------------


@pytest.mark.parametrize("key", ["a.jsonl", "b/a%20b+c%C3%A4~(1)'=&@:,.jsonl"])
def test_the_accounts_key_opens_a_private_container(
    azurite: Azurite, tmp_path: Path, key: str
) -> None:
    """Also where the name has characters that are spelled in several ways."""
    from urllib.parse import unquote

    azurite.put("rows", unquote(key), ROWS)

    file = get(tmp_path, f"az://rows/{key}", azurite.keys(AZURE_STORAGE_ACCOUNT_KEY=KEY))

    assert (ROWS, f"az://rows/{key}") == (file.path.read_bytes(), file.shown)


def test_a_connection_string_is_all_that_is_needed(azurite: Azurite, tmp_path: Path) -> None:
    values = {"AZURE_STORAGE_CONNECTION_STRING": azurite.connection}

    assert len(ROWS) == get(tmp_path, "az://rows/a.jsonl", values).size


@pytest.mark.parametrize("mark", ["", "?"])
def test_a_shared_access_signature_opens_what_it_was_made_for(
    azurite: Azurite, tmp_path: Path, caplog: pytest.LogCaptureFixture, mark: str
) -> None:
    """It wins over a key, which opens more; no log and no file of ours ever holds it."""
    caplog.set_level(logging.DEBUG)
    made = azurite.sas("rows", "a.jsonl")
    values = azurite.keys(AZURE_STORAGE_SAS_TOKEN=mark + made, AZURE_STORAGE_ACCOUNT_KEY="AAAA")

    file = get(tmp_path, "az://rows/a.jsonl", values)

    signature = made.rpartition("sig=")[2].partition("&")[0]
    written = b"".join(path.read_bytes() for path in tmp_path.glob("*.json"))
    assert len(ROWS) == file.size
    assert signature not in caplog.text and signature.encode() not in written


def test_a_connection_string_with_a_key_is_used_whole(azurite: Azurite, tmp_path: Path) -> None:
    """A signature that lies about beside it may be another account's: it goes nowhere."""
    values = {
        "AZURE_STORAGE_CONNECTION_STRING": azurite.connection,
        "AZURE_STORAGE_SAS_TOKEN": "sv=1&sig=canary",
    }

    assert len(ROWS) == get(tmp_path, "az://rows/a.jsonl", values).size


def test_a_plus_in_a_signature_is_no_space(azurite: Azurite, tmp_path: Path) -> None:
    """Some tools show it undone."""
    for number in range(100):
        made = azurite.sas("rows", "a.jsonl", minutes=10 + number)
        if "%2B" in made:
            break
    values = azurite.keys(AZURE_STORAGE_SAS_TOKEN=made.replace("%2B", "+"))

    assert len(ROWS) == get(tmp_path, "az://rows/a.jsonl", values).size


def test_a_public_blob_needs_no_key(azurite: Azurite, tmp_path: Path) -> None:
    assert len(ROWS) == get(tmp_path, "az://open/a.jsonl", azurite.keys()).size


def test_a_transfer_goes_on_where_it_was(azurite: Azurite, tmp_path: Path) -> None:
    """The range is part of what is signed, and the emulator sends only the rest."""
    values = azurite.keys(AZURE_STORAGE_ACCOUNT_KEY=KEY)
    whole = get(tmp_path / "whole", "az://rows/a.jsonl", values)
    source = Source(urls=("az://rows/a.jsonl",))
    item = fetch._items(source, LOOPBACK, Keys(values), ())[0]
    web = Web(LOOPBACK, {}, QUICK)
    response = web.get(item, {"Range": "bytes=50000-"})
    rest = response.read()
    response.close()

    assert (206, ROWS[50_000:]) == (response.status, rest)
    assert hashlib.sha256(ROWS).hexdigest() == whole.sha256


def test_check_sees_size_and_first_bytes(azurite: Azurite) -> None:
    (seen,) = fetch.check(
        Source(urls=("az://rows/a.jsonl",)),
        policy=LOOPBACK,
        keys=Keys({"AZURE_STORAGE_CONNECTION_STRING": azurite.connection}),
        head=100,
    )

    assert ("az://rows/a.jsonl", len(ROWS), ROWS[:100]) == (seen.shown, seen.size, seen.head)


# -- refusals in words ------------------------------------------------------------------------


def refused(azurite: Azurite, folder: Path, url: str, **values: str) -> str:
    with pytest.raises(RefusedError, match=r"FETCH-11[01] input.urls\[0\] az://") as caught:
        get(folder, url, azurite.keys(**values))
    assert KEY not in str(caught.value) and "sig=" not in str(caught.value)
    return str(caught.value)


def test_wrong_keys_are_named(azurite: Azurite, tmp_path: Path) -> None:
    """Which key of which Secret, never a value."""
    said = refused(azurite, tmp_path, "az://rows/a.jsonl", AZURE_STORAGE_ACCOUNT_KEY="Y2FuYXJ5")

    assert f"correct AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_ACCOUNT_NAME in {WHERE}" in said


def test_a_wrong_key_in_a_connection_string_is_named_by_it(
    azurite: Azurite, tmp_path: Path
) -> None:
    wrong = azurite.connection.replace(KEY, "Y2FuYXJ5")

    said = refused(azurite, tmp_path, "az://rows/a.jsonl", AZURE_STORAGE_CONNECTION_STRING=wrong)

    assert f"correct AZURE_STORAGE_CONNECTION_STRING in {WHERE}" in said


def test_a_signature_that_has_ended_says_when(azurite: Azurite, tmp_path: Path) -> None:
    ended = azurite.sas("rows", "a.jsonl", minutes=-10)

    said = refused(azurite, tmp_path, "az://rows/a.jsonl", AZURE_STORAGE_SAS_TOKEN=ended)

    assert "signature ended at 20" in said and f"renew AZURE_STORAGE_SAS_TOKEN in {WHERE}" in said


def test_a_signature_that_has_not_begun_says_when(azurite: Azurite, tmp_path: Path) -> None:
    later = azurite.sas("rows", "a.jsonl", minutes=120, start=60)

    said = refused(azurite, tmp_path, "az://rows/a.jsonl", AZURE_STORAGE_SAS_TOKEN=later)

    assert "signature begins at 20" in said


def test_a_signature_that_may_not_read_is_told(azurite: Azurite, tmp_path: Path) -> None:
    writes = azurite.sas("rows", "a.jsonl", permission="w")

    said = refused(azurite, tmp_path, "az://rows/a.jsonl", AZURE_STORAGE_SAS_TOKEN=writes)

    assert "with the permission r" in said


@pytest.mark.parametrize(
    ("url", "with_key", "said"),
    [
        ("az://rows/b.jsonl", True, "there is no such blob"),
        ("az://nothing/b.jsonl", True, "there is no such container in the account wilmas"),
        ("az://rows/a.jsonl", False, "put AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN"),
    ],
)
def test_what_is_missing_or_private_is_told(
    azurite: Azurite, tmp_path: Path, url: str, with_key: bool, said: str
) -> None:
    values = {"AZURE_STORAGE_ACCOUNT_KEY": KEY} if with_key else {}

    assert said in refused(azurite, tmp_path, url, **values)


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "AuthorizationFailure", "its firewall blocks this machine"),
        (403, "AuthenticationFailed", "set the machine's clock"),
        (403, "KeyBasedAuthenticationNotPermitted", "put a user delegation SAS into"),
        (409, "PublicAccessNotPermitted", "is not public"),
        (409, "BlobArchived", "rehydrate it"),
        (403, "SomethingNew", "check AZURE_STORAGE_ACCOUNT_KEY"),
    ],
)
def test_what_only_the_service_says_has_words_of_ours(
    tmp_path: Path, status: int, code: str, said: str
) -> None:
    """The emulator knows neither firewalls nor archives."""
    with Origin() as server:
        body = f"<Error><Code>{code}</Code><Message>canary</Message></Error>".encode()
        server.answer("/wilmas/rows/a", status, body)
        values = {
            "AZURE_STORAGE_CONNECTION_STRING": f"BlobEndpoint={server.url('/wilmas')}",
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        }

        with pytest.raises(RefusedError, match=f"FETCH-111 .*{said}") as caught:
            get(tmp_path, "az://rows/a", values)

    assert "canary" not in str(caught.value)


# -- where a signature may go -----------------------------------------------------------------


def test_a_redirect_carries_neither_headers_nor_the_query(tmp_path: Path) -> None:
    with Origin() as server, Origin() as other:
        there = other.serve("/blob", ROWS)
        server.route("/w/rows/a", lambda r: r.head(307, Location=there, Content_Length=0))
        values = {
            "AZURE_STORAGE_CONNECTION_STRING": f"BlobEndpoint={server.url('/w')};AccountName=me1;"
            "SharedAccessSignature=sv=1&sig=canary"
        }

        get(tmp_path, "az://rows/a", values)

        assert "canary" in server.requests[0][0]
        assert not [name for name in other.asked("/blob")[0] if name.startswith("x-ms-")]
        assert "canary" not in other.requests[0][0]


def test_a_signature_in_a_query_does_not_cross_the_network_readably(tmp_path: Path) -> None:
    values = {
        "AZURE_STORAGE_CONNECTION_STRING": "BlobEndpoint=http://blobs.example;"
        "SharedAccessSignature=sv=1&sig=canary"
    }

    with pytest.raises(SpecError, match="FETCH-106"):
        get(tmp_path, "az://rows/a", values, policy=Policy())


# -- a pod's identity instead of a key ----------------------------------------------------------

NOW = int(time.time())
CLAIMS = {
    "iss": "https://sts.windows.net/our-tenant/",
    "aud": "https://storage.azure.com",
    "nbf": NOW - 60,
    "iat": NOW - 60,
    "exp": NOW + 3600,
    "ver": "1.0",
}


def entra(**changes: Any) -> Cloud:
    """Gives tokens that Azurite judges by issuer, audience and time to who shows the pod's."""

    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    def give(form: dict[str, Any], turn: Turn) -> Any:
        asked = {"grant_type": "client_credentials", "client_id": "our-client"}
        asked |= {"client_assertion": POD, "scope": "https://storage.azure.com/.default"}
        if not asked.items() <= form.items():
            return Reply(401, [], b'{"error": "invalid_client"}')
        token = f"{part({'alg': 'none', 'typ': 'JWT'})}.{part(CLAIMS | changes)}.x"
        return {"access_token": token, "expires_in": 3600}

    return Cloud(**{"our-tenant_oauth2_v2.0_token": give})


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """An emulator that lets identities in, by https alone, as Azure does."""
    certificate = Certificate(tmp_path_factory.mktemp("certificate"))
    with Azurite(tmp_path_factory.mktemp("secure"), certificate) as running:
        running.put("rows", "a.jsonl", ROWS)
        running.put("open", "a.jsonl", ROWS, public="blob")
        yield running


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Keys]:
    """A pod's keys, whose environment is as the webhook of Azure writes it."""

    def enter(store: Azurite, cloud: Cloud, **more: str) -> Keys:
        assert store.certificate
        (tmp_path / "token").write_text(POD)
        monkeypatch.setenv("AZURE_TENANT_ID", "our-tenant")
        monkeypatch.setenv("AZURE_CLIENT_ID", "our-client")
        monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AZURE_AUTHORITY_HOST", f"http://{cloud.host}/")
        mounted = tmp_path / "secret"
        mounted.mkdir()
        for name, value in store.keys(**more).items():
            (mounted / name).write_text(value)
        return load_keys(mounted, trusting(store))

    return enter


def trusting(store: Azurite) -> Policy:
    assert store.certificate
    return Policy(allow_hosts={"127.0.0.1"}, ca_bundle=store.certificate.ca)


def fetched(folder: Path, url: str, store: Azurite, keys: Keys) -> File:
    policy = trusting(store)
    (file,) = fetch.fetch(Source(urls=(url,)), folder, policy=policy, keys=keys, limits=QUICK)
    return file


def test_a_pods_identity_opens_a_private_container(
    secure: Azurite, tmp_path: Path, pod: Callable[..., Keys], caplog: pytest.LogCaptureFixture
) -> None:
    """The pod's token, one of Entra, the blob; nobody is asked for what everybody may read."""
    caplog.set_level(logging.DEBUG)
    with entra() as cloud:
        keys = pod(secure, cloud)

        assert len(ROWS) == fetched(tmp_path / "1", "az://open/a.jsonl", secure, keys).size
        assert [] == cloud.seen
        assert len(ROWS) == fetched(tmp_path / "2", "az://rows/a.jsonl", secure, keys).size
        assert 1 == len(cloud.seen)
    assert POD not in caplog.text and "eyJ" not in caplog.text


def test_an_identity_without_rights_is_named(
    secure: Azurite, tmp_path: Path, pod: Callable[..., Keys]
) -> None:
    with entra(aud="https://vault.azure.net") as cloud, pytest.raises(RefusedError) as caught:
        fetched(tmp_path / "1", "az://rows/a.jsonl", secure, pod(secure, cloud))

    told = str(caught.value)
    assert "refuses access to the identity our-client" in told
    assert "Storage Blob Data Reader" in told


def test_a_key_comes_before_the_identity(
    secure: Azurite, tmp_path: Path, pod: Callable[..., Keys]
) -> None:
    with entra() as cloud:
        keys = pod(secure, cloud, AZURE_STORAGE_ACCOUNT_KEY=KEY)

        assert len(ROWS) == fetched(tmp_path / "1", "az://rows/a.jsonl", secure, keys).size
        assert [] == cloud.seen
