"""Cutting texts into passages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_preprocess.cutting import count_words, cut

PROSE = st.lists(
    st.sampled_from(["Ada", "ran", "far.", "Why?", "\n\n", "he", 'said "so."', "(twice)!", "山の。", "3.5"])
).map(" ".join)


def test_sentences_stay_whole_where_they_fit() -> None:
    assert cut("One two three. Four five. Six seven eight nine.", 5) == [
        "One two three. Four five.",
        "Six seven eight nine.",
    ]


def test_a_passage_ends_with_its_paragraph_once_it_is_half_full() -> None:
    text = "One two three.\n\nFour five.\n \nSix."
    assert cut(text, 6) == ["One two three.", "Four five.\nSix."]
    assert cut(text, 100) == ["One two three.\nFour five.\nSix."]


def test_a_sentence_longer_than_a_passage_is_cut_at_words() -> None:
    assert cut("a b c d e f g", 3) == ["a b c", "d e f", "g"]


def test_scripts_without_spaces_are_cut_at_sentences_and_characters() -> None:
    assert count_words("山の上 top") == 4
    assert cut("山の上。川の下。", 4) == ["山の上。", "川の下。"]
    assert cut("山の上川の下", 4) == ["山の上川", "の下"]


@given(PROSE | st.text(), st.integers(1, 7))
def test_every_word_is_in_one_passage_and_none_is_too_long(text: str, words: int) -> None:
    passages = cut(text, words)
    assert "".join("".join(passages).split()) == "".join(text.split())
    assert all(0 < count_words(passage) <= words for passage in passages)


def test_a_passage_has_words() -> None:
    assert cut(" \n ", 5) == []
    with pytest.raises(ValueError, match="words=0"):
        cut("a", 0)
