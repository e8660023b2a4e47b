"""The API server's verbs on plain dicts.

Uses the official client's connections and credentials (TLS, proxies, token rotation), but not its
generated classes: typed models refuse unknown fields, CustomObjectsApi cannot reach `/api/v1`, and
both cost 50 % more CPU per call. Every call has a timeout. Writes check `may_write` first, so that
a replica that lost its lease while it was suspended writes nothing.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Self
from urllib.parse import urlencode, urlsplit

import urllib3
from kubernetes import client, config

from jobs.api import nesting
from jobs.api.kinds import DEPLOYMENT, EVENT, JOB, POD, WORKSPACE, Kind, Object
from tuning.errors import SpecError, redact

log = logging.getLogger(__name__)

OWNER = "tuning-operator"  # field manager of our writes
CONNECT, READ = 10.0, 30.0  # seconds
PAGE = 100  # objects per list call
_METADATA = "application/json;as=PartialObjectMetadata{};g=meta.k8s.io;v=v1"


class ApiError(Exception):
    """The API server refused a call, or is unreachable (`status` 0)."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}" if status else message)
        self.status, self.reason, self.message = status, reason, message

    @property
    def is_transient(self) -> bool:
        """Whether the same call may succeed later."""
        return self.status in (0, 408, 409, 410, 429) or self.status >= 500


class NotLeader(Exception):
    """This replica does not hold the lease, and so must not write."""


