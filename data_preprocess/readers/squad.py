"""SQuAD v1.1: the published file of articles, or its rows as the hub has them.

Titles are those of the articles ("Super_Bowl_50", percent-encoded in the file) as a reader would write them. All
paragraphs of an article share its title, so a title names an article; `gold` names the paragraph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

from data_preprocess.readers.base import Entry, Format, Row, answers_of, optional_text, rows_of, text_of, titled


def recognises(row: Row) -> bool:
    """Whether the row has a context as text, and answers with their places in it."""
    answers = row.get("answers")
    return "question" in row and isinstance(row.get("context"), str) and isinstance(answers, Mapping | list | tuple)


def nested(row: Row) -> bool:
    """Whether the object is a published file."""
    return isinstance(row.get("data"), list)


def unfold(row: Row) -> Iterator[tuple[str, Row]]:
    """Yield one row a question."""
    for article in rows_of(row["data"], "data"):
        title = text_of(article, "title")
        for number, paragraph in enumerate(rows_of(article.get("paragraphs"), "paragraphs")):
            for asked in rows_of(paragraph.get("qas"), "qas"):
                place = f"article {title!r}, paragraph {number}, question {optional_text(asked, 'id')!r}"
                yield place, {**asked, "title": title, "context": paragraph.get("context")}


def read(row: Row) -> Entry:
    """Read one question with its paragraph."""
    if row.get("is_impossible"):
        raise ValueError("is_impossible is true; expected SQuAD 1.1, whose questions all have an answer")
    answers = row.get("answers")
    spans = (
        answers.get("text") if isinstance(answers, Mapping) else [s.get("text") for s in rows_of(answers, "answers")]
    )
    title = unquote(optional_text(row, "title")).replace("_", " ")
    context = text_of(row, "context")
    # The paragraph's own id, so that its many questions ship it as one passage.
    paragraph = titled(title, [context], hashlib.blake2b(context.encode("utf-8", "replace"), digest_size=8).hexdigest())
    return Entry(
        question=text_of(row, "question"),
        answers=answers_of(spans, "answers"),
        id=optional_text(row, "id"),
        gold_titles=(paragraph.title,) if paragraph.title else (),
        documents=(paragraph,),
        gold=(paragraph.id,),
    )


FORMAT = Format(
    "squad", "data with articles, or title, context, question and answers", recognises, read, nested, unfold
)
