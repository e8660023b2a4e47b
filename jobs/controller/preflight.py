"""Before the first look: Workspaces are served, by our CRD, and nobody else looks after them.

KAITO's CRD has the same name and a smaller status. On it, what must be remembered (which spec ran,
which digests were pushed) would be cut off silently, and finished work would run again.
"""

from __future__ import annotations

import logging
import threading

from jobs.api.client import CRD, WEBHOOK, WORKSPACE, ApiError, Cluster, Kind, Object
from jobs.api.options import Options
from tuning.errors import SpecError, TransientError

log = logging.getLogger(__name__)

NAME = "workspaces.kaito.sh"
KAITO_WEBHOOK = "validation.workspace.kaito.sh"
PATIENCE = 60.0  # seconds for a CRD that was applied in the same breath
_REMEMBERED = ("revision", "outputs")  # of the status: what KAITO's has not


def check(
    cluster: Cluster, options: Options, stop: threading.Event, *, patience: float = PATIENCE
) -> None:
    """Return when Workspaces can be looked after, or when `stop` is set.

    Raises SpecError: no CRD, another's CRD, or KAITO at work; TransientError: no API server.
    """
    waited = 0.0
    while not _served(cluster, options):
        if waited >= patience:
            what = f"the API server knows no {WORKSPACE.api_version} Workspaces"
            raise SpecError.at("JOB-110", NAME, what, "kubectl apply -k configs/deploy/crd")
        if stop.wait(1.0):
            return
        waited += 1.0
    definition = _seen(cluster, CRD, NAME)
    if definition and not _remembers(definition[0]):
        raise foreign()
    for item in _seen(cluster, WEBHOOK, None):
        if any(each.get("name") == KAITO_WEBHOOK for each in item.get("webhooks") or []):
            _beside_kaito(item["metadata"]["name"], options)


def foreign() -> SpecError:
    """The CRD in the cluster forgets what a status must remember."""
    what = "the CRD is another's: its status has no room for what this operator remembers"
    change = "remove KAITO, then kubectl apply -k configs/deploy/crd: Workspaces are kept"
    return SpecError.at("JOB-111", NAME, what, change)


def _beside_kaito(webhook: str, options: Options) -> None:
    if options.beside_kaito == "opt-in":
        log.warning("KAITO is at work here: only Workspaces that opt in are looked after")
        return
    what = f"KAITO's controller looks after Workspaces here (webhook {webhook})"
    change = "remove it, or set besideKaito: opt-in in the operator's options"
    raise SpecError.at("JOB-112", NAME, what, change)


def _served(cluster: Cluster, options: Options) -> bool:
    """Asks for nothing but the one right that the operator has in any case."""
    try:
        cluster.find(WORKSPACE, next(iter(options.namespaces), None), fields="metadata.name=none")
    except ApiError as error:
        if error.status == 404:
            return False
        change = "see whether the API server is up, and the operator's rights (configs/deploy)"
        raise TransientError.at("JOB-113", NAME, str(error), change) from None
    return True


def _seen(cluster: Cluster, kind: Kind, name: str | None) -> list[Object]:
    """The object, or all of the kind; nothing where the rights do not go so far."""
    try:
        if name is None:
            return cluster.find(kind)
        found = cluster.get(kind, None, name)
    except ApiError as error:
        if error.status in (403, 404):
            log.info("not looked at: %s (%s)", kind.plural, error.reason)
            return []
        raise TransientError.at("JOB-113", kind.plural, str(error), "see the API server") from None
    return [found] if found else []


def _remembers(definition: Object) -> bool:
    for version in definition["spec"]["versions"]:
        if version["name"] == WORKSPACE.version:
            schema = (version.get("schema") or {}).get("openAPIV3Schema") or {}
            status = (schema.get("properties") or {}).get("status") or {}
            return all(name in (status.get("properties") or {}) for name in _REMEMBERED)
    return False
