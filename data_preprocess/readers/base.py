"""What every reader returns, and the checks that they share.

A reader is a `Format`: it recognises a row, and turns it into an `Entry`. Rows are mappings, whether they come from
jsonl, from a JSON list, from parquet or from the hub; a file that is one nested object is unfolded into rows first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl.types import Document, Question

Row = Mapping[str, Any]

_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class Entry:
    """What one row says.

    Attributes:
        question: blank where the row holds passages only.
        answers: accepted golden answers.
        id: the set's own id; blank where it has none.
        source: the set's name where the row itself names it.
        kind: a sub-category where the set names one, for example "bridge" or "2-hop".
        gold_titles: titles of the passages that hold the answer, in hop order where the set has an order.
        documents: the passages that the row ships; their ids need only be unique within the file.
        gold: ids of the passages that hold the answer, among `documents` or in the set's own file of passages.
        extra: what only some tasks know of the question, as in `Question`.
        complete: the row as a question that needs no further work, in place of the fields above.
    """

    question: str = ""
    answers: tuple[str, ...] = ()
    id: str = ""
    source: str = ""
    kind: str = ""
    gold_titles: tuple[str, ...] = ()
    documents: tuple[Document, ...] = ()
    gold: tuple[str, ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)
    complete: Question | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """The passages that a row ships, and which of them hold the answer; the fields are those of `Entry`."""

    gold_titles: tuple[str, ...] = ()
    documents: tuple[Document, ...] = ()
    gold: tuple[str, ...] = ()


def _never(row: Row) -> bool:
    return False


def _unfoldable(row: Row) -> Iterator[tuple[str, Row]]:
    raise AssertionError("this format has no nested form")


@dataclass(frozen=True, slots=True)
class Format:
    """How a set is published.

    Attributes:
        name: what `format=` calls it.
        expects: its keys, for messages.
        recognises: whether a row is of this format; cheap, and total for any mapping.
        read: turns a row into an entry; ValueError with the reason if it cannot.
        nested: whether an object is a whole file of this format.
        unfold: yields the rows of such an object, each with its place inside.
        adds_question_mark: whether the published preparation ends its questions with a question mark.
    """

    name: str
    expects: str
    recognises: Callable[[Row], bool]
    read: Callable[[Row], Entry]
    nested: Callable[[Row], bool] = _never
    unfold: Callable[[Row], Iterator[tuple[str, Row]]] = _unfoldable
    adds_question_mark: bool = True


def text_of(row: Row, name: str) -> str:
    """Return a field that must be a text.

    Raises:
        ValueError: it is missing, not a string, or blank.
    """
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {shown(value)}; expected a text that is not blank")
    return value.strip()


def optional_text(row: Row, *names: str) -> str:
    """Return the first of the fields that holds a string or an integer, as text; blank if none does."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool):
            return str(value).strip()
    return ""


def answers_of(value: Any, name: str) -> tuple[str, ...]:
    """Return golden answers given as one string or as a list of strings, without blank and repeated ones.

    Raises:
        ValueError: something else, a list within the list, or no answer that is not blank.
    """
    listed = [value] if isinstance(value, str) else _listed(value)
    wrong = [answer for answer in listed or () if not isinstance(answer, str)]
    if listed is None or wrong:
        inside = f", which holds {repr(wrong[0])[:40]} ({type(wrong[0]).__name__})" if wrong else ""
        raise ValueError(f"{name} is {shown(value)}{inside}; expected a string or a list of strings")
    answers = tuple(dict.fromkeys(answer.strip() for answer in listed if answer.strip()))
    if not answers:
        raise ValueError(f"{name} is {shown(value)}; expected at least one answer that is not blank")
    return answers


def one_answer(row: Row, name: str) -> str:
    """Return the answer of a set that gives exactly one.

    Raises:
        ValueError: it is missing, blank, or a list.
    """
    value = row.get(name)
    if isinstance(value, list | tuple):
        raise ValueError(f"{name} is the list {shown(value)}; this set gives one answer as a string")
    return text_of(row, name)


def rows_of(value: Any, name: str) -> list[Row]:
    """Return a list of mappings, also when it was stored by columns (a mapping of lists, as the hub stores it).

    Raises:
        ValueError: something else.
    """
    if isinstance(value, Mapping):
        columns = {key: _listed(column) for key, column in value.items()}
        if columns and all(column is not None for column in columns.values()):
            lengths = {len(column) for column in columns.values() if column is not None}
            if len(lengths) == 1:
                return [{key: (column or [])[i] for key, column in columns.items()} for i in range(lengths.pop())]
    listed = _listed(value)
    if isinstance(value, Mapping) or listed is None or not all(isinstance(entry, Mapping) for entry in listed):
        raise ValueError(f"{name} is {shown(value)}; expected a list of objects")
    return listed


def titled(title: str, texts: Sequence[str], id: str) -> Document:
    """Return a passage out of its sentences; title and sentences get single spaces around them."""
    return Document(id, " ".join(title.split()), " ".join(text.strip() for text in texts if text.strip()))


def shown(value: Any) -> str:
    """Return a value short enough for a message."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def _listed(value: Any) -> list[Any] | None:
    """Return a list, tuple or array as a list, anything else as None."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, list | tuple) else None
