"""Adapters from anywhere are served if they fit; the others are refused by name, beside them."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import serving
import tiny_runs
import torch
from faults.proxy import Proxy, Reply
from safetensors.torch import load_file, save_file

from tuning import files
from tuning.console import Console
from tuning.oci.delivery import Access
from tuning.oci.layout.package import build_adapter
from tuning.serve import adapters
from tuning.serve.adapter_specs import AdapterSpec
from tuning.serve.adapters import RejectedAdapter
from tuning.serve.rendering import Renderer, template_problem
from tuning.training import train

Base = Callable[..., Path]
QUIET = Console(quiet=True)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base(tiny_base: Base) -> Path:
    return tiny_base("llama")


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    with closing(Renderer()) as running:
        yield running


@pytest.fixture(scope="module")
def loaded(base: Path) -> Any:
    return serving.load(base)


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.random_adapter(base, tmp_path_factory.mktemp("good"))


Take = Callable[..., tuple[list[adapters.ServedModel], list[RejectedAdapter]]]


@pytest.fixture
def take(base: Path, loaded: Any, renderer: Renderer) -> Take:
    """`take(a=place, ...)`: what a server of these adapters offers, and what it refuses."""

    def offered(**places: Any) -> tuple[list[adapters.ServedModel], list[RejectedAdapter]]:
        with ExitStack() as folders:
            ready, refused = adapters.fetch(
                [AdapterSpec(name, str(place)) for name, place in places.items()],
                config=files.read_json(base / "config.json"),
                base_template="base",
                template_problem=lambda text: template_problem(
                    text, renderer, {"bos_token": "<s>"}
                ),
                access=Access(),
                console=QUIET,
                folders=folders,
            )
            loras, ready, misfits = adapters.attach(ready, model=loaded, console=QUIET)
            loras.remove()
        refused += misfits
        return adapters.offered(ready, refused, base="base", combined="all"), refused

    return offered


@pytest.fixture
def broken(good: Path, tmp_path: Path) -> Path:
    """A copy of the good adapter, to be spoilt."""
    return shutil.copytree(good, tmp_path / "broken")


def test_adapters_are_offered_alone_and_together(take: Take, good: Path) -> None:
    """The base, each by its name, and all by their strengths; versions name the bytes."""
    offered, refused = take(a=good, b=good)

    assert [] == refused
    assert {"base": (0, 0), "a": (1, 0), "b": (0, 1), "all": (1, 1)} == {
        one.name: one.weights for one in offered
    }
    versions = {one.name: one.version for one in offered}
    assert versions["all"] == f"{versions['a']} {versions['b']}"
    assert versions["a"].startswith(f"a@sha256:{files.digest_file(good / WEIGHTS)[:12]}")


def test_an_adapter_called_as_all_together_is_both(take: Take, good: Path) -> None:
    offered, _ = take(all=good)

    assert [("base", "base"), ("all", "adapter")] == [(one.name, one.kind) for one in offered]


@pytest.mark.parametrize("headers", [(), ("Negotiate",), ('Digest realm="x", nonce="n"',)])
def test_an_adapter_whose_registry_offers_no_known_login_is_refused_alone(
    take: Take, good: Path, headers: tuple[str, ...]
) -> None:
    """In the registry's words; the others are served."""
    challenges = [("WWW-Authenticate", text) for text in headers]
    with Proxy(("127.0.0.1", 9)) as front:
        front.spoil(lambda turn: turn.answer(Reply(401, challenges, b"ask the desk")), times=None)
        offered, refused = take(a=good, b=f"{front.host}/team/x:1")

    assert ["base", "a"] == [one.name for one in offered]
    assert ["b"] == [one.name for one in refused]
    assert "REG-121" == refused[0].problems[0].code
    assert "ask the desk" in refused[0].problems[0].what


def test_an_image_layout_is_served_too(take: Take, good: Path, tmp_path: Path) -> None:
    """What `run --output oci:DIR` leaves; a layout without an adapter is refused by name."""
    (good / "tuning.json").write_text("{}")
    build_adapter(
        good, tmp_path / "layout", run_id="run-1", preset="phi-3-mini-4k-instruct", annotations={}
    )

    offered, refused = take(a=f"oci:{tmp_path / 'layout'}", gone=f"oci:{tmp_path / 'none'}")

    assert ["base", "a"] == [one.name for one in offered]
    assert ["gone"] == [one.name for one in refused]


