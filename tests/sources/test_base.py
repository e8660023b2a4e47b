"""Base weights: pinned, complete, safe to load, fetched once, or refused in words that help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_hub import (
    CLUTTER,
    CONFIG,
    FIRST,
    MODEL,
    SHARDED,
    WEIGHTS,
    FakeHub,
    tensors,
)
from huggingface_hub import constants

from tuning.errors import RefusedError, SpecError, Stopped, TransientError, TuningError
from tuning.network.retry import Patience
from tuning.sources import base, hub, hub_download, verify
from tuning.sources.base import Base

ID = "org/model"
GATED = "org/gated"


def laid(folder: Path, files: dict[str, bytes | None]) -> Path:
    """`folder` with `files`; None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        if data is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's: no saved login, no cache of digests, no waiting between tries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg")))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "PATIENCE", Patience(first=0.001, tries=4))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path_factory.mktemp("hf") / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


# -- resolve ------------------------------------------------------------------------------------


def test_a_model_of_the_hub_is_pinned_to_its_commit(fake: FakeHub, tmp_path: Path) -> None:
    """Only what training reads is needed: no pickles, no code, no second copy of the weights."""
    commit = fake.add(ID, MODEL | CLUTTER, licence="apache-2.0")

    found = base.resolve(ID, revision=None, token=None, cache=tmp_path)

    assert (ID, "hub", commit, None) == (found.hub_id, found.source, found.revision, found.folder)
    assert ("apache-2.0", False) == (found.licence, found.gated)
    assert sorted(MODEL) == [entry.name for entry in found.files]
    assert sum(map(len, MODEL.values())) == found.needed_bytes
    assert sum(map(len, (MODEL | CLUTTER).values())) == found.total_bytes
    assert found == Base.from_json(json.loads(json.dumps(found.to_json())))


def test_a_revision_is_kept(fake: FakeHub, tmp_path: Path) -> None:
    commit = fake.add(ID, MODEL)

    assert commit == base.resolve(ID, revision=commit, token=None, cache=tmp_path).revision
    with pytest.raises(RefusedError, match=r"HUB-103 org/model: has no revision v9"):
        base.resolve(ID, revision="v9", token=None, cache=tmp_path)


@pytest.mark.parametrize(
    ("files", "code", "words"),
    [
        (
            {"config.json": b"{}", "tokenizer.json": b"", "pytorch_model.bin": b""},
            "BASE-101",
            "pickl",
        ),
        ({"config.json": b"{}", "tokenizer.json": b"", "m.gguf": b""}, "BASE-102", "GGUF only"),
        ({"config.json": b"{}", "tokenizer.json": b""}, "BASE-102", "no *.safetensors"),
        ({"config.json": b"{}", "model.safetensors": b""}, "BASE-107", "no tokenizer"),
        ({"adapter_config.json": b"{}", "tokenizer.json": b""}, "BASE-110", "is an adapter"),
        ({"README.md": b"", "tokenizer.json": b""}, "BASE-103", "no config.json"),
    ],
)
def test_a_repository_that_cannot_be_trained_is_refused_by_its_names(
    fake: FakeHub, tmp_path: Path, files: dict[str, bytes], code: str, words: str
) -> None:
    fake.add(ID, files)

    with pytest.raises(SpecError) as caught:
        base.resolve(ID, revision=None, token=None, cache=tmp_path)

    assert [code] == [problem.code for problem in caught.value.problems]
    assert words in str(caught.value)
    assert [] == fake.downloads()


@pytest.mark.parametrize(
    "name", ["nonsense", "./none", "a/b/c", "../up/down", "a b/c", "/none", ""]
)
def test_what_is_neither_folder_nor_model_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="BASE-100"):
        base.resolve(name, revision=None, token=None, cache=tmp_path)


# -- access -------------------------------------------------------------------------------------


def test_check_gives_the_config_and_asks_for_no_weights(fake: FakeHub, tmp_path: Path) -> None:
    fake.add(ID, MODEL)
    found = base.resolve(ID, revision=None, token=None, cache=tmp_path)

    assert CONFIG == base.check(found, token=None, cache=tmp_path)
    assert [f"/{ID}/resolve/{found.revision}/config.json"] == fake.downloads()


