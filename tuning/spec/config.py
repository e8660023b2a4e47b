"""The ConfigMap that `tuning.config` names -> Settings.

`keys` says what becomes of each key; this module checks types and ranges, and tells a person about
every key that has another effect than its author may think.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

from tuning.spec import keys
from tuning.spec.findings import Findings, Path, did_you_mean, nearest, shown
from tuning.spec.keys import Key, same
from tuning.spec.values import Method, Settings

FILE = "training_config.yaml"
ROOT = "training_config"

_DTYPES = {
    "bfloat16": "bfloat16", "bf16": "bfloat16", "torch.bfloat16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16", "torch.float16": "float16",
    "float32": "float32", "fp32": "float32", "float": "float32", "torch.float32": "float32",
    "auto": "auto",
}  # fmt: skip
_NUMBER = re.compile(r"\s*[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?\s*", re.A)
_HEADS = ("lm_head", "embed_out", "embed_tokens", "wte", "word_embeddings")
_GO_TYPES = {str: "string", int: "int", float: "float64", list: "[]interface {}"}


def read(
    value: Any,
    found: Findings,
    *,
    name: str,
    method: Method | None,
    read_template: Callable[[str], str | None],
) -> Settings:
    """The settings in `value`, the content of `training_config.yaml` of the ConfigMap `name`.

    What is wrong goes to `found`. `read_template` reads a chat template's file, or says None.
    """
    root = value.get(ROOT) if isinstance(value, dict) else None
    if not isinstance(root, dict):
        what = f"Expected '{ROOT}' key to contain a map"
        found.add("SPEC-113", (ROOT,), what, f"begin the text with `{ROOT}:` and indent the rest")
        return Settings()
    for extra in sorted(value.keys() - {ROOT}):
        found.add("SPEC-111", (extra,), "unknown key", f"put everything under `{ROOT}:`")
    chosen = _Chosen(found)
    for section, content in root.items():
        _read_section(section, content, chosen)
    quantisation = root.get("QuantizationConfig")
    _check_quantisation(quantisation if isinstance(quantisation, dict) else {}, found, name, method)
    _drop_template_rank(chosen)
    if path := chosen.settings.get("chat_template"):
        chosen.settings["chat_template"] = _template(path, chosen, read_template)
    return Settings(**chosen.settings)


class _Chosen:
    """The settings so far, and which key set each."""

    def __init__(self, found: Findings) -> None:
        self.found = found
        self.settings: dict[str, Any] = {}
        self.paths: dict[str, Path] = {}

    def set(self, setting: str, value: Any, path: Path) -> None:
        before = self.settings.get(setting)
        if setting == "warmup" and before is not None and 0 in (before, value):
            value = before or value  # `warmup_steps: 0` beside a ratio, as trainers write it out
        elif before is not None and not same(before, value):
            other = self.paths[setting][-1]
            what = f"says something else than {other}, which sets the same"
            self.found.add("SPEC-108", path, what, "keep one of the two")
        self.settings[setting], self.paths[setting] = value, path


def _read_section(section: str, content: Any, chosen: _Chosen) -> None:
    known, path = keys.sections(), (ROOT, section)
    if section not in known:
        change = did_you_mean(section, known)
        chosen.found.add("SPEC-111", path, f"Unrecognized section: {section}", change)
        return
    if content is None:
        return
    if not isinstance(content, dict):
        what = f"is {shown(content)}, and a section holds keys"
        chosen.found.add("SPEC-113", path, what, "write `key: value` lines below it, indented")
        return
    for name, value in _flattened(content, known[section]):
        key = known[section].get(name)
        if key is None:
            change = _nearest_key(section, name)
            chosen.found.add("SPEC-111", (*path, name), "unknown key", change)
        elif value is not None:
            _read_key(key, value, (*path, name), chosen)


def _flattened(content: dict[str, Any], known: dict[str, Key]) -> list[tuple[str, Any]]:
    """The pairs of a section; as in KAITO, an unknown `a: {b: 1}` is `a_b: 1`."""
    pairs = []
    for name, value in content.items():
        nested = isinstance(value, dict) and name not in known and value
        if nested and all(f"{name}_{inner}" in known for inner in value):
            pairs += [(f"{name}_{inner}", each) for inner, each in value.items()]
        else:
            pairs.append((name, value))
    return pairs


# What axolotl, LLaMA-Factory and Unsloth call it.
_ELSEWHERE = {
    "lora_r": "LoraConfig.r",
    "lora_rank": "LoraConfig.r",
    "lora_target": "LoraConfig.target_modules",
    "lora_target_modules": "LoraConfig.target_modules",
    "lora_target_linear": "LoraConfig.target_modules: all-linear",
    "val_set_size": "DatasetConfig.train_test_split, the share that is trained on",
    "val_size": "DatasetConfig.train_test_split, the share that is trained on",
    "cutoff_len": "TrainingArguments.max_length",
    "sequence_len": "TrainingArguments.max_length",
    "model_max_length": "TrainingArguments.max_length",
    "sample_packing": "TrainingArguments.packing",
    "micro_batch_size": "TrainingArguments.per_device_train_batch_size",
    "num_epochs": "TrainingArguments.num_train_epochs",
    "optimizer": "TrainingArguments.optim",
    "lr_scheduler": "TrainingArguments.lr_scheduler_type",
    "train_on_inputs": "DatasetConfig.train_on: all",
}


def _nearest_key(section: str, name: str) -> str:
    known = keys.sections()
    if name.lower() in _ELSEWHERE:
        return f"here it is {_ELSEWHERE[name.lower()]}"
    for other, rows in known.items():
        if name in rows:
            return f"move it to {other}"
    if found := nearest(name, known[section]):
        return f'did you mean "{found}"? Otherwise remove it'
    for other, rows in known.items():
        if found := nearest(name, rows):
            return f'did you mean "{found}" of {other}? Otherwise remove it'
    return "remove it; docs/config-keys.md lists the known keys"


def _read_key(key: Key, value: Any, path: Path, chosen: _Chosen) -> None:
    silent = any(same(value, each) for each in key.unset)
    if key.name == "output_dir":
        _check_output_dir(value, path, chosen.found)
    if key.use == "ignored":
        if not silent:
            chosen.found.note(path, f"ignored, because {key.text}")
    elif key.use == "refused":
        if not silent and key.name != "load_in_8bit":  # checked together with load_in_4bit
            chosen.found.add("SPEC-118", path, f"is not supported: {key.text}", key.change)
    elif key.setting and not silent:
        try:
            typed = coerce(key, value)
        except _Wrong as wrong:
            chosen.found.add(wrong.code, path, wrong.what, wrong.change)
            return
        if any(same(typed, each) for each in key.unset):
            return
        if key.use == "translated":
            chosen.found.note(path, f"is read as {key.text}")
        chosen.set(key.setting, typed if key.map is None else key.map[typed], path)


class _Wrong(Exception):
    def __init__(self, what: str, change: str, *, code: str = "SPEC-113") -> None:
        self.what, self.change, self.code = what, change, code


def coerce(key: Key, value: Any) -> Any:
    """`value` as `key` wants it. Raises `_Wrong`, with sentences for a person."""
    match key.type:
        case "number" | "count":
            return _number(key, value)
        case "switch":
            if isinstance(value, bool):
                return value
            raise _Wrong(f"is {shown(value)}, expected true or false", "write true or false")
        case "names":
            return _names(key, value)
        case "numbers":
            several = value if isinstance(value, list) else [value]
            return tuple(_number(key, each) for each in several)
        case "dtype":
            return _choice(key, value, {**_DTYPES})
        case "choice":
            return _choice(key, value, {each: each for each in key.values})
        case _:
            return _text(key, value)


def _number(key: Key, value: Any) -> float | int:
    whole = key.type != "number"
    expected = "a whole number" if whole else "a number"
    number = value
    if isinstance(value, str) and len(value) < 40 and _NUMBER.fullmatch(value):
        number = float(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise _Wrong(f"is {shown(value)}, expected {expected}", f"write {expected}")
    if any(same(number, each) for each in key.unset):
        return number
    if bounds := _out_of_bounds(key, number):
        raise _Wrong(
            f"is {shown(value)}, must be {bounds}", f"write {expected} {bounds}", code="SPEC-104"
        )
    if number == int(number) and (whole or key.setting == "warmup") and key.name != "warmup_ratio":
        return int(number)
    if whole or (key.setting == "warmup" and number > 1):
        raise _Wrong(f"is {number:g}, expected a whole number", "write a whole number")
    return float(number)


def _out_of_bounds(key: Key, number: float | int) -> str | None:
    bounds: tuple[tuple[str, float | None, Callable[[float, float], bool]], ...] = (
        ("above", key.above, operator.gt),
        ("at least", key.min, operator.ge),
        ("below", key.below, operator.lt),
        ("at most", key.max, operator.le),
    )
    given = [(word, bound, holds) for word, bound, holds in bounds if bound is not None]
    if all(holds(number, bound) for _, bound, holds in given):
        return None
    return " and ".join(f"{word} {bound:,}" for word, bound, _ in given)


def _names(key: Key, value: Any) -> tuple[str, ...]:
    several = value if isinstance(value, list) else [value]
    for each in several:
        if not isinstance(each, str) or not each:
            raise _Wrong(f"holds {shown(each)}, expected names", "write a list of names")
        if not re.fullmatch(r"[A-Za-z0-9_.:/-]{1,200}", each):
            what = f"{shown(each)} is a pattern or no name at all"
            raise _Wrong(what, "list the names of the layers, such as [q_proj, v_proj]")
        if key.setting == "target_modules" and each.rpartition(".")[2] in _HEADS:
            what = (
                f"{each} is not supported: servers load adapters of attention and MLP layers only"
            )
            raise _Wrong(what, f"remove {each}", code="SPEC-118")
    if not several:
        raise _Wrong("is an empty list", "name at least one, or remove the key")
    return tuple(dict.fromkeys(several))


def _choice(key: Key, value: Any, options: dict[str, str]) -> str:
    if isinstance(value, str) and value.strip().lower() in options:
        return options[value.strip().lower()]
    shown_options = ["bfloat16", "float16", "float32"] if key.type == "dtype" else list(options)
    found = nearest(value, options) if isinstance(value, str) else None
    hint = f'; did you mean "{options[found]}"?' if found else ""
    change = f"use one of {', '.join(shown_options)}{hint}"
    raise _Wrong(f"is {shown(value)}, which is not known", change, code="SPEC-104")


def _text(key: Key, value: Any) -> str | None:
    if not isinstance(value, str):
        raise _Wrong(f"is {shown(value)}, expected a text", "write a text, in quotes")
    if not value.strip():
        raise _Wrong("is empty", "write a text, or remove the key")
    if key.setting == "chat_template":
        return value
    if len(value) > 200 or not value.isprintable():
        raise _Wrong("is no name", "write at most 200 printable characters", code="SPEC-104")
    if key.setting == "dataset_path":
        return _inside(value) or None
    if key.setting == "dataset_extension":
        return value.lower().removeprefix(".")
    if key.setting == "revision" and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", value):
        what = f"{shown(value)} is no revision"
        raise _Wrong(what, "write a commit, a branch or a tag", code="SPEC-104")
    return value


def _inside(path: str) -> str:
    path = path.rstrip("/") + "/"
    for mount in ("/mnt/data/", "/mnt/", "./"):
        path = path.removeprefix(mount)
    path = path.rstrip("/")
    if path.startswith("/") or ".." in path.split("/"):
        what = "leads out of the data"
        raise _Wrong(what, "give a path relative to the data, without ..", code="SPEC-104")
    return path


def _check_output_dir(value: Any, path: Path, found: Findings) -> None:
    """KAITO's own check, so that a file that passes here passes there."""
    if not isinstance(value, str):
        found.add("SPEC-113", path, "output_dir is not a string", "remove it")
        return
    parts: list[str] = []
    for part in value.removeprefix("/mnt").split("/"):
        if part == "..":
            parts = parts[:-1] if parts else [".."]
        elif part not in ("", "."):
            parts.append(part)
    if not parts or parts[0] == "..":
        what = f"Invalid output_dir specified: '{value[:60]}', must be a directory"
        found.add("SPEC-104", path, what, "remove it; the adapter goes to tuning.output")


