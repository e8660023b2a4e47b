"""The report of a run: what it shows, to whom, that it is text, and how it looks in a browser."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import pytest
from commands import good, tuning

from tuning import files
from tuning.errors import SpecError
from tuning.pipeline import journal, progress_server, report

STEP = {
    "step": 3,
    "steps": 12,
    "epoch": 1.5,
    "loss": 1.5,
    "lr": 1e-4,
    "grad_norm": 0.5,
    "tokens": 4096,
    "tokens_per_second": 812.0,
    "eta_seconds": 120.0,
    "memory_bytes": 3 << 30,
}
RECIPE = {
    "base_model": "org/base",
    "base_revision": "c0ffee",
    "method": "qlora",
    "rank": 16,
    "alpha": 32.0,
    "targets": ["q_proj", "v_proj"],
    "objective": None,
    "beta": None,
    "steps": 12,
    "learning_rate": 0.0002,
    "sources": [],
}
TRAINED = {
    "steps": 12,
    "trainable": 1000,
    "total": 100_000,
    "peak_memory_bytes": 3 << 30,
    "tokens_per_second": 812.0,
    "seconds": 90.0,
    "calibrated": {"tokens_per_second": 900.0},
    "eval_loss_before": 2.0,
    "eval_loss_after": 1.0,
    "answers": [{"question": "QUESTION?", "base": "OLD ANSWER", "tuned": "NEW ANSWER"}],
}
FILE = {"shown": "rows.jsonl", "rows": 400, "shape": "messages", "part": 0}
TOKENISED = {"rows": 400, "tokens": 8000, "trained_tokens": 2000, "files": [FILE]}
PACKED = {"train": {"documents": 360}, "eval": {"documents": 40}, "dropped": {"no answer": 7}}
SAMPLE = {"prompt": "PROMPT", "expected": "EXPECTED", "base": "BASE SAYS", "tuned": "TUNED SAYS"}
SECRET = (*TRAINED["answers"][0].values(), *SAMPLE.values(), "ASKED?")  # type: ignore[index]
HOSTILE = "</title><script>alert(1)</script>\"'><img src=//evil.example onerror=x>\u202e\x1b[31m&"


class Run:
    """A run directory, as far as somebody got."""

    def __init__(self, folder: Path, **phases: dict[str, Any]) -> None:
        self.folder = folder
        with journal.opened(folder) as opened:
            opened.append("start", "begin", name=phases.pop("begin", {}).get("name", "demo"))
            for phase, value in phases.items():
                opened.append(phase, "start", "k")
                opened.append(phase, "end", "k", value=value, outputs={})

    def add(self, phase: str, event: str, **more: Any) -> None:
        with journal.opened(self.folder) as opened:
            opened.append(phase, event, **more)

    def metrics(self, *records: dict[str, Any]) -> None:
        text = "".join(json.dumps(record) + "\n" for record in records)
        (self.folder / "metrics.jsonl").write_text(text)

    def plan(self, **more: Any) -> None:
        decided = {
            "run_id": "ab" * 32,
            "recipe": RECIPE,
            "placement": {"micro_batch": 4},
            "device": {"name": "a GPU", "kind": "cuda"},
            "reasons": {"learning_rate": "the usual one", "micro_batch": "fits"},
            "memory": {"allocated": 2 << 30},
            "speed": {"tokens_per_second": 1000.0, "seconds": 100.0},
        }
        files.write_json(self.folder / "plan.json", decided | more)

    def page(self) -> str:
        return report.page(self.folder)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished one, delivered to a registry, with questions, samples and an evaluation."""
    made = Run(
        tmp_path / "run",
        tokenise=TOKENISED,
        pack=PACKED,
        train=TRAINED,
        package={"digest": "sha256:" + "d" * 64},
        push={"references": ["registry.example.com:5000/team/a:1"]},
    )
    made.metrics(*({**STEP, "step": n, "loss": 3.0 / n} for n in range(1, 13)))
    made.plan()
    (made.folder / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    score = {"value": 0.25, "low": 0.1, "high": 0.4}
    tuned = {"value": 0.75, "low": 0.6, "high": 0.9}
    task = {"task": "names", "metric": "right", "samples": 40}
    asked = [{"question": "ASKED?", "answer": "A", "replies": {"base": "B", "tuned": "A"}}]
    evaluation = {"tasks": [task | {"models": {"base": score, "tuned": tuned}}], "asked": asked}
    files.write_json(made.folder / "evaluation.json", evaluation)
    return made


class Reader(HTMLParser):
    """The elements of a page, their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def cells(page: str, first: str) -> list[str]:
    """The cells of the first table row that begins with `first`."""
    row, *_ = re.findall(rf"<tr><th>{re.escape(first)}</th>(.*?)</tr>", page)
    return re.findall(r"<td>(.*?)</td>", row)


def test_a_finished_run_says_what_why_and_how_to_use_it(run: Run) -> None:
    """State, data, method, held-out loss, settings with reasons, and rows that were left out."""
    page = run.page()

    assert "<b>Finished</b> step 12 of 12" in page and "A part is missing" not in page
    assert "2 → 1" in page
    assert cells(page, "method") == ["QLoRA, rank 16, alpha 32, on q_proj, v_proj"]
    assert cells(page, "data") == ["400 rows, 8,000 tokens, 2,000 (25%) of them trained"]
    assert cells(page, "split") == ["360 rows to train, 40 held out"]
    assert cells(page, "rows.jsonl") == ["400", "messages"]
    assert cells(page, "learning rate") == ["0.0002", "the usual one"]
    assert cells(page, "micro batch") == ["4", "fits"]
    assert "7 rows were left out: no answer" in page
    assert cells(page, "names: right") == ["40", "0.250 [0.100, 0.400]", "0.750 [0.600, 0.900]"]


def test_plan_and_measurement_stand_side_by_side(run: Run) -> None:
    """With the difference; words for what nobody planned or measured."""
    page = run.page()
    assert cells(page, "peak memory") == ["2.0 GiB", "3.0 GiB", "+50.0 %"]
    assert cells(page, "tokens/s") == ["1,000", "812", "-18.8 %"]
    assert cells(page, "tokens/s, calibrated") == ["900", "812", "-9.8 %"]
    assert cells(page, "training time") == ["1 min 40 s", "1 min 30 s", "-10.0 %"]
    assert cells(page, "adapter") == ["not predicted", "not measured", ""]

    run.plan(memory=None, speed={}, device={"name": "CPU", "kind": "cpu"})
    assert cells(run.page(), "peak memory")[0] == "not predicted on this CPU"
    assert "–" not in page


DIGEST = "sha256:" + "d" * 64
DELIVERED = [
    ({"references": ["r.example:5000/t/a:1"]}, f"pull r.example:5000/t/a@{DIGEST} adapter"),
    ({"references": ["r.example/a"], "insecure": True}, f"--adapter adapter=r.example/a@{DIGEST} "
     "--insecure"),
    ({"references": ["oci:/x y/image"]}, "pull 'oci:/x y/image' adapter"),
    ({"references": [], "folder": "/out"}, "--adapter adapter=/out\n"),
    ({"references": ["hf://org/a@abc"]}, "hf download org/a --revision abc --local-dir ./adapter"),
    ({"references": []}, "/image adapter"),
]  # fmt: skip


@pytest.mark.parametrize(("pushed", "expected"), DELIVERED)
def test_the_commands_name_what_was_delivered(
    pushed: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    """By digest from a registry, from a layout, a folder, the hub, or else the run directory."""
    made = Run(tmp_path / "r", train=TRAINED, package={"digest": DIGEST}, push=pushed)
    made.plan()

    commands = Reader(made.page()).text
    assert expected in commands
    assert "serve --base org/base --base-revision c0ffee --adapter " in commands
    assert "chat --base org/base --adapter " in commands and "--compare" in commands


def test_a_failed_run_says_why_and_what_to_do(tmp_path: Path) -> None:
    """In whatever phase; an interrupted one is told from a failed one, as is one that vanished."""
    run = Run(tmp_path / "run")
    assert "<b>Not finished</b> no step done" in run.page()
    message = "REG-131 r/x:1: there is no host r. Change: check the name."
    run.add("check", "fail", code=20, message=message)
    page = run.page()
    assert "<b>Failed</b> no step done" in page
    assert "Ended in the phase check with exit code 20 (TransientFailure)" in page
    assert "<b>What to do:</b> check the name." in page

    run.add("start", "begin", name="demo")
    run.add("train", "oom", way="4 x 2 rows", message="")
    run.add("train", "fail", code=75, message="RUN-110 train: stopped. Change: run it again")
    page = run.page()
    assert "<b>Interrupted</b>" in page and "(2 starts)" not in page
    assert "started again" in page and "out of memory with 4 x 2 rows" in page


def test_everything_that_is_not_ours_is_text(tmp_path: Path) -> None:
    """Script tags, quotes, direction marks and escapes in names, answers, settings, messages."""
    evil: dict[str, Any] = dict.fromkeys(("question", "base", "tuned"), HOSTILE)
    run = Run(
        tmp_path / "run",
        begin={"name": HOSTILE},
        tokenise=TOKENISED | {"files": [FILE | {"shown": HOSTILE, "shape": HOSTILE}]},
        pack=PACKED | {"dropped": {HOSTILE: 3}},
        train=TRAINED | {"answers": [evil]},
        package={"digest": HOSTILE},
        push={"references": [HOSTILE]},
    )
    run.metrics(*({**STEP, "step": n} for n in range(1, 4)))
    run.plan(
        recipe=RECIPE | {"base_model": HOSTILE, HOSTILE: HOSTILE},
        reasons={"learning_rate": HOSTILE, HOSTILE: HOSTILE},
        run_id=HOSTILE,
    )
    (run.folder / "samples.jsonl").write_text(json.dumps(dict.fromkeys(SAMPLE, HOSTILE)) + "\n")
    models = {HOSTILE: {"value": 1.0, "low": None, "high": None}}
    task = {"task": HOSTILE, "metric": HOSTILE, "samples": 1, "models": models}
    asked = [{"question": HOSTILE, "answer": HOSTILE, "replies": {HOSTILE: HOSTILE}}]
    files.write_json(run.folder / "evaluation.json", {"tasks": [task], "asked": asked})
    (run.folder / "trackers").mkdir()
    linked = {"link": "javascript:alert(1)"}
    files.write_json(run.folder / "trackers" / "mlflow.json", linked)
    run.add("train", "fail", code=13, message=f"{HOSTILE} Change: {HOSTILE}")

    for page in (run.page(), report.served(run.folder, name=HOSTILE)):
        read = Reader(page)
        assert not {"script", "img", "link", "iframe", "a"} & read.tags
        assert not [name for name, _ in read.attributes if name.startswith("on")]
        assert "\u202e" not in page and "\x1b" not in page
        assert "A part is missing" not in page
        assert "<script>alert(1)</script>" in read.text


def test_the_page_loads_nothing(run: Run) -> None:
    """No script, no address but a namespace, and a policy under which the browser would refuse."""
    page = run.page()
    read = Reader(page)

    assert "script" not in read.tags
    assert not {"src", "href", "srcset", "background"} & {name for name, _ in read.attributes}
    assert not re.search(r"url\(|@import", page)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in read.attributes
    assert "refresh" not in page


def test_answers_and_rows_are_in_the_file_and_never_on_the_network(run: Run) -> None:
    """report.html has them; the page of the progress port none, whatever the directory holds."""
    kept = run.page()
    with progress_server.served(run.folder, name="demo", port=0) as port:
        shown = urllib.request.urlopen(f"http://127.0.0.1:{port}/").read().decode()

    assert [] == [text for text in SECRET if text not in kept]
    assert [] == [text for text in SECRET if text in shown]
    assert "<b>Running</b> step 12 of 12, 2 min 0 s to go" in shown
    assert 'http-equiv="refresh"' in shown


DAMAGED = ["[]", "{", '{"recipe": 5}', '{"recipe": {"method": []}}', '{"reasons": []}', "\x00"]


@pytest.mark.parametrize("name", ["plan.json", "evaluation.json", "samples.jsonl", "journal.jsonl"])
@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_directory_has_a_report(run: Run, name: str, text: str) -> None:
    """Of the parts that can be read; the curves are there in any case."""
    (run.folder / name).write_text(text)
    assert "polyline" in run.page()
    assert "polyline" in report.served(run.folder, name=HOSTILE)


def test_a_long_run_s_page_is_small_and_quick(run: Run) -> None:
    """100,000 records, 2,000 evaluations: below 300 kB, in seconds, with the worst step shown."""
    losses = [2.0 + (step * 7919 % 101) / 100 for step in range(1, 100_001)]
    losses[54_321] = 40.0
    run.metrics(
        *(
            {**STEP, "step": step, "steps": 100_000, "loss": loss}
            | ({"eval_loss": loss} if step % 50 == 0 else {})
            for step, loss in enumerate(losses, 1)
        )
    )
    start = time.process_time()
    page = run.page()

    assert time.process_time() - start < 20
    assert len(page.encode()) < 300_000
    assert ">40<" in page  # the axis reaches it


def test_the_command_writes_the_report_anew(run: Run, tmp_path: Path) -> None:
    """It prints the path; a folder that is no run directory is refused."""
    ended = good(tuning("report", run.folder))
    assert ended == f"{run.folder / 'report.html'}\n"
    assert (run.folder / "report.html").read_text() == run.page()
    with pytest.raises(SpecError, match="RUN-102"):
        report.rewrite(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_fits_a_telephone_and_a_screen(
    run: Run, tmp_path: Path, width: int, theme: str
) -> None:
    """Nothing is wider than the window or overlaps; text stands out; nothing is loaded."""
    long = "x" * 300
    run.add("train", "note", text=long)
    run.plan(reasons={"learning_rate": long})
    path = report.write(run.folder)
    with browser.chromium(tmp_path) as tab:
        tab.send(
            *("Emulation.setDeviceMetricsOverride",),
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        feature = {"name": "prefers-color-scheme", "value": theme}
        tab.send("Emulation.setEmulatedMedia", features=[feature])
        tab.send("Page.navigate", url=path.as_uri())
        tab.until("document.querySelectorAll('figure').length === 3")
        assert tab.run("document.documentElement.scrollWidth") <= width
        assert [] == tab.run(OVERLAPPING)
        assert tab.run(CONTRAST) > 4.5
        assert 12 <= tab.run(
            "parseFloat(getComputedStyle(document.querySelector('text')).fontSize)"
        )
        requested = [one["request"]["url"] for one in tab.named("Network.requestWillBeSent")]
        complaints = tab.named("Runtime.exceptionThrown") + tab.named("Log.entryAdded")

    assert [path.as_uri()] == requested
    assert [] == complaints


OVERLAPPING = """[...document.querySelectorAll('figure')].flatMap((figure) => {
  const words = [...figure.querySelectorAll('text, .key')];
  const boxes = words.map((one) => one.getBoundingClientRect());
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2));
}).length ? [document.querySelector('figure').outerHTML] : []"""
CONTRAST = """(() => {
  const light = (color) => color.match(/[0-9.]+/g).slice(0, 3)
    .map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const page = light(getComputedStyle(document.body).backgroundColor);
  return Math.min(...[...document.querySelectorAll('p, td, th, b, span, dt, pre')].map((one) => {
    const ink = light(getComputedStyle(one).color);
    return (Math.max(page, ink) + .05) / (Math.min(page, ink) + .05);
  }));
})()"""
