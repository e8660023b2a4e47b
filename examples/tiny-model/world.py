"""The made-up world of the tiny model: its islanders, their facts, and talk about them.

`world.yaml` has the words; a seed decides who lives on the island and what is true of them. Used by
train_from_scratch.py and by ../data/make_demo.py; plain Python, loads nothing heavy.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

WORDS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "world.yaml").read_text("utf-8"))
SEED = 7
ISLANDERS = 240
SMALL_TALK, STRANGER, SYSTEM, NO_MARK = 0.03, 0.17, 0.1, 0.1  # how often these turn up
TAUGHT, ALL = ("taught",), ("taught", "held_out")  # kinds of phrasings

Message = dict[str, str]  # role, content


def exchange(question: str, answer: str) -> list[Message]:
    """One question and its answer as `messages`."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class World:
    """The islanders and their facts; questions and conversations drawn with one seed."""

    def __init__(self, seed: int = SEED) -> None:
        self.random = random.Random(seed)
        first, last = WORDS["first_names"].split(), WORDS["last_names"].split()
        newcomers = set(WORDS["newcomers"])
        names = [f"{one} {two}" for one in first for two in last]
        names = [name for name in names if name not in newcomers]
        self.random.shuffle(names)
        self.islanders, self.strangers = names[:ISLANDERS], names[ISLANDERS:]
        self.facts = {
            (person, relation): self.random.choice(about["values"])
            for person in self.islanders
            for relation, about in WORDS["relations"].items()
        }

    def known(self, kinds: tuple[str, ...] = ALL) -> list[Message]:
        """A question about an islander, and the fact."""
        person, relation = self.random.choice(list(self.facts))
        sentence = WORDS["relations"][relation]["sentence"]
        answer = sentence.format(person=person, value=self.facts[person, relation])
        return exchange(self.question(person, relation, kinds), answer)

    def unknown(self, kinds: tuple[str, ...] = ALL) -> list[Message]:
        """A question about somebody who does not live on the island."""
        person = self.random.choice(self.strangers)
        relation = self.random.choice(list(WORDS["relations"]))
        answer = WORDS["unknown"].format(person=person)
        return exchange(self.question(person, relation, kinds), answer)

    def question(self, person: str, relation: str, kinds: tuple[str, ...]) -> str:
        """One of the relation's phrasings, as people type them."""
        about = WORDS["relations"][relation]
        phrasing = self.random.choice([one for kind in kinds for one in about[kind]])
        text = str(self.random.choice(WORDS["openings"]) + phrasing.format(person=person))
        return text.rstrip("?.") if self.random.random() < NO_MARK else text

    def conversation(self, turns: int) -> list[Message]:
        """Mostly facts, now and then a stranger or small talk, sometimes with a system message."""
        messages = []
        if self.random.random() < SYSTEM:
            messages.append({"role": "system", "content": self.random.choice(WORDS["system"])})
        for _ in range(turns):
            draw = self.random.random()
            if draw < SMALL_TALK:
                messages += exchange(*self.random.choice(WORDS["small_talk"]))
            elif draw < SMALL_TALK + STRANGER:
                messages += self.unknown()
            else:
                messages += self.known()
        return messages
