"""A Workspace file is read whole: what it means, and everything that is wrong with it."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuning import files, spec
from tuning.errors import SpecError
from tuning.spec import Destination, Overrides, Settings, Source, config, keys, urls
from tuning.spec.urls import Dataset, dataset
from tuning.spec.values import Spec

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("workspace-*.yaml"))
SERVING = [path for path in EXAMPLES if path.stem.startswith("workspace-inference")]
EXAMPLES = [path for path in EXAMPLES if path not in SERVING]
NOTHING = Overrides()
QUICK_START = ROOT / "examples" / "workspace-tuning-phi-3.yaml"

WORKSPACE: dict[str, Any] = {
    "apiVersion": "kaito.sh/v1beta1",
    "kind": "Workspace",
    "metadata": {"name": "mine"},
    "tuning": {
        "preset": {"name": "phi-4"},
        "method": "qlora",
        "input": {"urls": ["https://data.example.com/a.jsonl"]},
        "output": {"image": "registry.example.com/a/b:1", "imagePushSecret": "login"},
    },
}

LORA_TEMPLATE = """\
training_config:
  ModelConfig:
    torch_dtype: "bfloat16"
    local_files_only: true
    device_map: "auto"
  QuantizationConfig:
    load_in_4bit: false
  LoraConfig:
    r: 8
    lora_alpha: 8
    lora_dropout: 0.0
  TrainingArguments:
    output_dir: "/mnt/results"
    ddp_find_unused_parameters: false
    save_strategy: "no"
    per_device_train_batch_size: 1
  DataCollator:
    mlm: true
  DatasetConfig:
    shuffle_dataset: true
    train_test_split: 1
