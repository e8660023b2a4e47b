"""What Prometheus and Grafana are told to read is what the operator, Jobs and servers export."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import inference_workspaces
import pytest
import yaml
from cluster.world import workspace
from memory_cluster import Scene, ended, engine
from prometheus_client.parser import text_string_to_metric_families

from jobs.api.client import ApiError
from jobs.api.kinds import NODE_CLAIM, Object
from jobs.api.options import Options, Prometheus
from jobs.controller import probes
from jobs.controller.queue import Queue
from jobs.controller.reconcile import Result, reconcile
from jobs.desired import inference as desired_inference
from jobs.desired import tuning as desired_tuning
from jobs.manifests import job as job_manifests
from jobs.manifests import server as server_manifests
from jobs.observed.nodes import Nodes
from tuning.pipeline import progress_server
from tuning.serve.metrics import Metrics as ServerMetrics

FOLDER = Path(__file__).parents[2] / "configs/deploy/observability"
KEY = ("team", "phi")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
RECORD = {"step": 3, "steps": 12, "loss": 1.5, "tokens_per_second": 9.5, "eta_seconds": 60,
          "memory_bytes": 5 << 30}  # fmt: skip
# Of every target that the Prometheus operator finds.
TARGET_LABELS = {"namespace", "pod", "container", "endpoint", "job", "instance", "service"}


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


MONITORS = documents("monitors.yaml")
(RULES,) = documents("rules.yaml")
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
ALERTS = {rule["alert"]: rule for rule in RULES["spec"]["groups"][0]["rules"]}
PANELS = {p["title"]: p for p in DASHBOARD["panels"] if p["type"] != "row"}
QUERIES = [(name, rule["expr"]) for name, rule in ALERTS.items()]
QUERIES += [(name, each["expr"]) for name, panel in PANELS.items() for each in panel["targets"]]


def nodes(use: Any = "works", *, seconds: int = 0, count: int = 1) -> Nodes:
    launched = (NOW - timedelta(minutes=5),) * count
    return Nodes("Standard_NC24ads_A100_v4", use, launched, NOW + timedelta(seconds=seconds))


def ask(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def samples(text: str) -> dict[str, set[str]]:
    """Sample name -> names of its labels."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def operator_text() -> str:
    metrics = probes.Metrics()
    metrics.count(KEY, Result(state="Running", failure="DoesNotFit", nodes=nodes()))
    with probes.serving(0, healthy=lambda: True, ready=lambda: True, metrics=metrics) as port:
        return ask(port)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(RECORD) + "\n")
    (tmp_path / "plan.json").write_text(json.dumps({"memory": {"allocated": 6 << 30}}))
    return tmp_path


@pytest.fixture
def exported(run_folder: Path) -> dict[str, set[str]]:
    """Of the operator, a Job and a server, with the labels that the monitors add."""
    with progress_server.served(run_folder, name="phi", port=0) as port:
        job = samples(ask(port))
    server = ServerMetrics(running=lambda: 1, waiting=lambda: 0)
    server.tokens.labels("base", "prompt").inc()
    served = samples(server.text().decode())
    added = {
        each["targetLabel"]
        for monitor in MONITORS if monitor["kind"] == "PodMonitor"
        for each in monitor["spec"]["podMetricsEndpoints"][0]["relabelings"]
        if "targetLabel" in each
    }  # fmt: skip
    pods = {name: labels | added for name, labels in (job | served).items()}
    known = samples(operator_text()) | pods | {"up": set()}
    return {name: labels | TARGET_LABELS for name, labels in known.items()}


@dataclass
class Query:
    """Names in a PromQL expression: of metrics, each with its matchers' labels, and of groups."""

    metrics: list[tuple[str, set[str]]]
    groups: set[str]


def read(expression: str) -> Query:
    text = re.sub(r'"(\\.|[^"\\])*"', '""', expression)
    groups: set[str] = set()
    grouping = r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)"
    for _, inner in re.findall(grouping, text):
        groups |= {each.strip() for each in inner.split(",")}
    text = re.sub(r"\[[^]]*\]", "", re.sub(grouping, "", text))
    words = re.compile(r"(?<![\w:$])([a-zA-Z_:][\w:]*)\b(?!\s*\()(?:\{([^{}]*)\})?")
    keywords = {"and", "or", "unless", "offset", "bool"}
    metrics = [
        (name, set(re.findall(r"(\w+)\s*[=!]", matchers)))
        for name, matchers in words.findall(text)
        if name not in keywords
    ]
    return Query(metrics, groups)


