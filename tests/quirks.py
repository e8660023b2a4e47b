"""What registries do that the protocol's examples do not show, a line each, before a real one.

    with front(QUIRKS["nexus-basic"], registry) as host:
        ... every command, with the login me:secret ...

A quirk is a set of faults at the registry's address (`near`) or at the store to which it sends
clients (`store`); both pass everything else on to Debian's docker-registry. `reads` and `writes`
are what a command that pulls or pushes says of it: nothing (it works), or words of the error.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from faults.proxy import Proxy, Reply, Turn
from registries import Registry

USER, PASSWORD = "me", "secret-word"
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
TOKEN = "Bearer registry-token"
REALM = "http://{host}/token"
Headers = tuple[str, ...]  # values of WWW-Authenticate
Step = Callable[[Proxy, Proxy], None]  # prepares `near` and `store`


def error(code: str, message: str, detail: object = None) -> bytes:
    """The body of an error as the distribution specification has it."""
    return json.dumps({"errors": [{"code": code, "message": message, "detail": detail}]}).encode()


def html(title: str) -> bytes:
    """A page as proxies answer it."""
    style = "<style>body { color: red }</style><script>alert(1)</script>"
    return f"<html><head><title>{title}</title>{style}</head><!-- x --></html>".encode()


def xml(code: str, message: str) -> bytes:
    """An error of S3."""
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


def answers(
    status: int,
    body: bytes,
    *,
    method: str | None = None,
    path: str = "/v2/",
    times: int | None = None,
) -> Step:
    """The registry answers so to requests that fit, in place of what it would."""

    def fault(turn: Turn) -> None:
        _ = turn.body
        turn.answer(Reply(status, [("Content-Type", "text/plain")], body))

    return lambda near, store: near.spoil(fault, method=method, path=path, times=times)


def wants(*challenges: str, body: bytes = b"", accepts: str = BASIC) -> Step:
    """Each request needs the Authorization `accepts`; others get 401 and these challenges."""

    def prepare(near: Proxy, store: Proxy) -> None:
        def fault(turn: Turn) -> None:
            if turn.seen.headers.get("authorization") == accepts:
                return turn.answer(turn.forward())
            _ = turn.body
            shown = [
                ("WWW-Authenticate", c.format(realm=f"http://{near.host}/token"))
                for c in challenges
            ]
            return turn.answer(Reply(401, shown, body))

        near.spoil(fault, path="^/v2/", times=None)

    return prepare


def bearer(*challenges: str, token: tuple[int, bytes] | None = None) -> Step:
    """Tokens of the server at /token, which answers `token` or takes the login."""

    def prepare(near: Proxy, store: Proxy) -> None:
        def fault(turn: Turn) -> None:
            good = turn.seen.headers.get("authorization") == BASIC
            status, body = token or ((200, b'{"token":"registry-token"}') if good else (401, b""))
            turn.answer(Reply(status, [], body))

        near.spoil(fault, path="^/token", times=None)

    def both(near: Proxy, store: Proxy) -> None:
        prepare(near, store)
        wants(*(challenges or ('Bearer realm="{realm}",service="x"',)), accepts=TOKEN)(near, store)

    return both


def token_refused(body: bytes, challenge: str = 'Bearer realm="{realm}"') -> Step:
    """Tokens are given, and refused for everything that writes."""

    def prepare(near: Proxy, store: Proxy) -> None:
        def fault(turn: Turn) -> None:
            _ = turn.body
            shown = challenge.format(realm=f"http://{near.host}/token")
            turn.answer(Reply(401, [("WWW-Authenticate", shown)], body))

        near.spoil(fault, method="POST", path="/blobs/uploads", times=None)
        bearer()(near, store)

    return prepare


def blobs_in_store(fault: Callable[[Turn], bool] = lambda turn: False) -> Step:
    """Blobs are at signed addresses of a store; `fault` answers there where it returns True."""

    def prepare(near: Proxy, store: Proxy) -> None:
        signed = 0

        def send(turn: Turn) -> None:
            nonlocal signed
            signed += 1
            where = f"http://{store.host}{turn.seen.path}?X-Amz-Signature={signed}"
            turn.answer(Reply(307, [("Location", where)]))

        def serve(turn: Turn) -> None:
            turn.seen.path = urlsplit(turn.seen.path).path
            if not fault(turn):
                turn.answer(turn.forward())

        for method in ("GET", "HEAD"):
            near.spoil(send, method=method, path="/blobs/sha256:", times=None)
        store.spoil(serve, times=None)

    return prepare


def _signed_for_get(turn: Turn) -> bool:
    if turn.seen.method == "HEAD":
        turn.answer(Reply(403))
    return turn.seen.method == "HEAD"


def _no_authorization(turn: Turn) -> bool:
    wrong = "authorization" in turn.seen.headers
    if wrong:
        turn.answer(Reply(400, [], xml("InvalidAuthenticationInfo", "not in the correct format")))
    return wrong


def _expired_at_first() -> Callable[[Turn], bool]:
    met: set[tuple[str, str]] = set()

    def fault(turn: Turn) -> bool:
        key = turn.seen.method, turn.seen.path
        fresh = key not in met
        met.add(key)
        if fresh:
            turn.answer(Reply(403, [], xml("AccessDenied", "Request has expired")))
        return fresh

    return fault


def _closed(turn: Turn) -> bool:
    turn.answer(Reply(403, [], xml("AccessDenied", "VPC endpoint policy")))
    return True


def relative_uploads(near: Proxy, store: Proxy) -> None:
    """A Location without a host, of a path of the registry's own."""
    _relative(near)


