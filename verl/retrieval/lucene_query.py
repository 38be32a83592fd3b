"""Boolean queries: `("heat pump" OR boiler) AND efficiency NOT solar`.

    query   = part { OR part }
    part    = group { AND group }
    group   = operand { operand }
    operand = [ NOT ] ( word | "words" | ( query ) )

AND, OR and NOT are operators when they are whole words in capitals; everything else is text, so no character but quotes
and parentheses is special. NOT binds closest, then neighbours, then AND, then OR. Neighbours without an operator are a
bag of words, of which any may match: `climate change AND health` asks for documents with "health" and at least one of
"climate" and "change". NOT takes documents away from what the rest of its group, or of its AND, finds.

Lucene's own classic parser reads `a OR b AND c` as "b and c must occur" and takes `:`, `*`, `/` and ten other
characters of ordinary text for syntax; hence this one, which needs no Java.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_TOKEN = re.compile(r'\s+|(?P<paren>[()])|["“”](?P<phrase>[^"“”]*)["“”]|(?P<quote>["“”])|(?P<word>[^\s()"“”]+)')
_OPERATORS = frozenset({"AND", "OR", "NOT"})
_MAX_DEPTH = 50


class QuerySyntaxError(ValueError):
    """A Boolean query is malformed; the message says where and how."""


@dataclass(frozen=True, slots=True)
class Words:
    """A bag of words; any of them may match."""

    text: str


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words that must occur next to each other, in order."""

    text: str


@dataclass(frozen=True, slots=True)
class Clauses:
    """All of `must`, or where there is none at least one of `should`, and none of `must_not`.

    Either `must` or `should` is empty, and not both.
    """

    must: tuple[Node, ...] = ()
    should: tuple[Node, ...] = ()
    must_not: tuple[Node, ...] = ()


Node = Words | Phrase | Clauses


def parse(query: str) -> Node:
    """Read a Boolean query.

    Raises:
        QuerySyntaxError: it is malformed, empty, or says only what to leave out.
    """
    parser = _Parser(_tokens(query))
    found = parser.query()
    if parser.token.kind != "end":
        raise QuerySyntaxError(f"unexpected {parser.token}; expected AND, OR or the end")
    return _positive(found, "the query")


@dataclass(frozen=True, slots=True)
class _Token:
    """`kind` is an operator, a parenthesis, `word`, `phrase` or `end`; `at` is the position in the query, from 1."""

    kind: str
    text: str
    at: int

    def __str__(self) -> str:
        return "end of the query" if self.kind == "end" else f"{self.text!r} at character {self.at}"


@dataclass(frozen=True, slots=True)
class _Exclusion:
    """What is to be left out of something that is yet to be named."""

    nodes: tuple[Node, ...]


def _tokens(query: str) -> list[_Token]:
    tokens: list[_Token] = []
    for match in _TOKEN.finditer(query):
        at, kind, text = match.start() + 1, match.lastgroup, match.group()
        if kind == "quote":
            raise QuerySyntaxError(f"the quote at character {at} is not closed")
        if kind == "phrase":
            tokens.append(_Token("phrase", match["phrase"], at))
        elif kind == "paren" or text in _OPERATORS:
            tokens.append(_Token(text, text, at))
        elif kind == "word":
            tokens.append(_Token("word", text, at))
    return [*tokens, _Token("end", "", len(query) + 1)]


class _Parser:
    """Recursive descent, one method per line of the grammar."""

    def __init__(self, tokens: Sequence[_Token]) -> None:
        self._tokens = tokens
        self._next = 0
        self._depth = 0

    @property
    def token(self) -> _Token:
        return self._tokens[self._next]

    def query(self) -> Node | _Exclusion:
        parts = self._separated("OR", self._part)
        if len(parts) == 1:
            return parts[0]
        return Clauses(should=tuple(_positive(part, "one side of OR") for part in parts))

    def _part(self) -> Node | _Exclusion:
        groups = self._separated("AND", self._group)
        if len(groups) == 1:
            return groups[0]
        kept, left_out = _divide(groups)
        return Clauses(must=kept, must_not=left_out) if kept else _Exclusion(left_out)

    def _group(self) -> Node | _Exclusion:
        operands = [self._operand()]
        while self.token.kind in ("word", "phrase", "(", "NOT"):
            operands.append(self._operand())
        kept, left_out = _divide(_join_words(operands))
        if not kept:
            return _Exclusion(left_out)
        return kept[0] if len(kept) == 1 and not left_out else Clauses(should=kept, must_not=left_out)

    def _operand(self) -> Node | _Exclusion:
        token = self.token
        self._next += token.kind != "end"
        if token.kind == "word":
            return Words(token.text)
        if token.kind == "phrase":
            return Phrase(token.text)
        if token.kind == "(":
            return self._parenthesised(token)
        if token.kind != "NOT":
            raise QuerySyntaxError(f"unexpected {token}; expected a word, a quote or a parenthesis")
        if self.token.kind == "NOT":
            raise QuerySyntaxError(f"unexpected {self.token} after another one")
        return _Exclusion((_positive(self._operand(), "what follows NOT"),))

    def _parenthesised(self, opening: _Token) -> Node | _Exclusion:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise QuerySyntaxError(f"more than {_MAX_DEPTH} parentheses within each other at character {opening.at}")
        found = self.query()
        if self.token.kind != ")":
            raise QuerySyntaxError(f"the parenthesis at character {opening.at} is not closed: found {self.token}")
        self._next += 1
        self._depth -= 1
        return found

    def _separated(self, operator: str, read: Callable[[], Node | _Exclusion]) -> list[Node | _Exclusion]:
        found = [read()]
        while self.token.kind == operator:
            self._next += 1
            found.append(read())
        return found


def _positive(found: Node | _Exclusion, place: str) -> Node:
    if isinstance(found, _Exclusion):
        raise QuerySyntaxError(f"{place} only says what to leave out; name something to find")
    return found


def _divide(found: Sequence[Node | _Exclusion]) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Separate what is to be found from what is to be left out."""
    kept = tuple(node for node in found if not isinstance(node, _Exclusion))
    return kept, tuple(node for entry in found if isinstance(entry, _Exclusion) for node in entry.nodes)


def _join_words(operands: Sequence[Node | _Exclusion]) -> list[Node | _Exclusion]:
    """Make one bag of all plain words of a group."""
    words = [operand.text for operand in operands if isinstance(operand, Words)]
    others = [operand for operand in operands if not isinstance(operand, Words)]
    return [Words(" ".join(words)), *others] if words else others
