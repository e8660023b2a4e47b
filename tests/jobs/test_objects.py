"""What pods, Jobs and machines say of themselves, hostile and broken answers included."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from jobs.api.kinds import Object
from jobs.api.options import Nodes, Options
from jobs.desired import tuning as desired_tuning
from jobs.observed import objects, status
from jobs.observed.phase import Observed, Phase, phase_of
from jobs.observed.readiness import readiness_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SILENT = [("Launched", "True", ""), ("Registered", "Unknown", "not seen")]
DIGEST = "sha256:" + "ab" * 32


def pod(state: Object | None = None, *, phase: str = "", **more: Any) -> Object:
    """A pod with one engine container in `state`."""
    statuses = [{"name": "tuning", "state": state or {}}]
    return {
        "metadata": {"name": "p", "uid": "1", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"nodeName": "n"},
        "status": {"phase": phase, "containerStatuses": statuses} | more,
    }


def ended(code: int, message: str = "", reason: str = "Error", **more: Any) -> Object:
    return pod({"terminated": {"exitCode": code, "message": message, "reason": reason}}, **more)


def job(*conditions: tuple[str, str], **spec: Any) -> Object:
    found = [
        {
            "type": kind,
            "status": "True",
            "reason": why,
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
        for kind, why in conditions
    ]
    meta = {"name": "j", "uid": "2", "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {"metadata": meta, "spec": spec, "status": {"conditions": found}}


@pytest.mark.parametrize(
    "message",
    [
        "",
        "not json",
        "[1, 2]",
        "null",
        '{"step": "3", "code": true, "digest": "sha256:short"}',
        '{"digest": ["sha256:"], "loss": NaN, "step": 1e999, "peakMemoryBytes": -Infinity}',
        '{"step": 99999999999999999999999999}',
        '{"digest": "' + DIGEST[:-1] + 'G"}',
        '{"baseRevision": "refs/pr/1"}',
        '{"baseRevision": ["' + "a" * 40 + '"]}',
        '{"cut off": "in the mid',
        "\x00\x1b[2J" * 1000,
    ],
)
def test_what_is_no_answer_of_the_engine_counts_for_nothing(message: str) -> None:
    """Empty, no JSON, of other types, not finite, beyond all numbers: no field, no exception."""
    assert {} == objects.termination_message(ended(1, message))


def test_markup_control_characters_and_secrets_of_an_answer_are_taken_out() -> None:
    """One line of printable text, at most a thousand characters, no query of a URL."""
    told = {
        "reason": "Data\nUnusable<script>",
        "message": "\x1b[31mred\x07 \u202e https://x.example/a?sig=secret " + "x" * 5000,
        "step": 3,
    }
    found = objects.termination_message(ended(10, json.dumps(told)))

    assert "\x1b" not in found["message"] and "\u202e" not in found["message"]
    assert "secret" not in found["message"]
    assert len(found["message"]) == objects.LONGEST
    cause = objects.failure(job(("Failed", "BackoffLimitExceeded")), (ended(10, json.dumps(told)),))
    assert "DataUnusablescript" == cause.reason


@pytest.mark.parametrize(
    ("found", "pods", "reason", "words"),
    [
        (
            job(("Failed", "DeadlineExceeded")),
            (ended(75),),
            "DeadlineExceeded",
            "longer than its deadline",
        ),
        (job(("Failed", "PodFailurePolicy")), (ended(10),), "DataUnusable", "exit code 10"),
        (job(("Failed", "BackoffLimitExceeded")), (), "BackoffLimitExceeded", "no pod"),
        (job(("Failed", "x")), (ended(137, reason="OOMKilled"),), "OutOfMemory", "kernel killed"),
        (job(("Failed", "x")), (ended(139),), "Killed", "exit code 139"),
        (
            job(("Failed", "x")),
            (
                ended(137, reason="Error")
                | {"status": {"reason": "Evicted", "message": "disk low"}},
            ),
            "PodEvicted",
            "disk low",
        ),
        (job(("Failed", "x")), (ended(10), ended(13)), "DataUnusable", "exit code 10"),
    ],
)
def test_why_a_job_failed(found: Object, pods: tuple[Object, ...], reason: str, words: str) -> None:
    """From the Job's condition and the last pod that ended; a permanent code fails it at once."""
    cause = objects.failure(found, pods)

    assert reason == cause.reason
    assert words in cause.message


REFUSED = [
    ("UnexpectedAdmissionError", "Allocate failed due to no healthy devices present"),
    ("OutOfnvidia.com/gpu", "Node didn't have enough resource: nvidia.com/gpu"),
    ("NodeAffinity", "Predicate NodeAffinity failed"),
    ("Preempting", "Preempted in order to admit critical pod"),
    ("Terminated", "Pod was terminated in response to imminent node shutdown."),
    ("TopologyAffinityError", "Resources cannot be allocated with Topology locality"),
    ("", "AppArmor is not enabled on the host"),
    ("NodeShutdown", ""),
]


