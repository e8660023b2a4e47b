"""`tuning serve` beside a plain transformers loop: requests a second, and time to first token.

    python benchmarks/serve.py [--model tiny|small] [--rounds 3] [--write]

Both answer the same questions over HTTP with the same base, adapter, precision and threads, one
after the other, several rounds in turn; medians over rounds. The plain loop is `generate` of a
PeftModel behind a lock, streamed with transformers' own streamer. Every answer has 48 tokens.
`small` is a random Llama of 100 million parameters, whose weights no cache holds.
`--write` appends to benchmarks/results/serve.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import http.client
import http.server
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOKENS = 48
CLIENTS = (1, 8)
SMALL = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}


def bodies(count: int) -> list[bytes]:
    """Questions of several lengths."""
    rows = [json.loads(line) for line in (ROOT / "examples/data/demo.jsonl").open()]
    turns = [row["messages"][:1] for row in rows]
    long = [
        [{"role": "user", "content": " ".join(t[0]["content"] for t in turns[i : i + 8])}]
        for i in range(0, 80, 8)
    ]
    mixed = [long[i // 4 % 10] if i % 4 == 3 else turns[i] for i in range(count)]
    return [
        json.dumps(
            {
                "messages": messages,
                "model": "adapter",
                "stream": True,
                "temperature": 0,
                "max_tokens": TOKENS,
                "min_tokens": TOKENS,
            }
        ).encode()
        for messages in mixed
    ]


def load(port: int, clients: int, requests: int) -> dict[str, float]:
    """Requests a second, and the median and 95th percentile of seconds to the first token."""
    waiting, lock, firsts = bodies(requests), threading.Lock(), []

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        while True:
            with lock:
                if not waiting:
                    return
                body = waiting.pop()
            start = time.perf_counter()
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", body, headers)
            reply = connection.getresponse()
            assert reply.status == 200, reply.read()
            first = None
            for line in reply:
                if first is None and b'"content": "' in line and b'"content": ""' not in line:
                    first = time.perf_counter() - start
            with lock:
                firsts.append(first if first is not None else time.perf_counter() - start)

    start = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ordered = sorted(firsts)
    return {
        "requests_per_second": requests / (time.perf_counter() - start),
        "first_token_median": statistics.median(ordered),
        "first_token_p95": ordered[int(0.95 * (len(ordered) - 1))],
    }


def plain(base: Path, adapter: Path, threads: int) -> None:
    """The plain loop, as a process of its own: prints its port, serves until it is killed."""
    import torch
    import transformers

    from tuning import adapter as adapters
    from tuning.models import generate
    from tuning.models.load import load_base, load_tokenizer

    torch.set_num_threads(threads)
    tokenizer = load_tokenizer(base)
    loaded = load_base(base, precision="float32", quantisation=None, device="cpu")
    tuned = generate.attach(loaded, adapters.inspect(adapter)).eval()
    one_at_a_time = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            ids = tokenizer.apply_chat_template(
                asked["messages"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            streamer = transformers.TextIteratorStreamer(
                tokenizer, skip_prompt=True, skip_special_tokens=True
            )
            settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
            with one_at_a_time:
                thread = threading.Thread(
                    target=tuned.generate, kwargs={**ids, **settings, "streamer": streamer}
                )
                thread.start()
                for text in streamer:
                    line = f"data: {json.dumps({'content': text})}\n\n".encode()
                    self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                thread.join()
            self.wfile.write(b"0\r\n\r\n")

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


def ours(base: Path, adapter: Path, threads: int) -> None:
    """`tuning serve`, as a process of its own."""
    import torch

    from tuning.console import Console
    from tuning.serve import listening, server
    from tuning.serve.adapter_specs import AdapterSpec
    from tuning.serve.options import Options

    torch.set_num_threads(threads)
    options = Options(
        "base",
        weights=lambda: base,
        adapters=(AdapterSpec("adapter", str(adapter)),),
        port=0,
        precision="float32",
    )
    with listening.socket_for(options) as listener:
        print(listener.getsockname()[1], flush=True)
        server.run(options, listener, Console(quiet=True))


@contextlib.contextmanager
def running(which: str, base: Path, adapter: Path, threads: int) -> Iterator[int]:
    """The port of one of the two, ready to answer."""
    command = [sys.executable, __file__, "--serve", which, str(base), str(adapter), str(threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        try:
            for _ in range(600):
                with contextlib.suppress(OSError):
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                    headers = {"Content-Type": "application/json"}
                    connection.request("POST", "/v1/chat/completions", bodies(1)[0], headers)
                    if connection.getresponse().status == 200:
                        break
                time.sleep(0.2)
            yield port
        finally:
            process.kill()


def materials(kind: str, folder: Path) -> tuple[Path, Path]:
    """A base model and an adapter with random weights."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tuning.models.load import load_base

    base = ROOT / "examples" / "tiny-model"
    if kind == "small":
        sys.path.insert(0, str(ROOT / "tests"))
        import tiny_models

        base = tiny_models.build("llama", folder / "base", vocab_size=32_000, **SMALL)
    loaded = load_base(base, precision="float32", quantisation=None, device="cpu")
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(loaded, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    tuned.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


def main() -> None:
    """Measure and print a table."""
    if sys.argv[1:2] == ["--serve"]:
        which, base, adapter, threads = sys.argv[2:]
        {"ours": ours, "plain": plain}[which](Path(base), Path(adapter), int(threads))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["tiny", "small"], default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    found: dict[str, dict[int, list[dict[str, float]]]] = {
        which: {clients: [] for clients in CLIENTS} for which in ("plain", "ours")
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        base, adapter = materials(given.model, Path(folder))
        ports = {
            which: stack.enter_context(running(which, base, adapter, given.threads))
            for which in found
        }
        for _ in range(given.rounds):
            for clients in CLIENTS:
                for which, port in ports.items():
                    count = given.requests if clients > 1 else max(4, given.requests // 4)
                    found[which][clients].append(load(port, clients, count))
    medians = {
        which: {
            clients: {key: round(statistics.median(r[key] for r in rounds), 4) for key in rounds[0]}
            for clients, rounds in by.items()
        }
        for which, by in found.items()
    }
    for which, by in medians.items():
        for clients, row in by.items():
            cells = "  ".join(f"{key} {value:8.3f}" for key, value in row.items())
            print(f"{which:6s} {clients} clients  {cells}")
    ratios = {
        clients: round(
            medians["ours"][clients]["requests_per_second"]
            / medians["plain"][clients]["requests_per_second"],
            2,
        )
        for clients in CLIENTS
    }
    print(f"requests a second, ours / plain: {ratios}")
    if given.write:
        import peft
        import torch
        import transformers

        record = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, Python {platform.python_version()}, CPU",
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
            "model": given.model,
            "threads": given.threads,
            "rounds": given.rounds,
            "requests": given.requests,
            "medians": medians,
            "ratio": ratios,
        }
        path = ROOT / "benchmarks" / "results" / "serve.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
