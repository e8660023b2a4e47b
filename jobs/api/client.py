"""The few verbs of the API server that we use, on plain dictionaries.

Built on the official client's connections and login (TLS, proxies, token rotation). What it
generates is passed by: typed classes refuse fields they do not know, CustomObjectsApi cannot reach
`/api/v1`, and both take half as much CPU again for each call. Every call has a time limit. Writes
ask `may_write` first, so that a replica that lost its lease while it slept writes nothing.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import urllib3
from kubernetes import client, config

from tuning.errors import redact

log = logging.getLogger(__name__)

Object = dict[str, Any]
OWNER = "tuning-operator"  # of the fields that we write
CONNECT, READ = 10.0, 30.0  # seconds
PAGE = 100  # objects a list call returns at once
_METADATA = "application/json;as=PartialObjectMetadata{};g=meta.k8s.io;v=v1"


@dataclass(frozen=True)
class Kind:
    """A kind of object and where the API serves it."""

    group: str  # "" for the core group
    version: str
    plural: str
    name: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """As in an object's `apiVersion`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None, name: str | None = None) -> str:
        """URL path of one object, or of the list when `name` is None."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        inside = f"/namespaces/{_step(namespace)}" if namespace and self.namespaced else ""
        return f"{root}{inside}/{self.plural}" + (f"/{_step(name)}" if name else "")


def _step(name: str) -> str:
    """One step of a URL's path: a name from a spec must not lead anywhere else."""
    return quote(name, safe="") if name.strip(".") else "%2E" * len(name)


WORKSPACE = Kind("kaito.sh", "v1beta1", "workspaces", "Workspace")
JOB = Kind("batch", "v1", "jobs", "Job")
POD = Kind("", "v1", "pods", "Pod")
CONFIG_MAP = Kind("", "v1", "configmaps", "ConfigMap")
DEPLOYMENT = Kind("apps", "v1", "deployments", "Deployment")
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


