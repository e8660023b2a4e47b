"""Tasks put to a base model and its adapter behind a server of ours: what `eval` measures.

The server is a child process on the loopback, so that what is measured is what users are served.
A task is a file of questions with the words that a right answer has, or one of lm-eval's. Needs no
torch.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tuning import files, process
from tuning.adapter import WEIGHTS
from tuning.console import Console
from tuning.data.eval_tasks import Tasks
from tuning.errors import SpecError, TransientError, UsageError

BASE, TUNED = "base", "tuned"  # what the models are called
AT_ONCE = 8  # requests
ANSWER_SECONDS = 600.0
TOKENS = 64  # longest answer to a question of a file
Z = 1.959964  # of a normal distribution: 95 % lie within so many standard deviations
# A server that ends with this process, whose end closes its input
_SERVE = (
    "import sys; from tuning import cli, process; process.follow_parent(); sys.exit(cli.main())"
)
_CHOSEN_FILTER = re.compile(r"(?P<metric>[^,]+),(?P<filter>.+)")


class ServerEnded(Exception):
    """The server ended before it was ready: its exit code, and what it said."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(said)
        self.code, self.said = code, said


@dataclass(frozen=True)
class Score:
    """A measured value with its 95 % confidence interval."""

    task: str
    metric: str
    model: str
    value: float
    low: float
    high: float
    count: int | None = None  # of samples


@dataclass(frozen=True)
class Question:
    """A question, the words that a right answer has, and what each model replied."""

    question: str
    answer: str
    replies: dict[str, str]
    task: str = ""

    def right(self, model: str) -> bool:
        """Whether the words stand in the reply, as whole words, in any case."""
        words = rf"(?<!\w){re.escape(self.answer.casefold())}(?!\w)"
        return re.search(words, self.replies[model].casefold()) is not None


