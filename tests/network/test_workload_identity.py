"""Workload identities and client certificates: who we are, without a password that anybody keeps.

Each cloud is a small HTTP server on loopback that asks for exactly what the real one does.
"""

from __future__ import annotations

import base64
import datetime
import json
import re
import secrets
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clouds import POD, Cloud, form_of, reply_of
from faults import proxy as fp
from faults.proxy import Proxy, Reply, Turn
from registries import Certificate, Registry, TokenFront

from tuning.errors import RefusedError, SpecError, TransientError
from tuning.network import workload_identity
from tuning.network.docker_config import Login
from tuning.network.session import Session
from tuning.oci import delivery, registry
from tuning.oci.delivery import Access
from tuning.oci.layout.manifest import read_layout
from tuning.oci.policy import Host, Trust

pytestmark = pytest.mark.registry
FAST = registry.Patience(total=5, first=0.01)


@pytest.fixture
def token(tmp_path: Path) -> Path:
    """Where the kubelet puts the pod's token."""
    path = tmp_path / "token"
    path.write_text(f"{POD}\n")
    return path


def access(host: str, known: workload_identity.Identity) -> Access:
    return Access(trust=Trust(hosts={host: Host(identity=known)}))


def push(host: str, known: workload_identity.Identity, layout: Path) -> registry.Pushed:
    """What a run does, with pieces so small that the weights take four."""
    name = f"{host}/tests/{secrets.token_hex(4)}:1"
    remote = access(host, known).remote(name, secret=None, patience=FAST)
    remote.chunk = 1 << 16
    return registry.push(remote, layout, run_id="run-1")


# -- Azure ---------------------------------------------------------------------------------------


class Acr(TokenFront):
    """A registry of Azure: an access token of Entra is exchanged for a refresh token."""

    def __init__(self, *positional: Any, **more: Any) -> None:
        super().__init__(*positional, **more)
        self.entra, self.exchanged = "", 0

    def pass_on(self, turn: Turn) -> None:
        if not turn.seen.path.startswith("/oauth2/exchange"):
            return super().pass_on(turn)
        form = form_of(turn)
        wanted = {"grant_type": "access_token", "service": self.host, "tenant": "our-tenant"}
        if form != wanted | {"access_token": self.entra}:
            return turn.answer(Reply(401))
        self.exchanged += 1
        self.identity_token = secrets.token_urlsafe(8)  # those before are worth nothing now
        return turn.answer(reply_of({"refresh_token": self.identity_token}))


def entra(front: Acr, *, expires_in: int = 3600) -> Cloud:
    def give(form: dict[str, Any], turn: Turn) -> Any:
        asked = {"grant_type": "client_credentials", "client_id": "our-client"}
        asked |= {"client_assertion": POD, "scope": "https://containerregistry.azure.net/.default"}
        if not asked.items() <= form.items() or "jwt-bearer" not in form["client_assertion_type"]:
            return Reply(
                401, [], b'{"error": "invalid_client", "error_description": "%s"}' % POD.encode()
            )
        front.entra = secrets.token_urlsafe(8)
        return {"access_token": front.entra, "expires_in": expires_in}

    return Cloud(**{"our-tenant_oauth2_v2.0_token": give})


def azure(cloud: Cloud, token: Path) -> workload_identity.Azure:
    return workload_identity.Azure(
        "our-tenant", "our-client", token, authority=f"http://{cloud.host}"
    )


def test_azure(started, layout, token):
    """Pod's token, Entra's token, the registry's refresh token, its access token."""
    with Acr(started) as front, entra(front) as cloud:
        pushed = push(front.host, azure(cloud, token), layout)

        assert read_layout(layout).digest == pushed.digest
        assert 1 == front.exchanged


def test_azure_tokens_that_run_out_within_an_upload_are_renewed(started, layout, token):
    """Each registry token lives for eight requests, each refresh token until the next is given."""
    with Acr(started, uses=8) as front, entra(front, expires_in=1) as cloud:
        pushed = push(front.host, azure(cloud, token), layout)

        assert read_layout(layout).digest == pushed.digest
        assert 2 < front.exchanged


# -- AWS -----------------------------------------------------------------------------------------


