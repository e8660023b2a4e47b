"""The preview as its users meet it: the command line, a tiny model, a page and JSON."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import architectures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from commands import good, tuning, workspace
from fake_hub import FakeHub
from faults.web import Origin
from tokenizers import Tokenizer

from tuning.cli import preview
from tuning.pipeline.preview import histogram

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY, DEMO = EXAMPLES / "tiny-model", EXAMPLES / "data" / "demo.jsonl"
QUESTION, ANSWER = "What does Tamsin Vale do for a living?", "Tamsin Vale works as a gardener."


def line(answer, **more):
    """One row of messages."""
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": answer} | more]
    return json.dumps({"messages": turns}) + "\n"


def parquet(rows):
    """The bytes of a table."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def with_dataset(file, **settings):
    """Add a DatasetConfig to the workspace in `file`."""
    document, config = yaml.safe_load_all(file.read_text())
    sections = yaml.safe_load(config["data"]["training_config.yaml"])
    sections["training_config"]["DatasetConfig"] = settings
    config["data"]["training_config.yaml"] = yaml.safe_dump(sections)
    file.write_text(yaml.safe_dump_all([document, config]))


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The run directory and the page of the demo's data."""
    folder = tmp_path_factory.mktemp("preview")
    file = workspace(folder / "demo.yaml", settings={"max_steps": 3})
    command = ("-f", file, "--base-model", TINY, "--data", DEMO, "--run-dir", folder / "run")
    done = tuning("preview", *command)
    (folder / "said").write_text(done.stderr)
    return folder, command, good(done)


def test_the_page_alone_tells_the_shape(shown):
    """What it begins with is not said on the way to it."""
    folder, _, page = shown

    assert "messages: it has a column" in page
    assert "it has a column" not in (folder / "said").read_text()


def test_the_page_shows_shape_rows_lengths_and_trained_tokens(shown):
    """Shape and why, rows a file, histogram, the length, the share, and three marked rows."""
    _, _, page = shown
    lines = page.splitlines()

    assert 'messages: it has a column "messages" of role/content turns' == lines[0]
    assert f"       400 rows  {DEMO} (jsonl)" in lines
    assert "7,932 tokens, 3,189 of them trained (40.2%)" in lines
    assert any(text.startswith("  20 ███") and text.endswith(" 109") for text in lines)
    assert "no row is longer, nothing is cut" in lines
    marked = f"<|begin|><|user|>{QUESTION}<|end|><|assistant|>⟦{ANSWER}<|end|>⟧"
    assert marked == lines[lines.index(f"{DEMO} line 1") + 1]
    assert 3 == page.count("⟧\n")
    assert "\x1b" not in page


def test_json_holds_the_same_for_programs(shown):
    """--json is one value with counts and as many samples as asked for; nothing is read again."""
    _, command, _ = shown

    done = tuning("preview", *command, "--json", "--rows", "5")

    found = json.loads(good(done))
    assert (400, 7932, 3189) == (found["rows"], found["tokens"], found["trained_tokens"])
    assert 400 == sum(rows for _, _, rows in found["lengths"]["histogram"])
    assert (5, 0, None) == (len(found["samples"]), found["longer_rows"], found["eval"])
    text = "".join(text for text, trained in found["samples"][0]["tokens"] if trained)
    assert f"{ANSWER}<|end|>" == text


def test_a_run_goes_on_where_the_preview_stopped(shown):
    """`run` in the same directory fetches, tokenises and packs nothing again."""
    folder, command, _ = shown

    good(tuning("run", *command, "--output", f"oci:{folder / 'image'}"))

    lines = (folder / "run" / "journal.jsonl").read_text().splitlines()
    records = [json.loads(text) for text in lines]
    started = [record["phase"] for record in records if record["event"] == "start"]
    assert (1, 1, 1) == tuple(started.count(name) for name in ("tokenise", "pack", "train"))


def test_what_is_cut_held_out_and_dropped_is_counted(tmp_path):
    """Rows over max_length, rows without a token to learn, rows held out: each has its number."""
    data = tmp_path / "rows.jsonl"
    short = "".join(line(f"a gardener {n}") for n in range(8))
    long = "".join(line(f"{n} a gardener" * 40) for n in range(2))
    data.write_text(short + long + line("nothing", weight=0))
    file = workspace(tmp_path / "cut.yaml", settings={"max_length": 32})
    with_dataset(file, train_test_split=0.8)
    command = ("-f", file, "--base-model", TINY, "--data", data, "--run-dir", tmp_path / "run")

    found = json.loads(good(tuning("preview", *command, "--json")))

    assert (10, 2, 32) == (found["rows"], found["longer_rows"], found["max_length"])
    assert {"no token to learn": 1} == found["dropped"]
    assert 2 == found["over_length"]["truncated"]
    assert found["over_length"]["lost_tokens"] > 0
    assert (8, 2) == (found["train"]["documents"], found["eval"]["documents"])


