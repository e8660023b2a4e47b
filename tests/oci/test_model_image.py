"""Model images: a base model goes into a registry and a run starts from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import tuning
from fake_hub import FIRST, INDEX, MODEL, SECOND
from faults.proxy import Proxy
from registries import Signer

from tuning import presets
from tuning.console import Console
from tuning.errors import RefusedError, SpecError, UsageError
from tuning.oci import model_image, registry
from tuning.oci.delivery import Access
from tuning.oci.layout.manifest import read_layout
from tuning.oci.policy import Trust
from tuning.pipeline import options, whole_models
from tuning.presets.load import CONFIGS, table
from tuning.presets.models import _preset
from tuning.sources import base
from tuning.spec import reference

pytestmark = pytest.mark.registry
TINY = Path(__file__).parents[2] / "examples" / "tiny-model"
CLUTTER = ("README.md", "LICENSE", "pytorch_model.bin", "modeling_x.py", "notes.txt")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model of two weights files, with things beside it that are none of it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in MODEL.items():
        if not name.endswith(".safetensors"):
            (folder / name).write_bytes(data)
    (folder / "model-00001-of-00002.safetensors").write_bytes(FIRST)
    (folder / "model-00002-of-00002.safetensors").write_bytes(SECOND)
    (folder / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    for name in CLUTTER:
        (folder / name).write_text("x")
    return folder


def package(model: Path | str, output: str, *, overwrite: bool = False) -> str:
    more: dict[str, Any] = {"revision": None, "token_file": None, "overwrite": overwrite}
    return whole_models.packaged(str(model), output, access=Access(), console=Console(), **more)


def local(name: str, cache: Path, **trust: Any) -> Path:
    access = Access(trust=Trust(**trust))
    return Path(model_image.local(name, access=access, console=Console(), cache=cache))


def test_there_and_back(started, sharded, repository, tmp_path):
    """The same model by its content; weights each in a layer; documents along, clutter not."""
    name = package(sharded, f"{started.host}/{repository}:1")
    folder = local(name, tmp_path / "cache")

    kept = {path.name for path in sharded.iterdir()} - set(CLUTTER[2:])
    assert kept == {path.name for path in folder.iterdir()}
    found = [base.resolve(str(each), revision=None, token=None) for each in (sharded, folder)]
    assert found[0].revision == found[1].revision
    assert f"oci://{started.host}/{repository}:1@" == name.partition("sha256:")[0]
    to = registry.Remote(reference.parse(name.removeprefix("oci://")))
    _, pushed = registry.resolve(to)
    assert found[0].revision == pushed.run_id
    assert 4 == len(pushed.layers)


def test_what_was_pulled_is_not_pulled_again(started, sharded, repository, tmp_path):
    """By its digest: a second look costs a manifest, a changed tag brings the other model."""
    with Proxy(started.address) as front:
        name = f"oci://{front.host}/{repository}:1"
        package(sharded, f"{front.host}/{repository}:1")
        first = local(name, tmp_path / "cache")
        front.seen.clear()
        assert first == local(name, tmp_path / "cache")
        assert [] == [seen for seen in front.seen if "/blobs/" in seen.path]

        (sharded / "tokenizer_config.json").write_text('{"changed": true}')
        with pytest.raises(RefusedError, match="REG-140"):
            package(sharded, f"{front.host}/{repository}:1")
        package(sharded, f"{front.host}/{repository}:1", overwrite=True)
        second = local(name, tmp_path / "cache")

    assert first != second
    assert '{"changed": true}' == (second / "tokenizer_config.json").read_text()


def test_the_config_is_read_without_the_weights(started, repository):
    """What `check` needs of a model: one part of one layer."""
    package(TINY, f"{started.host}/{repository}:1")
    with Proxy(started.address) as front:
        name = f"oci://{front.host}/{repository}:1"
        found = model_image.config(name, access=Access())
        ranges = [seen for seen in front.seen if "range" in seen.headers]

    assert json.loads((TINY / "config.json").read_text()) == found
    assert 1 == len(ranges)


def test_a_signature_is_wanted_of_models_too(started, sharded, repository, tmp_path):
    """Also of a copy that was pulled before the rule was made."""
    name = package(sharded, f"{started.host}/{repository}:1")
    rule = {"signatures": "require", "keys": (Signer(tmp_path / "key").public,)}
    with pytest.raises(RefusedError, match="SIGN-110"):
        local(name, tmp_path / "cache", **rule)
    local(name, tmp_path / "cache")
    with pytest.raises(RefusedError, match="SIGN-110"):
        local(name, tmp_path / "cache", **rule)
    with pytest.raises(RefusedError, match="SIGN-110"):
        model_image.config(name, access=Access(trust=Trust(**rule)))


@pytest.mark.parametrize("spoil", ["pickle", "cut"])
def test_only_whole_models_are_packaged(sharded, tmp_path, spoil):
    """What a run could not start from is refused before a byte is written."""
    if spoil == "cut":
        (sharded / "model-00002-of-00002.safetensors").write_bytes(SECOND[:-1])
    else:
        for path in sharded.glob("*.safetensors*"):
            path.unlink()
    with pytest.raises(SpecError, match="BASE-10"):
        package(sharded, f"oci:{tmp_path}/image")
    assert not (tmp_path / "image").exists()


def test_a_model_needs_an_image_to_go_to(sharded, tmp_path):
    """A folder it is already."""
    with pytest.raises(UsageError, match="USE-103"):
        package(sharded, f"dir:{tmp_path}/copy")


def test_an_adapters_image_is_no_model(tmp_path):
    """The text names the command that makes one."""
    import adapters

    adapters.build(tmp_path)
    with pytest.raises(SpecError, match=r"BASE-103.*package-model"):
        model_image.config(f"oci:{tmp_path}/image", access=Access())


def test_a_preset_may_name_an_image():
    """Its weights come from there; its name on the hub stays the adapter's base."""
    row = table(CONFIGS / "presets" / "phi.yaml")[0] | {"family": "phi"}
    known = _preset(row | {"image": "oci://registry.corp/models/phi:1"}, where="x")
    plain = _preset(row, where="x")

    assert ("oci://registry.corp/models/phi:1", None) == options.source_of(known, None)
    assert (known.hub_id, "c" * 40) == options.source_of(known, "c" * 40)
    assert (plain.hub_id, plain.revision) == options.source_of(plain, None)
    assert all(preset.image is None for preset in presets.all())


def test_a_run_starts_from_an_image(tmp_path):
    """package-model, then check and preview with it: the tokenizer comes out of the image."""
    demo = TINY.parent
    done = tuning("package-model", TINY, f"oci:{tmp_path}/model")
    assert 0 == done.returncode, done.stderr
    given = ("-f", demo / "workspace-demo.yaml", "--data", demo / "data" / "demo.jsonl")
    more = ("--base-model", f"oci:{tmp_path}/model", "--output", f"oci:{tmp_path}/out")
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    checked = tuning("check", *given, *more, env=env)
    shown = tuning("preview", *given, *more, "--run-dir", tmp_path / "run", "--json", env=env)

    assert (0, 0) == (checked.returncode, shown.returncode), checked.stderr + shown.stderr
    assert f"model: oci:{tmp_path}/model" in checked.stdout
    assert json.loads(shown.stdout)
    (copy,) = (tmp_path / "cache" / "tuning" / "models").iterdir()
    digest = read_layout(tmp_path / "model").digest
    assert digest.replace(":", "-") == copy.name
