"""HotpotQA (distractor setting) and 2WikiMultiHopQA as their authors and the hub publish them.

`_id` or `id`, `question`, `answer`, `type`, and twice the same in two forms: `supporting_facts` as [[title, sentence]]
or {title: [], sent_id: []}, `context` as [[title, [sentence]]] or {title: [], sentences: [[]]}. A context may be
missing; the gold titles are then known all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_preprocess.readers.base import Entry, Evidence, Format, Row, one_answer, optional_text, shown, text_of, titled
from verl.rewards.recall import title_key

_FACTS = "supporting_facts"


def recognises(row: Row) -> bool:
    """Whether the row has one answer and supporting facts."""
    return {"question", "answer", _FACTS} <= row.keys()


def read(row: Row) -> Entry:
    """Read one question."""
    evidence = evidence_of(row)
    return Entry(
        question=text_of(row, "question"),
        answers=(one_answer(row, "answer"),),
        id=optional_text(row, "_id", "id"),
        kind=optional_text(row, "type"),
        gold_titles=evidence.gold_titles,
        documents=evidence.documents,
        gold=evidence.gold,
    )


def evidence_of(row: Row) -> Evidence:
    """Return the passages of `context` and those that `supporting_facts` names.

    Raises:
        ValueError: either has none of the two forms.
    """
    titles = tuple(dict.fromkeys(" ".join(title.split()) for title in _fact_titles(row.get(_FACTS))))
    documents = tuple(titled(title, texts, str(number)) for number, (title, texts) in enumerate(_checked_pairs(row)))
    keys = set(map(title_key, titles))
    return Evidence(titles, documents, tuple(page.id for page in documents if title_key(page.title) in keys))


def supporting_sentences(row: Row) -> list[tuple[str, str]]:
    """Return (title, sentence) of every supporting fact whose sentence the row ships, in the row's order.

    Raises:
        ValueError: as `evidence_of`.
    """
    facts = row.get(_FACTS)
    titles = _fact_titles(facts)
    numbers = facts.get("sent_id", ()) if isinstance(facts, Mapping) else [entry[1:2] for entry in facts or ()]
    numbers = [number[0] if isinstance(number, list | tuple) and number else number for number in numbers]
    pages = {title_key(title): texts for title, texts in _checked_pairs(row)}
    found = []
    for title, number in zip(titles, numbers, strict=False):
        sentences = pages.get(title_key(title), ())
        if isinstance(number, int) and 0 <= number < len(sentences) and sentences[number].strip():
            found.append((" ".join(title.split()), " ".join(sentences[number].split())))
    return found


def _fact_titles(facts: Any) -> list[str]:
    listed = facts.get("title") if isinstance(facts, Mapping) else facts
    entries = listed if isinstance(listed, list | tuple) else () if listed is None else (None,)
    titles = [entry[0] if isinstance(entry, list | tuple) and entry else entry for entry in entries]
    if not all(isinstance(title, str) for title in titles):
        raise ValueError(f"{_FACTS} is {shown(facts)}; expected [[title, sentence]] or {{title: [], sent_id: []}}")
    return titles


def _checked_pairs(row: Row) -> list[tuple[str, Any]]:
    context = row.get("context")
    pairs = _pairs(context) if context else []
    if pairs is None or not all(isinstance(title, str) and _are_texts(texts) for title, texts in pairs):
        expected = "[[title, [sentence]]] or {title: [], sentences: [[]]}"
        raise ValueError(f"context is {shown(context)}; expected {expected}")
    return pairs


def _pairs(context: Any) -> list[tuple[Any, Any]] | None:
    """Return titles with their sentences, unchecked; None if the context has neither form."""
    if isinstance(context, Mapping):
        titles = context.get("title")
        sentences = next((context[name] for name in ("sentences", "content") if name in context), None)
        lists = isinstance(titles, list | tuple) and isinstance(sentences, list | tuple)
        return list(zip(titles, sentences, strict=True)) if lists and len(titles) == len(sentences) else None
    if not isinstance(context, list | tuple):
        return None
    whole = all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in context)
    return [(title, texts) for title, texts in context] if whole else None


def _are_texts(texts: Any) -> bool:
    return isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)


HOTPOTQA = Format("hotpotqa", "question, answer, supporting_facts and context", recognises, read)
TWO_WIKI = Format(
    "2wikimultihopqa",
    "question, answer, supporting_facts, evidences and context",
    lambda row: recognises(row) and "evidences" in row,
    read,
)
