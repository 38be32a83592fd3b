"""How answers are compared with golds: the one normaliser of this repo, exact match, F1 and span match.

Sources: normalisation, exact match and F1 as in the SQuAD evaluation; span match as DPR's `has_answers` (canonical
decomposition, simple tokens, uncased, contiguous) on normalised text, which is how s3 defines accuracy.

A gold that normalises to nothing ("The The", "!!!") is compared by its un-normalised lower-cased tokens instead, so
it neither matches everything nor nothing. A gold without any token at all matches no answer.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import regex

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def normalise(text: str) -> str:
    """Lower-case, drop ASCII punctuation, drop the articles a, an and the, collapse white space; in that order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def tokens(text: str) -> list[str]:
    """Split into runs of letters, digits and marks, and single other visible characters; decomposed and lower-cased."""
    return [token.lower() for token in _TOKEN.findall(unicodedata.normalize("NFD", text))]


def exact_match(answer: str, golds: Sequence[str]) -> bool:
    """Whether the answer equals any gold after normalisation."""
    return any(_equal(answer, gold) for gold in _several(golds))


def f1(answer: str, golds: Sequence[str]) -> float:
    """Harmonic mean of the precision and recall of normalised words, for the best gold; in [0, 1]."""
    return max((_f1(answer, gold) for gold in _several(golds)), default=0.0)


def span_match(answer: str, golds: Sequence[str]) -> bool:
    """Whether the tokens of any gold stand next to each other, in order, in the answer."""
    raw: list[str] | None = None
    normal = tokens(normalise(answer))
    for gold in _several(golds):
        wanted = tokens(normalise(gold))
        if wanted:
            found = _contains(normal, wanted)
        else:
            raw = tokens(answer) if raw is None else raw
            found = _contains(raw, tokens(gold))
        if found:
            return True
    return False


def _several(golds: Sequence[str]) -> Sequence[str]:
    """Refuse a bare string: its characters would be taken for golds."""
    if isinstance(golds, str):
        raise TypeError(f"golds={golds!r} is a str; expected a sequence of accepted answers, pass ({golds!r},)")
    return golds


def _equal(answer: str, gold: str) -> bool:
    if tokens(normalise(gold)):
        return normalise(answer) == normalise(gold)
    wanted = tokens(gold)
    return bool(wanted) and tokens(answer) == wanted


def _f1(answer: str, gold: str) -> float:
    given, wanted = normalise(answer).split(), normalise(gold).split()
    if not tokens(normalise(gold)):
        given, wanted = tokens(answer), tokens(gold)
    common = sum((Counter(given) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    return 2 * common / (len(given) + len(wanted))


def _contains(words: Sequence[str], wanted: Sequence[str]) -> bool:
    size = len(wanted)
    if size == 0:
        return False
    return any(words[start : start + size] == wanted for start in range(len(words) - size + 1))
