"""The embedded world: who is whose mentor, in plain regular English.

Every entity has one name, every name is one token of the tiny tokenizer, and every world draws its facts afresh, so
that nothing can be memorised: what a model can learn is to read, to search and to copy.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from verl.errors import ConfigError
from verl.types import Document, Question

# Passage wording -> wording that only questions use (a question in other words than the passage).
RELATIONS: dict[str, str] = {
    "mentor": "teacher",
    "rival": "enemy",
    "ally": "friend",
    "heir": "successor",
    "patron": "sponsor",
    "herald": "messenger",
    "guard": "protector",
    "tutor": "coach",
}
FACTS_PER_ENTITY = 3
NAME_COUNT = 400
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "t", "v", "z", "dr", "kr", "st", "th", "br")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("n", "k", "r", "m", "x", "b", "g", "v", "p", "th")


def names(count: int = NAME_COUNT) -> tuple[str, ...]:
    """Return the first `count` of the fixed, shuffled list of two-syllable names (distinct, no English suffixes)."""
    syllables = [onset + vowel for onset in _ONSETS for vowel in _VOWELS]
    closed = [onset + vowel + coda for onset in _ONSETS[:13] for vowel in "aou" for coda in _CODAS]
    rng = random.Random("names")
    rng.shuffle(syllables)
    rng.shuffle(closed)
    pool = [(first + second).capitalize() for first in syllables[:24] for second in closed[:24]]
    rng.shuffle(pool)
    if count > len(pool):
        raise ValueError(f"count={count} exceeds the {len(pool)} names there are")
    return tuple(pool[:count])


def sentence(relation: str, subject: str, value: str) -> str:
    """State one fact."""
    return f"The {relation} of {subject} is {value}."


def question_text(subject: str, relations: Sequence[str]) -> str:
    """Ask for the end of the chain `subject -relations[0]-> … -relations[-1]-> ?`."""
    chain = f"the {relations[0]} of {subject}"
    for relation in relations[1:]:
        chain = f"the {relation} of {chain}"
    return f"Who is {chain}?"


@dataclass(frozen=True)
class World:
    """A closed set of facts.

    Attributes:
        facts: `facts[subject][relation]` is the object's name.
    """

    facts: dict[str, dict[str, str]]

    @classmethod
    def generate(cls, seed: int, entities: Sequence[str], facts_per_entity: int = FACTS_PER_ENTITY) -> World:
        """Draw `facts_per_entity` random facts about each entity; objects are other entities of the same world."""
        if len(entities) < 2:
            raise ValueError(f"a world needs at least 2 entities, got {len(entities)}")
        rng = random.Random(seed)
        facts: dict[str, dict[str, str]] = {}
        for subject in entities:
            others = [name for name in entities if name != subject]
            relations = rng.sample(list(RELATIONS), facts_per_entity)
            facts[subject] = dict(zip(relations, rng.sample(others, min(facts_per_entity, len(others))), strict=False))
        return cls(facts)

    def passage(self, subject: str) -> Document:
        """Return the one passage about `subject`; its id is the lower-case name."""
        text = " ".join(sentence(relation, subject, value) for relation, value in self.facts[subject].items())
        return Document(id=subject.lower(), title=subject, text=text)

    def passages(self) -> list[Document]:
        """Return all passages, in the order of the entities."""
        return [self.passage(subject) for subject in self.facts]

    def questions(self, source: str, split: str, count: int, seed: int, two_hop: float = 0.6) -> list[Question]:
        """Draw `count` distinct questions, the share `two_hop` of them 2-hop, shuffled.

        A 2-hop question names the subject only; the bridge entity must be found. Chains that return to the subject
        are left out.

        Raises:
            ConfigError: the world holds fewer questions.
        """
        one, two = self._chains()
        rng = random.Random(seed)
        rng.shuffle(one)
        rng.shuffle(two)
        wanted_two = round(count * two_hop)
        if wanted_two > len(two) or count - wanted_two > len(one):
            raise ConfigError(
                f"asked for {count - wanted_two} 1-hop and {wanted_two} 2-hop {split} questions; this world holds "
                f"{len(one)} and {len(two)}; ask for fewer, or change the share of 2-hop ones (two_hop={two_hop})"
            )
        chosen = two[:wanted_two] + one[: count - wanted_two]
        rng.shuffle(chosen)
        return [
            Question(
                id=f"{source}/{split}/{index}",
                text=question_text(subjects[0], relations),
                answers=(answer,),
                source=source,
                gold_titles=subjects,
                kind=f"{len(relations)}-hop",
            )
            for index, (subjects, relations, answer) in enumerate(chosen)
        ]

    def _chains(self) -> tuple[list[_Chain], list[_Chain]]:
        one: list[_Chain] = []
        two: list[_Chain] = []
        for subject, about in self.facts.items():
            for first, bridge in about.items():
                one.append(((subject,), (first,), bridge))
                for second, answer in self.facts[bridge].items():
                    if answer != subject:
                        two.append(((subject, bridge), (first, second), answer))
        return one, two


_Chain = tuple[tuple[str, ...], tuple[str, ...], str]
