"""From a row to the searches that lead to its answer, without a model: out of what the set itself ships.

| set | sub-query of a hop | evidence |
|---|---|---|
| 2WikiMultiHopQA | `relation of subject` of an evidence triple | the supporting sentence about the subject |
| HotpotQA | the title of a supporting page, as soon as its name is known; before that the question | its sentences |
| MuSiQue | a step of `question_decomposition`, earlier answers filled in | its paragraph's closest sentence |
| StrategyQA | a step of `decomposition`, earlier questions filled in as phrases | its paragraph's closest sentence |
| embedded world | `relation of subject` along the chain that the question spells out | the fact |

A sub-query may name only what the question or an earlier fact has named: who searches cannot know more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from data_preprocess.evidence.facts import Fact, facts_of, row_triples, steps_of
from data_preprocess.evidence.rouge import words
from data_preprocess.readers import multihop, musique, strategyqa
from data_preprocess.readers.source import Item
from data_preprocess.world.language import RELATIONS, sentence
from verl.rewards.recall import title_key
from verl.types import Document, Question

NO_FACTS = "no supporting facts"
NO_SENTENCE = "no supporting sentence about a step's subject"
NO_STEPS = "no decomposition"
UNREACHABLE = "a step names what nothing before it names"

_WORLD = re.compile(r"Who is ((?:the \w+ of )+)(\w+)\?")
_RELATION = re.compile(r"the (\w+) of ")
_IN_PASSAGES = {asked: written for written, asked in RELATIONS.items()}
_SUFFIX = re.compile(r"\s*\([^()]*\)$")


@dataclass(frozen=True, slots=True)
class Hop:
    """One search.

    Attributes:
        queries: ways to ask, tried in order until one finds the evidence.
        facts: what has to be found and is then recorded.
    """

    queries: tuple[str, ...]
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The searches for a question, or why there are none (`reason`)."""

    hops: tuple[Hop, ...] = ()
    reason: str = ""


def decompose(item: Item, passages: Mapping[str, Document]) -> Plan:
    """Plan the searches for a row's question, by its format.

    Args:
        passages: as in `facts_of`.
    """
    question = item.question
    assert question is not None  # the caller reads questions
    maker = _MAKERS.get(item.format)
    if maker is None:
        return world_plan(question)
    facts = facts_of(item, passages)
    return maker(item, question, facts, passages) if facts else Plan(reason=NO_FACTS)


def world_plan(question: Question) -> Plan:
    """Plan for a question of the embedded world, whose gold titles are the subjects of its chain."""
    match = _WORLD.fullmatch(question.text.strip())
    if match is None:
        return Plan(reason=NO_STEPS if question.gold_titles else NO_FACTS)
    relations = [_IN_PASSAGES.get(word, word) for word in reversed(_RELATION.findall(match[1]))]
    subjects = question.gold_titles
    if len(subjects) != len(relations) or subjects[0] != match[2]:
        return Plan(reason=NO_FACTS)
    values = (*subjects[1:], question.answers[0])
    hops = zip(relations, subjects, values, strict=True)
    return Plan(tuple(Hop((f"{r} of {s}",), (Fact(s, sentence(r, s, value)),)) for r, s, value in hops))


def _two_wiki(item: Item, question: Question, facts: Sequence[Fact], passages: Mapping[str, Document]) -> Plan:
    known = _Known(question.text)
    hops = []
    for subject, relation, value in row_triples(item.row):
        about = [fact for fact in facts if title_key(fact.title) in (title_key(subject), title_key(_name(subject)))]
        about = about or [fact for fact in facts if title_key(_name(fact.title)) == title_key(_name(subject))]
        if not about:
            return Plan(reason=NO_SENTENCE)
        if not known.names(subject):
            return Plan(reason=UNREACHABLE)
        fact = max(about, key=lambda fact: len(set(words(value)) & set(words(fact.sentence))))
        hops.append(Hop((f"{relation} of {_name(subject)}", f"{relation} of {subject}", _name(subject)), (fact,)))
        known.add(fact.sentence, value)
    return Plan(tuple(hops)) if hops else Plan(reason=NO_STEPS)


def _hotpotqa(item: Item, question: Question, facts: Sequence[Fact], passages: Mapping[str, Document]) -> Plan:
    known = _Known(question.text)
    pages: dict[str, list[Fact]] = {}
    for fact in facts:
        pages.setdefault(fact.title, []).append(fact)
    hops: list[Hop] = []
    while pages:
        named = next((title for title in pages if known.names(title)), None)
        if named is None and hops:
            return Plan(reason=UNREACHABLE)
        title = named or _opening(pages)
        queries = (_name(title), title, question.text) if named else (question.text,)
        hops.append(Hop(tuple(dict.fromkeys(queries)), tuple(pages[title])))
        known.add(*(fact.sentence for fact in pages.pop(title)))
    return Plan(tuple(hops))


def _opening(pages: Mapping[str, Sequence[Fact]]) -> str:
    """Return the page to begin with where the question names none: the first whose facts name another one."""
    for title, facts in pages.items():
        said = _Known(*(fact.sentence for fact in facts))
        if any(said.names(other) for other in pages if other != title):
            return title
    return next(iter(pages))


def _stepwise(item: Item, question: Question, facts: Sequence[Fact], passages: Mapping[str, Document]) -> Plan:
    return Plan(tuple(Hop((step.question,), (step.fact,)) for step in steps_of(item, passages)))


class _Known:
    """What has been said so far, as words."""

    def __init__(self, *texts: str) -> None:
        self._said = " "
        self.add(*texts)

    def add(self, *texts: str) -> None:
        self._said += "".join(f"{' '.join(words(text))} " for text in texts)

    def names(self, title: str) -> bool:
        """Whether a page's name, with or without what follows in parentheses, has been said."""
        names = (" ".join(words(name)) for name in (title, _name(title)))
        return any(name and f" {name} " in self._said for name in names)


def _name(title: str) -> str:
    """Return a page's title without what tells it from others of its name."""
    return _SUFFIX.sub("", title) or title


_Maker = Callable[[Item, Question, Sequence[Fact], Mapping[str, Document]], Plan]
_MAKERS: dict[str, _Maker] = {
    multihop.TWO_WIKI.name: _two_wiki,
    multihop.HOTPOTQA.name: _hotpotqa,
    musique.FORMAT.name: _stepwise,
    strategyqa.FORMAT.name: _stepwise,
}
