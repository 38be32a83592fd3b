"""A small made-up literature, and a Boolean search of it that can be computed by hand."""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

_CONDITIONS = ("asthma", "migraine", "psoriasis", "sepsis", "type 2 diabetes", "heart failure", "stroke", "depression")
_INTERVENTIONS = ("aspirin", "exercise training", "metformin", "omega-3", "placebo & care")
_OUTCOMES = ("mortality", "pain", "quality of life", "readmission", "adverse events")
_FIRST_YEAR = 1990
_YEARS = 30
_WORD = re.compile(r"[^\W_]+")
_TOKEN = re.compile(r'"([^"]*)"?|([()])|([^\s()"]+)')
_FIELD_TAG = re.compile(r"\[[^\]]*\]")
_OPERATORS = ("AND", "OR", "NOT")


class QuerySyntaxError(Exception):
    """A strict service cannot parse the query."""


@dataclass(frozen=True, slots=True)
class Record:
    """One publication, which is registered as a trial too.

    Attributes:
        date: of publication, `YYYY/MM/DD`.
    """

    pmid: str
    nct: str
    title: str
    summary: str
    date: str


@cache
def records() -> tuple[Record, ...]:
    """Return the literature: one record for each of 8 conditions, 5 interventions and 5 outcomes."""
    return tuple(
        _record(number, *parts)
        for number, parts in enumerate(itertools.product(_CONDITIONS, _INTERVENTIONS, _OUTCOMES), start=1)
    )


def _record(number: int, condition: str, intervention: str, outcome: str) -> Record:
    date = f"{_FIRST_YEAR + number * 7 % _YEARS}/{1 + number % 12:02}/{1 + number % 28:02}"
    title = f"{string.capwords(intervention)} and {outcome} in {condition}"
    summary = f"A trial of {intervention} in patients with {condition}; its outcome is {outcome}."
    return Record(str(20_000_000 + 37 * number), f"NCT{1_000 + 53 * number:08}", title, summary, date)


def search(query: str, literature: Sequence[Record], until: str = "", strict: bool = False) -> list[Record]:
    """Return what matches, in the literature's order.

    Words have to occur; quoted words have to follow each other. AND (also between neighbours), OR and NOT, in capitals,
    are worked off from left to right, as at PubMed. Field tags in square brackets are left out.

    Args:
        until: date up to which records count; empty for no limit.
        strict: refuse square brackets and parentheses that do not balance, as ClinicalTrials.gov does.

    Raises:
        QuerySyntaxError: `strict`, and the query is none.
    """
    if strict:
        _check(query)
    matching = _evaluate(_FIELD_TAG.sub(" ", query), literature)
    # Dates of one form compare as texts; a year or month alone includes all of it.
    return [r for at, r in enumerate(literature) if at in matching and (not until or r.date[: len(until)] <= until)]


@dataclass(slots=True)
class _Group:
    """What stands between two parentheses, as far as it is read."""

    found: set[int] | None = None
    operator: str = "AND"
    negated: bool = False

    def add(self, operand: set[int], everything: set[int]) -> None:
        if self.negated:
            operand = everything - operand
        if self.found is None:
            self.found = operand
        else:
            self.found = self.found | operand if self.operator == "OR" else self.found & operand
        self.operator, self.negated = "AND", False

    def operate(self, operator: str) -> None:
        if operator == "NOT":
            self.negated = not self.negated
        else:
            self.operator = operator


def _evaluate(query: str, literature: Sequence[Record]) -> set[int]:
    everything = set(range(len(literature)))
    known: dict[tuple[str, ...], set[int]] = {}
    groups = [_Group()]
    for match in _TOKEN.finditer(query):
        phrase, parenthesis, word = match.groups()
        if parenthesis == "(":
            groups.append(_Group())
        elif parenthesis == ")":
            inner = groups.pop()
            groups = groups or [_Group()]
            if inner.found is not None:
                groups[-1].add(inner.found, everything)
        elif word in _OPERATORS:
            groups[-1].operate(word)
        elif wanted := tuple(_WORD.findall((phrase or word or "").lower())):
            if wanted not in known:
                known[wanted] = {at for at, record in enumerate(literature) if _holds(record, wanted)}
            groups[-1].add(known[wanted], everything)
    while len(groups) > 1:
        inner = groups.pop()
        if inner.found is not None:
            groups[-1].add(inner.found, everything)
    return groups[0].found or set()


def _holds(record: Record, wanted: Sequence[str]) -> bool:
    """Whether the words follow each other in title or summary."""
    sought = f" {' '.join(wanted)} "
    return any(sought in text for text in _indexed(record))


@cache
def _indexed(record: Record) -> tuple[str, str]:
    title, summary = (" ".join(_WORD.findall(text.lower())) for text in (record.title, record.summary))
    return f" {title} ", f" {summary} "


def _check(query: str) -> None:
    bracket = re.search(r"[\[\]]", query)
    if bracket:
        raise QuerySyntaxError(f"mismatched input '{bracket[0]}' expecting {{<EOF>, '(', ',', 'NOT', 'AND', 'OR'}}")
    depth = 0
    for parenthesis in re.findall(r"[()]", query):
        depth += 1 if parenthesis == "(" else -1
        if depth < 0:
            raise QuerySyntaxError("extraneous input ')' expecting <EOF>")
    if depth:
        raise QuerySyntaxError("missing ')' at '<EOF>'")
