"""What several protocols do with text and documents."""

from __future__ import annotations

from collections.abc import Iterable

from verl.types import Document


def clean_query(query: str) -> str:
    """Trim, and replace lone surrogates (JSON can spell them), which no service could be sent."""
    return query.encode("utf-8", "replace").decode("utf-8").strip()


def unique_documents(documents: Iterable[Document]) -> tuple[Document, ...]:
    """Return the documents in order, those with equal title and text once; those that are ids alone, by their id."""
    unique: dict[tuple[str, str], Document] = {}
    for document in documents:
        blank = not (document.title or document.text)
        unique.setdefault((document.id, "") if blank else (document.title, document.text), document)
    return tuple(unique.values())
