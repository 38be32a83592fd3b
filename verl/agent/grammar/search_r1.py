"""The Search-R1 protocol: think, search, read, answer, all in one growing turn.

The policy writes `<search>query</search>` and gets an `<information>` block, or `<answer>...</answer>` and is done.
Protocol: Jin et al. 2025, "Search-R1: Training LLMs to Reason and Leverage Search Engines with Reinforcement Learning".
The policy answers by itself; its documents are all that it was shown, so a frozen generator can be asked as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Literal

from verl.agent.grammar.base import Action, Limits, Message, Observation, check_lengths
from verl.agent.grammar.render import document_line, neutralise
from verl.agent.grammar.text import clean_query, unique_documents
from verl.types import Document, Question, SearchResult, Turn

PUBLISHED_PROMPT = Template("""\
Answer the question below. Whenever you get new information, reason about it first inside <think> and </think>. If you \
find that you lack some knowledge, call a search engine with <search> query </search>; it returns the best results \
between <information> and </information>. You may search as often as you want. Once no further knowledge is needed, \
give the answer directly inside <answer> and </answer>, without explanations, for example <answer> Beijing </answer>.
Question: $question
""")

# Tiny models were trained on exactly this text.
COMPACT_PROMPT = Template("""\
Search and answer the question.
<question>
$question
</question>""")

FEEDBACK = (
    "\nMy last action was not valid. To search, I put the query between <search> and </search>; to answer, I put the "
    "answer between <answer> and </answer>. I try again.\n"
)
_ACTION = re.compile(r"<(search|answer)>((?:(?!<(?:search|answer)>).)*?)</\1>", re.DOTALL)


@dataclass(frozen=True)
class SearchR1Config:
    """The protocol's numbers; the defaults are those of the s3 authors' Search-R1 runs.

    Attributes:
        max_turns: turns that may search; one more follows in which a search is ignored.
    """

    topk: int = 3
    max_turns: int = 4
    max_generation_tokens: int = 500
    max_observation_tokens: int = 500
    max_prompt_tokens: int = 4096
    max_context_tokens: int = 8192
    prompt: Literal["published", "compact"] = "published"
    protocol: Literal["search_r1"] = "search_r1"

    def __post_init__(self) -> None:
        check_lengths(self, "max_turns")


class SearchR1Grammar:
    """Search-R1 as a `Grammar`; stateless."""

    stop = ("</search>", "</answer>")

    def __init__(self, config: SearchR1Config) -> None:
        self.config = config
        self.limits = Limits(
            topk=config.topk,
            searches=config.max_turns,
            generation_tokens=config.max_generation_tokens,
            observation_tokens=config.max_observation_tokens,
            prompt_tokens=config.max_prompt_tokens,
            context_tokens=config.max_context_tokens,
        )

    def prompt_messages(self, question: Question) -> list[Message]:
        """Return the one user message."""
        template = PUBLISHED_PROMPT if self.config.prompt == "published" else COMPACT_PROMPT
        return [{"role": "user", "content": template.substitute(question=neutralise(question.text))}]

    def parse(self, question: Question, turns: Sequence[Turn], text: str) -> Action:
        """Read one turn: the first complete tag counts; without one the turn is invalid."""
        for match in _ACTION.finditer(text):
            content = clean_query(match[2])
            if match[1] == "answer":
                return Action(finished=True, answer=content)
            if content:
                return Action(query=content)
        return Action(invalid=True)

    async def observe(self, question: Question, turns: Sequence[Turn], result: SearchResult | None) -> Observation:
        """Return the information block, or after an invalid turn what was wrong."""
        return Observation(FEEDBACK) if result is None else _information(result.documents)

    def observation_text(self, documents: Sequence[Document]) -> str:
        """Render the information block that shows `documents`, all of them."""
        return _information(documents).text(len(documents))

    def assemble(self, question: Question, turns: Sequence[Turn]) -> tuple[Document, ...]:
        """Return all documents that were shown, in order, equal ones (title and text) once."""
        return unique_documents(document for turn in turns if turn.result for document in turn.result.documents)


def _information(documents: Sequence[Document]) -> Observation:
    lines = tuple(document_line(number, document) for number, document in enumerate(documents, 1))
    return Observation("\n\n<information>", lines, "</information>\n\n")
