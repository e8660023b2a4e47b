"""Submit a Workspace to a cluster from Python, watch it, and read its logs.

    from tuning import cluster

    name = cluster.submit("workspace.yaml", namespace="team")
    print(cluster.wait(name, namespace="team").digest)

It is `kubectl apply`, `wait` and `logs` with the official client, by the current kubeconfig or by
the service account of the pod it runs in. The operator in the cluster does the work. Needs the
extra `cluster`. Every function raises RefusedError where the API server refuses, TransientError
where it cannot be reached.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import urllib3
import yaml
from kubernetes import client, config
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import DynamicApiError, ResourceNotFoundError

from tuning.errors import RefusedError, SpecError, TransientError, TuningError
from tuning.spec import parse_workspace, read_file

GROUP = "kaito.sh"
MANAGER = "tuning-cluster"  # field manager of what is submitted
LABEL = f"{GROUP}/workspace"  # of the pods of a Workspace, with its name
LOOK_EVERY = 2.0  # seconds between two looks of `wait`


@dataclass(frozen=True)
class Status:
    """What the operator reports of a Workspace."""

    name: str
    state: str  # Pending, Running, Succeeded, Failed, Ready, NotReady; empty: not seen yet
    digest: str | None = None  # of the adapter image
    progress: dict[str, Any] = field(default_factory=dict)  # text, step, steps, loss, etaSeconds
    failure: dict[str, Any] = field(default_factory=dict)  # reason, message, hint, exitCode
    raw: dict[str, Any] = field(default_factory=dict, repr=False)  # the whole status

    @property
    def is_done(self) -> bool:
        """Whether the tuning has ended, or the server answers."""
        return self.state in ("Succeeded", "Failed", "Ready")


def submit(
    file: str | PathLike[str], *, namespace: str = "default", context: str | None = None
) -> str:
    """Apply all documents of `file`, server-side; returns the name of its Workspace.

    The Workspace is validated here first. Raises SpecError with all problems of the file.
    """
    text = read_file(Path(file))
    workspace = parse_workspace(text, origin=Path(file).name)
    with _connected(context) as cluster:
        for document in filter(None, yaml.safe_load_all(text)):
            kind = cluster.resources.get(api_version=document["apiVersion"], kind=document["kind"])
            where = {"namespace": namespace} | document["metadata"]
            kind.server_side_apply(
                body=document,
                name=where["name"],
                namespace=where["namespace"],
                field_manager=MANAGER,
            )
    return workspace.metadata.name


def status(name: str, *, namespace: str = "default", context: str | None = None) -> Status:
    """What the operator last reported of the Workspace `name`."""
    with _connected(context) as cluster:
        return _status(cluster, name, namespace)


def wait(
    name: str,
    *,
    namespace: str = "default",
    timeout_seconds: float | None = None,
    context: str | None = None,
) -> Status:
    """The status of the Workspace `name` once it is done; `state` says how it ended.

    Raises TuningError with the operator's reason and hint if it failed, TimeoutError after
    `timeout_seconds`.
    """
    ends = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    with _connected(context) as cluster:
        while not (now := _status(cluster, name, namespace)).is_done:
            if ends is not None and time.monotonic() > ends:
                text = now.progress.get("text") or now.state or "not seen by the operator yet"
                raise TimeoutError(f"Workspace {name} is not done: {text}")
            time.sleep(LOOK_EVERY)
    if now.state == "Failed":
        raise _failed(now)
    return now


def logs(
    name: str, *, namespace: str = "default", follow: bool = False, context: str | None = None
) -> Iterator[str]:
    """The lines that the newest pod of the Workspace `name` has printed, and prints (`follow`)."""
    with _connected(context) as cluster:
        core: Any = client.CoreV1Api(cluster.client)  # its types say less than it answers
        pods = core.list_namespaced_pod(namespace, label_selector=f"{LABEL}={name}").items
        if not pods:
            what, change = "has no pod yet", "look at its conditions: kubectl describe workspace"
            raise RefusedError.at("JOB-141", name, what, change)
        newest = max(pods, key=lambda pod: pod.metadata.creation_timestamp)
        stream = core.read_namespaced_pod_log(
            newest.metadata.name, namespace, follow=follow, _preload_content=False
        )
        try:
            for line in stream:
                yield line.decode(errors="replace").rstrip("\n")
        finally:
            stream.close()


def _status(cluster: DynamicClient, name: str, namespace: str) -> Status:
    kind = cluster.resources.get(api_version=f"{GROUP}/v1beta1", kind="Workspace")
    found = kind.get(name=name, namespace=namespace).to_dict()
    stored = found.get("status") or {}
    output = stored.get("output") or {}
    return Status(
        name=name,
        state=stored.get("state") or "",
        digest=output.get("digest"),
        progress=stored.get("progress") or {},
        failure=stored.get("failure") or {},
        raw=stored,
    )


def _failed(now: Status) -> TuningError:
    """The operator's reason, as an error of the kind that the engine's exit code stands for."""
    told = now.failure
    kinds = {kind.exit_code: kind for kind in TuningError.__subclasses__()}
    what = f"failed: {told.get('reason', 'unknown')}: {told.get('message', 'no message')}"
    hint = told.get("hint") or "look at its conditions and logs"
    return kinds.get(told.get("exitCode", 0), RefusedError).at("JOB-142", now.name, what, hint)


@contextmanager
def _connected(context: str | None) -> Iterator[DynamicClient]:
    """A client of the cluster that kubectl would ask; its errors as ours."""
    settings: Any = client.Configuration()
    named = os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())
    try:
        if context or "KUBECONFIG" in os.environ or Path(named).is_file():
            config.load_kube_config(  # type: ignore[no-untyped-call]
                config_file=named, context=context, client_configuration=settings
            )
        else:
            config.load_incluster_config(  # type: ignore[no-untyped-call]
                client_configuration=settings
            )
    except Exception as error:  # the library checks no type in the file
        what = f"no cluster to talk to ({type(error).__name__})"
        change = "set KUBECONFIG to a file that kubectl can use, or name another context"
        raise SpecError.at("JOB-143", context or "kubeconfig", what, change) from None
    settings.retries = urllib3.Retry(total=0)  # whoever waits for an answer is told at once
    with client.ApiClient(settings) as api:
        try:
            yield DynamicClient(api)  # type: ignore[no-untyped-call]
        except ResourceNotFoundError:
            what = "the cluster does not know this kind"
            change = "install the operator: kubectl apply -k configs/deploy"
            raise RefusedError.at("JOB-144", "Workspace", what, change) from None
        except (DynamicApiError, client.ApiException) as error:
            raise _refused(error) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            what, change = f"cannot be reached ({type(error).__name__})", "try again"
            raise TransientError.at("JOB-145", api.configuration.host, what, change) from None


def _refused(error: Any) -> TuningError:
    """The API server's refusal in its own words."""
    body = yaml.safe_load(error.body) if error.body else {}
    words = body.get("message") if isinstance(body, dict) else None
    what = f"the API server answered {error.status}: {words or error.reason}"
    kind = TransientError if error.status in (409, 429) or error.status >= 500 else RefusedError
    return kind.at("JOB-146", "Workspace", what, "change what it names, or ask for the right to")