@pytest.mark.parametrize(
    ("name", "card", "words"),
    [
        ("org/model-GPTQ", {"base_model": "maker/model"}, "it was made from, maker/model"),
        ("org/model-GPTQ", {"base_model": ["maker/model"]}, "it was made from, maker/model"),
        ("org/model-GPTQ", {}, "of the same model, probably org/model"),
        ("org/merged-AWQ", {"base_model": ["a/b", "c/d"]}, "probably org/merged"),
        (
            "org/tuned-int4",
            {"base_model": "maker/model", "base_model_relation": "finetune"},
            "probably org/tuned",
        ),
        ("TheBloke/model-GPTQ", {}, "use the 16-bit weights of the same model; qlora"),
        ("org/model-GPTQ", {"base_model": {"odd": 1}}, "probably org/model"),
    ],
)
def test_quantised_weights_are_refused_with_the_base_to_use(
    fake: FakeHub, tmp_path: Path, name: str, card: dict[str, Any], words: str
) -> None:
    """By the model card, or by the name where that leads somewhere; no weights are asked for."""
    fake.add(name, with_config(quantization_config={"quant_method": "gptq"}), card=card)

    with pytest.raises(SpecError, match=r"BASE-109 .*\(gptq\)") as caught:
        found = base.resolve(name, revision=None, token=None, cache=tmp_path)
        base.check(found, token=None, cache=tmp_path)

    assert words in caught.value.problems[0].change
    assert not any(path.endswith(".safetensors") for path in fake.downloads())


@pytest.mark.parametrize("token", [None, "hf_outsider"])
def test_a_gated_model_says_how_to_get_in(fake: FakeHub, tmp_path: Path, token: str | None) -> None:
    """Its page is public, so that only asking for a file shows that it is closed."""
    fake.add(GATED, MODEL, gated=True)
    found = base.resolve(GATED, revision=None, token=token, cache=tmp_path)
    assert found.gated

    with pytest.raises(RefusedError) as caught:
        base.check(found, token=token, cache=tmp_path)

    text = str(caught.value)
    assert (12, "HUB-101") == (caught.value.exit_code, caught.value.problems[0].code)
    assert f"accept its licence at {fake.url}/{GATED}" in text
    assert "--hub-token-file" in text and "modelAccessSecret" in text
    assert "hf_" not in text
    assert CONFIG == base.check(found, token=fake.token, cache=tmp_path)


@pytest.mark.parametrize(
    ("token", "code"), [(None, "HUB-102"), ("hf_outsider", "HUB-102"), ("hf_wrong", "HUB-106")]
)
def test_a_private_or_unknown_model_is_refused(
    fake: FakeHub, tmp_path: Path, token: str | None, code: str
) -> None:
    fake.add("org/private", MODEL, private=True)

    for name in ("org/private", "org/unknown"):
        with pytest.raises(RefusedError) as caught:
            base.resolve(name, revision=None, token=token, cache=tmp_path)
        assert [code] == [problem.code for problem in caught.value.problems]
        assert "hf_" not in str(caught.value)


def test_the_token_is_not_sent_to_the_content_network(fake: FakeHub, tmp_path: Path) -> None:
    """It goes to the hub alone; the network gets signed addresses on another host."""
    fake.add(GATED, MODEL, gated=True)
    found = base.resolve(GATED, revision=None, token=fake.token, cache=tmp_path)

    base.fetch(found, cache=tmp_path, token=fake.token)

    assert {fake.token} == {token for _, path, token in fake.requests if "/cdn/" not in path}


@pytest.mark.parametrize(
    ("status", "code", "exit_code"), [(503, "HUB-110", 20), (418, "HUB-108", 12)]
)
def test_an_answer_that_is_none_ends_with_its_code(
    fake: FakeHub, tmp_path: Path, status: int, code: str, exit_code: int
) -> None:
    fake.broken = lambda path, count: status

    with pytest.raises(TuningError) as caught:
        base.resolve(ID, revision=None, token=None, cache=tmp_path)

    assert (code, exit_code) == (caught.value.problems[0].code, caught.value.exit_code)


