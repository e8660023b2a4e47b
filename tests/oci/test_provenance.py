"""Provenance: what an image cannot say of itself is attached to it, whole and without secrets."""

from __future__ import annotations

import concurrent.futures
import json
from pathlib import Path
from typing import Any

import adapters
import pytest
from faults import proxy as fp
from faults.proxy import Proxy, Reply
from registries import ReferrersFront

from tuning import files
from tuning.errors import RefusedError, TransientError
from tuning.oci import delivery, provenance, registry
from tuning.oci.delivery import Access
from tuning.oci.layout.manifest import MANIFEST, Blob, read_layout
from tuning.oci.policy import Trust
from tuning.spec import Destination, reference

pytestmark = pytest.mark.registry
FAST = registry.Patience(total=2, first=0.01)
SPEC = """\
# the command line also said: data=('https://x.example/b?sig=CANARY',)
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: demo}
tuning:
  preset: {name: phi-3-mini-4k-instruct}
  method: lora
  input: {urls: ["https://user:word@data.example.com/a.jsonl?sig=CANARY&se=1"]}
  output: {image: registry.example.com/team/demo:1}
"""
RECIPE = {
    "base_model": "org/base",
    "base_revision": "c" * 40,
    "data": ["d" * 64],
    "versions": {"torch": "2.13.0"},
}
TRAINED = {
    "steps": 8,
    "seconds": 12.5,
    "tokens": 900,
    "tokens_per_second": 72.0,
    "peak_memory_bytes": 1 << 20,
    "loss_first": 2.0,
    "loss_last": 1.0,
    "answers": [{"question": "CANARY", "tuned": "CANARY"}],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory that has come to its push."""
    folder = tmp_path / "run"
    adapters.build(folder)
    (folder / "spec.yaml").write_text(SPEC)
    plan = {
        "run_id": "run-1",
        "recipe": RECIPE,
        "placement": {"micro_batch": 2, "device": "cuda"},
        "device": "1 x A100",
        "speed": {"seconds": [10.0, 20.0], "tokens_per_second": [1.0, 2.0]},
        "memory": {"peak": 5},
        "rows": 7,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    events = [("base", "start"), ("train", "end"), ("package", "end"), ("push", "start")]
    lines = [
        {"at": f"2026-01-01T00:00:0{n}.000+00:00", "phase": phase, "event": event, "key": ""}
        for n, (phase, event) in enumerate(events)
    ]
    lines[1]["value"] = TRAINED  # type: ignore[assignment]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "journal.jsonl").write_text(text)
    return folder


def test_the_datasets_of_the_hub_are_among_the_dependencies(run: Path) -> None:
    """By name, commit, config and split, beside the hashes of their files."""
    chosen = {"name": "org/two", "revision": "e" * 40, "config": "en", "splits": ["train", "test"]}
    files.write_json(run / "adapter" / "tuning.json", {"datasets": [chosen]})

    built = provenance.statement(run, [])["predicate"]["buildDefinition"]

    assert {
        "uri": f"hf://datasets/org/two@{'e' * 40}",
        "name": "config en, split train+test",
        "digest": {"gitCommit": "e" * 40},
    } == built["resolvedDependencies"][-1]


def deliver(host: str, run: Path, *, rule: Any = "warn") -> list[str]:
    """Push as a run does; gives what a person was told."""
    said: list[str] = []
    delivery.deliver(
        Destination(image=f"{host}/tests/{run.parent.name.lower().strip('_')}:1"),
        Access(trust=Trust(provenance=rule)),
        layout=run / "image",
        adapter=run / "adapter",
        run_id="run-1",
        own=(),
        progress=lambda done, total, note: None,
        run=run,
        say=said.append,
    )
    return said


def remote(host: str, run: Path) -> registry.Remote:
    name = f"{host}/tests/{run.parent.name.lower().strip('_')}:1"
    return registry.Remote(reference.parse(name), patience=FAST)


def digest(run: Path) -> str:
    return read_layout(run / "image").digest


def test_the_statement_tells_what_was_asked_planned_and_measured(run):
    """In-toto and SLSA by the letter; times in UTC."""
    made = json.loads(provenance.write(run, digest=digest(run), name="registry/repo"))

    subject = [{"name": "registry/repo", "digest": {"sha256": digest(run)[7:]}}]
    assert ("https://in-toto.io/Statement/v1", subject) == (made["_type"], made["subject"])
    assert "https://slsa.dev/provenance/v1" == made["predicateType"]
    definition, details = made["predicate"]["buildDefinition"], made["predicate"]["runDetails"]
    (workspace,) = definition["externalParameters"]["documents"]
    (note,) = definition["externalParameters"]["notes"]
    assert "the command line also said: data=('https://x.example/b?<redacted>',)" == note
    assert ["https://data.example.com/a.jsonl?<redacted>"] == workspace["tuning"]["input"]["urls"]
    assert {"micro_batch": 2, "device": "cuda"} == definition["internalParameters"]["placement"]
    assert [
        {"uri": "pkg:huggingface/org/base", "digest": {"gitCommit": "c" * 40}},
        {"name": "data", "digest": {"sha256": "d" * 64}},
    ] == definition["resolvedDependencies"]
    told = {"invocationId": "run-1", "startedOn": "2026-01-01T00:00:00.000Z"}
    assert told | {"finishedOn": "2026-01-01T00:00:02.000Z"} == details["metadata"]
    assert [10.0, 20.0] == details["tuning_planned"]["seconds"]
    assert 12.5 == details["tuning_measured"]["seconds"]


@pytest.mark.parametrize("name", ["my-model", "registry.example.com/models/base:1"])
def test_a_base_that_is_not_the_hubs_is_not_said_to_be(run, name):
    """A folder or an image, known by the hash of its files."""
    plan = json.loads((run / "plan.json").read_text())
    plan["recipe"] |= {"base_model": name, "base_revision": "sha256:" + "e" * 64}
    (run / "plan.json").write_text(json.dumps(plan))

    made = json.loads(provenance.write(run, digest=digest(run), name="registry/repo"))

    first = made["predicate"]["buildDefinition"]["resolvedDependencies"][0]
    assert {"name": name, "digest": {"sha256": "e" * 64}} == first


def test_no_secret_and_no_prompt_is_in_it(run):
    """A signed query, a password in a URL, the questions that were asked."""
    text = provenance.write(run, digest=digest(run), name="n").decode()

    assert "CANARY" not in text and "word@" not in text


@pytest.mark.parametrize("kind", ["tag alone", "referrers API and tag"])
def test_it_is_attached_by_referrer_and_by_tag(started, run, kind):
    """Found both ways; the image's digest and tag stay what they are."""
    front = ReferrersFront(started) if "API" in kind else Proxy(started.address)
    with front:
        said = deliver(front.host, run)
        (seen,) = registry.attached(remote(front.host, run), digest(run))
        (part,) = registry.parts(remote(front.host, run), seen.digest, provenance.MEDIA_TYPE)
    (by_tag,) = registry.attached(remote(started.host, run), digest(run))

    assert [] == said
    assert (seen.digest, provenance.MEDIA_TYPE) == (by_tag.digest, by_tag.artifact_type)
    assert {provenance.PREDICATE_KEY: provenance.PREDICATE} == seen.annotations
    assert files.read_json(run / "provenance.json") == json.loads(part.content)
    assert registry.Found(digest(run), "run-1") == registry.look(remote(started.host, run))


def test_the_same_delivery_again_attaches_nothing_more(started, run):
    """A crash after the push: the same statement, not one byte of a blob."""
    deliver(started.host, run)
    before, blobs = files.read_json(run / "provenance.json"), started.blobs()

    assert [] == deliver(started.host, run)
    assert before == files.read_json(run / "provenance.json")
    assert blobs == started.blobs()
    assert 1 == len(registry.attached(remote(started.host, run), digest(run)))


@pytest.mark.parametrize("rule", ["warn", "require", "off"])
def test_trouble_with_it_follows_the_rule(started, run, rule):
    """P19: the step fails, or a person is told; the image is there in any case."""
    with Proxy(started.address) as front:
        no = fp.status(403, b'{"errors":[{"code":"DENIED"}]}')
        front.spoil(no, method="PUT", path="/manifests/sha256-", times=None)
        if rule == "require":
            with pytest.raises(RefusedError, match="REG-122"):
                deliver(front.host, run, rule=rule)
        else:
            said = deliver(front.host, run, rule=rule)
            assert (rule == "warn") == (len(said) == 1)
            assert all("provenance statement is not" in text for text in said)
        assert (rule == "off") == (not (run / "provenance.json").exists())

    assert registry.Found(digest(run), "run-1") == registry.look(remote(started.host, run))


def test_an_immutable_tag_is_no_matter_where_referrers_are_known(started, run):
    """A registry that refuses to change a tag, but lists referrers itself."""
    with ReferrersFront(started) as front:
        no = fp.status(400, b'{"errors":[{"code":"TAG_INVALID"}]}')
        front.spoil(no, method="PUT", path="/manifests/sha256-", times=None)

        assert [] == deliver(front.host, run, rule="require")
        assert 1 == len(registry.attached(remote(front.host, run), digest(run)))


@pytest.mark.parametrize("fault", ["refused", "reply-lost", "503", "429"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/uploads/"), ("PUT", "/uploads/"), ("PUT", "/manifests/"), ("GET", "/manifests/")],
)
def test_attaching_survives_a_fault_at_each_request(started, run, method, path, fault):
    """One statement, once, whatever breaks on the way."""
    faults = {
        "refused": fp.refuse,
        "reply-lost": fp.drop_reply,
        "503": fp.status(503),
        "429": fp.status(429, retry_after=0),
    }
    subject = Blob(MANIFEST, digest(run), 1)
    with Proxy(started.address) as front:
        front.spoil(faults[fault], method=method, path=path)
        registry.attach(remote(front.host, run), subject, b"{}\n", media_type="x/y", annotations={})

        assert front.struck()
    assert 1 == len(registry.attached(remote(started.host, run), digest(run)))


def test_statements_of_several_writers_stay_beside_each_other(started, run):
    """One after the other all are kept; at once the list stays a list, and nobody fails."""
    subject = Blob(MANIFEST, digest(run), 1)

    def attach(number: int) -> str:
        to = remote(started.host, run)
        to.patience = registry.Patience(total=30, first=0.5)  # three tries of a 500
        return registry.attach(to, subject, b"%d" % number, media_type="x/y", annotations={})

    one_by_one = {attach(number) for number in range(3)}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        at_once = set(pool.map(attach, range(3, 7)))

    found = {each.digest for each in registry.attached(remote(started.host, run), digest(run))}
    assert (3, 4) == (len(one_by_one), len(at_once))
    assert one_by_one <= found <= one_by_one | at_once
    assert found & at_once


@pytest.mark.parametrize(
    "listed",
    [b"", b"[]", b'{"manifests": 5}', b'{"manifests": [5, {}, {"digest": "x"}]}', b"\xff"],
)
def test_a_list_of_referrers_may_be_anything(started, run, listed):
    """What is no entry counts for nothing; no traceback."""
    deliver(started.host, run)

    def lie(reply: Reply) -> None:
        reply.status, reply.body = 200, listed

    with Proxy(started.address) as front:
        front.spoil(fp.edit(lie), path="/referrers/", times=None)
        found = registry.attached(remote(front.host, run), digest(run))

    assert 1 == len(found)


def test_an_attached_document_is_checked(started, run):
    """Its manifest and its content against their digests."""
    deliver(started.host, run)
    (each,) = registry.attached(remote(started.host, run), digest(run))

    def corrupt(reply: Reply) -> None:
        reply.body = reply.content().replace(b"sha256", b"sha265", 1)

    for path in (f"/manifests/{each.digest}", "/blobs/"):
        with Proxy(started.address) as front:
            front.spoil(fp.edit(corrupt), path=path, times=None)
            with pytest.raises((RefusedError, TransientError), match=r"REG-143|IMAGE-110"):
                registry.parts(remote(front.host, run), each.digest, provenance.MEDIA_TYPE)


def test_another_destination_gets_a_statement_of_its_own(run):
    """The subject's name is the repository's."""
    first = provenance.write(run, digest=digest(run), name="one")
    second = provenance.write(run, digest=digest(run), name="two")

    assert first != second
    assert second == provenance.write(run, digest=digest(run), name="two")