"""
QLORA_TEMPLATE = LORA_TEMPLATE.replace(
    "load_in_4bit: false",
    "load_in_4bit: true\n    bnb_4bit_quant_type: nf4\n    bnb_4bit_compute_dtype: bfloat16\n"
    "    bnb_4bit_use_double_quant: true",
)


def with_changes(**changes: Any) -> dict[str, Any]:
    """WORKSPACE with other values at dotted paths ("__" for "."); ... takes one away."""
    document = copy.deepcopy(WORKSPACE)
    for path, value in changes.items():
        *above, last = path.split("__")
        part = document
        for name in above:
            part = part.setdefault(name, {})
        if value is ...:
            del part[last]
        else:
            part[last] = value
    return document


def read(document: Any, *, overrides: Overrides = NOTHING) -> Spec:
    return spec.parse(yaml.safe_dump(document), origin="ws.yaml", overrides=overrides)


def refusals(document: Any, *, overrides: Overrides = NOTHING) -> list[str]:
    """What is wrong, as people read it."""
    text = document if isinstance(document, str) else yaml.safe_dump(document)
    with pytest.raises(SpecError) as caught:
        spec.parse(text, origin="ws.yaml", overrides=overrides)
    return [str(problem) for problem in caught.value.problems]


def with_config(config: str, **changes: Any) -> str:
    """A file of WORKSPACE and a ConfigMap with the text `config`."""
    document = with_changes(tuning__config="mine", **changes)
    config_map = {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "mine"}}
    config_map["data"] = {"training_config.yaml": config}
    return yaml.safe_dump_all([document, config_map])


def settings(section: str, content: str, **changes: Any) -> Settings:
    """The settings of one section, whose keys `content` holds as YAML in one line."""
    text = with_config(f"training_config:\n  {section}: {content}\n", **changes)
    return spec.parse(text, origin="ws.yaml").settings


def notes(section: str, content: str) -> tuple[str, ...]:
    text = with_config(f"training_config:\n  {section}: {content}\n")
    return spec.parse(text, origin="ws.yaml").notes


def config_refusals(section: str, content: str, **changes: Any) -> list[str]:
    return refusals(with_config(f"training_config:\n  {section}: {content}\n", **changes))


# The Workspace


def test_a_small_workspace_means_what_it_says() -> None:
    """The few fields that matter; everything else is left to the plan."""
    actual = read(WORKSPACE)

    assert (actual.name, actual.preset, actual.method) == ("mine", "phi-4", "qlora")
    assert Source(urls=("https://data.example.com/a.jsonl",)) == actual.source
    assert Destination(image="registry.example.com/a/b:1", push_secret="login") == (
        actual.destination
    )
    assert Settings() == actual.settings
    assert () == actual.notes


def test_the_quick_start_names_the_placeholders_to_fill_in() -> None:
    """As published it is refused: each placeholder is named, once, with what belongs there."""
    with pytest.raises(SpecError) as caught:
        spec.load(QUICK_START)

    lines = str(caught.value).splitlines()
    assert 2 == len(lines)
    assert "tuning.output.image (line 19)" in lines[0]
    assert "ACR_REPO_HERE and IMAGE_NAME_HERE" in lines[0]
    assert "tuning.output.imagePushSecret (line 20)" in lines[1]
    assert "ACR_REGISTRY_SECRET_HERE" in lines[1]
    assert 11 == caught.value.exit_code


def test_the_quick_start_reads_with_its_placeholders_filled_in() -> None:
    """Nothing else in it needs a change."""
    text = QUICK_START.read_text()
    for old, new in (
        ("ACR_REPO_HERE", "mine"),
        ("IMAGE_NAME_HERE", "phi-3-dolly"),
        ("ACR_REGISTRY_SECRET_HERE", "login"),
    ):
        text = text.replace(old, new)
    actual = spec.parse(text, origin="quick start")

    assert "phi-3-mini-128k-instruct" == actual.preset
    assert "Standard_NC6s_v3" == actual.instance
    assert Destination(image="mine.azurecr.io/phi-3-dolly:0.0.1", push_secret="login") == (
        actual.destination
    )
    assert actual.source.urls[0].endswith(".parquet?download=true")
    assert () == actual.notes


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_read(path: Path) -> None:
    """What people copy must work, and starts with the line that gives editors the schema."""
    actual = spec.load(path, overrides=Overrides(output="oci:out"))

    assert actual.preset
    first = path.read_text().splitlines()[0]
    assert "# yaml-language-server: $schema=../configs/workspace.schema.json" == first


@pytest.mark.parametrize("path", SERVING, ids=lambda path: path.stem)
def test_every_example_of_serving_is_read(path: Path) -> None:
    """Once its placeholders are filled in; before that, each of them is named."""
    text = path.read_text()
    with pytest.raises(SpecError) as caught:
        spec.parse_workspace(text, origin="x")
    assert {"SPEC-114"} == {problem.code for problem in caught.value.problems}
    for word in ("ACR_REPO_HERE", "IMAGE_NAME_HERE", "ACR_REGISTRY_SECRET_HERE"):
        text = text.replace(word, "mine")
    found = spec.parse_workspace(text, origin="x")
    assert found.inference and found.inference.adapters


@pytest.mark.parametrize(
    ("inference", "code"),
    [({"preset": {"name": "phi-4"}}, "SPEC-108"), ({"template": {}}, "SPEC-116")],
    ids=["preset", "template"],
)
def test_what_was_tuned_is_what_is_served(inference: dict[str, Any], code: str) -> None:
    """Beside tuning an empty `inference` is enough; another model is refused."""
    assert read(with_changes(inference={})).preset
    with pytest.raises(SpecError) as caught:
        read(with_changes(inference=inference, tuning__preset={"name": "phi-3-mini-4k-instruct"}))
    assert [code] == [problem.code for problem in caught.value.problems]


@pytest.mark.parametrize("method", ["LoRA", "QLORA", "lora"])
def test_method_in_any_case(method: str) -> None:
    """As in KAITO."""
    assert method.lower() == read(with_changes(tuning__method=method)).method


def test_all_problems_at_once_each_with_place_line_and_change() -> None:
    """One error for the whole file, the ConfigMap included, in the order of the lines."""
    text = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: Mine}
resource: {count: 65}
tuning:
  preset: {name: phi-4}
  method: lorra
  config: phi-config
  input:
    urls: ["https://ok.example.com/a", "ftp://example.com/a"]
    image: registry.example.com/a:1
    volume: {}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: phi-config}
data:
  training_config.yaml: |
    training_config:
      LoraConfig:
        lora_aplha: 32
        r: many
      TrainArguments: {}
"""
    expected = [
        ("SPEC-107", "metadata.name (line 3)", '"Mine" is not a valid name of a Workspace'),
        ("SPEC-104", "resource.count (line 4)", "write a number of at most 64"),
        ("SPEC-112", "tuning.output (line 5)", "missing field(s): tuning.Output"),
        ("SPEC-104", "tuning.method (line 7)", 'did you mean "lora"?'),
        ("SPEC-116", "tuning.input (line 9)", "Exactly one of URLs, Volume, or Image must be"),
        ("SPEC-115", "tuning.input.urls[1] (line 10)", "data source URL must use HTTP or HTTPS"),
        ("SPEC-111", "tuning.input.volume (line 12)", 'write "volumeSource"'),
        ("SPEC-112", "tuning.input.volumeSource (line 12)", "names no volume"),
        (
            "SPEC-111",
            "ConfigMap phi-config: training_config.LoraConfig.lora_aplha (line 21)",
            'did you mean "lora_alpha"?',
        ),
        (
            "SPEC-113",
            "ConfigMap phi-config: training_config.LoraConfig.r (line 22)",
            'is "many", expected a whole number',
        ),
        (
            "SPEC-111",
            "ConfigMap phi-config: training_config.TrainArguments (line 23)",
            'Unrecognized section: TrainArguments. Change: did you mean "TrainingArguments"?',
        ),
    ]
    actual = refusals(text)

    assert len(expected) == len(actual), "\n".join(actual)
    for (code, where, words), line in zip(expected, actual, strict=True):
        assert line.startswith(f"{code} {where}: "), line
        assert words in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tuning": ...}, "Either Inference or Tuning must be specified, not neither"),
        ({"tuning__preset": ...}, "tuning.preset (line 5): missing field(s): tuning.Preset"),
        ({"tuning__input": ...}, "missing field(s): tuning.Input"),
        ({"tuning__output": ...}, "missing field(s): tuning.Output"),
        ({"tuning__input": {"urls": []}}, "Exactly one of URLs, Volume, or Image must be"),
        ({"tuning__output": {}}, "Exactly one of Volume or Image must be specified"),
        ({"tuning__output": {"image": "r.io/a:1"}}, "Must specify imagePushSecret with destin"),
        ({"tuning__output__image": "r.io/A:1"}, "Unable to parse output image reference: "),
        ({"tuning__output__image": "r.io/a@sha256:" + "0" * 64}, "known only after the push"),
        ({"tuning__input": {"image": "r.io/a b"}}, "Unable to parse input image reference: "),
        ({"tuning__config": "absent"}, "ConfigMap 'absent' specified in 'config' not found in na"),
        ({"tuning__preset__name": "a/b/c"}, 'Unsupported tuning preset name "a/b/c"'),
        ({"tuning__preset__nmae": "x"}, 'unknown key. Change: did you mean "name"?'),
        ({"tuning__output__pushSecret": "x"}, 'did you mean "imagePushSecret"?'),
        ({"spec": {}}, 'a Workspace has no "spec"'),
        ({"resource": {"partition": {}}}, "GPU partitioning is not supported for tuning"),
        ({"resource": {"instanceType": "a b"}}, "which is not an instance type"),
        (
            {"resource": {"labelSelector": {"matchExpressions": [{"key": "a", "operator": "X"}]}}},
            "Only allow matchLabels or 'IN' matchExpression",
        ),
        ({"apiVersion": "kaito.sh/v1"}, 'apiVersion (line 1): is "kaito.sh/v1". Change: use '),
        ({"kind": "WorkSpace"}, "did you mean Workspace?"),
        ({"kind": "RAGEngine"}, 'is "RAGEngine". Change: use Workspace'),
        ({"kind": ...}, "missing field(s): kind"),
        ({"tuning__method": True}, "is true, which YAML reads as yes or no, expected a string"),
        ({"tuning__input__volumeSource": {"hostPath": {}}}, "needs the path of a folder"),
        ({"metadata__annotations": {"tuning.kaito.sh/on-tag": "x"}}, 'did you mean "on-tag-exi'),
        ({"metadata__annotations": {"tuning.kaito.sh/on-tag-exists": "x"}}, "use refuse or over"),
        (
            {"metadata__annotations": {"a": 1}},
            "is 1, expected a string. Change: write a string, in q",
        ),
        ({"inference": {"adapters": [{}]}}, "Either Image or Volume must be specified for adapt"),
        ({"inference": {"adapters": [{}] * 11}}, "Number of Adapters exceeds the maximum limit"),
    ],
)
def test_kaitos_rules_in_kaitos_words(changes: dict[str, Any], words: str) -> None:
    """One slip each; the sentence is the one that users of KAITO know, where it has one."""
    assert any(words in line for line in refusals(with_changes(**changes)))


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"source": {"name": "a", "image": "r.io/a", "urls": ["https://a.com/b"]}}, "URLs are not"),
        ({"source": {"image": "r.io/a"}}, "Name of Adapter field must be specified"),
        ({"source": {"name": "a", "image": "r.io/a"}, "strength": "2"}, "must be between 0 and 1"),
        ({"source": {"name": "a", "image": "r.io/a"}, "strength": "x"}, "Invalid strength value"),
        ({"source": {"name": "b", "image": "r.io/a"}}, "Duplicate adapter source name found"),
    ],
)
def test_adapters_to_serve_are_checked_too(adapter: dict[str, Any], words: str) -> None:
    """KAITO applies some of these on update only."""
    other = {"source": {"name": "b", "image": "r.io/b"}, "strength": "0.5"}
    inference = {"preset": {"name": "phi-4"}, "adapters": [other, adapter]}
    actual = refusals(with_changes(inference=inference))

    assert 1 == len(actual)
    assert words in actual[0]


