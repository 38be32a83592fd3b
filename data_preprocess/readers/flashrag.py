"""FlashRAG's layout, in which NQ, TriviaQA, PopQA, HotpotQA, 2WikiMultiHopQA, MuSiQue and Bamboogle are shared.

One object a line: `id`, `question`, `golden_answers` (a list) and `metadata`. What `metadata` holds differs from set to
set; supporting facts and contexts are read in the forms of the sets they come from, and the rest is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from data_preprocess.readers import multihop, musique
from data_preprocess.readers.base import Entry, Format, Row, answers_of, optional_text, text_of


def recognises(row: Row) -> bool:
    """Whether the row has golden answers under FlashRAG's name."""
    return "question" in row and "golden_answers" in row and "data_source" not in row


def read(row: Row) -> Entry:
    """Read one line."""
    metadata = row.get("metadata")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise ValueError(f"metadata is a {type(metadata).__name__}; expected an object or nothing")
    entry = Entry(
        question=text_of(row, "question"),
        answers=answers_of(row.get("golden_answers"), "golden_answers"),
        id=optional_text(row, "id"),
    )
    return _with_metadata(entry, metadata or {})


def _with_metadata(entry: Entry, metadata: Row) -> Entry:
    if metadata.get("paragraphs"):
        evidence = musique.evidence_of(metadata)
        kind = optional_text(metadata, "type") or musique.kind_of(entry.id, metadata)
    else:
        evidence = multihop.evidence_of(metadata)
        kind = optional_text(metadata, "kind", "type")
    return replace(entry, kind=kind, gold_titles=evidence.gold_titles, documents=evidence.documents, gold=evidence.gold)


FORMAT = Format("flashrag", "id, question, golden_answers and metadata", recognises, read)
