"""Multiple choice: options are read as they were written, and only a clear answer means one of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generator_llms.options import chosen_option, read_options

ASKED = "Which organ pumps?\nOptions:\nA: The liver\nB: the heart.\nC: C. difficile\nD: liver and heart"


def test_options_are_read_in_order() -> None:
    assert read_options(ASKED) == {
        "A": "The liver",
        "B": "the heart.",
        "C": "C. difficile",
        "D": "liver and heart",
    }


def test_a_question_without_options_has_none() -> None:
    assert read_options("Which?") == {}
    assert read_options("Options:\nA: x") == {}  # the heading has a line of its own, after the question
    assert chosen_option("Which?", "A") is None


def test_a_line_that_is_no_next_option_goes_on_with_the_last_one() -> None:
    text = "Why?\nOptions:\nlost\nA: one\nC: two\nB: three\n\nfour\n"
    assert read_options(text) == {"A": "one\nC: two", "B": "three\n\nfour"}


def test_the_last_heading_counts() -> None:
    assert read_options("Quote:\nOptions:\nA: old\nWhich?\nOptions:\nA: new") == {"A": "new"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B: the heart."),
        ("b", "B: the heart."),
        ("(B)", "B: the heart."),
        ("B.", "B: the heart."),
        ("B: the heart.", "B: the heart."),
        ("B) The  Heart", "B: the heart."),
        ("B. heart", "B: the heart."),
        ("B: the muscle that pumps", "B: the heart."),
        ("The answer is B", "B: the heart."),
        ("the correct option is (b)", "B: the heart."),
        ("Answer: B", "B: the heart."),
        ("the heart", "B: the heart."),
        ("THE LIVER", "A: The liver"),
        ("C. difficile", "C: C. difficile"),
        ("A: the heart", None),  # letter and text contradict each other
        ("A. thaliana", None),  # a name, no letter
        ("A man", None),
        ("E", None),
        ("the kidney", None),
        ("A or B", None),
        ("", None),
        ("I", None),
    ],
)
def test_only_a_clear_answer_means_an_option(answer: str, expected: str | None) -> None:
    assert chosen_option(ASKED, answer) == expected


def test_a_single_letter_is_an_options_letter_though_it_is_anothers_text() -> None:
    text = "Which?\nOptions:\nA: B\nB: A\nC: 1"
    assert [chosen_option(text, answer) for answer in ("A", "b", "1")] == ["A: B", "B: A", "C: 1"]


def test_a_text_that_two_options_share_means_neither() -> None:
    text = "Which?\nOptions:\nA: same\nB: same"
    assert chosen_option(text, "same") is None
    assert chosen_option(text, "A: same") == "A: same"


words = st.text(alphabet="abcdefgh ", min_size=1, max_size=12).filter(str.strip)


@given(st.lists(words, min_size=1, max_size=8, unique_by=lambda s: " ".join(s.split())), st.data())
def test_every_way_to_write_an_option_means_it(texts: list[str], data: st.DataObject) -> None:
    options = {chr(ord("A") + i): text for i, text in enumerate(texts)}
    question = "Q?\nOptions:\n" + "\n".join(f"{letter}: {text}" for letter, text in options.items())
    letter = data.draw(st.sampled_from(list(options)))
    meant = f"{letter}: {options[letter].strip()}"
    for written in (letter, f"({letter})", meant, f"{letter}) {options[letter]}", f"the answer is {letter}."):
        assert chosen_option(question, written) == meant


@given(st.text(), st.text())
def test_any_text_is_read_without_an_error(question: str, answer: str) -> None:
    assert chosen_option(f"{question}\nOptions:\n{answer}", answer) is None or answer.strip()


def test_the_options_of_mirage_survive(tmp_path: Path) -> None:
    source = Path(__file__).resolve().parents[3] / "shared" / "data" / "mirage" / "benchmark.json.gz"
    if not source.is_file():
        pytest.skip("the MIRAGE benchmark is not here")
    sets = json.loads(gzip.decompress(source.read_bytes()))
    for item in (item for entries in sets.values() for item in entries.values()):
        lines = "\n".join(f"{letter}: {text}" for letter, text in item["options"].items())
        question = f"{item['question']}\nOptions:\n{lines}"
        assert read_options(question) == {letter: text.strip() for letter, text in item["options"].items()}
        gold = f"{item['answer']}: {item['options'][item['answer']].strip()}"
        assert chosen_option(question, item["answer"]) == gold
        assert chosen_option(question, gold) == gold
