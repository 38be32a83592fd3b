"""IRCoT: retrieval interleaved with a chain of thought.

The question is searched for first; then the model writes one step of reasoning from the question, all documents so far
and the numbered steps before, and the step itself is the next query, until the model says that the search is complete.
Method: Trivedi et al. 2023, "Interleaving Retrieval with Chain-of-Thought Reasoning for Knowledge-Intensive Multi-Step
Questions", with the stopping tag of the s3 evaluation. Every step is a conversation of its own (`rebuild`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Literal

from verl.agent.grammar.base import Action, Limits, Message, Observation, check_lengths
from verl.agent.grammar.render import document_line, neutralise, one_line
from verl.agent.grammar.text import clean_query, unique_documents
from verl.types import Document, Question, SearchResult, Turn

PUBLISHED_PROMPT = Template("""\
Answer a question step by step with the help of retrieved documents. Write the next step of the reasoning only, in one \
or two sentences: what the documents show, or what has to be found out next. If the documents and the steps so far are \
sufficient to answer the question, write <search_complete>Yes</search_complete> after the step.

Documents:
$docs

Question: $question

Steps so far:
$chain

Next step:""")

# Tiny models were trained on exactly this text.
COMPACT_PROMPT = Template("""\
Write the next step.
<question>
$question
</question>
<information>
$docs
</information>
<think>
$chain
</think>""")
_COMPLETE = re.compile(r"<search_complete>\s*(?:yes|true)", re.IGNORECASE)
_TAG = re.compile(r"</?search_complete>\s*(?:no|false)?", re.IGNORECASE)


@dataclass(frozen=True)
class IRCoTConfig:
    """The protocol's numbers; the defaults are those of the s3 authors' IRCoT runs.

    Attributes:
        max_steps: steps that may search.
        max_query_chars: a step is cut to so many characters at a word boundary when it becomes a query.
    """

    topk: int = 3
    max_steps: int = 4
    max_generation_tokens: int = 2048
    max_observation_tokens: int = 8192
    max_prompt_tokens: int = 8192
    max_context_tokens: int = 16384
    max_query_chars: int = 1000
    prompt: Literal["published", "compact"] = "published"
    protocol: Literal["ircot"] = "ircot"

    def __post_init__(self) -> None:
        check_lengths(self, "max_steps", "max_query_chars")


class IRCoTGrammar:
    """IRCoT as a `Grammar`; stateless. A question's round-0 documents are those of the search for the question."""

    stop = ("</search_complete>",)

    def __init__(self, config: IRCoTConfig) -> None:
        self.config = config
        self.limits = Limits(
            topk=config.topk,
            searches=config.max_steps,
            generation_tokens=config.max_generation_tokens,
            observation_tokens=config.max_observation_tokens,
            prompt_tokens=config.max_prompt_tokens,
            context_tokens=config.max_context_tokens,
        )

    def prompt_messages(self, question: Question) -> list[Message]:
        """Return the message that asks for the first step."""
        return self.messages(question, (), question.initial_documents)

    def parse(self, question: Question, turns: Sequence[Turn], text: str) -> Action:
        """Read one step: complete, or the next query."""
        if _COMPLETE.search(text):
            return Action(finished=True)
        step = _cut(" ".join(clean_query(_TAG.sub(" ", text)).split()), self.config.max_query_chars)
        return Action(query=step) if step else Action(invalid=True)

    async def observe(self, question: Question, turns: Sequence[Turn], result: SearchResult | None) -> Observation:
        """Return the conversation that asks for the next step, with the documents of this one added."""
        earlier = self.assemble(question, turns[:-1])
        known = {(document.title, document.text) for document in earlier}
        found = tuple(result.documents) if result else ()
        chain = tuple(turn.text for turn in turns)

        def rebuild(count: int) -> list[Message]:
            fresh = (document for document in found[:count] if (document.title, document.text) not in known)
            return self.messages(question, chain, (*earlier, *fresh))

        return Observation("", tuple(document.title for document in found), rebuild=rebuild)

    def assemble(self, question: Question, turns: Sequence[Turn]) -> tuple[Document, ...]:
        """Return round 0 and all documents that were shown, in order, equal ones (title and text) once."""
        found = (document for turn in turns if turn.result for document in turn.result.documents)
        return unique_documents((*question.initial_documents, *found))

    def messages(self, question: Question, chain: Sequence[str], documents: Sequence[Document]) -> list[Message]:
        """Return the message that asks for the step after `chain`."""
        template = PUBLISHED_PROMPT if self.config.prompt == "published" else COMPACT_PROMPT
        lines = (document_line(number, document, gap=" ") for number, document in enumerate(documents, 1))
        steps = (f"{number}. {one_line(_TAG.sub(' ', step))}" for number, step in enumerate(chain, 1))
        content = template.substitute(question=neutralise(question.text), docs="\n".join(lines), chain="\n".join(steps))
        return [{"role": "user", "content": content}]


def _cut(text: str, limit: int) -> str:
    """Cut at a word boundary."""
    if len(text) <= limit:
        return text
    return text[: limit + 1].rpartition(" ")[0].strip() or text[:limit]