@dataclass(frozen=True)
class Server:
    """A server that answers at `url` under the names `models`."""

    url: str
    models: tuple[str, ...]

    def reply(self, model: str, question: str, tokens: int) -> str:
        """The model's greedy answer. Raises TransientError."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": tokens,
        }
        found = self._ask("/v1/chat/completions", body)
        return str(found["choices"][0]["message"]["content"])

    def listed(self) -> set[str]:
        """The names of the models that it serves. Raises TransientError."""
        return {model["id"] for model in self._ask("/v1/models")["data"]}

    def _ask(self, path: str, body: Any = None) -> Any:
        host = self.url.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=ANSWER_SECONDS)
        try:
            headers = {"Content-Type": "application/json"}
            data = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", path, data, headers)
            response = connection.getresponse()
            found = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _lost(type(error).__name__) from None
        finally:
            connection.close()
        if response.status != 200:
            raise _lost(str(found.get("error", {}).get("message", response.status))[:300])
        return found


def _lost(why: str) -> TransientError:
    change = "run the same command again; --limit asks fewer questions"
    return TransientError.at("SERVE-130", "eval", f"the server gave no answer: {why}", change)


@contextlib.contextmanager
def serving(
    base: Path, adapter: Path | None, *, precision: str, said: Callable[[str], None]
) -> Iterator[Server]:
    """A server of the folder `base` and, as "tuned", of the adapter's, while the block runs.

    `said` gets a line when it is ready. Raises ServerEnded, or SpecError for an adapter that the
    server leaves out.
    """
    command = [sys.executable, "-c", _SERVE, "serve", "--base", str(base), "--base-name", BASE]
    command += ["--port", "0", "--precision", precision, "--linger", "0"]
    if adapter:
        command += ["--adapter", f"adapter={adapter}", "--name", TUNED]
    with tempfile.TemporaryDirectory(prefix="tuning-eval-") as folder:
        log = Path(folder, "serve.log")
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.PIPE)
        try:
            url = _waited(process, log, r"Listening on (http://\S+?:\d+)")
            said(_waited(process, log, r"(Ready: .*)"))
            server = Server(url, (BASE, TUNED) if adapter else (BASE,))
            if set(server.models) - server.listed():
                text = " ".join(log.read_text("utf-8", "replace").split())
                why = text.partition("is refused: ")[2].partition(" Change:")[0][:400]
                change = "correct the adapter, or name another one"
                raise SpecError.at("SERVE-134", "--adapter", f"is not served: {why}", change)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()


def _waited(process: subprocess.Popen[bytes], log: Path, pattern: str) -> str:
    """What the first group of `pattern` matches in the log, once it is there."""
    while True:
        ended = process.poll()
        text = log.read_text("utf-8", "replace")
        if found := re.search(pattern, text):
            return found[1]
        if ended is not None:
            raise ServerEnded(ended if ended > 0 else 128 - ended, text.strip()[-2000:])
        time.sleep(0.1)


def measure(
    base: Path, adapter: Path | None, tasks: Tasks, *, precision: str, tokens: int, console: Console
) -> tuple[list[Score], list[Question]]:
    """Serve `base` and `adapter`, and put all `tasks` to both.

    Raises as `serving`, `ask` and `lm_eval` do.
    """
    found: list[Score] = []
    asked: list[Question] = []
    own = adapter if adapter and (adapter / "tokenizer.json").is_file() else base
    with serving(base, adapter, precision=precision, said=console.say) as server:
        for name, pairs in tasks.questions:
            with console.work(f"Asking {name}", unit="answers") as report:
                answers = ask(server, pairs, tokens=tokens, progress=report)
            found += scores(name, answers)
            asked += [replace(each, task=name) for each in answers]
        if tasks.named:
            tokenizers = {BASE: base, TUNED: own}
            found += lm_eval(server, tasks, tokenizers=tokenizers)
    return found, asked


def ask(
    server: Server,
    questions: Sequence[tuple[str, str]],
    *,
    tokens: int,
    progress: Callable[[int, int, str], None],
) -> list[Question]:
    """Put every question to every model; answers are greedy and at most `tokens` long."""
    wanted = [(model, text) for text, _ in questions for model in server.models]
    replies: dict[tuple[str, str], str] = {}
    with ThreadPoolExecutor(AT_ONCE) as threads:
        said = threads.map(lambda job: server.reply(job[0], job[1], tokens), wanted)
        for done, (job, reply) in enumerate(zip(wanted, said, strict=True), 1):
            replies[job] = reply
            progress(done, len(wanted), "")
    return [
        Question(text, answer, {model: replies[model, text] for model in server.models})
        for text, answer in questions
    ]


def scores(task: str, asked: Sequence[Question]) -> list[Score]:
    """The share of right answers of each model."""
    return [
        _share(task, model, sum(each.right(model) for each in asked), len(asked))
        for model in asked[0].replies
    ]


def _share(task: str, model: str, right: int, count: int) -> Score:
    """A share with Wilson's interval (E. B. Wilson, JASA 22, 1927), which holds near 0 and 1."""
    share, width = right / count, Z * Z / count
    middle = (share + width / 2) / (1 + width)
    half = Z * math.sqrt(share * (1 - share) / count + width / (4 * count)) / (1 + width)
    low, high = min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
    return Score(task, "right", model, share, low, high, count)


def differences(asked: Sequence[Question]) -> list[dict[str, Any]]:
    """How many questions of each task one model alone answered right, with McNemar's exact test.

    Both answered the same questions, so those that tell the models apart are compared with tosses
    of a coin (Q. McNemar, Psychometrika 12, 1947): p is the chance of a split as uneven.
    """
    found = []
    for task in dict.fromkeys(each.task for each in asked):
        mine = [(q.right(BASE), q.right(TUNED)) for q in asked if q.task == task and _both(q)]
        base, tuned = mine.count((True, False)), mine.count((False, True))
        if mine:
            p = _sign_test(base, tuned)
            found.append({"task": task, "only_base": base, "only_tuned": tuned, "p": p})
    return found


def _both(question: Question) -> bool:
    return {BASE, TUNED} <= question.replies.keys()


def _sign_test(one: int, other: int) -> float:
    """The chance that of `one + other` tosses of a coin as few, or fewer, fall on one side."""
    count = one + other
    tail = sum(math.comb(count, k) for k in range(min(one, other) + 1))
    return min(1.0, float(2 * tail / 2**count))