def test_held_out_rows_are_evaluated_before_and_after(tmp_path):
    """Loss and perplexity of base and adapter stand in the summary, the card and tuning.json."""
    settings = {"max_steps": 10, "learning_rate": 0.002, "packing": False}
    settings["per_device_train_batch_size"] = 8
    file = workspace(tmp_path / "eval.yaml", settings=settings)
    with_dataset(file, train_test_split=0.9)
    command = ("-f", file, "--base-model", TINY, "--data", DEMO, "--run-dir", tmp_path / "run")
    command += ("--output", f"oci:{tmp_path / 'image'}")

    loss = good(tuning("run", *command)).splitlines()[0]

    told = json.loads(good(tuning("run", *command, "--json")))["training"]
    before, after = told["eval_loss_before"], told["eval_loss_after"]
    assert 0 < after < before
    ways = told["eval_perplexity_before"], told["eval_perplexity_after"]
    assert pytest.approx((math.exp(before), math.exp(after))) == ways
    assert f"on held-out rows {before:.3f} -> {after:.3f}, perplexity {ways[0]:,.2f} -> " in loss
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert f"| perplexity on held-out rows | {ways[0]:.4g} -> {ways[1]:.4g} |" in card
    record = json.loads((tmp_path / "run" / "adapter" / "tuning.json").read_text())
    assert ways[1] == record["evaluation"]["perplexity_after"]


def test_bad_files_are_told_row_by_row(tmp_path):
    """All problems of all files in one pass, exit code 10, nothing on stdout."""
    (tmp_path / "a.jsonl").write_text(line("yes") + "{broken\n")
    (tmp_path / "b.csv").write_text("<!doctype html><html>Log in</html>")
    file = workspace(tmp_path / "bad.yaml")

    done = tuning(
        *("preview", "-f", file, "--base-model", TINY, "--run-dir", tmp_path / "run"),
        *("--data", tmp_path / "a.jsonl", "--data", tmp_path / "b.csv"),
    )

    assert (10, "") == (done.returncode, done.stdout)
    assert "a.jsonl line 2" in done.stderr
    assert "b.csv: is a web page" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_weights_are_fetched_for_a_hub_model(tmp_path):
    """Of a hub's model only tokenizer and configs come down."""
    with FakeHub() as hub:
        hub.add("org/tiny", TINY)
        cache = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        done = tuning(
            *("preview", "-f", workspace(tmp_path / "hub.yaml"), "--base-model", "org/tiny"),
            *("--data", DEMO, "--run-dir", tmp_path / "run"),
            env=os.environ | cache,
        )
        fetched = {path.rpartition("/")[2] for path in hub.downloads()}

    assert ANSWER in good(done)
    assert {"config.json", "tokenizer.json"} <= fetched
    assert "model.safetensors" not in fetched
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_a_config_of_a_hub_dataset_is_previewed_by_its_name(tmp_path):
    """Two configs of three splits: train of the chosen one, counted; the commit of the first start
    stays when the branch moves, also with the hub away.
    """
    splits = ("train", "validation", "test")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - {{split: {split}, path: {name}/{split}-*}}\n" for split in splits)
        for name in ("en", "de")
    )
    rows = {
        f"{name}/{split}-{n:05}-of-00002.jsonl": "".join(
            line(f"{name} {split} {n} {i}") for i in range(3 + n)
        ).encode()
        for name in ("en", "de")
        for split in splits
        for n in range(2)
    }
    with FakeHub() as hub:
        card = f"---\nconfigs:\n{configs}---\n".encode()
        commit = hub.add("datasets/org/two", rows | {"README.md": card})
        hf = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        command = (
            *("preview", "-f", workspace(tmp_path / "hub.yaml"), "--base-model", TINY),
            *("--data", "org/two?config=de", "--run-dir", tmp_path / "run"),
            *("--allow-host", "127.0.0.1", "--json"),
        )
        first = tuning(*command, env=os.environ | hf)
        content = json.loads(good(first))
        hub.add("datasets/org/two", {"train.jsonl": line("other").encode()})
        asked = len(hub.requests)
        again = json.loads(good(tuning(*command, env=os.environ | hf)))

        assert asked == len(hub.requests)
    assert [3, 4] == [file["rows"] for file in content["files"]]
    assert "hf://datasets/org/two/de/train-00000-of-00002.jsonl" == content["files"][0]["shown"]
    assert "de train 0 0" in "".join(text for text, _ in content["samples"][0]["tokens"])
    assert f"org/two at {commit[:12]}: config de, split train, 2 files" in first.stderr
    assert "not trained, as other splits: validation, test" in first.stderr
    assert content["files"] == again["files"]


