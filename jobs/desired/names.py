"""Names, labels and owner references of a Workspace's objects. Pure."""

from __future__ import annotations

import re

from jobs.api.kinds import WORKSPACE, Kind, Object
from jobs.api.options import Options
from jobs.desired import tuning
from jobs.desired.tuning import Desired, identity, short_name
from tuning import __version__
from tuning.spec.workspace import ANNOTATION, RESERVED_LABELS

WORKSPACE_LABEL = "kaito.sh/workspace"
NAMESPACE_LABEL = "kaito.sh/workspacenamespace"
REVISION_LABEL = f"{ANNOTATION}revision"
CONFIG_ANNOTATION = f"{ANNOTATION}config"
UID_LABEL = f"{ANNOTATION}workspace-uid"
FINALIZER = "workspace.finalizer.kaito.sh"
ZONE = "topology.kubernetes.io/zone"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", re.A)


def is_object_name(name: object) -> bool:
    """Whether `name` is a valid object name (a DNS subdomain)."""
    return isinstance(name, str) and len(name) <= 253 and _NAME.fullmatch(name) is not None


def job_name(workspace: Object, desired: Desired) -> str:
    """Name of the Job, unique to Workspace and revision, so that there are never two Jobs."""
    return tuning.job_name(workspace, desired.revision)


def claim_name(workspace: Object) -> str:
    """Name of the claim of the run directory."""
    return short_name(workspace, f"{identity(workspace)}-run")


def labels(
    workspace: Object, revision: str | None = None, *, component: str = "job"
) -> dict[str, str]:
    """Labels of everything that belongs to `workspace`."""
    name = workspace["metadata"]["name"]
    common = {
        "app.kubernetes.io/name": "tuning",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": "tuning",
        "app.kubernetes.io/managed-by": "tuning-operator",
        "app.kubernetes.io/version": __version__,
        WORKSPACE_LABEL: name,
    }
    return common | ({REVISION_LABEL: revision} if revision else {})


def owned_object(
    workspace: Object,
    kind: Kind,
    name: str,
    spec: Object,
    *,
    revision: str | None = None,
    component: str = "job",
) -> Object:
    """An object in the Workspace's namespace that is deleted with it."""
    return {
        "apiVersion": kind.api_version,
        "kind": kind.name,
        "metadata": {
            "name": name,
            "namespace": workspace["metadata"]["namespace"],
            "labels": labels(workspace, revision, component=component),
            "ownerReferences": owner_references(workspace),
        },
        "spec": spec,
    }


def owner_references(workspace: Object) -> list[Object]:
    """Owner references to `workspace`: the garbage collector deletes what carries them with it."""
    meta = workspace["metadata"]
    return [
        {
            "apiVersion": WORKSPACE.api_version,
            "kind": WORKSPACE.name,
            "name": meta["name"],
            "uid": meta["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]


def is_owned_by(item: Object, uid: str) -> bool:
    """Whether `item` has the object with this UID as an owner; its name alone proves nothing."""
    return any(each["uid"] == uid for each in item["metadata"].get("ownerReferences") or [])


def is_controlled_by(pod: Object, uid: str) -> bool:
    """Whether the object with this UID is the controller of `pod`, which has one at most: a label
    or another owner reference is what anybody can write who may create pods."""
    owners = pod["metadata"].get("ownerReferences") or []
    return any(each["uid"] == uid for each in owners if each.get("controller"))


def annotation(workspace: Object, name: str) -> str | None:
    """The value of the annotation `tuning.kaito.sh/<name>`."""
    annotations: dict[str, str] = workspace["metadata"].get("annotations") or {}
    return annotations.get(ANNOTATION + name)


def provisions_node(desired: Desired, options: Options) -> bool:
    """Whether a node is provisioned for this Workspace."""
    return options.nodes.provision and desired.instance is not None


def node_selector(workspace: Object) -> dict[str, str]:
    """The labels that a node must carry, from resource.labelSelector."""
    selector = (workspace.get("resource") or {}).get("labelSelector") or {}
    required = dict(selector.get("matchLabels") or {})
    for each in selector.get("matchExpressions") or []:
        if each.get("operator") == "In" and len(each.get("values") or []) == 1:
            required[each["key"]] = each["values"][0]
    return {k: v for k, v in required.items() if not k.startswith(RESERVED_LABELS)}


def server_labels(workspace: Object) -> dict[str, str]:
    """Labels that select the inference server's pods."""
    name = workspace["metadata"]["name"]
    return {WORKSPACE_LABEL: name, "app.kubernetes.io/component": "server"}


def revision_of(item: Object) -> str:
    """The revision that a Job or Deployment was created for."""
    return str((item["metadata"].get("labels") or {}).get(REVISION_LABEL, ""))