class ApiError(Exception):
    """The API server said no, or could not be reached (`status` 0)."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}" if status else message)
        self.status, self.reason, self.message = status, reason, message

    @property
    def passing(self) -> bool:
        """Worth another try soon: not a word about what was asked."""
        return self.status in (0, 408, 409, 410, 429) or self.status >= 500


class NotLeader(Exception):
    """A write was asked for by a replica that does not hold the lease."""


class Cluster:
    """One API server. Threads may share it."""

    def __init__(
        self, api: client.ApiClient, *, may_write: Callable[[], bool] = lambda: True
    ) -> None:
        self._api = api
        self._may_write = may_write
        host = api.configuration.host
        self._base = urlsplit(host).path.rstrip("/")
        self._pool = api.rest_client.pool_manager.connection_from_url(host)

    def guarded(self, may_write: Callable[[], bool]) -> Cluster:
        """The same API server, for one who writes only while `may_write` says so."""
        return Cluster(self._api, may_write=may_write)

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        """The object, or None if there is none."""
        try:
            return self._call("GET", kind.path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def find(
        self,
        kind: Kind,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
        cached: bool = False,
    ) -> list[Object]:
        """All objects that match the selectors. `cached`: from the server's memory, perhaps a
        moment old, but without reading every object of the namespace from its store."""
        if cached:
            query = {"labelSelector": labels, "fieldSelector": fields, "resourceVersion": "0"}
            return self._call("GET", kind.path(namespace), query=query).get("items") or []
        pages = self.pages(kind, namespace, labels=labels, fields=fields)
        return [item for items, _ in pages for item in items]

    def pages(
        self,
        kind: Kind,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
        metadata_only: bool = False,
    ) -> Iterator[tuple[list[Object], str]]:
        """All objects that match, a page at a time, for there may be tens of thousands; with each
        the version of the whole list, from which a watch goes on."""
        accept = _METADATA.format("List") if metadata_only else "application/json"
        query = {"labelSelector": labels, "fieldSelector": fields, "limit": str(PAGE)}
        while True:
            page = self._call("GET", kind.path(namespace), query=query, accept=accept)
            version, rest = page["metadata"]["resourceVersion"], page["metadata"].get("continue")
            yield page.get("items") or [], version
            if not rest:
                return
            query["continue"] = rest

    def watch(
        self,
        kind: Kind,
        namespace: str | None,
        *,
        labels: str,
        version: str,
        seconds: int,
        metadata_only: bool = False,
    ) -> Iterator[Object]:
        """Objects as they change after `version`, for `seconds`; ApiError(410) when it is stale.

        A connection that is open but dead is given up 10 s after its time.
        """
        query = {
            "labelSelector": labels,
            "watch": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(seconds),
            "allowWatchBookmarks": "true",
        }
        answer = self._open(
            "GET",
            kind.path(namespace),
            query=query,
            read=seconds + CONNECT,
            accept=_METADATA.format("") if metadata_only else "application/json",
        )
        try:
            for line in _lines(answer):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise _error(event["object"].get("code", 500), event["object"])
                if event["type"] != "BOOKMARK":
                    yield event["object"]
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(0, "Unreachable", type(error).__name__) from None
        finally:
            answer.close()

    def through(self, pod: Object, port: int, path: str) -> Object:
        """The JSON that a pod answers, asked by the API server, so that it need not be reachable
        from here; takes the right to get `pods/proxy`."""
        meta = pod["metadata"]
        where = POD.path(meta["namespace"], f"http:{meta['name']}:{port}")
        return self._call("GET", f"{where}/proxy{path}")

    def create(self, kind: Kind, item: Object) -> Object | None:
        """The created object, or None if one of this name exists already."""
        try:
            path = kind.path(item["metadata"].get("namespace"))
            return self._call("POST", path, body=item, query={"fieldManager": OWNER})
        except ApiError as error:
            if error.reason == "AlreadyExists":
                return None
            raise

    def replace(self, kind: Kind, item: Object) -> Object:
        """The object as it is after the write. Raises ApiError(409) if it changed meanwhile."""
        meta = item["metadata"]
        return self._call("PUT", kind.path(meta.get("namespace"), meta["name"]), body=item)

    def set_finalizers(self, kind: Kind, item: Object, finalizers: list[str]) -> Object | None:
        """`item` with other finalizers, or None if it is gone. Raises ApiError(409) if it is not
        the newest version."""
        meta = item["metadata"]
        body = {"metadata": {"finalizers": finalizers, "resourceVersion": meta["resourceVersion"]}}
        try:
            return self._call(
                "PATCH",
                kind.path(meta.get("namespace"), meta["name"]),
                body=body,
                content="application/merge-patch+json",
            )
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def replace_status(self, kind: Kind, item: Object, status: Object) -> Object | None:
        """The object after its status became `status`, or None if it is gone.

        A replacement, not server-side apply: what we no longer say must disappear, which apply does
        on no server older than 1.22 (measured: it stays, or is written as null and refused).
        Raises ApiError(409) if `item` is not the newest version.
        """
        meta = item["metadata"]
        path = kind.path(meta["namespace"], meta["name"]) + "/status"
        try:
            body = item | {"status": status}
            return self._call("PUT", path, body=body, query={"fieldManager": OWNER})
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def delete(self, kind: Kind, item: Object) -> None:
        """Delete this very object (by UID); one that is gone is fine.

        A Job or Deployment is there until its pods are gone, so that nobody writes beside them. All
        else goes at once: a machine must not be paid for while the garbage collector is busy, nor
        that collector delete its node before Karpenter drains it.
        """
        meta = item["metadata"]
        first = "Foreground" if kind in (JOB, DEPLOYMENT) else "Background"
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": first,
            "preconditions": {"uid": meta["uid"]},
        }
        try:
            path = kind.path(meta.get("namespace"), meta["name"])
            self._call("DELETE", path, body=body)
        except ApiError as error:
            if error.status not in (404, 409):  # 409: another object has the name by now
                raise

    def event(self, about: Object, *, kind: str, reason: str, note: str) -> None:
        """Tell of a transition of `about`; `kind` is Normal or Warning. Failing is no failure."""
        meta, now = about["metadata"], datetime.now(UTC)
        regarding = {k: meta[k] for k in ("name", "namespace", "uid", "resourceVersion")}
        body = {
            "apiVersion": EVENT.api_version,
            "kind": "Event",
            "metadata": {
                "name": f"{meta['name'][:200]}.{secrets.token_hex(8)}",
                "namespace": meta["namespace"],
            },
            "eventTime": now.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "reportingController": "kaito.sh/tuning-operator",
            "reportingInstance": OWNER,
            "action": "Reconcile",
            "reason": reason,
            "note": note[:1000],
            "type": kind,
            "regarding": {"apiVersion": WORKSPACE.api_version, "kind": "Workspace", **regarding},
        }
        try:
            self.create(EVENT, body)
        except ApiError as error:
            log.warning("event %s was not stored: %s", reason, error)

    def _call(
        self,
        method: str,
        path: str,
        *,
        body: Object | None = None,
        query: dict[str, str] | None = None,
        content: str = "application/json",
        accept: str = "application/json",
    ) -> Object:
        answer = self._open(
            method, path, body=body, query=query, content=content, accept=accept, read=READ
        )
        try:
            data = answer.data
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(0, "Unreachable", type(error).__name__) from None
        found: Object = json.loads(data)
        return found

    def _open(
        self,
        method: str,
        path: str,
        *,
        read: float,
        body: Object | None = None,
        query: dict[str, str] | None = None,
        content: str = "application/json",
        accept: str = "application/json",
    ) -> urllib3.BaseHTTPResponse:
        if method != "GET" and not self._may_write():
            raise NotLeader
        headers = {"Accept": accept} | self._login()
        if body is not None:
            headers["Content-Type"] = content
        asked = {key: value for key, value in (query or {}).items() if value}
        try:
            answer = self._pool.urlopen(
                method,
                f"{self._base}{path}?{urlencode(asked)}" if asked else f"{self._base}{path}",
                body=None if body is None else json.dumps(body).encode(),
                headers=headers,
                timeout=urllib3.Timeout(connect=CONNECT, read=read),
                preload_content=False,
                redirect=False,
            )
            if answer.status < 300:
                return answer
            text = answer.data
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiError(0, "Unreachable", type(error).__name__) from None
        raise _error(answer.status, _status(text))

    def _login(self) -> dict[str, str]:
        """The bearer token, if that is the login: asked for anew, as a pod's is renewed hourly."""
        found = self._api.configuration.auth_settings().get("BearerToken")
        return {found["key"]: found["value"]} if found else {}


def connect(kubeconfig: str | None, *, threads: int) -> Cluster:
    """The cluster of `kubeconfig`, or the one that this pod runs in."""
    settings = client.Configuration()
    if kubeconfig:
        config.load_kube_config(  # type: ignore[no-untyped-call]
            config_file=kubeconfig, client_configuration=settings
        )
    else:
        config.load_incluster_config(  # type: ignore[no-untyped-call]
            client_configuration=settings
        )
    settings.connection_pool_maxsize = threads + 4
    settings.retries = urllib3.Retry(total=0)  # what to repeat is the reconciler's decision
    settings.keep_alive = True
    return Cluster(client.ApiClient(settings))


def _lines(answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """Complete lines of a stream; a line that was cut off is dropped."""
    rest = b""
    for chunk in answer.stream(None, decode_content=False):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line for line in whole if line)


def _status(text: bytes) -> Object:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _error(code: int, status: Object) -> ApiError:
    message = redact(str(status.get("message") or "no message"))[:2000]
    return ApiError(code, str(status.get("reason") or "Unknown"), message)
