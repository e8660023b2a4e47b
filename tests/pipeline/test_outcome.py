"""What a run says of itself."""

import json
from contextlib import suppress
from pathlib import Path

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


def test_each_run_of_a_directory_keeps_what_is_told_of_it(tmp_path, monkeypatch):
    """Runs of other settings take turns, and a kill between any two moves costs nothing."""
    told = tmp_path / "metrics.jsonl"
    (tmp_path / "log").mkdir()

    outcome.take_up(tmp_path, "a1")
    told.write_text("a")
    (tmp_path / "samples.jsonl").write_text("a")
    outcome.take_up(tmp_path, "b2")
    assert not told.exists() and not (tmp_path / "samples.jsonl").exists()
    told.write_text("b")
    move = Path.replace
    for name in ("a1", "b2", "a1", "a1", "b2"):
        for moves in range(3):
            left = [True] * moves  # then it is killed

            def dying(path, target, left=left):
                if not left:
                    raise KeyboardInterrupt
                left.pop()
                return move(path, target)

            with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
                patched.setattr(Path, "replace", dying)
                outcome.take_up(tmp_path, name)
        outcome.take_up(tmp_path, name)
        assert name[0] == told.read_text()
        assert (name == "a1") == (tmp_path / "samples.jsonl").exists()