@pytest.mark.parametrize("name", sorted(config._ELSEWHERE))
def test_what_people_type_first_is_answered_with_the_key_that_does_it(name: str) -> None:
    """Names of other tools: a key that exists, never the nearest spelling of something else."""
    (found,) = config_refusals("TrainingArguments", f"{{{name}: 1}}")

    (told,) = re.findall(r"Change: use (\w+)\.(\w+)", found)
    assert told[1] in keys.sections()[told[0]], found
    assert keys.sections()[told[0]][told[1]].use in ("honoured", "translated"), found


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("rank", "LoraConfig.r"),
        ("lr", "TrainingArguments.learning_rate"),
        ("eval_split", "DatasetConfig.train_test_split"),
        ("batch_size", "TrainingArguments.per_device_train_batch_size"),
        ("cutoff_len", "TrainingArguments.max_length"),
        ("sample_packing", "TrainingArguments.packing"),
    ],
)
def test_the_usual_names_mean_the_usual_things(name: str, key: str) -> None:
    """What each means is not up to edit distance."""
    assert f"use {key}" in config_refusals("TrainingArguments", f"{{{name}: 1}}")[0]


def test_one_slip_is_one_problem() -> None:
    """A misspelt key is not reported again as the missing one, and what is below it is checked."""
    document = with_changes(tuning__output=...)
    document["tuning"]["outptu"] = {"image": "r.io/A:1", "imagePushSecret": "login"}
    actual = refusals(document)

    assert 2 == len(actual)
    assert 'did you mean "output"?' in actual[0]
    assert "Unable to parse output image reference" in actual[1]


def test_fields_of_v1beta1_are_unknown_in_v1alpha1() -> None:
    """The older version has no Secret for gated models."""
    options = {"tuning__preset__presetOptions": {"modelAccessSecret": "hub"}}

    assert "hub" == read(with_changes(**options)).hub_secret
    old = refusals(with_changes(apiVersion="kaito.sh/v1alpha1", **options))
    assert "set apiVersion to kaito.sh/v1beta1" in old[0]


def test_image_and_volume_output_together() -> None:
    """KAITO's exactly-one rule is an at-least-one rule here."""
    volume = {"hostPath": {"path": "/adapters"}}
    actual = read(with_changes(tuning__output__volumeSource=volume)).destination

    assert (Path("/adapters"), "registry.example.com/a/b:1") == (actual.folder, actual.image)


def test_volumes_of_the_cluster_are_where_the_job_mounts_them() -> None:
    """And a note says what to do on one's own machine."""
    volume = {"volumeSource": {"persistentVolumeClaim": {"claimName": "x"}}}
    actual = read(with_changes(tuning__input=volume, tuning__output=volume))

    assert Path("/data") == actual.source.folder
    assert Path("/output") == actual.destination.folder
    assert ["give --data FOLDER", "give --output dir:FOLDER"] == [
        note.partition("machine ")[2] for note in actual.notes
    ]


def test_plain_http_is_noted() -> None:
    """It is allowed, but not in silence."""
    actual = read(with_changes(tuning__input={"urls": ["http://data.example.com/a"]}))

    assert "tuning.input.urls[0]: http, not https" in actual.notes[0]


def test_annotation_replaces_the_tag() -> None:
    """Where an extension lives: what concerns the push is an annotation."""
    annotations = {"tuning.kaito.sh/on-tag-exists": "overwrite", "example.com/x": "y"}

    assert "refuse" == read(WORKSPACE).destination.on_tag_exists
    changed = read(with_changes(metadata__annotations=annotations))
    assert "overwrite" == changed.destination.on_tag_exists


def test_the_status_tells_of_earlier_outputs() -> None:
    """Their digests may be replaced under the tag; whatever else stands there is no digest."""
    digest = "sha256:" + "ab" * 32
    changed = with_changes(status={"outputs": [digest, "sha256:short", 7], "state": "Succeeded"})

    assert (digest,) == read(changed).destination.earlier
    assert () == read(with_changes(status={"outputs": "x"})).destination.earlier
    assert () == read(WORKSPACE).destination.earlier


def test_what_kubectl_prints_can_be_read_again() -> None:
    """Status and the metadata of the cluster are read over, null is absent."""
    metadata = {"name": "mine", "uid": "1", "creationTimestamp": "2026-01-01T00:00:00Z"}
    metadata["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": "{}"}  # type: ignore[assignment]
    document = with_changes(metadata=metadata, status={"state": "Running"}, resource=None)
    actual = read(document)

    assert {"name": "mine", "annotations": {}} == actual.document["metadata"]
    assert {"apiVersion", "kind", "metadata", "tuning"} == actual.document.keys()


# The file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty, but no Workspace"),
        ("---\n---\n", "is empty, but no Workspace"),
        ("a: [", "SPEC-102 ws.yaml line 2, column 1: invalid YAML"),
        ("a:\n\t- b", "invalid YAML: found character that cannot start any token"),
        ("kind: Workspace\nkind: Workspace\n", "duplicate key, first in line 1"),
        ("kind: Pod\n", 'holds "Pod", but no Workspace'),
        ("kind: Workspace\n---\nkind: Workspace\n", "holds 2 Workspaces, in lines 1 and 3"),
        ("- 1", "but no Workspace"),
        ("just words", "but no Workspace"),
        ("kind: Workspace\nx: !!python/object/apply:os.system [ls]\n", "tag !!python/object/app"),
        ("[" * 5000, "nested more than 64 deep"),
        ("a: &a [*a]\nkind: Workspace\n", "nested more than 64 deep"),
        ("x" * ((1 << 20) + 1), "is larger than 1 MiB"),
        ("a: \x01", "characters that YAML does not allow"),
        ("a: \ud800", "invalid characters"),
        ("kind: Workspace\ntuning: {x: .nan}\n", ".nan is not a finite number"),
        ("kind: Workspace\n1: 2\n", "the key 1 is not a string"),
    ],
    ids=range(17),
)
def test_bad_files_are_refused_with_the_line(text: str, words: str) -> None:
    """Whatever a stranger writes, the answer is one SpecError."""
    assert any(words in line for line in refusals(text)), refusals(text)


def test_an_alias_bomb_is_refused() -> None:
    """Nine levels of nine aliases would be 387 million values."""
    levels = [f"{'abcdefghi'[i]}: &{'abcdefghi'[i]} [{','.join(['*' + 'abcdefgh'[i - 1]] * 9)}]"
              for i in range(1, 9)]  # fmt: skip
    text = "\n".join(["kind: Workspace", "a: &a [x,x,x,x,x,x,x,x,x]", *levels])

    assert "more than 200000 values" in refusals(text)[0]


def test_aliases_and_merges_work_as_in_kubectl() -> None:
    """YAML has them, and people use them for labels."""
    text = """\
x: &base {preset: {name: phi-4}, method: lora}
"""
    document = yaml.safe_dump(with_changes(tuning__preset=..., tuning__method=...))
    merged = document.replace("tuning:\n", "tuning:\n  <<: {preset: {name: phi-4}, method: lora}\n")

    assert "lora" == spec.parse(merged, origin="ws.yaml").method
    assert any("unknown key" in line for line in refusals(text + yaml.safe_dump(WORKSPACE)))


