"""Long texts cut into passages of about as many words, at the ends of paragraphs and sentences where that is possible.

A word is a run of characters between white space; of scripts that are written without spaces every character counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_PARAGRAPH = re.compile(r"\n\s*\n")
# A full stop, question or exclamation mark, closing quotes and brackets, and a space; or an ideographic one.
_SENTENCE = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|(?<=[。！？])[」』）]*")


@dataclass(frozen=True, slots=True)
class _Piece:
    """A sentence, or a part of one that is longer than a passage.

    Attributes:
        opens: it is the first of its paragraph.
    """

    text: str
    words: int
    opens: bool


def count_words(text: str) -> int:
    """Return how many words a text has."""
    return sum(1 for _ in _WORD.finditer(text))


def cut(text: str, words: int) -> list[str]:
    """Cut a text into passages of at most `words` words; every word is in exactly one of them, in order.

    A passage ends where the next sentence would not fit, and at the end of a paragraph once it is half full. Sentences
    of one paragraph are joined by a space, paragraphs by a line break.

    Raises:
        ValueError: `words` is less than 1.
    """
    if words < 1:
        raise ValueError(f"words={words}; expected at least 1")
    passages: list[str] = []
    filled = 0
    for piece in _pieces(text, words):
        starts = not passages or filled + piece.words > words or (piece.opens and 2 * filled >= words)
        if starts:
            passages.append(piece.text)
            filled = piece.words
        else:
            passages[-1] += ("\n" if piece.opens else " ") + piece.text
            filled += piece.words
    return passages


def _pieces(text: str, words: int) -> Iterator[_Piece]:
    for paragraph in _PARAGRAPH.split(text):
        opens = True
        for sentence in _sentences(" ".join(paragraph.split())):
            for part in _parts(sentence, words):
                yield _Piece(part, count_words(part), opens)
                opens = False


def _sentences(paragraph: str) -> Iterator[str]:
    start = 0
    for match in _SENTENCE.finditer(paragraph):
        sentence = paragraph[start : match.end()].strip()
        if sentence:
            yield sentence
        start = match.end()
    if rest := paragraph[start:].strip():
        yield rest


def _parts(sentence: str, words: int) -> Iterator[str]:
    """Yield a sentence, cut after every `words` words."""
    starts = [match.start() for match in _WORD.finditer(sentence)][::words]
    for start, end in zip(starts, [*starts[1:], len(sentence)], strict=True):
        yield sentence[start:end].strip()
