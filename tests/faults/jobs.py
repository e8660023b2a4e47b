"""A small job with real parts for faults to strike: rows by HTTP, a tiny base, a real registry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_models
import yaml
from faults import audit
from faults.kills import Aim, Ended, Run, released
from faults.proxy import Proxy
from faults.web import Origin
from registries import Registry

ROWS = "/rows.jsonl"


@dataclass
class World:
    """What all runs of a test file share."""

    folder: Path
    base: Path
    web: Origin
    registry: Registry
    proxy: Proxy  # in front of the registry
    rows: bytes
    runs: list[Run] = field(default_factory=list)  # the last one is what a fault kills
    folders: list[Path] = field(default_factory=list)  # run directories, for the audit

    def journal(self, name: str, event: str) -> list[dict[str, Any]]:
        """The records of `event` in the journal of the run called `name`."""
        lines = (self.folder / name / "journal.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["event"] == event]

    def command(
        self,
        name: str,
        *,
        base: Path | None = None,
        url: str = ROWS,
        method: str = "lora",
        lora: dict[str, Any] | None = None,
        **changes: Any,
    ) -> list[object]:
        """The command line of the run called `name`; `changes` are TrainingArguments."""
        image = f"{self.proxy.host}/team/{name}:v1"
        job = self.folder / f"{name}.yaml"
        settings = {"max_steps": 6, "learning_rate": 0.001, "save_strategy": "steps"}
        training = settings | {"save_steps": 2} | changes
        sections = {"TrainingArguments": training, "LoraConfig": lora or {}}
        write_job(job, image=image, url=self.web.url(url), method=method, sections=sections)
        run = self.folder / name
        if run not in self.folders:
            self.folders.append(run)
        return [
            *("run", "-f", job, "--base-model", base or self.base, "--run-dir", run),
            *("--allow-host", "127.0.0.1", "--insecure", "--json"),
        ]

    def start(self, name: str, *, aim: Aim | None = None, how: Any = None, **changes: Any) -> Run:
        """Start the run called `name`; `how` are further options of a Run."""
        self.runs.append(Run(self.command(name, **changes), aim=aim, **(how or {})))
        return self.runs[-1]

    def run(self, name: str, *, aim: Aim | None = None, how: Any = None, **changes: Any) -> Ended:
        """The run called `name` to its end, and that of all its processes."""
        ended = self.start(name, aim=aim, how=how, **changes).end()
        released(self.folder / name)
        return ended


@contextmanager
def world(folder: Path, base: Path) -> Iterator[World]:
    """A web server with rows and a registry; all runs that they leave behind are audited."""
    rows = "".join(json.dumps(row) + "\n" for row in tiny_models.message_rows(64)).encode()
    with Origin() as web, Registry(folder) as registry, Proxy(registry.address) as proxy:
        web.serve(ROWS, rows)
        made = World(folder, base, web, registry, proxy, rows)
        yield made
        assert audit.check(made.folders) > 0


def write_job(
    path: Path, *, image: str, url: str, method: str, sections: dict[str, dict[str, Any]]
) -> None:
    """A Workspace and its ConfigMap."""
    workspace = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": "faults"},
        "resource": {"labelSelector": {"matchLabels": {"apps": "test"}}},
        "tuning": {
            "preset": {"name": "tuning/tiny-model"},
            "method": method,
            "config": "settings",
            "input": {"urls": [url]},
            "output": {"image": image, "imagePushSecret": "push"},
        },
    }
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "settings"},
        "data": {"training_config.yaml": yaml.safe_dump({"training_config": sections})},
    }
    path.write_text(yaml.safe_dump_all([workspace, config]))


def result(ended: Ended) -> tuple[str, str]:
    """The adapter's sha256 and the image's digest of a run that ended well."""
    assert 0 == ended.status, ended.err
    summary = json.loads(ended.out)
    return summary["training"]["adapter_sha256"], summary["digest"]
