"""The contexts that a method's own ones are compared with, by question: cut, random, gold, and none.

A figure of a method means little without them. Is its gain over naive RAG more than showing more documents? Does the
generator read the documents at all, or answer from memory? How far is it from the best that the corpus allows?
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from verl.errors import DataError
from verl.rewards.recall import title_key
from verl.types import Document, Question

ConditionName = Literal["method", "baseline", "method_cut", "baseline_cut", "random", "gold", "none"]
Documents = tuple[Document, ...]

MEANINGS: dict[ConditionName, str] = {
    "method": "the method's documents, as collected",
    "baseline": "the documents of naive RAG",
    "method_cut": "the method's first documents, as many as the baseline had",
    "baseline_cut": "the first documents that naive RAG ranked, as many as the method had",
    "random": "as many documents as the method had, drawn from what was found for other questions or from the corpus",
    "gold": "the gold passages and nothing else, for questions whose gold passages are all known",
    "none": "no document",
}
"""What the generator gets in each condition."""


class Pool(Protocol):
    """Documents to draw from, for example a list or a `verl.retrieval.corpus.Corpus`."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Document: ...


@dataclass(frozen=True, slots=True)
class Condition:
    """Documents for each question.

    Attributes:
        documents: by question id; questions that the condition says nothing about are left out.
        short: questions that got fewer documents than the condition wants, because there are no more.
    """

    name: ConditionName
    documents: Mapping[str, Documents]
    short: int = 0


@dataclass(frozen=True, slots=True)
class Sources:
    """Where documents come from.

    Attributes:
        method: the method's documents by question id.
        ranked: what naive RAG ranked, by question id, best first.
        baseline_documents: the baseline answers from the first so many of `ranked`; None from all.
        pool: where random documents are drawn from.
        gold: known gold passages by title key.
        seed: of the draw; each question has a generator of its own, so the draw does not depend on the others.
    """

    method: Mapping[str, Documents]
    ranked: Mapping[str, Documents]
    baseline_documents: int | None
    pool: Pool
    gold: Mapping[str, Documents]
    seed: int

    def baseline(self, question: Question) -> Documents:
        """Return what the baseline answers from.

        Raises:
            DataError: nothing is known of it.
        """
        if question.id not in self.ranked:
            raise DataError(
                f"the baseline has no documents for question {question.id!r}; collect naive RAG for the same questions "
                "and name its folder in baseline, or leave out the conditions that need it"
            )
        return self.ranked[question.id][: self.baseline_documents]


def build_condition(name: ConditionName, questions: Sequence[Question], sources: Sources) -> Condition:
    """Return the documents that the generator gets in one condition.

    Raises:
        DataError: the baseline of a question is wanted and not known.
    """
    if name == "method":
        return Condition(name, {question.id: sources.method[question.id] for question in questions})
    if name == "baseline":
        return Condition(name, {question.id: sources.baseline(question) for question in questions})
    if name == "none":
        return Condition(name, {question.id: () for question in questions})
    if name == "gold":
        found = ((question.id, gold_documents(question, sources.gold)) for question in questions)
        return Condition(name, {id: documents for id, documents in found if documents})
    counts = {question.id: len(sources.method[question.id]) for question in questions}
    if name == "method_cut":
        counts = {question.id: len(sources.baseline(question)) for question in questions}
        documents = {question.id: sources.method[question.id][: counts[question.id]] for question in questions}
    elif name == "baseline_cut":
        for question in questions:
            sources.baseline(question)
        documents = {question.id: sources.ranked[question.id][: counts[question.id]] for question in questions}
    else:
        documents = {question.id: random_documents(question, counts[question.id], sources) for question in questions}
    return Condition(name, documents, sum(len(documents[id]) < counts[id] for id in counts))


def random_documents(question: Question, count: int, sources: Sources) -> Documents:
    """Draw distinct documents that have nothing to do with the question, as far as is known.

    Left out are those of its own contexts and those with one of its gold titles. Fewer than `count` come back only if
    the pool holds no more.
    """
    own = {_key(document) for ids in (sources.method, sources.ranked) for document in ids.get(question.id, ())}
    gold = {title_key(title) for title in question.gold_titles}
    rng = random.Random(f"{sources.seed}:{question.id}")
    size = len(sources.pool)
    # A sample of a few rows does nearly always; the whole pool may be millions.
    for rows in (min(size, 4 * count + 64), size):
        drawn: dict[tuple[str, str], Document] = {}
        for row in rng.sample(range(size), rows):
            document = sources.pool[row]
            if len(drawn) < count and _key(document) not in own and title_key(document.title) not in gold:
                drawn.setdefault(_key(document), document)
        if len(drawn) == count:
            break
    return tuple(drawn.values())


def gold_documents(question: Question, known: Mapping[str, Documents]) -> Documents:
    """Return the gold passages in hop order; nothing if the question names none or one of them is not known."""
    titles = list(dict.fromkeys(title_key(title) for title in question.gold_titles))
    if any(title not in known for title in titles):
        return ()
    return tuple(document for title in titles for document in known[title])


def distinct_documents(contexts: Iterable[Documents]) -> list[Document]:
    """Return each document once, by title and text, in an order that does not depend on that of the contexts."""
    found = {_key(document): document for documents in contexts for document in documents}
    return [found[key] for key in sorted(found)]


def _key(document: Document) -> tuple[str, str]:
    return document.title, document.text
