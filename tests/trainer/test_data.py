"""Which questions are trained on, in which order, and where a resumed run goes on."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.errors import ConfigError
from verl.records import write_questions
from verl.trainer.data import DataConfig, Shuffled, training_questions, validation_questions
from verl.types import Baseline, Question


def numbered(count: int) -> list[Question]:
    return [Question(f"s/{n}", f"q{n}", (f"a{n}",), "s") for n in range(count)]


def ids(questions: list[Question]) -> list[str]:
    return [question.id for question in questions]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Five training questions: one with a yes/no gold, one that naive RAG answers, one that it does not."""
    plain, yes, answered, unanswered, other = numbered(5)
    questions = [
        plain,
        replace(yes, answers=("Yes", "certainly")),
        replace(answered, baseline=Baseline((), "a2", True)),
        replace(unanswered, baseline=Baseline((), "nonsense", False)),
        other,
    ]
    write_questions(tmp_path / "train.parquet", questions, "train")
    write_questions(tmp_path / "val.parquet", numbered(4), "test")
    return DataConfig(tmp_path / "train.parquet", tmp_path / "val.parquet", batch_size=3)


def test_yes_no_golds_and_what_naive_rag_answers_are_left_out(
    config: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        kept = training_questions(config)
    assert ids(kept) == ["s/0", "s/3", "s/4"]
    assert "5 questions, 1 dropped (bare gold), 1 dropped (naive RAG correct), 3 left" in caplog.text


def test_each_filter_can_be_switched_off(config: DataConfig) -> None:
    assert ids(training_questions(replace(config, drop_yes_no=False))) == ["s/0", "s/1", "s/3", "s/4"]
    assert ids(training_questions(replace(config, drop_rag_correct=False))) == ["s/0", "s/2", "s/3", "s/4"]


def test_too_few_questions_for_a_step_are_refused_with_the_fix(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"leaves 3 training questions, fewer than data.batch_size=4; lower it"):
        training_questions(replace(config, batch_size=4))


def test_validation_is_unfiltered_and_may_be_cut(config: DataConfig) -> None:
    assert ids(validation_questions(config)) == ["s/0", "s/1", "s/2", "s/3"]
    assert ids(validation_questions(replace(config, validation_limit=2))) == ["s/0", "s/1"]


@pytest.mark.parametrize(
    ("golds", "expected"),
    [
        (("yes",), True),
        ((" FALSE ",), True),
        (("Paris", "No"), True),
        (("Yes, Minister",), False),
        (("Norway",), False),
    ],
)
def test_only_an_exact_yes_or_no_counts(config: DataConfig, golds: tuple[str, ...], expected: bool) -> None:
    asked = [Question("s/train/1", "q", golds, "s"), *numbered(3)]
    write_questions(config.train, asked, "train")
    assert ("s/train/1" not in ids(training_questions(config))) is expected


def test_an_empty_validation_file_is_refused(config: DataConfig) -> None:
    write_questions(config.validation, [], "test")
    with pytest.raises(ConfigError, match=r"data.validation=.*val.parquet holds no question"):
        validation_questions(config)


@given(count=st.integers(1, 9), seed=st.integers(0, 3), sizes=st.lists(st.integers(0, 12), max_size=8), data=st.data())
def test_a_resumed_source_goes_on_where_the_unbroken_one_would(
    count: int, seed: int, sizes: list[int], data: st.DataObject
) -> None:
    questions = numbered(count)
    unbroken = Shuffled(questions, seed)
    taken = [ids(unbroken.take(size)) for size in sizes]
    stop = data.draw(st.integers(0, len(sizes)))
    first, second = Shuffled(questions, seed), Shuffled(questions, seed)
    before = [ids(first.take(size)) for size in sizes[:stop]]
    second.load_state_dict(first.state_dict())
    assert before + [ids(second.take(size)) for size in sizes[stop:]] == taken


@given(count=st.integers(1, 9), epochs=st.integers(1, 4), step=st.integers(1, 5))
def test_every_epoch_holds_every_question_once(count: int, epochs: int, step: int) -> None:
    source = Shuffled(numbered(count), seed=1)
    taken: list[str] = []
    while len(taken) < count * epochs:
        taken += ids(source.take(step))
    for epoch in range(epochs):
        assert Counter(taken[epoch * count : (epoch + 1) * count]) == Counter(f"s/{n}" for n in range(count))


def test_epochs_and_seeds_have_orders_of_their_own_and_shuffling_can_be_off() -> None:
    questions = numbered(20)
    source = Shuffled(questions, seed=1)
    first, second = ids(source.take(20)), ids(source.take(20))
    assert first != second
    assert first != ids(Shuffled(questions, seed=2).take(20))
    assert first == ids(Shuffled(questions, seed=1).take(20))
    assert ids(Shuffled(questions, seed=1, shuffle=False).take(40)) == ids(questions) * 2


@pytest.mark.parametrize(
    "other",
    [
        Shuffled(numbered(7), seed=1),
        Shuffled(numbered(9), seed=1),
        Shuffled([replace(q, id=q.id + "x") for q in numbered(8)], seed=1),
        Shuffled(numbered(8), seed=2),
        Shuffled(numbered(8), seed=1, shuffle=False),
    ],
    ids=["fewer", "more", "others", "seed", "unshuffled"],
)
def test_other_questions_or_another_order_are_refused(other: Shuffled) -> None:
    saved = Shuffled(numbered(8), seed=1)
    saved.take(3)
    with pytest.raises(ConfigError, match=r"8 questions in another order.*trainer.resume=never"):
        other.load_state_dict(saved.state_dict())
    assert other.position == 0


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"validation_limit": 0}])
def test_sizes_out_of_range_are_refused(config: DataConfig, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        replace(config, **wrong)
