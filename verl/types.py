"""Frozen values that travel through the system; text that was structure is never parsed again.

Nothing of ours is imported here. Every sequence field is a tuple, so a value can be shared between coroutines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True)
class Document:
    """One retrievable passage. `title` may be empty; `text` never contains the title line."""

    id: str
    title: str
    text: str

    @classmethod
    def from_contents(cls, id: str, contents: str) -> Document:
        """Split the published `contents` field: first line is the title (quotes kept off), the rest is the text."""
        title, _, text = contents.partition("\n")
        title = title.strip()
        if len(title) >= 2 and title[0] == title[-1] == '"':
            title = title[1:-1]
        return cls(id=str(id), title=title, text=text.strip())

    @property
    def contents(self) -> str:
        """The published one-string form: quoted title, newline, text."""
        return f'"{self.title}"\n{self.text}'


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What the retriever returned for one query, best first; `scores[i]` belongs to `documents[i]`."""

    query: str
    documents: tuple[Document, ...]
    scores: tuple[float, ...]


SqlValue = None | int | float | str | bytes


@dataclass(frozen=True, slots=True)
class SqlResult:
    """What a database returned for one statement.

    Attributes:
        rows: in the order in which they came.
        columns: how many there are, also where there is no row.
        size: bytes that it took to send; 0 where nobody counted.
        error: empty, or the kind of what went wrong: `syntax`, `invalid` (names what is not there, or misuses it),
            `no_statement`, `several_statements`, `refused` (whatever does not only read), `timeout`, `too_many_rows`,
            `too_large` (the statement, a value or the result), `memory`, `crash` (its process died of it),
            `missing_database` or `unreadable_database`.
        message: the cause in words.
    """

    rows: tuple[tuple[SqlValue, ...], ...] = ()
    columns: int = 0
    size: int = 0
    error: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Naive RAG for one question: the documents it used, the generator's answer and whether that was accurate."""

    documents: tuple[Document, ...]
    answer: str
    correct: bool


@dataclass(frozen=True, slots=True)
class Question:
    """One question. `id` is unique over all sources, for example `"nq/train/17"`.

    Attributes:
        answers: accepted golden answers, at least one.
        gold_titles: titles of the passages that hold the answer, in hop order; empty when the data set has none.
        initial_documents: the round-0 documents that the searcher sees in its prompt.
        baseline: naive-RAG outcome, None until it has been precomputed.
        kind: a sub-category for breakdowns, for example `"2-hop"`; empty when unknown.
        extra: what only some tasks know of a question, for example `pub_date` or `db_path`.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    source: str
    gold_titles: tuple[str, ...] = ()
    initial_documents: tuple[Document, ...] = ()
    baseline: Baseline | None = None
    kind: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)


class Role(str, Enum):
    """Who produced a token. Only POLICY tokens are ever trained on."""

    POLICY = "policy"
    ENVIRONMENT = "environment"
    TEMPLATE = "template"


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens with one author.

    Attributes:
        ids: token ids, exactly as sampled or inserted.
        logprobs: log-probabilities of `ids` under the sampling policy; empty unless `role` is POLICY.
        weight_version: version of the policy weights that sampled `ids`; -1 for other roles.
    """

    ids: tuple[int, ...]
    role: Role
    logprobs: tuple[float, ...] = ()
    weight_version: int = -1


@dataclass(frozen=True, slots=True)
class Turn:
    """One generation, what was parsed from it and what came back.

    Attributes:
        segments: the policy segment(s) of this turn, then the environment segment that answered it, if any.
        text: the policy's text of this turn (decoded once, for logs and parsing; never re-encoded).
        query: the query that was sent, or None.
        selected: 1-based ids chosen from the most recent information block, after the cap; None when the policy
            made no selection, `()` when it selected nothing.
        finished: the policy declared the search complete.
        invalid: the turn held neither a query nor a completion.
        result: what the retriever returned for `query`, as far as the policy was shown it, or None.
        dropped: documents left out of `result` because they did not fit the observation.
        answer: the answer that the policy itself gave, None where it gave none.
        note: why the turn is invalid, in words, where the protocol says it.
        prompt_ids: all that the model read before this turn, where a grammar rebuilt the conversation; empty where it
            simply went on. Trajectories with rebuilt turns cannot be trained on.
        fault: the kind of what `note` says, one word of few, so that it can be counted.
    """

    segments: tuple[Segment, ...]
    text: str
    query: str | None = None
    selected: tuple[int, ...] | None = None
    finished: bool = False
    invalid: bool = False
    result: SearchResult | None = None
    dropped: int = 0
    answer: str | None = None
    note: str = ""
    prompt_ids: tuple[int, ...] = ()
    fault: str = ""


class Stop(str, Enum):
    """Why a trajectory ended."""

    FINISHED = "finished"
    TURN_LIMIT = "turn_limit"
    LENGTH = "length"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One question searched through once.

    Attributes:
        prompt_ids: the chat-templated prompt; `ids` below appends every turn's segments to it.
        documents: what the frozen generator gets, in order, de-duplicated (assembled by the grammar).
        error: the cause when `stop` is FAILED, else the empty string. A failed trajectory never gets a score.
    """

    question: Question
    prompt_ids: tuple[int, ...]
    turns: tuple[Turn, ...]
    stop: Stop
    documents: tuple[Document, ...] = ()
    error: str = ""

    @property
    def searches(self) -> int:
        """Number of retrievals that were answered."""
        return sum(turn.result is not None for turn in self.turns)

    @property
    def answer(self) -> str | None:
        """The last answer that the policy itself gave, None if it gave none."""
        return next((turn.answer for turn in reversed(self.turns) if turn.answer is not None), None)

    @property
    def valid(self) -> bool:
        """Whether it finished by itself and every turn held an action."""
        return self.stop is Stop.FINISHED and not any(turn.invalid for turn in self.turns)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments after the prompt, in order."""
        return tuple(segment for turn in self.turns for segment in turn.segments)


@dataclass(frozen=True, slots=True)
class RewardOutcome:
    """What a trajectory earned.

    Attributes:
        score: the scalar reward; meaningless when `failed` is non-empty.
        parts: named components of the score, for the metrics.
        answer: the generator's answer.
        correct: whether that answer was accurate.
        failed: the cause when it could not be scored, else the empty string.
    """

    score: float
    parts: Mapping[str, float] = field(default_factory=dict)
    answer: str = ""
    correct: bool = False
    failed: str = ""
