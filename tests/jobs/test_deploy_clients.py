"""Helm renders the chart, and a linter judges what is deployed: make test-clients.

Helm is the library in the package helm-python-sdk: the same code as the program, without one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import build_images
import pytest
import write_chart
import yaml

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1800)]
PACKAGES = ["helm-python-sdk==0.2.2", "checkov==3.3.30"]
RENDER = """\
import json, sys
from helm_python import Chart, lint
chart, values, namespace = sys.argv[1:]
told = lint(chart)
with Chart.load(chart) as opened:
    texts = opened.render(values=json.loads(values), name="any", namespace=namespace)
print(json.dumps([list(texts.values()), told["messages"] + told["errors"]]))
"""
PROVISION = {"nodes": {"provision": True, "nodeClass": {"name": "default"}}}
# What is not followed; each has its reason beside the field in base/deployment.yaml.
REFUSED = {
    "CKV_K8S_11",  # CPU limits
    "CKV_K8S_38",  # no token of a service account
}


@pytest.fixture(scope="module")
def home() -> Path:
    """Where both are installed, once: 400 MB."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuning-deploy"
    done = home / "done"
    if not done.exists() or done.read_text() != str(PACKAGES):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        pip = [str(home / "bin/python"), "-m", "pip", "install", "--quiet", *PACKAGES]
        subprocess.run(pip, check=True)
        done.write_text(str(PACKAGES))
    return home


def helm(home: Path, values: dict[str, Any], namespace: str) -> list[dict[str, Any]]:
    """The chart's objects; nothing is found by `helm lint` but that there is no icon."""
    command = [str(home / "bin/python"), "-c", RENDER, str(write_chart.CHART)]
    command += [json.dumps(values), namespace]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr)
    texts, messages = json.loads(done.stdout)
    assert ["icon is recommended"] == [each["error"] for each in messages]
    return [item for text in texts for item in yaml.safe_load_all(text) if item]


def kustomized(folder: Path) -> list[dict[str, Any]]:
    text = subprocess.check_output(["kubectl", "kustomize", str(folder)], text=True)
    return list(yaml.safe_load_all(text))


def normal(items: list[dict[str, Any]]) -> dict[str, Any]:
    """By kind and name. Left out: the namespace, which is Helm's affair, what makes pods restart
    (a ConfigMap's name, an annotation), and Helm's order to keep the CRD."""
    found = {}
    for item in items:
        if item["kind"] == "Namespace":
            continue
        text = re.sub(r"(?<=tuning-operator)-[0-9a-z]{10}(?=[\"\s])", "", json.dumps(item))
        item = json.loads(text)
        item["metadata"].pop("annotations", None)
        if item["kind"] == "Deployment":
            item["spec"]["template"]["metadata"].pop("annotations", None)
        elif item["kind"] == "ConfigMap":
            item["data"] = {key: yaml.safe_load(text) for key, text in item["data"].items()}
        found[item["kind"], item["metadata"]["name"]] = item
    return found


@pytest.mark.parametrize(
    ("folder", "values"),
    [
        ("", {}),
        ("namespaced", {"namespaced": True, "crd": False}),
        ("provisioning", {"options": PROVISION}),
    ],
)
def test_the_chart_is_what_kustomize_makes(folder: str, values: dict[str, Any], home: Path) -> None:
    """Of all three ways to install; options that say the default may be there or not."""
    expected = normal(kustomized(build_images.DEPLOY / folder))
    found = normal(helm(home, values, "tuning-system"))
    for items in (expected, found):
        options = items["ConfigMap", "tuning-operator"]["data"].pop("options.yaml")
        own = write_chart.Options.model_validate(options)
        items["options"] = own.model_dump()
    assert expected == found


def test_the_chart_follows_its_release_and_its_values(home: Path, tmp_path: Path) -> None:
    """In another namespace, with what `make images` wrote; a policy's certificates go along."""
    digests = [f"r.example.com/team/tuning@sha256:{number:064}" for number in range(2)]
    out = tmp_path / "deploy"
    build_images.write(out, build_images.DEPLOY, digests[0], {"cu130": digests[1]}, "pull")
    values = yaml.safe_load((out / "values.yaml").read_text())
    certificate = "-----BEGIN CERTIFICATE-----\nabc\n-----END CERTIFICATE-----\n"
    values |= {"namespaced": True, "policyFiles": {"ca.pem": certificate}}
    items = helm(home, values, "ours")
    assert {"ours"} == {
        item["metadata"]["namespace"]
        for item in items
        if item["kind"] != "CustomResourceDefinition"
    }
    found = {item["kind"]: item for item in items}
    pod = found["Deployment"]["spec"]["template"]["spec"]
    assert digests[0] == pod["containers"][0]["image"]
    assert [{"name": "pull"}] == pod["imagePullSecrets"]
    assert certificate == found["ConfigMap"]["data"]["ca.pem"]
    given = yaml.safe_load(found["ConfigMap"]["data"]["options.yaml"])
    options = write_chart.Options.model_validate(given)
    assert ({"cu130": digests[1]}, ("ours",), "ours", ("pull",), "claim") == (
        options.images,
        options.namespaces,
        options.operator_namespace,
        options.image_pull_secrets,
        options.storage.run_volume,
    )
    kept = found["CustomResourceDefinition"]["metadata"]["annotations"]
    assert {"helm.sh/resource-policy": "keep"} == kept
    assert "ClusterRole" not in found


@pytest.mark.parametrize(
    "wrong", [{"optoins": {}}, {"options": {"imgae": "x"}}, {"options": {"backoffLimit": -1}}]
)
def test_a_misspelt_value_is_refused_by_helm(wrong: dict[str, Any], home: Path) -> None:
    """Before anything is installed."""
    with pytest.raises(ValueError, match="don't meet the specifications of the schema"):
        helm(home, wrong, "ours")


@pytest.mark.parametrize("folder", ["", "namespaced", "provisioning"])
def test_a_linter_finds_nothing_that_is_not_answered(
    folder: str, home: Path, tmp_path: Path
) -> None:
    """checkov over what `make images` installs: by digest."""
    name = f"r.example.com/team/tuning@sha256:{1:064}"
    out = tmp_path / "deploy"
    build_images.write(out, build_images.DEPLOY / folder, name, {"cu130": name}, None)
    file = tmp_path / "rendered.yaml"
    file.write_text(yaml.safe_dump_all(kustomized(out)))
    command = [str(home / "bin/checkov"), "--framework=kubernetes", "--output=json"]
    command += ["--skip-download", f"--file={file}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = json.loads(done.stdout)["results"]
    assert len(results["passed_checks"]) > 80
    assert REFUSED == {each["check_id"] for each in results["failed_checks"]}
