"""An adapter as a model of the hub: what is committed, who may replace it, what failures leave."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_hub import FakeHub
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http

from tuning import files
from tuning.errors import RefusedError, TransientError, TuningError
from tuning.network.retry import Patience
from tuning.oci import hub_output
from tuning.oci.hub_output import Repository
from tuning.sources import hub

RUN, OTHER = "1" * 64, "2" * 64
NAME = "org/adapter"


@pytest.fixture
def fake(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeHub]:
    """The hub that HF_ENDPOINT names; nothing of the machine's, no waiting between tries."""
    folder = tmp_path_factory.mktemp("hf")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub, "PATIENCE", Patience(first=0.001, tries=2))
    at_once = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    monkeypatch.setattr(_http, "time", at_once)  # the library tries five times by itself
    with FakeHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A finished adapter's files."""
    return written(tmp_path / "adapter")


def written(folder: Path, run_id: str = RUN, weights: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(weights * 100)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Adapter\n")
    (folder / "tuning.json").write_text(json.dumps({"run_id": run_id}))
    return folder


def repository(fake: FakeHub, branch: str = "main") -> Repository:
    return Repository(NAME, branch, fake.token)


def push(fake: FakeHub, adapter: Path, run_id: str = RUN, **more: object) -> str:
    options = {"own": (), "on_exists": "refuse", "run_id": run_id} | more
    branch = str(options.pop("branch", "main"))
    return hub_output.push(repository(fake, branch), adapter, **options)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_repository_is_private_and_holds_the_adapters_files(
    fake: FakeHub, adapter: Path
) -> None:
    """In one commit, whose id is told; the same push again commits nothing."""
    first = push(fake, adapter)

    made = fake.repositories[NAME]
    assert f"hf://{NAME}@{made.commit}" == first
    assert contents(adapter) == {n: d for n, d in made.files.items() if n != ".gitattributes"}
    assert made.private
    assert [f"Adapter of run {RUN}"] == made.history
    assert first == push(fake, adapter)
    assert 1 == len(fake.repositories[NAME].history)


TASK = {
    "task": "q.jsonl",
    "metric": "right",
    "samples": 3,
    "models": {
        name: {"value": v, "low": 0.0, "high": 1.0} for name, v in (("base", 0), ("tuned", 1))
    },
}


def test_results_are_one_more_commit_of_the_model_card(fake: FakeHub, adapter: Path) -> None:
    """As `model-index`, which the hub's own reader understands; the adapter's files stay."""
    push(fake, adapter)
    card = (adapter / "README.md").read_text()

    hub_output.add_results(repository(fake), card, [TASK], run_id=RUN)

    made = fake.repositories[NAME]
    read = ModelCard(made.files["README.md"].decode())
    found = {each.metric_name: each.metric_value for each in read.data.eval_results or []}
    assert {"right (base)": 0, "right (tuned)": 1} == found
    assert "mit" == read.data.license
    assert read.text.strip() == "# Adapter"
    assert contents(adapter).keys() <= made.files.keys()
    with pytest.raises(RefusedError, match="HUB-131"):
        hub_output.add_results(repository(fake), card, [TASK], run_id=OTHER)


def test_a_branch_is_made_and_filled(fake: FakeHub, adapter: Path) -> None:
    """Of a repository that is new, too."""
    assert push(fake, adapter, branch="v2").startswith(f"hf://{NAME}@")
    assert "v2" == fake.repositories[NAME].branch


@pytest.mark.parametrize(
    ("there", "passes"),
    [
        ({}, True),
        ({".gitattributes": b"", "README.md": b"# soon"}, True),
        ({"tuning.json": json.dumps({"run_id": RUN}).encode(), "old.bin": b"x"}, True),
        ({"tuning.json": json.dumps({"run_id": OTHER}).encode()}, False),
        ({"tuning.json": b"[]"}, False),
        ({"tuning.json": b"not json"}, False),
        ({"config.json": b"{}", "model.safetensors": b"a model"}, False),
    ],
)
def test_only_an_own_or_empty_repository_is_written(
    there: dict[str, bytes], passes: bool, fake: FakeHub, adapter: Path
) -> None:
    """Anything else is refused before and at the push, and stays; overwrite replaces it."""
    fake.add(NAME, there)
    if passes:
        push(fake, adapter)
    else:
        with pytest.raises(RefusedError, match=r"HUB-131 hf://org/adapter: holds "):
            hub_output.claim(repository(fake), run_id=RUN, own=(), on_exists="refuse")
        with pytest.raises(RefusedError, match="HUB-131"):
            push(fake, adapter)
        assert there == fake.repositories[NAME].files
        push(fake, adapter, on_exists="overwrite")
    assert contents(adapter).items() <= fake.repositories[NAME].files.items()
    assert set(contents(adapter)) >= fake.repositories[NAME].files.keys() - {".gitattributes"}


def test_what_this_run_directory_pushed_before_may_be_replaced(
    fake: FakeHub, adapter: Path, tmp_path: Path
) -> None:
    """By the digest of its weights, as other settings make another run id."""
    older = written(tmp_path / "older", OTHER, b"older")
    push(fake, older, OTHER)
    with pytest.raises(RefusedError, match="HUB-131"):
        push(fake, adapter)
    own = [files.digest_file(older / "adapter_model.safetensors")]
    push(fake, adapter, own=own)
    assert contents(adapter).items() <= fake.repositories[NAME].files.items()


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, "needs an access token, and there is none"),
        ("hf_outsider", "the access token of someone may only read"),
        ("hf_wrong", "cannot be written with this access token: the hub answers 401"),
    ],
)
def test_a_token_that_cannot_write_is_refused_before_the_training(
    token: str | None, words: str, fake: FakeHub
) -> None:
    """With what to give; nothing is made at the hub."""
    with pytest.raises(RefusedError) as refused:
        hub_output.check(Repository(NAME, token=token))
    assert words in str(refused.value)
    assert {} == fake.repositories
    hub_output.check(repository(fake))


