"""`make images`: what it refuses, whom it calls, and the kustomization that it leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import build_images
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from registries import Registry, tool

from jobs.api.options import Options

# Stands in for a builder and for cosign: notes how it is called, pushes to nowhere.
PROGRAM = """\
#!/bin/sh
echo "${0##*/} $*" >> "$NOTES"
case "$*" in *"$FAILS"*) exit 3;; esac
digest=sha256:$(echo "$*" | sha256sum | head -c 64)
case "$*" in push*) echo "1: digest: $digest size: 1";; esac
for word; do case $word in --digestfile=*) echo "$digest" > "${word#*=}";; esac; done
"""
BASE = f"sha256:{'b' * 64}"
DIGEST = st.from_regex("sha256:[0-9a-f]{64}", fullmatch=True)
needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of programs that stand in for others; there are no others but the system's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("docker", "podman", "buildah", "cosign"):
        program = folder / name
        program.write_text(PROGRAM)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("FAILS", "nothing does")
    return folder


def called(tmp_path: Path) -> list[str]:
    """The command lines, in their order."""
    notes = tmp_path / "notes"
    return notes.read_text().splitlines() if notes.exists() else []


def test_all_that_is_wrong_is_told_before_anything_is_built(tools: Path, tmp_path: Path) -> None:
    """In one pass, each with its remedy."""
    (tools / "cosign").unlink()
    wrong = ["--tag=a b", "--engine=cu1", "--key=k", f"--deploy={tmp_path}"]
    told = build_images.main(["https://R.example.com/team", *wrong])
    assert isinstance(told, str)
    for word in ("REGISTRY", "TAG", "ENGINES", "cosign is not installed", "KEY k", "DEPLOY"):
        assert word in told
    assert [] == called(tmp_path)


@pytest.mark.parametrize("there", ["docker", "podman", "buildah"])
def test_the_first_builder_that_works_builds_pushes_and_signs(
    there: str, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator first, then an engine each; every image is signed by the digest it has."""
    monkeypatch.setenv("FAILS", "version" if there != "docker" else "nothing does")
    if there == "buildah":
        (tools / "podman").unlink()
    key = tmp_path / "cosign.key"
    key.touch()
    out = tmp_path / "deploy"
    engines = ["--engine=cu126", "--engine=cu130"]
    more = [f"--key={key}", "--insecure", f"--out={out}", f"--base=r.example.com/b:1@{BASE}"]
    assert 0 == build_images.main(["localhost:5000/team", "--tag=1", *engines, *more])

    lines = called(tmp_path)
    builds = [line for line in lines if line.startswith(f"{there} build ")]
    assert ["operator", "engine", "engine"] == [
        line.split("--target ")[1].split()[0] for line in builds
    ]
    assert ["cu126", "cu130"] == [line.split("TORCH_INDEX=")[1].split()[0] for line in builds[1:]]
    assert all(f"--build-arg=BASE=r.example.com/b@{BASE}" in line for line in builds)
    assert all(f"image.base.digest={BASE}" in line for line in builds)
    assert all("image.base.name=r.example.com/b:1 " in line for line in builds)
    pushes = [line for line in lines if line.startswith(f"{there} push ")]
    assert [there != "docker"] * 3 == ["--tls-verify=false" in line for line in pushes]
    signed = [line.split()[-1] for line in lines if line.startswith("cosign sign ")]
    values = yaml.safe_load((out / "values.yaml").read_text())
    assert signed == [values["image"], *values["options"]["images"].values()]
    assert signed[-1] == values["options"]["image"]
    assert all(name.startswith("localhost:5000/team/tuning") for name in signed)


