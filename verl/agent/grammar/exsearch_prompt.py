"""What the environment says in an ExSearch conversation; the wording is ours, the markers are the published ones."""

from __future__ import annotations

from dataclasses import dataclass
from string import Template

THINK, SEARCH, RECORD, STOP = "<QUERY>", "<SEARCH>", "<FACT>", "<FINAL>"


@dataclass(frozen=True, slots=True)
class Wording:
    """The texts of one prompt style.

    Attributes:
        agent: opens the conversation; `$question`.
        request: asks for the final answer; `$question`.
        malformed: follows a turn without a sub-query.
        nothing: stands for the documents where none were found.
        rank: asks which documents to read; `$question` (the sub-query), `$count`, `$shown` and `$docs`.
    """

    agent: Template
    request: Template
    malformed: str
    nothing: str
    rank: Template


PUBLISHED = Wording(
    agent=Template(f"""\
You answer questions by searching Wikipedia step by step.

In each step you
1. write a sub-query: what has to be found out next;
2. receive documents for it, from which the useful ones are taken;
3. record the facts in these documents that help with the question.

Start each part with its tag:
1. {THINK} followed by one sub-query.
2. {SEARCH} is written by the search engine and followed by documents; never write it yourself.
3. {RECORD} followed by the evidence of the documents in a few words; leave it empty if they hold none.

After {RECORD}, go on in the same turn: with {THINK} and the next sub-query if something is missing, since a question \
may need several hops, or with {STOP} if the facts are sufficient. Then you are asked for the answer.

Here is the question.

<USER QUERY> $question
Your Output:"""),
    request=Template("""\
Answer the question with the facts that you recorded. Write the answer alone, in a few words, without tags or \
explanations.
Question: $question
Answer:"""),
    malformed=(
        f"Your last turn held no sub-query. Write {RECORD} and the evidence, then {THINK} and the next sub-query, or "
        f"{STOP} if the facts are sufficient."
    ),
    nothing="No documents were found.",
    rank=Template("""\
You are an assistant that picks documents for a search query. The query is: $question

These are $count documents, each with its number in brackets:
$docs

Pick at most $shown of them: those that are relevant to the query and hold information that is needed to answer it. \
Write nothing but their numbers, the most useful one first, in the form [2] > [1].
Query: $question
Numbers:"""),
)

# For tiny models, which are trained on exactly this text; few tokens, and no marker that a turn could be confused with.
COMPACT = Wording(
    agent=Template("Search and record.\n<question>\n$question\n</question>"),
    request=Template("Answer.\n<question>\n$question\n</question>"),
    malformed="A new query must follow.",
    nothing="No documents.",
    rank=Template("$docs\nSearch $question: which of $count documents?"),
)
