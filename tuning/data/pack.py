"""The step "pack": tokenised rows -> train.arrow and eval.arrow, in the order of training."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from tuning import files
from tuning.data import bins
from tuning.data.over_length import Piece, losses, pair_pieces, pieces
from tuning.data.rows import PIECE, SCHEMA, Ints, Rows, ramps
from tuning.errors import DataError

BATCH_BINS = 256  # written together
RELEASE_BATCHES = 64  # after which the memory of the rows is released
COUNTS = ("rows", "truncated", "split", "dropped", "lost_tokens", "lost_answers", "cut_answers")


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run the request; see the package's docstring. Raises DataError."""
    out = Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)
    source = Path(request["tokenised"])
    rows = Rows(source / "rows.arrow")
    packing = _Packing(request, rows, files.read_json(source / "tokenised.json"))
    train, evaluation = packing.split()
    parts = {"train": packing.write_part(train, out / "train.arrow"), "eval": None}
    if len(evaluation):
        parts["eval"] = packing.write_part(evaluation, out / "eval.arrow")
    else:
        (out / "eval.arrow").unlink(missing_ok=True)
    files.sync_folder(out)
    packing.check_batch(parts["train"])
    result = {
        **parts,
        "max_length": request["max_length"],
        "packing": request["packing"],
        "over_length": {"policy": packing.policy, **packing.counts},
        "dropped": dict(packing.dropped),
        "notes": packing.notes(),
        "held_out": packing.held_out(evaluation),
    }
    files.write_json(out / "packed.json", result)
    return result


