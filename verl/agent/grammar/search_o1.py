"""The Search-o1 protocol: a reasoning model searches in the middle of its thoughts and reads condensed results.

The policy writes `<|begin_search_query|>query<|end_search_query|>`; the documents found are condensed by a second call
of a model, with the reasoning so far in view, and what it concludes is inserted between `<|begin_search_result|>` and
`<|end_search_result|>`. Protocol: Li et al. 2025, "Search-o1: Agentic Search-Enhanced Large Reasoning Models". The
documents for a frozen generator are all raw documents, as in the s3 evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Literal

from verl.agent.grammar.base import Action, Complete, Limits, Message, Observation, check_lengths
from verl.agent.grammar.render import document_line, neutralise
from verl.agent.grammar.text import clean_query, unique_documents
from verl.types import Document, Question, SearchResult, Turn

QUERY_START, QUERY_END = "<|begin_search_query|>", "<|end_search_query|>"
RESULT_START, RESULT_END = "<|begin_search_result|>", "<|end_search_result|>"

PUBLISHED_PROMPT = Template(f"""\
You are a reasoning assistant that can search the web to answer the user's question accurately.

To search, write {QUERY_START} your query {QUERY_END}. The system then looks for pages, reads them, and returns what \
is useful as {RESULT_START} ... {RESULT_END}. You can repeat this, at most $max_turns times. When you have all you \
need, go on reasoning to the end.

Give the final answer between <answer> and </answer>.

Question: $question
""")

# Tiny models were trained on exactly this text.
COMPACT_PROMPT = Template("""\
Reason, search, and answer the question.
<question>
$question
</question>""")

CONDENSE = Template("""\
Read the pages below and pull out what helps with the current search query and fits the reasoning so far. Do not \
answer the question itself. Write the result after the words "Final Information"; if the pages hold nothing useful, \
write "No helpful information found." there.

Reasoning so far:
$reasoning

Current search query:
$query

Pages:
$pages
""")
_FINAL = "Final Information"
_ANSWER = re.compile(r"<answer>(.*?)</answer>|\\boxed\{([^{}]*)\}", re.DOTALL)


@dataclass(frozen=True)
class SearchO1Config:
    """The protocol's numbers; the defaults are those of the s3 authors' Search-o1 runs.

    Attributes:
        max_turns: turns that may search; one more follows in which a search is ignored.
        condense: let a model condense the documents; without it they are shown as they are.
        max_reasoning_chars: the end of the reasoning so far that the condensing model sees.
    """

    topk: int = 3
    max_turns: int = 4
    max_generation_tokens: int = 2048
    max_observation_tokens: int = 1400
    max_prompt_tokens: int = 4096
    max_context_tokens: int = 16384
    condense: bool = True
    max_reasoning_chars: int = 4000
    prompt: Literal["published", "compact"] = "published"
    protocol: Literal["search_o1"] = "search_o1"

    def __post_init__(self) -> None:
        check_lengths(self, "max_turns")
        if self.max_reasoning_chars < 0:
            raise ValueError(f"max_reasoning_chars={self.max_reasoning_chars}; expected 0 or more")


class SearchO1Grammar:
    """Search-o1 as a `Grammar`.

    Args:
        complete: condenses; needed if `config.condense`.

    Raises:
        ValueError: `config.condense` without `complete`.
    """

    stop = (QUERY_END, "</answer>")

    def __init__(self, config: SearchO1Config, complete: Complete | None = None) -> None:
        if config.condense and complete is None:
            raise ValueError(
                "search_o1 with condense=true needs a model that condenses; pass one or set condense=false"
            )
        self.config = config
        self._complete = complete
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
        content = template.substitute(question=neutralise(question.text), max_turns=self.config.max_turns)
        return [{"role": "user", "content": content}]

    def parse(self, question: Question, turns: Sequence[Turn], text: str) -> Action:
        """Read one turn: a query asks, an answer or the end of the text finishes."""
        head, ended, _ = text.partition(QUERY_END)
        if ended:
            _, opened, inner = head.rpartition(QUERY_START)
            query = clean_query(inner) if opened else ""
            return Action(query=query) if query else Action(invalid=True)
        answers = [tagged or boxed for tagged, boxed in _ANSWER.findall(text)]
        # A model that ends its turn has finished, whether or not it marked an answer.
        return Action(finished=True, answer=clean_query(answers[-1]) if answers else None)

    async def observe(self, question: Question, turns: Sequence[Turn], result: SearchResult | None) -> Observation:
        """Return the condensed result."""
        if result is None:
            return Observation(f"\n\n{RESULT_START}The query was empty.{RESULT_END}\n\n")
        found = _result(result.documents)
        if self._complete is None or not self.config.condense:
            return found
        reasoning = "".join(turn.text for turn in turns)[-self.config.max_reasoning_chars :]
        asked = CONDENSE.substitute(
            reasoning=neutralise(reasoning), query=neutralise(turns[-1].query or ""), pages="\n".join(found.items)
        )
        reply = await self._complete([{"role": "user", "content": asked}])
        _, marked, useful = reply.partition(_FINAL)
        shown = neutralise((useful if marked else reply).strip(" \n*:"))
        # All documents stay with the turn: what was condensed is what was found.
        return Observation(found.head + shown + found.tail)

    def observation_text(self, documents: Sequence[Document]) -> str:
        """Render the result block that shows `documents` as they are, all of them."""
        return _result(documents).text(len(documents))

    def assemble(self, question: Question, turns: Sequence[Turn]) -> tuple[Document, ...]:
        """Return all documents that were found, in order, equal ones (title and text) once."""
        return unique_documents(document for turn in turns if turn.result for document in turn.result.documents)


def _result(documents: Sequence[Document]) -> Observation:
    lines = tuple(document_line(number, document) for number, document in enumerate(documents, 1))
    return Observation(f"\n\n{RESULT_START}", lines, f"{RESULT_END}\n\n")
