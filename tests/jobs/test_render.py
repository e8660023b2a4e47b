"""`python -m jobs render`: what would be created, or what is wrong, in the words of `check`."""

from __future__ import annotations

import io
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.world import config_map, workspace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import __main__ as entry
from jobs.api.options import Options
from jobs.controller import probes
from jobs.render import render
from tuning import spec
from tuning.errors import SpecError

WORKSPACE = yaml.safe_dump(workspace("phi", "team"), sort_keys=False)
CONFIG = yaml.safe_dump(config_map("mine", "team", "training_config: {}\n"))
SERVED = """apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata:
  name: wk
resource:
  instanceType: Standard_NC24ads_A100_v4
inference:
  preset:
    name: phi-3-mini-4k-instruct
"""


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the command."""
    monkeypatch.setattr(sys, "argv", ["jobs", "render", *arguments])
    with pytest.raises(SystemExit) as end:
        entry.main()
    found = capsys.readouterr()
    code = end.value.code
    return int(code if isinstance(code, int) else 0), found.out, found.err


BROKEN = {
    "empty": "",
    "only comments": "# nothing\n---\n",
    "no Workspace": CONFIG,
    "a Service": "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n",
    "a list": "- a\n- b\n",
    "a text": "hello\n",
    "no YAML": "a: [1\nb: }\n",
    "tabs": "a:\n\tb: c\n",
    "a control character": "a: \x00\n",
    "a tag": "kind: Workspace\nx: !!python/object/apply:os.system [ls]\n",
    "an alias of nothing": "kind: Workspace\na: *b\n",
    "two Workspaces": f"{WORKSPACE}---\n{WORKSPACE}",
    "no metadata": "apiVersion: kaito.sh/v1beta1\nkind: Workspace\n",
    "metadata that is a text": "apiVersion: kaito.sh/v1beta1\nkind: Workspace\nmetadata: x\n",
    "a metadata that is null": "apiVersion: kaito.sh/v1beta1\nkind: Workspace\nmetadata:\n",
    "no name": "apiVersion: kaito.sh/v1beta1\nkind: Workspace\nmetadata: {}\ninference: {}\n",
    "a name of two": SERVED.replace("name: wk", "name: [a, b]"),
    "an older version": SERVED.replace("v1beta1", "v1"),
    "deep brackets": "kind: Workspace\na: " + "[" * 5000,
    "a tuning that is null": "apiVersion: kaito.sh/v1beta1\nkind: Workspace\n"
    "metadata: {name: a}\ntuning:\n",
    "a preset that is a text": SERVED.replace("preset:\n    name: ", "preset: "),
    "annotations that are a list": SERVED.replace("name: wk", "name: wk\n  annotations: [a]"),
    "a ConfigMap that is missing": WORKSPACE.replace("method:", "config: mine\n  method:"),
    "a name that starts with a digit": SERVED.replace("wk", "1k"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_workspace_is_refused_by_name(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Exit code 11, one line each that says what to change; no traceback."""
    file = tmp_path / "w.yaml"
    file.write_text(BROKEN[kind])
    code, out, err = run(monkeypatch, capsys, "-f", str(file))

    assert (11, "") == (code, out)
    assert "Change: " in err and "Traceback" not in err
    with pytest.raises(SpecError):
        spec.load(file)


def test_what_cannot_be_read_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """No file, a folder, no UTF-8, one that is too large, options and a policy that are missing."""
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: \xe9\n")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"# x\n" * (1 << 19))
    good = tmp_path / "good.yaml"
    good.write_text(WORKSPACE)
    for arguments in (
        ("-f", str(tmp_path / "absent.yaml")),
        ("-f", str(tmp_path)),
        ("-f", str(latin)),
        ("-f", str(large)),
        ("-f", str(good / "below")),
        ("-f", str(good), "--options", str(tmp_path / "absent.yaml")),
        ("-f", str(good), "--policy", str(tmp_path / "absent.yaml")),
        ("-f", str(good), "--policy", str(tmp_path)),
    ):
        code, out, err = run(monkeypatch, capsys, *arguments)
        assert (11, "") == (code, out), arguments
        assert "Change: " in err, arguments