def test_a_hub_that_recovers_is_waited_for(fake: FakeHub, tmp_path: Path) -> None:
    commit = fake.add(ID, MODEL)
    fake.broken = lambda path, count: 503 if count < 3 else None

    assert commit == base.resolve(ID, revision=None, token=None, cache=tmp_path).revision


def test_a_hub_that_cannot_be_reached_is_worth_another_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with FakeHub() as gone:
        monkeypatch.setenv("HF_ENDPOINT", gone.url)

    with pytest.raises(TransientError, match=r"HUB-112 org/model: cannot reach http://127"):
        base.resolve(ID, revision=None, token=None, cache=tmp_path)


def test_offline_without_a_copy_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(TransientError, match=r"HUB-111 .*HF_HUB_OFFLINE"):
        base.resolve(ID, revision=None, token=None, cache=tmp_path)


# -- fetch --------------------------------------------------------------------------------------


def test_a_model_is_fetched_once_and_only_what_is_needed(fake: FakeHub, tmp_path: Path) -> None:
    fake.add(ID, SHARDED | CLUTTER)
    found = base.resolve(ID, revision=None, token=None, cache=tmp_path)
    told: list[tuple[float, float | None]] = []

    folder = base.fetch(
        found, cache=tmp_path, progress=lambda done, total, note: told.append((done, total))
    )

    assert SHARDED == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found.revision == folder.name
    assert (found.needed_bytes, found.needed_bytes) == told[-1]
    asked = len(fake.requests)
    assert folder == base.fetch(found, cache=tmp_path)
    assert asked == len(fake.requests)


