"""What a tracker shows: one curve a run, whatever happens to the run, the server or the files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from fake_mlflow import Mlflow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuning.trackers import tensorboard
from tuning.trackers.feed import Feed, State
from tuning.trackers.values import Point

IDENTITY = "0123456789abcdef"
ENDED = {"ending": "finished", "facts": {"image_digest": "sha256:1"}}


@pytest.fixture(scope="module")
def server() -> Iterator[Mlflow]:
    with Mlflow() as running:
        yield running


@pytest.fixture(autouse=True)
def fresh(server: Mlflow) -> None:
    server.runs, server.experiments, server.fault, server.faults = [], {}, "", []
    server.asked = []


def request(run: Path, tracker: str, *, address: str | None = None, **more: Any) -> dict[str, Any]:
    """What the parent asks of the child of a tracker."""
    (run / "trackers").mkdir(parents=True, exist_ok=True)
    return {
        "tracker": tracker,
        "address": address,
        "trusted": True,
        "secrets": None,
        "ca": None,
        "metrics": str(run / "metrics.jsonl"),
        "state": str(run / "trackers" / f"{tracker}.json"),
        "before": None,
        "run": {
            "identity": IDENTITY,
            "name": "demo-0123",
            "project": None,
            "facts": {"rank": 8},
            "run_dir": str(run),
        },
    } | more


def record(step: int, **more: Any) -> bytes:
    """A line of metrics.jsonl."""
    made = {"step": step, "steps": 9, "epoch": step / 3, "loss": 10.0 - step, "lr": 1e-3}
    return json.dumps(made | more).encode() + b"\n"


def lines(steps: int) -> list[bytes]:
    """Records of so many steps, with an evaluation after each second one."""
    made = []
    for step in range(1, steps + 1):
        made.append(record(step))
        if step % 2 == 0:
            made.append(record(step, eval_loss=5.0 - step))
    return made


def drain(feed: Feed, ended: dict[str, Any] | None = None) -> None:
    while feed.turn(ended):
        pass


LIVES = st.lists(
    st.tuples(
        st.integers(0, 6),  # records that are written
        st.integers(0, 3),  # turns of the child before something happens
        st.sampled_from(["go on", "killed", "killed and resumed", "answer lost", "refused"]),
    ),
    max_size=8,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(LIVES, st.integers(0, 10))
def test_a_run_is_one_curve_whatever_its_life(
    server: Mlflow, tmp_path_factory: pytest.TempPathFactory, lives: Any, cut: int
) -> None:
    """Kills, resumes that write steps again, lost answers and a server that is down: MLflow has
    each step once, and each evaluation once."""
    server.runs, server.experiments, server.faults = [], {}, []
    run = tmp_path_factory.mktemp("run")
    metrics, everything = run / "metrics.jsonl", lines(9)
    asked = request(run, "mlflow", address=server.url)
    feed, written = Feed(asked), 0
    for count, turns, fate in lives:
        with metrics.open("ab") as file:
            file.write(b"".join(everything[written : written + count]))
        written = min(len(everything), written + count)
        server.faults = {"answer lost": ["cut"], "refused": ["refuse"] * 3}.get(fate, [])
        for _ in range(turns):
            feed.turn(None)
        server.faults = []
        if fate.startswith("killed"):
            feed = Feed(asked)
        if fate == "killed and resumed" and metrics.exists():  # cut off to the last checkpoint
            written = max(0, written - cut)
            scratch = run / "scratch"
            scratch.write_bytes(b"".join(everything[:written]))
            scratch.replace(metrics)
    with metrics.open("ab") as file:
        file.write(b"".join(everything[written:]))
    for _ in range(3):
        drain(feed, ENDED)

    assert [(step, 10.0 - step) for step in range(1, 10)] == server.curve("loss")
    assert [(step, 5.0 - step) for step in (2, 4, 6, 8)] == server.curve("eval_loss")
    (shown,) = server.runs
    assert ("FINISHED", "demo-0123", "sha256:1") == (
        shown.status,
        shown.name,
        shown.tags["image_digest"],
    )
    assert feed.state.done


def test_a_run_directory_that_was_lost_goes_on_in_the_same_curve(
    server: Mlflow, tmp_path: Path
) -> None:
    """On an emptyDir all is done again: the server knows the run and the steps that it has."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_bytes(b"".join(lines(4)))
    drain(Feed(request(tmp_path / "a", "mlflow", address=server.url)))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_bytes(b"".join(lines(6)))

    drain(Feed(request(tmp_path / "b", "mlflow", address=server.url)), ENDED)

    assert list(range(1, 7)) == [step for step, _ in server.curve("loss")]


