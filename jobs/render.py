"""The objects that the operator would create for a Workspace in a file, for review and dry runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.api.kinds import Object
from jobs.api.options import Options
from jobs.desired import allowed, names
from jobs.desired import inference as desired_inference
from jobs.desired import tuning as desired_tuning
from jobs.desired.tuning import Desired
from jobs.manifests import group
from jobs.manifests import job as job_manifests
from jobs.manifests import server as server_manifests
from tuning import spec as specs
from tuning.errors import Problem, SpecError
from tuning.spec import documents
from tuning.spec.documents import Document

NO_UID = "00000000-0000-0000-0000-000000000000"


def render(file: Path, options: Options, *, namespace: str) -> list[dict[str, Any]]:
    """The objects in the order of their creation, with a UID of zeros; `-` is the standard input.

    Raises SpecError with all problems of the file, with what the options do not allow, and if the
    Workspace does not fit its GPU: what `python -m tuning check` and the operator say.
    """
    text, origin = specs.read_file(file), file.name
    parsed = specs.parse_workspace(text, origin=origin)
    if parsed.tuning:
        specs.parse(text, origin=origin)  # the ConfigMap as well
    everything = documents.read(text, origin=origin)
    (document,) = (each for each in everything if each.at("kind") == "Workspace")
    workspace = _as_stored(document, namespace)
    if problems := allowed.problems(workspace, options):
        _refuse(problems, document)
    nodes = desired_tuning.node_count(workspace)
    claim = options.storage.for_nodes(nodes).run_volume != "ephemeral"
    server: list[Object] = []
    if parsed.inference:
        served = _desired_server(
            workspace, document, _config_map(everything, document, "inference")
        )
        server = _server_objects(workspace, served, options)
        if not parsed.tuning:
            claim = claim and not options.storage.cached
            return [*_common_objects(workspace, served, options, claim=claim), *server]
    config_map = _config_map(everything, document, "tuning")
    desired = desired_tuning.read(workspace, config_map, None)
    _refuse(desired.problems or desired.fit_problems, document)
    if too_large := job_manifests.size_problem(desired, options, ()):
        raise SpecError([too_large])
    objects = _common_objects(workspace, desired, options, claim=claim)
    if options.network_policy:
        objects.append(job_manifests.network_policy(workspace, desired, options))
    if nodes > 1:
        objects.append(group.service(workspace, desired))
    job = job_manifests.job(workspace, desired, options, claim=claim, earlier=())
    return [*objects, job, *server]


def _desired_server(workspace: Object, document: Document, config_map: Object | None) -> Desired:
    """Raises SpecError."""
    desired = desired_inference.read(workspace, config_map, None)
    _refuse(desired.problems, document)
    if desired.fit_problems:
        hint = desired_inference.fit_hint(desired)
        _refuse([replace(problem, change=hint) for problem in desired.fit_problems], document)
    return desired


def _refuse(problems: Iterable[Problem], document: Document) -> None:
    """Raises SpecError if there are problems, with their lines of the file."""
    lines = {specs.spelled(path): line for path, line in document.lines.items()}
    lines |= {str(path[-1]): line for path, line in document.lines.items() if "/" in str(path[-1:])}
    if found := [
        replace(each, where=f"{each.where} (line {lines[each.where]})")
        if each.where in lines
        else each
        for each in problems
    ]:
        raise SpecError(found)
    return None


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
    """What a run and a server need first: provisioned nodes and the run volume, if any."""
    objects: list[Object] = []
    if names.provisions_node(desired, options):
        objects += [
            job_manifests.node_claim(workspace, desired, options, attempt=1, number=i)
            for i in range(desired.nodes)
        ]
    if claim:
        objects.append(job_manifests.run_claim(workspace, desired, options))
    return objects


def _as_stored(document: Document, namespace: str) -> Object:
    """The Workspace as the API server would store it."""
    workspace: Object = document.value
    meta = {"namespace": namespace} | {
        key: value for key, value in workspace["metadata"].items() if value is not None
    }
    meta |= {"uid": NO_UID, "generation": 1}
    return workspace | {"apiVersion": "kaito.sh/v1beta1", "metadata": meta}


def _config_map(everything: list[Document], workspace: Document, section: str) -> Object | None:
    """The ConfigMap that `tuning` or `inference` names, if it is in the file."""
    name = workspace.at(section, "config")
    for each in everything:
        if each.at("kind") == "ConfigMap" and each.at("metadata", "name") == name and name:
            data, item = each.at("data"), dict(each.value)
            return item | {"data": data if isinstance(data, dict) else {}}
    return None