def test_the_reader_of_expressions_finds_each_name() -> None:
    """Metrics, labels of matchers and of groups; no function, keyword, duration or number."""
    query = read(
        'sum by (a, b) (rate(x_total{c="1 {not} (this)", d!~"e"}[5m])) / on (f) y unless z offset'
        " 5m or 1e3 * histogram_quantile(0.9, q_bucket)"
    )
    assert [("x_total", {"c", "d"}), ("y", set()), ("z", set()), ("q_bucket", set())] == (
        query.metrics
    )
    assert {"a", "b", "f"} == query.groups


@pytest.mark.parametrize(("name", "expression"), QUERIES)
def test_each_metric_and_label_is_exported(
    name: str, expression: str, exported: dict[str, set[str]]
) -> None:
    """Of alerts and panels; a renamed metric would be an empty panel, and an alert that is mute."""
    query = read(expression)
    assert query.metrics, name
    for metric, labels in query.metrics:
        assert metric in exported, name
        assert labels <= exported[metric], name
        assert query.groups <= exported[metric], name


def test_texts_name_only_labels_that_are_left() -> None:
    """What an alert's words, or a legend, show of its series."""
    for name, rule in ALERTS.items():
        shown = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        query = read(rule["expr"])
        left = query.groups if query.groups else TARGET_LABELS | {"workspace"}
        assert shown <= left, name
    for panel in PANELS.values():
        for target in panel["targets"]:
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            query = read(target["expr"])
            assert shown <= (query.groups or TARGET_LABELS | {"workspace"}), panel["title"]


def test_the_dashboard_is_whole() -> None:
    """No two panels overlap or share an id; each variable that a query uses exists."""
    panels = DASHBOARD["panels"]
    assert len(panels) == len({panel["id"] for panel in panels})
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x, y in itertools.product(range(panel["gridPos"]["w"]), range(panel["gridPos"]["h"]))
    ]
    assert len(cells) == len(set(cells)) and all(x < 24 for x, _ in cells)
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]+)", json.dumps(panels)))
    assert used <= variables