@pytest.mark.parametrize(("reason", "message"), REFUSED)
def test_a_pod_that_the_kubelet_refuses_says_so_everywhere(reason: str, message: str) -> None:
    """It has no container that could: the words of its own status are told when the Job failed,
    while it goes on, and for a server."""
    refused = pod(phase="Failed", reason=reason, message=message)
    refused["status"]["containerStatuses"] = []
    cause = objects.failure(job(("Failed", "BackoffLimitExceeded")), (refused,))
    assert objects.condition_reason(reason or "PodFailed") == cause.reason
    words = message or "NodeShutdown"
    assert words in cause.message
    _, told = phase_and_status(observed(job=job(), pods=(refused,)))
    assert f"try 1 failed: {cause.message}" in condition(told, "JobStarted")["message"]
    server = desired_tuning.Server("phi-4", ())
    readiness = readiness_of((refused,), None, None, server, recorded={})
    assert not readiness.answers and words in readiness.cause.message


@pytest.mark.parametrize("reason", ["PreemptionByScheduler", "EvictionByEvictionAPI"])
def test_who_ended_a_pod_is_told_with_how_it_ended(reason: str) -> None:
    """A preemption or a drain, beside the engine's own words and while it saves its state."""
    target = [{"type": "DisruptionTarget", "status": "True", "reason": reason, "message": "by x"}]
    stopped = json.dumps({"reason": "Stopped", "message": "RUN-110: stopped"})
    last = ended(75, stopped, conditions=target)
    _, told = phase_and_status(observed(job=job(), pods=(last,)))
    message = "try 1 was stopped: RUN-110: stopped (by x); the next starts"
    assert message == condition(told, "JobStarted")["message"]
    saving = pod({"running": {}}, conditions=target)
    saving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    _, told = phase_and_status(observed(job=job(), pods=(saving,)))
    assert "saves its state (by x)" in condition(told, "WorkspaceSucceeded")["message"]


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("ErrImagePull", "ImagePullError"),
        ("ImagePullBackOff", "ImagePullError"),
        ("InvalidImageName", "ImagePullError"),
        ("ErrImageNeverPull", "ImagePullError"),
        ("CreateContainerConfigError", "ContainerStartError"),
        ("CreateContainerError", "ContainerStartError"),
        ("RunContainerError", "ContainerStartError"),
    ],
)
def test_why_a_pod_does_not_start(reason: str, word: str) -> None:
    """The kubelet's reason in KAITO's words, with its message."""
    found = objects.waiting(pod({"waiting": {"reason": reason, "message": "image x"}}), None)

    assert found and (word, "image x") == (found.reason, found.message)


def test_a_pod_without_a_node_says_what_the_scheduler_says() -> None:
    """Nodes without a GPU or its driver offer none, in the scheduler's own words."""
    text = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    conditions = [{"type": "PodScheduled", "status": "False", "message": text}]
    found = objects.waiting(pod(conditions=conditions), None)

    assert found and ("Unschedulable", text) == (found.reason, found.message)


@pytest.mark.parametrize(
    ("claim", "age", "state", "words"),
    [
        ([], 10, "waiting", "requested"),
        ([("Launched", "False", "no quota")], 10, "waiting", "no quota"),
        ([("Launched", "False", "no quota")], 301, "failed", "not launched within 300 s: no quota"),
        (SILENT, 301, "waiting", "not seen"),
        (SILENT, 901, "failed", "did not become ready within 900 s: not seen"),
        ([("Ready", "True", "")], 9999, "ready", ""),
    ],
)  # fmt: skip
def test_a_machine_has_its_time(
    claim: list[tuple[str, str, str]], age: int, state: str, words: str
) -> None:
    """To be launched, and then to become a node; the cloud's words are kept."""
    conditions = [{"type": k, "status": v, "message": m} for k, v, m in claim]
    meta = {"creationTimestamp": objects.format_time(NOW - timedelta(seconds=age))}
    item = {"metadata": meta, "status": {"conditions": conditions}}
    word, message = objects.node_claim_state(item, Nodes(), NOW)

    assert state == word
    assert words in message


# where a Workspace stands


def observed(**more: Any) -> Observed:
    workspace = {
        "metadata": {"name": "w", "namespace": "n", "uid": "u", "generation": 1},
        "tuning": {"output": {}},
    }
    return Observed(workspace, desired_tuning.Desired("rev", None), NOW, **more)


def condition(found: Object, kind: str) -> Object:
    return next(each for each in found["conditions"] if each["type"] == kind)


def phase_and_status(at: Observed) -> tuple[Phase, Object]:
    phase = phase_of(at, Options())
    return phase, status.status(at, phase, Options())


def test_a_suspended_job_waits_in_its_queue() -> None:
    """Kueue holds it back, or takes it back in the middle: Pending, reason Queued."""
    for found in (job(suspend=True), job(("Suspended", "JobSuspended"))):
        phase, told = phase_and_status(observed(job=found))
        assert ("queued", "Pending") == (phase.name, told["state"])
        assert "Queued" == condition(told, "JobStarted")["reason"]