def test_a_complete_copy_serves_without_the_hub(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = fake.add(ID, SHARDED)
    folder = base.fetch(
        base.resolve(ID, revision=commit, token=None, cache=tmp_path), cache=tmp_path
    )
    with FakeHub() as gone:
        monkeypatch.setenv("HF_ENDPOINT", gone.url)

    found = base.resolve(ID, revision=commit, token=None, cache=tmp_path)

    assert CONFIG == base.check(found, token=None, cache=tmp_path)
    assert folder == base.fetch(found, cache=tmp_path)


def test_a_copy_that_is_not_complete_does_not_serve(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = fake.add(ID, SHARDED)
    folder = base.fetch(
        base.resolve(ID, revision=commit, token=None, cache=tmp_path), cache=tmp_path
    )
    (folder / "model-00002-of-00002.safetensors").unlink()
    with FakeHub() as gone:
        monkeypatch.setenv("HF_ENDPOINT", gone.url)

    with pytest.raises(TransientError, match="HUB-112"):
        base.resolve(ID, revision=commit, token=None, cache=tmp_path)


def test_a_broken_download_goes_on(fake: FakeHub, tmp_path: Path) -> None:
    fake.add(ID, MODEL)
    fake.cut_at = 20
    found = base.resolve(ID, revision=None, token=None, cache=tmp_path)

    folder = base.fetch(found, cache=tmp_path)

    assert WEIGHTS == (folder / "model.safetensors").read_bytes()


def test_a_damaged_file_in_the_cache_is_fetched_again(fake: FakeHub, tmp_path: Path) -> None:
    """A bit that flipped on the disk would train another model without a word."""
    fake.add(ID, MODEL)
    found = base.resolve(ID, revision=None, token=None, cache=tmp_path)
    folder = base.fetch(found, cache=tmp_path)
    blob = (folder / "model.safetensors").resolve()
    blob.chmod(0o644)
    blob.write_bytes(WEIGHTS[:-1] + b"X")

    assert WEIGHTS == (base.fetch(found, cache=tmp_path) / "model.safetensors").read_bytes()


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    fake: FakeHub, tmp_path: Path
) -> None:
    fake.add(ID, MODEL)
    found = base.resolve(ID, revision=None, token=None, cache=tmp_path / "cache")
    huge = base.Entry("model.safetensors", 1 << 60)
    found = base.replace(found, files=(*found.files[:-1], huge))

    with pytest.raises(SpecError, match=r"HUB-120 org/model: needs .* bytes in .*free"):
        base.fetch(found, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_stopped_fetch_ends_with_75_and_goes_on(fake: FakeHub, tmp_path: Path) -> None:
    fake.add(ID, SHARDED)
    found = base.resolve(ID, revision=None, token=None, cache=tmp_path)
    stop = threading.Event()

    with pytest.raises(Stopped) as caught:
        base.fetch(found, cache=tmp_path, progress=lambda *_: stop.set(), stop=stop.is_set)

    assert 75 == caught.value.exit_code
    folder = base.fetch(found, cache=tmp_path)
    assert SHARDED == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_progress_counts_once_where_the_library_reports_twice() -> None:
    """The chunked protocol tells bytes on the wire and bytes on the disk to the same bar."""
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    model = Base("m", "hub", "m", None, "c", (base.Entry("a", 100),))
    told: list[float] = []
    meter = hub_download.Meter(model, 0, lambda done, total, note: told.append(done), lambda: False)
    with XetDownloadProgressReporter(
        reconstruction_desc="a", total=100, log_level=30, tqdm_class=meter.bar()
    ) as reporter:
        for count in (40, 100):
            reporter.update_progress(
                SimpleNamespace(
                    total_bytes=100,
                    total_bytes_completed=count,
                    total_transfer_bytes_completed=count // 2,
                    total_bytes_completion_rate=1.0,
                    total_transfer_bytes_completion_rate=1.0,
                )
            )

    assert [40, 100] == told


def test_parts_of_killed_downloads_do_not_pile_up(fake: FakeHub, tmp_path: Path) -> None:
    fake.add(ID, MODEL)
    found = base.resolve(ID, revision=None, token=None, cache=tmp_path)
    blobs = laid(
        tmp_path / "models--org--model" / "blobs", {"a.1.incomplete": b"", "b.incomplete": b""}
    )
    os.utime(blobs / "a.1.incomplete", (0, 0))

    base.fetch(found, cache=tmp_path)

    assert ["b.incomplete"] == [path.name for path in blobs.glob("*.incomplete")]


def test_the_usual_environment_of_the_hub_is_honoured(fake: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN, in a process of its own as a person starts it; no
    signature or token reaches its output."""
    fake.add(GATED, MODEL, gated=True)
    code = (
        "import logging; logging.basicConfig(level=logging.DEBUG)\n"
        "from tuning.sources import base\n"
        f"found = base.resolve({GATED!r}, revision=None, token=None)\n"
        "base.check(found, token=None)\n"
        "print(base.fetch(found))\n"
    )
    environment = {
        "HF_ENDPOINT": fake.url,
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": fake.token,
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
    }
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )

    assert 0 == child.returncode, child.stderr
    assert child.stdout.startswith(f"{tmp_path}/hub/models--org--gated/snapshots/")
    assert fake.token not in child.stdout + child.stderr
    assert "s3cr3t" not in child.stdout + child.stderr


# -- verify -------------------------------------------------------------------------------------


def test_a_good_folder_gives_its_config(tmp_path: Path) -> None:
    assert CONFIG == verify.verify(laid(tmp_path / "one", MODEL | CLUTTER))
    assert CONFIG == verify.verify(laid(tmp_path / "many", SHARDED))


def test_a_folder_is_pinned_to_what_training_reads_of_it(tmp_path: Path) -> None:
    """Another README is the same model; another byte of weights is another one."""
    folder = laid(tmp_path / "model", MODEL)
    first = base.resolve(str(folder), revision=None, token=None)

    laid(folder, {"README.md": b"new"})
    assert first.revision == base.resolve(str(folder), revision=None, token=None).revision
    laid(folder, {"model.safetensors": WEIGHTS[:-1] + b"X"})
    other = base.resolve(str(folder), revision=None, token=None)

    assert first.revision.startswith("sha256:")
    assert first.revision != other.revision
    assert ("folder", folder, None) == (first.source, first.folder, first.hub_id)
    assert folder == base.fetch(first)
    assert first == Base.from_json(json.loads(json.dumps(first.to_json())))


def test_an_unchanged_folder_is_not_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = laid(tmp_path / "model", MODEL)
    first = base.resolve(str(folder), revision=None, token=None)
    monkeypatch.setattr(base.files, "digest_file", lambda path: pytest.fail(f"hashed {path}"))

    assert first == base.resolve(str(folder), revision=None, token=None)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


def with_config(**more: Any) -> dict[str, bytes | None]:
    return {**MODEL, "config.json": json.dumps(CONFIG | more).encode()}


def with_weights(data: bytes) -> dict[str, bytes | None]:
    return {**MODEL, "model.safetensors": data}


def shape(**entry: Any) -> bytes:
    whole = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | entry
    return tensors({"a": ("F32", [4], bytes(16))}, text=json.dumps({"a": whole}).encode())


BROKEN: list[tuple[str, dict[str, bytes | None], str, str]] = [
    ("no config", {**MODEL, "config.json": None}, "BASE-103", "no config.json"),
    ("config no JSON", {**MODEL, "config.json": b"{"}, "BASE-103", "is no JSON"),
    ("config a list", {**MODEL, "config.json": b"[]"}, "BASE-103", "no JSON object"),
    ("config LFS", {**MODEL, "config.json": LFS}, "BASE-103", "git LFS"),
    ("config deep", {**MODEL, "config.json": b"[" * 200_000}, "BASE-103", "is no JSON"),
    ("no type", {**MODEL, "config.json": b"{}"}, "BASE-103", "no model_type"),
    ("custom code", with_config(model_type="own", auto_map={"AutoModel": "m.M"}),
     "BASE-108", "own"),
    ("gptq", with_config(quantization_config={"quant_method": "gptq"}), "BASE-109", "(gptq)"),
    ("awq", with_config(text_config={"quantization_config": {"quant_method": "awq"}}),
     "BASE-109", "(awq)"),
    ("odd", with_config(quantization_config="gptq"), "BASE-109", "unknown method"),
    ("fp8 unsaid", with_weights(tensors({"a": ("F8_E4M3", [2], b"xx")})), "BASE-109", "f8_e4m3"),
    ("pickles only", {**MODEL, "model.safetensors": None, "pytorch_model.bin": b"x"},
     "BASE-101", "pickled"),
    ("no weights", {**MODEL, "model.safetensors": None}, "BASE-102", "no *.safetensors"),
    ("no tokenizer", {**MODEL, "tokenizer.json": None}, "BASE-107", "no tokenizer"),
    ("weights LFS", with_weights(LFS), "BASE-104", "git LFS"),
    ("empty", with_weights(b""), "BASE-105", "is cut"),
    ("cut header", with_weights(WEIGHTS[:40]), "BASE-105", "is cut"),
    ("cut tensors", with_weights(WEIGHTS[:-1]), "BASE-105", "is cut"),
    ("too long", with_weights(WEIGHTS + b"x"), "BASE-105", "is cut"),
    ("header 2^60", with_weights(tensors({}, size=1 << 60)), "BASE-105", "claims"),
    ("header 0", with_weights(tensors({}, size=0)), "BASE-105", "claims"),
    ("header no JSON", with_weights(tensors({}, text=b"nonsense")), "BASE-105", "no JSON"),
    ("header a list", with_weights(tensors({}, text=b"[]")), "BASE-105", "no JSON object"),
    ("negative shape", with_weights(shape(shape=[-4])), "BASE-105", "impossible"),
    ("shape of floats", with_weights(shape(shape=[4.0])), "BASE-105", "impossible"),
    ("wrong size", with_weights(shape(shape=[5])), "BASE-105", "impossible"),
    ("unknown kind", with_weights(shape(dtype="Q4")), "BASE-105", "impossible"),
    ("odd kind", with_weights(shape(dtype=["F32"])), "BASE-105", "impossible"),
    ("three offsets", with_weights(shape(data_offsets=[0, 8, 16])), "BASE-105", "impossible"),
    ("hole", with_weights(shape(data_offsets=[16, 32])), "BASE-105", "hole"),
    ("shard missing", {**SHARDED, "model-00002-of-00002.safetensors": None}, "BASE-106", "1 of 2"),
    ("tensor missing", {**SHARDED, "model-00002-of-00002.safetensors": FIRST},
     "BASE-106", "2 tensors"),
    ("index no JSON", {**SHARDED, "model.safetensors.index.json": b"x"}, "BASE-106", "no JSON"),
    ("index empty", {**SHARDED, "model.safetensors.index.json": b"{}"},
     "BASE-106", "no weight_map"),
    ("index bare", {**SHARDED, "model.safetensors.index.json": b'{"weight_map": {"a": "b"}}'},
     "BASE-106", "no metadata"),
    ("index odd", {**SHARDED, "model.safetensors.index.json": b'{"weight_map": {"a": 1}}'},
     "BASE-106", "not a mapping"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "code", "words"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN]
)
def test_a_broken_folder_is_refused(
    tmp_path: Path, files: dict[str, bytes | None], code: str, words: str
) -> None:
    folder = laid(tmp_path / "model", files)

    with pytest.raises(SpecError) as caught:
        verify.verify(folder)

    assert [code] == [problem.code for problem in caught.value.problems]
    assert str(folder) in str(caught.value)
    assert words in str(caught.value)


def test_all_problems_of_a_folder_come_at_once(tmp_path: Path) -> None:
    files = with_config(quantization_config={"quant_method": "gptq"})
    folder = laid(tmp_path, {**files, "tokenizer.json": None, "model.safetensors": LFS})

    with pytest.raises(SpecError) as caught:
        verify.verify(folder)

    assert ["BASE-104", "BASE-107", "BASE-109"] == sorted(p.code for p in caught.value.problems)


@pytest.mark.parametrize("model_type", ["phi3", "gemma3", "qwen2_moe", "gpt-neox"])
def test_a_native_class_is_used_although_code_is_offered(tmp_path: Path, model_type: str) -> None:
    """Phi-3 and others ship code that transformers has had for long."""
    more = {"model_type": model_type, "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    native = model_type != "gpt-neox"
    folder = laid(tmp_path, with_config(**more))

    if native:
        assert model_type == verify.verify(folder)["model_type"]
    else:
        with pytest.raises(SpecError, match="BASE-108"):
            verify.verify(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"BASE-100 .*does not exist"):
        verify.verify(tmp_path / "none")


def test_what_the_real_library_writes_passes(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    numpy = pytest.importorskip("numpy")
    folder = laid(tmp_path, {name: MODEL[name] for name in ("config.json", "tokenizer.json")})
    save_file(
        {"a": numpy.zeros((3, 5), "float16"), "none": numpy.zeros((0, 2), "int64")},
        folder / "model.safetensors",
        {"format": "pt"},
    )

    assert CONFIG == verify.verify(folder)


# -- what transformers would load by itself -------------------------------------------------------


def test_an_adapter_beside_the_model_is_refused(tmp_path: Path) -> None:
    """transformers would put it on the base in silence."""
    folder = laid(tmp_path / "m", MODEL | {"adapter_config.json": b"{}"})

    with pytest.raises(SpecError, match=r"BASE-111 .*adapter_config.json.*adapter_\*"):
        base.resolve(str(folder), revision=None, token=None)


def test_a_config_that_names_other_weights_is_refused(tmp_path: Path) -> None:
    """They are not those that are verified, hashed and recorded."""
    config = json.dumps(CONFIG | {"transformers_weights": "other.safetensors"}).encode()
    folder = laid(tmp_path / "m", MODEL | {"config.json": config})

    with pytest.raises(SpecError, match=r"BASE-112 .*'other.safetensors'"):
        base.resolve(str(folder), revision=None, token=None)


def test_the_weights_that_are_hashed_are_those_that_are_loaded(tmp_path: Path) -> None:
    """Of a single file and sharded ones in one folder transformers takes the single file."""
    folder = laid(tmp_path / "m", SHARDED | {"model.safetensors": WEIGHTS})

    found = base.resolve(str(folder), revision=None, token=None)

    names = [entry.name for entry in found.files if "safetensors" in entry.name]
    assert ["model.safetensors"] == names


def test_weights_have_an_identity_wherever_they_lie(fake: FakeHub, tmp_path: Path) -> None:
    """The same on the hub, in its cache and in a folder; names and neighbours do not count."""
    fake.add(ID, MODEL)
    hub_model = base.resolve(ID, revision=None, token=None, cache=tmp_path / "c")
    cached = base.fetch(hub_model, cache=tmp_path / "c")
    folder = laid(tmp_path / "m", MODEL | {"generation_config.json": b'{"a": 1}'})
    other = laid(
        tmp_path / "o", MODEL | {"model.safetensors": tensors({"other": ("BF16", [2], bytes(4))})}
    )

    assert hub_model.weights is not None
    assert hub_model.weights == base.weights_of(cached) == base.weights_of(folder)
    assert hub_model.weights == base.resolve(str(folder), revision=None, token=None).weights
    assert hub_model.weights != base.weights_of(other)


@pytest.mark.parametrize("names", [["model-00001-of-00002", "model-00002-of-00002"], ["weights"]])
def test_weights_that_nothing_leads_to_are_refused(names: list[str], tmp_path: Path) -> None:
    """transformers looks for one file's name, or for an index; others it does not find."""
    files = {f"{name}.safetensors": WEIGHTS for name in names}
    companions = {n: data for n, data in MODEL.items() if not n.endswith(".safetensors")}
    folder = laid(tmp_path / "model", companions | files)

    with pytest.raises(SpecError, match=r"BASE-106 .*model\.safetensors\.index\.json: is missing"):
        base.resolve(str(folder), revision=None, token=None)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"eos_token_id": "2"}, "eos_token_id is '2', no token's id"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id is [2, 'x'], no token's id"),
        ({"pad_token_id": 1.5}, "pad_token_id is 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1, no positive number"),
        ([], "is no JSON object"),
        (None, "is no JSON"),
        ({"eos_token_id": [2, 3], "bos_token_id": None, "max_length": 4096}, ""),
    ],
)
def test_a_generation_config_that_cannot_be_used_is_named(
    record: Any, words: str, tmp_path: Path
) -> None:
    """transformers reads it with the weights, and a run would end in its words."""
    text = b'{"eos_token_id":' if record is None else json.dumps(record).encode()
    folder = laid(tmp_path / "model", {**MODEL, "generation_config.json": text})
    if not words:
        assert base.resolve(str(folder), revision=None, token=None)
        return
    with pytest.raises(SpecError, match=r"BASE-103 .*generation_config\.json") as caught:
        base.resolve(str(folder), revision=None, token=None)
    assert words in str(caught.value) and "remove the file" in str(caught.value)


@pytest.mark.parametrize("kind", ["I8", "U8", "I64", "BOOL"])
def test_weights_in_whole_numbers_need_to_say_what_they_are(kind: str, tmp_path: Path) -> None:
    """Read as they are they would be other weights. Buffers of positions and masks may be so."""
    size = 8 * {"I64": 8}.get(kind, 1)
    weights = tensors({"model.embed_tokens.weight": (kind, [4, 2], bytes(size))})
    folder = laid(tmp_path / "model", {**MODEL, "model.safetensors": weights})
    with pytest.raises(SpecError, match=r"BASE-109 .*as whole numbers \(model.embed_tokens.weight"):
        base.resolve(str(folder), revision=None, token=None)
    for name in ("attn.bias", "embeddings.position_ids"):
        buffer = tensors({name: (kind, [4, 2], bytes(size))})
        other = laid(tmp_path / name, {**MODEL, "model.safetensors": buffer})
        assert base.resolve(str(other), revision=None, token=None)