def test_a_missing_file_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    """Each with its own sentence, no traceback."""
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match="no such file"):
        spec.load(tmp_path / "a.yaml")
    with pytest.raises(SpecError, match="is not UTF-8"):
        spec.load(tmp_path / "b.yaml")
    with pytest.raises(SpecError, match="larger than 1 MiB"):
        spec.load(Path("/dev/zero"))
    with pytest.raises(SpecError, match="cannot be read: is a directory"):
        spec.load(tmp_path)


def test_a_secret_in_the_file_is_never_read_or_shown() -> None:
    """Not even when something else in the file is wrong."""
    secret = {"kind": "Secret", "metadata": {"name": "login"}, "data": {"password": "hunter2"}}
    text = yaml.safe_dump_all([WORKSPACE, secret, {"kind": "Pod"}])
    actual = spec.parse(text, origin="ws.yaml")

    assert 2 == len(actual.notes)
    assert actual.notes[0].startswith("Secret: not read")
    assert "hunter2" not in repr(actual) + spec.dump(actual)
    broken = text.replace("password: hunter2", "password: [hunter2")
    assert "hunter2" not in "".join(refusals(broken))


def test_inference_alone_cannot_be_tuned() -> None:
    """The schema admits it; a run has nothing to do."""
    document = with_changes(tuning=..., inference={"preset": {"name": "phi-4"}})

    assert "there is nothing to tune" in refusals(document)[0]


# URLs

