"""Checks before the first reconcile: our CRD is installed, and KAITO's controller is not at work.

KAITO's CRD has the same name and a smaller status. It would silently prune fields that we depend
on (which spec ran, which digests were pushed), and finished work would run again.
"""

from __future__ import annotations

import logging
import threading

from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import CRD, WEBHOOK, WORKSPACE, Kind, Object
from jobs.api.options import Options
from tuning.errors import SpecError, TransientError

log = logging.getLogger(__name__)

NAME = "workspaces.kaito.sh"
KAITO_WEBHOOK = "validation.workspace.kaito.sh"
PATIENCE = 60.0  # seconds for a CRD that was applied together with the operator
_REQUIRED = ("revision", "outputs")  # status fields that KAITO's CRD lacks


def check(
    cluster: Cluster, options: Options, stop: threading.Event, *, patience: float = PATIENCE
) -> None:
    """Return when Workspaces can be reconciled, or when `stop` is set.

    Raises SpecError: no CRD, KAITO's CRD, or KAITO at work; TransientError: no API server.
    """
    waited = 0.0
    while not _served(cluster, options):
        if waited >= patience:
            what = f"the API server serves no {WORKSPACE.api_version} Workspaces"
            raise SpecError.at("JOB-110", NAME, what, "kubectl apply -k configs/deploy/crd")
        if stop.wait(1.0):
            return
        waited += 1.0
    definition = _find(cluster, CRD, NAME)
    if definition and not _has_our_status(definition[0]):
        raise foreign_crd()
    for item in _find(cluster, WEBHOOK, None):
        if any(each.get("name") == KAITO_WEBHOOK for each in item.get("webhooks") or []):
            _beside_kaito(item["metadata"]["name"], options)


def foreign_crd() -> SpecError:
    """The installed CRD is KAITO's, which prunes our status."""
    what = "the installed CRD is not this operator's: it prunes status fields that it needs"
    change = "remove KAITO, then kubectl apply -k configs/deploy/crd: Workspaces are kept"
    return SpecError.at("JOB-111", NAME, what, change)


def _beside_kaito(webhook: str, options: Options) -> None:
    if options.beside_kaito == "opt-in":
        log.warning("KAITO is at work in this cluster: only Workspaces that opt in are reconciled")
        return
    what = f"KAITO's controller reconciles Workspaces in this cluster (webhook {webhook})"
    change = "remove it, or set besideKaito: opt-in in the operator's options"
    raise SpecError.at("JOB-112", NAME, what, change)


def _served(cluster: Cluster, options: Options) -> bool:
    """Whether Workspaces are served; needs no right but to list them."""
    try:
        cluster.find(WORKSPACE, next(iter(options.namespaces), None), fields="metadata.name=none")
    except ApiError as error:
        if error.status == 404:
            return False
        change = "check that the API server is up, and the operator's rights (configs/deploy)"
        raise TransientError.at("JOB-113", NAME, str(error), change) from None
    return True


def _find(cluster: Cluster, kind: Kind, name: str | None) -> list[Object]:
    """The object, or all of the kind; empty without the rights."""
    try:
        if name is None:
            return cluster.find(kind)
        found = cluster.get(kind, None, name)
    except ApiError as error:
        if error.status in (403, 404):
            log.info("not checked: %s (%s)", kind.plural, error.reason)
            return []
        raise TransientError.at(
            "JOB-113", kind.plural, str(error), "check the API server"
        ) from None
    return [found] if found else []


def _has_our_status(definition: Object) -> bool:
    for version in definition["spec"]["versions"]:
        if version["name"] == WORKSPACE.version:
            schema = (version.get("schema") or {}).get("openAPIV3Schema") or {}
            status = (schema.get("properties") or {}).get("status") or {}
            return all(name in (status.get("properties") or {}) for name in _REQUIRED)
    return False
