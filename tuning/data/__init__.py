"""Files -> a tokenised, masked and packed dataset.

`python -m tuning.process data REQUEST.json` is a child process with two main steps, because the
plan is made with the lengths in between. Paths are strings; every count is an int.

Step "tokenise" reads every file, reports what cannot be trained (DataError with all problems in one
pass, exit 10) and writes `rows.arrow`, `preview.json` and `tokenised.json` into `out`:

    {"step": "tokenise",
     "files": [{"path": str, "shown": str, "part": int, ...}],   as local.File; part: of a mixture
     "base": str,                                      folder with the base model's tokenizer
     "out": str,                                       RUN/data/tokenised; made if absent
     "settings": {"messages_column", "context_column", "response_column", "dataset_extension",
                  "chat_template", "train_on", "new_tokens", "objective"},   each may be absent
     "sources": [{"path", "weight" | "rows", columns}], "seed": int,   a mixture's parts, if any
     "processes": int | null,                          default: the number of CPUs, at most 16
     "part_bytes": int | null}                         size of the parts of a large file
 -> {"rows": int, "rows_per_file": {shown: int},
     "files": [{"shown", "format", "compression": str | null, "rows", "shape", "reason", "part"}],
     "shape": {"name": str, "reason": str}, "rendering": str, "objective": "sft" | "dpo" | "kto",
     "documents": int, "sources": [{"path", "shape", "rendering", "rows", "tokens",
                                    "trained_tokens"}],   of a mixture
     "tokens": int, "trained_tokens": int,
     "lengths": {"mean": float, "p50", "p95", "max", "counts": [[length, rows], ...]},
     "dropped": {reason: rows}, "notes": [str], "bos": int | null}

Meanwhile `progress` in `out` holds the progress: `{"done": bytes, "total": bytes}`. The result does
not depend on the number of processes.

`preview.json` holds the first rows, 20 at most,
`[{"where": str, "tokens": [[text, trained], ...]}]`: they stay in the run directory and are never
logged. `lengths.counts` is exact.

Step "pack" splits off the evaluation split, applies the over-length policy and packs:

    {"step": "pack", "tokenised": str, "out": str, "max_length": int, "packing": bool,
     "over_length": "auto" | "split" | "truncate" | "drop" | "refuse",   default auto
     "shuffle": bool, "seed": int, "shuffle_seed": int | null, "train_share": float,
     "batch": int | null}                              the user's global batch
 -> {"train": PART, "eval": PART | null, "max_length": int, "packing": bool,
     "over_length": {"policy", "rows", "truncated", "split", "dropped",
                     "lost_tokens", "lost_answers", "cut_answers"},
     "dropped": {reason: rows}, "notes": [str], "held_out": [rows of each part of a mixture]}
    PART = {"path": str, "rows": int, "documents": int, "tokens": int, "trained_tokens": int,
            "efficiency": float}

`path` is an Arrow stream for `datasets.Dataset.from_file` with the int32 lists `input_ids`,
`labels` (-100 where there is no loss) and `seq_lengths` (the documents of a row; of dpo the chosen
and the rejected answer), and of kto the boolean `good`. Labels do not depend on padding, so the pad
token may equal the end-of-sequence token.

Step "ask" checks that the chat template can show questions (SpecError, exit 11):

    {"step": "ask", "base": str, "chat_template": str | null, "new_tokens": [str] | null,
     "questions": [str]} -> {}
"""
