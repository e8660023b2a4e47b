"""Object stores: one file of a bucket, fetched as any other, each request signed anew.

The store on loopback judges a signature with awscrt, Amazon's own signer, never with ours.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from awscrt import auth, http
from clouds import POD, Cloud
from faults.proxy import Reply, Turn
from faults.web import Behaviour, Origin, Request

from tuning.errors import RefusedError, SpecError, TransientError
from tuning.network import sigv4
from tuning.network.policy import Policy, load_headers
from tuning.network.retry import Patience
from tuning.sources import fetch, stores
from tuning.sources.http import Limits
from tuning.sources.local import File
from tuning.sources.stores import Keys, load_keys, logins
from tuning.spec import Source, urls

ROWS = b"".join(b'{"prompt": "%d", "completion": "%d"}\n' % (n, n * n) for n in range(4000))
LOOPBACK = Policy(allow_hosts={"127.0.0.1"})
RETRY = Patience(tries=3, first=0.01, longest=0.02)
QUICK = Limits(connect=2, stall=0.4, slow_window=0.5, retry=RETRY)
ID, SECRET, SESSION = "AKIAOURS", "s3cr3t-canary", "session-canary"


def amazons(
    path: str, headers: dict[str, str], region: str, date: datetime.datetime, session: str
) -> str:
    """The signature that Amazon's library makes for a request with just these headers."""
    made = {"x-amz-date", "x-amz-security-token", "x-amz-content-sha256"}  # it adds them itself
    rest = [(name, value) for name, value in headers.items() if name not in made]
    request = http.HttpRequest("GET", path, http.HttpHeaders(rest))
    config = auth.AwsSigningConfig(
        algorithm=auth.AwsSigningAlgorithm.V4,
        signature_type=auth.AwsSignatureType.HTTP_REQUEST_HEADERS,
        credentials_provider=auth.AwsCredentialsProvider.new_static(ID, SECRET, session or None),
        region=region,
        service="s3",
        date=date,
        use_double_uri_encode=False,
        should_normalize_uri_path=False,
        signed_body_header_type=auth.AwsSignedBodyHeaderType.X_AMZ_CONTENT_SHA_256,
    )
    auth.aws_sign_request(request, config).result(10)
    return str(request.headers.get("Authorization")).rpartition("=")[2]


@dataclass
class Bucket:
    """A store of one bucket, `private`, in `region`; `public/` in it needs no signature."""

    origin: Origin
    region: str = "us-east-1"
    session: str = ""
    clock: datetime.timedelta = datetime.timedelta()  # ahead of ours
    refuse: str = ""  # a code for everybody

    def put(self, key: str, body: bytes, **options: Any) -> None:
        """Serve `body`, to whom may have it."""
        path = f"/private/{key}"
        self.origin.serve(path, body, **options)
        self.guard(path, self.origin._routes[path])

    def guard(self, path: str, good: Behaviour) -> None:
        def behave(request: Request) -> None:
            code = "" if path.startswith("/private/public/") else self.judge(request)
            if not code:
                return good(request)
            body = f"<Error><Code>{code}</Code><AWSAccessKeyId>{ID}</AWSAccessKeyId>"
            body += f"<Region>{self.region}</Region></Error>" if "Malformed" in code else "</Error>"
            status = 400 if code in ("AuthorizationHeaderMalformed", "ExpiredToken") else 403
            request.head(status, Content_Length=len(body))
            return request.body(body.encode())

        self.origin.route(path, behave)

    def judge(self, request: Request) -> str:
        """Amazon's code for what is wrong with a request, or nothing."""
        if self.refuse:
            return self.refuse
        headers = request.headers
        told = re.fullmatch(
            r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/s3/aws4_request, "
            r"SignedHeaders=([a-z0-9;-]+), Signature=([0-9a-f]{64})",
            headers.get("authorization", ""),
        )
        if told is None:
            return "AccessDenied"
        key, day, region, names, signature = told.groups()
        if key != ID:
            return "InvalidAccessKeyId"
        if region != self.region:
            return "AuthorizationHeaderMalformed"
        stamp = headers["x-amz-date"]
        sent = datetime.datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.UTC)
        now = datetime.datetime.now(datetime.UTC) + self.clock
        if abs(now - sent) > datetime.timedelta(minutes=15) or not stamp.startswith(day):
            return "RequestTimeTooSkewed"
        if headers.get("x-amz-security-token", "") != self.session:
            return "ExpiredToken"
        signed = {name: headers[name] for name in names.split(";")}
        needed = {n for n in headers if n.startswith("x-amz-") or n in ("host", "range")}
        if not needed <= signed.keys():
            return "AccessDenied"
        good = amazons(request.handler.path, signed, region, sent, self.session)
        return "" if hmac.compare_digest(good, signature) else "SignatureDoesNotMatch"

    def keys(self, **changes: str) -> Keys:
        values = {
            "AWS_ACCESS_KEY_ID": ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.origin.url(""),
        }
        return Keys({**values, **changes}, "the Secret rows")

    def seen(self, key: str) -> list[dict[str, str]]:
        return self.origin.asked(f"/private/{key}")


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    with Origin() as server:
        yield Bucket(server)


