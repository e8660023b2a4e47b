"""Names, labels and owners: how the objects of a Workspace are known. Pure."""

from __future__ import annotations

import re

from jobs.api.client import WORKSPACE, Object
from jobs.api.options import Options
from jobs.desired.tuning import QUEUE, Wanted, identity, short_name
from tuning import __version__
from tuning.spec.workspace import ANNOTATION

WORKSPACE_LABEL = "kaito.sh/workspace"
NAMESPACE_LABEL = "kaito.sh/workspacenamespace"
REVISION_LABEL = f"{ANNOTATION}revision"
CONFIG_ANNOTATION = f"{ANNOTATION}config"
UID_LABEL = f"{ANNOTATION}workspace-uid"
FINALIZER = "workspace.finalizer.kaito.sh"
ZONE = "topology.kubernetes.io/zone"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", re.A)
# Kept out of the fields that a Workspace selects nodes by, as in KAITO.
_RESERVED = ("kaito.sh/", "karpenter.kaito.sh/")


def possible(name: object) -> bool:
    """Whether an object can be called so (a DNS subdomain)."""
    return isinstance(name, str) and len(name) <= 253 and _NAME.fullmatch(name) is not None


def job_name(workspace: Object, wanted: Wanted) -> str:
    """The same name for the same Workspace and revision, whoever asks: never two Jobs."""
    return short_name(workspace, wanted.revision)


def claim_name(workspace: Object) -> str:
    """Name of the claim of the run directory."""
    return short_name(workspace, f"{identity(workspace)}-run")


def labels(
    workspace: Object, revision: str | None = None, *, component: str = "job"
) -> dict[str, str]:
    """Labels of everything that belongs to `workspace`."""
    name = workspace["metadata"]["name"]
    found = {
        "app.kubernetes.io/name": "tuning",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": "tuning",
        "app.kubernetes.io/managed-by": "tuning-operator",
        "app.kubernetes.io/version": __version__,
        WORKSPACE_LABEL: name,
    }
    return found | ({REVISION_LABEL: revision} if revision else {})


def owner(workspace: Object) -> list[Object]:
    """Owner references: when `workspace` goes, so does what carries them."""
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


def annotation(workspace: Object, name: str) -> str | None:
    """Our annotation `tuning.kaito.sh/<name>` of `workspace`."""
    found: dict[str, str] = workspace["metadata"].get("annotations") or {}
    return found.get(ANNOTATION + name)


def bought(wanted: Wanted, options: Options) -> bool:
    """Whether a machine is bought for this run."""
    return options.nodes.provision and wanted.instance is not None


def selected(workspace: Object) -> dict[str, str]:
    """The labels that a node must carry, as the Workspace says."""
    selector = (workspace.get("resource") or {}).get("labelSelector") or {}
    found = dict(selector.get("matchLabels") or {})
    for each in selector.get("matchExpressions") or []:
        if each.get("operator") == "In" and len(each.get("values") or []) == 1:
            found[each["key"]] = each["values"][0]
    return {k: v for k, v in found.items() if not k.startswith(_RESERVED)}


def queue(workspace: Object) -> str | None:
    """Kueue's queue that the Workspace names."""
    found: dict[str, str] = workspace["metadata"].get("labels") or {}
    return found.get(QUEUE)


def server_labels(workspace: Object) -> dict[str, str]:
    """What tells the pods that serve from all others of the namespace."""
    name = workspace["metadata"]["name"]
    return {WORKSPACE_LABEL: name, "app.kubernetes.io/component": "server"}


def config_of(job: Object) -> str:
    """sha256 of the ConfigMap's content that `job` was given."""
    found: dict[str, str] = job["metadata"].get("annotations") or {}
    return found.get(CONFIG_ANNOTATION, "")


def revision_of(job: Object) -> str:
    """The revision that `job` was made for."""
    found: dict[str, str] = job["metadata"].get("labels") or {}
    return found.get(REVISION_LABEL, "")


def owned(item: Object, uid: str) -> bool:
    """Whether `item` belongs to the object with this UID: a name alone proves nothing."""
    return any(each["uid"] == uid for each in item["metadata"].get("ownerReferences") or [])
