"""What `eval` measures: files of questions, intervals, and what it says where it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from commands import good, tuning
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tuning.cli.evaluation import difference
from tuning.data import eval_tasks
from tuning.errors import DataError, UsageError
from tuning.serve import evaluation
from tuning.serve.evaluation import Question, Score

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY, QUESTIONS = EXAMPLES / "tiny-model", EXAMPLES / "data" / "demo-questions.jsonl"


@given(st.integers(1, 5000), st.data())
def test_the_interval_is_where_the_share_is_no_surprise(count: int, data: Any) -> None:
    """Both ends are shares from which the measured one lies 1.96 standard deviations away, which
    is what Wilson's interval is; it stays within 0 and 1 and holds the share.
    """
    right = data.draw(st.integers(0, count))
    asked = [Question("?", "yes", {"base": "yes" if n < right else "no"}) for n in range(count)]

    (score,) = evaluation.scores("t", asked)

    share = right / count
    assert (share, count) == (score.value, score.count)
    assert 0 <= score.low <= share <= score.high <= 1
    for end in (score.low, score.high):
        if 1e-9 < end < 1 - 1e-9:
            away = (share - end) ** 2 * count / (end * (1 - end))
            assert away == pytest.approx(evaluation.Z**2, rel=1e-6)


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("A Gardener.", True),
        ("gardeners", False),
        ("the (gardener)", True),
        ("", False),
        ("a  gardener", True),
    ],
)
def test_an_answer_is_right_by_whole_words_in_any_case(reply: str, right: bool) -> None:
    assert right == Question("?", "gardener", {"base": reply}).right("base")


def test_every_wrong_line_of_a_file_of_questions_is_told(tmp_path: Path) -> None:
    """With its line, in one pass; empty lines are none, and a limit is a limit."""
    file = tmp_path / "q.jsonl"
    good_line = json.dumps({"question": "2 + 2?", "answer": "4"})
    wrong = ("", "no json", "[1]", '{"question": "x"}', '{"question": 1, "answer": "a"}')
    file.write_text("\n".join((good_line, *wrong)))

    with pytest.raises(DataError) as refused:
        eval_tasks.read_questions(file, None)

    assert [f"{file} line {n}" for n in (3, 4, 5, 6)] == [p.where for p in refused.value.problems]
    file.write_text(f"{good_line}\n" * 5)
    assert 2 == len(eval_tasks.read_questions(file, 2))
    assert 5 == len(eval_tasks.read_questions(file, None))
    for content in (b"", b"\xff\xfe", b"\n \n"):
        file.write_bytes(content)
        with pytest.raises(DataError, match="SERVE-131"):
            eval_tasks.read_questions(file, None)
    with pytest.raises(DataError, match="SERVE-131"):
        eval_tasks.read_questions(tmp_path / "none.jsonl", None)


@pytest.mark.parametrize(
    ("base", "tuned", "p"),
    [("1100", "1010", 1.0), ("0" * 20, "1" * 14 + "0" * 6, 2 / 2**14), ("10000", "01111", 0.375)],
)
def test_a_difference_is_tested_on_the_pairs_that_differ(base: str, tuned: str, p: float) -> None:
    """Twice the smaller tail of as many tosses of a coin; what the base alone answered has none."""
    asked = [
        Question("?", "yes", {"base": "yes" * int(b), "tuned": "yes" * int(t)}, task="t")
        for b, t in zip(base, tuned, strict=True)
    ]
    (found,) = evaluation.differences([*asked, Question("?", "yes", {"base": "yes"}, task="u")])

    assert found["p"] == pytest.approx(p)
    only = found["only_base"], found["only_tuned"]
    assert only[1] - only[0] == tuned.count("1") - base.count("1")
    said = difference(found)
    assert ("is larger than chance" in said) == (p < 0.05)


def test_scores_are_told_task_by_task_for_programs() -> None:
    """Without an interval there is null, as NaN is no JSON."""
    nan = float("nan")
    found = [
        Score("a", "acc", "base", 0.5, 0.4, 0.6, 10),
        Score("a", "acc", "tuned", 0.75, 0.6, 0.9, 10),
        Score("b", "bleu", "base", 12.0, nan, nan),
    ]

    made = evaluation.record("base", "adapter", None, found, [])
    record = json.loads(json.dumps(made, allow_nan=False))

    first, second = record["tasks"]
    assert ["base", "tuned"] == list(first["models"])
    assert {"value": 0.75, "low": 0.6, "high": 0.9} == first["models"]["tuned"]
    assert {"value": 12.0, "low": None, "high": None} == second["models"]["base"]
    assert 10 == first["samples"]


def test_results_of_lm_eval_are_read_with_their_intervals(tmp_path: Path) -> None:
    """Of a share as Wilson's, also where none is right; of another mean by its standard error."""
    results = {
        "alias": "own",
        "acc,none": 0.0,
        "acc_stderr,none": 0.0,
        "f1,strict": 0.5,
        "f1_stderr,strict": 0.1,
        "bleu,none": 3.0,
        "bleu_stderr,none": "N/A",
    }
    record = {"results": {"own": results}, "n-samples": {"own": {"effective": 8}}}
    (tmp_path / "results_1.json").write_text(json.dumps(record))

    found = {s.metric: s for s in evaluation._read(tmp_path / "results_1.json", "base")}

    assert ["acc", "f1 (strict)", "bleu"] == list(found)
    assert (0.0, 0.0) == (found["acc"].value, found["acc"].low)
    assert pytest.approx(0.324, abs=1e-3) == found["acc"].high
    assert pytest.approx(0.696, abs=1e-3) == found["f1 (strict)"].high
    assert (
        evaluation.record("b", None, None, [found["bleu"]], [])["tasks"][0]["models"]["base"]["low"]
        is None
    )


