"""Which rows of each part of a mixture are trained on: drawn by their places, before tokenising."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tuning.data import read
from tuning.data.file_encoder import FileEncoder, Input
from tuning.data.problems import Problems
from tuning.data.source import Source
from tuning.errors import DataError


def draw(
    inputs: Sequence[Input], parts: Sequence[Mapping[str, Any]], encoder: FileEncoder, *, seed: int
) -> list[Input]:
    """`inputs` with the rows of each that are trained on, drawn with `seed`.

    A part has so many "rows", or a "weight" among the parts with one: of the largest mixture in
    which no row comes twice. A part with fewer rows than asked for is a problem of `encoder`'s.
    Files that cannot be read are left as they are: encoding them tells why.
    """
    limited = [n for n, part in enumerate(parts) if part.get("weight") or part.get("rows")]
    places = {each.number: _places(each, encoder) for each in inputs if each.part in limited}
    if any(own is None or not len(own) for own in places.values()):
        return list(inputs)
    have = {
        number: sum(len(places[each.number]) for each in inputs if each.part == number)
        for number in limited
    }
    drawn = list(inputs)
    for number, count in _wanted(parts, have, encoder.problems).items():
        kept = np.zeros(have[number], dtype=bool)
        kept[np.random.RandomState([seed, number]).permutation(have[number])[:count]] = True
        begin = 0
        for at, each in enumerate(inputs):
            if each.part == number:
                own = places[each.number]
                chosen = encoder.scratch / f"chosen-{each.number}.npy"
                np.save(chosen, own[kept[begin : begin + len(own)]])
                begin += len(own)
                drawn[at] = replace(each, chosen=str(chosen))
    return drawn


def _wanted(
    parts: Sequence[Mapping[str, Any]], have: Mapping[int, int], problems: Problems
) -> dict[int, int]:
    """The rows of each part in `have`, which says how many each has."""
    for number, count in have.items():
        if (asked := parts[number].get("rows") or 0) > count:
            what = f"asks for {asked:,} rows, and {parts[number]['path']} has {count:,}"
            change = f"write at most {count:,}, or give the parts weights"
            problems.add("DATA-262", f"DatasetConfig.sources[{number}].rows", what, change)
    weights = {number: parts[number]["weight"] for number in have if parts[number].get("weight")}
    whole = min((have[number] / weight for number, weight in weights.items()), default=0.0)
    return {
        number: max(1, math.floor(weights[number] * whole + 1e-6))
        if number in weights
        else parts[number]["rows"]
        for number in have
    }


def _places(input: Input, encoder: FileEncoder) -> Any:
    """The line or row numbers of a file's rows; None if it cannot be read."""
    problems = Problems()
    columns = encoder.columns[input.part].named
    source = Source(input.path, input.shown, input.kind, problems, encoder.scratch, columns)
    try:
        if input.kind.format == "parquet" and input.kind.compression is None:
            return np.arange(1, pq.read_metadata(input.path).num_rows + 1)
        found = [place for batch in read.batches(source) for place in batch.places]
    except (DataError, pa.ArrowException, OSError):
        return None
    return None if len(problems) else np.array(found, dtype=np.int64)
