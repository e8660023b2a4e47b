"""What the operator would create for a Workspace in a file: for reading, review and dry runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from jobs import manifests, names, pod, served, serving, wanted
from jobs.cluster import Object
from jobs.options import Options
from jobs.wanted import Wanted
from tuning import spec as specs
from tuning.errors import Problem, SpecError

NO_UID = "00000000-0000-0000-0000-000000000000"


def render(file: Path, options: Options, *, namespace: str) -> list[dict[str, Any]]:
    """The objects, in the order in which they would be made, with an UID of zeros.

    Raises SpecError with all problems of the file, and if the Workspace does not fit.
    """
    workspace = _as_stored(file, namespace)
    if workspace.get("tuning") is None and workspace.get("inference") is not None:
        return _server(workspace, file, options)
    found = specs.load(file)  # all problems, with their lines
    name = (workspace.get("tuning") or {}).get("config")
    wish = wanted.read(workspace, _config_map(file, name), None)
    _refuse_volumes(workspace, options)
    if wish.misfit:
        raise SpecError(wish.misfit)
    assert found and wish.spec is not None, wish.problems
    claim = options.storage.run_volume != "ephemeral"
    before = _before(workspace, wish, options, claim=claim)
    if options.network_policy:
        before.append(manifests.network_policy(workspace, wish, options))
    return [*before, manifests.job(workspace, wish, options, claim=claim, earlier=())]


def _server(workspace: Object, file: Path, options: Options) -> list[Object]:
    """What serves, for a Workspace that tunes nothing."""
    name = workspace["inference"].get("config")
    wish = served.read(workspace, _config_map(file, name), None)
    if wish.problems or wish.misfit:
        raise SpecError(wish.problems or wish.misfit)
    _refuse_volumes(workspace, options)
    claim = options.storage.run_volume != "ephemeral" and not options.storage.cached
    before = _before(workspace, wish, options, claim=claim)
    if options.network_policy:
        before.append(manifests.server_policy(workspace, wish, options))
    deployment = serving.deployment(workspace, wish, options, claim=claim)
    return [*before, serving.service(workspace, wish), deployment]


def _before(workspace: Object, wish: Wanted, options: Options, *, claim: bool) -> list[Object]:
    """What any work needs first: a machine, if it is bought, and a run volume."""
    found: list[Object] = []
    if names.bought(wish, options):
        found.append(manifests.node_claim(workspace, wish, options, attempt=1))
    if claim:
        found.append(manifests.run_claim(workspace, wish, options))
    return found


def _refuse_volumes(workspace: Object, options: Options) -> None:
    if forbidden := pod.forbidden_volume(workspace, options):
        where, kind = forbidden
        what = f"a volume of the kind {kind} is not allowed by the operator's options"
        raise SpecError([Problem("JOB-103", where, what, "use persistentVolumeClaim")])


def _as_stored(file: Path, namespace: str) -> Object:
    """The Workspace as the API server would give it to the operator."""
    workspace = next(d for d in _documents(file) if d.get("kind") == "Workspace")
    workspace["apiVersion"] = "kaito.sh/v1beta1"
    meta = workspace["metadata"]
    meta |= {"uid": NO_UID, "generation": 1, "namespace": meta.get("namespace") or namespace}
    return workspace


def _config_map(file: Path, name: str | None) -> Object | None:
    maps = (d for d in _documents(file) if d.get("kind") == "ConfigMap")
    return next((d for d in maps if d["metadata"]["name"] == name), None)


def _documents(file: Path) -> list[Object]:
    found = yaml.safe_load_all(file.read_text(encoding="utf-8"))
    return [document for document in found if isinstance(document, dict)]
