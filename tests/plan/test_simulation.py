"""Models outside the presets: sized by simulation, once; without torch placed with care."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tuning.plan import simulation

WORKSPACE = """
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: sized}
resource: {instanceType: NAME, labelSelector: {matchLabels: {a: b}}}
tuning:
  preset: {name: org/unknown}
  method: lora
  input: {urls: ["https://example.com/a.jsonl"]}
  output: {image: "r.example/x:1", imagePushSecret: s}
"""
QWEN3_30B = {  # no preset has its shape
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 60,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
NO_TORCH = "import sys; sys.modules['torch'] = None; from tuning.cli import main; sys.exit(main())"


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    """Run `tuning plan` for the model on a machine type; its own cache."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_30B))

    def run(instance: str, *more: str, start: tuple[str, ...] = ("-m", "tuning")) -> Any:
        spec = tmp_path / f"{instance}.yaml"
        spec.write_text(WORKSPACE.replace("NAME", instance))
        command = [sys.executable, *start, "plan", "-f", str(spec), "--base-model", str(folder)]
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.run(
            [*command, *more], capture_output=True, text=True, env=environment, timeout=280
        )

    return run


def test_a_model_outside_the_presets_is_simulated_and_remembered(plan: Any) -> None:
    """It gets a ledger like any preset; what does not fit is refused, and what would is named."""
    fits = plan("Standard_NC24ads_A100_v4", "--json")
    refused = plan("g6.xlarge")

    assert 0 == fits.returncode, fits.stderr
    assert "Examining the model" in fits.stderr
    memory = json.loads(fits.stdout)["memory"]
    weights = 2 * 30.81e9  # bytes; 32.76 billion numbers are published for 64 layers
    assert weights == pytest.approx(memory["terms"]["frozen weights"], rel=0.005)
    assert memory["total"] < memory["free"]
    assert 11 == refused.returncode
    assert "PLAN-120" in refused.stderr and "does not fit L4" in refused.stderr
    assert "use p4de.24xlarge" in refused.stderr or "use p5" in refused.stderr
    assert "Examining the model" not in refused.stderr


def test_without_torch_a_model_nobody_knows_is_placed_with_care(plan: Any) -> None:
    """One row at a time and checkpointing, and the reason why."""
    careful = plan("Standard_NC24ads_A100_v4", "--json", start=("-c", NO_TORCH))

    assert 0 == careful.returncode, careful.stderr
    found = json.loads(careful.stdout)
    assert (None, True, 1) == (
        found["memory"],
        found["placement"]["checkpointing"],
        found["placement"]["micro_batch"],
    )
    why = "it could not be simulated, since torch is not installed here: the safe choice"
    assert why == found["reasons"]["checkpointing"]


def test_another_version_of_the_code_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was remembered by one version is not the answer of another, which may adapt more."""
    before = simulation._key({"model_type": "llama"}, [])
    monkeypatch.setattr(simulation, "_code", lambda: "another version")

    assert before != simulation._key({"model_type": "llama"}, [])
