"""MIRAGE's `benchmark.json`: five medical sets of multiple-choice questions.

The options are part of what a model is asked, and no part of what a retriever is asked. A question's text is therefore
the published one (the question, a newline, `Options:`, and one line `K: text` an option), and its `extra["query"]` is
the question alone. `retrieval_query` is the one place that knows this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from data_preprocess.readers.base import Entry, Format, Row, optional_text, shown, text_of
from generator_llms.options import read_options
from verl.types import Question

QUERY = "query"
"""Key of `Question.extra`."""

_HEADING = "\nOptions:\n"


def with_options(question: str, options: Mapping[str, str]) -> str:
    """Return the question as a model is asked, with a line for each option."""
    return question + _HEADING + "\n".join(option_line(key, text) for key, text in options.items())


def option_line(key: str, text: str) -> str:
    """Return one option as it stands in the question; the right one's is the golden answer."""
    return f"{key}: {' '.join(text.split())}"


def retrieval_query(question: Question) -> str:
    """Return what a retriever is asked for a question: its text, without the options of a multiple-choice question.

    Questions from `benchmark.json` carry it (`extra["query"]`); in published parquets, which do not, a block of options
    at the end of the text is cut off.
    """
    if stated := question.extra.get(QUERY):
        return stated
    asked = question.text.rpartition(_HEADING)[0]
    return asked if asked.strip() and read_options(question.text) else question.text


def recognises(row: Row) -> bool:
    """Whether the row has options by letter."""
    return "question" in row and isinstance(row.get("options"), Mapping)


def nested(row: Row) -> bool:
    """Whether the object is the published file."""
    subset = next(iter(row.values()), None)
    first = next(iter(subset.values()), None) if isinstance(subset, Mapping) else None
    return isinstance(first, Mapping) and "options" in first


def unfold(row: Row) -> Iterator[tuple[str, Row]]:
    """Yield one row a question, with its set's name and its id."""
    for subset, asked in row.items():
        if not isinstance(asked, Mapping):
            raise ValueError(f"{subset} is a {type(asked).__name__}; expected an object of questions by id")
        for id, question in asked.items():
            fields = question if isinstance(question, Mapping) else {}
            yield f"{subset}, id {id}", {**fields, "subset": subset, "id": id}


def read(row: Row) -> Entry:
    """Read one question; the golden answer is the line of the right option."""
    stated, answer = row.get("options"), row.get("answer")
    # Parquet gives every question all letters, those that it does not have as null.
    options = {k: v for k, v in stated.items() if v is not None} if isinstance(stated, Mapping) else {}
    if not options or not all(isinstance(text, str) for text in options.values()):
        raise ValueError(f"options is {shown(stated)}; expected texts by letter")
    if not all(re.fullmatch("[A-Z]", key) for key in options):
        raise ValueError(f"options has the keys {', '.join(options)}; expected single capital letters")
    if answer not in options:
        raise ValueError(f"answer is {shown(answer)}; expected one of {', '.join(options)}")
    asked = text_of(row, "question")
    return Entry(
        question=with_options(asked, options),
        answers=(option_line(answer, options[answer]),),
        id=optional_text(row, "id"),
        source=optional_text(row, "subset"),
        extra={QUERY: asked},
    )


FORMAT = Format("mirage", "sets of questions by id, with options and answer", recognises, read, nested, unfold, False)
