"""What a run says of itself."""

import json

from tuning.errors import DataError, Problem
from tuning.pipeline import outcome


def test_the_termination_message_fits_and_says_what_to_do():
    """However many problems there are, the JSON is whole and at most 4096 bytes."""
    error = DataError(
        Problem(f"DATA-{n}", f"t.jsonl line {n}", 'is "é\\n' * 9, "mend it")
        for n in range(200, 300)
    )

    message = outcome.failed(
        "fetch", error, {"step": 3, "steps": 9, "loss": 1.5}
    ).termination_message()

    assert len(message.encode()) <= 4096
    record = json.loads(message)
    assert ("fetch", 10, "DataUnusable", False) == (
        record["phase"],
        record["code"],
        record["reason"],
        record["retryable"],
    )
    assert (3, 9, 1.5) == (record["step"], record["steps"], record["loss"])
    assert "mend it." == record["hint"]
    assert record["message"].startswith("DATA-200 t.jsonl line 200")


def test_progress_is_the_last_complete_line(tmp_path):
    """A line that is being written is not read; nothing written yet is None."""
    assert outcome.progress(tmp_path) is None
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')

    assert {"step": 2, "loss": 2.0} == outcome.progress(tmp_path)
