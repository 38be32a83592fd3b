"""Passages without questions: a corpus, or the file of paragraphs that a set ships beside its questions.

Rows with `title` and `text` (or `content`, `contents`, `paragraph_text`), rows with the published `contents` alone, or
one object of such rows by id. A row with `para_index` is known as "{title}-{para_index}", as StrategyQA's evidence
calls it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from data_preprocess.readers.base import Entry, Format, Row, optional_text, text_of, titled
from verl.types import Document

_TEXTS = ("text", "content", "contents", "paragraph_text")


def recognises(row: Row) -> bool:
    """Whether the row has a text and asks nothing."""
    return "question" not in row and any(isinstance(row.get(name), str) for name in _TEXTS)


def nested(row: Row) -> bool:
    """Whether the object holds passages by id."""
    first = next(iter(row.values()), None)
    return isinstance(first, Mapping) and recognises(first)


def unfold(row: Row) -> Iterator[tuple[str, Row]]:
    """Yield one row a passage."""
    for id, passage in row.items():
        yield f"id {id!r}", {**(passage if isinstance(passage, Mapping) else {}), "id": id}


def read(row: Row) -> Entry:
    """Read one passage."""
    name = next((name for name in _TEXTS if row.get(name) is not None), "text")
    text, title = text_of(row, name), optional_text(row, "title")
    index = optional_text(row, "para_index")
    id = f"{title}-{index}" if index else optional_text(row, "id", "_id", "idx")
    if name == "contents" and "title" not in row:
        return Entry(documents=(Document.from_contents(id, text),))
    return Entry(documents=(titled(title, [text], id),))


FORMAT = Format("passages", "title and text, or contents", recognises, read, nested, unfold)
