"""The DeepRetrieval protocol: think, write one query (or one SQL statement), and be done.

The policy reasons in `<think>`, then gives `<answer>{"query": "..."}</answer>` (`"sql"` for text-to-SQL). A search
engine runs the query once; there is no second turn. Protocol: Jiang et al. 2025, "DeepRetrieval: Hacking Real Search
Engines and Retrievers with Large Language Models via Reinforcement Learning". The answer is read as strictly as the
released rewards read it: each tag exactly once and in order, and bare JSON between the answer tags; text outside the
tags is tolerated. Every rejection names its reason (`Turn.note`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from verl.agent.grammar.base import Action, Limits, Message, Observation, check_lengths
from verl.agent.grammar.deepretrieval_prompts import Task, build_prompt
from verl.agent.grammar.render import neutralise
from verl.agent.grammar.text import clean_query, unique_documents
from verl.types import Document, Question, SearchResult, Turn

_SHOWN_CHARS = 80

Fault = Literal[
    "tag_missing", "tag_repeated", "tag_order", "empty", "not_json", "not_object", "key_missing", "not_text", "blank"
]
"""Kinds of rejections: of the tags; nothing between the answer's; of the JSON there; of the value of its key."""


@dataclass(frozen=True)
class DeepRetrievalConfig:
    """What is asked for, and how.

    Attributes:
        task: which instruction opens the prompt, and whether a query or a SQL statement is wanted.
        reasoning: with a `<think>` part; without one the answer tags alone are required.
        prefill: start the policy's turn with its first tag, as the released prompts do.
        topk: documents asked of the engine (12 for contexts; the released rewards look at the first 3,000).
        fall_back: search for the question itself when the answer cannot be read; a reward sees that it is invalid.
    """

    task: Task = "query"
    reasoning: bool = True
    prefill: bool = False
    topk: int = 12
    fall_back: bool = False
    max_generation_tokens: int = 512
    max_observation_tokens: int = 512
    max_prompt_tokens: int = 2048
    max_context_tokens: int = 4096
    prompt: Literal["published", "compact"] = "published"
    protocol: Literal["deepretrieval"] = "deepretrieval"

    def __post_init__(self) -> None:
        check_lengths(self)


@dataclass(frozen=True, slots=True)
class Reading:
    """What an answer says: the value of its key, or why it cannot be read."""

    value: str = ""
    reason: str = ""
    fault: Fault | Literal[""] = ""


class DeepRetrievalGrammar:
    """DeepRetrieval as a `Grammar`; stateless."""

    stop = ("</answer>",)

    def __init__(self, config: DeepRetrievalConfig) -> None:
        self.config = config
        self.key = "sql" if config.task == "sql" else "query"
        self.limits = Limits(
            topk=config.topk,
            searches=1,
            generation_tokens=config.max_generation_tokens,
            observation_tokens=config.max_observation_tokens,
            prompt_tokens=config.max_prompt_tokens,
            context_tokens=config.max_context_tokens,
        )

    def prompt_messages(self, question: Question) -> list[Message]:
        """Return the instruction with the question's fields, and the policy's first tag if it is prefilled."""
        content = build_prompt(self.config.task, self.config.reasoning, self.config.prompt, neutralise(question.text))
        messages = [{"role": "user", "content": content}]
        if self.config.prefill:
            messages.append({"role": "assistant", "content": self._opening})
        return messages

    def parse(self, question: Question, turns: Sequence[Turn], text: str) -> Action:
        """Read the one turn; it always finishes."""
        written = self._opening + text if self.config.prefill else text
        reading = read_answer(written, self.key, self.config.reasoning)
        if reading.reason:
            usual = question.extra.get("query", question.text)
            query = usual if self.config.fall_back and self.key == "query" else None
            return Action(query=query, finished=True, invalid=True, note=reading.reason, fault=reading.fault)
        if self.key == "sql":
            return Action(answer=reading.value, finished=True)
        return Action(query=reading.value, finished=True)

    async def observe(self, question: Question, turns: Sequence[Turn], result: SearchResult | None) -> Observation:
        """Nothing is ever observed."""
        raise AssertionError("a DeepRetrieval turn always finishes")

    def assemble(self, question: Question, turns: Sequence[Turn]) -> tuple[Document, ...]:
        """Return what the query found, equal documents (title and text) once."""
        return unique_documents(document for turn in turns if turn.result for document in turn.result.documents)

    @property
    def _opening(self) -> str:
        return "<think>" if self.config.reasoning else "<answer>"


def read_answer(text: str, key: str, reasoning: bool) -> Reading:
    """Read `{"<key>": "..."}` from the answer tags of a turn; total, whatever the text.

    Args:
        reasoning: whether the think tags are required before the answer's.
    """
    tags = ("<think>", "</think>", "<answer>", "</answer>") if reasoning else ("<answer>", "</answer>")
    at = -1
    for tag in tags:
        count = text.count(tag)
        if count != 1:
            fault: Fault = "tag_repeated" if count else "tag_missing"
            return Reading(reason=f"{tag} occurs {count} times, expected once", fault=fault)
        if text.index(tag) < at:
            return Reading(reason=f"{tag} stands before the tag that it should follow", fault="tag_order")
        at = text.index(tag)
    inner = text.partition("<answer>")[2].partition("</answer>")[0].strip()
    return _value_of(inner, key)


def _value_of(inner: str, key: str) -> Reading:
    """Read what stands between the answer tags."""
    try:
        value = json.loads(inner, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as cause:
        reason = f"the answer is not JSON ({cause}): {_shown(inner)}"
        return Reading(reason=reason, fault="not_json" if inner else "empty")
    if not isinstance(value, dict):
        reason = f"the answer is a JSON {type(value).__name__}, expected an object with {key!r}"
        return Reading(reason=reason, fault="not_object")
    found = value.get(key)
    if not isinstance(found, str):
        there = key in value
        problem = f"is a {type(found).__name__}" if there else "is missing"
        reason = f"the answer's {key!r} {problem}, expected a string"
        return Reading(reason=reason, fault="not_text" if there else "key_missing")
    cleaned = clean_query(found)
    return Reading(cleaned) if cleaned else Reading(reason=f"the answer's {key!r} is blank", fault="blank")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _shown(text: str) -> str:
    return ascii(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")
