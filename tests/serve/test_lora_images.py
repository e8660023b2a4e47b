"""Adapter images that vLLM loads at run time: which ones, from where, and how often they come."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import tomllib
from base64 import b64encode
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import adapters
import pytest
from faults.proxy import Proxy
from hypothesis import given
from hypothesis import strategies as st
from registries import Registry, Signer

from tuning import files
from tuning.errors import RefusedError, SpecError, TransientError
from tuning.oci import registry, signature
from tuning.oci.access import Access
from tuning.oci.layout.manifest import MANIFEST, Blob, read_layout
from tuning.serve import vllm_plugin
from tuning.serve.lora_images import LoraImages

ROOT = Path(__file__).parents[2]
BASE = "org/base"  # of tests/adapters.py
SWITCHES = ("TUNING_LORA_IMAGES", "TUNING_LORA_CACHE", "TUNING_LORA_BASE", "TUNING_POLICY")


def images(prefixes: str, cache: Path | None = None, **more: str) -> LoraImages:
    environment = {"TUNING_LORA_IMAGES": prefixes} | more
    environment |= {"TUNING_LORA_CACHE": str(cache)} if cache else {}
    made = LoraImages.from_environment(environment)
    assert made is not None
    return made


def push(host: str, name: str, layout: Path, access: Access | None = None) -> str:
    """Push the image in `layout` to the new tag `name`; its reference."""
    remote = (access or Access()).remote(f"{host}/{name}", secret=None, push=True)
    registry.push(remote, layout, run_id=read_layout(layout).run_id or "")
    return f"{host}/{name}"


def adapter_image(folder: Path, *, tuning: dict[str, Any] | None = None, **config: Any) -> Path:
    """The layout of an adapter whose config has these keys too."""
    source = adapters.adapter(folder / "adapter")
    files.write_json(source / "adapter_config.json", adapters.CONFIG | config)
    if tuning:
        files.write_json(source / "tuning.json", tuning)
    adapters.build(folder)
    return folder / "image"


# -- which images --------------------------------------------------------------------------------

part = st.from_regex(r"[a-z0-9]{1,3}", fullmatch=True)
parts = st.lists(part, min_size=1, max_size=3)


@given(prefix=parts, name=parts, more=parts, slash=st.sampled_from(["", "/"]), under=st.booleans())
def test_a_prefix_ends_between_parts_of_a_path(
    prefix: list[str], name: list[str], more: list[str], slash: str, under: bool
) -> None:
    """Whatever the tag, and whether or not the prefix ends with a slash."""
    asked = [*prefix, *more] if under else name
    found = images(f"other.example.com, R.example.com/{'/'.join(prefix)}{slash} ,")

    expected = asked[: len(prefix)] == prefix
    for end in ("", ":1", f"@sha256:{'a' * 64}"):
        assert expected == found.allows(f"r.example.com/{'/'.join(asked)}{end}")
    assert not found.allows(f"r.example.com.evil.example/{'/'.join(asked)}:1")


@pytest.mark.parametrize(
    "name",
    ["", "team", "org/base", "r.example.com/team/../x/a:1", "r.example.com/team/a b", "a\nb"],
)
def test_other_names_are_left_to_other_resolvers(name: str) -> None:
    """A hub's name is an image of Docker Hub only where that is a prefix."""
    assert not images("r.example.com/team").allows(name)
    assert (name == "org/base") == images("docker.io/org/").allows(name)


def test_nothing_is_served_unless_asked_for_and_every_bad_prefix_is_reported() -> None:
    assert LoraImages.from_environment({}) is None
    assert LoraImages.from_environment({"TUNING_LORA_IMAGES": " , "}) is None
    with pytest.raises(SpecError) as caught:
        images("team/,https://r.example.com/a,r.example.com/a:1,*,r.example.com/fine")
    assert ["SERVE-138"] * 4 == [problem.code for problem in caught.value.problems]


# -- from a registry -----------------------------------------------------------------------------


@pytest.mark.registry
def test_an_image_is_pulled_once_whatever_its_tag(
    started: Registry, layout: Path, repository: str, tmp_path: Path
) -> None:
    """By several threads at once, too; its bytes are the pushed ones, in a folder by digest."""
    for tag in ("1", "2"):
        push(started.host, f"{repository}:{tag}", layout)
    with Proxy(started.address) as proxy, ThreadPoolExecutor(8) as pool:
        shop = images(f"{proxy.host}/tests/", tmp_path / "cache")
        names = [f"{proxy.host}/{repository}:{1 + n % 2}" for n in range(8)]
        found = set(pool.map(lambda name: shop.fetch(name, BASE), names))
        blobs = [
            turn.path for turn in proxy.seen if turn.method == "GET" and "/blobs/" in turn.path
        ]

    ((digest, folder),) = found
    assert digest == read_layout(layout).digest
    assert folder.parent.name == digest.replace(":", "-")
    assert adapters.content(layout.parent / "adapter") == adapters.content(folder)
    assert blobs and len(blobs) == len(set(blobs))


