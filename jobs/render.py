"""The objects that the operator would create for a Workspace in a file, for review and dry runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from jobs.api.kinds import Object
from jobs.api.options import Options
from jobs.desired import inference as desired_inference
from jobs.desired import names
from jobs.desired import tuning as desired_tuning
from jobs.desired.tuning import Desired
from jobs.manifests import job as job_manifests
from jobs.manifests import pod
from jobs.manifests import server as server_manifests
from tuning import spec as specs
from tuning.errors import SpecError

NO_UID = "00000000-0000-0000-0000-000000000000"


def render(file: Path, options: Options, *, namespace: str) -> list[dict[str, Any]]:
    """The objects in the order of their creation, with a UID of zeros.

    Raises SpecError with all problems of the file, and if the Workspace does not fit its GPU.
    """
    workspace = _as_stored(file, namespace)
    claim = options.storage.run_volume != "ephemeral"
    if workspace.get("tuning") is None and workspace.get("inference") is not None:
        desired = _desired_server(workspace, file, options)
        claim = claim and not options.storage.cached
        return [
            *_common_objects(workspace, desired, options, claim=claim),
            *_server_objects(workspace, desired, options),
        ]
    specs.load(file)  # raises for all problems, with their lines
    desired = desired_tuning.read(workspace, _config_map(file, workspace, "tuning"), None)
    _check_volumes(workspace, options)
    if desired.problems or desired.fit_problems:
        raise SpecError(desired.problems or desired.fit_problems)
    if too_large := job_manifests.size_problem(desired, options, ()):
        raise SpecError([too_large])
    server: list[Object] = []
    if "inference" in workspace:
        served = _desired_server(workspace, file, options)
        server = _server_objects(workspace, served, options)
    objects = _common_objects(workspace, desired, options, claim=claim)
    if options.network_policy:
        objects.append(job_manifests.network_policy(workspace, desired, options))
    job = job_manifests.job(workspace, desired, options, claim=claim, earlier=())
    return [*objects, job, *server]


def _desired_server(workspace: Object, file: Path, options: Options) -> Desired:
    """Raises SpecError."""
    config_map = _config_map(file, workspace, "inference")
    desired = desired_inference.read(workspace, config_map, None)
    if desired.problems:
        raise SpecError(desired.problems)
    if desired.fit_problems:
        hint = desired_inference.fit_hint(desired)
        raise SpecError([replace(problem, change=hint) for problem in desired.fit_problems])
    if desired.server and desired.server.runtime == "vllm" and not options.vllm_image:
        what, change = "the operator has no image of vLLM", "set the option vllmImage"
        raise SpecError.at("JOB-104", desired_inference.RUNTIME, what, change)
    _check_volumes(workspace, options)
    return desired


def _server_objects(workspace: Object, desired: Desired, options: Options) -> list[Object]:
    claim = options.storage.run_volume != "ephemeral" and not options.storage.cached
    objects = [
        server_manifests.service(workspace, desired),
        server_manifests.deployment(workspace, desired, options, claim=claim),
    ]
    if not options.network_policy:
        return objects
    return [job_manifests.server_policy(workspace, desired, options), *objects]


def _common_objects(
    workspace: Object, desired: Desired, options: Options, *, claim: bool
) -> list[Object]:
    """What a run and a server need first: a provisioned node and the run volume, if any."""
    objects: list[Object] = []
    if names.provisions_node(desired, options):
        objects.append(job_manifests.node_claim(workspace, desired, options, attempt=1))
    if claim:
        objects.append(job_manifests.run_claim(workspace, desired, options))
    return objects


def _check_volumes(workspace: Object, options: Options) -> None:
    if forbidden := pod.forbidden_volume(workspace, options):
        where, kind = forbidden
        what = f"a volume of the kind {kind} is not allowed by the operator's options"
        raise SpecError.at("JOB-103", where, what, "use persistentVolumeClaim")


def _as_stored(file: Path, namespace: str) -> Object:
    """The Workspace as the API server would store it."""
    workspace = next(d for d in _documents(file) if d.get("kind") == "Workspace")
    workspace["apiVersion"] = "kaito.sh/v1beta1"
    meta = workspace["metadata"]
    meta |= {"uid": NO_UID, "generation": 1, "namespace": meta.get("namespace") or namespace}
    return workspace


def _config_map(file: Path, workspace: Object, section: str) -> Object | None:
    """The ConfigMap that `tuning` or `inference` names, if it is in the file."""
    name = (workspace.get(section) or {}).get("config")
    maps = (d for d in _documents(file) if d.get("kind") == "ConfigMap")
    return next((d for d in maps if d["metadata"]["name"] == name), None)


def _documents(file: Path) -> list[Object]:
    documents = yaml.safe_load_all(file.read_text(encoding="utf-8"))
    return [each for each in documents if isinstance(each, dict)]