@pytest.mark.parametrize(
    ("more", "spec", "reason"),
    [
        ({"conditions": [{"type": "Ready", "status": "Unknown"}]}, {}, "NodeLost"),
        ({"reason": "NodeLost"}, {}, "NodeLost"),
        ({}, {"parallelism": 3}, "JobEdited"),
        ({}, {"parallelism": 1}, "workspacePending"),
    ],
)
def test_a_run_that_is_unwell_says_so_and_stays_running(
    more: Object, spec: Object, reason: str
) -> None:
    """A silent node, an edited Job: told, and nothing is done that would make two writers."""
    at = observed(job=job(**spec), pods=(pod({"running": {}}, **more),))
    phase, told = phase_and_status(at)

    assert ("running", "Running") == (phase.name, told["state"])
    assert reason == condition(told, "WorkspaceSucceeded")["reason"]


def test_a_message_without_end_is_cut() -> None:
    """The API takes 32768 characters of a condition's message; ours has far fewer."""
    long = ended(1, json.dumps({"reason": "X", "message": "m" * 100_000, "hint": "h" * 100_000}))
    _, told = phase_and_status(observed(job=job(("Failed", "x")), pods=(long,)))

    assert all(len(each["message"]) < 32768 for each in told["conditions"])
    assert len(json.dumps(told)) < 32768


PAGE = "https://mlflow.example.com/#/experiments/1/runs/0a"


def test_the_page_of_a_run_at_its_tracker_is_in_the_status() -> None:
    """While it runs, from its progress; when it has ended, from its last message; then it stays."""
    running = observed(
        job=job(), pods=(pod({"running": {}}),), progress={"trackers": {"mlflow": PAGE}}
    )
    message = json.dumps({"trackers": {"mlflow": PAGE}, "step": 3, "steps": 3, "digest": DIGEST})
    over = observed(job=job(("Complete", "x")), pods=(ended(0, message, reason="Completed"),))

    assert {"mlflow": PAGE} == phase_and_status(running)[1]["trackers"]
    assert {"mlflow": PAGE} == phase_and_status(over)[1]["trackers"]


@pytest.mark.parametrize(
    "told",
    [
        *(None, [], "https://x", {"mlflow": None}, {"mlflow": ["https://x"]}, {"other": PAGE}),
        {"mlflow": "javascript:alert(1)"},
        {"mlflow": "https://user:password@x"},
        {"mlflow": "https://x/" + "a" * 10_000},
        {"mlflow": "https://x/\u202e"},
        {"wandb": "https://x/a b"},
        {"mlflow": "https://x\n"},
    ],
)
def test_a_page_that_a_pod_makes_up_is_not_in_the_status(told: Any) -> None:
    """A pod runs what a tenant named: only known trackers, and addresses of the web."""
    for progress, message in (({"trackers": told}, {}), (None, {"trackers": told})):
        last = ended(1, json.dumps(message | {"step": 1, "steps": 2}))
        _, status_now = phase_and_status(observed(job=job(), pods=(last,), progress=progress))
        assert "trackers" not in status_now


@pytest.mark.parametrize(
    "record",
    [
        {"step": float("nan"), "steps": 4},
        {"step": 1, "steps": -4},
        {"step": 1 << 80},
        {"step": True},
        {"steps": 4},
        {},
    ],
)
def test_a_progress_that_is_none_changes_nothing(record: Object) -> None:
    """A pod's answer is a stranger's: what is no count is passed over; nothing divides by it."""
    at = observed(job=job(), pods=(pod({"running": {}}),), progress=record)
    _, told = phase_and_status(at)

    assert "progress" not in told
    good = observed(
        job=job(),
        pods=(pod({"running": {}}),),
        progress={"step": 1, "steps": 0, "loss": float("inf"), "eta_seconds": -5},
    )
    assert {"text": "1", "step": 1, "steps": 0, "etaSeconds": -5} == phase_and_status(good)[1][
        "progress"
    ]


def test_memory_and_disk_follow_what_the_job_will_hold() -> None:
    """A process for each GPU in main memory; QLoRA's packed weights beside the published ones."""
    from types import SimpleNamespace

    weights = 16 << 30
    one, eight = (
        desired_tuning.Desired("rev", None, weights_bytes=weights, gpus=count) for count in (1, 8)
    )
    assert eight.memory_bytes - one.memory_bytes == 7 * (4 << 30)
    lora, qlora = (
        desired_tuning.Desired("rev", SimpleNamespace(method=method), weights_bytes=weights)
        for method in ("lora", "qlora")
    )
    packed = qlora.run_bytes() - lora.run_bytes()
    assert weights / 4 < packed < weights / 2
    assert qlora.run_bytes(cached=True) == lora.run_bytes(cached=True)
