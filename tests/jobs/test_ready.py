"""The summary of a Workspace for tools that know nothing else of it: Ready, Stalled and so on."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from cluster.world import workspace

from jobs.api import crd
from jobs.api.kinds import Object
from jobs.api.options import Options
from jobs.controller.reconcile import _transitions
from jobs.desired import inference as desired_inference
from jobs.desired import tuning as desired_tuning
from jobs.observed import conditions
from jobs.observed.objects import Cause
from jobs.observed.phases import Observed, Phase, PhaseName
from jobs.observed.status import status

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 1, 1, tzinfo=UTC)
SCRIPT = yaml.safe_load((ROOT / "configs/deploy/argocd/argocd-cm.yaml").read_text())["data"][
    "resource.customizations.health.kaito.sh_Workspace"
]
FAILED = {"invalid", "conflict", "unfit", "unprovisioned", "stuck", "failed"}
DONE = {"succeeded", "ready"}


def stored(*, serves: bool = False, both: bool = False) -> Object:
    item = workspace("phi", "team")
    item["metadata"] |= {"uid": "1-2-3", "generation": 4}
    if serves:
        del item["tuning"]
    if serves or both:
        item["inference"] = {"preset": {"name": "phi-3-mini-4k-instruct"}} if serves else {}
    return item


def after(item: Object, name: PhaseName, reason: str = "SomeReason") -> Object:
    """The Workspace with the status of a phase."""
    serves = "tuning" not in item
    read = desired_inference.read if serves else desired_tuning.read
    observed = Observed(item, read(item, None, None), NOW, serving=serves)
    phase = Phase(name, Cause(reason, "what happened", "what to change"))
    return item | {"status": status(observed, phase, Options())}


def kstatus(item: Object) -> str:
    """As sigs.k8s.io/cli-utils computes it for a custom resource."""
    found = item.get("status") or {}
    if item["metadata"].get("deletionTimestamp"):
        return "Terminating"
    if (
        found.get("observedGeneration", item["metadata"]["generation"])
        != (item["metadata"]["generation"])
    ):
        return "InProgress"
    by_type = {each["type"]: each["status"] for each in found.get("conditions") or []}
    if by_type.get("Reconciling") == "True":
        return "InProgress"
    if by_type.get("Stalled") == "True":
        return "Failed"
    return "Current" if by_type.get("Ready", "True") == "True" else "InProgress"


def health(item: Object) -> dict[str, str]:
    """What the script for Argo CD says, by any interpreter of Lua on this machine."""
    try:
        import lupa
    except ImportError:
        lua = next(filter(None, map(shutil.which, ("lua5.4", "lua5.3", "lua", "luajit"))), None)
        if lua is None:
            pytest.skip("no interpreter of Lua: the script for Argo CD is not run here")
        text = (
            f"obj = {table(item)}\nlocal function f()\n{SCRIPT}\nend\n"
            'local h = f()\nprint(h.status .. "\\n" .. h.message)'
        )
        done = subprocess.run([lua, "-"], input=text, text=True, capture_output=True, check=True)
        first, _, rest = done.stdout.partition("\n")
        return {"status": first, "message": rest.strip()}
    runtime = lupa.LuaRuntime()
    found = runtime.execute(f"obj = {table(item)}\n{SCRIPT}")
    return {"status": found.status, "message": found.message}


def table(value: Any) -> str:
    """A value as a literal of Lua."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"[{json.dumps(k)}] = {table(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "{" + ", ".join(map(table, value)) + "}"
    return "nil" if value is None else json.dumps(value, ensure_ascii=False)


PHASES = [name for name in get_args(PhaseName) if name != "finished"]
SERVES = ("deploying", "starting", "unready", "ready", "invalid", "conflict", "unprovisioned")
BOTH = [(name, serves) for serves in (False, True) for name in PHASES
        if (name in SERVES if serves else name not in SERVES[:4])]  # fmt: skip


@pytest.mark.parametrize(("name", "serves"), BOTH)
def test_every_phase_has_its_summary(name: PhaseName, serves: bool) -> None:
    """Ready exactly at a good end; Stalled where somebody must act; else Reconciling."""
    item = after(stored(serves=serves), name)
    by_type = {each["type"]: each for each in item["status"]["conditions"]}
    is_stalled = name in FAILED or name == "unready"

    assert str(name in DONE) == by_type["Ready"]["status"]
    assert is_stalled == ("Stalled" in by_type)
    assert (name not in DONE and not is_stalled) == ("Reconciling" in by_type)
    expected = "Current" if name in DONE else "Failed" if is_stalled else "InProgress"
    assert expected == kstatus(item)
    for kind in conditions.SUMMARY:
        assert kind not in by_type or (by_type[kind]["reason"] and by_type[kind]["message"])
    if is_stalled:
        assert "what happened" in by_type["Stalled"]["message"]
        assert "what to change" in by_type["Stalled"]["message"]


@pytest.mark.parametrize(("name", "serves"), BOTH)
def test_argo_cd_says_the_same(name: PhaseName, serves: bool) -> None:
    """Healthy, Degraded with the message, or Progressing."""
    item = after(stored(serves=serves), name)
    expected = {"Current": "Healthy", "Failed": "Degraded", "InProgress": "Progressing"}

    assert expected[kstatus(item)] == health(item)["status"]
    item["metadata"] = item["metadata"] | {"generation": 5}
    assert "Progressing" == health(item)["status"]
    del item["status"]
    assert "Progressing" == health(item)["status"]


def test_the_script_names_only_conditions_that_exist() -> None:
    """A slip of the pen would make all Workspaces progress for ever."""
    known = {*conditions.OURS, "WorkspaceDeleting"}

    for name in ("Stalled", "Ready", "WorkspaceDeleting"):
        assert f"found.{name}" in SCRIPT and name in known


def test_a_fresh_adapter_that_is_to_be_served_is_not_ready_yet() -> None:
    """After the tuning the server follows."""
    assert "InProgress" == kstatus(after(stored(both=True), "succeeded"))
    assert "Current" == kstatus(after(stored(), "succeeded"))


def test_a_config_map_that_comes_later_is_waited_for() -> None:
    """Tools that apply both at once must not give up on the first look."""
    assert "InProgress" == kstatus(after(stored(), "invalid", "ConfigMapNotFound"))
    assert "Failed" == kstatus(after(stored(), "invalid", "SpecInvalid"))


@pytest.mark.parametrize("value", ["True", "False"])
def test_what_ended_under_an_earlier_operator_gets_its_summary(value: str) -> None:
    """From the conditions that it has; nothing runs again."""
    item = stored()
    old = {"type": "WorkspaceSucceeded", "status": value, "reason": "r", "message": "why"}
    old |= {"lastTransitionTime": "2026-01-01T00:00:00Z"}
    desired = desired_tuning.read(item, None, None)
    item["status"] = {"revision": desired.revision, "conditions": [old], "observedGeneration": 4}
    found = item | {"status": status(Observed(item, desired, NOW), Phase("finished"), Options())}

    assert ("Current" if value == "True" else "Failed") == kstatus(found)


def test_the_summary_makes_no_events_of_its_own() -> None:
    """The condition that it repeats has made one."""
    item = after(stored(), "failed")
    others = [e for e in item["status"]["conditions"] if e["type"] not in conditions.SUMMARY]

    assert _transitions({}, item["status"] | {"conditions": others}) == (
        _transitions({}, item["status"])
    )
    assert len(others) < len(item["status"]["conditions"])


def test_the_column_of_each_version_of_kaito_is_there() -> None:
    """WorkspaceReady as in v1alpha1, WorkspaceSucceeded as in v1beta1."""
    for version in crd.definition()["spec"]["versions"]:
        paths = {c["name"]: c["jsonPath"] for c in version["additionalPrinterColumns"]}
        assert ".status.ready" == paths["WorkspaceReady"]
        assert "WorkspaceSucceeded" in paths["WorkspaceSucceeded"]