def aws_cloud(password: str, *, left: float = 43200) -> Cloud:
    def assume(form: dict[str, Any], turn: Turn) -> Any:
        asked = {"Action": "AssumeRoleWithWebIdentity", "WebIdentityToken": POD}
        if not (asked | {"RoleArn": "arn:aws:iam::1:role/push"}).items() <= form.items():
            return Reply(403, [], b'{"Error": {"Code": "AccessDenied", "Message": "no"}}')
        keys = {"AccessKeyId": "AK", "SecretAccessKey": "SK", "SessionToken": "ST"}
        inner = {"AssumeRoleWithWebIdentityResult": {"Credentials": keys}}
        return {"AssumeRoleWithWebIdentityResponse": inner}

    def authorize(form: dict[str, Any], turn: Turn) -> Any:
        head = turn.seen.headers
        now = datetime.datetime.strptime(head["x-amz-date"], "%Y%m%dT%H%M%SZ")
        names = ("content-type", "x-amz-target", "x-amz-security-token")
        expected = workload_identity.sign(
            "POST",
            f"http://{head['host']}/ecr",
            {name: head[name] for name in names},
            turn.body,
            key="AK",
            secret="SK",
            region="eu-west-1",
            service="ecr",
            now=now.replace(tzinfo=datetime.UTC),
        )
        if head["authorization"] != expected["Authorization"]:
            return Reply(400, [], b'{"__type": "InvalidSignatureException"}')
        assert head["x-amz-target"].endswith("GetAuthorizationToken") and "ST" in head.values()
        pair = base64.b64encode(f"AWS:{password}".encode()).decode()
        data = {"authorizationToken": pair, "expiresAt": time.time() + left}
        return {"authorizationData": [data]}

    return Cloud(sts=assume, ecr=authorize)


def aws(cloud: Cloud, token: Path, role: str = "arn:aws:iam::1:role/push") -> workload_identity.Aws:
    places = {"sts": f"http://{cloud.host}/sts", "ecr": f"http://{cloud.host}/ecr"}
    return workload_identity.Aws(role, "eu-west-1", token, **places)


@pytest.fixture(scope="module")
def ecr(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that knows the user AWS."""
    with Registry(tmp_path_factory.mktemp("ecr"), users={"AWS": "for-a-day"}) as running:
        yield running


def test_aws(ecr, layout, token):
    """The pod's token, keys of the role, a signed question, a password for the user AWS."""
    with aws_cloud("for-a-day") as cloud:
        pushed = push(ecr.host, aws(cloud, token), layout)

        assert read_layout(layout).digest == pushed.digest
        assert ["/sts", "/ecr"] == [seen.path for seen in cloud.seen]


def test_an_aws_password_that_is_taken_back_or_runs_out_is_renewed(ecr, layout, token):
    """A 401 in the middle of an upload leads to the cloud again, as does the end of its time."""
    with aws_cloud("for-a-day") as cloud, Proxy(ecr.address) as front:
        no = fp.status(401, www_authenticate='Basic realm="ecr"')
        front.spoil(no, method="PATCH", path="/uploads/", nth=2)
        push(front.host, aws(cloud, token), layout)

        assert front.struck()
        assert 2 == sum(seen.path == "/ecr" for seen in cloud.seen)
    with aws_cloud("for-a-day", left=1) as cloud:
        push(ecr.host, aws(cloud, token), layout)

        assert 2 < sum(seen.path == "/ecr" for seen in cloud.seen)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("GET", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        ("POST", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
    ],
)
def test_signatures_are_those_of_awss_own_examples(method, expected):
    """The cases get-vanilla and post-vanilla of the test suite for Signature Version 4."""
    signed = workload_identity.sign(
        method,
        "https://example.amazonaws.com/",
        {},
        b"",
        key="AKIDEXAMPLE",
        secret="wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
        region="us-east-1",
        service="service",
        now=datetime.datetime(2015, 8, 30, 12, 36, tzinfo=datetime.UTC),
    )

    assert expected == signed["Authorization"].rpartition("=")[2]


# -- Google --------------------------------------------------------------------------------------


def google_cloud(front: TokenFront) -> Cloud:
    def exchange(form: dict[str, Any], turn: Turn) -> Any:
        if (form["audience"], form["subjectToken"]) != ("//iam/providers/p", POD):
            return Reply(400, [], b'{"error": "invalid_grant"}')
        return {"access_token": "federated", "expires_in": 1}

    def act(form: dict[str, Any], turn: Turn) -> Any:
        if turn.seen.headers["authorization"] != "Bearer federated":
            return Reply(403, [], b'{"error": {"status": "PERMISSION_DENIED"}}')
        front.password = secrets.token_urlsafe(8)  # those before are worth nothing now
        return {"accessToken": front.password, "expireTime": "2030-01-01T00:00:00Z"}

    return Cloud(**{"v1_token": exchange, "push@p.iam:generateAccessToken": act})


def test_google_tokens_are_renewed_within_an_upload(started, layout, token):
    """The pod's token, a federated one, one of the service account; again for each new need."""
    user = workload_identity.GOOGLE_USER
    with TokenFront(started, user=user, uses=8) as front, google_cloud(front) as cloud:
        sts, iam = f"http://{cloud.host}/v1/token", f"http://{cloud.host}"
        known = workload_identity.Google("//iam/providers/p", token, "push@p.iam", sts=sts, iam=iam)
        pushed = push(front.host, known, layout)

        assert read_layout(layout).digest == pushed.digest
        assert 2 < sum("generateAccessToken" in seen.path for seen in cloud.seen)


# -- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [(401, RefusedError, "REG-152"), (403, RefusedError, "REG-152"), (503, TransientError, "151")],
)
def test_a_cloud_that_says_no(started, layout, token, status, error, code, caplog):
    """Once for a refusal, while patience lasts for trouble; a token is in no text."""
    caplog.set_level("DEBUG")
    body = b'{"error": "invalid_client", "error_description": "%s"}' % POD.encode()
    with Acr(started) as front, Cloud(token=lambda form, turn: Reply(status, [], body)) as cloud:
        patience = registry.Patience(total=0.2, first=0.01)
        known = access(front.host, azure(cloud, token))
        remote = known.remote(f"{front.host}/tests/x:1", secret=None, patience=patience)
        with pytest.raises(error, match=f"{code}.*answered {status}") as caught:
            registry.push(remote, layout, run_id="run-1")

        assert status == 503 or len(cloud.seen) == 1
    assert POD not in str(caught.value) + caplog.text


