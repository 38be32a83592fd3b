"""A policy that has seen the answer key: it searches for the gold passages by their titles, and stops when it has them.

Everything but the policy is real: the retriever service, the s3 protocol, the agent loop, the collected contexts. So
what it gathers is the ceiling that corpus and retriever allow an s3 searcher, and a ceiling below the oracle's says
that something on the way loses passages. It reads the conversation as a model does, as text, and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from verl.agent.grammar.render import neutralise
from verl.agent.protocols import Generation, Sampling
from verl.errors import DataError, EngineError
from verl.evaluation.remote_engine import Transcript
from verl.rewards.recall import title_key
from verl.types import Question

_BLOCK = re.compile(r"<information>\n(.*?)\n?</information>", re.DOTALL)
_LINE = re.compile(r"^Doc (\d+) ?\(Title: (.*)$", re.MULTILINE)
_QUERY = re.compile(r"<query>\n(.*?)\n</query>", re.DOTALL)
_LONGEST_TITLE = 300


@dataclass(frozen=True, slots=True)
class _Shown:
    """One line of an information block: its number, and the keys of all titles that it may begin with."""

    number: int
    titles: frozenset[str]


class TitleOracle:
    """Plays the s3 protocol for questions whose gold titles are known; satisfies `PolicyEngine`.

    A missing title is searched for as it stands, and once every missing one was, together with the question.

    Args:
        tokenizer: the one that the loop uses with this engine.

    Raises:
        DataError: no question names its gold passages.
    """

    def __init__(self, questions: Sequence[Question], tokenizer: Transcript) -> None:
        self._tokenizer = tokenizer
        self._gold: dict[str, list[str]] = {}
        for question in questions:
            titles = self._gold.setdefault(neutralise(question.text), [])
            titles += [title for title in question.gold_titles if title not in titles]
        if not any(self._gold.values()):
            raise DataError("no question names its gold passages; a scripted searcher needs gt_docs to search for them")

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Say the next turn.

        Raises:
            EngineError: the conversation is about no question that it knows.
        """
        messages = self._tokenizer.messages(prompt_ids)
        said = messages[1]["content"] if len(messages) > 1 else ""
        text = self._turn(*_question_and_documents(messages[0]["content"]), said)
        ids = self._tokenizer.encode(text)[: sampling.max_tokens]
        return Generation(tuple(ids), (0.0,) * len(ids), self._tokenizer.decode(ids), "stop", 0)

    async def close(self) -> None:
        """Nothing to close."""

    def _turn(self, question: str, documents: str, said: str) -> str:
        if question not in self._gold:
            raise EngineError(f"the scripted searcher knows no question {question!r}; it plays those it was made for")
        titles = self._gold[question]
        blocks = [_lines(documents), *(_lines(block) for block in _BLOCK.findall(said))]
        wanted = {title_key(title) for title in titles}
        numbers = [line.number for line in blocks[-1] if line.titles & wanted]
        marked = f"<important_info>{json.dumps(numbers)}</important_info>\n"
        found = frozenset().union(*(line.titles for block in blocks for line in block))
        missing = [title for title in titles if title_key(title) not in found]
        sent = {json.loads(query)["query"] for query in _QUERY.findall(said)}
        left = [query for query in (*missing, *(f"{title} {question}" for title in missing)) if query not in sent]
        if not left:
            return f"{marked}<search_complete>True</search_complete>"
        return f"{marked}<query>\n{json.dumps({'query': left[0]}, ensure_ascii=False)}\n</query>"


def _question_and_documents(prompt: str) -> tuple[str, str]:
    """Return the question and the round-0 documents of an s3 prompt, published or compact."""
    _, found, rest = prompt.rpartition("\n<question>\n")
    question, end, documents = rest.partition("\n</question>\n")
    if not found or not end:
        raise EngineError("the prompt is none of the s3 protocol's; a scripted searcher plays search.protocol=s3 alone")
    return question, "\n".join(_BLOCK.findall(documents))


def _lines(block: str) -> list[_Shown]:
    """Read the lines of a block. A title may hold parentheses, so it may end at any closing one."""
    return [
        _Shown(
            int(number),
            frozenset(title_key(text[:end]) for end, letter in enumerate(text[:_LONGEST_TITLE]) if letter == ")"),
        )
        for number, text in _LINE.findall(block)
    ]