def get(folder: Path, url: str, keys: Keys, policy: Policy = LOOPBACK, **more: Any) -> File:
    (file,) = fetch.fetch(
        Source(urls=(url,)), folder, policy=policy, keys=keys, limits=QUICK, **more
    )
    return file


# -- what the text of a URL means -------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "values", "address"),
    [
        ("s3://rows/a/b.jsonl", {}, "https://rows.s3.us-east-1.amazonaws.com/a/b.jsonl"),
        ("s3://rows/a", {"AWS_REGION": "eu-west-3"}, "https://rows.s3.eu-west-3.amazonaws.com/a"),
        ("s3://my.rows/a", {}, "https://s3.us-east-1.amazonaws.com/my.rows/a"),
        (
            "s3://rows/a",
            {"AWS_REGION": "cn-north-1"},
            "https://rows.s3.cn-north-1.amazonaws.com.cn/a",
        ),
        ("s3://rows/a", {"AWS_ENDPOINT_URL": "https://minio.corp/"}, "https://minio.corp/rows/a"),
        ("s3://rows/a%20b+%c3%a4", {}, "https://rows.s3.us-east-1.amazonaws.com/a%20b%2B%C3%A4"),
    ],
)
def test_a_url_of_s3_is_an_address(url: str, values: dict[str, str], address: str) -> None:
    """By host; by path where a certificate would not cover the name, and on an own endpoint."""
    store = stores.of(url, Keys(values))

    assert store is not None and address == store.address


@pytest.mark.parametrize(
    ("url", "refusal"),
    [
        ("s3://rows/folder/", urls.NOT_ONE_FILE),
        ("s3://rows/*.jsonl", urls.NOT_ONE_FILE),
        ("s3://rows", urls.NOT_ONE_FILE),
        ("s3://rows/../x", urls.NOT_IN_STORE),
        ("s3://rows/a/%2e%2e/x", urls.NOT_IN_STORE),
        ("s3://rows/a/./x", urls.NOT_IN_STORE),
        ("s3://u:p@rows/x", urls.NOT_IN_STORE),
        ("s3://rows:80/x", urls.NOT_IN_STORE),
        ("s3://rows/x?versionId=1", urls.NOT_IN_STORE),
        ("s3://rows/a%0d%0ab", urls.NOT_IN_STORE),
        ("s3://rows/folder/rows.jsonl", None),
    ],
)
def test_what_is_no_file_of_a_bucket_is_refused_by_its_text(url: str, refusal: str | None) -> None:
    assert refusal == urls.refusal(url)


# -- signatures -------------------------------------------------------------------------------