def test_the_input_is_a_file_too(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """`-f -`, with several documents: the Workspace, its ConfigMap, and others."""
    item = workspace("phi", config="mine")
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "push"}, "data": {}}
    settings_map = config_map("mine", "default", "training_config: {LoraConfig: {r: 24}}\n")
    text = yaml.safe_dump_all([service, settings_map, None, secret, item])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    code, out, err = run(monkeypatch, capsys, "-f", "-", "--namespace", "team")

    assert (0, "") == (code, err)
    objects = list(yaml.safe_load_all(out))
    assert ["PersistentVolumeClaim", "NetworkPolicy", "Job"] == [each["kind"] for each in objects]
    assert "r: 24" in str(objects[-1]["spec"]["template"]["metadata"]["annotations"])


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (("name: phi-3-mini-4k-instruct", "name: phi-3-mini-4k-instrukt"), "name (line 9)"),
        (("inference:\n  preset:", "inference:\n  adapters: [{}]\n  preset:"),
         "inference.adapters[0].source (line 8)"),
        (("  preset:", "  apiKeySecret: A/B\n  preset:"), "inference.apiKeySecret (line 8)"),
        (("  instanceType: ", "  count: 2\n  instanceType: "), "resource.count (line 6)"),
        (("metadata:", "metadata:\n  annotations: {kaito.sh/runtime: vllm}"), "(line 4)"),
        (("metadata:", "metadata:\n  annotations: {kaito.sh/runtime: ollama}"), "(line 4)"),
        (("metadata:", "metadata:\n  annotations:\n    tuning.kaito.sh/gpus: many"), "(line 5)"),
        (("  preset:", "  adapters:\n  - source: {name: a, volumeSource: {nfs: {}}}\n  preset:"),
         "inference.adapters[0].source.volumeSource (line 9)"),
        (("phi-3-mini-4k-instruct", "gemma-3-4b-instruct"), "inference.preset.name (line 9)"),
        (("  preset:\n    name: phi-3-mini-4k-instruct", "  template: {}"),
         "inference.template (line 8)"),
    ],
)  # fmt: skip
def test_errors_of_inference_have_the_lines_of_the_file(
    change: tuple[str, str], where: str, tmp_path: Path
) -> None:
    """Those of the spec, of the server, and of what the options do not allow."""
    file = tmp_path / "w.yaml"
    for lead, shift in (("", 0), ("# a comment\n\n", 2)):
        file.write_text(lead + SERVED.replace(*change))
        with pytest.raises(SpecError) as caught:
            render(file, Options(), namespace="team")
        number = int(where.rpartition("line ")[2].rstrip(")"))
        expected = where.replace(f"line {number}", f"line {number + shift}")
        assert any(expected in each.where for each in caught.value.problems), caught.value


def test_a_gated_base_without_a_secret_is_refused_as_check_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = tmp_path / "w.yaml"
    file.write_text(WORKSPACE.replace("phi-3-mini-4k-instruct", "llama-3.1-8b-instruct"))
    code, out, err = run(monkeypatch, capsys, "-f", str(file))

    assert (11, "") == (code, out)
    for words in ("is gated", "accept its licence at https://huggingface.co/", "modelAccessSecret"):
        assert words in err


@pytest.mark.parametrize("text", [None, "", "a: [", "- 1", "clusters: {}", "kind: Config"])
def test_the_operator_without_a_cluster_says_so(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A kubeconfig that is missing, empty or none; or no pod around it."""
    file = tmp_path / "config"
    if text is not None:
        file.write_text(text)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for arguments in (["--kubeconfig", str(file)], []):
        monkeypatch.setattr(sys, "argv", ["jobs", "run", *arguments])
        with pytest.raises(SystemExit) as end:
            entry.main()
        assert 11 == end.value.code
        assert "JOB-118" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named() -> None:
    """And one that is none."""
    with socket.create_server(("", 0)) as taken:
        for port in (taken.getsockname()[1], 70_000):
            with (
                pytest.raises(SpecError, match="JOB-119 --port"),
                probes.serving(
                    port, healthy=lambda: True, ready=lambda: True, metrics=probes.Metrics()
                ),
            ):
                pass


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_edit_of_a_file_makes_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    """Lines taken out, doubled, cut or replaced: objects, or a SpecError."""
    lines = data.draw(st.sampled_from([WORKSPACE, SERVED, WORKSPACE + "---\n" + CONFIG])).split(
        "\n"
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        key = lines[at].split(":")[0]
        words = [lines[at][:-3], "", f"  {lines[at]}", f"{key}: 5", f"{key}: {{a: [b]}}", f"{key}:"]
        lines[at] = data.draw(st.sampled_from(words))
    file = tmp_path / "w.yaml"
    file.write_text("\n".join(lines))
    try:
        assert render(file, Options(), namespace="team")
    except SpecError as error:
        assert error.problems


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_run_on_several_machines_is_shown_as_it_is_made(count: int, tmp_path: Path) -> None:
    """A request for each node, the Service before the Job, one Job; `resource.count` beyond what
    is supported, and what serves, are refused with the line."""
    file = tmp_path / "w.yaml"
    item = workspace("phi", "team")
    item["resource"]["count"] = count
    file.write_text(yaml.safe_dump(item, sort_keys=False))
    options = Options.model_validate({"nodes": {"provision": True}})
    objects = render(file, options, namespace="team")
    kinds = [each["kind"] for each in objects]
    assert (
        count == kinds.count("NodeClaim") == len({o["metadata"]["name"] for o in objects[:count]})
    )
    several = count > 1
    assert several == ("Service" in kinds) == ("PersistentVolumeClaim" not in kinds)
    assert ["Job"] == kinds[-1:] and 1 == kinds.count("Job")
    for wrong in (0, -1, 65, "two"):
        item["resource"]["count"] = wrong
        file.write_text(yaml.safe_dump(item, sort_keys=False))
        with pytest.raises(SpecError, match=r"resource\.count \(line 11\)"):
            render(file, options, namespace="team")
    if several:
        item["resource"]["count"] = count
        item["inference"] = {}
        file.write_text(yaml.safe_dump(item, sort_keys=False))
        with pytest.raises(SpecError, match=r"resource\.count.*a Workspace of its own"):
            render(file, options, namespace="team")