@pytest.mark.registry
@pytest.mark.parametrize("damage", ["changed", "more", "fewer", "cut"])
def test_a_damaged_copy_is_pulled_again(
    started: Registry, layout: Path, repository: str, tmp_path: Path, damage: str
) -> None:
    name = push(started.host, f"{repository}:1", layout)
    shop = images(started.host, tmp_path)
    _, folder = shop.fetch(name, BASE)
    weights = folder / "adapter_model.safetensors"
    if damage == "changed":
        data = weights.read_bytes()
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "more":
        (folder / "new_embeddings.safetensors").write_bytes(b"x")
    elif damage == "fewer":
        (folder / "tokenizer.json").unlink()
    else:
        (folder.parent / "digests.json").write_text("{")

    assert folder == shop.fetch(name, BASE)[1]
    assert adapters.content(layout.parent / "adapter") == adapters.content(folder)


@pytest.mark.registry
def test_the_registry_decides_who_may_read_a_cached_image(
    layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the login in docker's own configuration; without it, or without the registry, no one."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with Registry(tmp_path, users={"me": "secret"}) as running:
        login = {"auths": {running.host: {"auth": b64encode(b"me:secret").decode()}}}
        (tmp_path / "config.json").write_text(json.dumps(login))
        name = push(running.host, "team/a:1", layout)
        shop = images(running.host, tmp_path / "cache")
        shop.fetch(name, BASE)

        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(RefusedError, match="REG-1"):
            shop.fetch(name, BASE)
    brief = LoraImages(
        shop.prefixes, shop.cache, Access(patience=registry.Patience(total=0.2, first=0.01))
    )
    with pytest.raises(TransientError, match="REG-131"):
        brief.fetch(name, BASE)


@pytest.mark.registry
def test_signatures_are_required_by_the_policy_also_of_cached_images(
    started: Registry, layout: Path, repository: str, tmp_path: Path
) -> None:
    name = push(started.host, f"{repository}:1", layout)
    signer, digest = Signer(tmp_path / "keys"), read_layout(layout).digest
    policy = tmp_path / "keys" / "policy.yaml"
    policy.write_text("registry: {signatures: require, keys: [cosign.pub]}")
    open_shop = images(started.host, tmp_path / "cache")
    strict = images(started.host, tmp_path / "cache", TUNING_POLICY=str(policy))

    open_shop.fetch(name, BASE)
    with pytest.raises(RefusedError, match="SIGN-110"):
        strict.fetch(name, BASE)
    bundle, where = signer.bundle(digest), Access().remote(name, secret=None, push=True)
    subject = Blob(MANIFEST, digest, 1)
    registry.attach(where, subject, bundle, media_type=signature.BUNDLE, annotations={})
    assert digest == strict.fetch(name, BASE)[0]


@pytest.mark.registry
def test_an_adapter_of_another_base_is_refused(
    started: Registry, layout: Path, repository: str, tmp_path: Path
) -> None:
    """By name, in any case; TUNING_LORA_BASE stands for what vLLM calls its model."""
    name = push(started.host, f"{repository}:1", layout)
    shop = images(started.host, tmp_path)

    assert shop.fetch(name, "Org/Base")[1].is_dir()
    with pytest.raises(SpecError, match=rf"MODEL-207 {name}.*org/base.*TUNING_LORA_BASE"):
        shop.fetch(name, "s3://weights/base")
    named = images(started.host, tmp_path, TUNING_LORA_BASE=BASE)
    assert named.fetch(name, "s3://weights/base")[1].is_dir()
    preset = images(started.host, tmp_path, TUNING_LORA_BASE="phi-3-mini-4k-instruct")
    with pytest.raises(SpecError, match=r"MODEL-207 .*microsoft/Phi-3-mini-4k-instruct"):
        preset.fetch(name, BASE)


@pytest.mark.registry
def test_a_base_in_a_folder_is_compared_by_its_weights(
    started: Registry, repository: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"other weights")
    for tag, more in (("unknown", None), ("other", {"base_weights": "sha256:" + "0" * 64})):
        image = adapter_image(tmp_path / tag, tuning=more)
        name = push(started.host, f"{repository}:{tag}", image)
        shop = images(started.host, tmp_path / "cache")
        if more is None:
            assert shop.fetch(name, str(base))[1].is_dir()
        else:
            with pytest.raises(SpecError, match=f"MODEL-213 {name}.*other weights"):
                shop.fetch(name, str(base))


@pytest.mark.registry
def test_an_adapter_that_vllm_leaves_out_in_part_is_refused(
    started: Registry, repository: str, tmp_path: Path
) -> None:
    image = adapter_image(tmp_path / "built", target_parameters=["mlp.experts.gate_up_proj"])
    name = push(started.host, f"{repository}:1", image)

    with pytest.raises(SpecError, match=rf"SERVE-139 {name}.*target_parameters"):
        images(started.host, tmp_path / "cache").fetch(name, BASE)


# -- inside vLLM ---------------------------------------------------------------------------------


@dataclass
class LoRARequest:
    """vLLM's, as of 0.32 (there a msgspec.Struct)."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    tensorizer_config_dict: dict[str, Any] | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self) -> None:
        assert self.lora_int_id >= 1 and self.lora_path


class LoRAResolver:
    """vLLM's abstract class."""

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        raise NotImplementedError


@dataclass
class Resolvers:
    """vLLM's registry of resolvers."""

    resolvers: dict[str, LoRAResolver] = field(default_factory=dict)

    def get_supported_resolvers(self) -> Set[str]:
        return self.resolvers.keys()

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        assert resolver_name not in self.resolvers  # vLLM warns
        self.resolvers[resolver_name] = resolver


@pytest.fixture
def resolvers(monkeypatch: pytest.MonkeyPatch) -> Resolvers:
    """The registry of a stand-in for the package vllm, none of our variables being set."""
    for name in (*SWITCHES, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        monkeypatch.delenv(name, raising=False)
    request, resolver = ModuleType("vllm.lora.request"), ModuleType("vllm.lora.resolver")
    vars(request).update(LoRARequest=LoRARequest)
    vars(resolver).update(LoRAResolver=LoRAResolver, LoRAResolverRegistry=Resolvers())
    for module in (ModuleType("vllm"), ModuleType("vllm.lora"), request, resolver):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return vars(resolver)["LoRAResolverRegistry"]  # type: ignore[no-any-return]


def test_the_entry_point_does_nothing_without_the_variable(resolvers: Resolvers) -> None:
    """It is the one that the package declares."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    ((name, value),) = declared["vllm.general_plugins"].items()

    EntryPoint(name, value, "vllm.general_plugins").load()()

    assert name == vllm_plugin.NAME
    assert {} == resolvers.resolvers


@pytest.mark.registry
def test_a_request_by_image_loads_the_adapter(
    resolvers: Resolvers,
    started: Registry,
    layout: Path,
    repository: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its number depends on the digest alone; what cannot be served is None and one line of log."""
    name = push(started.host, f"{repository}:1", layout)
    push(started.host, f"{repository}:2", layout)
    monkeypatch.setenv("TUNING_LORA_IMAGES", f"{started.host}/tests/")
    monkeypatch.setenv("TUNING_LORA_CACHE", str(tmp_path))
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    vllm_plugin.register()
    vllm_plugin.register()  # vLLM may
    assert [] == caplog.messages

    resolver = resolvers.resolvers[vllm_plugin.NAME]

    def resolve(name: str, base: str = BASE) -> LoRARequest | None:
        return asyncio.run(resolver.resolve_lora(base, name))

    first, second = resolve(name), resolve(f"{started.host}/{repository}:2")
    assert first and second
    assert (name, first.lora_int_id, first.lora_path) == (
        first.lora_name,
        second.lora_int_id,
        second.lora_path,
    )
    assert (Path(first.lora_path) / "adapter_config.json").is_file()
    assert resolve("some-adapter") is None
    assert [] == caplog.messages
    for missing, base, code in (
        (f"{started.host}/{repository}:3", BASE, "REG-123"),
        (name, "org/other", "MODEL-207"),
    ):
        assert resolve(missing, base) is None
        (line,) = caplog.messages
        assert missing in line and code in line
        caplog.clear()


@pytest.mark.parametrize("fault", ["prefix", "policy", "vllm"])
def test_vllm_starts_whatever_is_wrong(
    resolvers: Resolvers,
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log says what is, and no adapter image is served."""
    monkeypatch.setenv("TUNING_LORA_IMAGES", "team/" if fault == "prefix" else "r.example.com/team")
    if fault == "policy":
        monkeypatch.setenv("TUNING_POLICY", str(tmp_path / "missing.yaml"))
    if fault == "vllm":
        monkeypatch.setitem(sys.modules, "vllm.lora.resolver", None)

    vllm_plugin.register()

    assert {} == resolvers.resolvers
    (record,) = caplog.records
    reasons = {"prefix": "SERVE-138", "policy": "missing.yaml", "vllm": "vllm.lora.resolver"}
    assert record.levelno == logging.ERROR and reasons[fault] in record.message


def test_vllms_own_switch_is_asked_for(
    resolvers: Resolvers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TUNING_LORA_IMAGES", "r.example.com/team")

    vllm_plugin.register()

    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in caplog.text
    assert [vllm_plugin.NAME] == list(resolvers.resolvers)


def test_vllms_processes_get_no_torch_from_us() -> None:
    """The entry point alone imports nothing of ours; the pull imports no torch and no PEFT."""
    code = """
import sys, tuning.serve.vllm_plugin
assert not {m for m in sys.modules if m.startswith(("tuning.oci", "tuning.spec"))}
import tuning.serve.lora_images
print(sorted({"torch", "peft", "transformers", "vllm"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "[]\n" == done.stdout