def test_a_build_that_fails_leaves_no_kustomization(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor names images that are not in the registry."""
    monkeypatch.setenv("FAILS", "--target engine")
    out = tmp_path / "deploy"
    told = build_images.main(
        ["r.example.com/team", "--engine=cpu", f"--out={out}", f"--base=b@{BASE}"]
    )
    assert "docker build --target ... failed with exit code 3; nothing was written" == told
    assert not out.exists()


@pytest.mark.registry
@pytest.mark.parametrize("form", ["oci", "v2s2"])
def test_all_images_stand_on_the_digest_that_the_base_has_now(
    form: str, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its registry tells, in a manifest of OCI or Docker; a tag that moved is another base."""
    umoci, layout = [tool("umoci")], tmp_path / "layout"
    subprocess.run([*umoci, "init", "--layout", layout], check=True, capture_output=True)
    known = []
    with Registry(tmp_path) as registry:
        base = f"{registry.host}/library/debian:12"
        for name in ("first", "second"):
            image = ["--image", f"{layout}:{name}"]
            subprocess.run([*umoci, "new", *image], check=True, capture_output=True)
            note = ["--config.label", f"which={name}"]
            subprocess.run([*umoci, "config", *image, *note], check=True, capture_output=True)
            copy = [tool("skopeo"), "copy", "--format", form, "--dest-tls-verify=false"]
            copy += [f"oci:{layout}:{name}", f"docker://{base}"]
            subprocess.run(copy, check=True, capture_output=True)
            shown = [tool("skopeo"), "inspect", "--tls-verify=false", "--format={{.Digest}}"]
            known.append(subprocess.check_output([*shown, f"docker://{base}"], text=True).strip())

            asked = [f"{registry.host}/team", "--engine=cpu", "--insecure", f"--base={base}"]
            assert 0 == build_images.main([*asked, f"--out={tmp_path}/out"])
            builds = [line for line in called(tmp_path) if line.startswith("docker build ")][-2:]
            told = [line.split("org.opencontainers.image.base.")[1:] for line in builds]
            assert [[f"name={base} --label=", f"digest={known[-1]}"]] * 2 == [
                [first, second.split()[0]] for first, second in told
            ]
            pinned = f"BASE={registry.host}/library/debian@{known[-1]} "
            assert all(pinned in line for line in builds)
        count = len(called(tmp_path))
        own = f"{registry.host}/team/own:1"  # the builder may have it, its registry does not
        given = [each for each in asked if not each.startswith("--base=")]
        assert 0 == build_images.main([*given, f"--base={own}", f"--out={tmp_path}/out"])
        builds = [line for line in called(tmp_path)[count:] if line.startswith("docker build ")]
        assert 2 == len(builds) and all(f"BASE={own} " in f"{line} " for line in builds)
        assert not any("image.base" in line for line in builds)
    assert known[0] != known[1]


def rendered(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would take."""
    text = subprocess.check_output(["kubectl", "kustomize", str(folder)], text=True)
    return list(yaml.safe_load_all(text))


@needs_kubectl
@pytest.mark.parametrize("folder", ["", "namespaced", "provisioning"])
@settings(max_examples=5, deadline=None)
@given(digests=st.lists(DIGEST, min_size=4, max_size=4, unique=True), secret=st.booleans())
def test_the_kustomization_names_every_image_by_digest(
    folder: str, digests: list[str], secret: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of all three ways to install; the other options and all objects stay as they are."""
    deploy, out = build_images.DEPLOY / folder, tmp_path_factory.mktemp("out") / "deploy"
    operator, *names = (f"r.example.com:5000/team/tuning@{digest}" for digest in digests)
    built = dict(zip(["cpu", "cu126", "cu130"], names, strict=True))
    build_images.write(out, deploy, operator, built, "pull" if secret else None)

    before, after = rendered(deploy), rendered(out)
    assert [each["kind"] for each in before] == [each["kind"] for each in after]
    (pod,) = (e["spec"]["template"]["spec"] for e in after if e["kind"] == "Deployment")
    assert operator == pod["containers"][0]["image"]
    assert ([{"name": "pull"}] if secret else None) == pod.get("imagePullSecrets")
    first, then = (
        Options.model_validate(yaml.safe_load(each["data"]["options.yaml"]))
        for objects in (before, after)
        for each in objects
        if each["kind"] == "ConfigMap"
    )
    assert {"cu126": names[1], "cu130": names[2]} == then.images and names[2] == then.image
    own = {"image", "images", "image_pull_secrets"}
    assert first.model_dump(exclude=own) == then.model_dump(exclude=own)
    assert then.image_pull_secrets == (("pull",) if secret else ())
    values = json.loads(json.dumps(yaml.safe_load((out / "values.yaml").read_text())))
    assert operator == values["image"] and names[2] == values["options"]["image"]
