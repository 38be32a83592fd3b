"""The ExSearch protocol: think of a sub-query, search, record the evidence, until the facts are sufficient; answer.

Turns alternate as in a chat. The policy writes `<QUERY> q1`, the environment `<SEARCH>` and documents, the policy
`<FACT> e1` and, in the same turn, `<QUERY> q2` or `<FINAL>`; after `<FINAL>` it is asked for the answer, which it gives
without tags. Protocol: Shi et al. 2025, "Iterative Self-Incentivization Empowers Large Language Models as Agentic
Searchers". Documents are numbered from 1, shown and chosen alike.

Rules where the released code leaves something open or does otherwise:

- A turn without a sub-query (after the first, whose whole text is one) is invalid and its first line is its fact. The
  released code samples again behind a forced `<QUERY>`; here the environment says what was missing, which costs one of
  the `max_turns` and keeps user and assistant alternating.
- The last allowed search is answered by documents and the request for the answer in one message.
- What a policy writes from `<SEARCH>` on, having asked for something, is no document and not read.
- With `select`, the policy is asked in a conversation of one turn which documents to show (`[2] > [1]`), and the
  dialogue goes on with the chosen ones alone, as published. The conversation is rebuilt for that, so such trajectories
  train from `to_messages` and `rank_messages`, not from their tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from verl.agent.grammar.base import Action, Limits, Message, Observation, check_lengths
from verl.agent.grammar.exsearch_prompt import COMPACT, PUBLISHED, RECORD, SEARCH, STOP, THINK, Wording
from verl.agent.grammar.render import neutralise, one_line
from verl.agent.grammar.text import clean_query, unique_documents
from verl.types import Document, Question, SearchResult, Trajectory, Turn

_MARKER = re.compile("|".join((THINK, SEARCH, RECORD, STOP)))
# ASCII digits; longer runs than int() accepts are no document's number anyway.
_DIGITS = re.compile(r"(?<![0-9])[0-9]{1,9}(?![0-9])")
# What a policy spelt must not become a special token when its words are tokenised once more.
_SPECIAL = re.compile(r"<(?=/?[|｜])")

NO_QUERY = f"the turn holds neither {THINK} and a sub-query nor {STOP}"
NO_CHOICE = "no number of a document that was listed; the first ones are shown"
NO_ANSWER = "the answer is empty"


@dataclass(frozen=True)
class ExSearchConfig:
    """The protocol's numbers; the defaults are those of the released `v1` branch, unless said otherwise.

    Attributes:
        topk: documents that are retrieved and stay with the turn.
        shown: the first so many of them are shown; with `select`, at most so many of those chosen.
        select: let the policy choose what is shown (the `main` branch: 20 retrieved, 8 turns).
        max_turns: sub-queries, malformed turns included.
        max_generation_tokens: of one turn; 256 is `main`'s, because `v1`'s 64 cuts long facts off.
        max_observation_tokens: longest message of documents.
    """

    topk: int = 10
    shown: int = 3
    select: bool = False
    max_turns: int = 20
    max_generation_tokens: int = 256
    max_observation_tokens: int = 2048
    max_prompt_tokens: int = 2048
    max_context_tokens: int = 16384
    prompt: Literal["published", "compact"] = "published"
    protocol: Literal["exsearch"] = "exsearch"

    def __post_init__(self) -> None:
        check_lengths(self, "shown", "max_turns")
        if self.shown > self.topk:
            raise ValueError(f"shown={self.shown} exceeds topk={self.topk}; lower the one or raise the other")


@dataclass(frozen=True, slots=True)
class Step:
    """One search and what was recorded of it.

    Attributes:
        documents: those that were shown.
        fact: the recorded evidence, `""` where it is empty, None where the trajectory ended before it.
    """

    query: str
    documents: tuple[Document, ...]
    fact: str | None


class ExSearchGrammar:
    """ExSearch as a `Grammar`; stateless."""

    stop = (SEARCH,)

    def __init__(self, config: ExSearchConfig) -> None:
        self.config = config
        self._words: Wording = PUBLISHED if config.prompt == "published" else COMPACT
        rebuilt = config.max_context_tokens - config.max_generation_tokens
        self.limits = Limits(
            topk=config.topk,
            searches=config.max_turns * (1 + config.select),
            generation_tokens=config.max_generation_tokens,
            observation_tokens=config.max_observation_tokens,
            prompt_tokens=max(config.max_prompt_tokens, rebuilt) if config.select else config.max_prompt_tokens,
            context_tokens=config.max_context_tokens,
        )

    def prompt_messages(self, question: Question) -> list[Message]:
        """Return the one user message."""
        return [{"role": "user", "content": self._words.agent.substitute(question=neutralise(question.text))}]

    def parse(self, question: Question, turns: Sequence[Turn], text: str) -> Action:
        """Read one turn: a choice of documents, the answer once it was asked for, or a sub-query or the end."""
        if self._choosing(turns):
            return self._parse_choice(turns[-1], text)
        if self._answering(turns):
            answer = _bare(_before(text, SEARCH))
            if not answer:
                return Action(answer="", finished=True, invalid=True, note=NO_ANSWER, fault="no_answer")
            return Action(answer=answer, finished=True)
        for read in (_before(text, SEARCH), text):
            if STOP in read:
                return Action()
            if query := _query_of(read, first=not turns):
                return Action(query=query)
        return Action(invalid=True, note=NO_QUERY, fault="no_query")

    async def observe(self, question: Question, turns: Sequence[Turn], result: SearchResult | None) -> Observation:
        """Answer a turn with documents, the request for the answer, or both."""
        if self._choosing(turns):
            return self._ask_choice(turns, result.documents if result else ())
        if not self.config.select:
            return self._observation(question, turns, result.documents if result else ())
        documents = self._chosen(turns) if turns[-1].selected is not None else ()
        last = self._observation(question, turns, documents)
        before = self.to_messages(question, turns)

        def rebuild(count: int) -> list[Message]:
            return [*before, {"role": "user", "content": last.text(count)}]

        return Observation("", last.items, rebuild=rebuild)

    def assemble(self, question: Question, turns: Sequence[Turn]) -> tuple[Document, ...]:
        """Return all documents that were shown, in order, equal ones (title and text) once."""
        return unique_documents(document for step in self.steps(turns) for document in step.documents)

    def steps(self, turns: Sequence[Turn]) -> tuple[Step, ...]:
        """Return every search that was answered, with the documents shown and the evidence recorded."""
        found = []
        for index, turn in enumerate(turns):
            if turn.query is not None and turn.result is not None:
                documents = self._shown(turns[: _after(turns, index)])
                found.append(Step(turn.query, documents, _record(turns, index)))
        return tuple(found)

    def to_messages(self, question: Question, turns: Sequence[Turn]) -> list[Message]:
        """Return the conversation in the published layout, up to the policy's last words.

        Its turns are written anew from what was read in them (`<FACT> e`, line break, `<QUERY> q`), the choice of
        documents is left out, and users and assistants alternate.
        """
        messages = self.prompt_messages(question)
        for index, turn in enumerate(turns):
            if turn.selected is not None:
                continue
            messages.append({"role": "assistant", "content": _rewritten(turns[:index], turn)})
            end = _after(turns, index)
            if end < len(turns):
                observation = self._observation(question, turns[:end], self._shown(turns[:end]))
                messages.append({"role": "user", "content": observation.text(len(observation.items))})
        return messages

    def rank_messages(self, turns: Sequence[Turn]) -> list[list[Message]]:
        """Return the choices of documents as conversations of one turn each, those that named a document."""
        pairs = []
        for index, turn in enumerate(turns):
            if turn.selected:
                asked = turns[index - 1]
                documents = asked.result.documents if asked.result else ()
                prompt = self.rank_prompt(asked.query or "", [_line(n, doc) for n, doc in enumerate(documents, 1)])
                choice = " > ".join(f"[{number}]" for number in turn.selected)
                pairs.append([{"role": "user", "content": prompt}, {"role": "assistant", "content": choice}])
        return pairs

    def rank_prompt(self, query: str, lines: Sequence[str]) -> str:
        """Return the question which of the rendered documents to show."""
        return self._words.rank.substitute(
            question=one_line(query), count=len(lines), shown=self.config.shown, docs="\n".join(lines)
        )

    def search_message(self, documents: Sequence[Document]) -> str:
        """Render the message that shows `documents`, all of them."""
        return self._found(documents).text(len(documents))

    def answer_request(self, question: Question) -> str:
        """Return the message that asks for the answer."""
        return self._words.request.substitute(question=neutralise(question.text))

    def _choosing(self, turns: Sequence[Turn]) -> bool:
        """Whether the turn after `turns` chooses documents."""
        return self.config.select and bool(turns) and turns[-1].query is not None

    def _answering(self, turns: Sequence[Turn]) -> bool:
        """Whether the answer was asked for after `turns`: because the policy stopped, or its turns are used up."""
        if not turns:
            return False
        return _stopped(turns[-1]) or sum(turn.selected is None for turn in turns) >= self.config.max_turns

    def _observation(self, question: Question, turns: Sequence[Turn], documents: Sequence[Document]) -> Observation:
        """Return the message after `turns`, which ended with a search (`documents`), malformed, or with the stop."""
        last = turns[-1]
        request = self.answer_request(question)
        if _stopped(last):
            return Observation(request, as_user=True)
        tail = f"\n\n{request}" if self._answering(turns) else ""
        if last.query is None and last.selected is None:
            return Observation(f"{SEARCH} {self._words.malformed}", tail=tail, as_user=True)
        found = self._found(documents)
        return Observation(found.head, found.items, tail, as_user=True)

    def _found(self, documents: Sequence[Document]) -> Observation:
        lines = tuple(_line(number, document) for number, document in enumerate(documents[: self.config.shown], 1))
        return Observation(f"{SEARCH} " if lines else f"{SEARCH} {self._words.nothing}", lines)

    def _ask_choice(self, turns: Sequence[Turn], documents: Sequence[Document]) -> Observation:
        lines = tuple(_line(number, document) for number, document in enumerate(documents, 1))
        query = turns[-1].query or ""

        def rebuild(count: int) -> list[Message]:
            return [{"role": "user", "content": self.rank_prompt(query, lines[:count])}]

        return Observation("", lines, rebuild=rebuild)

    def _parse_choice(self, asked: Turn, text: str) -> Action:
        listed = len(asked.result.documents) if asked.result else 0
        numbers = (int(digits) for digits in _DIGITS.findall(text))
        chosen = tuple(dict.fromkeys(number for number in numbers if 1 <= number <= listed))[: self.config.shown]
        if not chosen:
            return Action(selected=(), invalid=True, note=NO_CHOICE, fault="no_choice")
        return Action(selected=chosen)

    def _shown(self, turns: Sequence[Turn]) -> tuple[Document, ...]:
        """Return the documents shown after `turns`, which end with a search or with the choice after it."""
        if turns[-1].selected is not None:
            return self._chosen(turns)
        result = turns[-1].result
        # Without its choice, a search of a selecting policy showed nothing to the dialogue.
        return result.documents[: self.config.shown] if result and not self.config.select else ()

    def _chosen(self, turns: Sequence[Turn]) -> tuple[Document, ...]:
        """Return what the last of `turns` chose of the documents of the turn before, or the first ones."""
        result = turns[-2].result
        if result is None:
            return ()
        numbers = turns[-1].selected or range(1, min(self.config.shown, len(result.documents)) + 1)
        kept = numbers[: len(numbers) - turns[-1].dropped]
        return tuple(result.documents[number - 1] for number in kept)


def to_messages(trajectory: Trajectory, config: ExSearchConfig) -> list[Message]:
    """Return a trajectory as the published files hold it; see `ExSearchGrammar.to_messages`."""
    return ExSearchGrammar(config).to_messages(trajectory.question, trajectory.turns)


def facts_of(trajectory: Trajectory) -> tuple[str, ...]:
    """Return the evidence recorded after each search that has a record, `""` where it is empty."""
    turns = trajectory.turns
    searched = (index for index, turn in enumerate(turns) if turn.query is not None and turn.result is not None)
    return tuple(fact for index in searched if (fact := _record(turns, index)) is not None)


def fact_of(text: str) -> str:
    """Return the evidence that a turn records: what stands before its sub-query or stop, or else its first line."""
    head, marked = _split(text)
    fact = _bare(_before(head, SEARCH))
    return fact if marked else fact.partition("\n")[0].strip()


def _split(text: str) -> tuple[str, bool]:
    """Return what stands before the first `<QUERY>` or `<FINAL>`, and whether there is one."""
    found = [at for at in (text.find(THINK), text.find(STOP)) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)


def _query_of(text: str, first: bool) -> str:
    """Return the first sub-query that is not blank, on one line; `""` without one.

    Args:
        first: the turn opens the trajectory, so all that it says is its sub-query, marked or not.
    """
    for piece in text.split(THINK)[1:]:
        if query := _line_of(_MARKER.split(piece)[0]):
            return query
    return _line_of(_MARKER.split(text)[0]) if first else ""


def _rewritten(before: Sequence[Turn], turn: Turn) -> str:
    """Return a turn in the published layout."""
    if turn.finished:
        return _safe(turn.answer or "")
    parts = []
    if before:
        parts.append(f"{RECORD} {_safe(fact_of(turn.text))}".rstrip())
    if turn.query is not None:
        parts.append(f"{THINK} {_safe(turn.query)}")
    elif _stopped(turn):
        parts.append(STOP)
    return "\n".join(parts) or _safe(_bare(turn.text))


def _after(turns: Sequence[Turn], index: int) -> int:
    """Return the index of the turn that read what came of turn `index`: the choice between them is passed over."""
    chosen = index + 1 < len(turns) and turns[index].query is not None and turns[index + 1].selected is not None
    return index + 2 if chosen else index + 1


def _record(turns: Sequence[Turn], index: int) -> str | None:
    """Return the fact recorded of the search of turn `index`; None without one."""
    end = _after(turns, index)
    return None if end >= len(turns) or turns[end].finished else fact_of(turns[end].text)


def _stopped(turn: Turn) -> bool:
    """Whether a turn ended the search with `<FINAL>`: it holds no action and yet is not invalid."""
    return turn.query is None and turn.selected is None and not turn.finished and not turn.invalid


def _line(number: int, document: Document) -> str:
    return f"[{number}] Title: {one_line(document.title)}. Content: {one_line(document.text)}"


def _before(text: str, marker: str) -> str:
    return text.partition(marker)[0]


def _bare(text: str) -> str:
    return clean_query(_MARKER.sub(" ", text))


def _line_of(text: str) -> str:
    return clean_query(" ".join(text.split()))


def _safe(text: str) -> str:
    return _SPECIAL.sub("< ", text)
