"""Files of a folder that are splits by their names: train is read, validation and test are not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_NAMES |= dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation")
_BETWEEN = re.compile(r"[-._ 0-9]+")  # words of a name, as `datasets` tells them apart


def split_of(name: str) -> str | None:
    """train, validation or test: a word in the name of the file, or else its nearest folder's name.

    train.jsonl, test_sft-00000-of-00001.parquet and birds_test.csv, but not latest.csv; a name with
    words of two splits (train_test.csv) is of none.
    """
    path = PurePosixPath(name)
    words = {_NAMES[word] for word in _BETWEEN.split(path.name.lower()) if word in _NAMES}
    if words:
        return words.pop() if len(words) == 1 else None
    folders = (_NAMES.get(part.lower()) for part in reversed(path.parts[:-1]))
    return next((split for split in folders if split), None)


def held_out(names: Sequence[str]) -> list[str]:
    """The names of validation and test files, where there are train files beside them."""
    splits = {name: split_of(name) for name in names}
    if "train" not in splits.values():
        return []
    return [name for name, split in splits.items() if split in ("validation", "test")]
