"""Where trackers are and with which login: refused at once, with what to do on this command."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from commands import tuning, workspace

from tuning import process, spec
from tuning.errors import SpecError
from tuning.network.policy import Policy
from tuning.pipeline import journal
from tuning.trackers import place

PUBLIC = "https://mlflow.example.com"


def read(folder: Path, **settings: Any) -> spec.Spec:
    return spec.load(workspace(folder / "demo.yaml", settings=settings))


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No tracker's variables, and no login of `wandb login`."""
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name != "gone" else None)


def codes(found: spec.Spec, policy: Policy | None = None, secrets: Path | None = None) -> list[str]:
    try:
        place.refuse(found, policy or Policy(), secrets)
    except SpecError as error:
        return [problem.code for problem in error.problems]
    return []


HOSTS = frozenset({"mlflow.mlops:5000"})
CASES: list[tuple[dict[str, Any], Policy, list[str]]] = [
    ({"report_to": "none"}, Policy(), []),
    ({"report_to": "tensorboard"}, Policy(), []),
    ({"report_to": "mlflow"}, Policy(), ["TRACK-102"]),
    ({"report_to": "wandb"}, Policy(), ["TRACK-104"]),
    ({"report_to": ["mlflow", "wandb"]}, Policy(), ["TRACK-102", "TRACK-104"]),
    ({"report_to": "mlflow", "mlflow_tracking_uri": PUBLIC}, Policy(), []),
    ({"report_to": "mlflow", "mlflow_tracking_uri": "http://10.0.0.7"}, Policy(), ["TRACK-103"]),
    ({"report_to": "mlflow", "mlflow_tracking_uri": "http://localhost"}, Policy(), ["TRACK-103"]),
    (
        {"report_to": "mlflow", "mlflow_tracking_uri": "http://169.254.169.254"},
        Policy(),
        ["TRACK-103"],
    ),
    ({"mlflow_tracking_uri": "http://10.0.0.7"}, Policy(), []),  # nobody asks it
    (
        {"report_to": "mlflow", "mlflow_tracking_uri": "http://mlflow.mlops:5000"},
        Policy(allow_hosts=HOSTS),
        [],
    ),
    (
        {"report_to": "mlflow", "mlflow_tracking_uri": "http://mlflow.example.com"},
        Policy(plain_http=False),
        ["TRACK-103"],
    ),
]


@pytest.mark.parametrize(("settings", "policy", "expected"), CASES)
def test_a_tracker_that_cannot_be_fed_is_refused_before_the_run(
    settings: dict[str, Any], policy: Policy, expected: list[str], tmp_path: Path
) -> None:
    """No address, no key, a private address that nobody allowed: all problems in one pass."""
    assert expected == codes(read(tmp_path, **settings), policy)


def test_the_environment_of_the_one_who_runs_it_is_trusted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MLFLOW_TRACKING_URI may be private; the same address from a mounted Secret may not."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    found = read(tmp_path, report_to="mlflow")
    secrets = tmp_path / "secrets"
    secrets.mkdir()

    assert [] == codes(found)
    (secrets / "MLFLOW_TRACKING_URI").write_text("http://127.0.0.1:5000\n")
    assert ["TRACK-103"] == codes(found, secrets=secrets)
    (secrets / "MLFLOW_TRACKING_URI").write_text("sqlite:///mlflow.db\n")
    assert ["TRACK-102"] == codes(found, secrets=secrets)
    (secrets / "MLFLOW_TRACKING_URI").write_bytes(b"\xff")
    assert ["TRACK-105"] == codes(found, secrets=secrets)


def test_a_login_is_not_sent_in_clear_text(tmp_path: Path) -> None:
    """A token beside a public http:// address is refused, and is fine where the host is allowed."""
    url = "http://mlflow.example.com"
    found = read(tmp_path, report_to="mlflow", mlflow_tracking_uri=url)
    (tmp_path / "MLFLOW_TRACKING_TOKEN").write_text("s3cret")

    assert ["TRACK-103"] == codes(found, secrets=tmp_path)
    assert [] == codes(found, Policy(allow_hosts={"mlflow.example.com"}), tmp_path)


@pytest.mark.parametrize("login", ["WANDB_API_KEY", "WANDB_MODE", "netrc", "secret"])
def test_wandb_needs_a_key_or_no_server(
    login: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A variable, the Secret, what `wandb login` wrote, or offline."""
    found = read(tmp_path, report_to="wandb")
    assert ["TRACK-104"] == codes(found)
    if login == "netrc":
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password s3cret\n")
    elif login == "secret":
        (tmp_path / "WANDB_API_KEY").write_text("s3cret")
    else:
        monkeypatch.setenv(login, "offline")

    assert [] == codes(found, secrets=tmp_path)


@pytest.mark.parametrize("name", place.PACKAGES)
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And MLflow and TensorBoard need none."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("WANDB_MODE", "offline")

    with pytest.raises(SpecError, match=rf"TRACK-101 .*pip install 'tuning-jobs\[{name}\]'"):
        place.refuse(read(tmp_path, report_to=name), Policy(), None)
    assert [] == codes(read(tmp_path, report_to="tensorboard"))


def test_plan_refuses_it_too_and_lets_a_secret_of_the_cluster_speak(tmp_path: Path) -> None:
    """`plan` knows no mounted Secret: where the Workspace names one, the Job finds the login."""
    file = workspace(tmp_path / "demo.yaml", settings={"report_to": "mlflow"})
    more = ("--base-model", "examples/tiny-model")

    refused = tuning("plan", "-f", file, *more)
    text = file.read_text().replace(
        "  name: demo\n", "  name: demo\n  annotations: {tuning.kaito.sh/tracker-secret: logins}\n"
    )
    file.write_text(text)
    planned = tuning("plan", "-f", file, *more)

    assert 11 == refused.returncode
    assert "TRACK-102" in refused.stderr
    assert 0 == planned.returncode, planned.stderr


def test_no_other_child_of_a_run_gets_a_trackers_login(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and data children have no WANDB_API_KEY; the tracker's own child alone has it."""
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "s3cret")

    assert "s3cret" not in process.clean_environment().values()
    assert {"WANDB_API_KEY"} == place.environment("wandb").keys() - {"WANDB_MODE"}
    assert "WANDB_API_KEY" not in place.environment("mlflow")


@pytest.mark.parametrize("name", ["trackers", "tensorboard", "wandb", "trackio"])
def test_a_folder_of_a_tracker_that_is_a_link_is_refused(name: str, tmp_path: Path) -> None:
    """Nothing is written through a link; the clients' own links inside their stores may be."""
    (tmp_path / "elsewhere").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SpecError, match="RUN-105"):
        journal.refuse_links(run)
    (run / name).unlink()
    (run / name).mkdir()
    journal.refuse_links(run)
