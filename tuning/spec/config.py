"""The ConfigMap that `tuning.config` names -> Settings.

`keys` holds the table of keys, `coercion` checks types and ranges. Every key whose effect differs
from what its author may expect gets a note.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tuning.spec import keys, mixture
from tuning.spec.coercion import Invalid, coerce, items_of
from tuning.spec.findings import Findings, Path, did_you_mean, nearest, shown
from tuning.spec.keys import Key, same
from tuning.spec.values import Method, Settings

FILE = "training_config.yaml"
ROOT = "training_config"

_GO_TYPES = {str: "string", int: "int", float: "float64", list: "[]interface {}"}


def read(
    value: Any,
    findings: Findings,
    *,
    name: str,
    method: Method | None,
    read_template: Callable[[str], str | None],
) -> Settings:
    """The settings in `value`, the content of `training_config.yaml` of the ConfigMap `name`.

    Problems go to `findings`. `read_template` returns the text of a chat template's file, or None.
    """
    root = value.get(ROOT) if isinstance(value, dict) else None
    if not isinstance(root, dict):
        what = f"Expected '{ROOT}' key to contain a map"
        findings.add("SPEC-113", (ROOT,), what, f"begin with `{ROOT}:` and indent the rest")
        return Settings()
    for extra in sorted(value.keys() - {ROOT}):
        findings.add("SPEC-111", (extra,), "unknown key", f"put everything under `{ROOT}:`")
    chosen = _Chosen(findings)
    for section, content in root.items():
        _read_section(section, content, chosen)
    _check_quantisation(root.get("QuantizationConfig"), findings, name, method)
    _drop_template_rank(chosen)
    _check_schedule(chosen)
    _check_precision(chosen)
    _check_patience(chosen)
    if path := chosen.settings.get("chat_template"):
        chosen.settings["chat_template"] = _template(path, chosen, read_template)
    return Settings(**chosen.settings)


class _Chosen:
    """The settings so far, and the path of the key that set each."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.settings: dict[str, Any] = {}
        self.paths: dict[str, Path] = {}

    def set(self, setting: str, value: Any, path: Path) -> None:
        before = self.settings.get(setting)
        if setting == "warmup" and before is not None and 0 in (before, value):
            value = before or value  # `warmup_steps: 0` beside a ratio, as trainers dump it
        elif before is not None and not same(before, value):
            other = self.paths[setting][-1]
            what = f"contradicts {other}, which sets the same"
            self.findings.add("SPEC-108", path, what, "keep one of the two")
        self.settings[setting], self.paths[setting] = value, path


def _read_section(section: str, content: Any, chosen: _Chosen) -> None:
    known, path = keys.sections(), (ROOT, section)
    if section not in known:
        change = did_you_mean(section, known)
        chosen.findings.add("SPEC-111", path, f"Unrecognized section: {section}", change)
        return
    if content is None:
        return
    if not isinstance(content, dict):
        what = f"is {shown(content)}, expected keys"
        chosen.findings.add("SPEC-113", path, what, "write `key: value` lines below it, indented")
        return
    for name, value in _flattened(content, known[section]):
        key = known[section].get(name)
        if key is None:
            change = nearest_key(section, name)
            chosen.findings.add("SPEC-111", (*path, name), "unknown key", change)
        elif value is not None:
            _read_key(key, value, (*path, name), chosen)


def _flattened(content: dict[str, Any], known: dict[str, Key]) -> list[tuple[str, Any]]:
    """The pairs of a section; as in KAITO, `a: {b: 1}` is read as `a_b: 1` if `a` is unknown."""
    pairs = []
    for name, value in content.items():
        nested = isinstance(value, dict) and name not in known and value
        if nested and all(f"{name}_{inner}" in known for inner in value):
            pairs += [(f"{name}_{inner}", each) for inner, each in value.items()]
        else:
            pairs.append((name, value))
    return pairs