def test_a_run_that_was_deleted_at_the_server_begins_anew(server: Mlflow, tmp_path: Path) -> None:
    """The state in the run directory names a run that is no more: all steps go to a new one."""
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines(3)))
    asked = request(tmp_path, "mlflow", address=server.url)
    drain(Feed(asked))
    server.runs[0].stage = "deleted"

    drain(Feed(asked), ENDED)

    assert [1, 2, 3] == [m["step"] for m in server.runs[1].metrics if m["key"] == "loss"]


def test_another_recipe_in_the_same_directory_is_another_run(
    server: Mlflow, tmp_path: Path
) -> None:
    """What was sent of the first one does not count, and its last records are not the second's."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(b"".join(lines(5)))
    drain(Feed(request(tmp_path, "mlflow", address=server.url)), ENDED)
    stat = metrics.stat()
    asked = request(tmp_path, "mlflow", address=server.url, before=[stat.st_size, stat.st_mtime_ns])
    asked["run"]["identity"] = "f" * 16
    feed = Feed(asked)

    drain(feed)
    assert 1 == len(server.runs)
    metrics.write_bytes(record(1, loss=7.0))
    drain(feed, ENDED)

    assert [7.0] == [m["value"] for m in server.runs[1].metrics if m["key"] == "loss"]


def test_lines_that_are_torn_damaged_or_without_numbers_are_left_out(
    server: Mlflow, tmp_path: Path
) -> None:
    """A loss that is null, NaN, a text or too large; half a line waits for its end."""
    odd = [
        record(2, loss=None),
        record(3, loss="x"),
        record(4, loss=float("nan")),
        b"{\n",
        b"[1]\n",
    ]
    metrics = tmp_path / "metrics.jsonl"
    half = record(5)
    metrics.write_bytes(record(1) + b"".join(odd) + half[:9])
    feed = Feed(request(tmp_path, "mlflow", address=server.url))
    drain(feed)
    with metrics.open("ab") as file:
        file.write(half[9:])
    drain(feed, ENDED)

    assert [1, 5] == [step for step, _ in server.curve("loss")]


@pytest.mark.parametrize("fault", ["refuse", "cut"])
def test_what_keeps_a_tracker_from_being_fed_is_one_line(
    server: Mlflow, tmp_path: Path, fault: str
) -> None:
    """The problem is in the state, the pause grows, and a later turn mends it."""
    (tmp_path / "metrics.jsonl").write_bytes(record(1))
    server.fault = fault
    feed = Feed(request(tmp_path, "mlflow", address=server.url))
    pauses = []
    for _ in range(7):
        assert not feed.turn(None)
        pauses.append(feed.pause)
    problem = State.read(tmp_path / "trackers" / "mlflow.json").problem
    server.fault = ""
    drain(feed, ENDED)

    assert [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0] == pauses
    assert problem
    assert "\n" not in problem
    assert feed.state.done
    assert feed.state.problem == ""


LOGINS = [
    ({"MLFLOW_TRACKING_TOKEN": "s3cret"}, "Bearer s3cret"),
    (
        {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "s3cret"},
        "Basic bWU6czNjcmV0",
    ),
    ({}, None),
]


@pytest.mark.parametrize(("secret", "header"), LOGINS)
def test_a_login_comes_from_the_mounted_secret_and_is_written_nowhere(
    server: Mlflow, tmp_path: Path, secret: dict[str, str], header: str | None
) -> None:
    """Each key of the Secret is a file; requests carry it, and no file of the run does."""
    secrets, run = tmp_path / "secrets", tmp_path / "run"
    secrets.mkdir()
    run.mkdir()
    for name, value in secret.items():
        (secrets / name).write_text(value + "\n")
    (run / "metrics.jsonl").write_bytes(record(1))
    drain(Feed(request(run, "mlflow", address=server.url, secrets=str(secrets))), ENDED)

    assert {header} == {headers.get("authorization") for _, headers in server.asked}
    for path in run.rglob("*"):
        assert path.is_dir() or b"s3cret" not in path.read_bytes()


def test_a_private_address_that_a_document_names_is_not_connected_to(
    server: Mlflow, tmp_path: Path
) -> None:
    """Unless the policy allows the host: a Workspace reaches no service of the cluster."""
    (tmp_path / "metrics.jsonl").write_bytes(record(1))
    policy = {"trusted": False, "allow_hosts": [], "proxy": None, "no_proxy": [], "ca_bundle": None}
    asked = request(tmp_path, "mlflow", address=server.url, **policy)
    feed = Feed(asked)
    drain(feed)

    assert [] == server.asked
    assert "--allow-host" in feed.state.problem
    drain(Feed(asked | {"allow_hosts": ["127.0.0.1"]}))
    assert [(1, 9.0)] == server.curve("loss")


# TensorBoard


def events(folder: Path) -> list[tuple[int, list[str]]]:
    """Step and tags of each event, read by the format's rules with Google's checksum."""
    (path,) = folder.glob("events.out.tfevents.*")
    data, found = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event = data[12 : 12 + size]
        for part, check in ((data[:8], data[8:12]), (event, data[12 + size : 16 + size])):
            crc = google_crc32c.value(part)
            assert struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF) == check
        data = data[16 + size :]
        if b"brain.Event:2" not in event:
            step, shift, rest = 0, 0, event[10:]
            for byte in rest:
                step, shift = step | (byte & 127) << shift, shift + 7
                if byte < 128:
                    break
            found.append(
                (step, [tag for tag in ("train/loss", "eval/loss") if tag.encode() in event])
            )
    return found


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 14), st.integers(0, 200))
def test_an_event_file_that_a_kill_cut_off_goes_on_where_it_is_whole(
    tmp_path_factory: pytest.TempPathFactory, before: int, cut: int
) -> None:
    """Whatever of the file is left, each step is in it once, and its checksums are right."""
    run = tmp_path_factory.mktemp("run")
    everything = lines(300)[:14]
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(b"".join(everything[:before]))
    asked = request(run, "tensorboard")
    drain(Feed(asked))
    for path in (run / "tensorboard").rglob("events.*"):
        path.write_bytes(path.read_bytes()[: -cut or None])
    metrics.write_bytes(b"".join(everything))

    drain(Feed(asked), ENDED)

    found = events(run / "tensorboard" / "demo-0123")
    points = [Point.of(json.loads(line)) for line in everything]
    expected = [(p.step, ["eval/loss" if p.evaluation else "train/loss"]) for p in points]
    assert expected == found


@pytest.mark.parametrize("step", [0, 1, 127, 128, 300, 2**31])
def test_steps_of_any_size_and_losses_of_any_are_written(tmp_path: Path, step: int) -> None:
    """Varints of several bytes, and a float that four bytes cannot hold."""
    from tuning.trackers.values import Identity

    run = Identity(IDENTITY, "demo", None, {}, tmp_path)
    made = tensorboard.TensorBoard(tmp_path, run)
    made.send([Point(step, {"loss": 1e300})])
    made.close("finished", {})

    assert [(step, ["train/loss"])] == events(tmp_path)
    assert (step, 0) == tensorboard.TensorBoard(tmp_path, run).sent
