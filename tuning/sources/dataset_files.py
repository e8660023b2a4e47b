"""Which files of a dataset's repository are which config and split, by the rules of `datasets`.

The rules are the library's own functions, on the names of a listing: nothing is opened, and no code
of the repository is run. `datasets` is imported late, since it takes seconds.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

CARD, CONFIGS = "README.md", ".huggingface.yaml"  # where `configs:` may be, the later one counts
CONVERTED = "refs/convert/parquet"  # the hub's own copies, as CONFIG/SPLIT/0000.parquet
READABLE = ("parquet", "arrow", "json", "csv")  # modules of `datasets` whose files we read
_USED = ("config_name", "data_files", "data_dir", "default")
_INERT = ("description", "features", "version", "drop_labels")  # of a config: no file of ours
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Invalid(ValueError):
    """The metadata of a dataset that names its configs is not of the form that `datasets` reads."""


@dataclass(frozen=True)
class Config:
    """One config of a dataset."""

    data_files: Any = None  # patterns as written; None: by the names of the files
    data_dir: str | None = None
    options: tuple[str, ...] = ()  # of a reader of `datasets`, which ours has not


def configs(
    texts: dict[str, str], names: Sequence[str], *, converted: bool = False
) -> tuple[dict[str, Config], str | None]:
    """The configs by name, and the default one, if there is one.

    `texts` holds those of CARD and CONFIGS, `names` all files; `converted` are those of the hub's
    own copies, which have no card. Raises Invalid.
    """
    from datasets.utils.metadata import MetadataConfigs

    written = _written(texts)
    try:
        rows = [{key: row[key] for key in _USED if key in row} for row in written]
        known = MetadataConfigs.from_dataset_card_data({"configs": rows})
        default = known.get_default_config_name()
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise Invalid(" ".join(str(error).split())[:200] or type(error).__name__) from None
    if not known and converted:
        known = _converted(names)
        default = next((name for name in known if name == "default" or len(known) == 1), None)
    options = {
        str(row["config_name"]): tuple(sorted(map(str, row.keys() - {*_USED, *_INERT})))
        for row in written
    }
    found = {
        str(name): Config(each.get("data_files"), each.get("data_dir"), options.get(str(name), ()))
        for name, each in known.items()
    }
    if not found:
        return {"default": Config()}, "default"
    return found, None if default is None else str(default)


def _written(texts: dict[str, str]) -> list[dict[str, Any]]:
    """The list `configs:` as it is written. Raises Invalid."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(texts.get(CARD, ""))
    found: Any = None
    try:
        for text in (block[2] if block else "", texts.get(CONFIGS, "")):
            content = yaml.load(text, Loader=_LOADER)  # noqa: S506 a safe loader
            if isinstance(content, dict) and content.get("configs"):
                found = content["configs"]
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise Invalid("its metadata is not YAML") from None
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise Invalid("configs is not a list of configs")
    return found


def _converted(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The configs of the hub's copies in parquet."""
    splits: dict[str, dict[str, str]] = {}
    for name in names:
        if match := re.fullmatch(r"([^/]+)/([\w.-]+)/\d+\.parquet", name):
            folder = f"{match[1]}/{match[2]}"
            splits.setdefault(match[1], {})[match[2]] = f"{folder}/*.parquet"
    return {
        config: {"data_files": [{"split": split, "path": path} for split, path in each.items()]}
        for config, each in splits.items()
    }


def splits(config: Config, names: Sequence[str]) -> dict[str, list[str]]:
    """The files of each split of `config` among `names`, sorted. Raises Invalid."""
    from datasets.data_files import _get_data_files_patterns, sanitize_patterns

    folder = posixpath.normpath(config.data_dir or ".")
    start = "" if folder == "." else f"{folder}/"
    resolve = _resolver([name.removeprefix(start) for name in names if name.startswith(start)])
    try:
        patterns = (
            _get_data_files_patterns(resolve)
            if config.data_files is None
            else sanitize_patterns(config.data_files)
        )
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise Invalid(" ".join(str(error).split())[:200]) from None
    found = {}
    for split, each in patterns.items():
        inside = list(dict.fromkeys(name for pattern in each for name in _all(resolve, pattern)))
        found[str(split)] = [start + name for name in inside]
    return {split: files for split, files in found.items() if files}


def _all(resolve: Callable[[str], list[str]], pattern: Any) -> list[str]:
    """The files of `pattern`; one that is no pattern has to be there. Raises Invalid."""
    from glob import has_magic

    if not isinstance(pattern, str) or "://" in pattern or "::" in pattern or pattern[:1] == "/":
        raise Invalid(f"data_files names {str(pattern)[:100]}, which is not in the repository")
    try:
        return resolve(pattern)
    except FileNotFoundError:
        if has_magic(pattern):
            return []
        raise Invalid(f"data_files names {pattern[:100]}, which is not there") from None


def _resolver(names: Sequence[str]) -> Callable[[str], list[str]]:
    """`datasets.data_files.resolve_pattern`, on a listing."""
    from datasets import data_files
    from fsspec.utils import glob_translate

    def resolve(pattern: str) -> list[str]:
        pattern = posixpath.normpath(pattern)
        try:
            rule = re.compile(glob_translate(pattern))
        except (ValueError, re.error):
            raise Invalid(f"{pattern[:100]} is not a pattern") from None
        ignored = set(data_files.FILES_TO_IGNORE) - {posixpath.basename(pattern)}
        found = [
            name
            for name in names
            if (name == pattern or rule.match(name))
            and posixpath.basename(name) not in ignored
            and not data_files._is_inside_unrequested_special_dir(name, pattern)
            and not data_files._is_unrequested_hidden_file_or_is_inside_unrequested_hidden_dir(
                name, pattern
            )
        ]
        if not found:
            raise FileNotFoundError(pattern)
        return sorted(found)

    return resolve


def readable(names: Sequence[str]) -> list[str]:
    """Those of `names` that are of the format `datasets` reads them as, if we read it too."""
    from datasets.load import infer_module_for_data_files_list
    from datasets.packaged_modules import _EXTENSION_TO_MODULE as modules

    loose = [name for name in names if not name.lower().endswith(".zip")]
    module, _ = infer_module_for_data_files_list(loose)
    if module not in READABLE:
        return []
    return [
        name
        for name in loose
        if any(
            modules.get(f".{suffix.lower()}", ("",))[0] == module
            for suffix in posixpath.basename(name).split(".")[1:]
        )
    ]
