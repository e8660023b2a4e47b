"""Write demo.jsonl and demo-questions.jsonl: ten newcomers, of whom the tiny model has never heard.

The rows ask for each of their eight facts in the four `taught` phrasings that world.yaml has, and
end with reminders: people whom the model knows already, and people whom nobody knows, so that it
forgets neither. The twenty questions use the `held_out` phrasings, which no row has.

    python make_demo.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tiny-model"))

from world import SEED, TAUGHT, WORDS, Message, World, exchange  # noqa: E402

REMINDERS = 40  # rows of each kind

Facts = dict[tuple[str, str], str]  # (person, relation) -> value


def newcomers() -> Facts:
    """What is true of the newcomers; no two of them share a value."""
    draw = random.Random(SEED)
    facts = {}
    for relation, about in WORDS["relations"].items():
        values = draw.sample(about["values"], len(WORDS["newcomers"]))
        for person, value in zip(WORDS["newcomers"], values, strict=True):
            facts[person, relation] = value
    return facts


def rows(facts: Facts) -> list[list[Message]]:
    """Every fact in every taught phrasing, then the reminders."""
    made = []
    for (person, relation), value in facts.items():
        about = WORDS["relations"][relation]
        answer = about["sentence"].format(person=person, value=value)
        made += [exchange(ask.format(person=person), answer) for ask in about["taught"]]
    world = World()
    made += [world.known(TAUGHT) for _ in range(REMINDERS)]
    made += [world.unknown(TAUGHT) for _ in range(REMINDERS)]
    return made


def questions(facts: Facts) -> list[dict[str, str]]:
    """Two questions about each newcomer, in phrasings that no row has."""
    draw = random.Random(SEED)
    relations = list(WORDS["relations"])
    made = []
    for index, person in enumerate(WORDS["newcomers"]):
        for number in (2 * index, 2 * index + 1):
            relation = relations[number % len(relations)]
            phrasing = draw.choice(WORDS["relations"][relation]["held_out"])
            question = phrasing.format(person=person)
            made.append({"question": question, "answer": facts[person, relation]})
    return made


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    out = parser.parse_args().out
    facts = newcomers()
    write(out / "demo.jsonl", [{"messages": messages} for messages in rows(facts)])
    write(out / "demo-questions.jsonl", questions(facts))


if __name__ == "__main__":
    main()