def _relative(proxy: Proxy) -> None:
    def fault(turn: Turn) -> None:
        reply = turn.forward()
        parts = urlsplit(reply.header("location"))
        reply.replace("Location", f"{parts.path}?{parts.query}")
        turn.answer(reply)

    for method in ("POST", "PATCH"):
        proxy.spoil(fault, method=method, path="/blobs/uploads/", times=None)


def uploads_elsewhere(near: Proxy, store: Proxy) -> None:
    """An upload begins at another host, which answers a relative Location."""

    def send(turn: Turn) -> None:
        _ = turn.body
        turn.answer(Reply(307, [("Location", f"http://{store.host}{turn.seen.path}")]))

    def alien(turn: Turn) -> None:
        _ = turn.body
        turn.answer(Reply(404, [], error("BLOB_UPLOAD_UNKNOWN", "not begun here")))

    near.spoil(send, method="POST", path="/blobs/uploads/", times=None)
    for method in ("PATCH", "PUT"):
        near.spoil(alien, method=method, path="/blobs/uploads/", times=None)
    _relative(store)


@dataclass(frozen=True)
class Quirk:
    """What a registry does, where that is written, and what commands make of it."""

    maker: str
    source: str  # a repository's issue on GitHub or a specification; "-": met, not written down
    step: Step
    reads: str = ""  # words of the error of what pulls; nothing if it works
    writes: str = ""  # of what pushes
    late: bool = False  # only a push meets it, a check of the right to push does not


def _both(maker: str, source: str, step: Step, words: str) -> Quirk:
    return Quirk(maker, source, step, words, words)


def _push(maker: str, source: str, step: Step, words: str, *, late: bool = False) -> Quirk:
    return Quirk(maker, source, step, writes=words, late=late)


_TWO_FACTORS = "The provided password or token is incorrect or your account has 2FA enabled"
_ECR_EXPIRED = "Your authorization token has expired. Reauthenticate and try again."
_ECR_RIGHT = (
    "User: arn:aws:sts::1:assumed-role/ci is not authorized to perform: ecr:InitiateLayerUpload"
)
_ECR_FIXED = (
    "The image tag '1' already exists and cannot be overwritten because the repository is immutable"
)
_ECR_NAME = "The repository with name 'team/x' does not exist in the registry with id '1'"
_GAR_RIGHT = 'Permission "artifactregistry.repositories.uploadArtifacts" denied on resource "p"'
_HARBOR_RIGHT = "unauthorized to access repository: team/x, action: push"
_HARBOR_FULL = "adding 29.0 MiB of storage resource, which will exceed the configured upper limit"
_QUAY = "access to the requested resource is not authorized"
_GHCR_RIGHT = "permission_denied: write_package"
_HUB_SCOPES = "access token has insufficient scopes"
_HUB_RATE = "You have reached your unauthenticated pull rate limit"
_UPLOADS, _TAG = "/blobs/uploads/", "/manifests/1$"
_REGISTRY = 'Bearer realm="{realm}",service="x",scope="repository:team/x:pull"'

