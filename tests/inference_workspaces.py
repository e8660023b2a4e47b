"""Workspaces with `inference`, and the command that serves them."""

from __future__ import annotations

from typing import Any

from jobs.api.kinds import Object
from jobs.api.options import Options
from jobs.desired import inference as desired_inference
from jobs.manifests import server as server_manifests


def adapter(name: str, strength: str | None = None, **source: Any) -> Object:
    given = source or {"image": f"registry.example.com/{name}:1"}
    return {"source": {"name": name, **given}} | ({"strength": strength} if strength else {})


def workspace(*, annotations: dict[str, str] | None = None, **inference: Any) -> Object:
    meta = {"name": "wk", "namespace": "team", "uid": "1-2", "generation": 1}
    return {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": meta | ({"annotations": annotations} if annotations else {}),
        "resource": {
            "instanceType": "Standard_NC24ads_A100_v4",
            "labelSelector": {"matchLabels": {"apps": "wk"}},
        },
        "inference": {"preset": {"name": "phi-3-mini-4k-instruct"}} | inference,
    }


def command(item: Object, options: Options | None = None) -> list[str]:
    desired = desired_inference.read(item, None, None)
    assert desired.server is not None, desired.problems
    found = server_manifests.deployment(item, desired, options or Options(), claim=False)
    result: list[str] = found["spec"]["template"]["spec"]["containers"][0]["command"]
    return result