@pytest.mark.parametrize("answer", [{}, [], {"access_token": 5}, Reply(200, [], b"<html>")])
def test_a_cloud_that_answers_oddly(token, answer):
    """An address of something else: a reason, not a traceback."""
    with (
        Cloud(token=lambda form, turn: answer) as cloud,
        pytest.raises(TransientError, match="REG-151"),
    ):
        azure(cloud, token).login("x.azurecr.io", Session().request)


@pytest.mark.parametrize("content", ["", None, "é"])
def test_a_pod_without_a_token(tmp_path, content):
    """The file is named, with what to do about it."""
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SpecError, match=f"REG-150 {path}.*project"):
        workload_identity.Azure("t", "c", path).login("x.azurecr.io", Session().request)


def test_a_token_goes_nowhere_without_tls(token):
    """Only loopback may be asked in plain http."""
    with pytest.raises(SpecError, match=r"REG-153.*is not an https URL"):
        workload_identity.Azure("t", "c", token, authority="http://cloud.test").login(
            "x", Session().request
        )


def test_an_identity_is_for_the_hosts_that_the_policy_names(started, layout, token):
    """Elsewhere nobody is asked; a Secret that was given comes before an identity."""
    with Acr(started) as front, entra(front) as cloud:
        known = azure(cloud, token)
        elsewhere = access("*.azurecr.io", known).remote(f"{front.host}/a:1", secret=None)
        secret = token.parent / "config.json"
        secret.write_text(json.dumps({"auths": {front.host: {"username": "me", "password": "p"}}}))
        given = access(front.host, known).remote(f"{front.host}/a:1", secret=secret)

        assert (None, None) == (elsewhere.identity, elsewhere.login)
        assert given.identity is None and isinstance(given.login, Login)
        assert [] == cloud.seen


# -- client certificates -------------------------------------------------------------------------