REFUSED_URLS = [
    (urls.NOT_HTTP, ["ftp://a.com/b", "file:///etc/passwd", "data:text/plain,x", "jar:http://a!/"]),
    (urls.NOT_HTTP, ["gopher://a.com/", "swift://bucket/key", "javascript:alert(1)"]),
    (
        urls.INVALID,
        [
            "", "//a.com/b", "/etc/passwd", "a.com/b", "https://", "https:///x", "https://u@a.com/",
            "https://u:p@a.com/", "https://a.com\\@b.com/", "https://a.com/\r\nHost: x",
            "https://a.com/\tb", "https://a.com/a b", "https://bücher.example/", "https://a.com:0/",
            "https://a.com:99999/", "https://a.com:x/", "https://a.com/../b", "https://[::1/",
            "https://a.com/%2e%2e/b", "https://a.com/..%2Fb", "https://a%00.com/", "https://a..b/",
            "https://%6c%6f/", "https://-a.com/", "https://8.8.2056/", "https://0x08080808/",
            "https://a.com/" + "x" * 9000,
        ],
    ),
    (
        urls.LOCAL_NAME,
        [
            "http://localhost/", "http://LOCALHOST:80/", "http://a.localhost/", "http://localhost./",
            "http://metadata.google.internal/", "http://metadata.google/",
            "http://instance-data.ec2.internal/",
        ],
    ),
    (
        urls.LOCAL_ADDRESS,
        [
            "http://127.0.0.1/", "http://127.1/", "http://2130706433/", "http://0x7f000001/",
            "http://0177.0.0.1/", "http://0/", "http://0.0.0.0/", "http://10.0.0.1/",
            "http://172.16.0.1/", "http://192.168.1.1/", "http://169.254.169.254/",
            "http://0xa9fea9fe/", "http://168.63.129.16/", "http://100.100.100.200/",
            "http://100.64.0.1/", "http://192.0.0.192/", "http://224.0.0.1/", "http://240.0.0.1/",
            "http://255.255.255.255/", "http://198.18.0.1/", "http://[::1]/", "http://[::]/",
            "http://[::ffff:127.0.0.1]/", "http://[::ffff:8.8.8.8]/", "http://[::7f00:1]/",
            "http://[fe80::1]/", "http://[fc00::1]/", "http://[fd00:ec2::254]/",
            "http://[2002:7f00:1::]/", "http://[2001:0:7f00:1::]/", "http://[64:ff9b::7f00:1]/",
            "http://[64:ff9b:1::1]/", "http://[ff02::1]/", "http://[2001:db8::1]/",
            "http://[fe80::1%25eth0]/",
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize("expected, url", [(e, u) for e, group in REFUSED_URLS for u in group])
def test_urls_that_lead_inside_are_refused_by_their_text(expected: str, url: str) -> None:
    """Each in KAITO's words, before anything is asked for."""
    assert expected == urls.refusal(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.jsonl",
        "HTTPS://Example.com./a?b=c#sha256=0",
        "http://8.8.8.8:8080/a",
        "https://[2001:4860:4860::8888]/a",
        "https://my_bucket.s3.amazonaws.com/a..b/c%20d",
        "https://localhost.example.com/",
        "https://10.example.com/",
    ],
)
def test_public_urls_pass(url: str) -> None:
    """Nothing that merely looks like a private address is refused."""
    assert urls.refusal(url) is None


@pytest.mark.parametrize(
    "allowed", ["127.0.0.1", "127.0.0.1:8080", "127.0.0.0/8"], ids=["host", "port", "network"]
)
def test_a_private_host_can_be_opened(allowed: str) -> None:
    """By the administrator, or on one's own machine with --allow-host."""
    url = "http://127.0.0.1:8080/a"

    assert urls.refusal(url, allow_hosts=[allowed]) is None
    assert urls.refusal(url, allow_hosts=["127.0.0.1:81", "*.x"]) == urls.LOCAL_ADDRESS
    assert urls.refusal("http://a.local/", allow_hosts=["*.local"]) is None
    assert urls.refusal("http://localhost/", allow_hosts=["localhost:80"]) is None
    data = Overrides(data=(url,), allow_hosts=(allowed,))
    assert (url,) == read(WORKSPACE, overrides=data).source.urls


def test_no_message_shows_what_stands_for_a_secrets_name() -> None:
    """Somebody may have put the token itself there."""
    options = {"tuning__preset__presetOptions": {"modelAccessSecret": "hf_Hunter2"}}

    assert "unter2" not in "".join(refusals(with_changes(**options)))


def test_no_message_shows_a_url() -> None:
    """Its query may be a key."""
    bad = ["http://10.0.0.1/a?sig=hunter2", "https://me:hunter2@a.com/", "ftp://a/hunter2"]

    assert "hunter2" not in "".join(refusals(with_changes(tuning__input={"urls": bad})))


# The ConfigMap


@pytest.mark.parametrize(
    ("method", "template"), [("lora", LORA_TEMPLATE), ("qlora", QLORA_TEMPLATE)]
)
def test_a_copy_of_kaitos_template_sets_nothing(method: str, template: str) -> None:
    """Sizing, packing and checkpoints stay on, and there is nothing to talk about."""
    actual = spec.parse(with_config(template, tuning__method=method), origin="ws.yaml")

    assert Settings() == actual.settings
    assert () == actual.notes


def test_an_empty_config_is_none() -> None:
    """As in KAITO: the defaults of the method."""
    assert read(WORKSPACE).settings == read(with_changes(tuning__config="")).settings


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_names_of_kaitos_templates_need_no_configmap(method: str) -> None:
    """They mean all defaults; the other method's template is a contradiction."""
    own = with_changes(tuning__method=method, tuning__config=f"{method}-params-template")
    other = with_changes(
        tuning__method=method,
        tuning__config="qlora-params-template" if method == "lora" else "lora-params-template",
    )

    assert Settings() == read(own).settings
    assert f"For method '{method}', " in refusals(other)[0]


def test_settings_of_every_section() -> None:
    """Every honoured key reaches the setting that the table names, in the right type."""
    text = """\
training_config:
  ModelConfig:
    torch_dtype: fp16
    revision: v1.0
    attn_implementation: EAGER
  QuantizationConfig:
    load_in_4bit: true
    bnb_4bit_quant_type: fp4
    bnb_4bit_compute_dtype: float32
    bnb_4bit_use_double_quant: false
  LoraConfig:
    r: 8
    lora_alpha: 16
    lora_dropout: 0.1
    target_modules: [q_proj, v_proj]
    exclude_modules: o_proj
    use_rslora: true
    use_dora: false
    layers_to_transform: [0, 1]
  TrainingArguments:
    learning_rate: "2e-4"
    num_train_epochs: 2
    max_steps: 10
    per_device_train_batch_size: 4
    gradient_accumulation_steps: "2"
    warmup_steps: 0.1
    lr_scheduler_type: linear
    weight_decay: 0.01
    adam_beta1: 0.8
    adam_beta2: 0.99
    adam_epsilon: 1e-6
    max_grad_norm: 0.5
    optim: adamw_torch
    seed: 7
    max_length: 512
    packing: false
    gradient_checkpointing: true
    save_steps: 20
    eval_steps: 30
    neftune_noise_alpha: 5
  DatasetConfig:
    shuffle_dataset: false
    shuffle_seed: 3
    train_test_split: 0.9
    messages_column: chat
    context_column: q
    response_column: a
    dataset_path: /mnt/data/train
    dataset_extension: jsonl
    train_on: all
"""
    expected = Settings(
        dtype="float16",
        revision="v1.0",
        attention="eager",
        quant_type="fp4",
        double_quant=False,
        compute_dtype="float32",
        rank=8,
        alpha=16.0,
        dropout=0.1,
        target_modules=("q_proj", "v_proj"),
        exclude_modules=("o_proj",),
        rslora=True,
        dora=False,
        layers=(0, 1),
        learning_rate=2e-4,
        epochs=2.0,
        max_steps=10,
        micro_batch=4,
        accumulation=2,
        warmup=0.1,
        schedule="linear",
        weight_decay=0.01,
        beta1=0.8,
        beta2=0.99,
        epsilon=1e-6,
        max_grad_norm=0.5,
        optimizer="adamw_torch",
        seed=7,
        max_length=512,
        packing=False,
        train_on="all",
        checkpointing=True,
        save_steps=20,
        eval_steps=30,
        neftune_alpha=5.0,
        shuffle=False,
        shuffle_seed=3,
        train_share=0.9,
        messages_column="chat",
        context_column="q",
        response_column="a",
        dataset_path="train",
        dataset_extension="jsonl",
    )
    actual = spec.parse(with_config(text), origin="ws.yaml")

    assert expected == actual.settings
    assert () == actual.notes
    for field in dataclasses.fields(Settings):
        value = getattr(actual.settings, field.name)
        assert type(getattr(expected, field.name)) is type(value), field.name


def test_every_setting_can_be_set() -> None:
    """No field of Settings is without a key."""
    named = {key.setting for rows in keys.sections().values() for key in rows.values()}

    assert {field.name for field in dataclasses.fields(Settings)} == named - {None}


@pytest.mark.parametrize(
    ("section", "content", "expected"),
    [
        ("TrainingArguments", "{warmup_ratio: 0.1}", Settings(warmup=0.1)),
        ("TrainingArguments", "{warmup_ratio: 0.1, warmup_steps: 0}", Settings(warmup=0.1)),
        ("TrainingArguments", "{warmup_steps: 100}", Settings(warmup=100)),
        ("TrainingArguments", "{warmup_steps: 0}", Settings(warmup=0)),
        ("TrainingArguments", "{max_seq_length: 512}", Settings(max_length=512)),
        ("TrainingArguments", "{assistant_only_loss: true}", Settings(train_on="assistant")),
        ("TrainingArguments", "{completion_only_loss: false}", Settings(train_on="all")),
        ("TrainingArguments", "{fp16: true}", Settings(dtype="float16")),
        ("TrainingArguments", "{bf16: true, max_steps: -1}", Settings()),
        ("TrainingArguments", "{report_to: none}", Settings()),
        ("TrainingArguments", "{save_strategy: no, eval_strategy: no}", Settings()),
        ("QuantizationConfig", "{bnb_4bit: {quant_type: fp4}}", Settings(quant_type="fp4")),
        ("LoraConfig", "{r: 8}", Settings(rank=8)),
        ("LoraConfig", "{r: 8, lora_alpha: 8}", Settings()),
        ("LoraConfig", "{r: 8, lora_alpha: 16}", Settings(rank=8, alpha=16)),
        ("LoraConfig", "{r: 32, lora_alpha: 8}", Settings(rank=32, alpha=8)),
        ("LoraConfig", "{target_modules: all-linear}", Settings()),
        ("LoraConfig", "", Settings()),
        ("ModelConfig", "{dtype: null}", Settings()),
    ],
)
def test_old_names_and_other_forms_are_understood(
    section: str, content: str, expected: Settings
) -> None:
    """A config that was written for another version means the same here."""
    assert expected == settings(section, content)


@pytest.mark.parametrize(
    ("section", "content", "words"),
    [
        ("TrainingArguments", "{warmup_ratio: 0.1}", "warmup_ratio: is read as warmup_steps"),
        ("TrainingArguments", "{save_strategy: epoch}", "save_strategy: ignored, because check"),
        ("TrainingArguments", "{output_dir: /mnt/other}", "output_dir: ignored, because the run"),
        ("TrainingArguments", "{bf16: false}", "bf16: ignored, because the plan chooses"),
        ("ModelConfig", "{device_map: cpu}", "ModelConfig.device_map: ignored, because the plan"),
    ],
)
def test_a_key_with_another_effect_is_told(section: str, content: str, words: str) -> None:
    """One line, with the place and the reason."""
    actual = notes(section, content)

    assert 1 == len(actual)
    assert f"ConfigMap mine: training_config.{section}." in actual[0]
    assert words in actual[0]


@pytest.mark.parametrize(
    ("section", "content", "words"),
    [
        ("LoraConfig", "{learning_rate: 1}", "move it to TrainingArguments"),
        ("LoraConfig", "{lorra_alpha: 1}", 'did you mean "lora_alpha"?'),
        ("LoraConfig", "5", "is 5, expected keys"),
        ("LoraConfig", "{r: 0}", "is 0, must be at least 1 and at most 1,024"),
        ("LoraConfig", "{r: 1.5}", "is 1.5, expected a whole number"),
        ("LoraConfig", "{r: true}", "is true, which YAML reads as yes or no, expected a whole"),
        ("LoraConfig", f"{{r: {'9' * 5000}}}", "expected a whole number"),
        ("LoraConfig", f"{{r: {'9' * 4000}}}", "is a huge number, must be"),
        ("LoraConfig", "{lora_dropout: 1}", "must be at least 0 and below 1"),
        ("LoraConfig", "{target_modules: '.*proj'}", "is a pattern, or not a name"),
        ("LoraConfig", "{target_modules: [lm_head]}", "lm_head is not supported"),
        ("LoraConfig", "{target_modules: []}", "is an empty list"),
        ("LoraConfig", "{bias: all}", "SPEC-118"),
        ("TrainingArguments", "{trust_remote_code: true}", "code from a model folder is never run"),
        ("TrainingArguments", "{hub_token: hf_hunter2}", "a secret does not belong"),
        ("TrainingArguments", "{learning_rate: fast}", 'is "fast", expected a number'),
        ("TrainingArguments", "{learning_rate: 0}", "must be above 0 and at most 1"),
        ("TrainingArguments", "{packing: 'true'}", "expected true or false"),
        ("TrainingArguments", "{optim: adamw}", "use one of adamw_torch_fused"),
        (
            "TrainingArguments",
            "{output_dir: /mnt}",
            "Invalid output_dir specified: '/mnt', must be",
        ),
        ("TrainingArguments", "{output_dir: ../x}", "Invalid output_dir specified"),
        ("TrainingArguments", "{output_dir: 5}", "output_dir is not a string"),
        ("TrainingArguments", "{max_length: 512, max_seq_length: 1024}", "SPEC-108"),
        ("TrainingArguments", "{warmup_steps: 1.5}", "expected a whole number"),
        ("DatasetConfig", "{train_test_split: 0}", "must be above 0 and at most 1"),
        ("DatasetConfig", "{dataset_path: ../../etc}", "points outside the data"),
        ("DatasetConfig", "{train_on: user}", "use one of assistant, all"),
        ("DatasetConfig", "{context_column: 5}", "is 5, expected a string"),
        ("ModelConfig", "{torch_dtype: int8}", "use one of bfloat16, float16, float32"),
        ("ModelConfig", "{revision: ../x}", "is not a revision"),
        ("ModelConfig", "{chat_template: t.jinja}", "cannot be read"),
        ("QuantizationConfig", "{load_in_8bit: true}", "8-bit bases are not supported"),
        ("QuantizationConfig", "{load_in_4bit: 1}", "value must be either nil or a boolean, got t"),
        (
            "QuantizationConfig",
            "{load_in_4bit: false}",
            "For method 'qlora', either 'load_in_4bit'",
        ),
        (
            "QuantizationConfig",
            "{load_in_4bit: true, load_in_8bit: true}",
            "Cannot set both 'load_in_4bit' and 'load_in_8bit' to true in ConfigMap 'mine'",
        ),
        ("Quantisation", "{}", "Unrecognized section: Quantisation"),
    ],
)
def test_bad_keys_are_refused_with_their_place(section: str, content: str, words: str) -> None:
    """Type, range, name or support: one problem each, and never the value of a secret."""
    actual = config_refusals(section, content)

    assert 1 == len(actual), actual
    assert f"ConfigMap mine: training_config.{section}" in actual[0]
    assert words in actual[0]
    assert "hunter2" not in actual[0]


def test_four_bit_with_lora_is_a_contradiction() -> None:
    """In KAITO's words."""
    actual = config_refusals("QuantizationConfig", "{load_in_4bit: true}", tuning__method="lora")

    assert (
        "For method 'lora', 'load_in_4bit' or 'load_in_8bit' in ConfigMap 'mine' must"
        in (actual[0])
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "missing field(s): training_config.yaml in ConfigMap"),
        ({"training_config.yaml": {"training_config": {}}}, "with the bar"),
        ({"training_config.yaml": "a: ["}, "invalid YAML"),
        ({"training_config.yaml": ""}, "Expected 'training_config' key to contain a map"),
        ({"training_config.yaml": "LoraConfig: {}"}, "Expected 'training_config' key to contain"),
        ({"training_config.yaml": "training_config: {}\nx: 1"}, "put everything under"),
        (
            {"training_config.yaml": "training_config: {DataCollator: {}, DataCollator: {}}"},
            "duplicate",
        ),
    ],
)
def test_the_form_of_the_configmap(data: dict[str, Any], words: str) -> None:
    """A wrong form is told as such, with the ConfigMap's name."""
    config_map = {"kind": "ConfigMap", "metadata": {"name": "mine"}, "data": data}
    actual = refusals(yaml.safe_dump_all([with_changes(tuning__config="mine"), config_map]))

    assert 1 == len(actual), actual
    assert "ConfigMap mine: " in actual[0]
    assert words in actual[0]


