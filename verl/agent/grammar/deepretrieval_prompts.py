"""What a DeepRetrieval policy is asked; the question's fields (PICO lines, schema) are in its text already."""

from __future__ import annotations

from typing import Literal

Task = Literal["query", "literature", "dense", "sql"]

_BRIEFS: dict[str, str] = {
    "query": (
        "You write queries for a search engine that matches terms. Given a question or a claim, write one query that "
        "finds the documents that answer or settle it. You may use AND, OR and parentheses."
    ),
    "literature": (
        "You are a clinical specialist who does systematic reviews. Given the research question as P (patient, problem "
        "or population), I (intervention), C (comparison) and O (outcome), write one search query that finds all "
        "relevant publications or trials. Use AND, OR and parentheses. Not every part has to be in the query."
    ),
    "dense": (
        "You write queries for a search engine that matches meaning. Given a question or a claim, keep its wording and "
        "expand it with what helps to find the documents that answer or settle it; if nothing helps, leave it as it is."
    ),
    "sql": (
        "You write SQLite queries. Given the schema of a database and a question, write one SQL statement, in one "
        "line, that returns the answer."
    ),
}
_COMPACT: dict[str, str] = {
    "query": "Write a query.",
    "literature": "Write a review query.",
    "dense": "Write a dense query.",
    "sql": "Write SQL.",
}


def build_prompt(task: Task, reasoning: bool, style: str, text: str) -> str:
    """Return the user message.

    Args:
        style: "published" is the full instruction; "compact" is for tiny models trained on that format.
        text: the question's fields, neutralised.
    """
    if style == "compact":
        return f"{_COMPACT[task]}\n<question>\n{text}\n</question>"
    shape = '{"sql": "your statement"}' if task == "sql" else '{"query": "your query"}'
    contract = f"Give the result as JSON inside <answer> and </answer>: <answer>{shape}</answer>"
    if reasoning:
        contract = f"Reason first, inside <think> and </think>. Then give the result.\n{contract}"
    return f"{_BRIEFS[task]}\n{contract}\n\n{text}"
