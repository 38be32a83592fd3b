"""The supporting facts of a row: sentences that together give the answer, each with the title of its page.

HotpotQA and 2WikiMultiHopQA name sentences. MuSiQue and StrategyQA name paragraphs; of each, the sentence that
shares most words with the step that it supports (and with that step's answer, where it is known) stands for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_preprocess.evidence.rouge import rouge_l, words
from data_preprocess.readers import multihop, musique
from data_preprocess.readers.base import Row, optional_text
from data_preprocess.readers.source import Item
from verl.types import Document

# After a full stop, question or exclamation mark that a capital, a digit or a quotation mark follows.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"“'(]?[A-Z0-9])")
_NO_PARAGRAPH = frozenset({"operation", "no_evidence"})
_REFERENCE = re.compile(r"#(\d+)")
_ARROW = re.compile(r"^(.+?)\s*>>\s*(.+)$")


@dataclass(frozen=True, slots=True)
class Fact:
    """One sentence of the page `title`."""

    title: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a decomposition that ships with a row: what it asks, and the fact that answers it."""

    question: str
    fact: Fact


def facts_of(item: Item, passages: Mapping[str, Document]) -> tuple[Fact, ...]:
    """Return a row's supporting facts in its order, equal ones once; empty where it has none.

    Args:
        passages: the set's own file of passages by id, for sets that ship them apart.
    """
    if item.format in (multihop.HOTPOTQA.name, multihop.TWO_WIKI.name):
        found = [Fact(title, sentence) for title, sentence in multihop.supporting_sentences(item.row)]
    else:
        found = [step.fact for step in steps_of(item, passages)]
    return tuple(dict.fromkeys(found))


def steps_of(item: Item, passages: Mapping[str, Document]) -> tuple[Step, ...]:
    """Return the decomposition that a row of MuSiQue or StrategyQA ships, those steps of it that need a paragraph."""
    if item.format == musique.FORMAT.name:
        return _musique_steps(item)
    return _strategyqa_steps(item, passages) if item.format == "strategyqa" else ()


def best_sentence(document: Document, asked: str) -> str:
    """Return the sentence of a passage that has most words of `asked` in common; the first of equals."""
    sentences = [text for text in _SENTENCE_END.split(" ".join(document.text.split())) if text]
    wanted = set(words(asked))
    return max(sentences, key=lambda text: (len(wanted & set(words(text))), rouge_l(asked, text).f), default="")


def _musique_steps(item: Item) -> tuple[Step, ...]:
    documents = {document.id: document for document in item.documents}
    rows = musique.steps(item.row)
    answers = [optional_text(row, "answer") for row in rows]
    steps = []
    for row in rows:
        document = documents.get(optional_text(row, "paragraph_support_idx"))
        asked = _filled(optional_text(row, "question"), answers)
        if document is not None and asked:
            sentence = best_sentence(document, f"{asked} {optional_text(row, 'answer')}")
            steps.append(Step(_as_query(asked), Fact(document.title, sentence)))
    return tuple(steps)


def _strategyqa_steps(item: Item, passages: Mapping[str, Document]) -> tuple[Step, ...]:
    """Take the first annotation that names paragraphs; a step that needs none (`operation`) is left out."""
    asked = [text for text in _list(item.row.get("decomposition")) if isinstance(text, str)]
    for annotation in map(_list, _list(item.row.get("evidence"))):
        steps: list[Step] = []
        for text, named in zip(asked, annotation, strict=False):
            found = next((passages[name] for name in _names(named) if name in passages), None)
            if found is not None:
                query = _filled(text, [_phrase(earlier) for earlier in asked])
                steps.append(Step(query, Fact(found.title, best_sentence(found, query))))
        if steps:
            return tuple(steps)
    return ()


def _filled(text: str, answers: Sequence[str]) -> str:
    """Put answers in place of `#1` and so on; a reference within an answer is filled from the steps before it."""
    for number in range(len(answers), 0, -1):
        text = _REFERENCE.sub(lambda m, at=number: answers[at - 1] if int(m[1]) == at else m[0], text)
    return text.strip()


def _as_query(text: str) -> str:
    """Turn MuSiQue's `subject >> relation` into words."""
    match = _ARROW.match(text)
    return f"{match[2]} of {match[1]}" if match else text


def _phrase(question: str) -> str:
    """Name what a question asks for: itself without its question word, since its answer is not in the set."""
    bare = question.strip().rstrip("?").strip()
    return re.sub(r"^(what|who|which|where|when)\s+(is|are|was|were|did|does|do)?\s*", "", bare, flags=re.IGNORECASE)


def _names(value: object) -> Sequence[str]:
    if isinstance(value, str):
        return () if value in _NO_PARAGRAPH else (value,)
    return [name for entry in _list(value) for name in _names(entry)]


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def row_triples(row: Row) -> list[tuple[str, str, str]]:
    """Return 2WikiMultiHopQA's evidences as (subject, relation, object), also when stored by columns."""
    value = row.get("evidences")
    if isinstance(value, Mapping):
        columns = [value.get(name) or () for name in ("fact", "relation", "entity")]
        value = list(zip(*columns, strict=False))
    triples = [tuple(entry) for entry in map(_list, _list(value)) if len(entry) == 3]
    return [triple for triple in triples if all(isinstance(part, str) and part.strip() for part in triple)]
