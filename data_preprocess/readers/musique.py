"""MuSiQue as published: jsonl with `paragraphs`, a decomposition into single hops, and aliases of the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from data_preprocess.readers.base import (
    Entry,
    Evidence,
    Format,
    Row,
    answers_of,
    one_answer,
    optional_text,
    rows_of,
    shown,
    text_of,
    titled,
)

_HOPS = re.compile(r"(\d+)hop")


def recognises(row: Row) -> bool:
    """Whether the row has paragraphs and an answer."""
    return {"question", "answer", "paragraphs"} <= row.keys()


def read(row: Row) -> Entry:
    """Read one question.

    Raises:
        ValueError: malformed, or one of the questions that MuSiQue-Full marks as unanswerable.
    """
    if row.get("answerable") is False:
        raise ValueError("answerable is false; expected MuSiQue-Ans, whose questions all have an answer")
    aliases = row.get("answer_aliases") or []
    if not isinstance(aliases, list | tuple):
        raise ValueError(f"answer_aliases is {shown(aliases)}; expected a list of strings")
    evidence = evidence_of(row)
    id = optional_text(row, "id")
    return Entry(
        question=text_of(row, "question"),
        answers=answers_of([one_answer(row, "answer"), *aliases], "answer and answer_aliases"),
        id=id,
        kind=kind_of(id, row),
        gold_titles=evidence.gold_titles,
        documents=evidence.documents,
        gold=evidence.gold,
    )


def kind_of(id: str, row: Row) -> str:
    """Return "2-hop" and so on, from the id (`2hop__...`, `3hop1__...`) or else from the decomposition."""
    match = _HOPS.match(id)
    hops = int(match[1]) if match else len(steps(row))
    return f"{hops}-hop" if hops else ""


def evidence_of(row: Row) -> Evidence:
    """Return all paragraphs; the gold ones in the order of the hops where the decomposition gives it.

    Raises:
        ValueError: a malformed paragraph or step.
    """
    paragraphs = rows_of(row.get("paragraphs"), "paragraphs")
    ids = [optional_text(paragraph, "idx") or str(number) for number, paragraph in enumerate(paragraphs)]
    documents = {
        id: titled(optional_text(paragraph, "title"), [text_of(paragraph, "paragraph_text")], id)
        for id, paragraph in zip(ids, paragraphs, strict=True)
    }
    supporting = [id for id, paragraph in zip(ids, paragraphs, strict=True) if paragraph.get("is_supporting")]
    stepwise = [optional_text(step, "paragraph_support_idx") for step in steps(row)]
    gold = tuple(dict.fromkeys(id for id in [*stepwise, *supporting] if id in documents))
    titles = tuple(dict.fromkeys(documents[id].title for id in gold if documents[id].title))
    return Evidence(titles, tuple(documents.values()), gold)


def steps(row: Row) -> Sequence[Row]:
    """Return the decomposition's steps, none where there is no decomposition.

    Raises:
        ValueError: it is no list of objects.
    """
    found = row.get("question_decomposition")
    return rows_of(found, "question_decomposition") if found else []


FORMAT = Format("musique", "id, question, answer, answer_aliases, paragraphs and decomposition", recognises, read)