def test_amazons_own_example_has_its_signature() -> None:
    """GET Object, with a range, of "Signature Calculations for the Authorization Header"."""
    signed = sigv4.sign(
        "GET",
        "https://examplebucket.s3.amazonaws.com/test.txt",
        {"Range": "bytes=0-9", "X-Amz-Content-SHA256": hashlib.sha256(b"").hexdigest()},
        b"",
        key="AKIAIOSFODNN7EXAMPLE",
        secret="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        region="us-east-1",
        service="s3",
        now=datetime.datetime(2013, 5, 24, tzinfo=datetime.UTC),
    )

    assert signed["Authorization"].endswith(
        "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date, "
        "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    )


@pytest.mark.parametrize("key", ["rows.jsonl", "a%20b/c+d%C3%A4~(1)'=&@:,.jsonl", "a//b"])
def test_the_right_keys_open_a_private_bucket(bucket: Bucket, tmp_path: Path, key: str) -> None:
    """Also where the key has characters that are spelled in several ways."""
    url = f"s3://private/{key}"
    found = urls.in_store(url)
    assert found
    bucket.put(found[2], ROWS)

    file = get(tmp_path, url, bucket.keys())

    assert (ROWS, url) == (file.path.read_bytes(), file.shown)
    on_disk = b"".join(path.read_bytes() for path in tmp_path.glob("*.json"))
    assert SECRET.encode() not in on_disk and ID.encode() not in on_disk


def test_a_session_is_part_of_the_signature(bucket: Bucket, tmp_path: Path) -> None:
    bucket.session = SESSION
    bucket.put("a", ROWS)

    file = get(tmp_path, "s3://private/a", bucket.keys(AWS_SESSION_TOKEN=SESSION))

    assert len(ROWS) == file.size


def test_a_public_file_needs_no_key(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("public/a", ROWS)
    keys = Keys({"AWS_ENDPOINT_URL": bucket.origin.url("")})

    file = get(tmp_path, "s3://private/public/a", keys)

    assert len(ROWS) == file.size
    assert "authorization" not in bucket.seen("public/a")[0]


def test_a_transfer_that_breaks_off_goes_on_with_a_new_signature(
    bucket: Bucket, tmp_path: Path
) -> None:
    """The rest is asked for, and the range is signed."""
    bucket.put("a", ROWS, cut_at=50_000, reset=False)

    file = get(tmp_path, "s3://private/a", bucket.keys())

    first, second = bucket.seen("a")
    assert ROWS == file.path.read_bytes()
    assert "bytes=50000-" == second["range"] and "range" not in first
    assert first["authorization"] != second["authorization"]


def test_a_checksum_in_the_url_is_kept_to(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("a", ROWS)
    right = hashlib.sha256(ROWS).hexdigest()

    assert right == get(tmp_path, f"s3://private/a#sha256={right}", bucket.keys()).sha256


def test_check_sees_size_and_first_bytes(bucket: Bucket) -> None:
    bucket.put("a", ROWS)

    (seen,) = fetch.check(
        Source(urls=("s3://private/a",)), policy=LOOPBACK, keys=bucket.keys(), head=100
    )

    assert ("s3://private/a", len(ROWS), ROWS[:100]) == (seen.shown, seen.size, seen.head)


# -- regions ----------------------------------------------------------------------------------


def test_the_wrong_region_is_corrected_once(bucket: Bucket, tmp_path: Path) -> None:
    bucket.region = "eu-central-1"
    bucket.put("a", ROWS)

    get(tmp_path, "s3://private/a", bucket.keys())

    assert ["us-east-1", "eu-central-1"] == [
        headers["authorization"].split("/")[2] for headers in bucket.seen("a")
    ]


def test_a_301_names_the_region_in_a_header(bucket: Bucket, tmp_path: Path) -> None:
    """A second one is not followed: a store that always answers so would never end."""
    path = "/private/a"
    bucket.origin.answer(path, 301, b"<Error><Code>PermanentRedirect</Code></Error>",
                         x_amz_bucket_region="eu-west-1")  # fmt: skip

    with pytest.raises(RefusedError, match=r"FETCH-111 .*not in the region eu-west-1.*AWS_REGION"):
        get(tmp_path, "s3://private/a", bucket.keys())

    assert 2 == len(bucket.seen("a"))


def test_the_region_of_an_answer_cannot_lead_elsewhere() -> None:
    """It becomes part of a host's name."""
    store = stores.of("s3://rows/a", Keys())
    assert store

    for region in ("evil.example/", "x.evil.example#", "@evil", ""):
        assert store.moved({"x-amz-bucket-region": region}, "") is None
    assert "https://rows.s3.eu-west-1.amazonaws.com/a" == store.moved(
        {"x-amz-bucket-region": "eu-west-1"}, ""
    )


# -- refusals in words ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"AWS_SECRET_ACCESS_KEY": "wrong-canary"},
            "correct AWS_SECRET_ACCESS_KEY in the Secret rows",
        ),
        ({"AWS_ACCESS_KEY_ID": "AKIAOTHER"}, "correct AWS_ACCESS_KEY_ID in the Secret rows"),
        ({"AWS_SESSION_TOKEN": "old-canary"}, "the session has expired"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "put AWS_ACCESS_KEY_ID and"),
    ],
)
def test_wrong_keys_are_named(
    bucket: Bucket, tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    """Which Secret, which key of it; never a value, and never again."""
    bucket.put("a", ROWS)

    with pytest.raises(RefusedError, match=r"FETCH-111 input.urls\[0\] s3://private/a") as caught:
        get(tmp_path, "s3://private/a", bucket.keys(**changes))

    assert said in str(caught.value)
    assert "canary" not in str(caught.value) and "AKIA" not in str(caught.value)
    assert 1 == len(bucket.seen("a"))


def test_a_wrong_clock_is_told(bucket: Bucket, tmp_path: Path) -> None:
    bucket.clock = datetime.timedelta(hours=1)
    bucket.put("a", ROWS)

    with pytest.raises(RefusedError, match=r"RequestTimeTooSkewed.*set the clock"):
        get(tmp_path, "s3://private/a", bucket.keys())


def test_a_missing_object_is_told(bucket: Bucket, tmp_path: Path) -> None:
    bucket.origin.answer("/private/a", 404, b"<Error><Code>NoSuchKey</Code></Error>")

    with pytest.raises(RefusedError, match=r"FETCH-110 .*no such object"):
        get(tmp_path, "s3://private/a", bucket.keys())


# -- where a signature may go -----------------------------------------------------------------


def test_a_redirect_does_not_carry_the_signature(bucket: Bucket, tmp_path: Path) -> None:
    """Neither to another host nor to another path: it is the address's alone."""
    with Origin() as other:
        there = other.serve("/blob", ROWS)
        bucket.guard("/private/a", lambda r: r.head(307, Location=there, Content_Length=0))

        get(tmp_path, "s3://private/a", bucket.keys(AWS_SESSION_TOKEN=""))

        assert "authorization" in bucket.seen("a")[0]
        assert not {h for h in other.asked("/blob")[0] if h.startswith("x-amz")}
        assert "authorization" not in other.asked("/blob")[0]


def test_headers_of_the_host_are_signed_or_give_way(bucket: Bucket, tmp_path: Path) -> None:
    """A store refuses an x-amz- header that is not signed, and two Authorization headers."""
    bucket.put("a", ROWS)
    given = {"127.0.0.1": {"x-amz-request-payer": "requester", "authorization": "Basic canary"}}

    get(tmp_path, "s3://private/a", bucket.keys(), credentials=given)

    (seen,) = bucket.seen("a")
    assert "requester" == seen["x-amz-request-payer"]
    assert "x-amz-request-payer" in seen["authorization"] and "canary" not in str(seen)


def test_an_endpoint_obeys_the_policy_on_hosts(bucket: Bucket, tmp_path: Path) -> None:
    """By its text, and by what its name resolves to; no connection is made."""
    bucket.put("a", ROWS)
    named = bucket.keys(AWS_ENDPOINT_URL="https://minio.example")

    with pytest.raises(SpecError, match="FETCH-101"):
        get(tmp_path, "s3://private/a", bucket.keys(), Policy())
    with pytest.raises(SpecError, match="FETCH-104"):
        get(tmp_path, "s3://private/a", named, Policy(), resolve=lambda host, port: ["10.0.0.7"])

    assert [] == bucket.origin.requests


def test_a_signature_does_not_cross_the_network_readably(bucket: Bucket, tmp_path: Path) -> None:
    keys = bucket.keys(AWS_ENDPOINT_URL="http://minio.example")

    with pytest.raises(SpecError, match="FETCH-106"):
        get(tmp_path, "s3://private/a", keys)


# -- keys -------------------------------------------------------------------------------------


def test_keys_are_files_of_a_mounted_secret_beside_headers(tmp_path: Path) -> None:
    (tmp_path / "AWS_ACCESS_KEY_ID").write_text(f"{ID}\n")
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text(SECRET)
    (tmp_path / "data.example").write_text("X-Team: 7")

    keys = stores.load_keys(tmp_path)

    assert {"AWS_ACCESS_KEY_ID": ID, "AWS_SECRET_ACCESS_KEY": SECRET} == keys.values
    assert {"data.example": {"X-Team": "7"}} == load_headers(tmp_path)
    assert SECRET not in repr(keys)


def test_without_a_secret_amazons_usual_places_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment, or else the profile; a key of one never meets a secret of the other."""
    profile = tmp_path / "credentials"
    profile.write_text(f"[default]\naws_access_key_id = {ID}\naws_secret_access_key = {SECRET}\n"
                       f"aws_session_token = {SESSION}\n")  # fmt: skip
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))

    assert SESSION == stores.load_keys(None).get("AWS_SESSION_TOKEN")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "")
    assert ID == stores.load_keys(None).get("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "one")
    assert "" == stores.load_keys(None).get("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other")
    assert "" == stores.load_keys(None).get("AWS_SESSION_TOKEN")


def test_a_profile_that_is_not_there_disturbs_only_whom_s3_refuses(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be one of ~/.aws/config, which other programs use; public files need no key."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "dev")
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.origin.url(""))
    bucket.put("public/a", ROWS)
    bucket.put("a", ROWS)

    assert len(ROWS) == get(tmp_path / "1", "s3://private/public/a", stores.load_keys(None)).size
    with pytest.raises(RefusedError, match=r"FETCH-111 .*no profile 'dev'.*export-credentials"):
        get(tmp_path / "2", "s3://private/a", stores.load_keys(None))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": ID}, "go together"),
        ({"AWS_REGION": "evil.example/"}, "AWS_REGION is not a region"),
        ({"AWS_ENDPOINT_URL": "minio:9000"}, "AWS_ENDPOINT_URL is not a URL"),
        ({"AWS_ENDPOINT_URL": "http://[::1"}, "AWS_ENDPOINT_URL is not a URL"),
        ({"AWS_SESSION_TOKEN": "part1\nCANARY"}, "AWS_SESSION_TOKEN contains a line break"),
    ],
)
def test_half_a_key_is_refused_before_a_request(values: dict[str, str], said: str) -> None:
    with pytest.raises(SpecError, match=f"FETCH-107 .*{said}") as caught:
        stores.of("s3://rows/a", Keys(values))

    assert "CANARY" not in str(caught.value)


# -- a pod's role instead of a key -------------------------------------------------------------


def sts(role: str = "arn:aws:iam::1:role/rows", *, left: float = 3600) -> Cloud:
    """Gives the bucket's keys to who shows the pod's token."""

    def assume(form: dict[str, Any], turn: Turn) -> Any:
        asked = {"Action": "AssumeRoleWithWebIdentity", "WebIdentityToken": POD, "RoleArn": role}
        if not asked.items() <= form.items():
            return Reply(403, [], b'{"Error": {"Code": "AccessDenied", "Message": "canary"}}')
        keys = {"AccessKeyId": ID, "SecretAccessKey": SECRET, "SessionToken": SESSION}
        keys["Expiration"] = time.time() + left
        inner = {"AssumeRoleWithWebIdentityResult": {"Credentials": keys}}
        return {"AssumeRoleWithWebIdentityResponse": inner}

    return Cloud(sts=assume)


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Cloud], None]:
    """A pod's environment, as the webhook of EKS writes it."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    file = tmp_path / "pod-token"
    file.write_text(f"{POD}\n")

    def enter(cloud: Cloud) -> None:
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/rows")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(file))
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://{cloud.host}/sts")

    return enter


def secret(folder: Path, **values: str) -> Path:
    folder.mkdir()
    for name, value in values.items():
        (folder / name).write_text(value)
    return folder


def test_a_pods_role_opens_a_private_bucket(
    bucket: Bucket, tmp_path: Path, pod: Callable[[Cloud], None], caplog: pytest.LogCaptureFixture
) -> None:
    """One question to STS for all files, and none for those that everybody may read."""
    caplog.set_level(logging.DEBUG)
    bucket.session = SESSION
    for key in ("a.jsonl", "b.jsonl", "public/c.jsonl"):
        bucket.put(key, ROWS + key.encode())
    mounted = secret(tmp_path / "data", AWS_ENDPOINT_URL=bucket.origin.url(""))
    with sts() as cloud:
        pod(cloud)
        keys = load_keys(mounted, LOOPBACK)
        public = get(tmp_path / "1", "s3://private/public/c.jsonl", keys)

        assert [] == cloud.seen and public.size > len(ROWS)
        both = Source(urls=("s3://private/a.jsonl", "s3://private/b.jsonl"))
        fetch.fetch(both, tmp_path / "2", policy=LOOPBACK, keys=keys, limits=QUICK)

        assert 1 == len(cloud.seen)
    assert not {POD, SECRET, SESSION} & set(re.findall(r"[\w.-]+", caplog.text))


def test_a_role_that_is_about_to_end_is_assumed_again(
    bucket: Bucket, tmp_path: Path, pod: Callable[[Cloud], None]
) -> None:
    bucket.session = SESSION
    bucket.put("a.jsonl", ROWS, cut_at=30_000, cuts=2)
    with sts(left=5) as cloud:
        pod(cloud)
        keys = load_keys(None, LOOPBACK)
        keys = dataclasses.replace(keys, values={"AWS_ENDPOINT_URL": bucket.origin.url("")})

        assert len(ROWS) == get(tmp_path / "1", "s3://private/a.jsonl", keys).size
        assert len(cloud.seen) > 1


def test_a_key_that_is_given_comes_before_the_pods_role(
    bucket: Bucket, tmp_path: Path, pod: Callable[[Cloud], None]
) -> None:
    bucket.put("a.jsonl", ROWS)
    with sts() as cloud:
        pod(cloud)
        keys = dataclasses.replace(load_keys(None, LOOPBACK), values=bucket.keys().values)

        assert len(ROWS) == get(tmp_path, "s3://private/a.jsonl", keys).size
        assert [] == cloud.seen


def test_a_role_that_may_not_read_is_named(
    bucket: Bucket, tmp_path: Path, pod: Callable[[Cloud], None]
) -> None:
    bucket.put("a.jsonl", ROWS)
    bucket.refuse = "AccessDenied"
    with sts() as cloud, pytest.raises(RefusedError) as caught:
        pod(cloud)
        keys = dataclasses.replace(
            load_keys(None, LOOPBACK), values={"AWS_ENDPOINT_URL": bucket.origin.url("")}
        )
        get(tmp_path, "s3://private/a.jsonl", keys)

    assert "grant s3:GetObject on it to the role arn:aws:iam::1:role/rows" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (403, RefusedError, r"FETCH-111 .*a\.jsonl: AWS STS refuses the identity.*403"),
        (503, TransientError, r"FETCH-130 .*a\.jsonl: AWS STS answered 503"),
    ],
)
def test_a_token_service_that_gives_nothing(
    bucket: Bucket,
    tmp_path: Path,
    pod: Callable[[Cloud], None],
    status: int,
    error: type[Exception],
    said: str,
) -> None:
    """A no ends it at once; trouble is asked again, as often as the file would be."""
    bucket.put("a.jsonl", ROWS)
    with (
        Cloud(sts=lambda form, turn: Reply(status, [], b"{}")) as cloud,
        pytest.raises(error, match=said),
    ):
        pod(cloud)
        keys = dataclasses.replace(
            load_keys(None, LOOPBACK), values={"AWS_ENDPOINT_URL": bucket.origin.url("")}
        )
        get(tmp_path / "1", "s3://private/a.jsonl", keys)
    assert {403: 1, 503: RETRY.tries}[status] == len(cloud.seen)