# Names that axolotl, LLaMA-Factory, Unsloth, torchtune and OpenAI use, or people type first.
_SHARE = "DatasetConfig.train_test_split, the share that is trained on (0.9 holds a tenth out)"
_BATCH = "TrainingArguments.per_device_train_batch_size"
# Trackers of transformers that are not fed: files that name them pass, with a note.
_NOT_FED = (
    *("all", "azure_ml", "clearml", "codecarbon", "comet_ml"),
    *("dagshub", "dvclive", "flyte", "neptune", "swanlab"),
)
_ELSEWHERE = (
    dict.fromkeys(("rank", "lora_r", "lora_rank"), "LoraConfig.r")
    | {"alpha": "LoraConfig.lora_alpha", "dropout": "LoraConfig.lora_dropout"}
    | dict.fromkeys(
        ("lora_target", "lora_target_modules", "lora_attn_modules"), "LoraConfig.target_modules"
    )
    | dict.fromkeys(("eval_split", "test_size", "test_split", "eval_size"), _SHARE)
    | dict.fromkeys(("val_set_size", "val_size", "validation_split", "split"), _SHARE)
    | dict.fromkeys(("batch_size", "micro_batch_size", "batch"), _BATCH)
    | dict.fromkeys(("lr", "learning_rates"), "TrainingArguments.learning_rate")
    | dict.fromkeys(("epochs", "n_epochs", "num_epochs"), "TrainingArguments.num_train_epochs")
    | dict.fromkeys(("steps", "num_steps", "max_train_steps"), "TrainingArguments.max_steps")
    | dict.fromkeys(
        (
            "cutoff_len",
            "sequence_len",
            "model_max_length",
            "max_seq_len",
            "seq_len",
        ),
        "TrainingArguments.max_length",
    )
    | dict.fromkeys(
        ("early_stopping", "early_stop", "patience"), "TrainingArguments.early_stopping_patience"
    )
    | dict.fromkeys(("tracker", "trackers", "loggers", "use_wandb"), "TrainingArguments.report_to")
    | dict.fromkeys(("wandb_project", "experiment_name"), "TrainingArguments.project")
    | dict.fromkeys(("wandb_run_name", "wandb_name"), "TrainingArguments.run_name")
    | dict.fromkeys(
        (
            "new_tokens",
            "add_new_tokens",
            "add_tokens",
            "add_special_tokens",
            "special_tokens",
            "additional_special_tokens",
            "extra_special_tokens",
            "tokens",
        ),
        "ModelConfig.new_special_tokens",
    )
    | dict.fromkeys(
        ("lora_model_dir", "adapter_name_or_path", "adapter", "adapters", "resume_adapter"),
        "ModelConfig.start_adapter",
    )
    | {
        "lora_target_linear": "LoraConfig.target_modules: all-linear",
        "learning_rate_multiplier": "TrainingArguments.learning_rate, the rate itself",
        "sample_packing": "TrainingArguments.packing",
        "optimizer": "TrainingArguments.optim",
        "lr_scheduler": "TrainingArguments.lr_scheduler_type",
        "scheduler": "TrainingArguments.lr_scheduler_type",
        "warmup": "TrainingArguments.warmup_steps",
        "accumulation_steps": "TrainingArguments.gradient_accumulation_steps",
        "grad_accum": "TrainingArguments.gradient_accumulation_steps",
        "train_on_inputs": "DatasetConfig.train_on: all",
    }
)


def nearest_key(section: str, name: str) -> str:
    """What to change about the unknown key `name` of `section`, or of no section."""
    known = keys.sections()
    if name.lower() in _ELSEWHERE:
        return f"use {_ELSEWHERE[name.lower()]}"
    for other, rows in known.items():
        if name in rows:
            return f"move it to {other}"
    if meant := nearest(name, known.get(section, {})):
        return f'did you mean "{meant}"? Otherwise remove it'
    for other, rows in known.items():
        if meant := nearest(name, rows):
            return f'did you mean "{meant}" of {other}? Otherwise remove it'
    return "remove it; docs/config-keys.md lists the known keys"


def _read_key(key: Key, value: Any, path: Path, chosen: _Chosen) -> None:
    silent = any(same(value, each) for each in key.unset)
    if key.name == "output_dir":
        _check_output_dir(value, path, chosen.findings)
    if key.name == "bf16" and value is True:
        chosen.paths["bf16"] = path
    if key.use == "ignored":
        if not silent:
            chosen.findings.note(path, f"ignored, because {key.text}")
    elif key.use == "refused":
        if not silent and key.name != "load_in_8bit":  # checked together with load_in_4bit
            chosen.findings.add("SPEC-118", path, f"is not supported: {key.text}", key.change)
    elif key.type == "parts":
        if (parts := mixture.read(value, path, chosen.findings)) is not None:
            chosen.set(str(key.setting), parts, path)
    elif key.setting and not silent:
        if key.type == "trackers" and not (value := _fed(value, path, chosen.findings)):
            return
        try:
            typed = coerce(key, value)
        except Invalid as error:
            chosen.findings.add(error.code, path, error.what, error.change)
            return
        if any(same(typed, each) for each in key.unset):
            return
        if key.use == "translated":
            chosen.findings.note(path, f"is read as {key.text}")
        chosen.set(key.setting, typed if key.map is None else key.map[typed], path)


def _fed(value: Any, path: Path, findings: Findings) -> list[Any]:
    """Of report_to the trackers that are fed; a note on the others that transformers knows."""
    fed = []
    for each in items_of(value):
        name = each.strip().lower() if isinstance(each, str) else each
        if name in _NOT_FED:
            why = "no such tracker is fed; mlflow, wandb, tensorboard and trackio are"
            findings.note(path, f"{shown(each)} is ignored, because {why}")
        elif name != "none":
            fed.append(name)
    return fed


