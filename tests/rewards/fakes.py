"""Fakes and builders for rewards and evaluation: nothing is patched, everything is passed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl.errors import GeneratorError
from verl.types import Baseline, Document, Question, Stop, Trajectory


@dataclass(frozen=True)
class FakeAnswered:
    answer: str
    documents_used: int


class FakeGenerator:
    """Answers with a fixed text, or from `by_question`; a text of "!" raises. Records the documents it saw."""

    def __init__(self, text: str = "Paris", by_question: dict[str, str] | None = None, fits: int = 99) -> None:
        self.text = text
        self.by_question = by_question or {}
        self.fits = fits
        self.seen: list[tuple[str, tuple[Document, ...]]] = []

    async def __call__(self, question: Question, documents: Sequence[Document]) -> FakeAnswered:
        self.seen.append((question.id, tuple(documents)))
        text = self.by_question.get(question.id, self.text)
        if text == "!":
            raise GeneratorError("generator at http://here is down")
        return FakeAnswered(text, min(len(documents), self.fits))


class FakeJudge:
    """Gives one verdict, or raises; counts how often it was asked."""

    def __init__(self, verdict: bool | Exception | None) -> None:
        self.verdict = verdict
        self.asked = 0

    async def __call__(self, question: Question, answer: str) -> bool | None:
        self.asked += 1
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict


@dataclass(frozen=True)
class FakeSample:
    text: str
    logprobs: tuple[float, ...] = (-1.0,)


class FakeLikelihood:
    """Log-probabilities by (answer, titles of the documents); records what it was asked."""

    def __init__(self, known: dict[tuple[str, tuple[str, ...]], tuple[float, ...]]) -> None:
        self.known = known
        self.asked: list[tuple[str, str, tuple[str, ...]]] = []

    async def __call__(self, question: Question, documents: Sequence[Document], answer: str) -> tuple[float, ...]:
        titles = tuple(document.title for document in documents)
        self.asked.append((question.id, answer, titles))
        if (answer, titles) not in self.known:
            raise GeneratorError("generator at http://here is down")
        return self.known[answer, titles]


class FakeSampler:
    """Samples by number of documents; records (question, documents, n) of every call."""

    def __init__(self, by_count: dict[int, tuple[FakeSample, ...]]) -> None:
        self.by_count = by_count
        self.asked: list[tuple[str, int, int]] = []

    async def __call__(self, question: Question, documents: Sequence[Document], n: int) -> tuple[FakeSample, ...]:
        self.asked.append((question.id, len(documents), n))
        if len(documents) not in self.by_count:
            raise GeneratorError("generator at http://here is down")
        return self.by_count[len(documents)]


class FakeEntailment:
    """Entailment by pair of texts as they are asked; what is not listed is 0."""

    def __init__(self, known: dict[tuple[str, str], float]) -> None:
        self.known = known
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, pairs: Sequence[tuple[str, str]]) -> tuple[float, ...]:
        self.asked += pairs
        return tuple(self.known.get(pair, 0.0) for pair in pairs)


def documents(*titles: str) -> tuple[Document, ...]:
    return tuple(Document(title, title, f"Text of {title}.") for title in titles)


def question(
    id: str = "q/1",
    correct: bool | None = False,
    baseline_documents: int = 3,
    golds: tuple[str, ...] = ("Paris",),
    gold_titles: tuple[str, ...] = ("France", "Louvre"),
    source: str = "toy",
    kind: str = "",
) -> Question:
    seen = documents(*(f"B{i}" for i in range(baseline_documents)))
    baseline = None if correct is None else Baseline(seen, "?", correct)
    return Question(id, "Where?", golds, source, gold_titles=gold_titles, baseline=baseline, kind=kind)


def trajectory(
    asked: Question, found: Sequence[Document] = (), stop: Stop = Stop.FINISHED, error: str = ""
) -> Trajectory:
    return Trajectory(asked, (1, 2), (), stop, tuple(found), error)
