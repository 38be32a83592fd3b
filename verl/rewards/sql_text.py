"""SQL as tokens: just enough to see what a statement does at its top level. Total for any text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

_TOKEN = re.compile(
    r"""
    (?P<space>\s+|--[^\n]*|/\*.*?(?:\*/|\Z))
    |(?P<quoted>'(?:[^']|'')*(?:'|\Z)|"(?:[^"]|"")*(?:"|\Z)|`(?:[^`]|``)*(?:`|\Z)|\[[^\]]*(?:\]|\Z))
    |(?P<word>[^\W\d]\w*)
    |(?P<number>\d[\w.]*)
    |(?P<mark>.)
    """,
    re.VERBOSE | re.DOTALL,
)


def pieces(sql: str) -> Iterator[tuple[str, str]]:
    """Yield the kind of each token (`space`, which comments are too, `quoted`, `word`, `number`, `mark`) and its text.

    The texts put together are `sql`. What is opened and never closed goes on to the end.
    """
    for match in _TOKEN.finditer(sql):
        yield match.lastgroup or "mark", match[0]


def orders(sql: str) -> bool:
    """Say whether a statement orders its result: ORDER BY outside of all parentheses, strings, names and comments.

    One inside them orders a subquery, a window or an aggregate, which says nothing of the order of the result.
    """
    depth, before = 0, ""
    for kind, text in pieces(sql):
        if kind == "space":
            continue
        word = text.upper() if kind == "word" and depth == 0 else ""
        if word == "BY" and before == "ORDER":
            return True
        before = word
        depth = max(0, depth + {"(": 1, ")": -1}.get(text, 0)) if kind == "mark" else depth
    return False


def without_distinct(sql: str) -> str:
    """Return a statement without its keywords DISTINCT, as Spider's evaluation runs it unless told to keep them."""
    return "".join(text for kind, text in pieces(sql) if not (kind == "word" and text.upper() == "DISTINCT"))


def joined_comparisons(sql: str) -> str:
    """Return a statement with `> =`, `< =` and `! =` written together, as Spider's evaluation reads it."""
    return sql.replace("> =", ">=").replace("< =", "<=").replace("! =", "!=")


def one_line(sql: str) -> str:
    """Return a statement in one line: white space and comments between its tokens become one space."""
    runs = groupby(pieces(sql), key=lambda piece: piece[0] == "space")
    return "".join(" " if blank else "".join(text for _, text in run) for blank, run in runs).strip()
