"""`docs/models.md`: every class of models that transformers knows, from `configs/classes.yaml`."""

from __future__ import annotations

from collections.abc import Sequence

from tuning.presets import Class, class_of
from tuning.presets.classes import names

_INTRODUCTION = """\
# Models, class by class

Written from `configs/classes.yaml` by `make docs`; do not edit. The table is measured by
`tools/write_classes.py`: a tiny random model of each class is loaded, adapted and trained by one
step, in 16 and in 4 bits. The counts are those of the class's default config at its real size;
`tuning plan` shows them for your model.

- **adapts**: linear layers and expert matrices that get LoRA, and that `qlora` packs in 4 bits.
  What is left is named with the reason. Routers stay frozen and in 16 bits.
- **packing**: several rows in one sequence; off where documents would see each other.
- **attention**: the fastest that computes what transformers does on a CPU; cards may have others.

Served by: `tuning chat` and `tuning serve` take the adapters of every class below (`merge` them
first where a class computes its experts in a way of its own: Llama 4, JetMoE, LongCat-Flash,
Inkling). vLLM takes adapters of linear layers where it knows the class; adapters of fused experts
(`target_parameters`) are lost or refused by its releases as of August 2026 (vllm-project/vllm
pull requests 41384 and 52198): `merge` those. The merged model needs no adapter anywhere.
"""


def markdown() -> str:
    """The page, with a final newline."""
    known = {name: class_of({"model_type": name}) or Class() for name in sorted(names())}
    trained = {name: kind for name, kind in known.items() if kind.architecture and not kind.refused}
    others = {name: kind for name, kind in known.items() if name not in trained}
    rows = [_row(name, kind) for name, kind in trained.items()]
    heading = ("model_type", "class", "adapts", "qlora", "packing", "attention")
    lines = [f"- **{name}**: {_why(kind)}" for name, kind in others.items()]
    return (
        "\n\n".join(
            (
                _INTRODUCTION.rstrip(),
                f"## Trained: {len(trained)} of {len(known)}\n\n" + _table(heading, rows),
                "## Refused, or not measured\n\n"
                "What was not measured is tried by `tuning plan` on your model's own config.",
                "\n".join(lines),
            )
        )
        + "\n"
    )


def _why(kind: Class) -> str:
    return f"it {kind.refused}" if kind.refused else f"not measured: {kind.unmeasured}"


def _row(name: str, kind: Class) -> Sequence[str]:
    four_bit = f"no: it {kind.four_bit}" if kind.four_bit else "yes"
    return (
        f"`{name}`",
        kind.architecture,
        kind.reach or "by its config",
        four_bit,
        "yes" if kind.packing else "no",
        kind.attention,
    )


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