def test_other_configmaps_are_ignored() -> None:
    """By name and by namespace."""
    text = with_config("training_config: {}", metadata__namespace="a")
    other = {"kind": "ConfigMap", "metadata": {"name": "mine", "namespace": "b"}, "data": {}}
    actual = spec.parse(text + "---\n" + yaml.safe_dump(other), origin="ws.yaml")

    assert ('ConfigMap "mine": ignored, tuning.config does not name it',) == actual.notes


def test_a_chat_template_is_text_or_a_file_beside_the_yaml(tmp_path: Path) -> None:
    """`load` reads the file, and the normal form holds its text."""
    (tmp_path / "t.jinja").write_text("{{ messages }}\n")
    text = with_config("training_config:\n  ModelConfig: {chat_template: t.jinja}\n")
    (tmp_path / "ws.yaml").write_text(text)
    actual = spec.load(tmp_path / "ws.yaml")

    assert "{{ messages }}\n" == actual.settings.chat_template
    assert actual == spec.parse(spec.dump(actual), origin="ws.yaml")


# The command line


def test_overrides_replace_input_and_output(tmp_path: Path) -> None:
    """Then nothing is wrong with placeholders that nobody reads."""
    data = tmp_path / "a.jsonl"
    data.touch()
    said = Overrides(base_model="./tiny", data=(str(data),), instance="x", output="oci:out")
    actual = spec.load(QUICK_START, overrides=said)

    assert ("./tiny", "x") == (actual.base_model, actual.instance)
    assert Source(files=(data,)) == actual.source
    assert Destination(layout=Path("out")) == actual.destination
    assert "phi-3-mini-128k-instruct" == actual.preset


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("oci:a/b", Destination(layout=Path("a/b"))),
        ("dir:/a", Destination(folder=Path("/a"))),
        ("127.0.0.1:5000/a:1", Destination(image="127.0.0.1:5000/a:1")),
    ],
)
def test_the_three_forms_of_output(output: str, expected: Destination) -> None:
    """An image layout, a folder, an image."""
    document = with_changes(tuning__output=...)

    assert expected == read(document, overrides=Overrides(output=output)).destination