@pytest.mark.parametrize(
    ("address", "may"),
    [
        ("https://rows.s3.eu-west-1.amazonaws.com/a", True),
        ("https://s3.cn-north-1.amazonaws.com.cn/my.rows/a", True),
        ("https://storage.googleapis.com/rows/a", True),
        ("https://me1.blob.core.windows.net/rows/a", True),
        ("http://127.0.0.1:9000/rows/a", False),
        ("http://rows.s3.eu-west-1.amazonaws.com/a", False),
        ("https://rows.s3.eu-west-1.amazonaws.com:8443/a", False),
        ("https://abc.execute-api.eu-west-1.amazonaws.com/a", False),
        ("https://minio.corp:9000/rows/a", False),
        ("https://storage.googleapis.com.evil.example/rows/a", False),
        ("https://me1.web.core.windows.net/rows/a", False),
        ("https://me1.blob.core.evil.example/rows/a", False),
        ("https://[x", False),
    ],
)
def test_tokens_go_to_the_clouds_alone(address: str, may: bool) -> None:
    """Whoever writes the Secret names the address, and must not get the pod's token so. What a
    token service on this machine gave is an emulator's, and goes to emulators alone."""
    assert may == logins.Login("who", lambda: None).fits(address)
    assert address.startswith("http://127") == logins.Login("who", lambda: None, True).fits(address)
