"""The s3 search protocol: query, read, select, stop.

The policy writes `<query>{"query": "..."}</query>`, `<important_info>[ids]</important_info>` and
`<search_complete>True</search_complete>`; the environment answers with `<information>` blocks. "a-b-T" names top-k a,
at most b selected documents per block, and T, which allows T+1 searches and a last turn without one. Protocol and the
original's defects: Jiang et al. 2025, "s3: You Don't Need That Much Data to Train a Search Agent via RL".

Only the policy's own text of one turn is ever parsed, and documents come from search results alone: an
`<information>` that the policy writes is plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from verl.agent.grammar.base import Action, Limits, Observation, check_lengths
from verl.agent.grammar.render import document_line, neutralise
from verl.agent.grammar.s3_prompt import COMPACT_PROMPT, PUBLISHED_PROMPT
from verl.agent.grammar.text import clean_query, unique_documents
from verl.types import Document, Question, SearchResult, Turn

# Opens the next query: the turn after an invalid one starts inside `<query>`.
FEEDBACK = "\n\nThe information is not sufficient yet. I need more, so a new query in JSON follows.\n\n<query>\n"

_QUERY_END = "</query>"
_QUERY_START = "<query>"
_COMPLETE = re.compile(r"<search_complete>(.*?)</search_complete>", re.DOTALL)
_COMPLETE_WORDS = frozenset({"true", "yes", "1", "y"})
_SELECTION = re.compile(r"<important_info>(.*?)</important_info>", re.DOTALL)
# ASCII digits, and few enough that int() accepts every match.
_INTEGER = re.compile(r"(?<![0-9])[0-9]{1,9}(?![0-9])")


@dataclass(frozen=True)
class S3Config:
    """The protocol's numbers; the defaults are the published 8-3-3.

    Attributes:
        max_turns: T; the policy may search T+1 times.
        max_prompt_tokens: longest prompt.
        max_context_tokens: longest prompt plus trajectory: the published rolling context of 8,000 and one generation.
        prompt: "published" is the full instruction; "compact" is for tiny models trained on that format.
    """

    topk: int = 8
    max_selected: int = 3
    max_turns: int = 3
    max_generation_tokens: int = 500
    max_observation_tokens: int = 1400
    max_prompt_tokens: int = 8000
    max_context_tokens: int = 8500
    prompt: Literal["published", "compact"] = "published"
    protocol: Literal["s3"] = "s3"

    def __post_init__(self) -> None:
        check_lengths(self, "max_selected")
        if self.max_turns < 0:
            raise ValueError(f"max_turns={self.max_turns}; expected at least 0")


class S3Grammar:
    """The s3 protocol as a `Grammar`; stateless."""

    stop = ("</query>", "</search_complete>")

    def __init__(self, config: S3Config) -> None:
        self.config = config
        self.limits = Limits(
            topk=config.topk,
            searches=config.max_turns + 1,
            generation_tokens=config.max_generation_tokens,
            observation_tokens=config.max_observation_tokens,
            prompt_tokens=config.max_prompt_tokens,
            context_tokens=config.max_context_tokens,
        )

    def prompt_messages(self, question: Question) -> list[dict[str, str]]:
        """Return the one user message, holding the question and its round-0 documents."""
        template = PUBLISHED_PROMPT if self.config.prompt == "published" else COMPACT_PROMPT
        lines = (document_line(n, document, gap=" ") for n, document in enumerate(question.initial_documents, 1))
        content = template.substitute(
            question=neutralise(question.text), docs="\n".join(lines), max_selected=self.config.max_selected
        )
        return [{"role": "user", "content": content}]

    def parse(self, question: Question, turns: Sequence[Turn], text: str) -> Action:
        """Read one turn: completion wins over a query; a turn with neither is invalid."""
        shown = len(_blocks(question, turns)[-1])
        selected = _parse_selection(text, shown, self.config.max_selected)
        if any(word.strip().lower() in _COMPLETE_WORDS for word in _COMPLETE.findall(text)):
            return Action(selected=selected, finished=True)
        inside_query = bool(turns) and turns[-1].invalid
        query = _parse_query(text, inside_query)
        return Action(query=query, selected=selected, invalid=query is None)

    async def observe(self, question: Question, turns: Sequence[Turn], result: SearchResult | None) -> Observation:
        """Return the information block, or after an invalid turn the feedback that opens a query."""
        return Observation(FEEDBACK) if result is None else _information(result.documents)

    def observation_text(self, documents: Sequence[Document]) -> str:
        """Render the information block that shows `documents`, all of them."""
        return _information(documents).text(len(documents))

    def assemble(self, question: Question, turns: Sequence[Turn]) -> tuple[Document, ...]:
        """Return the selected documents of each block, then all documents of the blocks without a selection.

        A selection refers to the most recent block shown before its turn, and the first one for a block counts. Both
        passes go in block order, documents in the order shown; equal documents (title and text) appear once.
        """
        blocks = _blocks(question, turns)
        selections = _selections(turns)
        chosen = [blocks[b][i - 1] for b in sorted(selections) for i in sorted(selections[b])]
        unselected = [document for b, block in enumerate(blocks) if b not in selections for document in block]
        return unique_documents(chosen + unselected)


def _blocks(question: Question, turns: Sequence[Turn]) -> list[tuple[Document, ...]]:
    """Return round 0 and then every block that the policy was shown."""
    return [question.initial_documents, *(turn.result.documents for turn in turns if turn.result is not None)]


def _selections(turns: Sequence[Turn]) -> dict[int, tuple[int, ...]]:
    """Return the first selection that was made for each block, by the block's index."""
    selections: dict[int, tuple[int, ...]] = {}
    block = 0
    for turn in turns:
        if turn.selected is not None:
            selections.setdefault(block, turn.selected)
        block += turn.result is not None
    return selections


def _information(documents: Sequence[Document]) -> Observation:
    lines = tuple(document_line(number, document) for number, document in enumerate(documents, 1))
    return Observation("\n\n<information>\n", lines, "\n</information>\n\n")


def _parse_selection(text: str, shown: int, cap: int) -> tuple[int, ...] | None:
    """Return the first `cap` distinct ids within 1..shown of the first selection tag; None without a tag."""
    tag = _SELECTION.search(text)
    if tag is None:
        return None
    ids = (int(digits) for digits in _INTEGER.findall(tag[1]))
    return tuple(dict.fromkeys(i for i in ids if 1 <= i <= shown))[:cap]


def _parse_query(text: str, inside_query: bool) -> str | None:
    """Return the first query that is not blank; `inside_query` says that the text starts after an opening tag."""
    pieces = text.split(_QUERY_END)[:-1]
    for index, piece in enumerate(pieces):
        _, opened, inner = piece.rpartition(_QUERY_START)
        if not opened and not (inside_query and index == 0):
            continue
        if query := _read_query(inner if opened else piece):
            return query
    return None


def _read_query(inner: str) -> str:
    """Return the query that the JSON object holds; the raw text when there is no such object; "" when blank."""
    try:
        value = json.loads(inner)
    except (ValueError, RecursionError):
        return clean_query(inner)
    if not isinstance(value, dict) or "query" not in value:
        return clean_query(inner)
    query: Any = value["query"]
    if isinstance(query, list):
        query = next((entry for entry in query if isinstance(entry, str)), "")
    if query is None:
        return ""
    return clean_query(query if isinstance(query, str) else inner)
