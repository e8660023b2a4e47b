"""Options of a run on this machine, from the command line and a Job's mounts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning import presets
from tuning.network.policy import Policy
from tuning.oci import model_image
from tuning.oci.delivery import Access
from tuning.oci.policy import Trust
from tuning.pipeline import watchdog
from tuning.spec import Spec

JOB_SECRETS, JOB_MODELS = Path("/etc/tuning/secrets"), Path("/models")
# whole Secrets, which a projected volume cannot hold
JOB_DATA_SECRET, JOB_TRACKER_SECRET = Path("/etc/tuning-data"), Path("/etc/tuning-trackers")


@dataclass(frozen=True)
class Machines:
    """This machine among those of one job."""

    nodes: int = 1
    node: int = 0  # its number; 0 has the run directory, the others follow it
    meet: str = ""  # HOST:PORT of machine 0, where all meet


@dataclass(frozen=True)
class Options:
    """Where a run finds things on this machine; nothing in it changes the adapter."""

    run_dir: Path
    access: Access = field(default_factory=Access)
    policy: Policy = field(default_factory=Policy)
    data_secrets: Path | None = None  # folder of headers by host, and keys of object stores
    tracker_secrets: Path | None = None  # folder of the trackers' logins
    cache: Path | None = None  # base weights; None: the hub's usual cache
    questions: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()  # what to measure afterwards, in place of the annotation's
    port: int | None = None
    host: str = "127.0.0.1"  # that progress is served on
    ranks: int | None = None  # training processes of this machine; None: one for each GPU
    machines: Machines = field(default_factory=Machines)
    record: Path | None = None  # file to append planned and measured values to
    grace: float = 30.0  # seconds between SIGTERM and SIGKILL, as Kubernetes counts them
    on_step: Callable[[dict[str, Any]], object] | None = None  # gets the records of metrics.jsonl
    watchdog: Callable[[], watchdog.Watchdog] = watchdog.Watchdog  # for each training child


def gather(
    spec: Spec,
    *,
    run_dir: Path | None = None,
    push_secret: Path | None = None,
    pull_secret: Path | None = None,
    hub_token_file: Path | None = None,
    secrets: Path | None = None,
    allow_hosts: tuple[str, ...] = (),
    policy_file: Path | None = None,
    ca: Path | None = None,
    insecure: bool = False,
) -> Options:
    """The options of a command line; secrets not named are taken from where a Job mounts them."""
    mounts = secrets or JOB_SECRETS

    def secret(named: Path | None, name: str) -> Path | None:
        mounted = mounts / name
        return named if named is not None else mounted if mounted.is_dir() else None

    policy = Policy.load(policy_file) if policy_file else Policy()
    token = hub_token_file or secret(None, "hub")
    token = token / "HF_TOKEN" if token and token.is_dir() else token
    return Options(
        run_dir=run_dir or Path("runs") / spec.name,
        access=Access(
            push_secret=secret(push_secret, "push"),
            pull_secret=secret(pull_secret, "pull"),
            ca=ca,
            insecure=insecure,
            hub_token_file=token,
            trust=Trust.of(policy_file),
        ),
        policy=policy.with_hosts(allow_hosts),
        data_secrets=secret(JOB_DATA_SECRET if JOB_DATA_SECRET.is_dir() else None, "data"),
        tracker_secrets=secret(
            JOB_TRACKER_SECRET if JOB_TRACKER_SECRET.is_dir() else None, "trackers"
        ),
        cache=JOB_MODELS if JOB_MODELS.is_dir() else None,
    )


def base_reference(spec: Spec) -> tuple[str, str | None]:
    """Where the base of `spec` is: as `reference` says."""
    return reference(spec.base_model or spec.preset, spec.settings.revision)


def reference(name: str, revision: str | None) -> tuple[str, str | None]:
    """Where the base `name` is: a folder, an image, or a hub id; and its revision on the hub."""
    if Path(name).is_dir() or model_image.is_image(name):
        return name, None
    preset = presets.find(name)
    return source_of(preset, revision) if preset else (name, revision)


def source_of(preset: presets.Preset, revision: str | None) -> tuple[str, str | None]:
    """Where a preset's weights are: its image unless `revision` is set, else the hub."""
    if preset.image and revision is None:
        return preset.image, None
    return preset.hub_id, revision or preset.revision
