"""How answers are compared with golds: the one normaliser of this repo, and every comparison that is built on it.

| function | published as | compares |
|---|---|---|
| `exact_match` | SQuAD 1.1 and KILT "em" | normalised texts, equal |
| `f1`, `precision`, `recall` | SQuAD 1.1 and KILT "f1" | bags of normalised words; the best gold each |
| `span_match` | s3's accuracy | tokens of the normalised texts, contiguous |
| `sub_span_match` | "acc" of ExSearch and FlashRAG (sub-EM) | normalised gold is a substring |
| `strict_match` | KILT "accuracy" | texts as they are, without white space around them, equal |
| `has_answer` | DPR's and pyserini's `has_answer(s)` | tokens of the texts as they are, contiguous |

`span_match` and `has_answer` differ: normalisation drops punctuation before the text is split, which glues "Manning's"
and "prize-winning" into one word each, but forgives "U.S." for "US" and a missing article. Answers are judged by the
former, as s3 does; passages are searched by the latter, as retrieval accuracy is published.

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
    return max((_f1(*overlap) for overlap in _overlaps(answer, golds)), default=0.0)


def precision(answer: str, golds: Sequence[str]) -> float:
    """Share of the answer's normalised words that the gold has too, for the gold that gives the most; in [0, 1]."""
    return max((_share(common, given) for common, given, _ in _overlaps(answer, golds)), default=0.0)


def recall(answer: str, golds: Sequence[str]) -> float:
    """Share of the gold's normalised words that the answer has too, for the gold that gives the most; in [0, 1]."""
    return max((_share(common, wanted) for common, _, wanted in _overlaps(answer, golds)), default=0.0)


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


def sub_span_match(answer: str, golds: Sequence[str]) -> bool:
    """Whether any normalised gold is a substring of the normalised answer, also inside of words."""
    return any(_is_substring(answer, gold) for gold in _several(golds))


def strict_match(answer: str, golds: Sequence[str]) -> bool:
    """Whether the answer equals any gold character by character, but for white space around them."""
    stripped = answer.strip()
    return any(stripped == gold.strip() for gold in _several(golds)) and bool(tokens(answer))


def has_answer(text: str, golds: Sequence[str]) -> bool:
    """Whether the tokens of any gold stand next to each other, in order, in a text that is not normalised."""
    words = tokens(text)
    return any(_contains(words, tokens(gold)) for gold in _several(golds))


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


def _is_substring(answer: str, gold: str) -> bool:
    if tokens(normalise(gold)):
        return normalise(gold) in normalise(answer)
    return _contains(tokens(answer), tokens(gold))


def _overlaps(answer: str, golds: Sequence[str]) -> list[tuple[int, int, int]]:
    return [_overlap(answer, gold) for gold in _several(golds)]


def _overlap(answer: str, gold: str) -> tuple[int, int, int]:
    """Return how many words answer and gold have in common, and how many each of them has."""
    given, wanted = normalise(answer).split(), normalise(gold).split()
    if not tokens(normalise(gold)):
        given, wanted = tokens(answer), tokens(gold)
    common = sum((Counter(given) & Counter(wanted)).values())
    return common, len(given), len(wanted)


def _f1(common: int, given: int, wanted: int) -> float:
    return 2 * common / (given + wanted) if common else 0.0


def _share(common: int, words: int) -> float:
    return common / words if common else 0.0


def _contains(words: Sequence[str], wanted: Sequence[str]) -> bool:
    size = len(wanted)
    if size == 0:
        return False
    return any(words[start : start + size] == wanted for start in range(len(words) - size + 1))
