"""Services for tests, passed as arguments: a retriever over a few documents, and a generator that quotes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from verl.errors import GeneratorError, RetrieverError
from verl.types import Document, Question, SearchResult

DOCUMENTS = (
    Document("1", "Ann", "The mentor of Ann is Bob."),
    Document("2", "Bob", "The rival of Bob is Cid."),
    Document("3", "Cid", "The ally of Cid is Dee."),
    Document("4", "Dee", "The heir of Dee is Ann."),
)


def question(number: int, text: str, *answers: str, gold: Sequence[str] = (), source: str = "toy") -> Question:
    return Question(f"{source}/test/{number}", text, answers, source, gold_titles=tuple(gold))


QUESTIONS = [
    question(0, "Who is the mentor of Ann?", "Bob", gold=["Ann"]),
    question(1, "Who is the rival of the mentor of Ann?", "Cid", gold=["Ann", "Bob"]),
    question(2, "Is Dee the ally of Cid?", "yes", gold=["Cid"]),
]


@dataclass
class Retriever:
    """Ranks documents whose title is a word of the query first, the others behind, in order.

    `broken` holds queries that it cannot answer.
    """

    broken: set[str] = field(default_factory=set)
    queries: list[str] = field(default_factory=list)

    async def __call__(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        self.queries += queries
        if self.broken & set(queries):
            raise RetrieverError("gave no answer")
        return [self._search(query, topk) for query in queries]

    def _search(self, query: str, topk: int) -> SearchResult:
        words = query.replace("?", "").split()
        ranked = sorted(DOCUMENTS, key=lambda document: document.title not in words)[:topk]
        return SearchResult(query, tuple(ranked), tuple(float(-rank) for rank in range(len(ranked))))


@dataclass(frozen=True)
class Reply:
    answer: str
    documents_used: int


@dataclass
class Generator:
    """Answers with the last word of the first document; `broken` holds ids of questions that it cannot answer."""

    broken: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    async def __call__(self, question: Question, documents: Sequence[Document]) -> Reply:
        self.asked.append(question.id)
        if question.id in self.broken:
            raise GeneratorError("gave no answer")
        answer = documents[0].text.split()[-1].strip(".") if documents else ""
        return Reply(answer, len(documents))