def _check_output_dir(value: Any, path: Path, findings: Findings) -> None:
    """KAITO's own check: a file that passes here passes there."""
    if not isinstance(value, str):
        findings.add("SPEC-113", path, "output_dir is not a string", "remove it")
        return
    parts: list[str] = []
    for part in value.removeprefix("/mnt").split("/"):
        if part == "..":
            parts = parts[:-1] if parts else [".."]
        elif part not in ("", "."):
            parts.append(part)
    if not parts or parts[0] == "..":
        what = f"Invalid output_dir specified: '{value[:60]}', must be a directory"
        findings.add("SPEC-104", path, what, "remove it; the adapter goes to tuning.output")


def _check_quantisation(section: Any, findings: Findings, name: str, method: Method | None) -> None:
    """load_in_4bit and load_in_8bit must fit the method; the messages are KAITO's."""
    path = (ROOT, "QuantizationConfig")
    flags: dict[str, Any] = {}
    for key in ("load_in_4bit", "load_in_8bit"):
        flags[key] = section.get(key) if isinstance(section, dict) else None
        if flags[key] is not None and not isinstance(flags[key], bool):
            go = _GO_TYPES.get(type(flags[key]), "map[string]interface {}")
            what = f"value must be either nil or a boolean, got type {go}"
            findings.add("SPEC-113", (*path, key), what, "write true or false")
            return
    four, eight = flags["load_in_4bit"], flags["load_in_8bit"]
    if conflict := contradiction(method, four, eight, name):
        named = [key for key, value in flags.items() if value is not None]
        findings.add("SPEC-108", (*path, *named) if len(named) == 1 else path, *conflict)
    elif eight:
        key8 = keys.sections()["QuantizationConfig"]["load_in_8bit"]
        what = f"is not supported: {key8.text}"
        findings.add("SPEC-118", (*path, "load_in_8bit"), what, key8.change)


def contradiction(
    method: Method | None, four: bool | None, eight: bool | None, name: str
) -> tuple[str, str] | None:
    """Problem and change if the flags contradict each other or the method, else None."""
    flags = f"'load_in_4bit' or 'load_in_8bit' in ConfigMap '{name}' must not be true"
    if four and eight:
        what = f"Cannot set both 'load_in_4bit' and 'load_in_8bit' to true in ConfigMap '{name}'"
        return what, "remove both; tuning.method decides"
    if method == "lora" and (four or eight):
        return f"For method 'lora', {flags}", "remove it, or set tuning.method to qlora"
    if method == "qlora" and four is False and not eight:
        either = "either 'load_in_4bit' or 'load_in_8bit' must be true"
        what = f"For method 'qlora', {either} in ConfigMap '{name}'"
        return what, "remove load_in_4bit, or set tuning.method to lora"
    return None


def _drop_template_rank(chosen: _Chosen) -> None:
    """Unset rank 8 with alpha 8: the pair comes from KAITO's template."""
    settings = chosen.settings
    if settings.get("rank") == 8 and settings.get("alpha") == 8:
        del settings["rank"], settings["alpha"]


def _check_schedule(chosen: _Chosen) -> None:
    """Schedules of transformers that would leave out what their name or another key promises."""
    schedule, path = chosen.settings.get("schedule"), chosen.paths.get("schedule", ())
    if schedule == "constant" and chosen.settings.get("warmup"):
        what = f"has no warm-up, and {chosen.paths['warmup'][-1]} is set"
        chosen.findings.add("SPEC-108", path, what, "use constant_with_warmup, or leave one out")
    if schedule == "cosine_with_restarts":
        chosen.findings.note(path, "has one cycle, so it is the same as cosine")


def _check_precision(chosen: _Chosen) -> None:
    """bf16 is the plan's choice anyway, but not beside another 16-bit type."""
    if "bf16" in chosen.paths and chosen.settings.get("dtype") == "float16":
        what = f"contradicts {chosen.paths['dtype'][-1]}, which asks for float16"
        chosen.findings.add("SPEC-108", chosen.paths["bf16"], what, "keep one of the two")


def _check_patience(chosen: _Chosen) -> None:
    """Early stopping without what it looks at; the plan checks what other sections decide."""
    settings, paths, findings = chosen.settings, chosen.paths, chosen.findings
    if "patience" not in settings:
        if "patience_threshold" in settings:
            path = paths["patience_threshold"]
            findings.note(path, "has no effect without early_stopping_patience")
        return
    path = paths["patience"]
    if settings.get("train_share", 1.0) >= 1:
        what = "needs held-out rows to look at, and all rows are trained on"
        change = "set DatasetConfig.train_test_split below 1, such as 0.95, or leave it out"
        findings.add("SPEC-108", path, what, change)
    if not settings.get("eval_steps") and not settings.get("keep_best"):
        what = "needs evaluations during the training, and eval_steps is not set"
        findings.add("SPEC-108", path, what, "set eval_steps, or leave it out")


def _template(text: str, chosen: _Chosen, read_template: Callable[[str], str | None]) -> str | None:
    if any(character in text for character in "{}\n"):
        return text
    content = read_template(text)
    if content is None:
        what = f"the file {shown(text)} cannot be read"
        change = "correct the path, or paste the template's text (a cluster takes only the text)"
        chosen.findings.add("SPEC-120", chosen.paths["chat_template"], what, change)
    return content