def test_without_lm_eval_its_tasks_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """With what to install; a file of questions needs none of it."""
    with pytest.raises(UsageError, match=r"SERVE-132 --tasks: .*pip install 'lm-eval"):
        eval_tasks.lm_eval_python(None)
    assert "python9" == eval_tasks.lm_eval_python(Path("python9"))
    done = tuning("eval", "--base", tmp_path / "none", "--tasks", "hellaswag")
    assert 2 == done.returncode
    assert "SERVE-132" in done.stderr


@pytest.mark.parametrize(
    ("python", "code", "words"),
    [("no-such-python", 2, "SERVE-132"), (sys.executable, 11, "SERVE-133 --tasks: lm-eval ended")],
)
def test_an_lm_eval_that_fails_is_said_so(
    python: str, code: int, words: str, tmp_path: Path
) -> None:
    """Its own words are above; the server is gone afterwards."""
    task = tmp_path / "own.yaml"
    task.write_text("task: own\n")
    done = tuning("eval", "--base", TINY, "--tasks", task, "--lm-eval", python)
    assert code == done.returncode, done.stderr
    assert words in done.stderr


def test_a_base_that_cannot_be_served_ends_with_the_servers_own_words(tmp_path: Path) -> None:
    """And with its exit code; nothing is measured."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    done = tuning("eval", "--base", folder, "--tasks", QUESTIONS)

    assert 11 == done.returncode, done.stderr
    assert "Change:" in done.stderr
    assert "" == done.stdout


def test_the_server_ends_with_a_command_that_is_killed(tmp_path: Path) -> None:
    """No server is left behind, whatever ended its parent."""
    command = [sys.executable, "-m", "tuning", "eval", "--base", str(TINY)]
    parent = subprocess.Popen([*command, "--tasks", str(QUESTIONS)], stderr=subprocess.DEVNULL)
    child = waited(lambda: _children(parent.pid))
    parent.kill()
    parent.wait()
    assert waited(lambda: not Path(f"/proc/{child[0]}/cmdline").exists() or _is_dead(child[0]))


def waited(found: Callable[[], Any], seconds: float = 120.0) -> Any:
    """What `found` returns once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def _children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_dead(pid: int) -> bool:
    """Whether a process is gone, or only waits for its new parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_an_adapter_that_the_server_leaves_out_is_not_measured(tmp_path: Path) -> None:
    """With the server's reason, and code 11: the base's answers are not the adapter's."""
    adapter = tmp_path / "adapter"
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    peft.get_peft_model(model, config).save_pretrained(adapter)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace("layers.0.", "layers.40."): t for name, t in tensors.items()}, path)

    done = tuning("eval", "--base", TINY, "--adapter", adapter, "--tasks", QUESTIONS)

    assert 11 == done.returncode, done.stderr
    assert "SERVE-134 --adapter: is not served: MODEL-206" in done.stderr
    assert "is in layer 40" in done.stderr
    assert "" == done.stdout


def test_base_and_limit_on_a_file_of_questions(tmp_path: Path) -> None:
    """A table for people, the record in a folder for later."""
    command = ("eval", "--base", TINY, "--tasks", QUESTIONS, "--limit", "3")

    page = good(tuning(*command, "--run-dir", tmp_path / "run"))

    assert "0.000 [0.000, 0.561]" in page
    assert "I do not know anyone called Tamsin Vale." in page
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert 3 == record["tasks"][0]["samples"] == len(record["asked"])
