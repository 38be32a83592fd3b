"""Queries that give the answer away: what a policy knew already, not what it found.

A policy that writes the answer into its query is paid for its memory. The filter takes out of a query what answers the
question and does not stand in it, so that the rest can be scored again. By tokens (`strip_answers`), or by a model that
is asked to (`ModelFilter`), which also finds other wordings.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import regex

from verl.agent.grammar.base import Message
from verl.agent.grammar.deepretrieval import read_answer
from verl.errors import GeneratorError
from verl.rewards.text import tokens
from verl.types import Question

_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
_OPERATOR = r"(?:AND NOT|AND|OR|NOT)"
_DEBRIS = (
    (re.compile(r"\"\s*\"|'\s*'|\(\s*\)|\[\s*\]"), " "),
    (re.compile(r"\(\s*(?:AND|OR)\b\s*"), "("),
    (re.compile(rf"\s*\b{_OPERATOR}\s*\)"), ")"),
    (re.compile(r"\b(?:AND|OR|NOT)\s+(AND NOT|AND|OR)\b"), r"\1"),
    (re.compile(rf"^\s*(?:AND|OR)\b\s*|\s*\b{_OPERATOR}\s*$"), ""),
)
"""What is left of a Boolean query where a term was: empty quotes and parentheses, operators without an operand."""


@dataclass(frozen=True, slots=True)
class Stripped:
    """A query without what gives the answer away.

    Attributes:
        query: what is left; may be empty.
        injected: what was taken out, as it stood in the query, in order; empty if nothing was.
    """

    query: str
    injected: tuple[str, ...] = ()


def strip_answers(question: Question, query: str) -> Stripped:
    """Take out every run of tokens that is an answer, unless the question has it too; longest answers first.

    Tokens are DPR's, as for `verl.rewards.text.has_answer`: lower-cased and decomposed, so case and accents do not
    hide an answer, and no part of a word is one. What comes together where something was taken out is looked at again.
    """
    asked = tokens(question.text)
    answers = {tuple(tokens(answer)) for answer in question.answers}
    wanted = sorted((a for a in answers if a and not _contains(asked, a)), key=lambda a: (-len(a), a))
    injected: tuple[str, ...] = ()
    while (found := _strip_once(wanted, query)).injected:
        query, injected = found.query, injected + found.injected
    return Stripped(query, injected)


def _strip_once(wanted: Sequence[tuple[str, ...]], query: str) -> Stripped:
    text = unicodedata.normalize("NFD", query)
    spans = [match.span() for match in _TOKEN.finditer(text)]
    words = [text[start:end].lower() for start, end in spans]
    taken = [False] * len(words)
    for answer in wanted:
        for at in _places(words, answer):
            if not any(taken[at : at + len(answer)]):
                taken[at : at + len(answer)] = [True] * len(answer)
    if not any(taken):
        return Stripped(query)
    kept, removed = _cut(text, spans, taken)
    return Stripped(unicodedata.normalize("NFC", tidy(kept)), removed)


def tidy(query: str) -> str:
    """Drop empty quotes and parentheses, and operators without an operand; single spaces."""
    while True:
        cleaned = query
        for pattern, instead in _DEBRIS:
            cleaned = pattern.sub(instead, cleaned)
        cleaned = " ".join(cleaned.split()).replace("( ", "(").replace(" )", ")")
        if cleaned == query:
            return cleaned
        query = cleaned


class ModelFilter:
    """The same by a model, which is shown question, answers and query and writes the query without the answers.

    Args:
        complete: asks the model; raises GeneratorError when it cannot.
    """

    def __init__(self, complete: Callable[[Sequence[Message]], Awaitable[str]]) -> None:
        self._complete = complete

    async def __call__(self, question: Question, query: str) -> Stripped:
        """Return what the model leaves of the query.

        Raises:
            GeneratorError: no reply, none that can be read, or one with words that the query did not have.
        """
        reply = await self._complete([{"role": "user", "content": filter_prompt(question, query)}])
        reading = read_answer(reply, "query", reasoning=False)
        if reading.reason and reading.fault != "blank":
            raise GeneratorError(f"the filter's reply cannot be read: {reading.reason}")
        before, after = Counter(tokens(query)), Counter(tokens(reading.value))
        if not after <= before:
            added = ", ".join(sorted(after - before))
            raise GeneratorError(f"the filter may only take words out of a query, and added: {added[:200]}")
        removed = tuple((before - after).elements())
        return Stripped(reading.value, removed) if removed else Stripped(query)


def filter_prompt(question: Question, query: str) -> str:
    """Return what the model is asked."""
    answers = "\n".join(f"- {answer}" for answer in question.answers)
    return (
        "Below are a question, its correct answers, and a search query that someone wrote for the question. Take out "
        "of the query every word or phrase that gives an answer away, in any wording, and that does not stand in the "
        "question. Change nothing else and add nothing. If there is nothing to take out, repeat the query.\n"
        'Reply with JSON inside <answer> and </answer>: <answer>{"query": "the query that is left"}</answer>\n\n'
        f"Question: {question.text}\nAnswers:\n{answers}\nQuery: {query}"
    )


def _places(words: Sequence[str], wanted: Sequence[str]) -> Iterator[int]:
    size = len(wanted)
    return (at for at in range(len(words) - size + 1) if tuple(words[at : at + size]) == tuple(wanted))


def _contains(words: Sequence[str], wanted: Sequence[str]) -> bool:
    return any(True for _ in _places(words, wanted))


def _cut(text: str, spans: Sequence[tuple[int, int]], taken: Sequence[bool]) -> tuple[str, tuple[str, ...]]:
    """Return the text without the taken tokens, and each run of them."""
    kept, removed, last, at = [], [], 0, 0
    while at < len(spans):
        if not taken[at]:
            at += 1
            continue
        end = at
        while end < len(spans) and taken[end]:
            end += 1
        start, stop = spans[at][0], spans[end - 1][1]
        kept.append(text[last:start])
        removed.append(unicodedata.normalize("NFC", text[start:stop]))
        last, at = stop, end
    return " ".join([*kept, text[last:]]), tuple(removed)