def test_our_own_and_kaitos_adapters_fit(
    take: Take, base: Path, good: Path, tmp_path: Path
) -> None:
    """Trained here; and as KAITO writes them: no task type, a container's path, bfloat16."""
    asked = tiny_runs.request(tmp_path / "run", base, tiny_runs.recipe(), tiny_runs.placement())
    train.work(asked)
    kaito = shutil.copytree(good, tmp_path / "kaito")
    record = json.loads((kaito / CONFIG).read_text())
    record |= {"task_type": None, "base_model_name_or_path": "/workspace/weights"}
    (kaito / CONFIG).write_text(json.dumps(record))
    tensors = {k: v.bfloat16() for k, v in load_file(kaito / WEIGHTS).items()}
    save_file(tensors, kaito / WEIGHTS)

    offered, refused = take(ours=tmp_path / "run" / "adapter", kaito=kaito)

    assert [] == refused
    assert ["base", "ours", "kaito", "all"] == [one.name for one in offered]


def refused_alone(take: Take, broken: Any, good: Path) -> RejectedAdapter:
    """The refusal of `broken`, which is served beside a good one."""
    offered, refused = take(bad=broken, good=good)
    assert ["base", "good"] == [one.name for one in offered]  # and not all together: another model
    (only,) = refused
    assert "bad" == only.name
    assert str(broken) not in json.dumps(only.to_json())  # anybody may read it
    return only


