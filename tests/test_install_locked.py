"""What is installed is what was locked: by hash, in the version of constraints.txt, pip as well."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import install_locked
import pytest

ROOT = Path(__file__).parents[1]
INNER, OUTER = "tuning_lock_inner", "tuning_lock_outer"  # on no index


def wheel(folder: Path, name: str, needs: str = "") -> str:
    """A package of one line in `folder`; the sha256 of its wheel."""
    info = f"{name}-1.0.dist-info"
    needed = f"Requires-Dist: {needs}\n" if needs else ""
    files = {
        f"{name}.py": "here = True\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needed}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        hashed = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record += f"{path},sha256={hashed.decode()},{len(text)}\n"
    archive = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as written:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            written.writestr(path, text)
    return hashlib.sha256(archive.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of two packages, one of which needs the other, and an environment with old pip."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools/install_locked.py", folder / "tools")
    (folder / "pyproject.toml").write_text(
        f'[project]\ndependencies = []\noptional-dependencies.extra = ["{OUTER}>=0.5"]\n'
        f'[dependency-groups]\ngroup = ["{INNER}"]\n'
    )
    (folder / "wheels").mkdir()
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    return folder


def install(project: Path, lock: str, *names: str) -> subprocess.CompletedProcess[str]:
    """The tool with this lock of the two packages; pip's own entry is the real one."""
    real = install_locked.locked((ROOT / "constraints.txt").read_text())
    (project / "constraints.txt").write_text(real["pip"] + lock)
    settings = {**os.environ, "PIP_FIND_LINKS": str(project / "wheels")}
    command = [project / "env/bin/python", project / "tools/install_locked.py", *names]
    return subprocess.run(command, capture_output=True, text=True, env=settings, check=False)


def there(project: Path, name: str) -> bool:
    command = [project / "env/bin/python", "-c", f"import {name}"]
    return not subprocess.run(command, capture_output=True, check=False).returncode


def entry(name: str, *hashes: str) -> str:
    return f"{name}==1.0" + "".join(f" \\\n    --hash=sha256:{each}" for each in hashes) + "\n"


def test_an_archive_with_another_hash_is_refused(project: Path) -> None:
    """Whether it is asked for, or needed by what is, or has no hash; the right ones install."""
    inner = wheel(project / "wheels", INNER)
    outer = wheel(project / "wheels", OUTER, needs=f"{INNER}>=0.1")
    other = hashlib.sha256(b"another archive").hexdigest()
    for lock, name in [
        (
            entry(INNER, inner) + entry(OUTER, other),
            OUTER,
        ),
        (
            entry(INNER, other) + entry(OUTER, outer),
            INNER,
        ),
        (entry(INNER) + entry(OUTER, outer), INNER),
        (entry(OUTER, outer), INNER),
    ]:
        refused = install(project, lock, "extra")
        assert refused.returncode == 1
        assert name in refused.stderr and "hash" in refused.stderr.lower()
        assert not there(project, OUTER) and not there(project, INNER)

    done = install(
        project,
        entry(INNER, other, inner) + entry(OUTER, outer),
        "extra,group",
    )
    assert done.returncode == 0, done.stderr
    assert there(project, OUTER) and there(project, INNER)
    told = subprocess.check_output([project / "env/bin/pip", "--version"], text=True)
    assert f"pip=={told.split()[1]} " in install_locked.locked(
        (ROOT / "constraints.txt").read_text()
    )["pip"].replace("\\", " ")


def test_a_name_that_is_no_extra_is_told(project: Path) -> None:
    """Before pip is asked for anything."""
    wrong = install(project, "", "trian")
    assert (2, "no extra and no group 'trian'" in wrong.stderr) == (wrong.returncode, True)


def test_everything_that_is_declared_is_locked_with_hashes() -> None:
    """Of each extra and group, for each Python: a version, and only sha256 of whole length."""
    lock = install_locked.locked((ROOT / "constraints.txt").read_text())
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = [*told["project"]["optional-dependencies"], *told["dependency-groups"]]
    assert {"train", "attention", "release"} <= set(names)
    for need in install_locked.requirements(names):
        name = re.split(r"[^\w.-]", need, maxsplit=1)[0].lower().replace("_", "-")
        assert name in lock, f"{need} is not locked: make lock"
    hashes = r"(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n"
    for name, text in lock.items():
        assert re.fullmatch(rf"(?:{re.escape(name)}==[^ ]+(?: ; .*?)?{hashes})+", text), name
