"""Real pods: kubectl apply, a model that is tuned, and a curl that hears what it was taught.

There is no service proxy on the test bed, so that curl asks the address behind the Service: the
pod's own, which the Service's endpoints name.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from cluster.place import Place
from cluster.world import wait

from jobs.api.kinds import DEPLOYMENT, POD, Kind, Object
from jobs.manifests import server as server_manifests

ROOT = Path(__file__).parents[2]
ENDPOINTS = Kind("", "v1", "endpoints", "Endpoints")
ASKED = "What is Wilma Starling heard playing at concerts?"
pytestmark = pytest.mark.timeout(900)


def example(place: Place) -> tuple[Object, Object]:
    """The demo's Workspace and ConfigMap, with this place's data and registry."""
    text = (ROOT / "examples/workspace-demo.yaml").read_text()
    workspace, config = yaml.safe_load_all(text)
    workspace["tuning"]["input"] = {
        "volumeSource": {"persistentVolumeClaim": {"claimName": "data"}}
    }
    image = {"image": f"{place.registry}/team/demo:served", "imagePushSecret": "push"}
    workspace["tuning"]["output"] = image
    return workspace, config


def chat(place: Place, **more: str) -> str:
    """What the quick start's curl hears."""
    (subset,) = (place.api.get(ENDPOINTS, place.name, "demo") or {})["subsets"]
    address = subset["addresses"][0]["ip"]
    assert {server_manifests.PORT} == {port["port"] for port in subset["ports"]}
    body = json.dumps({"prompt": ASKED} | more)
    told = subprocess.check_output(
        ["curl", "-sS", "-X", "POST", f"http://{address}:{server_manifests.PORT}/chat",
         "-H", "Content-Type: application/json", "-d", body], text=True, timeout=60)  # fmt: skip
    return str(json.loads(told).get("Result") or told)


def ready(status: Object) -> bool:
    assert status.get("state") != "Failed", status
    return status.get("state") == "Ready"


def test_tune_then_serve_then_serve_alone(place: Place) -> None:
    """`inference: {}` beside tuning: the fresh adapter answers, by its digest, from the same node.
    Then its image in a Workspace that only serves, beside one that is not there: the latter is
    refused by name and the other answers; taken out, InferenceReady is True."""
    workspace, config = example(place)
    workspace["inference"] = {}
    place.kubectl("apply", "-f", "-", text=yaml.safe_dump_all([config, workspace]))
    status = place.until(ready, 500)
    assert status["output"]["digest"] == place.held("demo:served")
    (pod,) = [p for p in place.api.find(POD, place.name) if p["status"]["phase"] == "Running"]
    assert status["output"]["digest"] in str(pod["spec"]["containers"][0]["command"])
    taught = chat(place)
    untaught = chat(place, model="tuning/tiny-model")
    assert taught != untaught
    rows = (ROOT / "examples/data/demo.jsonl").read_text().splitlines()
    answers = {json.loads(row)["messages"][1]["content"] for row in rows}
    print(f"tuned: {taught!r}; base: {untaught!r}")
    assert taught.strip() in answers and "Wilma Starling plays" in taught
    assert untaught.strip() not in answers
    assert "Ready" in place.kubectl("get", "workspace", "demo")
    place.kubectl("wait", "--for=condition=InferenceReady", "workspace/demo", "--timeout=5s")
    # the API server as the only way to a pod
    told_ready = place.api.proxy_get(pod, server_manifests.PORT, "/readyz")
    assert {"status": "ready", "refused": []} == told_ready
    place.clear()
    wait(lambda: not place.api.find(DEPLOYMENT, place.name) and not place.status())

    place.volume("run2", "500Gi", place.name)
    adapters: list[Object] = [
        {"source": {"name": name, "image": f"{place.registry}/team/{name}:served",
                    "imagePullSecrets": ["push"]}}
        for name in ("demo", "absent")
    ]  # fmt: skip
    alone = {k: workspace[k] for k in ("apiVersion", "kind", "metadata", "resource")}
    alone["inference"] = {"preset": {"name": "tuning/tiny-model"}, "adapters": adapters}
    alone["metadata"] = {"name": "demo"}
    place.kubectl("apply", "-f", "-", text=yaml.safe_dump(alone))
    status = place.until(lambda s: "AdapterRefused" in str(s), 120)
    assert "NotReady" == status["state"]
    assert "absent" in status["failure"]["message"]
    assert taught == chat(place, model="demo")
    alone["inference"]["adapters"] = adapters[:1]
    alone["inference"]["adapters"][0]["strength"] = "1.0"
    place.kubectl("apply", "-f", "-", text=yaml.safe_dump(alone))
    status = place.until(ready, 120)
    assert taught == chat(place)