@dataclass
class _Packing:
    """One run of the step, with its counts."""

    request: dict[str, Any]
    rows: Rows
    tokenised: dict[str, Any]  # the result of "tokenise"
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    dropped: Counter[str] = field(default_factory=Counter)
    _copies: int = 0  # rows that are identical to an earlier one, if rows are held out
    _lost_of_split: int = 0  # tokens of split parts without a trained token

    @property
    def width(self) -> int:
        """Documents of a training row that belong together: the answers of a pair, else one."""
        return 2 if self.tokenised.get("objective") == "dpo" else 1

    @property
    def policy(self) -> Any:
        return self.request.get("over_length") or "auto"

    @property
    def seed(self) -> int:
        seed = self.request.get("shuffle_seed")
        return int(self.request["seed"] if seed is None else seed)

    def split(self) -> tuple[Ints, Ints]:
        """The rows of the training and evaluation splits, drawn with the seed."""
        total = len(self.rows.lengths) // self.width
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
        random = np.random.RandomState(self.seed)
        drawn, held = [], []
        for rows in self._parts(total):
            shuffled = rows[random.permutation(len(rows))]
            kept = round(len(rows) * share)
            drawn.append(shuffled[:kept])
            held.append(shuffled[kept:])
        return self._apart(np.concatenate(drawn), np.concatenate(held))

    def _parts(self, total: int) -> list[Ints]:
        """The rows of each part of a mixture, or all of them."""
        everything = np.arange(total, dtype=np.int32)
        return [everything[self._part == number] for number in np.unique(self._part)]

    @cached_property
    def _part(self) -> Ints:
        """The part of each row."""
        return np.array([file["part"] for file in self.tokenised["files"]])[
            self.rows.files[:: self.width]
        ]

    def held_out(self, evaluation: Ints) -> list[int]:
        """How many rows of each part are held out."""
        parts = max(file["part"] for file in self.tokenised["files"]) + 1
        return [int(n) for n in np.bincount(self._part[evaluation], minlength=parts)]

    def _apart(self, drawn: Ints, held: Ints) -> tuple[Ints, Ints]:
        """Training and evaluation rows, identical ones on one side, as many held out as in `held`.

        Whole groups of identical rows are held out: those of `held` first, then of `drawn`.
        """
        groups: dict[bytes, list[int]] = {}
        digests = {row: self._digest(row) for row in range(len(drawn) + len(held))}
        for row, digest in digests.items():
            groups.setdefault(digest, []).append(row)
        self._copies = len(digests) - len(groups)
        if not self._copies:
            return np.sort(drawn), np.sort(held)
        if len(groups) == 1:
            what = f"holds rows out, and all {len(digests)} rows are identical"
            change = "add other rows to the data, or set the share to 1"
            raise DataError.at("DATA-236", "DatasetConfig.train_test_split", what, change)
        chosen: list[int] = []
        for row in (*held.tolist(), *drawn.tolist()):
            group = groups.get(digests[row], [])
            if len(chosen) + len(group) <= len(held):
                chosen += groups.pop(digests[row], [])
        chosen = chosen or min(groups.values(), key=len)
        everything = np.arange(len(digests), dtype=np.int32)
        moved = np.isin(everything, np.array(chosen))
        return everything[~moved], everything[moved]

    def _digest(self, row: int) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for document in range(row * self.width, (row + 1) * self.width):
            ids, trained = self.rows.get(document)
            digest.update(ids.tobytes() + b"/" + trained.tobytes())
        return digest.digest()

    def write_part(self, chosen: Ints, path: Path) -> dict[str, Any]:
        """Pack the rows `chosen` into `path`; returns a PART of the result."""
        max_length = self.request["max_length"]
        documents = self._pieces(chosen) if self.width == 1 else self._pairs(chosen)
        sizes = documents["end"] - documents["start"] + documents["lead"]
        if self.request["packing"]:
            members, ends = assign(sizes, size=max_length, seed=self.seed)
        else:
            members = np.arange(len(documents))
            ends = np.arange(self.width, len(documents) + 1, self.width)
        order = self._order(members, ends)
        good = self.rows.good() if self.tokenised.get("objective") == "kto" else None
        trained = self._write(path, documents, members, ends, order, good)
        tokens = int(sizes.sum())
        return {
            "path": str(path),
            "rows": len(ends),
            "documents": len(documents) // self.width,
            "tokens": tokens,
            "trained_tokens": trained,
            "efficiency": round(tokens / (len(ends) * max_length * self.width), 4),
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
        self._check_too_long(chosen, too_long)
        cut = [astuple(piece) for row in too_long.tolist() for piece in self._cut(row)]
        documents = np.concatenate((whole, np.array(cut, dtype=PIECE)))
        if not len(documents):
            raise self._all_too_long(len(chosen))
        return documents[np.lexsort((documents["start"], documents["row"]))]

    def _pairs(self, chosen: Ints) -> Any:
        """The documents of the pairs `chosen`, two by two; pairs that are too long are cut."""
        documents = (2 * chosen[:, None] + np.arange(2, dtype=np.int32)).ravel()
        lengths = self.rows.lengths[documents]
        pieces_ = np.zeros(len(documents), dtype=PIECE)
        pieces_["row"], pieces_["end"], pieces_["clip"] = documents, lengths, True
        long = lengths.reshape(-1, 2).max(axis=1) > self.request["max_length"]
        kept = np.ones(len(chosen), dtype=bool)
        if long.any():
            self._check_too_long(chosen, chosen[long] * 2)
        for number in long.nonzero()[0].tolist():
            cut = self._cut_pair(int(documents[2 * number]))
            kept[number] = bool(cut)
            pieces_[2 * number : 2 * number + 2] = [astuple(piece) for piece in cut] or 0
        if not kept.any():
            raise self._all_too_long(len(chosen))
        return pieces_[np.repeat(kept, 2)]

    def _cut_pair(self, row: int) -> list[Piece]:
        """The pieces of a pair whose chosen answer is `row`; none if it is left out."""
        both = [self.rows.get(row + side) for side in range(2)]
        lengths, trained = [len(ids) for ids, _ in both], [each.tolist() for _, each in both]
        bos = self.tokenised["bos"]
        lead = int(bos is not None and all(ids[0] == bos for ids, _ in both))
        cut: list[Piece] = []
        if self.policy != "drop":
            cut = pair_pieces(row, trained, lengths, self.request["max_length"], lead)
        parts = {ids[p.start : p.end].tobytes() for (ids, _), p in zip(both, cut, strict=False)}
        kept = cut if len(parts) == 2 and all(map(self._has_trained_token, cut)) else []
        self.counts["rows"] += 1
        self.counts["truncated" if kept else "dropped"] += 1
        self.dropped["no token to learn after cutting"] += bool(cut) and not kept
        for piece, ranges in zip(kept, trained, strict=bool(kept)):
            lost, shortened = losses(piece, ranges)
            self.counts["lost_answers"] += lost
            self.counts["cut_answers"] += shortened
        self.counts["lost_tokens"] += sum(lengths) - sum(p.end - p.start + p.lead for p in kept)
        return kept

    def _cut(self, row: int) -> list[Piece]:
        max_length, length = self.request["max_length"], int(self.rows.lengths[row])
        ids, trained = self.rows.get(row)
        bos = self.tokenised["bos"]
        parts = pieces(
            row,
            trained.tolist(),
            length=length,
            max_length=max_length,
            policy=self.policy,
            lead=int(bos is not None and ids[0] == bos),
        )
        self.counts["rows"] += 1
        self.counts["dropped"] += not parts
        self.counts["split"] += len(parts) > 1
        self.counts["truncated"] += len(parts) == 1
        if len(parts) == 1:
            lost, shortened = losses(parts[0], trained.tolist())
            self.counts["lost_answers"] += lost
            self.counts["cut_answers"] += shortened
        kept = [piece for piece in parts if self._has_trained_token(piece)]
        self.dropped["no token to learn after cutting"] += len(parts) - len(kept)
        self.counts["lost_tokens"] += length - sum(p.end - p.start + p.lead for p in kept)
        if len(parts) > 1:
            self._lost_of_split += sum(p.end - p.start for p in parts if p not in kept)
        return kept

    def _has_trained_token(self, piece: Piece) -> bool:
        pieces = np.array([astuple(piece)], dtype=PIECE)
        return self.rows.gather(pieces, np.array([1]))[1] > 0

    def _check_too_long(self, chosen: Ints, too_long: Ints) -> None:
        """Raise DataError if the policy is `refuse`, or would leave out all rows."""
        if self.policy == "refuse":
            shown = ", ".join(self._where(int(row)) for row in too_long[:20])
            what = f"{len(too_long)} rows are longer than {self.request['max_length']} tokens"
            change = (
                "shorten them, raise TrainingArguments.max_length, or set "
                "DatasetConfig.over_length to split, truncate or drop"
            )
            raise DataError.at("DATA-229", "data", f"{what}: {shown}", change)
        keeps = self.policy in ("split", "truncate") or (
            self.policy == "auto" and any(self._is_text(int(row)) for row in too_long[:100])
        )
        if len(too_long) == len(chosen) and not keeps:
            raise self._all_too_long(len(chosen))

    def _where(self, row: int) -> str:
        number, place = self.rows.place(row)
        file = self.tokenised["files"][number]
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

    def _write(
        self, path: Path, documents: Any, members: Any, ends: Any, order: Any, good: Any
    ) -> int:
        """Write the bins in `order`, with the ratings `good`; returns the number of trained tokens.

        None: answers are not rated.
        """
        schema = SCHEMA if good is None else SCHEMA.append(pa.field("good", pa.bool_()))
        starts = np.concatenate(([0], ends[:-1]))
        scratch = path.with_name(f".{path.name}.tmp")
        trained = 0
        try:
            with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                for number, begin in enumerate(range(0, len(order), BATCH_BINS)):
                    batch = order[begin : begin + BATCH_BINS]
                    counts = ends[batch] - starts[batch]
                    chosen = members[ramps(starts[batch], counts)]
                    record, labelled = self.rows.gather(documents[chosen], counts)
                    trained += labelled
                    if good is not None:
                        record = record.append_column(
                            "good", pa.array(good[documents[chosen]["row"]])
                        )
                    writer.write_batch(record)
                    if number % RELEASE_BATCHES == 0:
                        self.rows.release()
            files.sync_file(scratch)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
        return trained

    def check_batch(self, train: Any) -> None:
        """Raise DataError if there are fewer training rows than the user's batch."""
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
        """The effects of the over-length policy, for people."""
        counts, limit, lost = self.counts, self.request["max_length"], self._lost_of_split
        answers = [
            f"{counts[key]} of their answers {effect}"
            for key, effect in (("lost_answers", "left out"), ("cut_answers", "cut short"))
            if counts[key]
        ]
        effects = {
            "split": "split into parts, "
            + (f"{lost:,} tokens without an answer left out" if lost else "no token lost"),
            "truncated": f"cut: {', '.join(answers)}"
            if answers
            else "cut so that all answers stay",
            "dropped": "left out",
        }
        notes = [
            f"{counts[key]} rows longer than {limit} tokens {effect}"
            for key, effect in effects.items()
            if counts[key]
        ]
        if self.tokenised.get("objective") == "kto":
            good = int(self.rows.good().sum())
            bad = len(self.rows.lengths) - good
            one = "" if good and bad else ": kto learns from both"
            notes.append(f"{good} answers are rated good, {bad} bad{one}")
        if self._copies:
            what = "rows are copies of others; identical rows are on one side of the split"
            notes.append(f"{self._copies} {what}")
        return notes + [f"{n} rows left out: {why}" for why, n in self.dropped.items() if n]


def assign(sizes: Any, *, size: int, seed: int) -> tuple[Any, Any]:
    """Pack pieces into bins: the pieces in the order of bins, and where each bin ends.

    Pieces of equal length are interchangeable; a seeded shuffle decides among them, so that
    neighbouring documents of the file are not always packed together.
    """
    lengths, counts = np.unique(sizes, return_counts=True)
    patterns = bins.pack(zip(lengths.tolist(), counts.tolist(), strict=True), size=size)
    shuffled = np.random.RandomState(seed).permutation(np.arange(len(sizes), dtype=np.int32))
    by_length = shuffled[np.argsort(sizes[shuffled], kind="stable")]
    ends = np.cumsum(counts)
    nexts = dict(zip(lengths.tolist(), (ends - counts).tolist(), strict=True))
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