def _check_quantisation(
    section: dict[str, Any], found: Findings, name: str, method: Method | None
) -> None:
    """4 or 8 bit and the method must agree; the sentences are KAITO's."""
    path = (ROOT, "QuantizationConfig")
    flags: dict[str, Any] = {}
    for key in ("load_in_4bit", "load_in_8bit"):
        flags[key] = section.get(key)
        if flags[key] is not None and not isinstance(flags[key], bool):
            go = _GO_TYPES.get(type(flags[key]), "map[string]interface {}")
            what = f"value must be either nil or a boolean, got type {go}"
            found.add("SPEC-113", (*path, key), what, "write true or false")
            return
    four, eight = flags["load_in_4bit"], flags["load_in_8bit"]
    if wrong := contradiction(method, four, eight, name):
        found.add("SPEC-108", path, *wrong)
    elif eight:
        key8 = keys.sections()["QuantizationConfig"]["load_in_8bit"]
        what = f"is not supported: {key8.text}"
        found.add("SPEC-118", (*path, "load_in_8bit"), what, key8.change)


def contradiction(
    method: Method | None, four: bool | None, eight: bool | None, name: str
) -> tuple[str, str] | None:
    """How the flags of the ConfigMap `name` contradict each other or the method, and the change."""
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
    """KAITO's template sets rank 8 and alpha 8: as a pair they are not somebody's choice."""
    settings = chosen.settings
    if settings.get("rank") == 8 and settings.get("alpha") == 8:
        del settings["rank"], settings["alpha"]


def _template(text: str, chosen: _Chosen, read_template: Callable[[str], str | None]) -> str | None:
    if any(character in text for character in "{}\n"):
        return text
    content = read_template(text)
    if content is None:
        what = f"the file {shown(text)} cannot be read from here"
        change = "correct the path, or paste the template's text (a cluster takes only the text)"
        chosen.found.add("SPEC-120", chosen.paths["chat_template"], what, change)
    return content
