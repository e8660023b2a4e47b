"""How registries ask for a login, and what they say when they refuse: anything is read."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from faults import proxy as fp
from faults.proxy import Proxy, Reply, Turn
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tuning.errors import RefusedError, TransientError
from tuning.network.docker_config import Login
from tuning.oci import registry
from tuning.oci.registry.answers import LONGEST_WORDS
from tuning.oci.registry.challenges import parse
from tuning.spec import reference

BRISK = registry.Patience(total=0.1, first=0.01)
ME = Login("push.json auths[x]", "me", "pass:word-1234")
KNOWN = ("Basic", "bearer", "Negotiate", "Digest", "realm", "Realm", "scope", "error", "YII==", "=")
PIECES = st.one_of(
    st.sampled_from(
        [*KNOWN, '"', "'", "\\", ",", ";", " ", "\t", "http://[", "http://127.0.0.1:9/t"]
    ),
    st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=8),
)
HEADERS = st.lists(st.lists(PIECES, max_size=12).map("".join), max_size=3)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (['Basic realm="x"'], {"basic": {"realm": "x"}}),
        (['BEARER Realm = "x" , SCOPE="a b"'], {"bearer": {"realm": "x", "scope": "a b"}}),
        (["Negotiate", "Basic realm=x"], {"negotiate": {}, "basic": {"realm": "x"}}),
        (['Negotiate YII=, Basic realm="a, b"'], {"negotiate": {}, "basic": {"realm": "a, b"}}),
        (['Newauth realm="apps", type=1, title="a \\"b\\"", Basic realm="s"'],
         {"newauth": {"realm": "apps", "type": "1", "title": 'a "b"'}, "basic": {"realm": "s"}}),
        (['Bearer realm="open, service="x"'], {"bearer": {"realm": "open, service="}}),
        (['Bearer realm="x" service="y"; scope=z'],
         {"bearer": {"realm": "x", "service": "y", "scope": "z"}}),
        (['Bearer error="invalid_token"', 'Bearer realm="x"', 'Bearer realm="y"'],
         {"bearer": {"realm": "x"}}),
        (['realm="nobody\'s"', ",,", "", "=", "\x80\xff"], {}),
    ],
)  # fmt: skip
def test_challenges_of_every_form(headers, expected):
    """Several in a header or in several; names in any case; token68; broken quoting."""
    found = {name: {k: v for k, v in each.items() if v != "" and k != "yii"}
             for name, each in parse(headers).items()}  # fmt: skip

    assert expected == found


@given(HEADERS)
@example(['Bearer realm="http://['])
@example(["a" * 100_000])
@example(['x="' * 5_000])
def test_whatever_a_header_holds_is_read(headers):
    """No text is an error, and none takes long."""
    for scheme, parameters in parse(headers).items():
        assert scheme == scheme.lower()
        assert all(name == name.lower() for name in parameters)


@pytest.fixture(scope="module")
def wall() -> Iterator[Proxy]:
    """A registry that answers what a test sets, to everything."""
    with Proxy(("127.0.0.1", 9)) as proxy:
        yield proxy


def ask(wall: Proxy, reply: Reply, login: Login | None = ME) -> str:
    """What a user reads when every request gets this reply."""

    def fault(turn: Turn) -> None:
        _ = turn.body
        turn.answer(Reply(reply.status, list(reply.headers), reply.body))

    wall.mend()
    wall.spoil(fault, times=None)
    remote = registry.Remote(reference.parse(f"{wall.host}/team/x:1"), login, patience=BRISK)
    with pytest.raises((RefusedError, TransientError)) as caught:
        remote.persist(lambda: registry.resolve(remote)) if login else registry.check_push(remote)
    return str(caught.value)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(HEADERS, st.binary(max_size=200), st.booleans())
def test_any_refusal_is_one_line_with_a_code(wall, headers, body, login):
    """A 401 of any headers and any body: REG-121, or what its token server is; no traceback."""
    shown = [("WWW-Authenticate", text) for text in headers]

    text = ask(wall, Reply(401, shown, body), ME if login else None)

    assert text.startswith(("REG-121", "REG-127", "REG-122", "REG-131", "REG-132", "REG-136"))
    assert 1 == len(text.splitlines()) and len(text) < 2_000


SPEC = {"errors": [{"code": "DENIED", "message": "no push", "detail": {"Action": "push"}}]}
BODIES = {
    "specification": (json.dumps(SPEC), "DENIED: no push"),
    "two errors": ('{"errors":[{"message":"first"},{"message":"second"}]}', "first: second"),
    "a string": ('{"errors":["only for members"]}', "only for members"),
    "details": ('{"details":"incorrect username"}', "incorrect username"),
    "nested": ('{"error":{"code":401,"message":"token too old"}}', "token too old"),
    "OAuth": ('{"error":"invalid_grant","error_description":"x expired"}', "invalid_grant: x expired"),
    "plain": ("only on weekdays\r\n", "only on weekdays"),
    "HTML": ("<html><style>b{}</style><body><b>Keep</b>&nbsp;out<script>1</script></body></html>", "Keep out"),
    "XML": ("<Error><Code>AccessDenied</Code><Message>Expired</Message></Error>", "AccessDenied Expired"),
    "not JSON": ('{"errors": [{"code"', '{"errors": [{"code"'),
    "escapes": ("stop\x1b[2J\u202ehere", r"stop\x1b[2J\u202ehere"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("status", [401, 403])
def test_the_registrys_words_are_shown(wall, name, status):
    """Of whichever form; without markup, and without what a terminal would obey."""
    body, words = BODIES[name]
    shown = [("WWW-Authenticate", 'Basic realm="x"')]

    assert words in ask(wall, Reply(status, shown, body.encode()))


@pytest.mark.parametrize("body", [b"x" * 100_000, b"[" * 60_000, b"<" * 60_000, b"\0\xff" * 500])
def test_words_are_bounded(wall, body):
    """However long they are; nothing is shown of binary data."""
    text = ask(wall, Reply(403, [], body))

    assert len(text) < LONGEST_WORDS + 250
    assert "\\x00" not in text


def test_a_login_in_the_words_is_not_shown(wall):
    """A registry may send back what it got."""
    words = f"wrong: {ME.password} ({ME.basic})".encode()

    text = ask(wall, Reply(403, [], words))

    assert ME.password not in text and ME.basic[6:] not in text
    assert "wrong: <redacted>" in text


@pytest.mark.parametrize(
    ("status", "header", "body", "code"),
    [
        (403, "", "Your authorization token has expired. Reauthenticate", "REG-121"),
        (403, "", "Two-factor authentication is required", "REG-121"),
        (403, "", "no permission on project", "REG-122"),
        (403, "", "insufficient privileges to upload", "REG-122"),
        (401, ', Bearer error="insufficient_scope"', "", "REG-122"),
        (401, "", '{"errors":[{"code":"DENIED","message":"push is not yours"}]}', "REG-122"),
        (401, "", '{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}', "REG-121"),
    ],
)  # fmt: skip
def test_no_right_is_told_from_no_login(wall, status, header, body, code):
    """By the status, the code, the challenge and the words; the remedy names the login's file."""
    shown = [("WWW-Authenticate", f'Basic realm="x"{header}')]

    text = ask(wall, Reply(status, shown, body.encode()))

    assert text.startswith(code) and ME.origin in text
    assert ("give the login" if code == "REG-122" else "renew the user and password") in text


def test_a_token_server_that_cannot_be_reached_is_named(wall):
    """Not the registry, which answers."""
    shown = [("WWW-Authenticate", 'Bearer realm="http://127.0.0.1:9/token"')]

    text = ask(wall, Reply(401, shown, b""))

    assert "REG-131" in text and "127.0.0.1:9" in text


def test_a_token_of_control_characters_is_none(wall):
    """It would break the request that carries it."""
    shown = [("WWW-Authenticate", f'Bearer realm="http://{wall.host}/token"')]
    wall.mend()
    wall.spoil(fp.status(200, b'{"token": "a\\r\\nb"}'), path="^/token", times=None)
    wall.spoil(fp.edit(lambda reply: None), path="^/none", times=None)

    def fault(turn: Turn) -> None:
        turn.answer(Reply(401, shown))

    wall.spoil(fault, times=None)
    remote = registry.Remote(reference.parse(f"{wall.host}/team/x:1"), ME, patience=BRISK)

    with pytest.raises(TransientError, match=r"REG-133 .*gave no token"):
        registry.look(remote)
