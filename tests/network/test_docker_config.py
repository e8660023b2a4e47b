"""Credentials: every valid form of a docker config is read, every broken one named, none shown."""

from __future__ import annotations

import base64
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from registries import Registry

from tuning.errors import RefusedError, SpecError
from tuning.network import docker_config
from tuning.network.docker_config import DOCKER_HUB_KEY, Login
from tuning.oci import registry
from tuning.oci.access import Access

HOST = "registry.example:5000"
CANARY = "S3cr3t.(x)+$"


def packed(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


AUTH = {"auth": packed(f"me:{CANARY}")}
PAIR = {"username": "me", "password": CANARY}


def secret(folder: Path, content: Any, *, name: str = ".dockerconfigjson") -> Path:
    """A mounted Secret with one key; `content` is JSON, text or bytes."""
    mounted = folder / "secret"
    mounted.mkdir()
    data = content if isinstance(content, bytes | str) else json.dumps(content)
    (mounted / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return mounted


def shown(login: Login | None) -> tuple[str, str, str] | None:
    return (login.username, login.password, login.identity_token) if login else None


ME = ("me", CANARY, "")


def test_a_password_may_be_googles_key_file(tmp_path):
    """`docker login -u _json_key --password-stdin < key.json` keeps its lines."""
    key = '{\n  "type": "service_account",\n  "private_key": "x"\n}'
    found = docker_config.login(
        HOST, secret=secret(tmp_path, {"auths": {HOST: {"auth": packed(f"_json_key:{key}\n")}}})
    )

    assert ("_json_key", key) == (found.username, found.password)


@pytest.mark.parametrize(
    "entry",
    [
        AUTH,
        PAIR,
        PAIR | AUTH,
        AUTH | {"email": "me@example"},
        {"auth": packed(f"me:{CANARY}") + "\n"},
        {"auth": packed(f"me:{CANARY}\n")},  # made with echo instead of echo -n
        {"auth": packed(f"me:{CANARY}\0\0")},
    ],
    ids=["auth", "pair", "both", "email", "line-end", "line-end-within", "zeros"],
)
def test_every_form_of_an_entry(tmp_path, entry):
    """As docker, kubectl and people by hand write them."""
    found = docker_config.login(HOST, secret=secret(tmp_path, {"auths": {HOST: entry}}))

    assert ME == shown(found)
    assert f"{tmp_path}/secret/.dockerconfigjson: auths[{HOST}]" == found.origin


def test_a_password_may_hold_colons_and_any_letter(tmp_path):
    """Only the first colon ends the user's name."""
    entry = {"auth": packed('_json_key:{"a": "é:ü"}')}

    found = docker_config.login(HOST, secret=secret(tmp_path, {"auths": {HOST: entry}}))

    assert ("_json_key", '{"a": "é:ü"}') == (found.username, found.password)
    assert "Basic " + entry["auth"] == found.basic


@pytest.mark.parametrize(
    "entry",
    [
        {"identitytoken": CANARY},
        {"identitytoken": CANARY, "auth": packed("<token>:")},
        {"identitytoken": CANARY, "auth": packed("00000000-0000-0000-0000-000000000000:")},
    ],
)
def test_an_identity_token(tmp_path, entry):
    """What `az acr login` leaves; there is no password then."""
    found = docker_config.login(HOST, secret=secret(tmp_path, {"auths": {HOST: entry}}))

    assert (CANARY, "") == (found.identity_token, found.password)


@pytest.mark.parametrize(
    ("registry", "key"),
    [
        (HOST, HOST),
        (HOST, f"https://{HOST}"),
        (HOST, f"http://{HOST}/"),
        (HOST, f"https://{HOST}/v2/"),
        (HOST, f"{HOST}/v1/"),
        (HOST, HOST.upper()),
        (HOST, "registry.*:5000"),
        (HOST, f"{HOST}/team/models"),
        ("registry.example", "registry.example:443"),
        ("registry.example:443", "https://registry.example"),
        ("me.azurecr.io", "*.azurecr.io"),
        ("docker.io", "https://index.docker.io/v1/"),
        ("docker.io", "index.docker.io"),
        ("docker.io", "registry-1.docker.io"),
        ("docker.io", "docker.io"),
        ("[::1]:5000", "[::1]:5000"),
    ],
)
def test_every_way_to_name_a_registry(tmp_path, registry, key):
    """Hosts with ports, schemes, API paths, repositories, patterns, and Docker Hub's old names."""
    mounted = secret(tmp_path, {"auths": {"elsewhere.example": {"auth": packed("a:b")}, key: AUTH}})

    found = docker_config.login(registry, secret=mounted, repository="team/models/phi")

    assert ME == shown(found)


@pytest.mark.parametrize(
    ("registry", "repository", "key"),
    [
        ("registry.example", "", HOST),
        ("xregistry.example:5000", "", HOST),
        ("a.b.azurecr.io", "", "*.azurecr.io"),
        ("azurecr.io", "", "*.azurecr.io"),
        (HOST, "team/modelsx", f"{HOST}/team/models"),
        (HOST, "team", f"{HOST}/team/models"),
        ("registry.example:5001", "", "registry.*:5000"),
    ],
)
def test_an_entry_for_another_place_is_not_ours(tmp_path, registry, repository, key):
    """A login never goes where it was not meant to go; the text names what there is."""
    with pytest.raises(SpecError, match="REG-112") as caught:
        docker_config.login(
            registry, secret=secret(tmp_path, {"auths": {key: AUTH}}), repository=repository
        )

    assert f"no entry for {registry}" in str(caught.value)
    assert CANARY not in str(caught.value)


def test_the_most_specific_entry_wins(tmp_path):
    """A repository's own before the host's, the host's before a pattern; the order is no matter."""
    names = {
        "*.example": "pattern",
        "r.example": "host",
        "r.example/team": "team",
        "r.example/team/a": "repository",
    }
    for turn in (list(names), list(names)[::-1]):
        auths = {key: {"username": names[key], "password": "p"} for key in turn}
        (tmp_path / "file").write_text(json.dumps({"auths": auths}))
        found = {
            (registry, repository): docker_config.login(
                registry, secret=tmp_path / "file", repository=repository
            ).username
            for registry, repository in (
                ("r.example", "team/a"),
                ("r.example", "team/b"),
                ("r.example", "x"),
                ("s.example", "x"),
            )
        }
        assert ["repository", "team", "host", "pattern"] == list(found.values())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (".dockerconfigjson", {"auths": {HOST: AUTH}}),
        ("config.json", {"auths": {HOST: AUTH}, "credsStore": "desktop"}),
        (".dockercfg", {HOST: AUTH}),
        ("push.json", {"auths": {HOST: AUTH}}),
        ("old.json", {HOST: AUTH}),
        ("bom.json", "\ufeff" + json.dumps({"auths": {HOST: AUTH}})),
    ],
)
def test_files_and_mounted_folders(tmp_path, name, content):
    """The file itself under any name; a folder by the keys that Kubernetes knows."""
    mounted = secret(tmp_path, content, name=name)

    assert ME == shown(docker_config.login(HOST, secret=mounted / name))
    if name in docker_config.SECRET_KEYS:
        assert ME == shown(docker_config.login(HOST, secret=mounted))


