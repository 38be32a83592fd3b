"""Sub-queries from a model that sees question, answer and supporting facts: any OpenAI-compatible annotator.

The reply is read strictly, line by line; one that cannot be read is asked for again, a bounded number of times.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from string import Template

from data_preprocess.evidence.decompose import NO_FACTS, Hop, Plan
from data_preprocess.evidence.facts import Fact
from verl.agent.grammar.base import Message
from verl.types import Question

MALFORMED = "the annotator's reply could not be read"

PROMPT = Template("""\
You are given a question, its answer and numbered facts from Wikipedia that lead to the answer. Write down how a \
person who knows none of this finds the answer with a search engine: one search after the other, each with the facts \
that it turns up.

Rules:
- A search is a short, self-contained question or phrase. It may use what the question says and what the facts of \
earlier searches say, but nothing that is only found later.
- Give one fact or few facts a search, in the order in which they are needed. Leave out facts that are not needed.
- Write exactly these lines and nothing else, counting from 1:
<Search 1> the first search
<Reference 1> [numbers of the facts that it turns up]
<Search 2> the second search
<Reference 2> [numbers of the facts that it turns up]
<Final>

For example, for "Where was the director of Up born?" with the facts "[1] (Up) Up was directed by Pete Docter." and \
"[2] (Pete Docter) Docter was born in Bloomington.":
<Search 1> Who directed Up?
<Reference 1> [1]
<Search 2> Where was Pete Docter born?
<Reference 2> [2]
<Final>

Question: $question
Answer: $answer
Facts:
$facts
""")

_LINE = re.compile(r"<(Search|Reference) ([1-9][0-9]?)>\s*(.*)")
_NUMBER = re.compile(r"[0-9]{1,6}")
_NUMBERS = re.compile(r"[\[\]0-9,; ]+")

Ask = Callable[[Sequence[Message], int], Awaitable[str]]
"""Asks the annotator; the number tells the tries of one question apart."""


async def annotate(question: Question, facts: Sequence[Fact], ask: Ask, tries: int) -> Plan:
    """Let the annotator plan the searches for a question.

    Args:
        tries: replies that are asked for, at most.

    Raises:
        GeneratorError: the annotator did not answer; nothing is known of the question then.
    """
    if not facts:
        return Plan(reason=NO_FACTS)
    listed = "\n".join(f"[{number}] ({fact.title}) {fact.sentence}" for number, fact in enumerate(facts, 1))
    content = PROMPT.substitute(question=question.text, answer=question.answers[0], facts=listed)
    for attempt in range(tries):
        hops = read_reply(await ask([{"role": "user", "content": content}], attempt), facts)
        if hops:
            return Plan(hops)
    return Plan(reason=MALFORMED)


def read_reply(reply: str, facts: Sequence[Fact]) -> tuple[Hop, ...]:
    """Read the annotator's lines; empty where anything is missing, out of order, repeated or unknown."""
    lines = [line.strip() for line in reply.strip().splitlines() if line.strip()]
    if len(lines) < 3 or len(lines) % 2 == 0 or not lines[-1].startswith("<Final>"):
        return ()
    hops = []
    for number, (asked, named) in enumerate(zip(lines[:-1:2], lines[1::2], strict=False), 1):
        query, numbers = _tagged(asked, "Search", number), _tagged(named, "Reference", number)
        if not query or not _NUMBERS.fullmatch(numbers):
            return ()
        cited = list(dict.fromkeys(int(found) for found in _NUMBER.findall(numbers)))
        if not cited or not all(1 <= fact <= len(facts) for fact in cited):
            return ()
        hops.append(Hop((query,), tuple(facts[fact - 1] for fact in cited)))
    return tuple(hops)


def _tagged(line: str, tag: str, number: int) -> str:
    match = _LINE.fullmatch(line)
    return match[3].strip() if match and match[1] == tag and int(match[2]) == number else ""