@pytest.mark.parametrize(
    ("output", "hub"),
    [
        ("hf://org/name", ("org/name", "main")),
        ("hf://org/name@v1.0", ("org/name", "v1.0")),
        ("hf://org/name@refs/pr/3", ("org/name", "refs/pr/3")),
        ("hf://name", None),
        ("hf://datasets/org/name", None),
        ("hf://org/../x", None),
        ("hf://org/name/file", None),
        ("hf://org/name@", None),
    ],
)
def test_an_output_of_the_hub_is_a_models_repository(
    output: str, hub: tuple[str, str] | None
) -> None:
    """With a branch, if it is not main."""
    if hub is None:
        (refused,) = refusals(WORKSPACE, overrides=Overrides(output=output))
        assert "SPEC-109 --output" in refused
        assert "hf://ORG/NAME" in refused
    else:
        assert (
            Destination(hub=hub) == read(WORKSPACE, overrides=Overrides(output=output)).destination
        )


def test_data_is_files_and_urls_and_one_folder(tmp_path: Path) -> None:
    """In the file's place, also where the file has none; a path is what it is on this machine."""
    url = "https://data.example.com/b"
    document = with_changes(tuning__input=...)

    assert Source(urls=(url,)) == read(document, overrides=Overrides(data=(url,))).source
    folder = read(document, overrides=Overrides(data=(str(tmp_path),))).source
    assert Source(folder=tmp_path) == folder
    mixed = (str(tmp_path), "a.csv", url, "b.csv")
    several = Source(urls=(url,), folder=tmp_path, files=(Path("a.csv"), Path("b.csv")))
    assert several == read(document, overrides=Overrides(data=mixed)).source
    refused = refusals(document, overrides=Overrides(data=(str(tmp_path), str(tmp_path.parent))))
    assert "SPEC-109 --data: names several folders" in refused[0]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (Overrides(output="./out"), 'SPEC-109 --output: "./out" is not an image reference'),
        (Overrides(output="oci:"), "names no folder"),
        (Overrides(output=""), "write dir:FOLDER"),
        (Overrides(output="r.io/A"), "--output: Unable to parse output image reference"),
        (Overrides(data=("http://127.0.0.1/?k=hunter2",)), "SPEC-115 --data[0]"),
        (Overrides(data=("",)), "is not a file name"),
        (Overrides(base_model=""), "--base-model: is empty"),
    ],
)
def test_the_command_line_is_checked_with_the_file(said: Overrides, words: str) -> None:
    """Its problems come first, those of the file follow."""
    actual = refusals(with_changes(tuning__method="x"), overrides=said)

    assert 2 == len(actual)
    assert words in actual[0]
    assert "hunter2" not in actual[0]


# The normal form


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_dump_reads_back_as_the_same_spec(path: Path) -> None:
    """The run directory's spec.yaml means what the user's file meant."""
    said = Overrides(output="oci:out", base_model="a\nkind: Workspace")
    first = spec.load(path, overrides=said)
    again = spec.parse(spec.dump(first), origin="spec.yaml", overrides=said)

    assert first == again
    assert spec.dump(first) == spec.dump(again)
    assert spec.digest(first) == spec.digest(again)


def test_the_digest_is_of_what_decides_the_adapter() -> None:
    """Not of name, resource or output."""
    base = spec.digest(read(WORKSPACE))
    same = with_changes(metadata__name="other", resource={"count": 1}, tuning__method="QLoRA")
    other = with_changes(tuning__method="lora")

    assert base == spec.digest(read(same, overrides=Overrides(output="oci:x")))
    assert base != spec.digest(read(other))
    assert base != spec.digest(read(WORKSPACE, overrides=Overrides(base_model="x")))


# The table of keys and what is made of it


def test_the_table_is_well_formed() -> None:
    """Every key says what becomes of it, and why or how."""
    for rows in keys.sections().values():
        for key in rows.values():
            assert key.text, key
            assert bool(key.change) == (key.use == "refused"), key
            assert key.use != "honoured" or (key.setting and key.type), key


def test_no_key_of_the_installed_libraries_is_forgotten() -> None:
    """Each field of trl's SFTConfig, peft's LoraConfig and so on has a line in the table."""
    import inspect

    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, DataCollatorForLanguageModeling
    from trl import SFTConfig

    def names(kind: Any) -> set[str]:
        return {field.name for field in dataclasses.fields(kind) if field.init}

    quantisation = set(inspect.signature(BitsAndBytesConfig.__init__).parameters)
    libraries = {
        "TrainingArguments": names(SFTConfig),
        "LoraConfig": names(LoraConfig),
        "QuantizationConfig": quantisation - {"self", "kwargs"},
        "DataCollator": names(DataCollatorForLanguageModeling),
    }
    forgotten = {
        section: missing
        for section, fields in libraries.items()
        if (missing := fields - keys.sections()[section].keys())
    }

    assert {} == forgotten


@pytest.mark.parametrize("section", ["TrainingArguments", "LoraConfig"])
def test_a_config_that_spells_out_the_libraries_defaults_passes(section: str) -> None:
    """Nothing is refused, and no note is printed, for values that change nothing."""
    from peft import LoraConfig
    from trl import SFTConfig

    kind = {"TrainingArguments": SFTConfig, "LoraConfig": LoraConfig}[section]
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(kind)
        if isinstance(field.default, (bool, int, float, str))
    }
    content = json.dumps({k: getattr(v, "value", v) for k, v in defaults.items()})
    actual = notes(section, content)

    assert () == actual


# Strangers


def _mutate(value: Any, random_: random.Random) -> Any:
    """`value` with one part replaced by something that nobody expects."""
    strange = [
        None, True, 0, -1, 10**30, 1.5, -0.0, "", "x", "ü\u2028😀", "a" * 300, [], {}, [None],
        [[]], {"": None}, {"a": {"b": [1]}}, "2026-01-01", "<x>", "../..", "http://[", "{{ }}",
    ]  # fmt: skip
    if random_.random() < 0.25 or not isinstance(value, (dict, list)) or not value:
        return random_.choice(strange)
    changed = copy.copy(value)
    place = (
        random_.choice(list(value)) if isinstance(value, dict) else random_.randrange(len(value))
    )
    if isinstance(changed, dict) and random_.random() < 0.2:
        changed[random_.choice(["", "x", "urls", "spec", "volume", "é"])] = random_.choice(strange)
    elif random_.random() < 0.1:
        del changed[place]
    else:
        changed[place] = _mutate(changed[place], random_)
    return changed