QUIRKS: dict[str, Quirk] = {
    # how a login is asked for
    "nexus-basic": Quirk("Nexus", "sonatype/nexus-public#921", wants('BASIC realm="Sonatype Nexus Repository Manager"')),
    "artifactory-two-ways": Quirk("Artifactory", "earthly/earthly#1017", bearer(f'{_REGISTRY}, Basic realm="Artifactory Realm"')),
    "acr-token": Quirk("ACR", "Azure/azure-sdk-for-js recordings of container-registry", bearer(_REGISTRY)),
    "kerberos-first": Quirk("any, behind a proxy", "RFC 9110, 11.6.1", wants("Negotiate", 'Basic realm="x"')),
    "kerberos-in-one-line": Quirk("any, behind a proxy", "RFC 9110, 11.6.1", wants('Negotiate YII=, NTLM, Basic realm="a, b"')),
    "names-in-capitals": Quirk("any", "RFC 9110, 11.2", bearer('bearer Realm="{realm}",SERVICE="x"')),
    "nothing-quoted": Quirk("any", "RFC 9110, 11.2", bearer("Bearer realm={realm},service=x")),
    "quote-not-closed": Quirk("any", "-", bearer('Bearer service="x",realm="{realm}')),
    "no-commas": Quirk("any", "-", bearer('Bearer service="x" realm="{realm}"')),
    "kerberos-alone": _both("any, behind a proxy", "RFC 4559", wants("Negotiate", body=html("401 Unauthorized")), "only negotiate"),
    "digest-alone": _both("any, behind a proxy", "RFC 7616", wants('Digest realm="x", qop="auth, auth-int", nonce="n"', body=error("UNAUTHORIZED", "use digest")), "use digest"),
    "no-challenge": _both("any, behind a proxy", "-", wants(body=html("Company login")), "Company login"),
    "realm-is-no-url": _both("any, behind a proxy", "-", wants('Bearer realm="Company SSO"', body=b"ask the portal"), "ask the portal"),
    # a login that is not good
    "gitlab-two-factors": _both("GitLab", "swarmpit/swarmpit#657", bearer(token=(403, error("DENIED", f"HTTP Basic: Access denied. {_TWO_FACTORS}"))), "2FA enabled"),
    "ecr-expired": _both("ECR", "aws-samples/ecs-bg-external-controller#13", answers(403, error("DENIED", _ECR_EXPIRED)), "Reauthenticate"),
    "artifactory-password": _both("Artifactory", "-", wants('Basic realm="Artifactory Realm"', accepts="-", body=b'{"errors":[{"status":401,"message":"Bad credentials"}]}'), "Bad credentials"),
    "hub-password": _both("Docker Hub", "-", bearer(token=(401, b'{"details":"incorrect username or password"}')), "incorrect username or password"),
    "artifactory-token-406": _both("Artifactory", "swarmpit/swarmpit#266", bearer(token=(406, b"Not Acceptable")), "Not Acceptable"),
    # a login that may not
    "hub-scopes": _push("Docker Hub", "docker/build-push-action#587", token_refused(error("UNAUTHORIZED", _HUB_SCOPES), f'{_REGISTRY},error="insufficient_scope"'), _HUB_SCOPES),
    "harbor-robot": _push("Harbor", "goharbor/harbor#13988", token_refused(error("UNAUTHORIZED", _HARBOR_RIGHT)), _HARBOR_RIGHT),
    "quay-robot": _push("Quay", "-", token_refused(error("UNAUTHORIZED", _QUAY, {})), _QUAY),
    "ecr-right": _push("ECR", "AWS, IAM access denied messages", answers(403, error("DENIED", _ECR_RIGHT), method="POST"), _ECR_RIGHT),
    "gar-right": _push("GAR", "-", answers(403, error("DENIED", _GAR_RIGHT), method="POST"), "uploadArtifacts"),
    "ghcr-right": _push("GHCR", "tridz-dev/huf#349", answers(403, error("DENIED", _GHCR_RIGHT), method="POST"), _GHCR_RIGHT),
    "page-of-a-firewall": _both("any, behind a proxy", "-", answers(403, html("Access denied by policy 7")), "Access denied by policy 7"),
    # what is full, fixed, missing, too large, too often
    "harbor-full": _push("Harbor", "goharbor/harbor#17390", answers(403, error("DENIED", _HARBOR_FULL), method="PUT", path="/manifests/"), "storage resource", late=True),
    "ecr-immutable": _push("ECR", "aws/containers-roadmap#862", answers(400, error("TAG_INVALID", _ECR_FIXED), method="PUT", path=_TAG), "is immutable", late=True),
    "harbor-immutable": _push("Harbor", "goharbor/community#108", answers(412, error("PRECONDITION", "configured as immutable, cannot be updated"), method="PUT", path=_TAG), "configured as immutable", late=True),
    "ecr-no-repository": _push("ECR", "-", answers(404, error("NAME_UNKNOWN", _ECR_NAME), method="POST"), "does not exist in the registry"),
    "nginx-too-large": _push("any, behind nginx", "nginx client_max_body_size", answers(413, html("413 Request Entity Too Large"), method="PUT", path=_UPLOADS), "Request Entity Too Large", late=True),
    "hub-rate": Quirk("Docker Hub", "docker/hub-feedback", answers(429, error("TOOMANYREQUESTS", _HUB_RATE), method="GET", path="/manifests/"), _HUB_RATE, _HUB_RATE),
    # where blobs are, and how they are asked for
    "ghcr-head": Quirk("GHCR", "docker/build-push-action#981", answers(403, b"", method="HEAD")),
    "no-head": Quirk("any, behind a proxy", "-", answers(405, b"", method="HEAD")),
    "ghcr-keeps-uploads": Quirk("GHCR", "radius-project/radius#12623", answers(405, error("UNSUPPORTED", "x"), method="DELETE")),
    "ghcr-relative": Quirk("GHCR, GAR", "apple/swift-container-plugin#44, gitpod-io/gitpod#10214", relative_uploads),
    "gar-whole": Quirk("GAR", "jozu-ai/kitops#777", answers(405, error("UNSUPPORTED", "x"), method="PATCH")),
    "upload-elsewhere": Quirk("any with two hosts", "containerd/containerd#11949", uploads_elsewhere),
    "quay-signed-for-get": Quirk("Quay, GitLab on S3", "artifact-keeper/artifact-keeper#3209, moby/moby#50065", blobs_in_store(_signed_for_get)),
    "acr-store": Quirk("ACR", "Azure/acr#217", blobs_in_store(_no_authorization)),
    "signed-too-long-ago": Quirk("any on S3", "Amazon S3, presigned URLs", lambda near, store: blobs_in_store(_expired_at_first())(near, store)),
    "store-out-of-reach": Quirk("ACR, ECR in a closed network", "Azure/azure-sdk-for-python#45744", blobs_in_store(_closed), reads="VPC endpoint policy"),
}  # fmt: skip


@contextlib.contextmanager
def front(quirk: Quirk, registry: Registry) -> Iterator[Proxy]:
    """The registry behind an address that has the quirk."""
    with Proxy(registry.address) as near, Proxy(registry.address) as store:
        quirk.step(near, store)
        yield near
        leaked = [seen for seen in store.seen if "authorization" in seen.headers]
        assert [] == leaked


def options_in(text: str) -> set[str]:
    """The options that a message names."""
    return set(re.findall(r"--[a-z][a-z-]+", text))
