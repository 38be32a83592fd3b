"""NQ-open: a question and a list of answers, as published (`answer`) and as retrieval papers share it (`answers`).

Some carry passages in `ctxs`, each with `title` and `text`; those marked `isgold` hold the answer.
"""

from __future__ import annotations

from data_preprocess.readers.base import Entry, Format, Row, answers_of, optional_text, rows_of, text_of, titled


def recognises(row: Row) -> bool:
    """Whether the row has a list of answers."""
    return "question" in row and any(isinstance(row.get(name), list | tuple) for name in ("answer", "answers"))


def read(row: Row) -> Entry:
    """Read one question."""
    name = "answers" if "answers" in row else "answer"
    passages = rows_of(row["ctxs"], "ctxs") if row.get("ctxs") else []
    documents = tuple(
        titled(optional_text(passage, "title"), [text_of(passage, "text")], str(number))
        for number, passage in enumerate(passages)
    )
    gold = [document for document, passage in zip(documents, passages, strict=True) if passage.get("isgold")]
    return Entry(
        question=text_of(row, "question"),
        answers=answers_of(row.get(name), name),
        id=optional_text(row, "id", "example_id"),
        gold_titles=tuple(dict.fromkeys(document.title for document in gold if document.title)),
        documents=documents,
        gold=tuple(document.id for document in gold),
    )


FORMAT = Format("nq_open", "question and answer (a list), perhaps ctxs", recognises, read)
