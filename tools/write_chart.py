"""`configs/deploy/chart`: the Helm chart, made from the files that kustomize reads.

The objects are written once, in `configs/deploy`: here their lines get values in place of what the
kustomizations fill in. Real Helm compares both in `tests/jobs/test_chart.py`. The CRD is a link.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from jobs.api.options import Options

DEPLOY = Path(__file__).resolve().parents[1] / "configs" / "deploy"
CHART = DEPLOY / "chart"
HEAD = "{{- /* Written by `make docs` from configs/deploy: edit the files there. */ -}}\n"
NAMESPACE = "{{ .Release.Namespace }}"
PULL = """\
      {{- with .Values.imagePullSecrets }}
      imagePullSecrets:
        {{- range . }}
        - name: {{ quote . }}
        {{- end }}
      {{- end }}
"""
SUM = """\
      annotations: # what it is told is read at its start
        {{- with .Values }}
        checksum/config: {{ list .options .policy .policyFiles | toYaml | sha256sum }}
        {{- end }}
"""
CONFIG = """\
{{- $own := dict "operatorNamespace" .Release.Namespace }}
{{- if .Values.namespaced }}
{{- $_ := set $own "namespaces" (list .Release.Namespace) }}
{{- if eq "auto" (dig "storage" "runVolume" "auto" .Values.options) }}
{{- $_ := set $own "storage" (dict "runVolume" "claim") }}
{{- end }}
{{- end }}
apiVersion: v1
kind: ConfigMap
metadata:
  name: tuning-operator
  namespace: {{ .Release.Namespace }}
data:
  options.yaml: |
    {{- mergeOverwrite (deepCopy .Values.options) $own | toYaml | nindent 4 }}
  policy.yaml: |
    {{- toYaml .Values.policy | nindent 4 }}
  {{- range $name, $text := .Values.policyFiles }}
  {{ $name }}: |
    {{- $text | nindent 4 }}
  {{- end }}
"""
# Kept when the chart is removed: with the CRD go all Workspaces.
CRD = """\
{{- if .Values.crd }}
{{- $keep := dict "metadata" (dict "annotations" (dict "helm.sh/resource-policy" "keep")) }}
{{- mergeOverwrite (.Files.Get "workspaces.kaito.sh.yaml" | fromYaml) $keep | toYaml }}
{{- end }}
"""
VALUES = """\
# Written by `make docs`. `make images` writes names and digests of the images it pushed into
# build/deploy/values.yaml.
image: tuning-operator:latest # the operator's; the engines' are options.image and options.images
imagePullSecrets: [] # names of Secrets for it; those for the engines: options.imagePullSecrets
replicas: {replicas} # one works, the other takes over within seconds
# Whether the chart holds the CRD of Workspaces. It stays when the chart is removed.
crd: true
# Rights in the release's namespace only, whose Workspaces alone are watched. Whoever is not the
# cluster's administrator sets crd to false, too.
namespaced: false
# Every option of the operator: docs/operator-options.md. nodes.provision: true also gives it the
# right to provision nodes. operatorNamespace is the release's.
options:
{options}
# The administrator's policy: docs/kubernetes.md, docs/data.md, docs/registries.md.
policy:
{policy}
# Certificates and public keys that the policy names: their texts by file name.
policyFiles: {{}}
"""


def written() -> dict[Path, str]:
    """Every file of the chart and its text."""
    folder = CHART / "templates"
    pages = {
        "account": _base("account"),
        "config": CONFIG,
        "crd": CRD,
        "deployment": _deployment(),
        "network": _base("network"),
        "provisioning": _when(".Values.options.nodes.provision", _text("provisioning/role.yaml")),
        "role": _when(
            ".Values.namespaced", _text("namespaced/role.yaml"), _text("cluster/role.yaml")
        ),
    }
    texts = {folder / f"{name}.yaml": HEAD + text for name, text in pages.items()}
    return texts | {
        CHART / "Chart.yaml": _about(),
        CHART / "values.yaml": _values(),
        CHART / "values.schema.json": json.dumps(_schema(), indent=2) + "\n",
    }


def _text(path: str) -> str:
    """A file of configs/deploy as a template: in the release's namespace."""
    text = (DEPLOY / path).read_text(encoding="utf-8")
    assert "{{" not in text, path
    text = text.replace("namespace: tuning-system", f"namespace: {NAMESPACE}")
    documents = text.split("\n---\n")
    for number, document in enumerate(documents):
        if not re.search("^kind: Cluster", document, re.M):
            documents[number] = re.sub(
                r"^(metadata:\n  name: .*\n)",
                rf"\1  namespace: {NAMESPACE}\n",
                document,
                flags=re.M,
            )
    return "\n---\n".join(documents)


def _base(name: str) -> str:
    return _text(f"base/{name}.yaml")


def _deployment() -> str:
    text = _base("deployment")
    for old, new in (
        (r"replicas: \d+ #.*", "replicas: {{ .Values.replicas }}"),
        ("image: tuning-operator #.*", "image: {{ quote .Values.image }}"),
        ("(?<=  template:\n    metadata:\n)", SUM),
        ("(?<=    spec:\n)(?=      serviceAccountName)", PULL),
    ):
        text, count = re.subn(old, new, text)
        assert count == 1, old
    return text


def _when(value: str, text: str, otherwise: str = "") -> str:
    between = "{{- else }}\n" if otherwise else ""
    return f"{{{{- if {value} }}}}\n{text}{between}{otherwise}{{{{- end }}}}\n"


def _about() -> str:
    project = (DEPLOY.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    version = re.findall(r'^version = "(.*)"', project, re.M)[0]
    about = {
        "apiVersion": "v2",
        "name": "tuning",
        "description": "Fine-tuning jobs from KAITO Workspaces: CRD, operator, rights.",
        "type": "application",
        "version": version,
        "appVersion": version,
    }
    return yaml.safe_dump(about, sort_keys=False)


def _values() -> str:
    deployment = yaml.safe_load((DEPLOY / "base/deployment.yaml").read_text(encoding="utf-8"))
    options = (DEPLOY / "base/options.yaml").read_text(encoding="utf-8")
    options = re.sub("(?m)^(#|operatorNamespace:).*\n", "", options)
    policy = (DEPLOY / "base/policy.yaml").read_text(encoding="utf-8")
    return VALUES.format(
        replicas=deployment["spec"]["replicas"],
        options=re.sub("(?m)^", "  ", options.rstrip()),
        policy=re.sub("(?m)^", "  ", policy.rstrip()),
    )


def _schema() -> dict[str, Any]:
    """What Helm refuses before anything is installed: a misspelt value, a misspelt option."""
    options = Options.model_json_schema(by_alias=True)
    parts = options.pop("$defs")
    for name in ("policy", "policyFiles", "operatorNamespace"):  # from their own values
        del options["properties"][name]
    texts = {"type": "array", "items": {"type": "string"}}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "image": {"type": "string"},
            "imagePullSecrets": texts,
            "replicas": {"type": "integer", "minimum": 1},
            "crd": {"type": "boolean"},
            "namespaced": {"type": "boolean"},
            "options": options,
            "policy": {"type": "object"},
            "policyFiles": {"type": "object", "additionalProperties": {"type": "string"}},
            "global": {"type": "object"},
        },
        "$defs": parts,
    }
