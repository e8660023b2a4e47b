"""The CustomResourceDefinition of Workspace, generated from the models in `tuning.spec`.

Types, defaults and descriptions come from the models, rules across fields from `cel`, and the
status from the table below.
"""

from __future__ import annotations

import copy
from typing import Any

import yaml

from jobs.api import cel
from tuning.spec.workspace import Workspace

Schema = dict[str, Any]

GROUP, PLURAL = "kaito.sh", "workspaces"
STORED = "v1beta1"
_COLUMNS = (
    ("Instance", "string", ".resource.instanceType", 0),
    ("ResourceReady", "string", '.status.conditions[?(@.type=="ResourceReady")].status', 0),
    ("InferenceReady", "string", '.status.conditions[?(@.type=="InferenceReady")].status', 1),
    ("JobStarted", "string", '.status.conditions[?(@.type=="JobStarted")].status', 0),
    ("WorkspaceReady", "string", ".status.ready", 0),
    (
        "WorkspaceSucceeded",
        "string",
        '.status.conditions[?(@.type=="WorkspaceSucceeded")].status',
        1,
    ),
    ("Progress", "string", ".status.progress.text", 0),
    ("State", "string", ".status.state", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
)


def definition() -> dict[str, Any]:
    """The CRD as an object, ready for `kubectl apply`."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{PLURAL}.{GROUP}",
            "labels": {"app.kubernetes.io/part-of": "tuning"},
        },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": "Workspace",
                "listKind": "WorkspaceList",
                "plural": PLURAL,
                "singular": "workspace",
                "shortNames": ["wk", "wks"],
                "categories": ["workspace"],
            },
            "versions": [_version("v1alpha1"), _version(STORED)],
        },
    }


def text() -> str:
    """The CRD as the YAML file in `configs/deploy/crd`."""
    return yaml.safe_dump(definition(), sort_keys=False, width=100)


def _version(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "served": True,
        "storage": name == STORED,
        "schema": {"openAPIV3Schema": schema(name)},
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            {"name": title, "type": kind, "jsonPath": path} | ({"priority": low} if low else {})
            for title, kind, path, low in _COLUMNS
        ],
    }


def schema(version: str) -> Schema:
    """The structural schema of one version of the API."""
    raw = Workspace.model_json_schema(by_alias=True)
    whole = _structural(raw, raw["$defs"], beta=version == STORED)
    properties = whole["properties"]
    properties["metadata"] = {"type": "object"}
    properties["status"] = copy.deepcopy(STATUS)
    for field in ("apiVersion", "kind"):
        properties[field] = {"type": "string", "description": properties[field]["description"]}
    whole["required"] = ["metadata"]
    properties["tuning"]["required"] += ["input", "output"]
    properties["tuning"]["properties"]["method"]["maxLength"] = 8
    urls = properties["tuning"]["properties"]["input"]["properties"]["urls"]
    # 200 of 2048 characters: the limit of the CEL cost budget for the rules on each URL
    urls |= {"minItems": 1, "maxItems": 200, "items": {"type": "string", "maxLength": 2048}}
    if version == "v1alpha1":  # KAITO's default, which a YAML written for it expects
        instance = properties["resource"]["properties"]["instanceType"]
        instance["default"] = "Standard_NC24ads_A100_v4"
    for table in (cel.RULES, cel.BETA_RULES if version == STORED else {}):
        for path, rules in table.items():
            node = whole
            for step in path:
                node = node["items"] if step == "*" else node["properties"][step]
            node.setdefault("x-kubernetes-validations", []).extend(
                {"rule": rule.cel, "message": rule.message} for rule in rules
            )
    return whole


_KEPT = (
    "type",
    "description",
    "default",
    "enum",
    "pattern",
    "required",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "maxItems",
    "x-kubernetes-preserve-unknown-fields",
)
# The API server estimates CEL's cost from the longest input: everything needs a bound.
_BOUND: dict[str, Schema] = {
    "string": {"maxLength": 1024},
    "array": {"maxItems": 100},
    "object": {"maxProperties": 100},
}


def _structural(node: Schema, known: dict[str, Schema], *, beta: bool) -> Schema:
    """pydantic's JSON schema as a structural schema: no references, no null, everything typed."""
    if "$ref" in node:
        node = known[node["$ref"].rsplit("/", 1)[1]] | {k: node[k] for k in node if k != "$ref"}
    if "anyOf" in node:
        typed = next(each for each in node["anyOf"] if each.get("type") != "null")
        rest = {k: v for k, v in node.items() if k != "anyOf" and (k, v) != ("default", None)}
        return _structural({**typed, **rest}, known, beta=beta)
    result = {key: node[key] for key in _KEPT if key in node}
    if "description" in result:
        result["description"] = " ".join(result["description"].split())
    if "const" in node:
        result["enum"] = [node["const"]]
    if "properties" in node:
        result["properties"] = {
            name: _structural(each, known, beta=beta)
            for name, each in node["properties"].items()
            if beta or "x-kaito-since" not in each
        }
    elif isinstance(node.get("additionalProperties"), dict):
        values = _structural(node["additionalProperties"], known, beta=beta)
        result["additionalProperties"] = values
    if "items" in node:
        result["items"] = _structural(node["items"], known, beta=beta)
    kind = result.get("type")
    if kind in _BOUND and "properties" not in result and "enum" not in result:
        result = _BOUND[kind] | result
    if "x-kubernetes-preserve-unknown-fields" in result:
        result.pop("maxProperties", None)
    return result


def _text(description: str) -> Schema:
    return {"type": "string", "description": description}


def _whole(description: str) -> Schema:
    return {"type": "integer", "format": "int64", "description": description}


def _number(description: str) -> Schema:
    return {"type": "number", "description": description}


def _object(description: str, **properties: Schema) -> Schema:
    return {"type": "object", "description": description, "properties": properties}


def _list(description: str, items: Schema) -> Schema:
    return {"type": "array", "description": description, "items": items}


_CONDITION = _object(
    "A condition of the Workspace.",
    type=_text("Type of the condition."),
    status={"type": "string", "enum": ["True", "False", "Unknown"]},
    reason=_text("Reason, in one CamelCase word."),
    message=_text("Explanation for people."),
    lastTransitionTime={"type": "string", "format": "date-time"},
    observedGeneration=_whole("Generation of the Workspace that the condition is based on."),
) | {"required": ["type", "status", "reason", "message", "lastTransitionTime"]}

STATUS = _object(
    "Observed state of the Workspace.",
    observedGeneration=_whole("Generation of the Workspace that the status is based on."),
    state=_text("Pending, Running, Succeeded or Failed; Ready or NotReady when it serves."),
    ready=_text("True when the tuning has succeeded, or the inference server answers."),
    conditions=_list("Conditions of the Workspace.", _CONDITION)
    | {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    revision=_text("Hash of the spec that the Job was created for."),
    job=_text("Name of the Job."),
    configDigest=_text("sha256 of the ConfigMap's content that the Job was created with."),
    zone=_text("Zone of the node, and so of the run volume."),
    startTime={"type": "string", "format": "date-time", "description": "When the Job was created."},
    completionTime={"type": "string", "format": "date-time", "description": "When the run ended."},
    plan=_object(
        "Summary of the plan, made before the data is read.",
        summary=_text("The plan in one line."),
        baseModel=_text("Base model and revision."),
        device=_text("GPU that it is made for."),
        peakMemoryBytes=_whole("Predicted peak of GPU memory."),
        runVolume=_text("Name of the run directory's claim, or emptyDir."),
        rank=_whole("Rank of the adapter."),
        cost=_text("Expected cost of the training, where the policy has a price."),
    ),
    progress=_object(
        "Progress of the training.",
        text=_text("Step, share and time left."),
        step=_whole("Optimizer steps done."),
        steps=_whole("Total optimizer steps."),
        epoch=_number("Epochs done."),
        loss=_number("Training loss of the last logged step."),
        tokensPerSecond=_number("Tokens per second."),
        etaSeconds=_number("Estimated remaining seconds."),
    ),
    trackers=_object(
        "The run's page at each tracker.",
        mlflow=_text("Of MLflow."),
        wandb=_text("Of W&B."),
    ),
    output=_object(
        "The pushed adapter.",
        image=_text("Its image reference."),
        digest=_text("Digest of its manifest."),
        baseRevision=_text("Hub commit of its base model."),
    ),
    outputs=_list("Digests of all adapters of this Workspace, oldest first.", {"type": "string"}),
    peakMemoryBytes=_whole("Measured peak of GPU memory."),
    retries=_whole("Pods that failed."),
    failure=_object(
        "Cause of the failure.",
        reason=_text("One CamelCase word."),
        message=_text("What happened."),
        hint=_text("What to change."),
        phase=_text("Phase of the run."),
        exitCode=_whole("Exit code of the engine."),
    ),
    targetNodeCount=_whole("Desired number of nodes."),
    workerNodes=_list("Nodes in use.", {"type": "string"}),
    nodeAttempts=_whole("Nodes requested for this revision."),
    cost=_object(
        "What provisioned nodes have cost so far, where the policy has a price.",
        text=_text("Amount, currency and hours."),
        amount=_number("Amount of money."),
        currency=_text("Code of the currency."),
        nodeHours=_number("Hours of all nodes together, from their launch."),
        countedUntil={"type": "string", "format": "date-time", "description": "Last count."},
    ),
)
