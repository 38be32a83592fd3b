"""ROUGE-L between a fact and a passage (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3).

Words are runs of letters and digits, lower-case, unstemmed. Over whole texts, without a split into sentences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class RougeL:
    """Attributes: `recall` is the share of the fact's words that the passage holds in order, `f` the F1 score."""

    recall: float
    precision: float

    @property
    def f(self) -> float:
        """The harmonic mean; 0 where nothing is in common."""
        total = self.recall + self.precision
        return 2 * self.recall * self.precision / total if total else 0.0


def rouge_l(fact: str, passage: str) -> RougeL:
    """Compare by the longest common subsequence of words; 0 where either has none."""
    ours, theirs = words(fact), words(passage)
    if not ours or not theirs:
        return RougeL(0.0, 0.0)
    common = _common(ours, theirs)
    return RougeL(common / len(ours), common / len(theirs))


def words(text: str) -> list[str]:
    """Return the words of a text, lower-case."""
    return _WORD.findall(text.lower())


def _common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Return the length of the longest common subsequence; bit-parallel (Hyyrö 2004), since integers are long here."""
    places: dict[str, int] = {}
    for at, word in enumerate(ours):
        places[word] = places.get(word, 0) | 1 << at
    full = (1 << len(ours)) - 1
    row = full
    for word in theirs:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & full
    return len(ours) - row.bit_count()
