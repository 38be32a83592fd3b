"""PubMedQA's labelled set: the published object by PubMed id, or its rows as the hub has them; answers yes, no, maybe.

An abstract has no title in the set; its passage is called by its PubMed id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from data_preprocess.readers.base import Entry, Format, Row, optional_text, shown, text_of, titled

_LABELS = ("yes", "no", "maybe")


def recognises(row: Row) -> bool:
    """Whether the row has a final decision."""
    return "final_decision" in row and "question" in row


def nested(row: Row) -> bool:
    """Whether the object is the published file."""
    first = next(iter(row.values()), None)
    return isinstance(first, Mapping) and "QUESTION" in first


def unfold(row: Row) -> Iterator[tuple[str, Row]]:
    """Yield one row a question, in the hub's names."""
    for id, asked in row.items():
        found = asked if isinstance(asked, Mapping) else {}
        yield (
            f"id {id}",
            {
                "pubid": id,
                "question": found.get("QUESTION"),
                "context": {"contexts": found.get("CONTEXTS")},
                "final_decision": found.get("final_decision"),
            },
        )


def read(row: Row) -> Entry:
    """Read one question with its abstract."""
    label = optional_text(row, "final_decision")
    if label not in _LABELS:
        raise ValueError(f"final_decision is {shown(row.get('final_decision'))}; expected one of {', '.join(_LABELS)}")
    id = optional_text(row, "pubid")
    title = f"PubMed {id}" if id else ""
    texts = _texts(row.get("context"))
    documents = (titled(title, texts, "0"),) if texts else ()
    return Entry(
        question=text_of(row, "question"),
        answers=(label,),
        id=id,
        gold_titles=(title,) if title and documents else (),
        documents=documents,
        gold=tuple(document.id for document in documents),
    )


def _texts(context: Any) -> list[str]:
    texts = context.get("contexts") if isinstance(context, Mapping) else None
    if texts is None:
        return []
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the contexts are {shown(texts)}; expected a list of strings")
    return list(texts)


FORMAT = Format("pubmedqa", "question, context and final_decision", recognises, read, nested, unfold, False)
