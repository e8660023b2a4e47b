"""The command line in a process of its own, and a short Workspace for it."""

import base64
import subprocess
import sys

import yaml


def tuning(*arguments, timeout=280, **options):
    """Run `python -m tuning ARGUMENTS` and give what it said."""
    return subprocess.run(
        [sys.executable, "-m", "tuning", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )


def good(done):
    """What a command printed on stdout, after it ended well."""
    assert 0 == done.returncode, done.stderr
    return done.stdout


def dockerconfig(host, user, password):
    """The content of a dockerconfigjson."""
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"auths": {host: {"auth": auth}}}


def workspace(path, *, method="lora", settings=None, sections=None, **tuning_fields):
    """Write a Workspace that stands in `path`, with a few steps of training.

    `settings` are TrainingArguments, `sections` other sections of the ConfigMap.
    """
    fields = {
        "preset": {"name": "tuning/tiny-model"},
        "method": method,
        "config": "settings",
        "input": {"urls": ["https://example.com/rows.jsonl"]},
        "output": {"image": "registry.example.com/a:1", "imagePushSecret": "push"},
    } | tuning_fields
    document = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": path.stem},
        "resource": {"labelSelector": {"matchLabels": {"apps": "test"}}},
        "tuning": fields,
    }
    training = {"max_steps": 4, "learning_rate": 0.001} | (settings or {})
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "settings"},
        "data": {
            "training_config.yaml": yaml.safe_dump(
                {"training_config": {"TrainingArguments": training} | (sections or {})}
            )
        },
    }
    path.write_text(yaml.safe_dump_all([document, config]))
    return path