class Cluster:
    """Client of one API server. Thread-safe.

    A `with` block closes the idle connections at its end, and those in use when they are done.
    """

    def __init__(
        self, api: client.ApiClient, *, may_write: Callable[[], bool] = lambda: True
    ) -> None:
        self._api = api
        self._may_write = may_write
        host = api.configuration.host
        self._base = urlsplit(host).path.rstrip("/")
        self._pool = api.rest_client.pool_manager.connection_from_url(host)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()  # clearing the pool manager would only forget it

    def guarded(self, may_write: Callable[[], bool]) -> Cluster:
        """The same API server, with writes allowed only while `may_write` returns True."""
        return Cluster(self._api, may_write=may_write)

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        """The object, or None if it does not exist."""
        return self._call_or_none("GET", kind.path(namespace, name))

    def find(
        self,
        kind: Kind,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
        cached: bool = False,
    ) -> list[Object]:
        """All objects that match the selectors. `cached`: from the API server's watch cache, which
        may be slightly stale but spares etcd a read of the whole namespace."""
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
        """Pages of matching objects, each with the list's resourceVersion to start a watch from."""
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
        """Objects as they change after `version`, for `seconds`; ApiError(410) if it is too old.

        A dead connection times out CONNECT seconds after `seconds`.
        """
        query = {
            "labelSelector": labels,
            "watch": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(seconds),
            "allowWatchBookmarks": "true",
        }
        response = self._open(
            "GET",
            kind.path(namespace),
            query=query,
            read=seconds + CONNECT,
            accept=_METADATA.format("") if metadata_only else "application/json",
        )
        try:
            for line in _lines(response):
                event = nesting.loads(line)
                if event["type"] == "ERROR":
                    raise _error(event["object"].get("code", 500), event["object"])
                if event["type"] != "BOOKMARK":
                    yield event["object"]
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(0, "Unreachable", type(error).__name__) from None
        finally:
            response.close()

    def proxy_get(
        self, pod: Object, port: int, path: str, *, seconds: float = READ, max_bytes: int = 1 << 16
    ) -> Object:
        """A pod's JSON response through the API server's proxy; needs `get` on `pods/proxy`.

        Its body is the pod's: bounded like that of a direct request. Raises ApiError, ValueError.
        """
        meta, until = pod["metadata"], time.monotonic() + seconds
        address = POD.path(meta["namespace"], f"http:{meta['name']}:{port}")
        response = self._send("GET", f"{address}/proxy{path}", read=seconds)
        try:
            body = response.read1(max_bytes, decode_content=False)
            while body and (part := response.read1(max_bytes, decode_content=False)):
                body += part
                if len(body) > max_bytes or time.monotonic() > until:
                    raise ApiError(0, "Unreachable", "the pod's response has no end")
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(0, "Unreachable", type(error).__name__) from None
        finally:
            response.close()
        if response.status != 200:
            raise _error(response.status, _status(body))
        document: Object = nesting.loads_untrusted(body)
        return document

    def create(self, kind: Kind, item: Object) -> Object | None:
        """The created object, or None if the name is taken."""
        try:
            path = kind.path(item["metadata"].get("namespace"))
            return self._call("POST", path, body=item, query={"fieldManager": OWNER})
        except ApiError as error:
            if error.reason == "AlreadyExists":
                return None
            raise

    def rehearse(self, kind: Kind, item: Object) -> None:
        """Let the API server validate and admit a new object, which it does not store."""
        query = {"fieldManager": OWNER, "dryRun": "All"}
        try:
            self._call("POST", kind.path(item["metadata"].get("namespace")), body=item, query=query)
        except ApiError as error:
            # One that exists is no problem; nor is a webhook that takes no part in dry runs.
            if error.reason != "AlreadyExists" and "does not support dry run" not in error.message:
                raise

    def replace(self, kind: Kind, item: Object) -> Object:
        """The stored object. Raises ApiError(409) if `item` is not the newest version."""
        meta = item["metadata"]
        return self._call("PUT", kind.path(meta.get("namespace"), meta["name"]), body=item)

    def set_finalizers(self, kind: Kind, item: Object, finalizers: list[str]) -> Object | None:
        """The object with these finalizers, or None if it is gone. ApiError(409) if stale."""
        meta = item["metadata"]
        body = {"metadata": {"finalizers": finalizers, "resourceVersion": meta["resourceVersion"]}}
        path = kind.path(meta.get("namespace"), meta["name"])
        return self._call_or_none("PATCH", path, body=body, content="application/merge-patch+json")

    def replace_status(self, kind: Kind, item: Object, status: Object) -> Object | None:
        """The object with this status, or None if it is gone. ApiError(409) if `item` is stale.

        A replacement, not server-side apply: fields that we no longer set must disappear, which
        apply does not do on servers older than 1.22 (measured: they stay, or are written as null).
        """
        meta = item["metadata"]
        path = kind.path(meta["namespace"], meta["name"]) + "/status"
        body = item | {"status": status}
        return self._call_or_none("PUT", path, body=body, query={"fieldManager": OWNER})

    def delete(self, kind: Kind, item: Object) -> None:
        """Delete exactly this object (by UID); no error if it is gone.

        Jobs and Deployments are deleted in the foreground: they exist until their pods are gone, so
        that a successor never writes beside them. All else goes at once: a NodeClaim must not wait
        for the garbage collector, nor that collector delete the node before Karpenter drains it.
        """
        meta = item["metadata"]
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Foreground" if kind in (JOB, DEPLOYMENT) else "Background",
            "preconditions": {"uid": meta["uid"]},
        }
        try:
            self._call("DELETE", kind.path(meta.get("namespace"), meta["name"]), body=body)
        except ApiError as error:
            if error.status not in (404, 409):  # 409: a new object has the name by now
                raise

    def event(self, about: Object, *, kind: str, reason: str, note: str) -> None:
        """Record an event about a Workspace; `kind` is Normal or Warning. Failures are logged."""
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

    def _call_or_none(self, method: str, path: str, **more: Any) -> Object | None:
        """As `_call`; None if the object does not exist."""
        try:
            return self._call(method, path, **more)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def _call(self, method: str, path: str, **more: Any) -> Object:
        """The JSON of a response."""
        response = self._open(method, path, **more)
        try:
            document: Object = nesting.loads(response.data)
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(0, "Unreachable", type(error).__name__) from None
        return document

    def _open(self, method: str, path: str, **more: Any) -> urllib3.BaseHTTPResponse:
        """A successful response; its body is not read yet."""
        response = self._send(method, path, **more)
        if response.status < 300:
            return response
        try:
            text = response.data
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(0, "Unreachable", type(error).__name__) from None
        raise _error(response.status, _status(text))

    def _send(
        self,
        method: str,
        path: str,
        *,
        read: float = READ,
        body: Object | None = None,
        query: dict[str, str] | None = None,
        content: str = "application/json",
        accept: str = "application/json",
    ) -> urllib3.BaseHTTPResponse:
        if method != "GET" and not self._may_write():
            raise NotLeader
        headers = {"Accept": accept} | self._token()
        if body is not None:
            headers["Content-Type"] = content
        parameters = urlencode({key: value for key, value in (query or {}).items() if value})
        try:
            return self._pool.urlopen(
                method,
                f"{self._base}{path}" + (f"?{parameters}" if parameters else ""),
                body=None if body is None else json.dumps(body).encode(),
                headers=headers,
                timeout=urllib3.Timeout(connect=CONNECT, read=read),
                preload_content=False,
                redirect=False,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiError(0, "Unreachable", type(error).__name__) from None

    def _token(self) -> dict[str, str]:
        """The header with the bearer token, if any; read for each call, as pods' tokens rotate."""
        setting = self._api.configuration.auth_settings().get("BearerToken")
        return {setting["key"]: setting["value"]} if setting else {}


def connect(kubeconfig: str | None, *, threads: int) -> Cluster:
    """Client of the cluster of `kubeconfig`, or of this pod's. Raises SpecError."""
    settings = client.Configuration()
    try:
        if kubeconfig:
            config.load_kube_config(  # type: ignore[no-untyped-call]
                config_file=kubeconfig, client_configuration=settings
            )
        else:
            config.load_incluster_config(  # type: ignore[no-untyped-call]
                client_configuration=settings
            )
    except Exception as error:  # the library checks no type in the file
        where = kubeconfig or "the service account of this pod"
        what = f"cannot be used to reach a cluster ({type(error).__name__})"
        change = "give --kubeconfig FILE, as kubectl reads it, or run it in a pod of the cluster"
        raise SpecError.at("JOB-118", where, what, change) from None
    settings.connection_pool_maxsize = threads + 4
    settings.retries = urllib3.Retry(total=0)  # the workqueue retries
    settings.keep_alive = True
    return Cluster(client.ApiClient(settings))


def _lines(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """Complete lines of a stream; a truncated last line is dropped."""
    rest = b""
    for chunk in response.stream(None, decode_content=False):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line for line in whole if line)


def _status(text: bytes) -> Object:
    """The `Status` object of an error response; empty if the body is something else."""
    try:
        document = nesting.loads(text)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _error(code: int, status: Object) -> ApiError:
    message = redact(str(status.get("message") or "no message"))[:2000]
    return ApiError(code, str(status.get("reason") or "Unknown"), message)
