"""A run's parent stays small beside its training child: it lives as long as that does."""

import json
import subprocess
import sys

import pytest
import tiny_models

import tuning
from tuning.console import Console
from tuning.errors import SpecError
from tuning.pipeline import Options, preparing, story

# A library of these costs tens of MiB and a second of the way to the first step.
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "pandas", "numpy", "pyarrow")
SHOW = f"print([name for name in {HEAVY!r} if name in sys.modules])"
PARENT = ("tuning.cli", "tuning.api", "tuning.pipeline.story", "tuning.pipeline.follower")
PREVIEW = """
import sys
import tuning
assert tuning.preview(tuning.load(model=sys.argv[1], data=sys.argv[2], output="oci:x"), rows=1)
"""


def loaded(code, *arguments, cwd):
    """What of HEAVY a fresh interpreter has loaded after `code`."""
    command = [sys.executable, "-c", f"import sys\n{code}\n{SHOW}", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert 0 == done.returncode, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("module", PARENT)
def test_no_module_of_the_parent_needs_a_heavy_library(module, tmp_path):
    """Commands, API and all phases of a run are imported without any of them."""
    assert "[]" == loaded(f"import {module}", cwd=tmp_path)


def test_phases_on_data_load_no_heavy_library_in_the_parent(tiny_base, tmp_path):
    """Data fetched, tokenised and packed: children have the libraries, the parent none."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny_models.message_rows(16)))

    assert "[]" == loaded(PREVIEW, tiny_base("phi3"), rows, cwd=tmp_path)


def test_libraries_load_while_the_base_is_asked_for(tiny_base, tmp_path, monkeypatch):
    """The training child starts before the first phase that may wait, and ends with the run."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(next(tiny_models.message_rows(1))))
    spec = tuning.load(model=str(tiny_base("phi3")), data=str(rows), output="oci:x")
    children = []

    def base_model(run):
        children.append(run.prewarmed._child)
        assert children[0].poll() is None
        raise SpecError.at("SPEC-100", "test", "is over", "none")

    monkeypatch.setattr(preparing, "base_model", base_model)
    with pytest.raises(SpecError, match="is over"):
        story.execute(spec, Options(run_dir=tmp_path / "run"), Console(quiet=True))

    assert children[0].poll() is not None