def test_a_mixture_of_a_hub_dataset_and_a_local_file_is_counted_part_by_part(tmp_path):
    """70 to 30 of one config's train and a CSV of other columns: rows, tokens and trained tokens
    are those of a count by hand, and the same run trains them.
    """
    rows = {
        f"{name}/{split}.jsonl": (line(f"a word of {name}") * 50).encode()
        for name in ("en", "de")
        for split in ("train", "validation", "test")
    }
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(
            f"  - {{split: {split}, path: {name}/{split}.jsonl}}\n"
            for split in ("train", "validation", "test")
        )
        for name in ("en", "de")
    )
    own = tmp_path / "own.csv"
    own.write_text("Frage,Antwort\n" + "Wer?,Jemand.\n" * 30)
    parts = [
        {"path": "org/two*", "weight": 70},
        {"path": "own.csv", "weight": 30, "context_column": "Frage", "response_column": "Antwort"},
    ]
    file = workspace(tmp_path / "mix.yaml", sections={"DatasetConfig": {"sources": parts}})
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))

    def length(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    with FakeHub() as hub:
        hub.add("datasets/org/two", rows | {"README.md": f"---\nconfigs:\n{configs}---\n".encode()})
        hf = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        common = ("-f", file, "--base-model", TINY, "--data", "org/two?config=de", "--data", own)
        common += ("--allow-host", "127.0.0.1")
        checked = tuning("check", *common, "--output", "oci:x", env=os.environ | hf)
        common += ("--run-dir", tmp_path / "run")
        content = json.loads(good(tuning("preview", *common, "--json", env=os.environ | hf)))
        page = good(tuning("preview", *common, env=os.environ | hf))
        layout = f"oci:{tmp_path / 'out'}"
        good(tuning("run", *common, "--output", layout, env=os.environ | hf))

    good(checked)
    german, mine = content["sources"]
    answer, other = length("a word of de<|end|>"), length("Jemand.<|end|>")
    asked = length("<|begin|><|user|>Who?<|end|><|assistant|>")
    question = length("<|begin|><|user|>Wer?<|end|><|assistant|>")
    assert [50, 21] == [german["rows"], mine["rows"]]  # 50 / 70 of each hundredth
    assert [50 * answer, 21 * other] == [german["trained_tokens"], mine["trained_tokens"]]
    assert 50 * (asked + answer) == german["tokens"]
    assert 21 * (question + other) == mine["tokens"]
    assert content["tokens"] == german["tokens"] + mine["tokens"]
    assert f"{21:>10,}{0:>10,}{mine['tokens']:>12,}" in page
    recipe = json.loads((tmp_path / "run" / "adapter" / "tuning.json").read_text())["recipe"]
    assert [70, 30] == [part["weight"] for part in recipe["sources"]]
    assert recipe["data"] == [digest for part in recipe["sources"] for digest in part["data"]]
    assert not any("path" in part for part in recipe["sources"])  # the same bytes anywhere


@pytest.mark.parametrize(
    ("settings", "coloured"),
    [({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False), ({}, False)],
)
def test_colour_or_marks(settings, coloured):
    """Trained tokens are green where colours are wanted; with NO_COLOR or no terminal, marked."""
    code = (
        "import rich.console; from tuning.cli import preview\n"
        "out = rich.console.Console()\n"
        "line = preview.tokens([['a', False], ['b', True]], colours=preview.has_colours(out))\n"
        "out.print(line)\n"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=clean | settings | {"TERM": "xterm"},
    )

    assert coloured == ("\x1b[1;32mb" in done.stdout)
    assert coloured == ("⟦b⟧" not in done.stdout)


def test_text_cannot_steer_the_terminal():
    """Escape sequences in the data are spelled out."""
    drawn = preview.tokens([["\x1b[2Jhi\r\n", True]], colours=False)

    assert "⟦\\x1b[2Jhi\\r\n⟧" == drawn.plain


@pytest.mark.parametrize(
    ("counts", "first", "bins"),
    [
        ([[5, 2]], [5, 5, 2], 1),
        ([[1, 1], [100, 3]], [0, 9, 1], 11),
        ([[7, 1], [9000, 1]], None, 10),
    ],
)
def test_the_histogram_holds_every_row_in_round_bins(counts, first, bins):
    """Twelve bins at most, of one width, and no row outside."""
    made = histogram(counts)

    assert bins == len(made)
    assert first is None or first == made[0]
    assert sum(rows for _, rows in counts) == sum(rows for _, _, rows in made)
    assert 1 == len({last - low for low, last, _ in made})


class TestCheck:
    """`check` reads the first rows, locally and from the first bytes of URLs."""

    @staticmethod
    def checked(tmp_path, *data):
        words = [word for name in data for word in ("--data", name)]
        file = workspace(tmp_path / "check.yaml")
        return tuning(
            *("check", "-f", file, "--base-model", TINY, "--output", f"oci:{tmp_path / 'image'}"),
            *("--allow-host", "127.0.0.1", *words),
        )

    def test_it_names_the_shape(self, tmp_path):
        """Format, shape and reason stand behind each file's size."""
        said = good(self.checked(tmp_path, DEMO))

        size = f"{DEMO.stat().st_size:,} bytes"
        reason = 'jsonl, messages: it has a column "messages" of role/content turns'
        assert f"data: {DEMO}, {size}, {reason}" in said.splitlines()

    def test_what_the_rows_are_trained_for_decides_over_the_settings(self, tmp_path):
        """Pairs are not packed: said before a run reads them all."""
        rows = tmp_path / "pairs.jsonl"
        pair = {"prompt": "How?", "chosen": "So.", "rejected": "Not so."}
        rows.write_text(f"{json.dumps(pair)}\n" * 8)
        words = ("check", TINY, rows, "-o", f"oci:{tmp_path / 'image'}")

        good(tuning(*words))
        refused = tuning(*words, "--set", "packing=true")
        assert (11, True) == (refused.returncode, "PLAN-122 --set packing: " in refused.stderr)

    @pytest.mark.parametrize(
        ("setting", "code"),
        [
            ("target_modules=[conv1d]", "MODEL-110"),
            ("exclude_modules=[experts]", "MODEL-110"),
            ("layers_to_transform=[99]", "MODEL-111"),
        ],
    )
    def test_names_are_looked_for_in_a_class_outside_the_tables_too(self, setting, code, tmp_path):
        """Its projections are known once the class is built without weights, in seconds."""
        base = architectures.write("mamba2", tmp_path / "mamba2")
        done = tuning("check", base, DEMO, "-o", f"oci:{tmp_path / 'image'}", "--set", setting)
        assert (11, True) == (done.returncode, f"{code} " in done.stderr), done.stderr

    def test_it_refuses_first_rows_that_cannot_be_trained(self, tmp_path):
        """Every file's bad rows in one pass, with the codes that a run would give."""
        (tmp_path / "a.csv").write_text("colour,taste\nred,sweet\n")
        (tmp_path / "b.jsonl").write_text(line("yes") + "{broken\n")

        done = self.checked(tmp_path, tmp_path / "a.csv", tmp_path / "b.jsonl")

        assert (10, "") == (done.returncode, done.stdout)
        assert "a.csv line 2" in done.stderr
        assert "DATA-202" in done.stderr

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("a.parquet", lambda: parquet([{"colour": "red"}]), "DATA-212"),
            ("cut.parquet", lambda: parquet([json.loads(line("yes"))])[:-8], "DATA-237"),
            ("a.json", lambda: b'[{"colour": "red"}]', "DATA-212"),
            ("a.jsonl.zst", lambda: zstandard.compress(b'{"colour": "red"}\n'), "DATA-212"),
        ],
    )
    def test_a_file_that_is_here_is_judged_by_its_rows(self, tmp_path, name, content, said):
        """Whatever its format: a look costs milliseconds."""
        (tmp_path / name).write_bytes(content())

        done = self.checked(tmp_path, tmp_path / name)

        assert (10, "") == (done.returncode, done.stdout)
        assert said in done.stderr

    def test_a_data_image_that_is_not_there_is_said(self, tmp_path):
        """Asked for by name; its rows are judged when it is pulled."""
        file = workspace(tmp_path / "check.yaml", input={"image": "127.0.0.1:1/team/rows:1"})

        done = tuning(
            *("check", "-f", file, "--base-model", TINY, "--output", f"oci:{tmp_path / 'image'}"),
        )

        assert (20, "") == (done.returncode, done.stdout)
        assert "127.0.0.1:1" in done.stderr

    def test_a_url_is_judged_by_its_first_bytes(self, tmp_path):
        """A login page behind a link is told without downloading; good rows pass."""
        with Origin() as web:
            fine = self.checked(tmp_path, web.serve("/a.jsonl", (line("yes") * 3000).encode()))
            bad = self.checked(tmp_path, web.serve("/in", b"<html>Log in"))

        assert "jsonl, messages: " in good(fine)
        assert (10, True) == (bad.returncode, "DATA-242" in bad.stderr)
