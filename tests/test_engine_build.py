"""What an engine needs from its machine: the build of torch, and where the driver is mounted."""

import itertools
import re
from pathlib import Path

import fake_driver
import install_torch
import pytest
from gpu_machines import MACHINES

from tuning import presets
from tuning.plan import probe

ROOT = Path(__file__).parents[1]
CAPABILITIES = sorted({gpu.capability for gpu in presets.gpus() if gpu.capability} | {(12, 1)})


def test_make_install_chooses_the_build_that_the_plan_would(capsys):
    """Without PyYAML, which is not installed yet: for every pair of cards and every driver."""
    for kinds in itertools.combinations_with_replacement(CAPABILITIES, 2):
        for cuda in ((11, 4), (12, 2), (12, 8), (13, 0), (13, 2)):
            cards = [{"name": "GPU", "capability": list(kind)} for kind in kinds]
            answer = {"devices": cards, "cuda": list(cuda), "driver": "1"}

            expected = presets.engine_build(*kinds, cuda=cuda)
            assert (expected or "cpu") == install_torch.suited(answer)
    assert "cpu" == install_torch.suited({"devices": []})
    assert {"cpu", *(engine.name for engine in presets.engines())} == set(install_torch.BUILDS)


@pytest.mark.parametrize("kind", ["v100", "driver 550", "h200", "b200"])
def test_make_install_asks_the_driver_that_is_there(kind, tmp_path, monkeypatch, capsys):
    """A V100 or an older driver gets cu126; where no build runs it says so, and takes cpu."""
    machine, expected = MACHINES[kind]
    fake_driver.install(machine, tmp_path, monkeypatch)
    build = expected.build.replace("None", "cpu")

    assert build == install_torch.suited(install_torch.asked())
    assert ("NVIDIA B200" in capsys.readouterr().out) == (build == "cpu")


@pytest.mark.parametrize(
    ("build", "machine", "there", "expected"),
    [
        ("cu130", "x86_64", ["2.13.0+cpu", "2.13.0"], ["torch===2.13.0"]),
        ("cu130", "x86_64", ["2.13.0+cu130", "2.13.0"], ["torch===2.13.0+cu130"]),
        ("cpu", "x86_64", ["2.13.0"], ["torch===2.13.0+cpu", "--index-url"]),
        ("cu126", "x86_64", ["2.13.0"], ["torch===2.13.0+cu126", "--index-url"]),
        ("cu130", "aarch64", ["2.13.0"], ["torch===2.13.0+cu130", "--index-url"]),
    ],
)
def test_a_mirror_of_pypi_is_enough_for_the_build_that_pypi_has(
    build, machine, there, expected, monkeypatch, capfd
):
    """And never serves another: pytorch.org's index is asked where no source has the build."""
    calls: list[tuple[str, ...]] = []

    def pip(*arguments: str) -> bool:
        calls.append(arguments)
        return arguments[-1].partition("===")[2] in there or "--index-url" in arguments

    monkeypatch.setattr(install_torch, "pip", pip)
    monkeypatch.setattr(install_torch, "installed", lambda: None)
    monkeypatch.setattr(install_torch.platform, "machine", lambda: machine)
    monkeypatch.setattr(install_torch.platform, "system", lambda: "Linux")
    monkeypatch.setattr(install_torch.sys, "argv", ["", "2.13.0", build])

    assert 0 == install_torch.main()
    last = calls[-1]
    assert (expected[0], expected[1:]) == (last[-1], [e for e in last if e == "--index-url"])
    assert "--no-deps" in last  # its libraries next, and what is locked from the lock


def test_cuda_comes_with_its_build_and_all_else_from_the_lock():
    """What torch for CUDA needs, of both kinds; nothing of another build is in the lock."""
    locked = ["filelock", "typing-extensions>=4.10.0", "sympy>=1.13.3", "jinja2", "setuptools>=77"]
    cuda = [
        'cuda-toolkit[cublas,cudart]==13.0.3; platform_system == "Linux"',
        'nvidia-cudnn-cu13==9.20.0.48; platform_system == "Linux"',
        'nvidia-cusparselt-cu12==0.7.1; platform_system == "Linux"',
        'triton==3.7.1; platform_system == "Linux"',
    ]
    extra = ['optree>=0.13.0; extra == "optree"']
    assert cuda == install_torch.libraries([*locked, *cuda, *extra])
    lock = install_torch.locked(install_torch.LOCK.read_text())
    known = {name for name in lock if name.startswith(("nvidia-", "cuda-", "triton"))}
    assert not {name for name in known if "cutlass" not in name}  # flash-attn-4's compiler
    version = re.findall("TORCH := (.*)", (ROOT / "Makefile").read_text())[0]
    assert f"torch=={version} " in lock["torch"]


def test_the_engine_looks_where_gke_mounts_the_driver():
    """And asks NVIDIA's container toolkit for CUDA, not only for nvidia-smi."""
    _, stage = (ROOT / "Dockerfile").read_text().split("FROM python AS engine")
    lines = stage.replace("\\\n", " ").splitlines()
    pairs = [re.findall(r"(\w+)=(\S+)", line) for line in lines if line.startswith("ENV ")]
    variables = dict(itertools.chain.from_iterable(pairs))

    assert probe.PLACES[0] in variables["LD_LIBRARY_PATH"].split(":")
    assert "/usr/local/nvidia/bin" in variables["PATH"].split(":")
    assert "$PATH" in variables["PATH"].split(":")
    assert {"compute", "utility"} <= set(variables["NVIDIA_DRIVER_CAPABILITIES"].split(","))
    assert "all" == variables["NVIDIA_VISIBLE_DEVICES"]
