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
