"""What a user sees of a GPU that cannot train; the machine's driver is a stand-in."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import commands
import fake_driver
import pytest
from gpu_machines import MACHINES

from tuning.console import Console
from tuning.pipeline import Options
from tuning.pipeline.run import Run
from tuning.plan import device, torch_build
from tuning.spec import Destination

ROOT = Path(__file__).parents[2]


@pytest.fixture
def on(tmp_path, monkeypatch):
    """Runs a command on a machine, with torch in the build for CUDA 13.0 (as its files say)."""
    package = tmp_path / "site" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('nobody imports it')\n")
    (package / "version.py").write_text("__version__ = '2.13.0+cu130'\ncuda = '13.0'\n")

    def command(kind, *arguments):
        fake_driver.install(MACHINES[kind][0], tmp_path, monkeypatch)
        path = os.pathsep.join((str(package.parent), str(ROOT)))
        environment = os.environ | {"PYTHONPATH": path}
        return commands.tuning(*arguments, env=environment, cwd=tmp_path)

    return command


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("v100", "PLAN-116", ["compute capability 7.0", "TORCH_INDEX=cu126"]),
        ("driver 550", "PLAN-115", ["driver 550.127.08", "580.65.06 or newer"]),
    ],
)
def test_a_run_ends_before_anything_is_fetched(kind, code, words, on, tmp_path):
    """Exit code 11, a line with the build of torch that fits; no traceback, nothing downloaded."""
    file = commands.workspace(tmp_path / "w.yaml")
    done = on(kind, "run", "-f", file, "--base-model", ROOT / "examples" / "tiny-model")

    assert 11 == done.returncode, done.stderr
    assert code in done.stderr and all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*/data/*"))


def test_the_bug_report_names_card_memory_and_driver(on):
    """Of a MIG slice its own name and memory."""
    shown = commands.good(on("mig without permission", "version", "--verbose"))

    assert "A100-PCIE-80GB MIG 1g.10gb (9.1 GiB free; " in shown
    assert "driver 535.161.08" in shown


@pytest.mark.parametrize(("kind", "grows"), [("vgpu", False), ("a10 in use", True)])
def test_segments_do_not_grow_where_the_driver_cannot_map_them(kind, grows, tmp_path, monkeypatch):
    """A vGPU has no virtual memory management: torch would end with "operation not supported"."""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    fake_driver.install(MACHINES[kind][0], tmp_path, monkeypatch)
    monkeypatch.setattr("tuning.plan.torch_build.installed", lambda: None)
    spec = SimpleNamespace(destination=Destination(image="registry.example.com/a:1"))
    run = Run(spec, Options(run_dir=tmp_path), Console(), None, threading.Event())

    assert ({} if grows else {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}) == (
        run._allocator()
    )
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    assert {} == run._allocator()


@pytest.mark.parametrize(("kind", "asked"), [("a10 in use", 2), ("broken", 1)])
def test_the_driver_is_asked_no_more_than_it_has_to_be(kind, asked, tmp_path, monkeypatch):
    """Without its persistence daemon it takes seconds for each card; one that hangs, a minute."""
    calls = []
    ask = device._ask

    def counted(waits):
        calls.append(1)
        return ask(waits)

    machine = MACHINES.get(kind, (fake_driver.Machine("580.65.06", 13000, (), error=802), None))[0]
    fake_driver.install(machine, tmp_path, monkeypatch)
    monkeypatch.setattr(torch_build, "installed", lambda: None)
    monkeypatch.setattr(device, "_ask", counted)
    spec = SimpleNamespace(destination=Destination(folder=Path("out")))
    run = Run(spec, Options(run_dir=tmp_path, ranks=1), Console(), None, threading.Event())
    found = [run.device(), run.device(), run.device(again=True)]

    assert asked == len(calls)
    assert {"cuda" if asked == 2 else "cpu"} == {each.kind for each in found}
    assert {1} == {each.count for each in found}


def test_a_driver_that_takes_long_is_told(tmp_path, monkeypatch, capsys):
    """Before the user thinks that the run hangs."""
    monkeypatch.setattr(device, "SOON", 0.2)
    monkeypatch.setattr(device, "PATIENCE", 1.0)
    fake_driver.install(fake_driver.Machine("1", 13000, (), error=-8), tmp_path, monkeypatch)
    spec = SimpleNamespace(destination=Destination(folder=Path("out")))
    run = Run(spec, Options(run_dir=tmp_path), Console(), None, threading.Event())

    assert "did not answer" in run.device().no_gpu
    assert "Waiting for the GPU's driver ..." in capsys.readouterr().err
