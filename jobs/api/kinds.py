"""The kinds of Kubernetes objects that we use, and their URL paths. Objects are plain dicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

Object = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of object, and where the API serves it."""

    group: str  # "" for the core group
    version: str
    plural: str
    name: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """The value of an object's `apiVersion`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None, name: str | None = None) -> str:
        """URL path of one object, or of the list when `name` is None."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        inside = f"/namespaces/{_segment(namespace)}" if namespace and self.namespaced else ""
        return f"{root}{inside}/{self.plural}" + (f"/{_segment(name)}" if name else "")


def _segment(name: str) -> str:
    """`name` as exactly one path segment: a name from a spec must not lead to another object."""
    return quote(name, safe="") if name.strip(".") else "%2E" * len(name)


WORKSPACE = Kind("kaito.sh", "v1beta1", "workspaces", "Workspace")
JOB = Kind("batch", "v1", "jobs", "Job")
POD = Kind("", "v1", "pods", "Pod")
CONFIG_MAP = Kind("", "v1", "configmaps", "ConfigMap")
DEPLOYMENT = Kind("apps", "v1", "deployments", "Deployment")
REPLICA_SET = Kind("apps", "v1", "replicasets", "ReplicaSet")
SERVICE = Kind("", "v1", "services", "Service")
CLAIM = Kind("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim")
NETWORK_POLICY = Kind("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy")
CORE_EVENT = Kind("", "v1", "events", "Event")
EVENT = Kind("events.k8s.io", "v1", "events", "Event")
LEASE = Kind("coordination.k8s.io", "v1", "leases", "Lease")
NODE = Kind("", "v1", "nodes", "Node", namespaced=False)
NODE_CLAIM = Kind("karpenter.sh", "v1", "nodeclaims", "NodeClaim", namespaced=False)
CRD = Kind(
    "apiextensions.k8s.io",
    "v1",
    "customresourcedefinitions",
    "CustomResourceDefinition",
    namespaced=False,
)
WEBHOOK = Kind(
    "admissionregistration.k8s.io",
    "v1",
    "validatingwebhookconfigurations",
    "ValidatingWebhookConfiguration",
    namespaced=False,
)
STORAGE_CLASS = Kind("storage.k8s.io", "v1", "storageclasses", "StorageClass", namespaced=False)