GOOD = {"auths": {HOST: AUTH}}
BROKEN: dict[str, tuple[Any, str, str]] = {
    "empty file": ("", "REG-110", "is empty"),
    "spaces": (" \n", "REG-110", "is empty"),
    "no JSON": ("{'auths': 1}", "REG-110", "is not JSON"),
    "cut JSON": (json.dumps(GOOD)[:-9], "REG-110", "is not JSON"),
    "deep JSON": ('{"a":' * 50_000, "REG-110", "is not JSON"),
    "a list": ([GOOD], "REG-110", "is not a JSON object"),
    "base64 of it": (packed(json.dumps(GOOD)), "REG-110", "base64 -d"),
    "the manifest": ("apiVersion: v1\nkind: Secret\n", "REG-110", "the Secret's manifest"),
    "the manifest as JSON": ({"kind": "Secret", "data": {}}, "REG-110", "the Secret's manifest"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "REG-110", "cannot be read"),
    "1 MB": (json.dumps(GOOD | {"x": "x" * (1 << 20)}), "REG-110", "larger than a Secret"),
    "no auths": ({"credsStore": "desktop"}, "REG-110", "has no auths"),
    "auths is a list": ({"auths": [HOST]}, "REG-110", "auths is not an object"),
    "auths is empty": ({"auths": {}}, "REG-112", "only for nothing"),
    "another host": ({"auths": {"ghcr.io": AUTH}}, "REG-112", "only for ghcr.io"),
    "entry is text": ({"auths": {HOST: packed(CANARY)}}, "REG-111", "is not an object"),
    "entry is empty": ({"auths": {HOST: {}}}, "REG-111", "docker credential helper"),
    "auth is no base64": ({"auths": {HOST: {"auth": f"me:{CANARY}"}}}, "REG-111", "not base64"),
    "auth is base64 of base64": (
        {"auths": {HOST: {"auth": packed(packed(f"me:{CANARY}"))}}},
        "REG-111",
        "has no colon",
    ),
    "auth is no text": (
        {"auths": {HOST: {"auth": base64.b64encode(b"\xff:\xfe").decode()}}},
        "REG-111",
        "not base64 of text",
    ),
    "auth is a number": ({"auths": {HOST: {"auth": 5}}}, "REG-111", ".auth: is not a string"),
    "no user": ({"auths": {HOST: {"password": CANARY}}}, "REG-111", "has no user"),
    "no password": ({"auths": {HOST: {"username": "me"}}}, "REG-111", "has no password"),
    "password is empty": ({"auths": {HOST: {"auth": packed("me:")}}}, "REG-111", "no password"),
    "both are empty": ({"auths": {HOST: {"auth": packed(":")}}}, "REG-111", "neither"),
    "line break": (
        {"auths": {HOST: {"username": "me", "password": f"{CANARY}\n"}}},
        "REG-111",
        "line break",
    ),
    "twice the same key": (
        f'{{"auths": {{"{HOST}": {{}}, "{HOST}": {{}}}}}}',
        "REG-110",
        "is not JSON",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_secrets_are_named_and_never_shown(tmp_path, case):
    """One line with the file, the key and the remedy; not one value of the file."""
    content, code, words = BROKEN[case]
    mounted = secret(tmp_path, content)

    with pytest.raises(SpecError) as caught:
        docker_config.login(HOST, secret=mounted)

    text = str(caught.value)
    assert f"{code} {mounted}/.dockerconfigjson" in text and words in text
    assert len(text.splitlines()) == 1 and len(text) < 500
    for value in (CANARY, packed(CANARY), packed(f"me:{CANARY}"), packed(packed(f"me:{CANARY}"))):
        assert value not in text


def test_missing_secrets(tmp_path):
    """No file, or a folder with other keys: a Secret of another type."""
    with pytest.raises(SpecError, match=r"REG-110 .*gone: there is no such file"):
        docker_config.login(HOST, secret=tmp_path / "gone")
    mounted = secret(tmp_path, CANARY, name="password")
    with pytest.raises(SpecError, match=r"has no key \.dockerconfigjson, only password"):
        docker_config.login(HOST, secret=mounted)


def test_a_login_does_not_show_itself():
    """Neither by repr nor by str."""
    login = Login("file", "me", CANARY, "token")

    assert "Login(origin='file', username='me')" == repr(login) == str(login)


# -- docker's own configuration ------------------------------------------------------------------


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of ~/.docker, and no helper but ours."""
    folder = tmp_path / "docker"
    folder.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()
    return folder


def helper(folder: Path, name: str, body: str) -> None:
    program = folder.parent / "bin" / f"docker-credential-{name}"
    program.write_text(f"#!/bin/sh\nread server\necho $server >> {folder}/asked\n{body}\n")
    program.chmod(0o755)


def test_dockers_own_configuration(docker):
    """DOCKER_CONFIG is honoured; no file, no entry and no auths mean no login."""
    assert docker_config.login(HOST) is None
    (docker / "config.json").write_text('{"psFormat": "x"}')
    assert docker_config.login(HOST) is None
    (docker / "config.json").write_text(json.dumps({"auths": {"ghcr.io": AUTH}}))
    assert docker_config.login(HOST) is None
    assert ME == shown(docker_config.login("ghcr.io"))
    (docker / "config.json").write_text("{")
    with pytest.raises(SpecError, match=f"REG-110 {docker}/config.json"):
        docker_config.login(HOST)


@pytest.mark.parametrize("setting", [{"credsStore": "our"}, {"credHelpers": {HOST: "our"}}])
def test_a_helper_of_dockers_configuration_is_asked(docker, setting):
    """As docker does: one for all, or one for the host; an identity token is known as one."""
    (docker / "config.json").write_text(json.dumps({"auths": {HOST: {}}} | setting))
    helper(docker, "our", f"""echo '{{"Username": "me", "Secret": "{CANARY}"}}'""")

    assert ME == shown(docker_config.login(HOST))
    assert f"{HOST}\n" == (docker / "asked").read_text()

    helper(docker, "our", """echo '{"Username": "<token>", "Secret": "t"}'""")
    assert ("<token>", "", "t") == shown(docker_config.login(HOST))
    helper(docker, "our", "echo credentials not found in native keychain; exit 1")
    assert docker_config.login(HOST) is None


def test_docker_hub_has_its_own_key_in_helpers(docker):
    """The address that docker has always used there."""
    (docker / "config.json").write_text('{"credsStore": "our"}')
    helper(docker, "our", "exit 1")

    assert docker_config.login("docker.io") is None
    assert "https://index.docker.io/v1/\n" == (docker / "asked").read_text()


@pytest.mark.parametrize(
    ("name", "body", "words"),
    [
        ("missing", "", "is not installed"),
        ("our", f"echo '{CANARY}'", "gave an invalid answer"),
        ("../our", "", "is not a helper's name"),
    ],
)
def test_a_helper_that_does_not_help(docker, name, body, words):
    """Named, with another way out; what it printed is not shown."""
    (docker / "config.json").write_text(json.dumps({"credsStore": name}))
    helper(docker, "our", body)

    with pytest.raises(SpecError, match=words) as caught:
        docker_config.login(HOST)
    assert CANARY not in str(caught.value)


def test_a_secret_never_runs_a_helper(docker, tmp_path):
    """What came from elsewhere does not decide what runs here."""
    helper(docker, "our", """echo '{"Username": "me", "Secret": "x"}'""")
    mounted = secret(
        tmp_path, {"auths": {HOST: {}}, "credsStore": "our", "credHelpers": {HOST: "our"}}
    )

    with pytest.raises(SpecError, match="REG-111"):
        docker_config.login(HOST, secret=mounted)
    assert not (docker / "asked").exists()


def test_several_secrets_side_by_side(tmp_path):
    """The first that knows the registry; one that none knows is asked without a login."""
    for i, host in enumerate(("a.example.com", "b.example.com")):
        mounted = secret(tmp_path, {"auths": {host: {"username": host, "password": "p"}}})
        mounted.rename(tmp_path / str(i))
    found = docker_config.login("b.example.com", secret=tmp_path)
    assert found is not None and "b.example.com" == found.username
    assert docker_config.login("c.example.com", secret=tmp_path) is None


def test_more_secrets_below_the_first(tmp_path):
    """As a Job gets its input's: the first in the folder itself, more numbered; all count."""
    hosts = [f"{letter}.example.com" for letter in "abcdefghijkl"]
    auths = {host: {"auths": {host: {"username": host, "password": "p"}}} for host in hosts}
    folder = secret(tmp_path, auths[hosts[0]])
    for i, host in enumerate(hosts[1:], 1):
        (tmp_path / host).mkdir()
        secret(tmp_path / host, auths[host]).rename(folder / str(i))
    for host in hosts:
        found = docker_config.login(host, secret=folder)
        assert found is not None and host == found.username


@pytest.mark.parametrize("setting", [{"credsStore": "our"}, {"credHelpers": {HOST: "our"}}])
@pytest.mark.parametrize("where", [">&2", ""])
def test_a_helper_that_fails_is_heard(docker, setting, where):
    """What it says, on either stream, is what the user needs: a locked store, a lost session."""
    (docker / "config.json").write_text(json.dumps(setting))
    helper(
        docker, "our", f"printf 'exit status 2: gpg: \\033[31mdecryption failed' {where}; exit 1"
    )

    with pytest.raises(docker_config.HelperFailed) as caught:
        docker_config.login(HOST)

    assert "REG-113" in str(caught.value) and "helper 'our'" in str(caught.value)
    assert r"gpg: \x1b[31mdecryption failed" in str(caught.value)


def test_a_helper_that_failed_is_named_only_where_a_login_is_wanted(docker, tmp_path, started):
    """Many images need none; for the others the helper's words are the reason."""
    (docker / "config.json").write_text('{"credsStore": "our"}')
    helper(docker, "our", "echo The session has expired, log in >&2; exit 1")

    assert registry.look(Access().remote(f"{started.host}/tests/x:1", secret=None)) is None
    with Registry(tmp_path, users={"me": "x"}) as closed:
        remote = Access().remote(f"{closed.host}/tests/x:1", secret=None)
        with pytest.raises(RefusedError, match=r"REG-121 .*there is none: .*session has expired"):
            registry.look(remote)


@pytest.mark.parametrize(
    "auths",
    [
        {f"https://{HOST}": {"auth": packed("old:old")}, HOST: AUTH},
        {HOST: AUTH, f"https://{HOST}/v2/": {"auth": packed("old:old")}},
        {HOST: {}, f"https://{HOST}": AUTH},
        {HOST: None, f"https://{HOST}/v1/": AUTH},
        {HOST: AUTH | {"identitytoken": None, "username": None, "registrytoken": None}},
        {HOST: {"auth": None, "username": ME[0], "password": ME[1], "email": None}},
        {HOST: {"auth": "\n".join(textwrap.wrap(AUTH["auth"], 5))}},
        {HOST: {"auth": AUTH["auth"].rstrip("=")}},
    ],
)
def test_oddities_that_docker_takes(tmp_path, docker, auths):
    """A host twice: its very name counts, and an empty entry does not; null is absence."""
    assert ME == shown(docker_config.login(HOST, secret=secret(tmp_path, {"auths": auths})))
    (docker / "config.json").write_text(json.dumps({"auths": auths, "credHelpers": {HOST: ""}}))
    assert ME == shown(docker_config.login(HOST))


def test_docker_hubs_own_key_counts_before_its_other_names(tmp_path):
    """As in docker, which writes that one."""
    old = {"auth": packed("old:old")}
    auths = {"index.docker.io": old, DOCKER_HUB_KEY: AUTH, "registry-1.docker.io": old}

    assert ME == shown(docker_config.login("docker.io", secret=secret(tmp_path, {"auths": auths})))


def test_a_path_that_cannot_be_looked_at_is_said(tmp_path, monkeypatch):
    """A name of impossible length; and no home directory is no login."""
    with pytest.raises(SpecError, match="REG-110"):
        docker_config.login(HOST, secret=tmp_path / ("x" * 300))
    monkeypatch.setenv("DOCKER_CONFIG", "x" * 300)
    assert docker_config.login(HOST) is None