@pytest.mark.parametrize("status", [500, 503, 429])
@pytest.mark.parametrize(
    "path",
    ["/api/repos/create", "/preupload/", "/objects/batch", "/lfs/", "/commit/", "/revision/"],
)
def test_a_push_that_breaks_off_goes_on_and_ends_in_one_commit(
    path: str, status: int, fake: FakeHub, adapter: Path
) -> None:
    """Whatever fails on the way, and for good the first time: then code 20, and a second push."""
    broken = [True]
    fake.broken = lambda asked, count: status if path in asked and broken[0] else None
    try:
        push(fake, adapter)
    except TuningError as error:
        assert isinstance(error, TransientError), error
    broken[0] = False

    push(fake, adapter)

    made = fake.repositories[NAME]
    assert contents(adapter) == {n: d for n, d in made.files.items() if n != ".gitattributes"}
    assert 1 == len(made.history)


@pytest.mark.parametrize("path", ["/api/repos/create", "/preupload/", "/commit/"])
def test_a_token_that_may_not_write_here_is_told_so(
    path: str, fake: FakeHub, adapter: Path
) -> None:
    """Fine-grained tokens tell it only then; "read access" would be the wrong advice."""
    fake.broken = lambda asked, count: 403 if path in asked else None
    with pytest.raises(RefusedError, match=r"HUB-130 .*the hub answers 403.*right to write"):
        push(fake, adapter)


def test_a_hub_that_keeps_other_bytes_is_no_success(fake: FakeHub, adapter: Path) -> None:
    """What is listed is compared with what was sent; the next push sends what differs."""
    fake.loses = b"!"
    with pytest.raises(TransientError, match=r"HUB-132 .*adapter_model.safetensors"):
        push(fake, adapter)
    fake.loses = b""
    push(fake, adapter)
    assert contents(adapter).items() <= fake.repositories[NAME].files.items()


def test_a_branch_that_moved_meanwhile_is_not_written_over(
    fake: FakeHub, adapter: Path, tmp_path: Path
) -> None:
    """Another run's commit between our look and our commit: refused, and theirs is kept."""
    other = contents(written(tmp_path / "other", OTHER, b"other"))

    def broken(path: str, count: int) -> int | None:
        if "/commit/" in path and count == 1:
            fake.add(NAME, other)
        return None

    fake.broken = broken
    with pytest.raises(TransientError, match=r"HUB-134 hf://org/adapter: was changed"):
        push(fake, adapter)
    assert other == fake.repositories[NAME].files
    with pytest.raises(RefusedError, match="HUB-131"):
        push(fake, adapter)