def test_no_mutated_document_raises_anything_but_spec_error() -> None:
    """Six hundred strange files: each is read, or refused with problems that name their place."""
    random_ = random.Random(7)
    config = yaml.safe_load(QLORA_TEMPLATE)
    for section, rows in keys.sections().items():
        config["training_config"][section].update(dict.fromkeys(rows))
    inference = {
        "preset": {"name": "phi-4", "presetOptions": {"modelAccessSecret": "s"}},
        "adapters": [{"source": {"name": "a", "image": "r.io/a"}, "strength": "1.0"}],
    }
    selector = {"matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]}
    whole = with_changes(
        tuning__config="mine",
        inference=inference,
        resource={"instanceType": "x", "labelSelector": selector},
        metadata__annotations={"tuning.kaito.sh/on-tag-exists": "refuse"},
    )
    for _ in range(600):
        document, content = whole, config
        for _ in range(random_.randint(1, 3)):
            document, content = _mutate(document, random_), _mutate(content, random_)
        text = yaml.safe_dump(content, allow_unicode=True)
        config_map = {"kind": "ConfigMap", "metadata": {"name": "mine"}}
        config_map["data"] = {"training_config.yaml": text}  # type: ignore[assignment]
        whole_text = yaml.safe_dump_all([document, config_map], allow_unicode=True)
        try:
            actual = spec.parse(whole_text, origin="ws.yaml")
        except SpecError as error:
            assert all(problem.what and problem.change for problem in error.problems)
            assert str(error)
        else:
            assert actual == spec.parse(spec.dump(actual), origin="ws.yaml")
            files.canonical(actual.document)


def test_mutated_bytes_raise_nothing_but_spec_error() -> None:
    """The same for text that was cut, doubled or sprinkled with YAML's own characters."""
    random_ = random.Random(11)
    whole = with_config(QLORA_TEMPLATE)
    for _ in range(300):
        at = random_.randrange(len(whole))
        piece = random_.choice(
            ["\t", "[", "{", "&a ", "*a ", ": ", "|", "---\n", "!!x ", "\0", "'"]
        )
        text = whole[:at] + piece + whole[at + random_.choice([0, 0, 1, 20]) :]
        try:
            spec.parse(text, origin="ws.yaml")
        except SpecError as error:
            assert error.problems


def test_reading_a_spec_loads_no_torch() -> None:
    """It is part of `python -m tuning plan` and of the operator."""
    heavy = "{'torch', 'transformers', 'peft', 'trl'}"
    code = f"import sys, tuning.spec; print(sorted({heavy} & {{*sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "[]\n" == run.stdout


@pytest.mark.parametrize("output", ["out/adapter", "adapter", "runs/demo/adapter"])
def test_an_output_that_looks_like_a_folder_is_asked_about(output: str) -> None:
    """Not a registry of that name: the three ways to write it are named."""
    with pytest.raises(
        SpecError, match=rf"SPEC-109 --output: .*dir:{output} .*oci:{output} .*:TAG"
    ):
        read(WORKSPACE, overrides=Overrides(output=output))


@pytest.mark.parametrize("output", ["ghcr.io/a/b", "localhost:5000/x", "a/b:1"])
def test_an_output_with_a_registry_or_a_tag_is_an_image(output: str) -> None:
    """As docker takes it."""
    assert output in str(read(WORKSPACE, overrides=Overrides(output=output)).destination.image)


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("hf://datasets/org/name", Dataset("org/name")),
        ("hf://datasets/Org/na.me-1/", Dataset("Org/na.me-1")),
        ("hf://datasets/o/n@v1.0?split=train", Dataset("o/n", "v1.0", None, ("train",))),
        ("hf://datasets/o/n?config=a%20b&split=x+y", Dataset("o/n", None, "a b", ("x", "y"))),
        ("hf://datasets/o/n@refs%2Fpr%2F1", Dataset("o/n", "refs/pr/1")),
        ("hf://datasets/o/n@refs/convert/parquet", Dataset("o/n", "refs/convert/parquet")),
    ],
)
def test_a_dataset_of_the_hub_is_named_whole(url: str, meant: Dataset) -> None:
    """In `urls` of a Workspace and by --data; config and split are chosen in the query."""
    assert meant == dataset(url)
    assert (url,) == read(WORKSPACE, overrides=Overrides(data=(url,))).source.urls


@pytest.mark.parametrize(
    "url",
    [
        "hf://org/x",
        "hf://datasets/name",
        "hf://datasets/o/n?name=en",
        "hf://datasets/o/n?config=",
        "hf://datasets/o/n?split=train&split=test",
        "hf://datasets/o/n?split=train[:10%25]",
        "hf://datasets/o/n?config=a%0ab",
        "hf://datasets/o/n@..%2F..",
        "hf://datasets/o/n#sha256=0",
        "hf://spaces/o/n",
    ],
)
def test_what_names_no_dataset_is_told_the_form(url: str) -> None:
    """A model, an unknown key, a slice of a split, a checksum of many files."""
    with pytest.raises(SpecError, match=r"SPEC-115 .*write hf://datasets/ORG/NAME"):
        read(WORKSPACE, overrides=Overrides(data=(url,)))


@pytest.mark.parametrize(
    ("page", "meant"),
    [
        ("https://huggingface.co/datasets/org/name", "hf://datasets/org/name"),
        ("https://hf.co/datasets/o/n/viewer/default/train?row=3", "hf://datasets/o/n"),
        ("https://www.huggingface.co/datasets/o/n/tree/main/data", "hf://datasets/o/n"),
        ("https://huggingface.co/datasets/o/n/blob/main/a.csv", "/resolve/ in place of /blob/"),
        ("https://huggingface.co/datasets/o/n/resolve/main/a.csv", None),
        ("https://example.com/datasets/o/n", None),
    ],
)
def test_the_page_of_a_dataset_is_no_data(page: str, meant: str | None) -> None:
    """What a browser shows is told apart from a file before anything is fetched."""
    if meant is None:
        assert (page,) == read(WORKSPACE, overrides=Overrides(data=(page,))).source.urls
        return
    with pytest.raises(SpecError, match=rf"SPEC-115 .*names a page of the hub.* write {meant}\."):
        read(WORKSPACE, overrides=Overrides(data=(page,)))


def test_data_of_two_names_is_a_dataset_unless_it_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file, a folder, what lies in a folder that is there, and the endings of data are paths."""
    monkeypatch.chdir(tmp_path)
    Path("rows/old").mkdir(parents=True)

    def source(*data: str) -> Source:
        return read(WORKSPACE, overrides=Overrides(data=data)).source

    assert ("hf://datasets/org/name?config=en",) == source("org/name?config=en").urls
    assert ("hf://datasets/org/name@v1", "https://x.org/a") == source(
        "org/name@v1", "https://x.org/a"
    ).urls
    assert Path("rows/old") == source("rows/old").folder
    for path in ("rows/new", "org/a.jsonl", "org/a.csv.gz", "./org/name", "a/b/c", "name", "/a/b"):
        assert (Path(path),) == source(path).files
    mixed = source("org/name", "name")
    assert (("hf://datasets/org/name",), (Path("name"),)) == (mixed.urls, mixed.files)


@pytest.mark.parametrize("warmup", ["warmup_steps: 5", "warmup_ratio: 0.1", "warmup_steps: 0.5"])
def test_a_constant_schedule_with_a_warm_up_is_refused(warmup: str) -> None:
    """transformers would leave the warm-up out in silence."""
    with pytest.raises(SpecError, match=r"SPEC-108 .*constant_with_warmup"):
        settings("TrainingArguments", f"{{lr_scheduler_type: constant, {warmup}}}")


def test_schedules_without_what_they_promise_are_noted() -> None:
    """One cycle of cosine_with_restarts restarts nothing; a warm-up of 0 is none."""
    content = "{lr_scheduler_type: cosine_with_restarts}"
    text = with_config(f"training_config:\n  TrainingArguments: {content}\n")

    assert any("same as cosine" in note for note in spec.parse(text, origin="ws.yaml").notes)
    assert settings("TrainingArguments", "{lr_scheduler_type: constant, warmup_steps: 0}")
