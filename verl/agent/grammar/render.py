"""Text from outside, made safe to stand between protocol tags.

Retrieved documents and questions are data. Before they enter a context, whatever could be read as a tag or as a
special token of a chat model is broken by a space, and a document becomes one line.
"""

from __future__ import annotations

import re

from verl.types import Document

# `<tag`, `</tag`, `<|marker|>` (also with the full-width bar of some tokenizers), `<_`, and Llama 2's bracketed roles.
# `p<0.05` and `a < b` stay as they are.
_OPENERS = re.compile(r"<(?=/?[^\W\d]|/?[|｜])|\[(?=/?INST\])")


def neutralise(text: str) -> str:
    """Put a space after every `<` (or bracket) that could open a tag or a special token; idempotent."""
    return _OPENERS.sub(lambda match: f"{match[0]} ", text)


def one_line(text: str) -> str:
    """Neutralise, and turn every run of whitespace, line breaks included, into one space."""
    return neutralise(" ".join(text.split()))


def document_line(number: int, document: Document, gap: str = "") -> str:
    """Render a document in one line, `gap` between its number and its title."""
    return f"Doc {number}{gap}(Title: {one_line(document.title)}) {one_line(document.text)}"
