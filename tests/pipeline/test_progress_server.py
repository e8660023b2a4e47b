"""A run's progress over HTTP while it lasts."""

import json
import urllib.error
import urllib.request

import pytest

from tuning.errors import SpecError
from tuning.pipeline import progress_server

STEP = {"step": 3, "steps": 12, "loss": 1.5, "tokens_per_second": 1234.5, "eta_seconds": 60}


@pytest.fixture
def get(tmp_path):
    with progress_server.served(tmp_path, name="<demo>", port=0, host="127.0.0.1") as port:
        yield lambda path: urllib.request.urlopen(f"http://127.0.0.1:{port}{path}").read().decode()


def test_before_the_first_step_there_is_an_answer(get):
    """A poll that comes early gets an empty object, not an error."""
    assert {} == json.loads(get("/progress"))
    assert "not training yet" in get("/")


def test_the_last_step_is_served_for_programs_and_for_people(get, tmp_path):
    """JSON, Prometheus text and page tell the same step; names are escaped."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps(STEP | {"loss": 2.5}) + "\n")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(STEP) + "\n")

    assert STEP == json.loads(get("/progress"))
    assert "# TYPE tuning_loss gauge\ntuning_loss 1.5\n" in get("/metrics")
    page = get("/")
    assert "step 3 of 12" in page
    assert "&lt;demo&gt;" in page
    assert 'http-equiv="refresh"' in page


def test_other_paths_are_not_found(get):
    """Nothing of the run directory is served as a file."""
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get("/../metrics.jsonl")


def test_a_taken_port_is_said_so(tmp_path):
    """Two runs on one port: the second is told to choose another."""
    with (
        progress_server.served(tmp_path, name="a", port=0, host="127.0.0.1") as port,
        pytest.raises(SpecError, match=f"port {port} cannot be used"),
        progress_server.served(tmp_path, name="b", port=port, host="127.0.0.1"),
    ):
        pass
