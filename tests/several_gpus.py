"""Plans for several GPUs and machines: the file that asks for them, and the devices."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import tuning.plan as plan
from tuning import presets, spec
from tuning.plan.device import Device

GIB = 2**30
LLAMA, MIXTURE = "llama-3.3-70b-instruct", "gpt-oss-120b"
WORKSPACE = """apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {{name: large}}
resource: {{count: {count}, instanceType: {instance}}}
tuning:
  preset: {{name: {preset}, presetOptions: {{modelAccessSecret: hub}}}}
  method: {method}
  config: settings
  input: {{urls: ["https://h.example/d.jsonl"]}}
  output: {{image: "r.example/x:1", imagePushSecret: push}}
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: settings}}
data:
  training_config.yaml: |
    training_config:
      TrainingArguments: {{{arguments}}}{more}
"""


def workspace(
    preset: str,
    instance: str,
    *,
    method: str = "lora",
    count: int = 1,
    arguments: str = "",
    more: dict[str, dict[str, Any]] | None = None,
) -> spec.Spec:
    """The spec of a Workspace, read as a file is; `more`: keys of any section."""
    sections = dict(more or {})
    own = sections.pop("TrainingArguments", {})
    arguments = ", ".join(filter(None, [arguments, *(f"{k}: {v}" for k, v in own.items())]))
    lines = "".join(f"\n      {name}: {json.dumps(keys)}" for name, keys in sections.items())
    text = WORKSPACE.format(
        preset=preset,
        instance=instance,
        method=method,
        count=count,
        arguments=arguments,
        more=lines,
    )
    return spec.parse(text, origin="w.yaml")


def drafted(*what: str, here: Device | None = None, **options: Any) -> plan.Plan:
    """The draft for an instance type, or for the device `here`."""
    parsed = workspace(*what, **options)
    if here is not None:
        return plan.draft(replace(parsed, instance=None), here=replace(here, nodes=parsed.nodes))
    return plan.draft(parsed, here=plan.device_of(what[1]))


def cards(name: str, count: int, *, host_gib: int = 128) -> Device:
    """One machine with some cards of a kind."""
    gpu = presets.gpu(name)
    free, host = gpu.memory_bytes, host_gib << 30
    return Device("cuda", name, count, free, gpu.bf16, gpu.capability, gpu=gpu, host_bytes=host)


def on_cpu(ranks: int, gib: float) -> Device:
    """A machine without a GPU that is to run some processes."""
    return Device("cpu", "CPU", ranks, round(gib * GIB), bf16=True)