def test_monitors_select_the_pods_and_ports_that_are_made() -> None:
    """Labels and port names of the Job's and the server's pods, and of the operator's."""
    item = workspace("phi", "team")
    item["metadata"] |= {"uid": "1-2", "generation": 1}
    tuned = desired_tuning.read(item, None, None)
    job = job_manifests.job(item, tuned, Options(), claim=False, earlier=())
    served = inference_workspaces.workspace()
    desired = desired_inference.read(served, None, None)
    server = server_manifests.deployment(served, desired, Options(), claim=False)
    base = FOLDER.parent / "base"
    operator = yaml.safe_load((base / "deployment.yaml").read_text())
    by_name = {each["metadata"]["name"]: each for each in MONITORS if each["kind"] != "Service"}
    service, *_ = MONITORS
    for name, owner in (("tuning-jobs", job), ("tuning-servers", server)):
        spec, template = by_name[name]["spec"], owner["spec"]["template"]
        (endpoint,) = spec["podMetricsEndpoints"]
        assert spec["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        ports = [each["name"] for each in template["spec"]["containers"][0]["ports"]]
        assert endpoint["port"] in ports
        assert "kaito.sh/workspace" in template["metadata"]["labels"]
    template = operator["spec"]["template"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    (port,) = service["spec"]["ports"]
    assert port["targetPort"] == template["spec"]["containers"][0]["ports"][0]["name"]
    wanted = by_name["tuning-operator"]["spec"]
    assert wanted["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert wanted["endpoints"][0]["port"] == port["name"]


@pytest.mark.parametrize("labels", [None, {"app": "vmagent"}])
def test_only_a_named_prometheus_is_let_in(labels: dict[str, str] | None) -> None:
    """By namespace and labels, to the same ports; without the option policies are as before."""
    named = {"namespace": "monitoring"} | ({"podLabels": labels} if labels else {})
    opened = Options(prometheus=Prometheus.model_validate(named))
    item = workspace("phi", "team")
    item["metadata"] |= {"uid": "1-2", "generation": 1}
    tuned = desired_tuning.read(item, None, None)
    served = inference_workspaces.workspace()
    server = desired_inference.read(served, None, None)
    peer = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
        "podSelector": {"matchLabels": labels or {"app.kubernetes.io/name": "prometheus"}},
    }
    for made, of, desired in (
        (job_manifests.network_policy, item, tuned),
        (job_manifests.server_policy, served, server),
    ):
        closed, found = made(of, desired, Options()), made(of, desired, opened)
        assert peer == found["spec"]["ingress"][0]["from"].pop()
        assert closed == found
        assert "tuning-operator" in json.dumps(closed["spec"]["ingress"][0]["from"][-1])


def test_no_option_lets_all_pods_of_a_namespace_in() -> None:
    """Empty labels would select every pod."""
    with pytest.raises(ValueError, match="podLabels"):
        Prometheus.model_validate({"namespace": "x", "podLabels": {}})


# what the operator counts


def value(metrics: probes.Metrics, name: str, **labels: str) -> float | None:
    found: float | None = metrics.registry.get_sample_value(name, labels)
    return found


def test_the_time_of_nodes_is_counted_once() -> None:
    """From the first reconcile that this replica made on; of each node; until it is given back."""
    metrics, total = probes.Metrics(), "tuning_operator_node_seconds_total"
    kind = {"instance_type": "Standard_NC24ads_A100_v4"}
    metrics.count(KEY, Result(state="Running", nodes=nodes(count=2)))
    assert 0 == value(metrics, total, **kind)
    metrics.count(KEY, Result(state="Running", nodes=nodes(seconds=30, count=2)))
    metrics.count(KEY, Result(state="Running", nodes=nodes(seconds=30, count=2)))  # replayed
    assert 60 == value(metrics, total, **kind)
    metrics.count(KEY, Result(state="Running", nodes=nodes("waits", seconds=40)))
    assert 70 == value(metrics, total, **kind)
    gauge = {"namespace": "team", "workspace": "phi", **kind}
    assert 1 == value(metrics, "tuning_operator_nodes", **gauge, use="waits")
    assert value(metrics, "tuning_operator_nodes", **gauge, use="works") is None
    metrics.count(KEY, Result(state="Succeeded"))
    assert value(metrics, "tuning_operator_nodes", **gauge, use="waits") is None
    metrics.count(KEY, Result(state="Succeeded", nodes=nodes("kept", seconds=100)))
    metrics.reset()
    assert "tuning_operator_nodes{" not in operator_of(metrics)


def operator_of(metrics: probes.Metrics) -> str:
    with probes.serving(0, healthy=lambda: True, ready=lambda: True, metrics=metrics) as port:
        return ask(port)


def test_a_pod_cannot_invent_series() -> None:
    """A termination message is a tenant's: its reason counts if the table of exit codes has it."""
    assert "DataUnusable" == probes.known_reason("DataUnusable", 10)
    assert "OutOfMemory" == probes.known_reason("OutOfMemory", 137)
    assert "DataUnusable" == probes.known_reason("Invented17", 10)
    assert "Killed" == probes.known_reason("Invented17", 77)
    assert "DoesNotFit" == probes.known_reason("DoesNotFit", None)


class Counted(Scene):
    """A scene whose reconciles are counted."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self._metrics = probes.Metrics()

    def look(self, seconds: float = 0) -> Object:
        self.api.now += timedelta(seconds=seconds)
        with contextlib.suppress(ApiError):  # the workqueue tries again
            self._metrics.count(KEY, reconcile(self.context, *KEY))
        return self.status

    def total(self, name: str, **labels: str) -> float:
        return value(self._metrics, name, **labels) or 0.0


def test_a_life_is_counted() -> None:
    """A node that waits, works and is given back, and one failure however often it is looked at."""
    scene = Counted().with_node()
    where = {"namespace": "team", "workspace": "phi",
             "instance_type": "Standard_NC24ads_A100_v4"}  # fmt: skip
    assert 1 == scene.total("tuning_operator_nodes", **where, use="waits")
    pod = scene.pod(phase="Running", **engine({"running": {}}))
    for _ in range(4):
        scene.look(15)
    assert 1 == scene.total("tuning_operator_nodes", **where, use="works")
    assert 0 == scene.total("tuning_operator_nodes", **where, use="waits")
    assert 1 == scene.total("tuning_operator_workspaces", state="Running")
    kind = where["instance_type"]
    assert 60 <= scene.total("tuning_operator_node_seconds_total", instance_type=kind) <= 64
    pod["status"] |= {"phase": "Failed"} | engine(ended(10, '{"reason": "DataUnusable"}'))
    scene.ends_job("Failed")
    for _ in range(4):
        scene.look(15)
    assert [] == scene.owned(NODE_CLAIM)
    assert 0 == scene.total("tuning_operator_nodes", **where, use="waits")
    assert 1 == scene.total("tuning_operator_workspace_failures_total", reason="DataUnusable")
    assert 1 == scene.total("tuning_operator_workspaces", state="Failed")


def test_a_spec_that_stays_wrong_fails_once_an_edit() -> None:
    """It is looked at every half minute; each edit that fails counts."""
    scene = Counted()
    item = scene.api.stored["workspaces", "phi"]
    item["tuning"]["input"] = {"urls": ["ftp://x"]}
    for _ in range(3):
        scene.look(30)
    name = "tuning_operator_workspace_failures_total"
    assert 1 == scene.total(name, reason="SpecInvalid")
    item["metadata"]["generation"] += 1
    for _ in range(3):
        scene.look(30)
    assert 2 == scene.total(name, reason="SpecInvalid")


def test_the_wait_in_the_queue_is_measured() -> None:
    """From when a key is due, or was added as first, also while it was busy."""
    now, waits = [100.0], list[float]()
    queue: Queue[str] = Queue(clock=lambda: now[0], on_wait=waits.append)
    queue.add("a", after=5)
    now[0] = 107.0
    assert "a" == queue.take()
    queue.add("a", first=True)
    now[0] = 110.0
    queue.done("a")
    now[0] = 111.0
    assert "a" == queue.take()
    assert [2.0, 4.0] == waits


def test_a_plan_is_beside_what_was_measured(run_folder: Path) -> None:
    """Of a damaged or missing plan nothing is said."""
    with progress_server.served(run_folder, name="phi", port=0) as port:
        assert f"tuning_planned_memory_bytes {6 << 30}" in ask(port)
        for text in ("{", "{}", '{"memory": null}'):
            (run_folder / "plan.json").write_text(text)
            text = ask(port)
            assert "planned_memory" not in text and "tuning_step 3" in text


# Prometheus itself

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="NOT TRIED: rules with promtool, a scrape by Prometheus (apt-get install prometheus)",
)
TRIALS = {
    "interval": "1m",
    "input_series": [
        {"series": 'tuning_step{namespace="t", workspace="stuck", pod="p"}', "values": "5x60"},
        {"series": 'tuning_steps{namespace="t", workspace="stuck", pod="p"}', "values": "9x60"},
        {"series": 'tuning_step{namespace="t", workspace="runs", pod="q"}', "values": "0+1x60"},
        {"series": 'tuning_steps{namespace="t", workspace="runs", pod="q"}', "values": "90x60"},
        {"series": 'tuning_step{namespace="t", workspace="done", pod="r"}', "values": "9x60"},
        {"series": 'tuning_steps{namespace="t", workspace="done", pod="r"}', "values": "9x60"},
        {"series": 'tuning_operator_workspace_failures_total{reason="New", pod="o"}',
         "values": "_x40 1x20"},
        {"series": 'tuning_operator_workspace_failures_total{reason="Old", pod="o"}',
         "values": "3x60"},
        {"series": 'tuning_operator_workspace_failures_total{reason="Again", pod="o"}',
         "values": "3x40 4x20"},
        {"series": 'up{job="tuning-operator", pod="o"}', "values": "1x45 0x20"},
    ],
}  # fmt: skip


def fires(alert: str, minute: int) -> list[dict[str, Any]]:
    """The rule test of `promtool` that asks which series of an alert fire: none are expected."""
    return [{"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": []}]


def firing(tmp_path: Path, alert: str, minute: int) -> str:
    """What promtool says about an alert for which no series was expected."""
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES["spec"]))
    trial = TRIALS | {"alert_rule_test": fires(alert, minute)}
    text = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [trial]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(text))
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert ("SUCCESS" in said) == (done.returncode == 0), said
    return "" if done.returncode == 0 else said.partition("got:")[2]


@needs_prometheus
@pytest.mark.parametrize(
    ("alert", "minute", "words", "silent"),
    [
        ("TuningStalled", 29, [], ["stuck", "runs", "done"]),
        ("TuningStalled", 35, ["t/stuck has made no step", "at step 5"], ["runs", "done"]),
        ("TuningWorkspaceFailed", 30, [], ["New", "Old", "Again"]),
        ("TuningWorkspaceFailed", 42, ["failed: New", "failed: Again"], ["Old"]),
        ("TuningWorkspaceFailed", 58, [], ["New", "Old", "Again"]),
        ("TuningOperatorDown", 44, [], ["answers"]),
        ("TuningOperatorDown", 55, ["No replica of the tuning operator answers"], []),
    ],
)
def test_alerts_fire_when_they_should(
    alert: str, minute: int, words: list[str], silent: list[str], tmp_path: Path
) -> None:
    """A run that stands still, and no other; a failure once, also the first of its reason."""
    said = firing(tmp_path, alert, minute)
    assert all(word in said for word in words), said
    assert not any(word in said for word in silent), said


@needs_prometheus
def test_every_expression_is_promql(tmp_path: Path) -> None:
    """Rules and panels, as promtool parses them."""
    panels = [
        {"record": f"panel:{i}", "expr": re.sub(r"\$__\w+", "5m", expression)}
        for i, (_, expression) in enumerate(QUERIES)
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES["spec"]))
    (tmp_path / "panels.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "panels", "rules": panels}]})
    )
    subprocess.run(
        ["promtool", "check", "rules", tmp_path / "rules.yaml", tmp_path / "panels.yaml"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip


@pytest.fixture
def prometheus(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a Prometheus that scrapes the operator's server and a run's."""
    home = tmp_path_factory.mktemp("prometheus")
    metrics = probes.Metrics()
    metrics.count(KEY, Result(state="Running", nodes=nodes()))
    with (
        progress_server.served(run_folder, name="phi", port=0) as job,
        probes.serving(0, healthy=lambda: True, ready=lambda: True, metrics=metrics) as operator,
        socket.create_server(("127.0.0.1", 0)) as free,
    ):
        port = free.getsockname()[1]
        free.close()
        config = {
            "scrape_configs": [
                {"job_name": name, "scrape_interval": "1s", "scrape_timeout": "1s",
                 "static_configs": [{"targets": [f"127.0.0.1:{each}"]}]}
                for name, each in (("tuning-jobs", job), ("tuning-operator", operator))
            ]
        }  # fmt: skip
        (home / "prometheus.yml").write_text(yaml.safe_dump(config))
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                ["prometheus", f"--web.listen-address=127.0.0.1:{port}",
                 f"--config.file={home / 'prometheus.yml'}", f"--storage.tsdb.path={home / 'db'}"],
                stdout=log, stderr=log,
            )  # fmt: skip
        try:
            yield port
        finally:
            process.kill()
            process.wait()


@needs_prometheus
def test_prometheus_reads_a_run_and_the_operator(prometheus: int) -> None:
    """Format, content type and Host are what the real one takes."""

    def query(expression: str) -> list[Any]:
        url = f"http://127.0.0.1:{prometheus}/api/v1/query?query={expression}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                found: list[Any] = json.load(answer)["data"]["result"]
        except OSError:
            return []
        return found

    until = time.monotonic() + 60
    while len(query("up==1")) < 2:
        assert time.monotonic() < until
        time.sleep(0.2)
    (loss,) = query("tuning_loss")
    assert "1.5" == loss["value"][1] and "tuning-jobs" == loss["metric"]["job"]
    (planned,) = query("tuning_planned_memory_bytes-tuning_memory_bytes")
    assert str(1 << 30) == planned["value"][1]
    (held,) = query("tuning_operator_nodes")
    assert "works" == held["metric"]["use"]


def test_the_dashboard_is_found_by_grafana() -> None:
    """`kubectl kustomize` makes a ConfigMap of it, with the label that the sidecar looks for."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed: the kustomization is not rendered here")
    done = subprocess.run(
        ["kubectl", "kustomize", FOLDER], capture_output=True, check=True, timeout=60
    )
    found = {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}
    assert {"ConfigMap", "Service", "ServiceMonitor", "PodMonitor", "PrometheusRule"} == set(found)
    assert "1" == found["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"]
    assert DASHBOARD == json.loads(found["ConfigMap"]["data"]["tuning.json"])
