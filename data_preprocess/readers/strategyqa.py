"""StrategyQA: yes/no questions whose evidence names paragraphs ("Albany, Georgia-1"); these lie in a file of their own.

Several annotators gave evidence, each enough by itself: the first who named any paragraph counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_preprocess.readers.base import Entry, Format, Row, optional_text, shown, text_of

_NO_PARAGRAPH = frozenset({"operation", "no_evidence"})


def recognises(row: Row) -> bool:
    """Whether the row's answer is a truth value."""
    return "question" in row and isinstance(row.get("answer"), bool)


def read(row: Row) -> Entry:
    """Read one question."""
    answer = row.get("answer")
    if not isinstance(answer, bool):
        raise ValueError(f"answer is {shown(answer)}; expected true or false")
    gold = _paragraphs(row.get("evidence"))
    return Entry(
        question=text_of(row, "question"),
        answers=("yes" if answer else "no",),
        id=optional_text(row, "qid", "id"),
        gold_titles=tuple(dict.fromkeys(" ".join(id.rpartition("-")[0].split()) for id in gold)),
        gold=gold,
    )


def _paragraphs(evidence: Any) -> tuple[str, ...]:
    for annotation in evidence if isinstance(evidence, list | tuple) else ():
        found = tuple(dict.fromkeys(name for name in _strings(annotation) if name not in _NO_PARAGRAPH and "-" in name))
        if found:
            return found
    return ()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _strings(entry)


FORMAT = Format("strategyqa", "qid, question, answer (true or false) and evidence", recognises, read)