@pytest.mark.parametrize(
    ("family", "shape", "said"),
    [
        ("llama", {"hidden_size": 128}, "made for width 128; the base model has 64"),
        ("llama", {"num_hidden_layers": 3}, "is in layer 2; the base model has 2"),
        ("llama", {"intermediate_size": 256}, "has shape (8, 256); the base model needs (8, 128)"),
        ("llama", {"num_key_value_heads": 4}, "has shape (64, 8); the base model needs (32, 8)"),
        ("phi3", {}, "which has no model.layers.0.mlp.gate_up_proj"),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    family: str,
    shape: dict[str, Any],
    said: str,
    take: Take,
    good: Path,
    tiny_base: Base,
    tmp_path: Path,
) -> None:
    """Width, depth, projections and family are told."""
    other = serving.random_adapter(tiny_base(family, **shape), tmp_path / "other")

    assert any(said in problem.what for problem in refused_alone(take, other, good).problems)


UNSAFE = {
    "auto_mapping": {"parent_library": "antigravity", "base_model_class": "x"},
    "megatron_config": {"x": 1},
    "megatron_core": "antigravity",
    "trust_remote_code": True,
    "auto_map": {"AutoConfig": "evil.Evil"},
    "peft_type": "PROMPT_TUNING",
    "modules_to_save": ["lm_head"],
    "r": 10**9,
    "lora_alpha": float("inf"),
}


@pytest.mark.parametrize("key", UNSAFE)
def test_an_unsafe_config_is_refused_and_imports_nothing(
    key: str, take: Take, good: Path, broken: Path
) -> None:
    """Keys that name code, ask for what we do not do, or make no sense."""
    record = json.loads((broken / CONFIG).read_text())
    (broken / CONFIG).write_text(json.dumps(record | {key: UNSAFE[key]}))
    before = set(sys.modules)

    refused = refused_alone(take, broken, good)

    assert "MODEL-203" == refused.problems[0].code
    assert set() == {name for name in set(sys.modules) - before if "gravity" in name}


def test_pickled_weights_are_not_weights(take: Take, good: Path, broken: Path) -> None:
    (broken / WEIGHTS).rename(broken / "adapter_model.bin")

    assert "MODEL-201" == refused_alone(take, broken, good).problems[0].code


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_header(path: Path, record: Any, body: bytes) -> None:
    text = (record if isinstance(record, str) else json.dumps(record)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def with_offsets(first: Callable[[list[int]], list[int]]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        record, body = header(path)
        entry = next(v for k, v in record.items() if k != "__metadata__")
        entry["data_offsets"] = first(entry["data_offsets"])
        put_header(path, record, body)

    return spoil


def with_values(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensors = load_file(path)
        name = next(name for name in tensors if "lora_B" in name)
        save_file(tensors | {name: change(tensors[name])}, path)

    return spoil


def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def one_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0, 0] = value
        return tensor

    return change


DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": with_bytes(lambda data: b""),
    "header of 2^60 bytes": with_bytes(lambda data: struct.pack("<Q", 1 << 60) + data[8:]),
    "header of no bytes": with_bytes(lambda data: bytes(8) + data[8:]),
    "cut": with_bytes(lambda data: data[:-100]),
    "cut in the header": with_bytes(lambda data: data[:100]),
    "too long": with_bytes(lambda data: data + b"more"),
    "header is no JSON": lambda path: put_header(path, "{" * 100, b""),
    "header is deep": lambda path: put_header(path, "[" * 100_000 + "]" * 100_000, b""),
    "header is a list": lambda path: put_header(path, [], b""),
    "negative": with_offsets(lambda span: [-4, span[1]]),
    "overlap": with_offsets(lambda span: [span[0], span[1] + 64]),
    "backwards": with_offsets(lambda span: span[::-1]),
    "pointer of git LFS": with_bytes(lambda data: b"version https://git-lfs.github.com/spec/v1\n"),
    "not a number": with_values(one_value(float("nan"))),
    "infinite": with_values(one_value(float("inf"))),
    "bytes for weights": with_values(lambda tensor: tensor.to(torch.int8)),
    "another rank": with_values(lambda tensor: tensor[:, :4].contiguous()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_refused(damage: str, take: Take, good: Path, broken: Path) -> None:
    """Whatever is wrong with the file, it has a name and a reason."""
    DAMAGE[damage](broken / WEIGHTS)

    refused = refused_alone(take, broken, good)

    assert refused.problems[0].code in {"MODEL-204", "MODEL-205", "MODEL-208", "MODEL-209"}


def test_an_adapters_own_template_is_used_if_it_can_be_trusted(
    take: Take, good: Path, broken: Path
) -> None:
    """One that is the base's is the base's; one that could fill the memory is refused."""
    path = broken / "chat_template.jinja"
    path.write_text("{{ messages[0].content }}")
    offered, _ = take(a=broken)
    assert "{{ messages[0].content }}" == offered[1].template
    path.write_text("base")
    offered, _ = take(a=broken)
    assert offered[1].template is None
    path.write_text("{{ 'x' * 10 }}")
    offered, _ = take(a=broken)
    assert "{{ 'x' * 10 }}" == offered[1].template
    path.write_text("{{ 'x' * 1000000000 }}")
    assert "SERVE-120" == refused_alone(take, broken, good).problems[0].code


@pytest.mark.parametrize("alpha", [16, 1e308])
def test_an_adapter_whose_numbers_overflow_is_refused(
    take: Take, good: Path, broken: Path, alpha: float
) -> None:
    """Each of its numbers is finite; what the model makes of them is not."""
    record = json.loads((broken / CONFIG).read_text())
    (broken / CONFIG).write_text(json.dumps(record | {"lora_alpha": alpha}))
    if alpha == 16:
        tensors = load_file(broken / WEIGHTS)
        save_file({name: value * 1e25 for name, value in tensors.items()}, broken / WEIGHTS)

    refused = refused_alone(take, broken, good)

    assert ("MODEL-208", True) == (
        refused.problems[0].code,
        "not finite" in refused.problems[0].what,
    )


@pytest.mark.parametrize("recorded", ["sha256:base", "sha256:other", None])
def test_an_adapter_of_another_base_is_served_with_a_warning(
    recorded: str | None, good: Path, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of other weights than the server's, where both are known."""
    folder = Path(shutil.copytree(good, tmp_path / "adapter"))
    (folder / "tuning.json").write_text(json.dumps({"base_weights": recorded}))
    with ExitStack() as folders:
        ready, refused = adapters.fetch(
            [AdapterSpec("mine", str(folder))],
            config=files.read_json(base / "config.json"),
            base_template=None,
            template_problem=lambda _: None,
            access=Access(),
            console=Console(),
            folders=folders,
            weights=lambda: "sha256:base",
        )

    assert (["mine"], []) == ([one.spec.name for one in ready], refused)
    warned = "Adapter mine was trained on other weights" in capfd.readouterr().err
    assert (recorded == "sha256:other") == warned