def lm_eval(server: Server, tasks: Tasks, *, tokenizers: dict[str, Path]) -> list[Score]:
    """The scores that lm-eval gives every model on the named tasks; its progress goes to stderr.

    `tokenizers` are the folders of each model's. Raises SpecError if lm-eval fails.
    """
    found: list[Score] = []
    yaml = [Path(task) for task in tasks.named if task.endswith((".yaml", ".yml"))]
    names = [path.stem for path in yaml]
    names += [task for task in tasks.named if Path(task) not in yaml]
    with tempfile.TemporaryDirectory(prefix="tuning-eval-") as folder:
        for model in server.models:
            arguments = {
                "model": model,
                "base_url": f"{server.url}/v1/completions",
                "tokenizer": str(tokenizers[model]),
                "num_concurrent": str(AT_ONCE),
            }
            command = [tasks.python, "-m", "lm_eval", "run", "--model", "local-completions"]
            command += ["--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())]
            command += ["--tasks", ",".join(names), "--batch_size", str(AT_ONCE)]
            for path in dict.fromkeys(str(each.parent.absolute()) for each in yaml):
                command += ["--include_path", path]
            out = Path(folder, model)
            command += ["--output_path", str(out), *tasks.more]
            _run(command)
            found += [score for path in out.rglob("results_*.json") for score in _read(path, model)]
    return found


def _run(command: Sequence[str]) -> None:
    """Run lm-eval; what it prints goes to stderr. Raises SpecError."""
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    environment.setdefault("OPENAI_API_KEY", "none")
    try:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=environment, check=False
        ).returncode
    except OSError as error:
        what = f"cannot be started: {error.strerror}"
        raise UsageError.at("SERVE-132", command[0], what, "name a Python with lm-eval") from None
    if code:
        what = f"lm-eval ended with code {code}; what it said is above"
        raise SpecError.at("SERVE-133", "--tasks", what, "correct the tasks' names or files")


def _read(path: Path, model: str) -> Iterator[Score]:
    """The scores in a file of lm-eval's results."""
    record = files.read_json(path)
    samples = record.get("n-samples") or {}
    for task, values in record["results"].items():
        for key, value in values.items():
            match = _CHOSEN_FILTER.fullmatch(key)
            if not match or match["metric"].endswith("_stderr") or isinstance(value, (str, bool)):
                continue
            error = values.get(f"{match['metric']}_stderr,{match['filter']}")
            name = match["metric"] + ("" if match["filter"] == "none" else f" ({match['filter']})")
            count = (samples.get(task) or {}).get("effective")
            yield _measured(task, name, model, value, error, count)


def _measured(
    task: str, metric: str, model: str, value: float, error: Any, count: int | None
) -> Score:
    """A score of lm-eval with its standard error; of a share, whose error is 0 at both ends,
    Wilson's interval."""
    error = error if isinstance(error, (int, float)) else math.nan
    if count and count > 1 and 0 <= value <= 1:
        of_share = math.sqrt(value * (1 - value) / (count - 1))
        if math.isclose(error, of_share, abs_tol=1e-9):
            share = _share(task, model, round(value * count), count)
            return replace(share, metric=metric, value=value)
    return Score(task, metric, model, value, value - Z * error, value + Z * error, count)


def record(
    base: str,
    adapter: str | None,
    folder: Path | None,
    found: Sequence[Score],
    asked: Sequence[Question],
) -> dict[str, Any]:
    """What `evaluation.json` holds: names of base and adapter, scores by task and metric, the
    `differences`, and every question with its replies. `folder` is the adapter's."""
    tasks: dict[tuple[str, str], dict[str, Any]] = {}
    for score in found:
        entry = tasks.setdefault(
            (score.task, score.metric),
            {"task": score.task, "metric": score.metric, "samples": score.count, "models": {}},
        )
        bounds = [None if math.isnan(each) else each for each in (score.low, score.high)]
        entry["models"][score.model] = {"value": score.value, "low": bounds[0], "high": bounds[1]}
    return {
        "base": base,
        "adapter": adapter,
        "adapter_sha256": files.digest_file(folder / WEIGHTS) if folder else None,
        "tasks": list(tasks.values()),
        "differences": differences(asked),
        "asked": [asdict(question) for question in asked],
    }


def _work(request: dict[str, Any]) -> dict[str, Any]:
    """The child of a run: `{"base", "base_name", "adapter", "tasks"}` -> what `record` returns."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends lm-eval and the server, too
    adapter = Path(request["adapter"])
    try:
        found, asked = measure(
            Path(request["base"]),
            adapter,
            Tasks(**request["tasks"]),
            precision="auto",
            tokens=TOKENS,
            console=Console(),
        )
    except ServerEnded as ended:
        what = f"the server ended with code {ended.code}: {' '.join(ended.said.split())[-500:]}"
        raise SpecError.at("SERVE-135", "evaluate", what, "correct what it says") from None
    return record(request["base_name"], request["adapter"], adapter, found, asked)


if __name__ == "__main__":
    sys.exit(process.serve(_work))
