"""The step "pack": tokenised rows -> train.arrow and eval.arrow, in the order of training."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from tuning import files
from tuning.data import bins
from tuning.data.over_length import Piece, losses, pieces
from tuning.data.rows import PIECE, SCHEMA, Ints, Rows, ramps
from tuning.errors import DataError

WRITTEN_TOGETHER = 256  # bins
FORGOTTEN_AFTER = 64  # so many of these


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Carry out the request; see the package's docstring. Raises DataError."""
    out = Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)
    source = Path(request["tokenised"])
    rows = Rows(source / "rows.arrow")
    told = files.read_json(source / "tokenised.json")
    job = _Job(request, rows, told)
    train, held_out = job.split()
    parts = {"train": job.part(train, out / "train.arrow"), "eval": None}
    if len(held_out):
        parts["eval"] = job.part(held_out, out / "eval.arrow")
    else:
        (out / "eval.arrow").unlink(missing_ok=True)
    files.sync_folder(out)
    job.check(parts["train"])
    result = {
        **parts,
        "max_length": request["max_length"],
        "packing": request["packing"],
        "over_length": {"policy": job.policy, **job.counts},
        "dropped": dict(job.dropped),
        "notes": job.notes(),
    }
    files.write_json(out / "packed.json", result)
    return result


@dataclass
class _Job:
    """One packing, and what it counts."""

    request: dict[str, Any]
    rows: Rows
    told: dict[str, Any]  # the answer to "tokenise"
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            (
                "rows",
                "truncated",
                "split",
                "dropped",
                "lost_tokens",
                "lost_answers",
                "cut_answers",
            ),
            0,
        )
    )
    dropped: Counter[str] = field(default_factory=Counter)
    _left_of_split: int = 0  # tokens of parts that have nothing to learn

    @property
    def policy(self) -> Any:
        return self.request.get("over_length") or "auto"

    @property
    def seed(self) -> int:
        drawn = self.request.get("shuffle_seed")
        return int(self.request["seed"] if drawn is None else drawn)

    def split(self) -> tuple[Ints, Ints]:
        """The rows to train on and those held out, by a seeded draw."""
        total = len(self.rows.lengths)
        share = self.request.get("train_share") or 1
        if share >= 1:
            return np.arange(total, dtype=np.int32), np.arange(0, dtype=np.int32)
        kept = round(total * share)
        if not 0 < kept < total:
            raise DataError.at(
                "DATA-236",
                "DatasetConfig.train_test_split",
                f"{share} of {total} rows leaves {kept} to train on and {total - kept} held out",
                "change the share so that both have rows, or set it to 1",
            )
        drawn = np.random.RandomState(self.seed).permutation(total).astype(np.int32)
        return np.sort(drawn[:kept]), np.sort(drawn[kept:])

    def part(self, chosen: Ints, path: Path) -> dict[str, Any]:
        """Write the rows `chosen` to `path`."""
        max_length = self.request["max_length"]
        found = self._pieces(chosen)
        sizes = found["end"] - found["start"] + found["lead"]
        if self.request["packing"]:
            members, ends = assign(sizes, size=max_length, seed=self.seed)
        else:
            members, ends = np.arange(len(found)), np.arange(1, len(found) + 1)
        order = self._order(members, ends)
        trained = self._write(path, found, members, ends, order)
        tokens = int(sizes.sum())
        return {
            "path": str(path),
            "rows": len(ends),
            "documents": len(found),
            "tokens": tokens,
            "trained_tokens": trained,
            "efficiency": round(tokens / (len(ends) * max_length), 4),
        }

    def _order(self, members: Any, ends: Any) -> Any:
        if self.request.get("shuffle", True):
            return np.random.RandomState(self.request["seed"]).permutation(len(ends))
        first = np.minimum.reduceat(members, np.concatenate(([0], ends[:-1])))
        return np.argsort(first, kind="stable")

    def _pieces(self, chosen: Ints) -> Any:
        """The pieces of the rows `chosen` as an array of PIECE, in the order of the rows."""
        lengths = self.rows.lengths[chosen]
        fits = lengths <= self.request["max_length"]
        whole = np.zeros(int(fits.sum()), dtype=PIECE)
        whole["row"], whole["end"], whole["clip"] = chosen[fits], lengths[fits], True
        if fits.all():
            return whole
        too_long = chosen[~fits]
        self._refuse_long(chosen, too_long)
        made = [piece for row in too_long.tolist() for piece in self._cut(row)]
        cut = np.array([astuple(piece) for piece in made], dtype=PIECE)
        found = np.concatenate((whole, cut))
        if not len(found):
            raise self._all_too_long(len(chosen))
        return found[np.lexsort((found["start"], found["row"]))]

    def _cut(self, row: int) -> list[Piece]:
        max_length, length = self.request["max_length"], int(self.rows.lengths[row])
        ids, trained = self.rows.get(row)
        made = pieces(
            row,
            trained.tolist(),
            length=length,
            max_length=max_length,
            policy=self.policy,
            lead=self._lead(ids),
        )
        self.counts["rows"] += 1
        self.counts["dropped"] += not made
        self.counts["split"] += len(made) > 1
        self.counts["truncated"] += len(made) == 1
        self.counts["lost_tokens"] += length - sum(p.end - p.start + p.lead for p in made)
        if len(made) == 1:
            lost, shortened = losses(made[0], trained.tolist())
            self.counts["lost_answers"] += lost
            self.counts["cut_answers"] += shortened
        kept = [piece for piece in made if self._learns(piece)]
        self.dropped["no token to learn after cutting"] += len(made) - len(kept)
        left = [piece for piece in made if piece not in kept]
        self.counts["lost_tokens"] += sum(p.end - p.start + p.lead for p in left)
        if len(made) > 1:
            self._left_of_split += sum(p.end - p.start for p in left)
        return kept

    def _learns(self, piece: Piece) -> bool:
        """Whether a cut piece has a token to learn."""
        made = np.array([astuple(piece)], dtype=PIECE)
        return self.rows.gather(made, np.array([1]))[1] > 0

    def _lead(self, ids: Ints) -> int:
        """1 if the row opens with the beginning-of-sequence token."""
        return int(self.told["bos"] is not None and ids[0] == self.told["bos"])

    def _refuse_long(self, chosen: Ints, too_long: Ints) -> None:
        if not len(too_long):
            return
        if self.policy == "refuse":
            shown = ", ".join(self._where(int(row)) for row in too_long[:20])
            what = f"{len(too_long)} rows are longer than {self.request['max_length']} tokens"
            change = "shorten them, raise max_length, or choose split, truncate or drop"
            raise DataError.at("DATA-229", "data", f"{what}: {shown}", change)
        whole = self.policy in ("split", "truncate") or (
            self.policy == "auto" and any(self._is_text(int(row)) for row in too_long[:100])
        )
        if len(too_long) == len(chosen) and not whole:
            raise self._all_too_long(len(chosen))

    def _where(self, row: int) -> str:
        number, place = self.rows.place(row)
        file = self.told["files"][number]
        unit = "line" if file["format"] in ("jsonl", "csv", "tsv") else "row"
        return f"{file['shown']} {unit} {place}"

    def _is_text(self, row: int) -> bool:
        ids, trained = self.rows.get(row)
        return bool(trained.tolist() == [0, len(ids)])

    def _all_too_long(self, number: int) -> DataError:
        return DataError.at(
            "DATA-228",
            "data",
            f"all {number} rows are longer than max_length {self.request['max_length']}; the "
            f"shortest has {int(self.rows.lengths.min())} tokens",
            "raise TrainingArguments.max_length, or shorten the rows",
        )

    def _write(self, path: Path, found: Any, members: Any, ends: Any, order: Any) -> int:
        """Write the bins in `order`; returns the number of trained tokens."""
        starts = np.concatenate(([0], ends[:-1]))
        scratch = path.with_name(f".{path.name}.tmp")
        trained = 0
        try:
            with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
                for number, begin in enumerate(range(0, len(order), WRITTEN_TOGETHER)):
                    bins_ = order[begin : begin + WRITTEN_TOGETHER]
                    counts = ends[bins_] - starts[bins_]
                    chosen = members[ramps(starts[bins_], counts)]
                    record, labelled = self.rows.gather(found[chosen], counts)
                    trained += labelled
                    writer.write_batch(record)
                    if number % FORGOTTEN_AFTER == 0:
                        self.rows.forget()
            files.sync_file(scratch)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
        return trained

    def check(self, train: Any) -> None:
        """Raise DataError if the user's batch is larger than what there is to train on."""
        batch = self.request.get("batch")
        if batch and train["rows"] < batch:
            kind = "packed rows" if self.request["packing"] else "rows"
            raise DataError.at(
                "DATA-235",
                "data",
                f"there are {train['rows']} {kind}, fewer than one batch of {batch}",
                "lower per_device_train_batch_size or gradient_accumulation_steps, or add rows",
            )

    def notes(self) -> list[str]:
        """What happened to over-long rows, in words."""
        counts, limit, left = self.counts, self.request["max_length"], self._left_of_split
        lost = [
            f"{counts[key]} of their answers {what}"
            for key, what in (("lost_answers", "left out"), ("cut_answers", "cut short"))
            if counts[key]
        ]
        words = {
            "split": "split into parts, "
            + (f"{left:,} tokens without an answer left out" if left else "no token lost"),
            "truncated": f"cut: {', '.join(lost)}" if lost else "cut so that all answers stay",
            "dropped": "left out",
        }
        made = [
            f"{counts[key]} rows longer than {limit} tokens {text}"
            for key, text in words.items()
            if counts[key]
        ]
        return made + [f"{n} rows left out: {why}" for why, n in self.dropped.items() if n]


def assign(sizes: Any, *, size: int, seed: int) -> tuple[Any, Any]:
    """Which pieces share a bin: the pieces in the order of bins, and where each bin ends.

    Pieces of equal length are interchangeable to the packing; a seeded draw decides among them, so
    that documents which stood together in the file are not always packed together.
    """
    found, counts = np.unique(sizes, return_counts=True)
    patterns = bins.pack(zip(found.tolist(), counts.tolist(), strict=True), size=size)
    drawn = np.random.RandomState(seed).permutation(np.arange(len(sizes), dtype=np.int32))
    by_length = drawn[np.argsort(sizes[drawn], kind="stable")]
    ends = np.cumsum(counts)
    nexts = dict(zip(found.tolist(), (ends - counts).tolist(), strict=True))
    members: list[Any] = []
    widths: list[Any] = []
    for pattern, number in patterns:
        columns = []
        for length in pattern:
            at = nexts[length]
            columns.append(by_length[at : at + number])
            nexts[length] = at + number
        members.append(np.stack(columns, axis=1).ravel())
        widths.append(np.full(number, len(pattern)))
    return np.concatenate(members), np.cumsum(np.concatenate(widths))