def test_a_registry_that_wants_a_client_certificate(started, layout, tmp_path):
    """With it the image goes there and comes back; without it, one clear line."""
    server, client = Certificate(tmp_path / "server"), Certificate(tmp_path / "client")
    context = server.context()
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(client.ca)
    with Proxy(started.address, tls=context) as front:
        name = f"{front.host}/tests/mtls:1"
        host = Host(ca=server.ca, client=(client.chain, client.key))
        known = Access(trust=Trust(hosts={"127.0.0.1:*": Host(), front.host: host}))
        remote = known.remote(name, secret=None, patience=FAST)
        pushed = registry.push(remote, layout, run_id="run-1")
        registry.pull(remote, tmp_path / "out")

        assert read_layout(layout).digest == pushed.digest
        nobody = Access(ca=server.ca).remote(name, secret=None, patience=registry.Patience(0.1))
        with pytest.raises((RefusedError, TransientError), match=r"REG-126|REG-132"):
            registry.look(nobody)


def test_a_client_certificate_that_is_none(tmp_path):
    """Both files are named; nobody is asked for a password."""
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("no PEM")
    host = Host(client=(tmp_path / "cert.pem", tmp_path / "key.pem"))
    known = Access(trust=Trust(hosts={"registry.test": host}))
    with pytest.raises(SpecError, match=r"FETCH-127 .*cert\.pem, .*key\.pem: is no PEM pair"):
        known.remote("registry.test/a:1", secret=None)


# -- the policy file -----------------------------------------------------------------------------


def test_the_policy_file(tmp_path, monkeypatch):
    """Paths lie beside it; what an identity leaves out comes from the environment."""
    monkeypatch.setenv("AZURE_CLIENT_ID", "from-env")
    monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", "/var/token")
    path = tmp_path / "policy.yaml"
    path.write_text("""\
data: {plainHttp: false}
registry:
  signatures: require
  keys: [cosign.pub]
  provenance: require
  hosts:
    registry.corp:5000: {ca: ca.pem, clientCert: c.pem, clientKey: k.pem}
    "*.azurecr.io": {identity: {kind: azure, tenantId: t}}
    a.dkr.ecr.eu-west-1.amazonaws.com:
      identity: {kind: aws, roleArn: r, region: eu-west-1, tokenFile: /t}
    europe-docker.pkg.dev: {identity: {kind: google, audience: a, tokenFile: /t}}
""")
    trust = Trust.load(path)

    assert ("require", (tmp_path / "cosign.pub",)) == (trust.signatures, trust.keys)
    corp = trust.host("registry.corp:5000")
    assert (tmp_path / "ca.pem", (tmp_path / "c.pem", tmp_path / "k.pem")) == (corp.ca, corp.client)
    azure = trust.host("Our.azurecr.io").identity
    assert workload_identity.Azure("t", "from-env", Path("/var/token")) == azure
    aws = trust.host("a.dkr.ecr.eu-west-1.amazonaws.com").identity
    assert workload_identity.Aws("r", "eu-west-1", Path("/t")) == aws
    assert workload_identity.Google("a", Path("/t")) == trust.host("europe-docker.pkg.dev").identity
    assert Host() == trust.host("azurecr.io") == trust.host("a.b.azurecr.io")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("registry: {signatures: require}", "signatures: require, but no keys"),
        ("registry: {signatures: yes}", "registry.signatures"),
        ("registry: {provenence: off}", "registry.provenence: is not a key.*provenance"),
        ("registry: {hosts: {h: {clientCert: c}}}", "hosts.h: has one of clientCert and clientKey"),
        ("registry: {hosts: {h: {identity: {kind: own}}}}", "hosts.h.identity"),
        ("registry: {hosts: {h: {identity: {kind: aws}}}}", "roleArn.*region.*tokenFile"),
        ("registry: {hosts: {h: {password: p}}}", "hosts.h.password: is not a key"),
        ("registries: {}", "registries: is not a key of the policy file.*registry"),
        ("[]", "is no mapping|mapping"),
    ],
)
def test_a_wrong_policy_file(tmp_path, monkeypatch, text, words):
    """Every problem with its place, the nearest key named."""
    for name in ("AWS_ROLE_ARN", "AWS_REGION", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        Trust.load(path)

    shown = str(caught.value).replace("\n", " ")
    assert str(path) in shown
    assert re.search(words, shown), shown


def test_delivery_takes_the_policys_word(started, layout, token, tmp_path):
    """The check before a run goes the same way as the push: through the identity."""
    from tuning.spec import Destination

    with Acr(started) as front, entra(front) as cloud:
        destination = Destination(image=f"{front.host}/tests/checked:1")
        delivery.check(destination, access(front.host, azure(cloud, token)))

        assert 1 == front.exchanged
