"""What the operator would create for a Workspace in a file: for reading, review and dry runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from jobs.api.client import Object
from jobs.api.options import Options
from jobs.desired import inference, names
from jobs.desired import tuning as desired
from jobs.desired.tuning import Wanted
from jobs.manifests import job as manifests
from jobs.manifests import pod
from jobs.manifests import server as serving
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
    wish = desired.read(workspace, _config_map(file, name), None)
    _refuse_volumes(workspace, options)
    if wish.problems or wish.misfit:
        raise SpecError(wish.problems or wish.misfit)
    assert found and wish.spec is not None
    server = _serves(workspace, file, options) if "inference" in workspace else None
    claim = options.storage.run_volume != "ephemeral"
    before = _before(workspace, wish, options, claim=claim)
    if options.network_policy:
        before.append(manifests.network_policy(workspace, wish, options))
    job = manifests.job(workspace, wish, options, claim=claim, earlier=())
    if server is None:
        return [*before, job]
    return [*before, job, *_serving(workspace, server, options)]  # when the Job has succeeded


def _server(workspace: Object, file: Path, options: Options) -> list[Object]:
    """What serves, for a Workspace that tunes nothing."""
    wish = _serves(workspace, file, options)
    _refuse_volumes(workspace, options)
    claim = options.storage.run_volume != "ephemeral" and not options.storage.cached
    return [
        *_before(workspace, wish, options, claim=claim),
        *_serving(workspace, wish, options),
    ]


def _serves(workspace: Object, file: Path, options: Options) -> Wanted:
    """What is to be served. Raises SpecError."""
    name = (workspace.get("inference") or {}).get("config")
    wish = inference.read(workspace, _config_map(file, name), None)
    if wish.problems:
        raise SpecError(wish.problems)
    if wish.misfit:
        machine = inference.smallest(wish)
        change = f"use {machine} or larger" if machine else "no known machine fits"
        raise SpecError([replace(problem, change=change) for problem in wish.misfit])
    if wish.server and wish.server.runtime == "vllm" and not options.vllm_image:
        what, change = "the operator has no image of vLLM", "set the option vllmImage"
        raise SpecError([Problem("JOB-104", inference.RUNTIME, what, change)])
    return wish


def _serving(workspace: Object, wish: Wanted, options: Options) -> list[Object]:
    claim = options.storage.run_volume != "ephemeral" and not options.storage.cached
    found = [manifests.server_policy(workspace, wish, options)] if options.network_policy else []
    deployment = serving.deployment(workspace, wish, options, claim=claim)
    return [*found, serving.service(workspace, wish), deployment]


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
