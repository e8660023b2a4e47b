"""Files of a folder that are splits by their names: train is read, validation and test are not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_NAMES |= dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation")
# train.jsonl, train-00000-of-00002.parquet, train_0.csv, test_sft-00000-of-00001.parquet
_FILE = re.compile(rf"({'|'.join(_NAMES)})(?:_(?:sft|gen))?(?:[-_.]?\d[\w-]*)?(?:\..*)?", re.I)


def split_of(name: str) -> str | None:
    """train, validation or test: what the file, or else its nearest folder, is called."""
    path = PurePosixPath(name)
    if match := _FILE.fullmatch(path.name):
        return _NAMES[match[1].lower()]
    folders = (_NAMES.get(part.lower()) for part in reversed(path.parts[:-1]))
    return next((split for split in folders if split), None)


def held_out(names: Sequence[str]) -> list[str]:
    """The names of validation and test files, where there are train files beside them."""
    splits = {name: split_of(name) for name in names}
    if "train" not in splits.values():
        return []
    return [name for name, split in splits.items() if split in ("validation", "test")]
