"""Answer comparison against hand-computed values and an independent implementation, on arbitrary Unicode."""

from __future__ import annotations

import string
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.rewards.text import exact_match, f1, normalise, span_match, tokens

# Unassigned code points are left out: libraries disagree on them by the version of Unicode they carry.
characters = st.characters(exclude_categories=["Cs", "Cn", "Co"])
pieces = st.one_of(
    st.text(characters, max_size=4),
    st.sampled_from(
        ["The", " a ", "an", "U.S.", "Zoë", "Zoe\u0308", "İ", "ß", "ﬁ", "Σας", "…", "—", "!!!", "東京", "٣", "Ⅷ"]
    ),
    st.sampled_from(["\u200b", "\u00a0", "\u00ad", "🙂", "e\u0301\u0323", "कि", "\n", "_", "$5", "O'Neil", "x²"]),
)
texts = st.lists(pieces, max_size=8).map("".join)
phrases = st.lists(pieces, max_size=8).map(" ".join)


def slow_tokens(text: str) -> list[str]:
    """Tokenise character by character from the Unicode categories."""
    found, word = [], ""
    for char in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(char)[0]
        if kind in "LNM":
            word += char
            continue
        if word:
            found.append(word)
        word = ""
        if kind not in "ZC":
            found.append(char)
    return [token.lower() for token in ([*found, word] if word else found)]


def slow_normalise(text: str) -> str:
    """Normalise without regular expressions: articles are maximal runs of word characters."""
    kept = [char for char in text.lower() if char not in string.punctuation]
    runs: list[str] = []
    for char in kept:
        inside = char.isalnum() or char == "_"
        if inside and runs and runs[-1] and (runs[-1][-1].isalnum() or runs[-1][-1] == "_"):
            runs[-1] += char
        else:
            runs.append(char)
    return " ".join("".join(" " if run in ("a", "an", "the") else run for run in runs).split())


def slow_span_match(answer: str, golds: list[str]) -> bool:
    """Look for the gold's tokens by joining both sides with a separator that no token holds."""
    for gold in golds:
        pair = (slow_normalise(answer), slow_normalise(gold))
        if not slow_tokens(pair[1]):
            pair = (answer, gold)
        given_, wanted = ("\0".join(["", *slow_tokens(text), ""]) for text in pair)
        if wanted.strip("\0") and wanted in given_:
            return True
    return False


@given(texts | phrases)
def test_tokens_agree_with_the_unicode_categories(text: str) -> None:
    assert tokens(text) == slow_tokens(text)


@given(texts | phrases)
def test_normalisation_agrees_with_a_version_without_regular_expressions(text: str) -> None:
    assert normalise(text) == slow_normalise(text)


@given(texts | phrases, st.lists(texts | phrases, max_size=3))
def test_span_match_agrees_with_an_independent_implementation(answer: str, golds: list[str]) -> None:
    assert span_match(answer, golds) == slow_span_match(answer, golds)


@given(phrases, phrases, phrases)
def test_an_answer_that_holds_the_gold_matches(before: str, gold: str, after: str) -> None:
    held = f"{before} {gold} {after}"
    assert span_match(held, [gold]) == bool(tokens(gold))
    assert span_match(held, [gold]) == slow_span_match(held, [gold])


@given(phrases, st.lists(phrases, max_size=3))
def test_equal_answers_match_in_every_measure(answer: str, golds: list[str]) -> None:
    if exact_match(answer, golds):
        assert span_match(answer, golds) and f1(answer, golds) == 1.0
    assert 0.0 <= f1(answer, golds) <= 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, a  dog & an Owl!", "cat dog owl"),
        ("U.S.A.", "usa"),
        ("theatre another", "theatre another"),
        ("«The»", "« »"),
        ("The The", ""),
        ("A\u00a0B", "b"),
        ("", ""),
    ],
)
def test_normalise_by_hand(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "golds", "expected"),
    [
        ("It is Paris, France.", ["Paris"], True),
        ("Parisian", ["Paris"], False),
        ("New York City", ["york city"], True),
        ("York New", ["New York"], False),
        ("New big York", ["New York"], False),
        ("the united states", ["The United States"], True),
        ("Zoe\u0308", ["Zoë"], True),
        ("Zoe", ["Zoë"], False),
        ("in 1984!", ["1985", "1984"], True),
        ("東京です", ["東京"], False),
        ("anything", [], False),
        ("", ["Paris"], False),
    ],
)
def test_span_match_by_hand(answer: str, golds: list[str], expected: bool) -> None:
    assert span_match(answer, golds) is expected


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("It was recorded by The The in 1983", "The The", True),
        ("Paris", "The The", False),
        ("the", "The The", False),
        ("The band !!! played", "!!!", True),
        ("Wow! Great! Yes!", "!!!", False),
        ("", "The The", False),
        ("", "", False),
        ("anything", "", False),
        ("anything", " \u200b\n", False),
        ("\u200b", "\u200b", False),
    ],
)
def test_golds_that_normalise_to_nothing(answer: str, gold: str, expected: bool) -> None:
    assert span_match(answer, [gold]) is expected


@pytest.mark.parametrize(
    ("answer", "golds", "expected"),
    [
        ("The Paris.", ["paris"], True),
        ("Paris France", ["paris"], False),
        ("the the!", ["The The"], False),
        ("the  the", ["The The"], True),
        ("", ["the"], False),
        ("", [""], False),
    ],
)
def test_exact_match_by_hand(answer: str, golds: list[str], expected: bool) -> None:
    assert exact_match(answer, golds) is expected


@pytest.mark.parametrize(
    ("answer", "golds", "expected"),
    [
        ("the big cat", ["a cat"], 2 * 0.5 * 1.0 / 1.5),
        ("cat cat", ["cat"], 2 * 0.5 * 1.0 / 1.5),
        ("dog", ["cat"], 0.0),
        ("red blue green", ["blue green", "red"], 2 * (2 / 3) * 1.0 / (5 / 3)),
        ("the the", ["The The"], 1.0),
        ("", [""], 0.0),
        ("cat", [], 0.0),
    ],
)
def test_f1_by_hand(answer: str, golds: list[str], expected: float) -> None:
    assert f1(answer, golds) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("measure", [exact_match, f1, span_match])
def test_a_bare_string_of_golds_is_refused(measure) -> None:
    with pytest.raises(TypeError, match="sequence of accepted answers"):
        measure("Paris", "Paris")
