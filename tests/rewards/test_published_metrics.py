"""Every comparison against its published definition, written down here once more, on 10,000 adversarial pairs.

Ours may differ from a published definition only where a gold is silent: it normalises to nothing that could be seen.
What we do with such golds is stated here too, so each test pins both.
"""

from __future__ import annotations

import random
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.rewards.recall import answer_in_context
from verl.rewards.text import (
    exact_match,
    f1,
    has_answer,
    precision,
    recall,
    span_match,
    strict_match,
    sub_span_match,
)
from verl.types import Document, Question

PAIRS = 10_000
PIECES = (
    *("Paris", "paris", "New York", "York", "the", "The The", "a", "an", "A", "theatre", "anthem", "apple"),
    *("U.S.", "US", "U. S. A.", "Manning's", "O’Neil", "O'Neil", "rock'n'roll", "'90s", "prize-winning", "18-karat"),
    *("1,000", "1000", "3.14", "$5", "5%", "٣", "Ⅷ", "x²", "１２", "½", "1984", "19 84"),
    *("Zoë", "Zoe\u0308", "Zoe", "é", "e\u0301\u0323", "İstanbul", "ISTANBUL", "ß", "SS", "ﬁn", "Σας", "ΣΑΣ", "Å"),
    *(
        "東京",
        "東京です",
        "서울",
        "कि",
        "ไทย",
        "שלום",
        "👍",
        "👍🏽",
        "🇫🇷",
        "…",
        "—",
        "«The»",
        "!!!",
        "?",
        "_",
        "C#",
        "c",
    ),
    *("", " ", "\n", "\t", "\u00a0", "\u200b", "\u00ad", "\u2028", "\x1f", "\x85", "\ufeff", "\u0301", "yes", "no"),
)
SEPARATORS = (" ", " ", " ", "", "-", ", ", ".", "'", " the ", " a ", "\u00a0", "\u200b", "\n")
# Unassigned code points are left out: libraries disagree on them by the version of Unicode they carry.
CHARACTERS = [c for c in map(chr, range(0x2FFFF)) if unicodedata.category(c) not in ("Cs", "Cn", "Co")]
MUTATIONS: tuple[Callable[[str], str], ...] = (
    str.upper,
    str.lower,
    str.title,
    str.swapcase,
    lambda text: unicodedata.normalize("NFC", text),
    lambda text: unicodedata.normalize("NFD", text),
    lambda text: unicodedata.normalize("NFKC", text),
    lambda text: f"The answer is {text}.",
    lambda text: f"({text})",
    lambda text: f"{text}'s",
    lambda text: f"{text}ian pre{text}",
    lambda text: f" an  {text}\n",
    lambda text: text.replace(" ", ""),
    lambda text: text.replace("-", " "),
    lambda text: " ".join(reversed(text.split())),
    lambda text: text[: len(text) // 2],
    lambda text: text + " " + text,
)


def a_text(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.1:
        return "".join(rng.choices(CHARACTERS, k=rng.randint(0, 12)))
    if kind < 0.102:
        return rng.choice(PIECES) + " lorem ipsum dolor" * rng.randint(100, 300) + rng.choice(PIECES)
    return "".join(rng.choice(PIECES) + rng.choice(SEPARATORS) for _ in range(rng.randint(0, 4)))


def a_pair(rng: random.Random) -> tuple[str, list[str]]:
    """Draw golds, and an answer that has something to do with one of them more often than not."""
    golds = [a_text(rng) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
    answer = rng.choice(golds) if rng.random() < 0.75 else a_text(rng)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        answer = rng.choice(MUTATIONS)(answer)
    return answer, golds


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, list[str]]]:
    rng = random.Random(20250301)
    return [a_pair(rng) for _ in range(PAIRS)]


@cache
def squad_normalise(text: str) -> str:
    """SQuAD 1.1, in its order: lower-case, remove punctuation, remove articles, fix white space."""
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(word for word in re.sub(r"\b(a|an|the)\b", " ", bare).split())


@cache
def dpr_words(text: str) -> list[str]:
    """DPR's SimpleTokenizer: runs of letters, numbers and marks, or one character that is no separator or control."""
    words, run = [], ""
    for char in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(char)[0]
        if kind in "LNM":
            run += char
        else:
            words += [run] * bool(run) + [char] * (kind not in "ZC")
            run = ""
    return [word.lower() for word in [*words, *[run] * bool(run)]]


def silent(gold: str) -> bool:
    return not dpr_words(squad_normalise(gold))


def squad_em(answer: str, gold: str) -> bool:
    return squad_normalise(answer) == squad_normalise(gold)


def squad_overlap(answer: str, gold: str) -> tuple[float, float, float]:
    """Precision, recall and F1 as SQuAD and KILT compute them; all 0 without a common word."""
    return bag_overlap(squad_normalise(answer).split(), squad_normalise(gold).split())


def bag_overlap(answer: Sequence[str], gold: Sequence[str]) -> tuple[float, float, float]:
    left, same = Counter(gold), 0
    for word in answer:
        if left[word] > 0:
            left[word] -= 1
            same += 1
    if same == 0:
        return 0.0, 0.0, 0.0
    share, found = same / len(answer), same / len(gold)
    return share, found, 2 * share * found / (share + found)


def contiguous(words: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether `wanted` stands in `words`, by strings in which no word can run into the next."""
    return "".join(f"\0{word}\0" for word in wanted) in "".join(f"\0{word}\0" for word in words)


def seen_in(answer: str, gold: str) -> bool:
    """What all measures of containment do with a silent gold: its tokens as they are, and never all texts at once."""
    return bool(dpr_words(gold)) and contiguous(dpr_words(answer), dpr_words(gold))


def raw_equal(answer: str, gold: str) -> bool:
    return bool(dpr_words(gold)) and dpr_words(answer) == dpr_words(gold)


def raw_overlap(answer: str, gold: str) -> tuple[float, float, float]:
    return bag_overlap(dpr_words(answer), dpr_words(gold))


def s3_span(answer: str, gold: str) -> bool:
    return contiguous(dpr_words(squad_normalise(answer)), dpr_words(squad_normalise(gold)))


def kilt_accuracy(answer: str, gold: str) -> bool:
    return bool(answer.strip()) and answer.strip() == gold.strip()


Compared = Callable[[str, str], float]


@dataclass(frozen=True)
class Measure:
    """Ours, the published definition for one gold, and what stands in its place where the gold is silent."""

    ours: Callable[[str, Sequence[str]], float]
    published: Compared
    of_silent: Compared

    def wanted(self, answer: str, golds: Sequence[str]) -> float:
        return max(((self.of_silent if silent(gold) else self.published)(answer, gold) for gold in golds), default=0.0)


MEASURES = {
    "squad and kilt em": Measure(exact_match, squad_em, raw_equal),
    "squad and kilt precision": Measure(
        precision, lambda a, g: squad_overlap(a, g)[0], lambda a, g: raw_overlap(a, g)[0]
    ),
    "squad and kilt recall": Measure(recall, lambda a, g: squad_overlap(a, g)[1], lambda a, g: raw_overlap(a, g)[1]),
    "squad and kilt f1": Measure(f1, lambda a, g: squad_overlap(a, g)[2], lambda a, g: raw_overlap(a, g)[2]),
    "exsearch and flashrag acc": Measure(
        sub_span_match, lambda a, g: squad_normalise(g) in squad_normalise(a), seen_in
    ),
    "s3 span": Measure(span_match, s3_span, seen_in),
    # DPR takes a gold without tokens for a part of every text; ours for a part of none.
    "dpr has_answer": Measure(has_answer, seen_in, seen_in),
    "kilt accuracy": Measure(strict_match, kilt_accuracy, lambda a, g: kilt_accuracy(a, g) and bool(dpr_words(g))),
}


@pytest.mark.parametrize("name", MEASURES)
def test_ours_is_the_published_definition(pairs: list[tuple[str, list[str]]], name: str) -> None:
    measure, positive = MEASURES[name], 0
    for answer, golds in pairs:
        wanted = measure.wanted(answer, golds)
        assert measure.ours(answer, golds) == pytest.approx(wanted, abs=1e-12), (answer[:200], golds)
        positive += wanted > 0
    assert 0.05 * PAIRS < positive < 0.95 * PAIRS


def test_the_pairs_hold_what_is_hard(pairs: list[tuple[str, list[str]]]) -> None:
    golds = [gold for _, several in pairs for gold in several]
    assert sum(map(silent, golds)) > 1000
    assert sum(silent(gold) and bool(dpr_words(gold)) for gold in golds) > 500
    assert sum(len(answer) > 2000 for answer, _ in pairs) > 10


def test_answer_in_context_is_dprs_retrieval_accuracy(pairs: list[tuple[str, list[str]]]) -> None:
    for text, golds in pairs[:2000]:
        asked = Question("q/1", "?", tuple(golds), "toy")
        wanted = any(seen_in(text, gold) for gold in golds)
        assert answer_in_context(asked, [Document("1", "", "nothing"), Document("2", "", text)]) == wanted
        assert answer_in_context(asked, [Document("1", text, "")]) == wanted


@pytest.mark.parametrize(
    ("answer", "golds", "sub_span", "span", "strict", "in_text"),
    [
        ("Paris", ["Paris"], True, True, True, True),
        (" Paris\n", ["Rome", "Paris"], True, True, True, True),
        ("the Parisian", ["Paris"], True, False, False, False),
        ("paris", ["Paris"], True, True, False, True),
        ("Manning's pass", ["Manning"], True, False, False, True),
        ("a prize-winning poet", ["prize"], True, False, False, True),
        ("the US", ["U.S."], True, True, False, False),
        ("Beatles", ["The Beatles"], True, True, False, False),
        ("Zoe\u0308", ["Zoë"], False, True, False, True),
        ("1,000 men", ["1000"], True, True, False, False),
        ("the band The The", ["The The"], True, True, False, True),
        ("the band", ["The The"], False, False, False, False),
        ("anything", ["", "\u200b"], False, False, False, False),
        ("\u200b", ["\u200b"], False, False, False, False),
        ("", ["Paris"], False, False, False, False),
        ("anything", [], False, False, False, False),
    ],
)
def test_containment_by_hand(
    answer: str, golds: list[str], sub_span: bool, span: bool, strict: bool, in_text: bool
) -> None:
    found = (sub_span_match(answer, golds), span_match(answer, golds), strict_match(answer, golds))
    assert (*found, has_answer(answer, golds)) == (sub_span, span, strict, in_text)


def test_precision_and_recall_take_their_own_best_gold() -> None:
    # "red" is all of the second gold and half of the answer; "red blue" is two thirds of the first.
    assert (precision("red blue", ["red blue green", "red"]), recall("red blue", ["red blue green", "red"])) == (1, 1)
    assert recall("red blue", ["red blue green"]) == pytest.approx(2 / 3, abs=1e-12)
    assert precision("red blue", ["red"]) == 0.5


texts = st.lists(st.sampled_from(PIECES) | st.text(st.sampled_from(CHARACTERS), max_size=3), max_size=5)
phrases = st.builds(lambda pieces, separator: separator.join(pieces), texts, st.sampled_from(SEPARATORS))


def check_drawn(answer: str, golds: list[str]) -> None:
    for name, measure in MEASURES.items():
        assert measure.ours(answer, golds) == pytest.approx(measure.wanted(answer, golds), abs=1e-12), name


@settings(max_examples=200, deadline=None)
@given(phrases, st.lists(phrases, max_size=3))
def test_drawn_pairs_agree(answer: str, golds: list[str]) -> None:
    check_drawn(answer, golds)


@pytest.mark.slow
@settings(max_examples=PAIRS, deadline=None)
@given(phrases, st.lists(phrases, max_size=3))
def test_many_drawn_pairs_agree(answer: str, golds: list[str]) -> None:
    check_drawn(answer, golds)


@settings(max_examples=200, deadline=None)
@given(phrases, phrases, phrases)
def test_what_follows_from_what(before: str, gold: str, after: str) -> None:
    answer = f"{before} {gold} {after}"
    assert has_answer(answer, [gold]) == bool(dpr_words(gold))
    assert sub_span_match(answer, [gold]) == (not silent(gold) or bool(dpr_words(gold)))
    if exact_match(answer, [gold]):
        assert sub_span_match(answer, [gold]) and span_match(answer, [gold]) and recall(answer, [gold]) == 1.0
    if strict_match(before, [gold]):
        assert exact_match(before, [gold])


@pytest.mark.parametrize("measure", [precision, recall, sub_span_match, strict_match, has_answer])
def test_a_bare_string_of_golds_is_refused(measure: Callable[[str, Sequence[str]], float]) -> None:
    with pytest.raises(TypeError, match="sequence of accepted answers"):
        measure("Paris", "Paris")
