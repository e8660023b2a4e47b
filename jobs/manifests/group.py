"""What a run on several machines adds to its Job: pods that find each other, one to a node. Pure.

One Indexed Job, one pod a machine. Index 0 has the journal, pushes, and decides: its success is the
Job's. The others wait for it at its name in a headless Service.

One template makes all pods, and Kubernetes attaches each volume that it names to each pod's node: a
claim of ReadWriteOnce, which one node can have, would keep all pods but one from starting. No field
of a pod makes a claim optional, and the name of a claim cannot contain the pod's index. So the run
volume is a claim only where it can be shared (ReadWriteMany): each index has a folder of its own in
it, and the base weights one together. Elsewhere it is an emptyDir of each pod: a run survives the
loss of any pod but that of index 0.
"""

from __future__ import annotations

from jobs.api.kinds import SERVICE, Object
from jobs.api.options import Options
from jobs.desired import names
from jobs.desired.names import REVISION_LABEL, WORKSPACE_LABEL
from jobs.desired.tuning import Desired

MEETING_PORT = 29400  # torch's own for a rendezvous
# Kueue's topology of a pod set: which nodes are near to each other.
TOPOLOGY = tuple(
    f"kueue.x-k8s.io/podset-{kind}-topology" for kind in ("required", "preferred", "unconstrained")
)
_INDEX = "JOB_COMPLETION_INDEX"  # environment variable that the Job controller sets


def job_fields(desired: Desired, options: Options) -> Object:
    """Of the Job's spec. One fault may end all pods, so that all together have the tries of each.

    Servers before 1.31 ignore `successPolicy`: the operator then ends the Job.
    """
    return {
        "completionMode": "Indexed",
        "completions": desired.nodes,
        "parallelism": desired.nodes,
        "backoffLimit": options.backoff_limit * desired.nodes,
        "successPolicy": {"rules": [{"succeededIndexes": "0"}]},
    }


def service(workspace: Object, desired: Desired) -> Object:
    """The headless Service with a name for each pod, `<job>-<index>.<job>`, ready or not."""
    spec: Object = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": peers(workspace, desired),
        "ports": [
            {
                "name": "meeting",
                "port": MEETING_PORT,
                "targetPort": MEETING_PORT,
                "protocol": "TCP",
            }
        ],
    }
    name = names.job_name(workspace, desired)
    return names.owned_object(workspace, SERVICE, name, spec, revision=desired.revision)


def is_headless(stored: Object, expected: Object) -> bool:
    """Whether a stored Service still names the pods."""
    fields = ("selector", "publishNotReadyAddresses")
    return all(stored["spec"].get(key) == expected["spec"][key] for key in fields)


def peers(workspace: Object, desired: Desired) -> dict[str, str]:
    """Labels that select the pods of one Job."""
    return {WORKSPACE_LABEL: workspace["metadata"]["name"], REVISION_LABEL: desired.revision}


def arguments(workspace: Object, desired: Desired) -> list[str]:
    """Of the engine: how many pods there are, and where index 0 is."""
    if desired.nodes == 1:
        return []
    name = names.job_name(workspace, desired)
    return ["--nodes", str(desired.nodes), "--meet", f"{name}-0.{name}:{MEETING_PORT}"]


def host_names(workspace: Object, desired: Desired) -> Object:
    """Of the pod's spec: the Service in which its host name, `<job>-<index>`, is found."""
    return {"subdomain": names.job_name(workspace, desired)} if desired.nodes > 1 else {}


def run_folder(desired: Desired) -> Object:
    """Subpath of a run volume in which the run directory of a pod is."""
    if desired.nodes == 1:
        return {"subPath": "run"}
    return {"subPathExpr": f"run-$({_INDEX})"}


def topology(workspace: Object) -> dict[str, str]:
    """Kueue's annotations of a pod set that the Workspace has."""
    annotations = workspace["metadata"].get("annotations") or {}
    return {key: str(annotations[key]) for key in TOPOLOGY if key in annotations}


def affinity(workspace: Object, desired: Desired) -> Object:
    """Each pod has a node of its own, in one zone if possible; empty where Kueue places them."""
    if desired.nodes == 1 or topology(workspace):
        return {}
    selector = {"labelSelector": {"matchLabels": peers(workspace, desired)}}
    apart = selector | {"topologyKey": "kubernetes.io/hostname"}
    near = {"weight": 100, "podAffinityTerm": selector | {"topologyKey": names.ZONE}}
    return {
        "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]},
        "podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [near]},
    }
